"""What only the shared database can promise: its address keeps its secret, its schema, its accounts, its contents."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

import pytest
import store_examples as examples
from sqlalchemy import make_url, text

from cache_db import open_layers
from cache_db.address import Address
from cache_db.errors import BadAddress, CacheError, Forbidden, Unavailable, UnknownSchema
from cache_db.models import Verdict, Winner
from cache_db.store import Store

if TYPE_CHECKING:
    from postgres import Cluster

CHILD = Path(__file__).with_name("store_child.py")
psycopg = pytest.importorskip("psycopg", reason="no PostgreSQL: psycopg is not installed (pip install '.[dev]')")


def _execute(database: Address, statement: str) -> None:
    with Store.connect(database)._writing() as connection:
        connection.execute(text(statement))


@pytest.mark.parametrize(
    "secret", ["plain", "with%2Fslash", "p%40ss%3Aw", "perc%25ent", "spa+ce", "na%C3%AFve", "'quoted'"]
)
def test_address_never_shows_its_password(secret: str) -> None:
    """Neither as text nor in its repr, nor what a driver repeats of it, quoted or not; what it was made of is kept."""
    address = Address.parse(f"postgresql://me:{secret}@host:5433/tuning?sslpassword=other&password=query")
    assert str(address) == "postgresql+psycopg://me@host:5433/tuning"
    assert repr(address) == "Address('postgresql+psycopg://me@host:5433/tuning')"
    for word in (*address.secrets, secret):
        assert word not in address.clean(f"driver: no entry for {word} in\nfile")
        assert word not in f"{address} {address!r} {address.target}"
    assert make_url(address.url).password == unquote(secret)


def test_address_of_one_database_is_the_same_for_every_account() -> None:
    """What is owed to a database is owed whoever asks; another database, host or schema is another."""
    assert Address.parse("postgresql://me:x@host/tuning") == Address.parse("postgresql+psycopg://me:x@host/tuning")
    base = Address.parse("postgresql+psycopg://me:x@host/tuning").target
    assert Address.parse("postgresql://you:y@host/tuning").target == base
    for other in ("me:x@host2/tuning", "me:x@host/other", "me:x@host/tuning?options=-csearch_path%3Da"):
        assert Address.parse(f"postgresql://{other}").target != base


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "host/db",
        "sqlite:///x-s3cret.db",
        "mysql://a:s3cret@h/d",
        "postgresql://a:s3cret/d",
        "postgresql+pg8000://h",
    ],
)
def test_what_is_no_address_is_refused_without_repeating_it(wrong: str) -> None:
    """The error says what was expected; what came may hold a password."""
    with pytest.raises(BadAddress, match=r"expected postgresql\+psycopg://user@host:5432/database") as caught:
        Address.parse(wrong)
    assert "s3cret" not in "".join(traceback.format_exception(caught.value))


def test_no_fault_of_a_server_tells_the_password(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    """Wrong passwords, hosts, databases and options: no warning, no error and no traceback shows the password."""
    caplog.set_level(logging.DEBUG)
    good = cluster.url()
    wrong = "n0t-the-r1ght-one"
    addresses = [
        good.replace("s3cr3t%3Apa%25ss", wrong),
        good.replace("s3cr3t%3Apa%25ss", wrong).replace("/postgres", "/nothing"),
        good.replace("s3cr3t%3Apa%25ss", wrong).replace("127.0.0.1", "host.invalid"),
        f"{good}?password={wrong}",
        f"{good}?sslmode=nonsense&sslpassword={wrong}",
        f"{good}?nonsense=1",
    ]
    for each in addresses:
        address = Address.parse(each)
        with pytest.raises(CacheError) as caught:
            Store.connect(address).counts()
        shown = "".join(traceback.format_exception(caught.value)) + repr(Store) + repr(address)
        layers = open_layers(None, address)
        layers.add_trial(examples.trial())
        layers.close()
        shown += caplog.text
        assert wrong not in shown
        assert "s3cr3t" not in shown
        assert str(address) in caplog.text


def test_threads_creating_the_schema_at_once_all_succeed(database: Address) -> None:
    """An advisory lock lets one make it while the others wait; there is one meta row."""
    with ThreadPoolExecutor(12) as pool:
        stores = list(pool.map(lambda _: Store.connect(database), range(24)))
    assert all(store.counts()["trials"] == 0 for store in stores)
    with stores[0]._reading() as connection:
        assert connection.execute(text("SELECT count(*) FROM flashbias_meta")).scalar_one() == 1


def test_newer_schema_is_left_alone_with_one_warning(
    database: Address, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that a newer library laid out is neither read nor written; the user's database goes on."""
    _execute(database, "UPDATE flashbias_meta SET schema_version = 7")
    with pytest.raises(UnknownSchema, match="its schema version is 7, this library understands 1"):
        Store.connect(database)
    layers = open_layers(tmp_path, database)
    layers.add_trial(examples.trial())
    layers.put_winner(examples.winner())
    assert layers.winners(examples.problem()) == {"forward": examples.winner()}
    (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "upgrade flashbias" in warning.getMessage()
    layers.close()


def test_texts_with_what_postgresql_cannot_hold_are_stored(database: Address) -> None:
    """A compiler's words may hold a NUL: it is replaced, and no result is lost for it."""
    store = Store.connect(database)
    store.add_trial(examples.trial(reason="bad \0 byte: naïve ü 漢"))
    assert store.trials(examples.problem())[0].reason == "bad \ufffd byte: naïve ü 漢"


def test_damaged_lease_of_the_server_binds_nobody(database: Address) -> None:
    """A lease that cannot be read is written over by the next to claim it, and by one only."""
    store = Store.connect(database)
    assert store.claim("p" * 64, "old", "host", 60.0) is not None
    _execute(database, "UPDATE flashbias_leases SET acquired_at = 'NaN', expires_at = extract(epoch from now()) + 60")
    taken = [store.claim("p" * 64, owner, "host", 60.0) for owner in ("me", "you")]
    assert taken[0] is not None
    assert taken[1] is None


def test_server_tells_the_time_of_leases(database: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts whose clocks are a day apart agree on who holds a lease."""
    store = Store.connect(database)
    lease = store.claim("p" * 64, "me", "host", 60.0)
    monkeypatch.setattr("time.time", lambda: 4e9)
    assert store.claim("p" * 64, "you", "host", 60.0) is None
    assert store.holder("p" * 64) == lease


def test_transactions_leave_nothing_in_a_session(database: Address) -> None:
    """PgBouncer gives the next transaction another session: limits end with theirs, and no statement is prepared."""
    store = Store.connect(database)
    connection = store._reader.connect()
    for _ in range(8):  # psycopg would prepare after the fifth
        connection.execute(text("SELECT count(*) FROM flashbias_trials"))
    limit = connection.execute(text("SHOW statement_timeout")).scalar_one()
    prepared = connection.execute(text("SELECT count(*) FROM pg_prepared_statements")).scalar_one()
    connection.rollback()
    raw = connection.connection.dbapi_connection
    assert raw is not None
    after = raw.execute("SHOW statement_timeout").fetchone()[0]
    connection.close()
    assert (limit, prepared, after) == ("10s", 0, "0")


def test_account_that_may_only_read_reads_and_keeps_its_own(
    own: Address, cluster: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """SELECT is enough: the server's rows are used, new ones stay with the user, all for one warning."""
    Store.connect(own).put_winner(examples.winner(16))
    schema = own.url.rpartition("%3D")[2]
    cluster.execute(
        f"CREATE ROLE {schema}_r LOGIN PASSWORD 's3cr3t:pa%ss'; GRANT USAGE ON SCHEMA {schema} TO {schema}_r; "
        f"GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO {schema}_r"
    )
    reader = Address.parse(cluster.url(user=f"{schema}_r", schema=schema))
    layers = open_layers(tmp_path, reader)
    at = examples.problem(layout="strided")
    for block in (1, 2):
        layers.add_trial(examples.trial(block, at=at))
    assert layers.put_winner(examples.winner(32, at=at)) == examples.winner(32, at=at)
    assert layers.claim(at.hash, "me", "host", 60.0) is not None
    assert layers.winners(examples.problem()) == {"forward": examples.winner(16)}
    assert (layers.server, layers.reachable) == ("read-only", True)
    (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "permission denied" in warning.getMessage()
    with pytest.raises(Forbidden):
        Store.connect(reader).add_trial(examples.trial())
    assert Store.connect(own).counts()["trials"] == 0
    layers.close()
    cluster.execute(f"DROP OWNED BY {schema}_r; DROP ROLE {schema}_r")


def test_account_without_schema_is_told_who_makes_it(own: Address, cluster: Cluster) -> None:
    """Where the schema is missing and may not be made, the error names the command."""
    schema = own.url.rpartition("%3D")[2]
    cluster.execute(
        f"CREATE ROLE {schema}_n LOGIN PASSWORD 's3cr3t:pa%ss'; GRANT USAGE ON SCHEMA {schema} TO {schema}_n"
    )
    with pytest.raises(Unavailable, match="flashbias cache init"):
        Store.connect(Address.parse(cluster.url(user=f"{schema}_n", schema=schema)))
    cluster.execute(f"DROP OWNED BY {schema}_n; DROP ROLE {schema}_n")


def test_rows_are_the_same_in_both_engines(database: Address, tmp_path: Path) -> None:
    """Column by column, what one engine stores the other does."""
    stores = (Store.open(tmp_path / "flashbias.db"), Store.connect(database))
    for store in stores:
        store.add_trial(examples.trial(figures={"error": float("inf"), "ms": 0.1, "nan": float("nan")}, seed=-(2**63)))
        store.put_winner(examples.winner(ms=1e-300))
        store.add_verification(examples.verification(reason="naïve"))
    for table in ("trials", "winners", "verifications"):
        found = []
        for store in stores:
            with store._reading() as connection:
                found.append(dict(connection.execute(text(f"SELECT * FROM flashbias_{table}")).mappings().one()))
        assert found[0] == found[1]


def test_one_process_learns_what_another_found(database: Address, tmp_path: Path) -> None:
    """What one user's process stores another's reads, and keeps: it is there when the server is not."""
    mine, yours = open_layers(tmp_path / "me", database), open_layers(tmp_path / "you", database)
    mine.add_trial(examples.trial(16))
    mine.add_verification(examples.verification(16))
    mine.add_lift(examples.lift(16))
    mine.put_winner(examples.winner(16))
    assert yours.winners(examples.problem()) == {"forward": examples.winner(16)}
    alone = open_layers(tmp_path / "you")
    assert alone.winners(examples.problem()) == {"forward": examples.winner(16)}
    assert alone.trials(examples.problem()) == [examples.trial(16)]
    assert alone.verifications(examples.problem()) == [examples.verification(16)]
    assert alone.lifts(examples.problem()) == [examples.lift(16)]
    assert open_layers(tmp_path / "me", database)._local.debts(10) == []


def test_hit_asks_the_server_once_a_day(database: Address, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Next week's job costs the server one question for each problem, tomorrow's process none, and a claim one more."""
    asked: list[str] = []
    everything = Store.everything
    monkeypatch.setattr(Store, "everything", lambda store, at: asked.append(at.hash) or everything(store, at))
    at = examples.problem()
    open_layers(tmp_path, database).put_winner(examples.winner())
    for _ in range(3):
        layers = open_layers(tmp_path, database)
        assert layers.winners(at)
        assert layers.trials(at) == layers.verifications(at) == []
    assert len(asked) == 1
    layers.claim(at.hash, "me", "host", 60.0)
    assert layers.winners(at)
    assert len(asked) == 2
    monkeypatch.setattr("cache_db.layers.FRESH_SECONDS", 0.0)
    assert open_layers(tmp_path, database).winners(at)
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("changes", "wins"),
    [({"level": 3, "ms": 9.0}, True), ({"ms": 0.1}, True), ({"ms": 0.2}, False), ({"level": 1, "ms": 0.01}, False)],
)
def test_more_proof_wins_then_speed(database: Address, tmp_path: Path, changes: dict[str, float], wins: bool) -> None:
    """Of two layers' winners of a key the better proven counts, of equals the faster; both can be seen."""
    own, other = examples.winner(16), examples.winner(32, **changes)
    open_layers(tmp_path).put_winner(own)
    Store.connect(database).put_winner(other)
    layers = open_layers(tmp_path, database)
    expected = other if wins else own
    assert layers.winners(examples.problem()) == {"forward": expected}
    found = {origin.layer: (origin.winner, origin.counts) for origin in layers.origins(examples.problem())}
    assert found == {"user": (expected, True), "shared": (other, wins)}


def test_winner_found_unsafe_elsewhere_gives_way_to_the_server_s(database: Address, tmp_path: Path) -> None:
    """A fast winner that another node proved racy does not outlive its replacement; nor does it come back from there."""
    fast, slow = examples.winner(16, ms=0.1), examples.winner(32, ms=0.2)
    proof = examples.verification(16, verdict=Verdict.RACY, created_at=5000.0)
    open_layers(tmp_path / "a").put_winner(fast)
    server = Store.connect(database)
    server.put_winner(slow)
    server.add_verification(proof)
    assert open_layers(tmp_path / "a", database).winners(examples.problem()) == {"forward": slow}
    server.put_winner(fast, replace=True)
    open_layers(tmp_path / "b").put_winner(slow)
    assert open_layers(tmp_path / "b", database).winners(examples.problem()) == {"forward": slow}


def test_neighbours_and_nearest_come_from_both_layers(database: Address, tmp_path: Path) -> None:
    """A problem that only the cluster knows is a neighbour too, and stays one without the server."""
    near, far = examples.problem(fields={"seqlen_q": 512}), examples.problem(fields={"seqlen_q": 8192})
    Store.connect(database).put_winner(examples.winner(at=near))
    layers = open_layers(tmp_path, database)
    layers._local.put_winner(examples.winner(at=far))
    assert set(layers.nearest(examples.problem())) == {near, far}
    groups = layers.neighbours(examples.problem(), examples.SOFT)
    assert [group["forward"].problem for group in groups] == [near, far]
    assert open_layers(tmp_path).neighbours(examples.problem(), examples.SOFT) == groups


def test_pins_stay_with_their_user(database: Address, tmp_path: Path) -> None:
    """A pin is one user's wish: it runs nobody else's training."""
    open_layers(tmp_path, database).put_pin(examples.pin())
    assert Store.connect(database).counts()["pins"] == 0
    assert open_layers(tmp_path, database).pins(examples.problem()) == {"forward": examples.pin()}


def test_lease_is_the_servers_for_all_users(database: Address, tmp_path: Path) -> None:
    """Two users on two nodes do not sweep the same problem at once; a damaged row between them is no other."""
    mine, yours = open_layers(tmp_path / "me", database), open_layers(tmp_path / "you", database)
    lease = mine.claim("p" * 64, "me", "one", 60.0)
    assert lease is not None
    assert yours.claim("p" * 64, "you", "two", 60.0) is None
    assert yours.holder("p" * 64) == lease
    mine.release(lease)
    assert yours.claim("p" * 64, "you", "two", 60.0) is not None
    assert Store.open(tmp_path / "me" / "flashbias.db").counts()["leases"] == 0


def test_each_key_is_swept_by_one_of_three_processes(database: Address, tmp_path: Path) -> None:
    """Processes with databases of their own, as on three nodes, sweep each key once between them."""
    processes = [
        subprocess.Popen(
            [sys.executable, CHILD, "sweep", tmp_path / f"node-{owner}", f"owner-{owner}", "0.02", "60"],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(CHILD.parents[2]), "STORE_CHILD_URL": database.url},
        )
        for owner in range(3)
    ]
    lines = sorted(line for process in processes for line in process.communicate(timeout=100)[0].splitlines())
    assert all(process.returncode == 0 for process in processes)
    assert lines == sorted(f"{step} {key}" for key in range(6) for step in ("begin", "end"))
    kernels = [winner.kernel for winner in Store.connect(database).find(Winner)]
    assert len(kernels) == 6
