"""Taking rows from elsewhere into the user's database: what they claim to prove, they do not prove here.

A config that is called safe starts at level 0, and is proven before it runs; so does a winner, which therefore takes the
place of none that was proven here. What was found unsafe counts as it stands, whoever says so: to bar too much costs speed, and
`flashbias cache quarantine lift` ends it. For the same reason no lift is taken: leave to try again is given where it runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cache_db import removal
from cache_db.batch import Batch, Shared
from cache_db.models import Lift, Trial, Verdict, Verification, Winner
from cache_db.store import Store


@dataclass(frozen=True)
class Taken:
    """What became of some rows: ``stored`` are new or took another's place, ``known`` changed nothing, ``lifts`` stay outside.

    ``barred``: the hashes of keys whose winners here one of the rows keeps from running.
    """

    stored: int = 0
    known: int = 0
    lifts: int = 0
    barred: tuple[str, ...] = ()

    def __add__(self, other: Taken) -> Taken:
        return Taken(
            self.stored + other.stored,
            self.known + other.known,
            self.lifts + other.lifts,
            tuple(dict.fromkeys((*self.barred, *other.barred))),
        )


def take(store: Store, found: Sequence[Shared], *, dry: bool = False) -> Taken:
    """Stores ``found`` as rows from elsewhere, all or none; with ``dry`` only tells. Raises CacheError."""
    wanted = [row for row in found if not isinstance(row, Lift)]
    barred = tuple(dict.fromkeys(_barred(store, wanted)))
    proven, lifted = _proven(store, wanted), _lifted(store, wanted)
    fresh = [demoted(row) for row in wanted if removal.name(row) not in proven and not _powerless(row, lifted)]
    stored = 0 if dry else store.merge(Batch.of(fresh), owing=True)
    return Taken(stored, len(wanted) - stored, len(found) - len(wanted), barred)


def demoted(row: Shared) -> Shared:
    """Returns ``row`` without the proof that was not made here."""
    if isinstance(row, Winner) or (isinstance(row, Trial | Verification) and row.verdict is Verdict.SAFE):
        return row.model_copy(update={"level": 0})
    return row


def _proven(store: Store, found: Sequence[Shared]) -> set[str]:
    """Returns the names of the proofs of the same problems that are stored here: ours, which may have come back."""
    problems = {row.problem for row in found if isinstance(row, Verification)}
    return {removal.name(row) for problem in problems for row in store.verifications(problem)}


def _lifted(store: Store, found: Sequence[Shared]) -> dict[tuple[str, str], float]:
    """Returns key and config hash of what was lifted here -> until when judgements of it have no force."""
    problems = {row.problem for row in found if isinstance(row, Trial)}
    lifts = sorted((row for problem in problems for row in store.lifts(problem)), key=lambda row: row.created_at)
    return {(row.problem.key(row.kernel), row.config.hash): row.created_at for row in lifts}


def _powerless(row: Shared, lifted: Mapping[tuple[str, str], float]) -> bool:
    """Returns whether ``row`` is a trial older than the lift of its config: it must not take the place of a later one."""
    place = row.problem.key(row.kernel), row.config.hash
    return isinstance(row, Trial) and row.created_at <= lifted.get(place, -math.inf)


def _barred(store: Store, found: Sequence[Shared]) -> Iterator[str]:
    """Yields the hashes of the keys whose winners here one of ``found`` calls unsafe."""
    unsafe = [row for row in found if isinstance(row, Trial | Verification) and row.verdict is not Verdict.SAFE]
    winners = {problem: store.winners(problem) for problem in {row.problem for row in unsafe}}
    for row in unsafe:
        won = winners[row.problem].get(row.kernel)
        if won is not None and won.config == row.config:
            yield row.problem.key(row.kernel)
