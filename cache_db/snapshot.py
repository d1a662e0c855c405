"""Packs as SQLite files: one file in rollback mode that nobody writes any more, good as a seed, too.

Such a file is read with nothing of it executed: no view, no trigger, no function of its schema, no row above the bound.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from cache_db import rows, schema, sharing, statements
from cache_db.batch import Batch, Shared
from cache_db.errors import Damaged, PackRefused, RowRefused, Unavailable
from cache_db.packs import KINDS, LONGEST, VERSION, Refusal
from cache_db.store import Store

MAGIC: Final = b"SQLite format 3\0"
_TOGETHER: Final = 200
_HIDDEN: Final = 6  # of table_xinfo: 0 for a column that is stored (https://sqlite.org/pragma.html#pragma_table_xinfo)


def fill(store: Store, found: Iterable[Shared]) -> None:
    """Merges the rows ``found`` into ``store``, some at a time. Raises CacheError."""
    waiting: list[Shared] = []
    for row in found:
        waiting.append(row)
        if len(waiting) == _TOGETHER:
            store.merge(Batch.of(waiting))
            waiting = []
    if waiting:
        store.merge(Batch.of(waiting))


def write(store: Store, path: Path) -> None:
    """Writes the database ``store`` to the new file ``path``, without gaps. Raises Unavailable."""
    try:
        with contextlib.closing(sqlite3.connect(store.path)) as connection:
            connection.execute("VACUUM INTO ?", (str(path),))
    except sqlite3.Error as error:
        raise Unavailable(f"{path} cannot be written: {error}") from error


def read(path: Path) -> Iterator[Shared | Refusal]:
    """Yields each row of the SQLite file ``path``, which nobody may be writing, or why it is none.

    Raises Unavailable for a file that is being written, Damaged for one that is no database, PackRefused for one
    without our tables or with those of a newer version.
    """
    if sharing.is_written(path):
        raise Unavailable(f"{path} is being written, or was left so by a crash: export it with flashbias instead")
    address = f"file:{quote(str(path.absolute()))}?mode=ro&immutable=1"
    try:
        with contextlib.closing(sqlite3.connect(address, uri=True)) as connection:
            connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
            connection.execute("PRAGMA trusted_schema = OFF")
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LONGEST)
            tables = _tables(connection, path)
            for kind, model in KINDS.items():
                if statements.TABLES[model].name in tables:
                    yield from _rows(connection, kind, model)
    except sqlite3.DatabaseError as error:
        raise Damaged(f"{path} is no database, or no whole one: {error}") from error


def _tables(connection: sqlite3.Connection, path: Path) -> set[str]:
    """Returns the names of the file's tables: no views, no virtual tables, whose modules would run.

    Raises PackRefused, also where a column of ours is computed: that may take for ever.
    """
    query = "SELECT name FROM sqlite_master WHERE type = 'table' AND sql LIKE 'CREATE TABLE %'"
    tables = {name for (name,) in connection.execute(query)}
    if schema.meta.name not in tables:
        raise PackRefused(f"{path} is not a tuning database")
    for name in tables & schema.metadata_.tables.keys():
        if any(column[_HIDDEN] for column in connection.execute(f"PRAGMA table_xinfo({name})")):
            raise PackRefused(f"{path} computes columns of {name}, which is not done for a stranger")
    version = connection.execute(f"SELECT schema_version FROM {schema.meta.name}").fetchone()  # noqa: S608 - our own name
    if version != (VERSION,):
        told = str(version and version[0])[:20]
        raise PackRefused(
            f"{path} is of schema version {told}, this library reads {VERSION}: "
            "export it again with the version of flashbias that is in use here"
        )
    return tables


def _rows(connection: sqlite3.Connection, kind: str, model: type[Shared]) -> Iterator[Shared | Refusal]:
    """Yields the rows of one table; one that cannot be read is stepped over."""
    table = statements.TABLES[model]
    columns = [column.name for column in table.columns]
    query, last = f"SELECT rowid, {', '.join(columns)} FROM {table.name} WHERE rowid", -(2**63)  # noqa: S608 - ours
    while True:
        try:
            for number, *values in connection.execute(f"{query} > ? ORDER BY rowid", (last,)):
                last = _later(number, last)
                yield _decoded(kind, number, model, dict(zip(columns, values, strict=True)))
        except sqlite3.DatabaseError:
            # The driver reads one row ahead: it may be the next that is good, and the one behind it that is not.
            each = _later(_next(connection, table.name, last), last)
            try:
                number, *values = connection.execute(f"{query} = ?", (each,)).fetchone() or (None,)
            except sqlite3.DatabaseError as error:
                yield Refusal(f"{kind} {each}", str(error))
            else:
                if number is not None:
                    yield _decoded(kind, each, model, dict(zip(columns, values, strict=True)))
            last = each
        else:
            return


def _later(number: int, last: int) -> int:
    """Returns ``number``. Raises sqlite3.DatabaseError unless it is above ``last``: pages that form a ring have no end."""
    if number <= last:
        raise sqlite3.DatabaseError(f"row {number} stands behind row {last}")
    return number


def _next(connection: sqlite3.Connection, table: str, last: int) -> int:
    """Returns the number of the row behind ``last``. Raises sqlite3.DatabaseError where nobody can tell."""
    found = connection.execute(f"SELECT min(rowid) FROM {table} WHERE rowid > ?", (last,)).fetchone()[0]  # noqa: S608 - ours
    if not isinstance(found, int):
        raise sqlite3.DatabaseError(f"the rows of {table} cannot be told apart")
    return found


def _decoded(kind: str, number: int, model: type[Shared], columns: Mapping[str, Any]) -> Shared | Refusal:
    try:
        return rows.decode(model, columns)  # type: ignore[type-var]
    except RowRefused as error:
        return Refusal(f"{kind} {number}", str(error))
