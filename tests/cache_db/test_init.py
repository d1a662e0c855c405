"""``flashbias cache init``: the tables are made once, by whom may, and the password stays unsaid."""

from __future__ import annotations

import pytest
import store_examples as examples

from cache_db.address import Address
from cache_db.store import Store
from flashbias.cli.main import main
from flashbias.settings import reread


def test_tables_are_made_once(database: Address, capsys: pytest.CaptureFixture[str]) -> None:
    """The first call makes them, the second leaves them and counts what there is; neither shows the password."""
    assert main(["cache", "init", database.url]) == 0
    assert capsys.readouterr().out == f"{database} is ready: no rows yet\n"
    Store.connect(database).add_trial(examples.trial())
    assert main(["cache", "init", database.url]) == 0
    assert capsys.readouterr().out == f"{database} is ready: 1 trials\n"


def test_the_settings_name_the_database_too(
    database: Address, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without an argument, the variable says where: it is not seen in a list of processes."""
    monkeypatch.setenv("FLASHBIAS_DB_URL", database.url)
    reread()
    assert main(["cache", "init"]) == 0
    monkeypatch.undo()
    reread()
    assert "is ready" in capsys.readouterr().out
    assert main(["cache", "init"]) == 2
    assert "set FLASHBIAS_DB_URL" in capsys.readouterr().err


def test_what_is_wrong_is_said_without_the_password(capsys: pytest.CaptureFixture[str]) -> None:
    """A malformed address is wrong usage, a server that is not there a failure; neither repeats a secret."""
    pytest.importorskip("psycopg", reason="no PostgreSQL: psycopg is not installed (pip install '.[dev]')")
    assert main(["cache", "init", "postgresql://me:s3cret/tuning"]) == 2
    assert main(["cache", "init", "postgresql://me:s3cret@127.0.0.1:9/tuning"]) == 1
    told = capsys.readouterr()
    assert "refused" in told.err
    assert "s3cret" not in told.err + told.out
