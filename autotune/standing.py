"""What may run where a winner does not: the next safe rows of its key, and another kernel in the place of several.

A foreign implementation may be missing here, be of other versions, or not be allowed: its winner is then passed over
for the fastest that has been proven, instead of a new sweep.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from autotune.judgements import GATE_LEVEL
from autotune.scene import Scene
from cache_db.models import Trial, Verdict, Winner

# Rows tried in a winner's place; each may cost a proof.
NEXT: Final = 4


def next_safe(scene: Scene, winner: Winner) -> Iterator[Winner]:
    """Yields the fastest proven rows of the winner's key that the rules allow here, if the winner is a foreign one."""
    if not scene.foreign(winner.kernel, winner.config):
        return
    trials = [row for row in scene.judgements(winner.kernel).trials() if _ran(row) and row.config != winner.config]
    trials.sort(key=lambda row: _figure(row.figures, "ms"))
    left = NEXT
    for row in trials:
        if scene.refuses(row.kernel, row.config) is None:
            yield _as_winner(row)
            left -= 1
        if not left:
            return


def faster(scene: Scene, row: Winner, others: Sequence[Winner]) -> bool:
    """Returns whether ``row`` takes less time than ``others`` together: that of the device, or of the host if it is more."""
    return _time(scene, [row]) < _time(scene, others)


def _ran(row: Trial) -> bool:
    return row.verdict is Verdict.SAFE and row.level >= GATE_LEVEL and "timed_at" not in row.figures


def _as_winner(row: Trial) -> Winner:
    """Returns ``row`` as if it had won, a sweep that is to be finished."""
    return Winner(
        problem=row.problem,
        kernel=row.kernel,
        config=row.config,
        level=row.level,
        ms=min(_figure(row.figures, "ms"), 1e9),  # a row must be finite
        tried=0,
        total=0,
        complete=False,
        proven_with=row.proven_with,
        binary=row.binary,
        environment=row.environment,
        created_at=row.created_at,
    )


def _time(scene: Scene, winners: Sequence[Winner]) -> float:
    """Returns the milliseconds of ``winners``, as their trials tell them; without a trial only the device's are known."""
    device = sum(winner.ms for winner in winners)
    host = 0.0
    for winner in winners:
        rows = [row for row in scene.judgements(winner.kernel).trials() if row.config == winner.config]
        host += min((_figure(row.figures, "host_ms") for row in rows if "host_ms" in row.figures), default=0.0)
    return max(device, host)


def _figure(figures: Mapping[str, object], name: str) -> float:
    """Returns a stored time; a row's may be anything."""
    value = figures.get(name)
    return value if isinstance(value, float) and value > 0 else math.inf
