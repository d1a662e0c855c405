"""``prewarm --soak``: winners that only just won are run until they have nothing left to show."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from autotune import DeviceInfo, Mode, Resolution, Settings, forget, resolve
from autotune.soak import Soaked, soak
from cache_db import open_layers
from cache_db.models import Problem

# A winner that fails makes room for the next; when so many have failed, something else is wrong.
ROUNDS: Final = 4


def soaked(
    problem: Problem,
    device: DeviceInfo,
    chosen: Settings,
    found: Resolution,
    repeats: int,
    tell: Callable[[str], None],
) -> Resolution:
    """Soaks the winners of ``problem`` with ``repeats``, and tunes on where one fails; returns what is to run then.

    ``tell`` is given a line for each kernel and round. The result has no choices when ``ROUNDS`` rounds found no lasting winners.
    Raises AutotuneError when nothing can be judged.
    """
    for _ in range(ROUNDS):
        before = time.monotonic()
        results = soak(problem, device, chosen, open_layers(chosen.cache_dir), repeats)
        seconds = time.monotonic() - before
        for result in results:
            tell(_line(result))
        if all(result.passed for result in results):
            tell(f"soaked in {seconds:.1f} s")
            return found
        forget()
        found = resolve(problem, device, replace(chosen, mode=Mode.TUNE))
        if not found.choices or any(choice.rung not in ("winner", "pinned") for choice in found.choices.values()):
            return found
    return replace(found, choices={}, reason=f"{ROUNDS} winners in a row failed their soak")


def _line(result: Soaked) -> str:
    kernel, config = result.winner.kernel, result.winner.config
    if result.passed:
        return f"{kernel}: {result.repeats} repeats agree{' (earlier)' if result.already else ''}: {config}"
    return f"{kernel}: {result.verdict} after {result.repeats} repeats: {result.reason}: {config}"
