"""What stored rows say for a config, in figures and words for people; known without torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from cache_db.models import Problem, Scalar

LEVELS: Final = ("not proven", "quick proof", "gate", "soak")
_ERROR: Final = "_error"


class Margin(NamedTuple):
    """How far the worst row of one output was off, and which part of its budget that is (over 1 is wrong)."""

    output: str
    error: float
    ratio: float

    def __str__(self) -> str:
        return f"{self.output} {self.error:.1e} ({self.ratio:.0%} of its budget)"


class Difference(NamedTuple):
    """One column or field in which a stored problem differs from the one asked for; None is one that is not there."""

    name: str
    there: Scalar | None
    wanted: Scalar | None

    def __str__(self) -> str:
        return f"{self.name} is {self.there!r} there, {self.wanted!r} wanted"


def level(number: int) -> str:
    """Returns a level of proof in words."""
    return f"level {number} ({LEVELS[number]})" if 0 <= number < len(LEVELS) else f"level {number}"


def margins(figures: Mapping[str, Scalar]) -> tuple[Margin, ...]:
    """Returns the proof's figures of each output, the nearest to its budget first; a row's may be anything."""
    found = []
    for name, error in figures.items():
        ratio = figures.get(f"{name.removesuffix(_ERROR)}_ratio")
        if name.endswith(_ERROR) and _is_number(error) and _is_number(ratio):
            found.append(Margin(name.removesuffix(_ERROR), float(error), float(ratio or 0.0)))
    return tuple(sorted(found, key=lambda margin: -margin.ratio))


def differences(there: Problem, wanted: Problem) -> tuple[Difference, ...]:
    """Returns in what the stored problem ``there`` differs from ``wanted``: columns first, then fields."""
    left, right = _flat(there), _flat(wanted)
    names = dict.fromkeys([*left, *sorted(there.fields.keys() | wanted.fields.keys())])
    return tuple(
        Difference(name, left.get(name), right.get(name)) for name in names if left.get(name) != right.get(name)
    )


def plain(value: Any) -> Any:
    """Returns what JSON can hold: None for what is no number."""
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def proof_lines(figures: Mapping[str, Scalar]) -> Iterator[str]:
    """Yields what a person reads of a proof: errors and margins, on which case, how often it was repeated."""
    found = margins(figures)
    if found:
        case = figures.get("worst_case")
        yield f"errors    {', '.join(map(str, found))}{f'; the nearest on case {case!r}' if case else ''}"
    if "repeats" in figures:
        yield f"races     none in {figures['repeats']} repeats"


def when(seconds: float) -> str:
    """Returns a time as people read it; a row's may be anything."""
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
    except (OverflowError, OSError, ValueError):
        return f"at {seconds:g} s"


def _flat(problem: Problem) -> dict[str, Scalar]:
    return {**problem.model_dump(exclude={"fields"}), **problem.fields}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
