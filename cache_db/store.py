"""One tuning database.

Every method is one short transaction on a connection of its own: nothing is open between calls, so a fork
inherits nothing and a killed process loses nothing it was told is stored. Writers begin with BEGIN IMMEDIATE:
a transaction that reads first and writes later fails at once under contention, whatever the time-out
(half of 1600 concurrent transactions did; none with IMMEDIATE). The rollback journal stays, because write-ahead
logs need one host, leave files beside a read-only database, and cost more when each call connects anew.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Delete, Engine, NullPool, Select, Table, create_engine, event, func, or_, select
from sqlalchemy.exc import SQLAlchemyError

from cache_db import leases, rows, rules, schema
from cache_db.errors import CacheError, Damaged, RowRefused, Unavailable, UnknownSchema, identity
from cache_db.models import FINAL, Lease, Lift, Pin, Problem, Trial, Verification, Winner

BUSY_SECONDS = 30.0
"""How long a call waits for another process's transaction; the longest seen under 32 writers was 3.3 s."""

_TABLES: dict[type, Table] = {
    Trial: schema.trials,
    Verification: schema.verifications,
    Winner: schema.winners,
    Lift: schema.lifts,
    Pin: schema.pins,
}
_DAMAGED = ("SQLITE_NOTADB", "SQLITE_CORRUPT")
_IMMEDIATE = "flashbias_immediate"
_FINAL = sorted(map(str, FINAL))


def _sqlite_engine(path: Path) -> Engine:
    """Returns an engine without a pool that leaves BEGIN to us (the driver's own comes too late)."""
    url = URL.create("sqlite", database=os.fspath(path))
    engine = create_engine(url, poolclass=NullPool, connect_args={"timeout": BUSY_SECONDS})

    @event.listens_for(engine, "connect")
    def _connected(connection: Any, _record: Any) -> None:
        connection.isolation_level = None
        # Bytes that are no UTF-8 must spoil their own row (its hash disagrees), not the whole answer.
        connection.text_factory = lambda raw: raw.decode("utf-8", "replace")

    @event.listens_for(engine, "begin")
    def _begun(connection: Connection) -> None:
        immediate = connection.get_execution_options().get(_IMMEDIATE)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")

    return engine


