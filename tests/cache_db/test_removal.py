"""What is deleted here is deleted on the server too, short of what it needs; and no deletion lets anything run that was barred."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import store_examples as examples

from cache_db import delivery, removal
from cache_db.address import Address
from cache_db.batch import Batch, Shared
from cache_db.errors import CacheError
from cache_db.models import Trial, Verdict, Winner
from cache_db.store import Store
from flashbias.cli.main import main
from flashbias.settings import settings

SAFE, BAD = examples.trial(16), examples.trial(32, Verdict.WRONG, level=0)
PROOF = examples.verification(16, created_at=5000.0)
RACY = examples.verification(16, verdict=Verdict.RACY, level=0, created_at=6000.0)
LIFT = examples.lift(32)
WON = examples.winner(16, proven_with={})
BEHIND = examples.winner(64, kernel="backward", proven_with={"forward": examples.config(16).hash})


def names(*rows: Shared) -> set[str]:
    """Returns what tells these rows from others."""
    return {removal.name(row) for row in rows}


@pytest.mark.parametrize(
    ("known", "wanted", "gone"),
    [
        ([SAFE, PROOF], [SAFE], [SAFE]),
        ([SAFE, RACY], [SAFE], []),
        ([SAFE, PROOF, RACY], [SAFE, RACY], []),
        ([SAFE, RACY], [SAFE, RACY], [SAFE, RACY]),
        ([BAD, LIFT], [BAD], [BAD, LIFT]),
        ([BAD, LIFT], [LIFT], []),
        ([SAFE, WON], [SAFE], []),
        ([SAFE, WON], [SAFE, WON], [SAFE, WON]),
        ([SAFE, WON, BEHIND], [SAFE, WON], []),
        ([SAFE, BEHIND], [SAFE], []),
        ([SAFE.model_copy(update={"created_at": 7000.0})], [SAFE], []),
        ([], [SAFE, WON], []),
    ],
)
def test_nothing_goes_that_another_row_rests_on(known: list[Shared], wanted: list[Shared], gone: list[Shared]) -> None:
    """A proof alone may go, a failure only with all that was judged of its config, winners together or not at all."""
    assert names(*removal.removable(Batch.of(known), names(*wanted))) == names(*gone)


def test_a_deletion_is_owed_and_lands(database: Address, tmp_path: Path) -> None:
    """The server loses the very rows that the user's database lost, once; one it has anew, or needs, stays."""
    store = Store.open(tmp_path / "flashbias.db").owing(database.target)
    server = Store.connect(database)
    other = examples.trial(64, at=examples.problem(fields={"head_dim": 32}))
    for each in (SAFE, BAD, other):
        store.add_trial(each)
    delivery.send_now(store.path, database, 30.0)
    assert len(server.find(Trial)) == 3
    server.add_verification(RACY)
    server.merge(Batch.of([other.model_copy(update={"created_at": 9000.0})]))
    assert store.remove([SAFE, BAD, other]) == 3
    assert len(store.debts(database.target, 10)) == 3
    delivery.send_now(store.path, database, 30.0)
    assert {row.config for row in server.find(Trial)} == {SAFE.config, other.config}
    assert store.debts(database.target, 10) == []


def test_a_row_that_is_stored_again_is_not_deleted_later(database: Address, tmp_path: Path) -> None:
    """The last word counts: what was removed and then imported again is on the server; and the other way round."""
    store = Store.open(tmp_path / "flashbias.db").owing(database.target)
    for _ in range(2):
        store.add_trial(SAFE)
        assert store.remove([SAFE]) == 1
    store.merge(Batch.of([SAFE]), owing=True)
    assert [debt.kind for debt in store.debts(database.target, 10)] == ["trial"]
    store.put_winner(WON)
    store.remove([WON])
    delivery.send_now(store.path, database, 30.0)
    server = Store.connect(database)
    assert (server.find(Trial), server.find(Winner)) == ([SAFE], [])


def test_a_server_that_is_away_keeps_the_debt(tmp_path: Path) -> None:
    """What cannot be sent stays owed."""
    pytest.importorskip("psycopg", reason="no PostgreSQL: psycopg is not installed (pip install '.[dev]')")
    address = Address.parse("postgresql+psycopg://me@127.0.0.1:9/tuning")
    store = Store.open(tmp_path / "flashbias.db").owing(address.target)
    store.add_trial(SAFE)
    store.remove([SAFE])
    with pytest.raises(CacheError):
        delivery.send_now(store.path, address, 5.0)
    assert [debt.kind for debt in store.debts(address.target, 10)] == ["gone"]


def test_unproven_rows_displace_nothing_on_the_server(database: Address, tmp_path: Path) -> None:
    """What was imported lands on the server at level 0, and neither a proof nor a bar there gives way to it."""
    server = Store.connect(database)
    for row in (SAFE, examples.trial(32, Verdict.CRASHED, level=0)):
        server.add_trial(row)
    server.put_winner(WON)
    store = Store.open(tmp_path / "flashbias.db").owing(database.target)
    rows: list[Shared] = [examples.trial(block, level=0, created_at=9000.0) for block in (16, 32, 64)]
    rows.append(WON.model_copy(update={"level": 0, "ms": 0.0001}))
    store.merge(Batch.of(rows), owing=True)
    delivery.send_now(store.path, database, 30.0)
    found = {row.config: (row.verdict, row.level) for row in server.find(Trial)}
    assert found == {
        examples.config(16): (Verdict.SAFE, 2),
        examples.config(32): (Verdict.CRASHED, 0),
        examples.config(64): (Verdict.SAFE, 0),
    }
    assert server.find(Winner) == [WON]


def test_the_commands_tell_layers_apart_and_prune_both(
    database: Address, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``show`` says which database has which winner and which counts; ``prune`` deletes here and on the server."""
    store = Store.open(tmp_path / "flashbias.db").owing(database.target)
    for each in (SAFE, BAD):
        store.add_trial(each)
    store.put_winner(WON)
    delivery.send_now(store.path, database, 30.0)
    server, better = Store.connect(database), examples.winner(64, level=3)
    server.put_winner(better, replace=True)
    where = ["--cache-dir", str(tmp_path)]
    with settings(db_url=database, db_seconds=30.0):
        assert main(["cache", "show", WON.problem.hash, "--json", *where]) == 0
        found = json.loads(capsys.readouterr().out)["origins"]
        assert [(each["layer"], each["config_hash"], each["counts"]) for each in found] == [
            ("shared", better.config.hash, True),
            ("user", WON.config.hash, False),
        ]
        server.remove([better])
        assert main(["cache", "prune", "--older-than", "1d", *where]) == 0
    assert (store.find(Trial), store.find(Winner)) == ([BAD], [])
    assert server.find(Trial) == [BAD]
    assert store.debts(database.target, 10) == []
