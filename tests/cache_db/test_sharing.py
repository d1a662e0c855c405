"""Folders that a group works in, files that somebody set to a write-ahead log, and schemas of other versions."""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import store_examples as examples
from sqlalchemy import Connection, text

from cache_db import open_layers, schema
from cache_db.damage import set_aside
from cache_db.errors import UnknownSchema, identity
from cache_db.own import open_own, own_file
from cache_db.store import Store


@pytest.fixture(autouse=True)
def usual_umask() -> Iterator[None]:
    """The umask of most systems, with which a group may not write what one of it makes."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    """Returns the rights of user, group and others."""
    return stat.S_IMODE(path.stat().st_mode) & 0o777


@pytest.mark.parametrize(
    ("folder", "file", "below"), [(0o2775, 0o664, 0o775), (0o2750, 0o644, 0o755), (0o777, 0o664, 0o775)]
)
def test_group_may_use_what_one_of_it_made(tmp_path: Path, folder: int, file: int, below: int) -> None:
    """Where the folder lets its group write, database, lock and new folders do; others never gain a right."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(folder)
    path = Store.open(shared / "team" / "flashbias.db").path
    assert (mode(path.parent), mode(path)) == (below, file)
    path.write_bytes(b"garbage" * 1000)
    assert set_aside(path, identity(path)) is not None
    assert mode(path.with_name("flashbias.db.lock")) == file


def test_rights_that_were_set_by_hand_stay(tmp_path: Path) -> None:
    """A database that was there is opened as it is."""
    tmp_path.chmod(0o2775)
    path = Store.open(tmp_path / "flashbias.db").path
    path.chmod(0o600)
    Store.open(path).add_trial(examples.trial())
    assert mode(path) == 0o600


def test_write_ahead_log_is_turned_off(tmp_path: Path) -> None:
    """A file in WAL mode, which network file systems cannot share, is back in rollback mode with its rows."""
    path = examples.filled(tmp_path / "flashbias.db", rows=3).path
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    connection.close()
    assert path.read_bytes()[18:20] == b"\2\2"
    assert len(open_layers(tmp_path).trials(examples.problem())) == 3
    assert path.read_bytes()[18:20] == b"\1\1"
    assert [each.name for each in tmp_path.iterdir()] == ["flashbias.db"]


def add_column(connection: Connection) -> None:
    """Carries version 1 over to an imagined version 2."""
    connection.execute(text("ALTER TABLE flashbias_winners ADD COLUMN note TEXT NOT NULL DEFAULT 'none'"))


def test_older_schema_is_carried_over_with_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step from the stored version to ours runs once, in one transaction, and every row is still there."""
    path = examples.filled(tmp_path / "flashbias.db", rows=3).path
    monkeypatch.setattr(schema, "SCHEMA_VERSION", 2)
    monkeypatch.setitem(schema.UPGRADES, 1, add_column)
    for _ in range(2):
        store = Store.open(path)
        assert (len(store.trials(examples.problem())), store.winners(examples.problem())) == (
            3,
            {"forward": examples.winner()},
        )
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT schema_version FROM flashbias_meta").fetchall() == [(2,)]
    assert connection.execute("SELECT note FROM flashbias_winners").fetchall() == [("none",)]
    connection.close()


def test_a_step_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file stays of its version, whole, when the way over is not finished; the process works in memory."""

    def broken(connection: Connection) -> None:
        add_column(connection)
        connection.execute(text("INSERT INTO nowhere VALUES (1)"))

    path = examples.filled(tmp_path / "flashbias.db", rows=3).path
    before = path.read_bytes()
    monkeypatch.setattr(schema, "SCHEMA_VERSION", 2)
    monkeypatch.setitem(schema.UPGRADES, 1, broken)
    assert open_layers(tmp_path).location == "memory"
    monkeypatch.undo()
    assert len(Store.open(path).trials(examples.problem())) == 3
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT schema_version FROM flashbias_meta").fetchall() == [(1,)]
    assert connection.execute(
        "SELECT count(*) FROM pragma_table_info('flashbias_winners') WHERE name = 'note'"
    ).fetchone() == (0,)
    connection.close()
    assert len(path.read_bytes()) == len(before)


@pytest.mark.parametrize("version", [0, -1, 7, "'seven'"])
def test_schema_without_a_way_to_ours_is_left_alone(tmp_path: Path, version: object) -> None:
    """Newer ones, and what no version ever wrote; what we keep beside it is found again by whoever only looks."""
    path = examples.filled(tmp_path / "flashbias.db", rows=3).path
    with sqlite3.connect(path) as connection:
        connection.execute(f"UPDATE flashbias_meta SET schema_version = {version}")
    connection.close()
    with pytest.raises(UnknownSchema, match="upgrade flashbias"):
        open_own(path)
    open_layers(tmp_path).add_trial(examples.trial())
    assert own_file(path).name == "flashbias.schema-1.db"
    assert open_own(path).trials(examples.problem()) == [examples.trial()]


def test_older_schema_of_a_server_is_carried_over_too(database: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process with the right to does it; rows stay."""
    from cache_db.address import Address

    assert isinstance(database, Address)
    Store.connect(database).put_winner(examples.winner())
    monkeypatch.setattr(schema, "SCHEMA_VERSION", 2)
    monkeypatch.setitem(schema.UPGRADES, 1, add_column)
    assert Store.connect(database).winners(examples.problem()) == {"forward": examples.winner()}
    monkeypatch.undo()
    with pytest.raises(UnknownSchema):
        Store.connect(database)
