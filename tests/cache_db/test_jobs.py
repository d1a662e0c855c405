"""What the ranks of a job agree on in a database: the first row stays, on either engine, and no server means no answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import store_examples as examples
from sqlalchemy import text

from cache_db import Agreement, Layers, open_layers
from cache_db.address import Address
from cache_db.jobs import LONGEST_JOB
from cache_db.store import Store

Opened = Callable[[], Store]


def agreement(configs: str = "{}", job_id: str = "run 7#0/all", key: str = "p", at: float = 1000.0) -> Agreement:
    """Returns what one rank proposes, at a time by its own clock."""
    return Agreement(job_id=job_id, problem_hash=key * 64, configs=configs, host="node-1", created_at=at)


def said(found: Agreement | None) -> str:
    """Returns what stands in a row."""
    assert found is not None
    return found.configs


@pytest.fixture(params=["sqlite", "postgresql"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Opened:
    """Returns what opens one and the same database, as another process would."""
    if request.param == "sqlite":
        return lambda: Store.open(tmp_path / "flashbias.db")
    address: Address = request.getfixturevalue("database")
    return lambda: Store.connect(address)


class TestAgreement:
    """What both engines promise."""

    def test_first_stays_and_everybody_reads_it(self, opened: Opened) -> None:
        """A later proposal changes nothing and its author is told; other problems and jobs are others."""
        first, second = opened(), opened()
        assert first.agreed("run 7#0/all", "p" * 64) is None
        assert said(first.agree(agreement("one"))) == "one"
        assert said(second.agree(agreement("two", at=2000.0))) == "one"
        assert said(second.agreed("run 7#0/all", "p" * 64)) == "one"
        for other in (agreement("two", key="q"), agreement("two", job_id="run 7#1/all")):
            assert said(second.agree(other)) == "two"
        assert first.counts()["jobs"] == 3

    def test_one_of_many_at_once(self, opened: Opened) -> None:
        """Of eight ranks that propose at the same time all hear the same."""
        stores = [opened() for _ in range(8)]
        with ThreadPoolExecutor(8) as pool:
            heard = list(pool.map(lambda rank: stores[rank].agree(agreement(str(rank))), range(8)))
        assert len({each.configs for each in heard if each}) == 1
        assert None not in heard

    def test_jobs_that_are_long_over_are_deleted(self, opened: Opened) -> None:
        """A new agreement sweeps out those that no job can still be using, and no others."""
        store = opened()
        for name, age in (("old", LONGEST_JOB + 60), ("young", LONGEST_JOB - 60)):
            store.agree(agreement(name, job_id=name))
            with store._writing() as connection:
                aged = text("UPDATE flashbias_jobs SET created_at = created_at - :age WHERE job_id = :name")
                connection.execute(aged, {"age": age, "name": name})
        store.agree(agreement("new", job_id="new"))
        assert store.agreed("old", "p" * 64) is None
        assert store.counts()["jobs"] == 2

    def test_no_clock_but_the_database_says_what_is_over(self, opened: Opened) -> None:
        """A host years ahead deletes nobody's agreement, and one that has lost its clock has its own not deleted."""
        store = opened()
        store.agree(agreement("one", at=0.0))
        store.agree(agreement("other", job_id="other", at=time.time() + 10 * LONGEST_JOB))
        assert said(store.agree(agreement("two", at=time.time()))) == "one"

    def test_a_row_that_cannot_be_read_is_no_agreement(self, opened: Opened, caplog: pytest.LogCaptureFixture) -> None:
        """It stays, since other ranks may go by it, and the reader is told."""
        store = opened()
        store.agree(agreement("one"))
        with store._writing() as connection:
            connection.execute(text("UPDATE flashbias_jobs SET created_at = :value"), {"value": 1e400})
        assert store.agreed("run 7#0/all", "p" * 64) is None
        assert store.agree(agreement("two")) is None
        assert "cannot be read" in caplog.text


def test_layers_agree_in_the_file_they_share(tmp_path: Path) -> None:
    """Without a server the file is the place; what was never agreed on there is known to be nothing."""
    first, second = open_layers(tmp_path), open_layers(tmp_path)
    assert first.agreed("run 7#0/all", "p" * 64) == (None,)
    assert said(first.agree(agreement("one"))) == "one"
    assert said(second.agree(agreement("two"))) == "one"
    assert second.agreed("run 7#0/all", "p" * 64) == (first.agree(agreement("one")),)


def test_memory_is_no_place_to_agree() -> None:
    """What no other process sees cannot be agreed on."""
    layers = open_layers(None)
    assert layers.agree(agreement()) is None
    assert layers.agreed("run 7#0/all", "p" * 64) is None


def test_server_decides_and_never_the_file_in_its_place(tmp_path: Path, database: Address) -> None:
    """With a server named the users' own files are not asked: another rank's may be another."""
    first, second = (open_layers(tmp_path / name, database, 30.0) for name in "ab")
    assert said(first.agree(agreement("one"))) == "one"
    assert said(second.agree(agreement("two"))) == "one"
    assert second.agreed("run 7#0/all", "p" * 64) == (first.agree(agreement("one")),)
    assert open_layers(tmp_path / "a").agreed("run 7#0/all", "p" * 64) == (None,)


def test_server_that_is_away_knows_nothing(tmp_path: Path) -> None:
    """A refused connection is neither an agreement nor its absence."""
    pytest.importorskip("psycopg")
    layers = Layers(tmp_path / "flashbias.db", Address.parse("postgresql://me@127.0.0.1:1/none"), 0.5)
    assert layers.agreed("run 7#0/all", "p" * 64) is None
    assert layers.agree(agreement()) is None
    layers.close()


def test_knowledge_is_renewed_on_request(tmp_path: Path, database: Address) -> None:
    """After ``renew_knowledge`` the server is asked again about a problem that was looked up a moment ago."""
    reader, writer = (open_layers(tmp_path / name, database, 30.0) for name in "ab")
    slow = examples.winner(16, ms=2.0)
    writer.put_winner(slow)
    assert reader.winners(slow.problem) == {"forward": slow}
    fast = examples.winner(32, ms=1.0, created_at=3000.0)
    writer.put_winner(fast, replace=True)
    assert reader.winners(slow.problem) == {"forward": slow}
    reader.renew_knowledge()
    assert reader.winners(slow.problem) == {"forward": fast}
