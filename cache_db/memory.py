"""The store that needs no database: what a process remembers when there is no file, or none it can write.

Same methods and meaning as ``cache_db.store.Store``, for one process.
"""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import TypeVar

from cache_db import rules
from cache_db.batch import Batch, Debt, Shared
from cache_db.models import Lease, Lift, Pin, Problem, Trial, Verification, Winner

T = TypeVar("T")

# Held for a few dict operations only, and across fork, so that no child starts with a lock nobody will open.
_lock = threading.RLock()
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


class Memory:
    """Rows of this process, in dicts; with ``owes``, those that are added are owed to a shared database."""

    def __init__(self, *, owes: bool = False) -> None:
        self._owes = owes
        self._owed: dict[tuple[str, str], Debt] = {}
        self._trials: dict[tuple[str, str], Trial] = {}
        self._verifications: dict[str, list[Verification]] = defaultdict(list)
        self._lifts: dict[str, list[Lift]] = defaultdict(list)
        self._pins: dict[str, Pin] = {}
        self._winners: dict[str, dict[str, Winner]] = defaultdict(dict)
        self._leases: dict[str, Lease] = {}

    def add_trial(self, trial: Trial) -> None:
        """Stores a trial; see ``rules.supersedes`` for what it replaces."""
        name = (trial.problem.key(trial.kernel), trial.config.hash)
        with _lock:
            if rules.supersedes(trial, self._trials.get(name)):
                self._trials[name] = trial
                self._owe(trial)

    def trials(self, problem: Problem, kernel: str | None = None) -> list[Trial]:
        """Returns the trials of a problem, or of one of its kernels, oldest first."""
        with _lock:
            found = [trial for trial in self._trials.values() if trial.problem == problem]
        return sorted(
            (trial for trial in found if kernel in (None, trial.kernel)),
            key=lambda trial: (trial.created_at, trial.kernel, trial.config.hash),
        )

    def winners(self, problem: Problem) -> dict[str, Winner]:
        """Returns kernel -> winner."""
        with _lock:
            return dict(self._winners.get(problem.hash, {}))

    def put_winner(self, winner: Winner, *, replace: bool = False) -> Winner:
        """Stores a winner if its key has none, or in any case with ``replace``; returns the stored one."""
        with _lock:
            stored = self._winners[winner.problem.hash]
            if replace or winner.kernel not in stored:
                stored[winner.kernel] = winner
                self._owe(winner, replace=replace)
            return stored[winner.kernel]

    def merge(self, batch: Batch) -> None:
        """Takes rows from a database; see ``rules.prevails`` and ``rules.replaces``."""
        with _lock:
            for trial in batch.trials:
                name = (trial.problem.key(trial.kernel), trial.config.hash)
                if rules.prevails(trial, self._trials.get(name)):
                    self._trials[name] = trial
            for verification in batch.verifications:
                _keep(self._verifications[verification.problem.hash], verification)
            for lift in batch.lifts:
                _keep(self._lifts[lift.problem.hash], lift)
            for winner in batch.winners:
                stored = self._winners[winner.problem.hash]
                key = winner.problem.key(winner.kernel)
                if key in batch.forced or rules.replaces(
                    winner, stored.get(winner.kernel), renewed=key in batch.renewed
                ):
                    stored[winner.kernel] = winner

    def debts(self, limit: int) -> list[Debt]:
        """Returns up to ``limit`` rows that are owed to the shared database."""
        with _lock:
            return list(self._owed.values())[:limit]

    def settle(self, debts: Sequence[Debt]) -> None:
        """Notes that the shared database has the rows of ``debts``."""
        with _lock:
            for each in debts:
                owed = self._owed.get((each.kind, each.name))
                if owed is not None and owed.stamp == each.stamp:
                    del self._owed[each.kind, each.name]

    def neighbours(
        self, problem: Problem, soft_fields: frozenset[str], limit: int = rules.NEIGHBOURS
    ) -> list[dict[str, Winner]]:
        """Returns the winners of the nearest problems that differ in ``soft_fields`` only."""
        near = rules.neighbours(problem, self.problems(), soft_fields)
        return [self.winners(other) for other in near[:limit]]

    def nearest(self, problem: Problem, limit: int = 3) -> list[Problem]:
        """Returns the other problems with winners that differ in the fewest columns and fields."""
        return rules.nearest(problem, self.problems(), limit)

    def problems(self) -> list[Problem]:
        """Returns every problem that has a winner."""
        with _lock:
            return [next(iter(rows.values())).problem for rows in self._winners.values() if rows]

    def add_verification(self, verification: Verification) -> None:
        """Stores a proof; the same one twice is stored once."""
        with _lock:
            if _keep(self._verifications[verification.problem.hash], verification):
                self._owe(verification)

    def verifications(self, problem: Problem, kernel: str | None = None) -> list[Verification]:
        """Returns the proofs of a problem, or of one of its kernels, oldest first."""
        with _lock:
            found = list(self._verifications.get(problem.hash, ()))
        return sorted((row for row in found if kernel in (None, row.kernel)), key=lambda row: row.created_at)

    def add_lift(self, lift: Lift) -> None:
        """Stores leave to try a config again; the same one twice is stored once."""
        with _lock:
            if _keep(self._lifts[lift.problem.hash], lift):
                self._owe(lift)

    def lifts(self, problem: Problem, kernel: str | None = None) -> list[Lift]:
        """Returns the lifts of a problem, or of one of its kernels, oldest first."""
        with _lock:
            found = list(self._lifts.get(problem.hash, ()))
        return sorted((row for row in found if kernel in (None, row.kernel)), key=lambda row: row.created_at)

    def put_pin(self, pin: Pin) -> None:
        """Stores a pin in place of its key's earlier one."""
        with _lock:
            self._pins[pin.problem.key(pin.kernel)] = pin

    def pins(self, problem: Problem) -> dict[str, Pin]:
        """Returns kernel -> pin."""
        with _lock:
            return {pin.kernel: pin for pin in self._pins.values() if pin.problem == problem}

    def remove_pin(self, key: str) -> bool:
        """Deletes the pin of the key with this hash; returns whether there was one."""
        with _lock:
            return self._pins.pop(key, None) is not None

    def claim(self, problem_hash: str, owner: str, host: str, seconds: float) -> Lease | None:
        """Takes the lease of a problem; None while someone else's stands."""
        now, seconds = time.time(), min(seconds, rules.LONGEST_LEASE)
        with _lock:
            held = self._leases.get(problem_hash)
            if held is not None and held.owner != owner and rules.standing(held, now):
                return None
            lease = Lease(problem_hash=problem_hash, owner=owner, host=host, acquired_at=now, expires_at=now + seconds)
            self._leases[problem_hash] = lease
            return lease

    def renew(self, lease: Lease, seconds: float) -> Lease | None:
        """Moves the end of a lease; None if it was lost."""
        now, seconds = time.time(), min(seconds, rules.LONGEST_LEASE)
        with _lock:
            held = self._leases.get(lease.problem_hash)
            if held is None or held.owner != lease.owner:
                return None
            self._leases[lease.problem_hash] = rules.renewed(lease, now, seconds)
            return self._leases[lease.problem_hash]

    def release(self, lease: Lease) -> None:
        """Gives a lease back; one that was lost meanwhile stays with its new owner."""
        with _lock:
            held = self._leases.get(lease.problem_hash)
            if held is not None and held.owner == lease.owner:
                del self._leases[lease.problem_hash]

    def holder(self, problem_hash: str) -> Lease | None:
        """Returns the standing lease of a problem."""
        with _lock:
            held = self._leases.get(problem_hash)
        return held if held is not None and rules.standing(held, time.time()) else None

    def counts(self) -> dict[str, int]:
        """Returns the number of rows of each kind."""
        with _lock:
            return {
                "trials": len(self._trials),
                "verifications": sum(map(len, self._verifications.values())),
                "lifts": sum(map(len, self._lifts.values())),
                "pins": len(self._pins),
                "winners": sum(map(len, self._winners.values())),
                "leases": len(self._leases),
                "jobs": 0,
            }

    def _owe(self, row: Shared, *, replace: bool = False) -> None:
        if self._owes:
            from cache_db.outbox import debt

            owed = debt(row, replace=replace)
            self._owed[owed.kind, owed.name] = owed


def _keep(stored: list[T], row: T) -> bool:
    """Adds ``row`` if it is not there yet; returns whether it was not."""
    if row in stored:
        return False
    stored.append(row)
    return True
