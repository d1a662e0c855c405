"""What every store agrees on, whatever holds its rows: precedence of verdicts, leases, nearness of problems."""

from __future__ import annotations

import math
from collections.abc import Iterable

from cache_db import rows
from cache_db.models import FINAL, Lease, Problem, Scalar, Trial, Verdict, Verification, Winner

NEIGHBOURS = 8
"""How many neighbouring problems are worth a look: each costs a proof."""

CLOCK_SLACK = 5.0
"""Seconds by which a lease may lie in the future before it counts as written before the clock was set back."""

LONGEST_LEASE = 600.0
"""Seconds no lease is granted beyond; one that ends later yet was damaged, and binds nobody."""

TRIAL_TIES = (
    *("level", "seconds", "verdict", "reason", "figures", "proven_with", "binary"),
    *("driver", "ptxas", "torch", "gpu_uuid", "host"),
)
WINNER_TIES = ("tried", "total", "complete", "proven_with", "binary", "driver", "ptxas", "torch")
"""Columns that decide between rows of one age: which of them is kept means nothing, that all keep the same one does."""


def supersedes(trial: Trial, stored: Trial | None) -> bool:
    """Whether ``trial`` may take the place of ``stored``: a final verdict only gives way to a final one."""
    return stored is None or trial.verdict in FINAL or stored.verdict not in FINAL


def prevails(trial: Trial, stored: Trial | None) -> bool:
    """Whether ``trial``, from another database, takes the place of ``stored``.

    What proves or bars its config comes first: "safe" at level 0 (timed only, or imported) lets nothing out of quarantine.
    Then a final verdict, then the later one.
    """
    return stored is None or _trial_rank(trial) > _trial_rank(stored)


def outranks(winner: Winner, stored: Winner) -> bool:
    """Whether ``winner`` is the better one: more proof, then speed; of equals the later, and then one that all agree on."""
    return _winner_rank(winner) > _winner_rank(stored)


def replaces(winner: Winner, stored: Winner | None, *, renewed: bool) -> bool:
    """Whether ``winner``, from another database, takes the place of ``stored``; a ``renewed`` one only has to be later."""
    if stored is None:
        return True
    return winner.created_at > stored.created_at if renewed else outranks(winner, stored)


def condemned(winner: Winner, judgements: Iterable[Trial | Verification]) -> bool:
    """Whether one of ``judgements`` says for good that the config of ``winner`` is not safe, later than it was chosen."""
    return any(
        (row.kernel, row.config) == (winner.kernel, winner.config)
        and row.verdict in FINAL
        and row.verdict != Verdict.SAFE
        and row.created_at >= winner.created_at
        for row in judgements
    )


def standing(lease: Lease, now: float) -> bool:
    """Whether ``lease`` keeps others out at ``now``."""
    return now < lease.expires_at <= now + LONGEST_LEASE + CLOCK_SLACK and lease.acquired_at <= now + CLOCK_SLACK


def renewed(lease: Lease, now: float, seconds: float) -> Lease:
    """Returns ``lease`` with its end moved; a beginning that lies in the future (a clock set back) is mended."""
    return lease.model_copy(update={"acquired_at": min(lease.acquired_at, now), "expires_at": now + seconds})


def differing(problem: Problem, other: Problem) -> list[str]:
    """Returns the names of the columns and fields in which two problems differ, columns first."""
    columns = [name for name in Problem.model_fields if name != "fields"]
    names = sorted(problem.fields.keys() | other.fields.keys())
    return [name for name in columns if getattr(problem, name) != getattr(other, name)] + [
        name for name in names if not _same(problem.fields.get(name), other.fields.get(name))
    ]


def neighbours(problem: Problem, others: Iterable[Problem], soft_fields: frozenset[str]) -> list[Problem]:
    """Returns the problems that differ from ``problem`` in ``soft_fields`` only, nearest first."""
    ranked = [
        (sum(_step(problem.fields.get(name), other.fields.get(name)) for name in names), other.hash, other)
        for other in others
        if (names := differing(problem, other)) and soft_fields.issuperset(names)
    ]
    return [other for _, _, other in sorted(ranked, key=lambda entry: entry[:2])]


def nearest(problem: Problem, others: Iterable[Problem], limit: int) -> list[Problem]:
    """Returns the ``limit`` other problems with the fewest differing columns and fields."""
    ranked = [(len(differing(problem, other)), other.hash, other) for other in others if other != problem]
    return [other for _, _, other in sorted(ranked, key=lambda entry: entry[:2])[:limit]]


def _trial_rank(trial: Trial) -> tuple[object, ...]:
    counts = trial.verdict != Verdict.SAFE or trial.level > 0
    values = rows.encode(trial)
    return (counts, trial.verdict in FINAL, trial.created_at, trial.seed, *(values[name] for name in TRIAL_TIES))


def _winner_rank(winner: Winner) -> tuple[object, ...]:
    values = rows.encode(winner)
    first = (winner.level, -winner.ms, winner.created_at, winner.config.hash)
    return (*first, *(values[name] for name in WINNER_TIES))


def _same(left: Scalar | None, right: Scalar | None) -> bool:
    return type(left) is type(right) and left == right


def _step(left: Scalar | None, right: Scalar | None) -> float:
    """How far apart two values of a soft field are: octaves for positive sizes, else 1."""
    if isinstance(left, int | float) and isinstance(right, int | float) and left > 0 and right > 0:
        return abs(math.log2(left) - math.log2(right))
    return 1.0
