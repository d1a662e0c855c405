"""``prewarm --soak``: winners that only just won are run until they have nothing left to show."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from autotune import AutotuneError, DeviceInfo, Mode, Resolution, Settings, forget, resolve
from autotune.errors import SuspectDevice
from autotune.soak import Soaked, soak
from cache_db import open_layers
from cache_db.models import Problem


def soaked(
    problem: Problem,
    device: DeviceInfo,
    chosen: Settings,
    found: Resolution,
    repeats: int,
    tell: Callable[[str], None],
) -> Resolution:
    """Soaks the winners of ``problem`` with ``repeats``, and tunes on where one fails; returns what is to run then.

    ``tell`` is given a line for each kernel and round. The result has no choices, and says why, where there is nothing
    to soak or it cannot be judged. Raises SuspectDevice.
    """
    failed: set[tuple[str, str]] = set()
    while found.won:
        before = time.monotonic()
        try:
            results = soak(
                problem,
                device,
                chosen,
                open_layers(chosen.cache_dir, chosen.db_url, chosen.db_seconds, chosen.seeds),
                repeats,
            )
        except SuspectDevice:
            raise
        except AutotuneError as error:
            return replace(found, choices={}, reason=f"not soaked: {error}")
        for result in results:
            tell(_line(result))
        bad = [result for result in results if not result.passed]
        if not bad:
            seconds = time.monotonic() - before
            tell(f"soaked in {seconds:.1f} s" if results else "nothing is soaked: every kernel is pinned")
            return found
        name = (bad[0].kernel, bad[0].config.hash)
        if name in failed:  # what only failed for want of time or memory bars nothing everywhere
            return replace(found, choices={}, reason=f"{_line(bad[0])}, once more")
        failed.add(name)
        forget()
        found = resolve(problem, device, replace(chosen, mode=Mode.TUNE))
    return found


def _line(result: Soaked) -> str:
    if result.passed:
        return (
            f"{result.kernel}: {result.repeats} repeats agree{' (earlier)' if result.already else ''}: {result.config}"
        )
    return f"{result.kernel}: {result.verdict} after {result.repeats} repeats: {result.reason}: {result.config}"
