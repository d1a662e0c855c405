"""The tables, one schema for every engine.

Every problem column is stored in clear beside the hashes, so a database can be read with any SQL tool.
What the specs define (``fields``, ``params``, ``figures``) is JSON text: a new field never changes the
schema. No column may be NULL (NULLs never conflict in a unique key), and times are epoch seconds
(SQLite returns dates without their zone).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import metadata

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Connection,
    Double,
    Integer,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    inspect,
    select,
)

from cache_db.errors import UnknownSchema

SCHEMA_VERSION = 1

metadata_ = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _text(name: str) -> Column[str]:
    return Column(name, Text, nullable=False)


def _number(name: str) -> Column[float]:
    return Column(name, Double, nullable=False)


def _hash(name: str, *, primary_key: bool = False, index: bool = False) -> Column[str]:
    return Column(name, String(64), primary_key=primary_key, index=index, nullable=False)


def _key_columns() -> list[Column[str] | Column[int]]:
    """The columns of one (problem, kernel), short of its hash, which is a primary key in some tables only."""
    return [
        _hash("problem_hash", index=True),
        _text("kernel"),
        _text("spec"),
        _text("gpu_name"),
        _text("capability"),
        Column("sm_count", Integer, nullable=False),
        _text("mig_profile"),
        _text("triton_version"),
        _text("source_hash"),
        _text("layout"),
        _text("fields"),
    ]


def _config_columns() -> list[Column[str]]:
    """The columns of one config."""
    return [_text("implementation"), _text("variant"), _text("params")]


def _proof_columns() -> list[Column[str] | Column[int]]:
    """The columns of one proof of one config."""
    return [
        *_config_columns(),
        Column("level", SmallInteger, nullable=False),
        _text("proven_with"),
        _text("binary"),
        _text("driver"),
        _text("ptxas"),
        _text("torch"),
    ]


def _verdict_columns() -> list[Column[str] | Column[int]]:
    """The columns of one judgement."""
    return [
        Column("verdict", String(32), nullable=False),
        _text("reason"),
        Column("seed", BigInteger, nullable=False),
        _text("gpu_uuid"),
        _text("host"),
    ]


meta = Table(
    "flashbias_meta",
    metadata_,
    Column("id", SmallInteger, primary_key=True, autoincrement=False),
    Column("schema_version", Integer, nullable=False),
    _text("library_version"),
    _number("created_at"),
    CheckConstraint("id = 1", name="single_row"),
)

trials = Table(
    "flashbias_trials",
    metadata_,
    _hash("key_hash", primary_key=True),
    _hash("config_hash", primary_key=True),
    *_key_columns(),
    *_proof_columns(),
    *_verdict_columns(),
    _text("figures"),
    _number("created_at"),
    _number("seconds"),
)

verifications = Table(
    "flashbias_verifications",
    metadata_,
    _hash("id", primary_key=True),
    _hash("key_hash"),
    _hash("config_hash"),
    *_key_columns(),
    *_proof_columns(),
    *_verdict_columns(),
    _number("created_at"),
)

# These two are younger than the others: a file made by version 0.1.0 gets them with its first lift, and its first pin.
lifts = Table(
    "flashbias_lifts",
    metadata_,
    _hash("id", primary_key=True),
    _hash("key_hash"),
    _hash("config_hash"),
    *_key_columns(),
    *_config_columns(),
    _text("lifted_by"),
    _text("host"),
    _text("reason"),
    _number("created_at"),
)

pins = Table(
    "flashbias_pins",
    metadata_,
    _hash("key_hash", primary_key=True),
    _hash("config_hash"),
    *_key_columns(),
    *_config_columns(),
    _text("pinned_by"),
    _text("host"),
    _text("reason"),
    _number("created_at"),
)

winners = Table(
    "flashbias_winners",
    metadata_,
    _hash("key_hash", primary_key=True),
    _hash("config_hash"),
    *_key_columns(),
    *_proof_columns(),
    _number("ms"),
    Column("tried", Integer, nullable=False),
    Column("total", Integer, nullable=False),
    Column("complete", SmallInteger, nullable=False),
    _number("created_at"),
)

leases = Table(
    "flashbias_leases",
    metadata_,
    _hash("problem_hash", primary_key=True),
    _text("owner"),
    _text("host"),
    _number("acquired_at"),
    _number("expires_at"),
)

jobs = Table(
    "flashbias_jobs",
    metadata_,
    Column("job_id", String(255), primary_key=True),
    _hash("problem_hash", primary_key=True),
    _text("configs"),
    _text("host"),
    _number("created_at"),
)

YOUNGER_TABLES = (lifts, pins)
ROW_TABLES = {
    "trials": trials,
    "verifications": verifications,
    "lifts": lifts,
    "pins": pins,
    "winners": winners,
    "leases": leases,
    "jobs": jobs,
}


def library_version() -> str:
    """Returns the installed distribution's version, "" when run from a source tree."""
    try:
        return metadata.version("flashbias")
    except metadata.PackageNotFoundError:
        return ""


UPGRADES: dict[int, Callable[[Connection], None]] = {}
"""Schema version -> what turns a database of it into one of the next, in one transaction, with every row kept.

A step only adds: processes of the older version may be in the middle of their work. ``tests/cache_db/test_stored.py`` opens
a stored database of each version that was ever released.
"""


def is_present(connection: Connection) -> bool:
    """Whether the schema exists as this version has it; False also for an older one, which ``create`` carries over.

    Raises UnknownSchema when a newer version of the library made it.
    """
    return _version(connection) == SCHEMA_VERSION


def _version(connection: Connection) -> int | None:
    """Returns the version of the schema, None where there is none. Raises UnknownSchema for one we cannot use."""
    if not inspect(connection).has_table(meta.name):
        return None
    version: object = connection.execute(select(meta.c.schema_version)).scalar_one_or_none()
    if version is None:
        return None
    if not isinstance(version, int) or not (version == SCHEMA_VERSION or version in UPGRADES):
        raise UnknownSchema(
            f"its schema version is {version!r}, this library understands {SCHEMA_VERSION}: "
            "upgrade flashbias or name another database"
        )
    return version


def lacks(connection: Connection, table: object) -> bool:
    """Whether ``table`` is a younger one that the database does not have yet."""
    return any(table is younger and not inspect(connection).has_table(younger.name) for younger in YOUNGER_TABLES)


def add_younger(connection: Connection, table: Table, lock: Callable[[Connection], None]) -> None:
    """Creates ``table`` where it is a younger one that the database lacks; ``lock`` keeps other creators out."""
    if lacks(connection, table):
        lock(connection)
        table.create(connection, checkfirst=True)


def create(connection: Connection) -> None:
    """Creates what is missing, or carries an older schema over with its rows.

    Must run alone: in SQLite's write transaction, under an advisory lock elsewhere.
    """
    version = _version(connection)
    made_by = {"schema_version": SCHEMA_VERSION, "library_version": library_version()}
    if version is None:
        metadata_.create_all(connection)
        connection.execute(meta.insert(), {"id": 1, **made_by, "created_at": time.time()})
    elif version < SCHEMA_VERSION:
        for step in range(version, SCHEMA_VERSION):
            UPGRADES[step](connection)
        connection.execute(meta.update().values(made_by))
