"""What every method of the store stands on: an engine, and transactions whose faults are this package's own.

``cache_db.store`` says what is stored; here is how a row gets in and how rows get out.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from sqlalchemy import Connection, Engine, Select, Table
from sqlalchemy.exc import SQLAlchemyError

from cache_db import engines, outbox, rows, schema, statements
from cache_db.batch import Shared
from cache_db.errors import RowRefused, Unavailable, UnknownSchema
from cache_db.models import Lift, Pin, Problem


class Database:
    """One place with our schema, without a connection between two transactions."""

    def __init__(self, place: engines.File | engines.Server) -> None:
        self._place = place
        engine = place.engine()
        self._reader = engine
        self._writer = engine.execution_options(flashbias_immediate=True)
        self._insert: statements.Insert = importlib.import_module(f"sqlalchemy.dialects.{engine.dialect.name}").insert
        self._owed_to = ""

    @property
    def path(self) -> Path:
        """The file of a SQLite database. Raises Unavailable for one that has none."""
        if not isinstance(self._place, engines.File):
            raise Unavailable(f"{self.url} is no file")
        return self._place.path

    @property
    def url(self) -> str:
        """The database's address without its password."""
        return self._place.shown

    def owing(self, target: str) -> Self:
        """Returns this store, marking in each write that the row is owed to the shared database ``target``."""
        other = copy.copy(self)
        other._owed_to = target  # noqa: SLF001 - of our own class
        return other

    def ensured(self) -> Self:
        """Returns this store once it has the schema. Raises Unavailable, Damaged or UnknownSchema."""
        self._place.leave_wal()
        with self._reading() as connection:
            present = schema.is_present(connection)
        if not present:
            self._create()
        return self

    def _create(self) -> None:
        self._place.make_room()
        with self._transaction(self._writer) as connection:
            self._place.lock_schema(connection)
            schema.create(connection)

    def _add(self, row: Shared | Pin, statement: Any) -> None:
        with self._writing() as connection:
            if isinstance(row, Lift | Pin):
                schema.add_younger(connection, statements.TABLES[type(row)], self._place.lock_schema)
            connection.execute(statement, self._place.fitting(rows.encode(row)))
            if not isinstance(row, Pin):
                self._owe(connection, row)

    def _owe(self, connection: Connection, row: Shared, *, replace: bool = False) -> None:
        if self._owed_to:
            outbox.owe(connection, self._insert, self._owed_to, outbox.debt(row, replace=replace))

    def _fetch(self, query: Select[Any], younger: Table | None = None) -> list[Any]:
        """Returns the rows of ``query``; none where the database has no table ``younger`` yet, which it asks for."""
        with self._reading() as connection:
            # Named by the caller: to ask the query for its tables compiles it, which takes longer than to run it.
            if younger is not None and schema.lacks(connection, younger):
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
        if self._place.missing:
            self._create()
        return self._transaction(engine)

    @contextlib.contextmanager
    def _transaction(self, engine: Engine) -> Iterator[Connection]:
        seen = self._place.seen
        try:
            with engine.begin() as connection:
                yield connection
        except UnknownSchema as error:
            raise UnknownSchema(f"{self.url}: {error}", seen) from error
        except SQLAlchemyError as error:
            fault = self._place.fault(error, seen)
            # What a driver says may hold a password: it is cleaned in the fault, and not shown beside it.
            raise fault from (error if isinstance(self._place, engines.File) else None)
