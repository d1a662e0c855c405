"""Where the winners of a problem come from, and which of them counts where layers disagree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cache_db import rules
from cache_db.models import Trial, Verification, Winner


@dataclass(frozen=True)
class Origin:
    """Where one winner is stored: its ``layer`` (user, shared or seeds), the ``place``, and whether it is the one that counts."""

    layer: str
    place: str
    winner: Winner
    counts: bool


def origins(
    user: tuple[str, Mapping[str, Winner]],
    shared: tuple[str, Mapping[str, Winner]],
    seeds: Mapping[str, tuple[Path, Winner]],
    judged: Iterable[Trial | Verification] = (),
) -> list[Origin]:
    """Returns every layer's winners of a problem, by kernel, the one that counts first: conflicts show.

    Of the user's database and the shared one the better counts; one that ``judged`` condemns only where there is no other. A
    seed fills a gap.
    """
    judged = list(judged)
    found = [("user", user[0], row) for row in user[1].values()]
    found += [("shared", shared[0], row) for row in shared[1].values()]
    found += [("seeds", str(path), row) for path, row in seeds.values()]
    chosen: dict[str, Winner] = {}
    for layer, _, row in found:
        best = chosen.get(row.kernel)
        if best is None or (layer == "shared" and _better(row, best, judged)):
            chosen[row.kernel] = row
    return sorted(
        (Origin(layer, place, row, row == chosen[row.kernel]) for layer, place, row in found),
        key=lambda origin: (origin.winner.kernel, not origin.counts),
    )


def _better(row: Winner, best: Winner, judged: list[Trial | Verification]) -> bool:
    fallen = rules.condemned(row, judged), rules.condemned(best, judged)
    return rules.outranks(row, best) if fallen[0] == fallen[1] else fallen[1]
