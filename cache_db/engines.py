"""The two engines and all that tells them apart: how they connect, begin, lock, tell the time, and fail.

    ============  =================================  =========================================================
                  SQLite (the user's file)           PostgreSQL (the shared database)
    ============  =================================  =========================================================
    writers       BEGIN IMMEDIATE: one at a time     READ COMMITTED; upserts decide, FOR UPDATE where a row is read first
    schema        made inside a write transaction    made under an advisory lock of that transaction
    clock         this host's                        the server's, ``clock_timestamp()``
    time limits   the busy time-out                  set for each transaction (PgBouncer gives the next one elsewhere)
    NUL in texts  stored                             replaced (PostgreSQL has none)
    ============  =================================  =========================================================

Neither has a pool: nothing is open between calls, so a fork inherits nothing, a killed process loses nothing it was told
is stored, and a thousand processes that train hold no connection.
"""

from __future__ import annotations

import contextlib
import math
import os
import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, NullPool, create_engine, event, func, select, text
from sqlalchemy.exc import DataError, SQLAlchemyError

from cache_db import deadline, sharing
from cache_db.address import Address
from cache_db.errors import Busy, CacheError, Damaged, Forbidden, Identity, RowRefused, Unavailable, identity

BUSY_SECONDS = 30.0
"""How long a call waits for another process's transaction; the longest seen under 32 writers was 3.3 s."""

SERVER_SECONDS = 10.0
"""How long one connection attempt, and one transaction, may take on a server that answers."""

_IMMEDIATE = "flashbias_immediate"
_WAL = slice(
    18, 20
)  # where a file says how it is written: https://www.sqlite.org/fileformat2.html#file_format_version_numbers
_DAMAGED = ("SQLITE_NOTADB", "SQLITE_CORRUPT")
_SCHEMA_LOCK = 0x666C617368626961  # "flashbia"
# https://www.postgresql.org/docs/current/errcodes-appendix.html
_BUSY_STATES = ("40001", "40P01", "53300", "55P03", "57P03")
_NO_RIGHT, _READ_ONLY = "42501", "25006"
_BUSY_WORDS = ("too many clients", "too many connections", "connection slots", "no more connections", "starting up")
"""A refused connection has no SQLSTATE in libpq, only words: PostgreSQL's own, and PgBouncer's."""


