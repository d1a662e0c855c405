"""One tuning database, a SQLite file or a PostgreSQL database: the same schema, the same meaning.

Every method is one short transaction on a connection of its own: nothing is open between calls, so a fork
inherits nothing and a killed process loses nothing it was told is stored. Writers to SQLite begin with BEGIN IMMEDIATE:
a transaction that reads first and writes later fails at once under contention, whatever the time-out
(half of 1600 concurrent transactions did; none with IMMEDIATE). What else the engines differ in is ``cache_db.engines``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from sqlalchemy import Connection, func, select, union

from cache_db import engines, jobs, leases, outbox, removal, rows, rules, schema, sharing, statements
from cache_db.address import Address
from cache_db.batch import Batch, Debt, Shared
from cache_db.database import Database
from cache_db.errors import Forbidden, RowRefused, Unavailable
from cache_db.models import Agreement, Lease, Lift, Pin, Problem, Trial, Verification, Winner

_SHARED: tuple[type[Shared], ...] = (Trial, Verification, Lift, Winner)


class Store(Database):
    """One database. Raises ``cache_db.errors`` and nothing else."""

    @classmethod
    def open(cls, path: Path) -> Self:
        """Opens the SQLite file ``path``; makes its folder, the file and the schema where they are missing.

        Raises Unavailable, Damaged or UnknownSchema.
        """
        fault = sharing.no_file(path)
        if fault:
            raise Unavailable(f"{path} {fault}")
        return cls(engines.File(path)).ensured()

    @classmethod
    def open_sealed(cls, path: Path) -> Self:
        """Opens the SQLite file ``path``, which nobody writes any more, for reading.

        Raises Unavailable, also while a journal beside it says that it is being written, Damaged or UnknownSchema.
        """
        fault = sharing.unsealed(path)
        if fault:
            raise Unavailable(f"{path} {fault}")
        return cls(engines.Sealed(path)).ensured()

    @classmethod
    def connect(cls, address: Address, seconds: float = engines.SERVER_SECONDS) -> Self:
        """Opens the PostgreSQL database at ``address``; makes the schema where it is missing and may be made.

        ``seconds`` bounds, on the server, each transaction. Raises Unavailable or UnknownSchema.
        """
        try:
            return cls(engines.Server(address, seconds)).ensured()
        except Forbidden as error:
            cure = "it has no FlashBias schema, or an older one: have its owner run `flashbias cache init`"
            raise Unavailable(f"{error}; {cure}") from None

    def add_trial(self, trial: Trial) -> None:
        """Stores a trial; a final verdict only gives way to a final one."""
        self._add(trial, statements.add_trial(self._insert))

    def trials(self, problem: Problem, kernel: str | None = None) -> list[Trial]:
        """Returns the trials of a problem, or of one of its kernels, oldest first."""
        found = rows.decode_all(Trial, self._fetch(statements.of_problem(schema.trials, problem, kernel)))
        # Here, not by the database: each sorts texts by its own alphabet.
        return sorted(found, key=lambda trial: (trial.created_at, trial.kernel, trial.config.hash))

    def winners(self, problem: Problem) -> dict[str, Winner]:
        """Returns kernel -> winner; a row that fails validation is skipped with a warning."""
        found = self._fetch(statements.of_problem(schema.winners, problem))
        return {winner.kernel: winner for winner in rows.decode_all(Winner, found)}

    def put_winner(self, winner: Winner, *, replace: bool = False) -> Winner:
        """Stores a winner if its key has none, or in any case with ``replace``; returns the stored one, re-read.

        A stored row that fails validation counts as none: it could never be used, and would have this
        problem swept again in every process.
        """
        values = self._place.fitting(rows.encode(winner))
        upsert = statements.put(self._insert, schema.winners)
        query = select(schema.winners).where(schema.winners.c.key_hash == values["key_hash"])
        with self._writing() as connection:
            first = upsert if replace else statements.keep(self._insert, schema.winners)
            connection.execute(first, values)
            stored = rows.decode_all(Winner, connection.execute(query).mappings().all())
            if not stored:
                connection.execute(upsert, values)
                stored = rows.decode_all(Winner, connection.execute(query).mappings().all())
            if stored and stored[0] == winner:
                self._owe(connection, winner, replace=replace)
        if not stored:
            raise RowRefused(f"{self.url}: the winner of {winner.kernel} could not be read back")
        return stored[0]

    def neighbours(
        self, problem: Problem, soft_fields: frozenset[str], limit: int = rules.NEIGHBOURS
    ) -> list[dict[str, Winner]]:
        """Returns the winners of the nearest problems that differ in ``soft_fields`` only, nearest first."""
        here = [schema.winners.c[name] == value for name, value in rows.problem_columns(problem).items()]
        near = rules.neighbours(problem, self._problems(statements.problems().where(*here)), soft_fields)[:limit]
        hashes = [other.hash for other in near]
        found: dict[str, dict[str, Winner]] = defaultdict(dict)
        query = select(schema.winners).where(schema.winners.c.problem_hash.in_(hashes))
        for winner in rows.decode_all(Winner, self._fetch(query) if hashes else []):
            found[winner.problem.hash][winner.kernel] = winner
        return [found[name] for name in hashes if name in found]

    def nearest(self, problem: Problem, limit: int = 3) -> list[Problem]:
        """Returns the other problems with winners that differ in the fewest columns and fields."""
        return rules.nearest(problem, self._problems(statements.problems()), limit)

    def add_verification(self, verification: Verification) -> None:
        """Stores a proof; the same one twice is stored once."""
        self._add(verification, statements.keep(self._insert, schema.verifications))

    def verifications(self, problem: Problem, kernel: str | None = None) -> list[Verification]:
        """Returns the proofs of a problem, or of one of its kernels, oldest first."""
        order = (schema.verifications.c.created_at, schema.verifications.c.id)
        query = statements.of_problem(schema.verifications, problem, kernel).order_by(*order)
        return rows.decode_all(Verification, self._fetch(query))

    def add_lift(self, lift: Lift) -> None:
        """Stores leave to try a config again; the same one twice is stored once."""
        self._add(lift, statements.keep(self._insert, schema.lifts))

    def lifts(self, problem: Problem, kernel: str | None = None) -> list[Lift]:
        """Returns the lifts of a problem, or of one of its kernels, oldest first."""
        order = (schema.lifts.c.created_at, schema.lifts.c.id)
        query = statements.of_problem(schema.lifts, problem, kernel).order_by(*order)
        return rows.decode_all(Lift, self._fetch(query, schema.lifts))

    def put_pin(self, pin: Pin) -> None:
        """Stores a pin in place of its key's earlier one."""
        self._add(pin, statements.put(self._insert, schema.pins))

    def pins(self, problem: Problem) -> dict[str, Pin]:
        """Returns kernel -> pin; a row that fails validation is skipped with a warning."""
        found = self._fetch(statements.of_problem(schema.pins, problem), schema.pins)
        return {pin.kernel: pin for pin in rows.decode_all(Pin, found)}

    def remove_pin(self, key: str) -> bool:
        """Deletes the pin of the key with this hash; returns whether there was one, valid or not."""
        with self._writing() as connection:
            if schema.lacks(connection, schema.pins):
                return False
            return connection.execute(schema.pins.delete().where(schema.pins.c.key_hash == key)).rowcount > 0

    def find(self, kind: type[rows.Row], key: str = "", config: str = "") -> list[rows.Row]:
        """Returns every row of ``kind`` whose key's and config's hashes begin with ``key`` and ``config``, oldest first."""
        table = statements.TABLES[kind]
        hashes = {"key_hash": key, "config_hash": config}
        query = select(table).where(*(table.c[name].startswith(text, autoescape=True) for name, text in hashes.items()))
        query = query.order_by(table.c.created_at, table.c.key_hash, table.c.config_hash)
        return rows.decode_all(kind, self._fetch(query, table))

    def remove(self, found: Iterable[Trial | Verification | Winner | Lift]) -> int:
        """Deletes these very rows, all or none, and returns how many; one that was written anew meanwhile stays."""
        with self._writing() as connection:
            return sum(self._delete(connection, row) for row in found)

    def forget(self, names: Collection[str]) -> int:
        """Deletes what another database deleted (``removal.name``), short of what is needed here; returns how many rows."""
        with self._writing() as connection:
            gone = [
                row
                for problem_hash in sorted(set(map(removal.problem_of, names)))
                for row in removal.removable(_everything(connection, problem_hash), names)
            ]
            return sum(self._delete(connection, row) for row in gone)

    def _delete(self, connection: Connection, row: Shared) -> int:
        count = connection.execute(statements.deletion(row)).rowcount
        if count and self._owed_to:
            outbox.owe_removal(connection, self._insert, self._owed_to, row)
        return count

    def everything(self, problem: Problem) -> Batch:
        """Returns all that is known of a problem, its pins excepted."""
        with self._reading() as connection:
            return _everything(connection, problem.hash)

    def by_problem(self) -> Iterator[Batch]:
        """Yields all that is known of one problem after the other, by GPU, spec and Triton; pins excepted.

        Each is one transaction: whoever reads slowly must not keep writers out.
        """
        order = ("gpu_name", "spec", "triton_version", "problem_hash")
        with self._reading() as connection:
            tables = [statements.TABLES[kind] for kind in _SHARED]
            parts = [select(*(each.c[name] for name in order)) for each in tables if not schema.lacks(connection, each)]
            found = {str(row.problem_hash): tuple(map(str, row)) for row in connection.execute(union(*parts))}
        # Sorted here: each engine sorts texts by its own alphabet.
        for problem_hash in sorted(found, key=lambda each: found[each]):
            with self._reading() as connection:
                batch = _everything(connection, problem_hash)
            yield batch

    def merge(self, batch: Batch, *, synced: tuple[str, Problem] | None = None, owing: bool = False) -> int:
        """Stores rows from another database, all or none, in any order any number of times with one outcome.

        Trials give way as in ``rules.prevails``, winners as in ``rules.replaces``. ``synced``: this was all that the shared
        database (its target) knew of the problem. ``owing``: the shared database has yet to hear of these rows. Returns how
        many rows are new or other than before, where the engine tells (SQLite does).
        """
        insert, by_rank, by_age, by_force = self._insert, *batch.winners_by_rule()
        work: tuple[tuple[Any, Sequence[Shared]], ...] = (
            (statements.merge_trial(insert), batch.trials),
            (statements.keep(insert, schema.verifications), batch.verifications),
            (statements.keep(insert, schema.lifts), batch.lifts),
            (statements.merge_winner(insert), by_rank),
            (statements.renew_winner(insert), by_age),
            (statements.put(insert, schema.winners), by_force),
        )
        changed = 0
        with self._writing() as connection:
            if batch.lifts:
                schema.add_younger(connection, schema.lifts, self._place.lock_schema)
            for statement, found in work:
                # By name: two that merge the same rows in different orders would wait for each other for ever. One at a
                # time: psycopg sends many through a pipeline, whose end is a warning of its own when one fails.
                encoded = [(self._place.fitting(rows.encode(row)), row) for row in found]
                for values, row in sorted(encoded, key=lambda each: rows.name(each[0])):
                    done = connection.execute(statement, values).rowcount > 0
                    changed += done
                    if owing and done:
                        self._owe(connection, row)
            if synced is not None:
                outbox.sync(connection, self._insert, *synced)
        return changed

    def debts(self, target: str, limit: int) -> list[Debt]:
        """Returns up to ``limit`` rows that are owed to the shared database ``target``."""
        with self._reading() as connection:
            return outbox.debts(connection, target, limit)

    def settle(self, target: str, debts: Sequence[Debt]) -> None:
        """Notes that ``target`` has the rows of ``debts``."""
        with self._writing() as connection:
            outbox.settle(connection, target, debts)

    def synced_at(self, target: str, problem: Problem) -> float:
        """Returns when all that ``target`` knew of ``problem`` was last merged here (epoch seconds), 0.0 if never."""
        with self._reading() as connection:
            return outbox.synced_at(connection, target, problem)

    def claim(self, problem_hash: str, owner: str, host: str, seconds: float) -> Lease | None:
        """Takes the lease of a problem for at most ``rules.LONGEST_LEASE``; None while someone else's stands."""
        with self._writing() as connection:
            now, seconds = self._place.now(connection), min(seconds, rules.LONGEST_LEASE)
            wanted = Lease(problem_hash=problem_hash, owner=owner, host=host, acquired_at=now, expires_at=now + seconds)
            return leases.claim(connection, self._insert, wanted)

    def renew(self, lease: Lease, seconds: float) -> Lease | None:
        """Moves the end of a lease; None if it was lost."""
        with self._writing() as connection:
            renewed = rules.renewed(lease, self._place.now(connection), min(seconds, rules.LONGEST_LEASE))
            return renewed if leases.renew(connection, renewed) else None

    def release(self, lease: Lease) -> None:
        """Gives a lease back; one that was lost meanwhile stays with its new owner."""
        with self._writing() as connection:
            leases.release(connection, lease)

    def holder(self, problem_hash: str) -> Lease | None:
        """Returns the standing lease of a problem."""
        with self._reading() as connection:
            return leases.holder(connection, problem_hash, self._place.now(connection))

    def agree(self, wanted: Agreement) -> Agreement | None:
        """Stores what a job runs for a problem unless it has agreed before; returns what is stored, None if unreadable."""
        with self._writing() as connection:
            return jobs.agree(connection, self._insert, wanted, self._place.now(connection))

    def agreed(self, job_id: str, problem_hash: str) -> Agreement | None:
        """Returns what a job has agreed on for a problem."""
        with self._reading() as connection:
            return jobs.agreed(connection, job_id, problem_hash)

    def counts(self) -> dict[str, int]:
        """Returns the number of rows of each table."""
        with self._reading() as connection:
            return {
                name: 0
                if schema.lacks(connection, table)
                else connection.execute(select(func.count()).select_from(table)).scalar_one()
                for name, table in schema.ROW_TABLES.items()
            }


def _everything(connection: Connection, problem_hash: str) -> Batch:
    """Returns all that is known of the problem with this hash, its pins excepted."""
    found: list[Shared] = []
    for kind in _SHARED:
        table = statements.TABLES[kind]
        if not schema.lacks(connection, table):
            read = connection.execute(statements.of_hash(table, problem_hash)).mappings().all()
            found += rows.decode_all(kind, read)  # type: ignore[type-var]
    return Batch.of(found)