class Store:
    """One database. Raises ``cache_db.errors`` and nothing else."""

    def __init__(self, engine: Engine, path: Path) -> None:
        self.path = path
        self._reader = engine
        self._writer = engine.execution_options(**{_IMMEDIATE: True})
        self._insert = importlib.import_module(f"sqlalchemy.dialects.{engine.dialect.name}").insert

    @classmethod
    def open(cls, path: Path) -> Store:
        """Opens the SQLite file ``path``; makes its folder, the file and the schema where they are missing.

        Raises Unavailable, Damaged or UnknownSchema.
        """
        path = Path(os.path.realpath(path))
        store = cls(_sqlite_engine(path), path)
        with store._reading() as connection:
            present = schema.is_present(connection)
        if not present:
            store._create()
        return store

    @property
    def url(self) -> str:
        """The database's address without its password."""
        return self._reader.url.render_as_string(hide_password=True)

    def add_trial(self, trial: Trial) -> None:
        """Stores a trial; a final verdict only gives way to a final one."""
        values = rows.encode(trial)
        statement = self._insert(schema.trials).values(values)
        statement = statement.on_conflict_do_update(
            index_elements=[schema.trials.c.key_hash, schema.trials.c.config_hash],
            set_={name: statement.excluded[name] for name in values if name not in ("key_hash", "config_hash")},
            where=or_(statement.excluded.verdict.in_(_FINAL), schema.trials.c.verdict.not_in(_FINAL)),
        )
        with self._writing() as connection:
            connection.execute(statement)

    def trials(self, problem: Problem, kernel: str | None = None) -> list[Trial]:
        """Returns the trials of a problem, or of one of its kernels, oldest first."""
        order = (schema.trials.c.created_at, schema.trials.c.kernel, schema.trials.c.config_hash)
        return rows.decode_all(Trial, self._fetch(_of(schema.trials, problem, kernel).order_by(*order)))

    def winners(self, problem: Problem) -> dict[str, Winner]:
        """Returns kernel -> winner; a row that fails validation is skipped with a warning."""
        found = self._fetch(_of(schema.winners, problem))
        return {winner.kernel: winner for winner in rows.decode_all(Winner, found)}

    def put_winner(self, winner: Winner, *, replace: bool = False) -> Winner:
        """Stores a winner if its key has none, or in any case with ``replace``; returns the stored one, re-read.

        A stored row that fails validation counts as none: it could never be used, and would have this
        problem swept again in every process.
        """
        values = rows.encode(winner)
        insert = self._insert(schema.winners).values(values)
        key = [schema.winners.c.key_hash]
        changed = {name: insert.excluded[name] for name in values if name != "key_hash"}
        upsert = insert.on_conflict_do_update(index_elements=key, set_=changed)
        query = select(schema.winners).where(schema.winners.c.key_hash == values["key_hash"])
        with self._writing() as connection:
            connection.execute(upsert if replace else insert.on_conflict_do_nothing(index_elements=key))
            stored = rows.decode_all(Winner, connection.execute(query).mappings().all())
            if not stored:
                connection.execute(upsert)
                stored = rows.decode_all(Winner, connection.execute(query).mappings().all())
        if not stored:
            raise RowRefused(f"{self.path}: the winner of {winner.kernel} could not be read back")
        return stored[0]

    def neighbours(
        self, problem: Problem, soft_fields: frozenset[str], limit: int = rules.NEIGHBOURS
    ) -> list[dict[str, Winner]]:
        """Returns the winners of the nearest problems that differ in ``soft_fields`` only, nearest first."""
        here = [schema.winners.c[name] == value for name, value in rows.problem_columns(problem).items()]
        near = rules.neighbours(problem, self._problems(_problem_query().where(*here)), soft_fields)[:limit]
        hashes = [other.hash for other in near]
        found: dict[str, dict[str, Winner]] = defaultdict(dict)
        query = select(schema.winners).where(schema.winners.c.problem_hash.in_(hashes))
        for winner in rows.decode_all(Winner, self._fetch(query) if hashes else []):
            found[winner.problem.hash][winner.kernel] = winner
        return [found[name] for name in hashes if name in found]

    def nearest(self, problem: Problem, limit: int = 3) -> list[Problem]:
        """Returns the other problems with winners that differ in the fewest columns and fields."""
        return rules.nearest(problem, self._problems(_problem_query()), limit)

    def add_verification(self, verification: Verification) -> None:
        """Stores a proof; the same one twice is stored once."""
        statement = self._insert(schema.verifications).values(rows.encode(verification))
        with self._writing() as connection:
            connection.execute(statement.on_conflict_do_nothing(index_elements=[schema.verifications.c.id]))

    def verifications(self, problem: Problem, kernel: str | None = None) -> list[Verification]:
        """Returns the proofs of a problem, or of one of its kernels, oldest first."""
        order = (schema.verifications.c.created_at, schema.verifications.c.id)
        return rows.decode_all(Verification, self._fetch(_of(schema.verifications, problem, kernel).order_by(*order)))

    def add_lift(self, lift: Lift) -> None:
        """Stores leave to try a config again; the same one twice is stored once."""
        statement = self._insert(schema.lifts).values(rows.encode(lift))
        with self._writing() as connection:
            schema.lifts.create(connection, checkfirst=True)
            connection.execute(statement.on_conflict_do_nothing(index_elements=[schema.lifts.c.id]))

    def lifts(self, problem: Problem, kernel: str | None = None) -> list[Lift]:
        """Returns the lifts of a problem, or of one of its kernels, oldest first."""
        order = (schema.lifts.c.created_at, schema.lifts.c.id)
        return rows.decode_all(Lift, self._fetch(_of(schema.lifts, problem, kernel).order_by(*order)))

    def put_pin(self, pin: Pin) -> None:
        """Stores a pin in place of its key's earlier one."""
        values = rows.encode(pin)
        statement = self._insert(schema.pins).values(values)
        changed = {name: statement.excluded[name] for name in values if name != "key_hash"}
        with self._writing() as connection:
            schema.pins.create(connection, checkfirst=True)
            connection.execute(statement.on_conflict_do_update(index_elements=[schema.pins.c.key_hash], set_=changed))

    def pins(self, problem: Problem) -> dict[str, Pin]:
        """Returns kernel -> pin; a row that fails validation is skipped with a warning."""
        return {pin.kernel: pin for pin in rows.decode_all(Pin, self._fetch(_of(schema.pins, problem)))}

    def remove_pin(self, key: str) -> bool:
        """Deletes the pin of the key with this hash; returns whether there was one, valid or not."""
        with self._writing() as connection:
            if schema.lacks(connection, schema.pins):
                return False
            return connection.execute(schema.pins.delete().where(schema.pins.c.key_hash == key)).rowcount > 0

    def find(self, kind: type[rows.Row], key: str = "", config: str = "") -> list[rows.Row]:
        """Returns every row of ``kind`` whose key's and config's hashes begin with ``key`` and ``config``, oldest first."""
        table = _TABLES[kind]
        hashes = {"key_hash": key, "config_hash": config}
        query = select(table).where(*(table.c[name].startswith(text, autoescape=True) for name, text in hashes.items()))
        query = query.order_by(table.c.created_at, table.c.key_hash, table.c.config_hash)
        return rows.decode_all(kind, self._fetch(query))

    def remove(self, found: Iterable[Trial | Verification | Winner | Lift]) -> int:
        """Deletes these very rows, all or none, and returns how many; one that was written anew meanwhile stays."""
        with self._writing() as connection:
            return sum(connection.execute(_deletion(row)).rowcount for row in found)

    def claim(self, problem_hash: str, owner: str, host: str, seconds: float) -> Lease | None:
        """Takes the lease of a problem for at most ``rules.LONGEST_LEASE``; None while someone else's stands."""
        with self._writing() as connection:
            now, seconds = time.time(), min(seconds, rules.LONGEST_LEASE)
            wanted = Lease(problem_hash=problem_hash, owner=owner, host=host, acquired_at=now, expires_at=now + seconds)
            return leases.claim(connection, self._insert, wanted)

    def renew(self, lease: Lease, seconds: float) -> Lease | None:
        """Moves the end of a lease; None if it was lost."""
        with self._writing() as connection:
            renewed = rules.renewed(lease, time.time(), min(seconds, rules.LONGEST_LEASE))
            return renewed if leases.renew(connection, renewed) else None

    def release(self, lease: Lease) -> None:
        """Gives a lease back; one that was lost meanwhile stays with its new owner."""
        with self._writing() as connection:
            leases.release(connection, lease)

    def holder(self, problem_hash: str) -> Lease | None:
        """Returns the standing lease of a problem."""
        with self._reading() as connection:
            return leases.holder(connection, problem_hash, time.time())

    def counts(self) -> dict[str, int]:
        """Returns the number of rows of each table."""
        with self._reading() as connection:
            return {
                name: 0
                if schema.lacks(connection, table)
                else connection.execute(select(func.count()).select_from(table)).scalar_one()
                for name, table in schema.ROW_TABLES.items()
            }

    def _create(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            folders = (self.path.parent, *self.path.parent.parents)
            file = next((folder for folder in folders if folder.exists()), self.path.parent)
            raise Unavailable(f"{self.path} cannot be made: {file} is a file, not a folder") from error
        except OSError as error:
            raise Unavailable(f"{self.path.parent} cannot be made: {error.strerror}") from error
        with self._transaction(self._writer) as connection:
            schema.create(connection)

    def _fetch(self, query: Select[Any]) -> list[Any]:
        with self._reading() as connection:
            if any(schema.lacks(connection, table) for table in query.get_final_froms()):
                return []
            return list(connection.execute(query).mappings())

    def _problems(self, query: Select[Any]) -> list[Problem]:
        problems: list[Problem] = []
        for columns in self._fetch(query):
            with contextlib.suppress(RowRefused):
                problems.append(rows.decode_problem(columns))
        return problems

    def _reading(self) -> contextlib.AbstractContextManager[Connection]:
        return self._ready(self._reader)

    def _writing(self) -> contextlib.AbstractContextManager[Connection]:
        return self._ready(self._writer)

    def _ready(self, engine: Engine) -> contextlib.AbstractContextManager[Connection]:
        """A transaction; the schema is made again first if the file went away (moved aside, or deleted by hand)."""
        seen = identity(self.path)
        if seen is None or seen[2] == 0:
            self._create()
        return self._transaction(engine)

    @contextlib.contextmanager
    def _transaction(self, engine: Engine) -> Iterator[Connection]:
        seen = identity(self.path)
        try:
            with engine.begin() as connection:
                yield connection
        except UnknownSchema as error:
            raise UnknownSchema(f"{self.url}: {error}", seen) from error
        except SQLAlchemyError as error:
            raise self._fault(error, seen) from error

    def _fault(self, error: SQLAlchemyError, seen: Any) -> CacheError:
        cause = getattr(error, "orig", None) or error
        name = getattr(cause, "sqlite_errorname", "")
        if name.startswith(_DAMAGED):
            return Damaged(f"{self.path} is damaged: {cause}", seen)
        return Unavailable(f"{self.url} cannot be used: {cause}{f' ({name})' if name else ''}", seen)


def _of(table: Table, problem: Problem, kernel: str | None = None) -> Select[Any]:
    query = select(table).where(table.c.problem_hash == problem.hash)
    return query if kernel is None else query.where(table.c.kernel == kernel)


def _deletion(row: Trial | Verification | Winner | Lift) -> Delete:
    table, values = _TABLES[type(row)], rows.encode(row)
    names = ["id"] if "id" in values else ["key_hash", "config_hash", "created_at"]
    return table.delete().where(*(table.c[name] == values[name] for name in names))


def _problem_query() -> Select[Any]:
    columns = [schema.winners.c[name] for name in ("problem_hash", *rows.PROBLEM_COLUMNS)]
    return select(*columns).distinct()
