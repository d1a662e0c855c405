"""Progress of long loops: one generator round the loop, which vanishes when nobody shall see it.

On a terminal with ``rich`` installed it is a bar; anywhere else it is a log line now and then, so that a batch job's
log stays short.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Final, TypeVar

T = TypeVar("T")
LINE_SECONDS: Final = 10.0

logger = logging.getLogger(__name__)


def track(
    items: Iterable[T], title: str, total: int, *, log: str = "info", note: Callable[[], str] = str
) -> Iterator[T]:
    """Yields ``items``, showing how many of ``total`` are done, the time left, and what ``note()`` adds.

    ``log`` "quiet" shows nothing.
    """
    if log == "quiet":
        yield from items
    elif _on_terminal() and importlib.util.find_spec("rich"):
        yield from _bar(items, title, total, note)
    else:
        yield from _lines(items, title, total, note)


def remaining(done: int, total: int, elapsed: float) -> str:
    """Returns the time left at the pace so far, as "1:05", or "?" while nothing is done.

    >>> remaining(10, 40, 20.0)
    '1:00'
    """
    if done <= 0:
        return "?"
    seconds = round(elapsed / done * max(total - done, 0))
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{hours}:{minutes:02d}:{seconds % 60:02d}" if hours else f"{minutes}:{seconds % 60:02d}"


def heading(done: int, total: int, elapsed: float, note: str = "") -> str:
    """Returns what begins the line that announces the next item of a long job, when ``done`` of ``total`` are.

    >>> heading(2, 12, 8.0, "5 safe, 1 wrong")
    '[3/12, 0:40 left, 5 safe, 1 wrong]'
    """
    left = f"{remaining(done, total, elapsed)} left" if done else ""
    return f"[{', '.join(filter(None, [f'{done + 1}/{total}', left, note]))}]"


def counted(names: Iterable[str]) -> str:
    """Returns how often each name comes, the commonest first.

    >>> counted(["safe", "wrong", "safe"])
    '2 safe, 1 wrong'
    """
    return ", ".join(f"{count} {name}" for name, count in Counter(names).most_common())


def _on_terminal(name: str = "stderr") -> bool:
    """Returns whether that stream is a terminal; one that is missing, closed or somebody's own class without ``isatty`` is none."""
    try:
        return bool(getattr(sys, name).isatty())
    except (AttributeError, ValueError, OSError):
        return False


def _lines(items: Iterable[T], title: str, total: int, note: Callable[[], str]) -> Iterator[T]:
    start = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - last >= LINE_SECONDS:
            last = now
            _report(title, done, total, now - start, note())
        yield item


def _report(title: str, done: int, total: int, elapsed: float, note: str) -> None:
    left = remaining(done, total, elapsed)
    logger.info("%s: %d of %d done, %s left%s", title, done, total, left, f", {note}" if note else "")


def _bar(items: Iterable[T], title: str, total: int, note: Callable[[], str]) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    # What is printed above a bar on stderr would end up there: a stdout that goes into a file has to stay its own.
    shared = _on_terminal("stdout")
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=shared) as bar:
        task = bar.add_task(title, total=total, note="")
        for item in items:
            yield item
            bar.update(task, advance=1, note=note())
