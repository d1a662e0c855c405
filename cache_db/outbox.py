"""What the user's database owes the shared one: marks on rows, stored or deleted, that the server has not acknowledged yet.

A mark is made in the transaction that stores its row, so that no kill comes between the two, and taken back when the
server has the row. Both tables live in the user's file only, and only where a server is named.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    and_,
    delete,
    inspect,
    or_,
    select,
)
from sqlalchemy.schema import CreateTable

from cache_db import removal, rows, statements
from cache_db.batch import Debt, Shared
from cache_db.errors import RowRefused
from cache_db.models import Lift, Problem, Trial, Verification, Winner

_metadata = MetaData()
_outbox = Table(
    "flashbias_outbox",
    _metadata,
    Column("target", String(64), primary_key=True),
    Column("kind", Text, primary_key=True),
    Column("name", Text, primary_key=True),
    Column("stamp", String(64), nullable=False),
    Column("replaces", SmallInteger, nullable=False),
)
_synced = Table(
    "flashbias_synced",
    _metadata,
    Column("target", String(64), primary_key=True),
    Column("problem_hash", String(64), primary_key=True),
    Column("synced_at", Text, nullable=False),
)
_KINDS: dict[str, type[Shared]] = {"trial": Trial, "verification": Verification, "lift": Lift, "winner": Winner}
_NAMES = {model: kind for kind, model in _KINDS.items()}
_SEPARATOR = "/"

GONE = "gone"
"""The kind of a debt that is a deletion; its name is that of ``removal.name``."""


def debt(row: Shared, *, replace: bool = False) -> Debt:
    """Returns the debt that ``row``, as it is, leaves until a server has it."""
    kind, values = _NAMES[type(row)], rows.encode(row)
    stamp = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return Debt(kind, _name(kind, values), stamp, replace, row)


def owe(connection: Connection, insert: statements.Insert, target: str, owed: Debt) -> None:
    """Marks a row as owed to ``target``; that it was deleted earlier is owed no more."""
    connection.execute(CreateTable(_outbox, if_not_exists=True))
    if owed.row is not None:
        _unmark(connection, target, GONE, removal.name(owed.row))
    values = {
        "target": target,
        "kind": owed.kind,
        "name": owed.name,
        "stamp": owed.stamp,
        "replaces": int(owed.replace),
    }
    connection.execute(statements.put(insert, _outbox), values)


def owe_removal(connection: Connection, insert: statements.Insert, target: str, row: Shared) -> None:
    """Marks that ``row`` was deleted as owed to ``target``; the row itself is owed no more."""
    named = removal.name(row)
    owe(connection, insert, target, Debt(GONE, named, hashlib.sha256(named.encode()).hexdigest(), replace=False))
    _unmark(connection, target, _NAMES[type(row)], removal.primary(row))


def settle(connection: Connection, target: str, debts: Iterable[Debt]) -> None:
    """Takes the marks of ``debts`` back; a row that was changed since they were read stays owed."""
    if not inspect(connection).has_table(_outbox.name):
        return
    for each in debts:
        mine = (_outbox.c.target == target, _outbox.c.kind == each.kind, _outbox.c.name == each.name)
        connection.execute(delete(_outbox).where(*mine, _outbox.c.stamp == each.stamp))


def debts(connection: Connection, target: str, limit: int) -> list[Debt]:
    """Returns up to ``limit`` debts to ``target`` with their rows; a row that cannot be read any more is None."""
    if not inspect(connection).has_table(_outbox.name):
        return []
    found = connection.execute(select(_outbox).where(_outbox.c.target == target).limit(limit)).mappings().all()
    stored = {kind: _stored(connection, kind, [mark for mark in found if mark["kind"] == kind]) for kind in _KINDS}
    return [
        Debt(
            mark["kind"],
            mark["name"],
            mark["stamp"],
            bool(mark["replaces"]),
            stored.get(mark["kind"], {}).get(mark["name"]),
        )
        for mark in found
    ]


def sync(connection: Connection, insert: statements.Insert, target: str, problem: Problem) -> None:
    """Remembers that all ``target`` knows of ``problem`` was read now."""
    connection.execute(CreateTable(_synced, if_not_exists=True))
    values = {"target": target, "problem_hash": problem.hash, "synced_at": repr(time.time())}
    connection.execute(statements.put(insert, _synced), values)


def synced_at(connection: Connection, target: str, problem: Problem) -> float:
    """Returns when ``target`` was last read for ``problem`` (epoch seconds), 0.0 if never."""
    if not inspect(connection).has_table(_synced.name):
        return 0.0
    mine = (_synced.c.target == target, _synced.c.problem_hash == problem.hash)
    found = connection.execute(select(_synced.c.synced_at).where(*mine)).scalar_one_or_none()
    try:
        return float(found or 0.0)
    except ValueError:
        return 0.0


def _unmark(connection: Connection, target: str, kind: str, name: str) -> None:
    connection.execute(
        delete(_outbox).where(_outbox.c.target == target, _outbox.c.kind == kind, _outbox.c.name == name)
    )


def _name(kind: str, values: Mapping[Any, Any]) -> str:
    """Returns a row's primary key as one text."""
    return _SEPARATOR.join(str(values[name]) for name in statements.keys(statements.TABLES[_KINDS[kind]]))


def _stored(connection: Connection, kind: str, marks: list[Mapping[Any, Any]]) -> dict[str, Shared]:
    """Returns the rows that ``marks`` name."""
    table = statements.TABLES[_KINDS[kind]]
    if not marks or not inspect(connection).has_table(table.name):
        return {}
    columns = [table.c[name] for name in statements.keys(table)]
    wanted = [
        and_(*(column == part for column, part in zip(columns, mark["name"].split(_SEPARATOR), strict=False)))
        for mark in marks
    ]
    found: dict[str, Shared] = {}
    for values in connection.execute(select(table).where(or_(*wanted))).mappings():
        try:
            found[_name(kind, values)] = rows.decode(_KINDS[kind], values)  # type: ignore[type-var]
        except RowRefused:
            continue
    return found
