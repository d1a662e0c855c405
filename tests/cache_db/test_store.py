"""What only the database itself can promise: its schema, its address, its speed, and its errors."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

import pytest
import store_examples as examples
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable

from cache_db import rows, schema
from cache_db.errors import CacheError, Unavailable, UnknownSchema
from cache_db.models import Trial, Verification, Winner
from cache_db.store import Store


@pytest.mark.parametrize("awkward", ["plain", "with space", "100%", "a?b=c&d#e", "naïve-ü", "file:x", "it's"])
def test_path_may_hold_any_character(tmp_path: Path, awkward: str) -> None:
    """A folder's name is a name, never part of an address."""
    path = tmp_path / awkward / "flashbias.db"
    Store.open(path).add_trial(examples.trial())
    assert path.is_file()
    assert Store.open(path).path == path
    assert [entry.name for entry in tmp_path.iterdir()] == [awkward]


def test_relative_path_means_the_same_after_a_change_of_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store goes on with the file it opened, wherever the process goes."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    store = Store.open(Path("cache/flashbias.db"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    store.add_trial(examples.trial())
    assert store.trials(examples.problem()) == [examples.trial()]
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_url_can_be_printed(tmp_path: Path) -> None:
    """The address names engine and file."""
    assert Store.open(tmp_path / "flashbias.db").url == f"sqlite:///{tmp_path}/flashbias.db"


def test_schema_has_the_tables_of_the_design(tmp_path: Path) -> None:
    """Eight tables with our prefix, no column that may be NULL, one meta row, a rollback journal."""
    path = Store.open(tmp_path / "flashbias.db").path
    connection = sqlite3.connect(path)
    tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    assert sorted(tables) == [
        f"flashbias_{name}"
        for name in ("jobs", "leases", "lifts", "meta", "pins", "trials", "verifications", "winners")
    ]
    for table in tables:
        assert all(column[3] for column in connection.execute(f"PRAGMA table_info({table})")), table
    assert connection.execute("SELECT id, schema_version FROM flashbias_meta").fetchall() == [(1, 1)]
    with pytest.raises(sqlite3.IntegrityError):
        connection.execute("INSERT INTO flashbias_meta VALUES (2, 1, '', 0)")
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    connection.close()


def test_schema_is_postgresql_too() -> None:
    """Every table can be made there as well, with times and seeds in 64 bits."""
    statements = {
        name: str(CreateTable(table).compile(dialect=postgresql.dialect()))
        for name, table in schema.metadata_.tables.items()
    }
    assert "created_at DOUBLE PRECISION NOT NULL" in statements["flashbias_winners"]
    assert "seed BIGINT NOT NULL" in statements["flashbias_trials"]
    assert "SERIAL" not in "".join(statements.values())


@pytest.mark.parametrize(
    ("table", "row"),
    [
        (schema.trials, examples.trial()),
        (schema.verifications, examples.verification()),
        (schema.winners, examples.winner()),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_every_column_has_its_value_and_every_value_its_column(
    table: schema.Table, row: Trial | Verification | Winner
) -> None:
    """Model and table cannot drift apart unseen."""
    assert set(rows.encode(row)) == set(table.columns.keys())


def test_reopening_keeps_the_meta_row(tmp_path: Path) -> None:
    """The schema is made once: opening again changes nothing in the file."""
    path = Store.open(tmp_path / "flashbias.db").path
    before = path.read_bytes()
    Store.open(path)
    assert path.read_bytes() == before


def test_newer_schema_is_named(tmp_path: Path) -> None:
    """The error says what was found, what is understood, and where."""
    path = Store.open(tmp_path / "flashbias.db").path
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE flashbias_meta SET schema_version = 7")
    connection.close()
    with pytest.raises(UnknownSchema, match=r"flashbias\.db: its schema version is 7, this library understands 1"):
        Store.open(path)


def test_broken_schema_is_a_store_error(tmp_path: Path) -> None:
    """A table that somebody dropped is reported as this package's error, not as SQLAlchemy's."""
    store = Store.open(tmp_path / "flashbias.db")
    with sqlite3.connect(store.path) as connection:
        connection.execute("DROP TABLE flashbias_winners")
    connection.close()
    with pytest.raises(Unavailable, match="no such table"):
        store.winners(examples.problem())
    with pytest.raises(CacheError):
        store.put_winner(examples.winner())


def test_look_up_among_ten_thousand_winners_is_quick(tmp_path: Path) -> None:
    """The first look-up takes at most 25 ms and later ones 1 ms on a quiet machine; here ten times that."""
    store = Store.open(tmp_path / "flashbias.db")
    sizes = [(128 * (1 + index % 100), 128 * (1 + index // 100)) for index in range(10_000)]
    problems = [examples.problem(fields={"seqlen_q": long, "seqlen_k": wide}) for long, wide in sizes]
    with store._writing() as connection:
        connection.execute(schema.winners.insert(), [rows.encode(examples.winner(at=at)) for at in problems])
    fresh = Store.open(store.path)
    taken = []
    for at in (problems[77], problems[5000], problems[9999], problems[1]):
        start = time.perf_counter()
        assert fresh.winners(at)["forward"].problem == at
        taken.append(time.perf_counter() - start)
    assert taken[0] < 0.25
    assert min(taken[1:]) < 0.01
    near = fresh.neighbours(examples.problem(fields={"seqlen_q": 130, "seqlen_k": 128}), examples.SOFT)
    assert near[0]["forward"].problem == problems[0]