class File:
    """A SQLite file. The rollback journal stays: write-ahead logs need one host and leave files beside read-only ones."""

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.realpath(path))
        self.url = URL.create("sqlite", database=os.fspath(self.path))
        self.shown = self.url.render_as_string(hide_password=True)

    def engine(self) -> Engine:
        """Returns an engine without a pool that leaves BEGIN to us (the driver's own comes too late)."""
        engine = create_engine(self.url, poolclass=NullPool, connect_args={"timeout": BUSY_SECONDS})

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

    @property
    def missing(self) -> bool:
        """Whether the schema must be there no more: the file went away (moved aside, or deleted by hand) or is empty."""
        seen = self.seen
        return seen is None or seen[2] == 0

    @property
    def seen(self) -> Identity | None:
        """The state of the file, for errors to carry."""
        return identity(self.path)

    def make_room(self) -> None:
        """Makes the file's folder. Raises Unavailable."""
        try:
            sharing.make_folder(self.path.parent)
        except (FileExistsError, NotADirectoryError) as error:
            folders = (self.path.parent, *self.path.parent.parents)
            file = next((folder for folder in folders if folder.exists()), self.path.parent)
            raise Unavailable(f"{self.path} cannot be made: {file} is a file, not a folder") from error
        except OSError as error:
            raise Unavailable(f"{self.path.parent} cannot be made: {error.strerror}") from error
        sharing.make_file(self.path)

    def leave_wal(self) -> None:
        """Gives a database that somebody set to a write-ahead log its rollback journal back, if nobody uses it now.

        Such a log needs one host, and cannot be read in a folder that may not be written.
        """
        with contextlib.suppress(OSError, sqlite3.Error):
            with self.path.open("rb") as file:
                header = file.read(_WAL.stop)
            if header[_WAL] == b"\2\2":
                with contextlib.closing(sqlite3.connect(self.path, timeout=1.0)) as connection:
                    connection.execute("PRAGMA journal_mode = DELETE")

    def lock_schema(self, connection: Connection) -> None:
        """Nothing to do: a write transaction is alone in the file."""

    def now(self, _connection: Connection) -> float:
        """Returns the time that leases are measured by, in epoch seconds."""
        return time.time()

    def fitting(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a row as this engine can hold it: as it is."""
        return dict(values)

    def fault(self, error: SQLAlchemyError, seen: Identity | None) -> CacheError:
        """Returns what ``error`` means."""
        cause = getattr(error, "orig", None) or error
        name = getattr(cause, "sqlite_errorname", "")
        if name.startswith(_DAMAGED):
            return Damaged(f"{self.path} is damaged: {cause}", seen)
        return Unavailable(f"{self.shown} cannot be used: {cause}{f' ({name})' if name else ''}", seen)


class Sealed(File):
    """A SQLite file that nobody writes any more: it is read without locks, which network file systems lack, or fake."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.shown = str(self.path)
        self.url = URL.create(
            "sqlite",
            database=f"file:{quote(os.fspath(self.path))}",
            query={"mode": "ro", "immutable": "1", "uri": "true"},
        )

    @property
    def missing(self) -> bool:
        """Whether there is a schema to make: there never is."""
        return False

    def make_room(self) -> None:
        """Raises Unavailable: a file without our schema is no seed."""
        raise Unavailable(f"{self.path} is not a tuning database of this version: export it again")

    def leave_wal(self) -> None:
        """Nothing to do: a seed is never written."""


class Server:
    """A PostgreSQL database, perhaps behind PgBouncer: no prepared statements, nothing set beyond a transaction."""

    missing = False
    seen = None

    def __init__(self, address: Address, seconds: float = SERVER_SECONDS) -> None:
        self.address = address
        self.shown = address.shown
        self._seconds = seconds

    def engine(self) -> Engine:
        """Returns an engine that connects for each transaction and bounds each on the server, too."""
        seconds = max(2, math.ceil(self._seconds))  # less is taken for 2 by libpq
        options = {
            "prepare_threshold": None,
            "connect_timeout": seconds,
            "client_encoding": "utf8",
            "application_name": "flashbias",
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 2,
        }
        engine = create_engine(
            self.address.url,
            poolclass=NullPool,
            connect_args=options,
            isolation_level="READ COMMITTED",
            use_native_hstore=False,
            hide_parameters=True,
        )
        milliseconds = str(math.ceil(1000 * self._seconds))
        # A client that vanishes in a transaction must not keep a lease's row locked for the others.
        limits = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")
        bounds = select(*(func.set_config(name, milliseconds, text("true")) for name in limits))

        # First of all listeners: SQLAlchemy's own asks the server for its version.
        @event.listens_for(engine, "connect", insert=True)
        def _connected(connection: Any, _record: Any) -> None:
            deadline.adopt(connection.fileno())

        @event.listens_for(engine, "begin")
        def _begun(connection: Connection) -> None:
            connection.execute(bounds)

        return engine

    def make_room(self) -> None:
        """Nothing to do: a database is made by its server's administrator."""

    def leave_wal(self) -> None:
        """Nothing to do: its log is the server's business."""

    def lock_schema(self, connection: Connection) -> None:
        """Keeps other creators out until the transaction ends: without it 37 of 120 that met failed."""
        connection.execute(select(func.pg_advisory_xact_lock(_SCHEMA_LOCK)))

    def now(self, connection: Connection) -> float:
        """Returns the time that leases are measured by, in epoch seconds: the same for every host."""
        return float(connection.execute(select(func.date_part("epoch", func.clock_timestamp()))).scalar_one())

    def fitting(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a row as this engine can hold it: a compiler's words may hold a NUL."""
        return {name: v.replace("\0", "\ufffd") if isinstance(v, str) else v for name, v in values.items()}

    def fault(self, error: SQLAlchemyError, _seen: Identity | None) -> CacheError:
        """Returns what ``error`` means, without the password that a driver may repeat."""
        cause = getattr(error, "orig", None) or error
        state = getattr(cause, "sqlstate", None) or ""
        words = self.address.clean(cause)
        message = f"{self.shown}: {words}{f' ({state})' if state else ''}"
        if state in (_NO_RIGHT, _READ_ONLY):
            return Forbidden(message, by_right=state == _NO_RIGHT)
        if isinstance(error, DataError):
            return RowRefused(message)
        if state in _BUSY_STATES or (not state and any(each in words for each in _BUSY_WORDS)):
            return Busy(message)
        return Unavailable(message)
