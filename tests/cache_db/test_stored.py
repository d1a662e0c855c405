"""Databases of every schema version that was ever released open with today's library, with every row."""

from __future__ import annotations

import io
import shutil
import sqlite3
from pathlib import Path

import pytest
import store_examples as examples

from cache_db import open_layers, packs, schema
from cache_db.models import Pin
from cache_db.store import Store

STORED = sorted((Path(__file__).parent / "stored").glob("schema-*.sqlite"))


def lines(store: Store) -> list[str]:
    """Returns all rows of ``store`` as a pack has them."""
    stream = io.StringIO()
    packs.write(store.by_problem(), stream)
    return stream.getvalue().splitlines()[1:]


def test_there_is_one_of_todays_schema() -> None:
    """A new schema version comes with a stored database of it, made by make_stored.py."""
    assert f"schema-{schema.SCHEMA_VERSION}.sqlite" in [path.name for path in STORED]


@pytest.mark.parametrize("younger", ["with", "without"])
@pytest.mark.parametrize("stored", STORED, ids=lambda path: path.stem)
def test_stored_database_opens_with_every_row(
    stored: Path, younger: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows are what they were, in a file with or without the tables that came later; nothing is warned about."""
    path = tmp_path / "flashbias.db"
    shutil.copyfile(stored, path)
    expected = stored.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()[1:]
    if younger == "without":
        with sqlite3.connect(path) as connection:
            for table in schema.YOUNGER_TABLES:
                connection.execute(f"DROP TABLE {table.name}")
        connection.close()
        expected = [line for line in expected if not line.startswith('{"kind": "lift"')]
    store = Store.open(path)
    assert lines(store) == expected
    assert len(expected) > 8
    assert store.find(Pin) == ([examples.pin()] if younger == "with" else [])
    assert caplog.records == []


@pytest.mark.parametrize("stored", STORED, ids=lambda path: path.stem)
def test_stored_database_can_be_worked_with(stored: Path, tmp_path: Path) -> None:
    """What is added to it is there with what it had."""
    shutil.copyfile(stored, tmp_path / "flashbias.db")
    layers = open_layers(tmp_path)
    before = layers.counts()
    at = examples.problem(fields={"head_dim": 256})
    layers.add_trial(examples.trial(at=at))
    layers.add_verification(examples.verification(problem=at))
    layers.add_lift(examples.lift(at=at))
    layers.put_pin(examples.pin(at=at))
    layers.put_winner(examples.winner(at=at))
    assert layers.claim(at.hash, "me", "host", 60.0) is not None
    after = layers.counts()
    assert {name for name in after if after[name] == before[name] + 1} == set(after) - {"jobs"}
    assert layers.winners(examples.problem()) == {"forward": examples.winner()}
