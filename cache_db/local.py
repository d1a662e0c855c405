"""The user's own database while it works, this process's memory when it does not.

No fault leaves this module. A damaged file is moved aside and a fresh one takes its place. A file that can be
read but not written (read-only, disk full) is still read, and what is new is kept in memory on top of it.
Everything else means memory alone. Each case is one warning on the logger "cache_db".
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cache_db import rules
from cache_db.batch import Batch, Debt
from cache_db.errors import CacheError, Damaged, RowRefused, Unavailable, UnknownSchema, identity
from cache_db.memory import Memory
from cache_db.models import Agreement, Lease, Lift, Pin, Problem, Trial, Verification, Winner

if TYPE_CHECKING:
    from cache_db.store import Store

ATTEMPTS = 3
"""How often a damaged file is replaced before the place itself is given up."""

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Local:
    """The methods of ``Store``, without its errors. Rows that are added are owed to the shared database ``owed_to``."""

    def __init__(self, path: Path | None, owed_to: str = "") -> None:
        self._memory = Memory(owes=bool(owed_to))
        self._path = path
        self._owed_to = owed_to
        self._store: Store | None = None
        self._writable = False
        self._warned = False
        if path is not None:
            try:
                self._store = self._open(path)
                self._writable = True
            except CacheError as error:
                self._warn(error, "tuning results are kept in memory and lost when this process ends")

    @property
    def location(self) -> str:
        """Where new rows go, for messages: the file's path, or "memory"."""
        return str(self._path) if self._writable else "memory"

    def add_trial(self, trial: Trial) -> None:
        """Stores a trial; a final verdict only gives way to a final one."""
        self._write(lambda rows: rows.add_trial(trial))

    def trials(self, problem: Problem, kernel: str | None = None) -> list[Trial]:
        """Returns the trials of a problem, or of one of its kernels, oldest first."""
        found = self._read(lambda store: store.trials(problem, kernel)) or []
        merged = {(trial.kernel, trial.config.hash): trial for trial in found}
        for trial in self._memory.trials(problem, kernel):
            name = (trial.kernel, trial.config.hash)
            if rules.supersedes(trial, merged.get(name)):
                merged[name] = trial
        return sorted(merged.values(), key=lambda trial: (trial.created_at, trial.kernel, trial.config.hash))

    def winners(self, problem: Problem) -> dict[str, Winner]:
        """Returns kernel -> winner; a row that fails validation is skipped with a warning."""
        return (self._read(lambda store: store.winners(problem)) or {}) | self._memory.winners(problem)

    def put_winner(self, winner: Winner, *, replace: bool = False) -> Winner:
        """Stores a winner if its key has none, or in any case with ``replace``; returns the stored one, re-read."""

        def put(rows: Store | Memory) -> Winner:
            if rows is self._memory and not replace:
                stored = self.winners(winner.problem).get(winner.kernel)
                if stored is not None:
                    return stored
            return rows.put_winner(winner, replace=replace)

        return self._write(put)

    def neighbours(
        self, problem: Problem, soft_fields: frozenset[str], limit: int = rules.NEIGHBOURS
    ) -> list[dict[str, Winner]]:
        """Returns the winners of the nearest problems that differ in ``soft_fields`` only, nearest first."""
        groups = self._read(lambda store: store.neighbours(problem, soft_fields, limit)) or []
        merged: dict[Problem, dict[str, Winner]] = {}
        for group in groups + self._memory.neighbours(problem, soft_fields, limit):
            merged.setdefault(next(iter(group.values())).problem, {}).update(group)
        return [merged[other] for other in rules.neighbours(problem, merged, soft_fields)[:limit]]

    def nearest(self, problem: Problem, limit: int = 3) -> list[Problem]:
        """Returns the other problems with winners that differ in the fewest columns and fields."""
        found = self._read(lambda store: store.nearest(problem, limit)) or []
        return rules.nearest(problem, {*found, *self._memory.nearest(problem, limit)}, limit)

    def add_verification(self, verification: Verification) -> None:
        """Stores a proof; the same one twice is stored once."""
        self._write(lambda rows: rows.add_verification(verification))

    def verifications(self, problem: Problem, kernel: str | None = None) -> list[Verification]:
        """Returns the proofs of a problem, or of one of its kernels, oldest first."""
        found = self._read(lambda store: store.verifications(problem, kernel)) or []
        found += [row for row in self._memory.verifications(problem, kernel) if row not in found]
        return sorted(found, key=lambda row: row.created_at)

    def add_lift(self, lift: Lift) -> None:
        """Stores leave to try a config again; the same one twice is stored once."""
        self._write(lambda rows: rows.add_lift(lift))

    def lifts(self, problem: Problem, kernel: str | None = None) -> list[Lift]:
        """Returns the lifts of a problem, or of one of its kernels, oldest first."""
        found = self._read(lambda store: store.lifts(problem, kernel)) or []
        found += [row for row in self._memory.lifts(problem, kernel) if row not in found]
        return sorted(found, key=lambda row: row.created_at)

    def put_pin(self, pin: Pin) -> None:
        """Stores a pin in place of its key's earlier one."""
        self._write(lambda rows: rows.put_pin(pin))

    def pins(self, problem: Problem) -> dict[str, Pin]:
        """Returns kernel -> pin; a row that fails validation is skipped with a warning."""
        return (self._read(lambda store: store.pins(problem)) or {}) | self._memory.pins(problem)

    def remove_pin(self, key: str) -> bool:
        """Deletes the pin of the key with this hash; returns whether there was one, valid or not."""
        remembered = self._memory.remove_pin(key)
        return self._write(lambda rows: rows.remove_pin(key)) or remembered

    def claim(self, problem_hash: str, owner: str, host: str, seconds: float) -> Lease | None:
        """Takes the lease of a problem; None while someone else's stands. Without a file it binds this process only."""
        return self._write(lambda rows: rows.claim(problem_hash, owner, host, seconds))

    def renew(self, lease: Lease, seconds: float) -> Lease | None:
        """Moves the end of a lease; None if it was lost. One whose file was lost goes on in memory."""

        def renew(rows: Store | Memory) -> Lease | None:
            renewed = rows.renew(lease, seconds)
            if renewed is None and rows is self._memory and self._path is not None:
                return rows.claim(lease.problem_hash, lease.owner, lease.host, seconds)
            return renewed

        return self._write(renew)

    def release(self, lease: Lease) -> None:
        """Gives a lease back; one that was lost meanwhile stays with its new owner."""
        self._write(lambda rows: rows.release(lease))

    def holder(self, problem_hash: str) -> Lease | None:
        """Returns the standing lease of a problem."""
        return self._memory.holder(problem_hash) or self._read(lambda store: store.holder(problem_hash))

    def agree(self, wanted: Agreement) -> tuple[Agreement | None] | None:
        """Returns what a job has agreed on, as ``Store.agree`` does; None without a file, for nobody else sees memory."""
        if self._store is None or not self._writable:
            return None
        return self._write(lambda rows: None if isinstance(rows, Memory) else (rows.agree(wanted),))

    def agreed(self, job_id: str, problem_hash: str) -> tuple[Agreement | None] | None:
        """Returns what a job has agreed on; None without a file that can be written."""
        if not self._writable:
            return None
        return self._read(lambda store: (store.agreed(job_id, problem_hash),))

    def counts(self) -> dict[str, int]:
        """Returns the number of rows of each table, those in memory included."""
        stored = self._read(lambda store: store.counts()) or {}
        return {name: count + stored.get(name, 0) for name, count in self._memory.counts().items()}

    def merge(self, batch: Batch, *, synced: tuple[str, Problem] | None = None) -> None:
        """Stores rows from the shared database; they are owed to nobody."""
        self._write(lambda rows: rows.merge(batch) if isinstance(rows, Memory) else rows.merge(batch, synced=synced))

    def synced_at(self, problem: Problem) -> float:
        """Returns when all that the shared database knew of ``problem`` was last merged (epoch seconds), 0.0 if never."""
        return self._read(lambda store: store.synced_at(self._owed_to, problem)) or 0.0

    def debts(self, limit: int) -> list[Debt]:
        """Returns up to ``limit`` rows that are owed to the shared database."""
        if not self._owed_to:
            return []
        found = self._read(lambda store: store.debts(self._owed_to, limit)) or []
        return (self._memory.debts(limit) + found)[:limit]

    def settle(self, debts: Sequence[Debt]) -> None:
        """Notes that the shared database has the rows of ``debts``."""
        self._memory.settle(debts)
        store = self._store
        if store is not None and self._writable:
            self._write(lambda rows: None if isinstance(rows, Memory) else rows.settle(self._owed_to, debts))

    def _read(self, action: Callable[[Store], T]) -> T | None:
        store = self._store
        if store is None:
            return None
        try:
            return self._run(store, action)
        except RowRefused as error:
            logger.warning("Tuning database: %s; ignored and left in place.", error)
            return None
        except CacheError as error:
            self._store, self._writable = None, False
            self._warn(error, "it is no longer read, and new tuning results are kept in memory")
            return None

    def _write(self, action: Callable[[Store | Memory], T]) -> T:
        store = self._store
        if store is not None and self._writable:
            try:
                return self._run(store, action)
            except RowRefused as error:  # one row's trouble, not the file's
                logger.warning("Tuning database: %s; this result is kept in memory.", error)
            except CacheError as error:
                self._writable = False
                self._warn(error, "new tuning results are kept in memory and lost when this process ends")
        return action(self._memory)

    def _run(self, store: Store, action: Callable[[Store], T]) -> T:
        """Runs ``action``, once more on a fresh file if this one was damaged or replaced under our feet."""
        try:
            return action(store)
        except Damaged as error:
            self._set_aside(store.path, error)
        except Unavailable as error:
            if error.seen == identity(store.path):
                raise
        self._store = self._open(store.path)
        return action(self._store)

    def _open(self, path: Path) -> Store:
        """Opens the file; one that a newer version laid out is left alone, and one of our own beside it is used."""
        try:
            return self._mended(path)
        except UnknownSchema as error:
            from cache_db.own import own_file

            own = own_file(path)
            store = self._mended(own)
            self._path = own
            logger.warning("Tuning database: %s; it is left alone, and %s is used instead.", error, own)
            return store

    def _mended(self, path: Path) -> Store:
        """Opens the file; a damaged one is moved aside first."""
        try:
            from cache_db.store import Store

            for _ in range(ATTEMPTS):
                try:
                    return Store.open(path).owing(self._owed_to)
                except Damaged as error:
                    self._set_aside(path, error)
        except ImportError as error:
            raise Unavailable(f"{path} cannot be opened without a Python module: {error}") from error
        raise Unavailable(f"{path} was damaged {ATTEMPTS} times in a row")

    @staticmethod
    def _set_aside(path: Path, error: Damaged) -> None:
        from cache_db.damage import set_aside

        moved = set_aside(path, error.seen)
        if moved is not None:
            logger.warning(
                "%s. It was moved to %s and a fresh database takes its place; nothing was deleted.", error, moved
            )

    def _warn(self, error: CacheError, consequence: str) -> None:
        """Says it once; what fails after that changes nothing for the reader."""
        cure = "" if isinstance(error, UnknownSchema) else ". FLASHBIAS_CACHE_DIR names another place"
        level = logging.DEBUG if self._warned else logging.WARNING
        self._warned = True
        logger.log(level, "Tuning database: %s; %s%s.", error, consequence, cure)
