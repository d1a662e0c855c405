"""Servers that stop, stall, refuse and come back in the middle of the work: calls go on, and what was learned lands."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import store_examples as examples

from cache_db import Layers, deadline, open_layers
from cache_db.address import Address
from cache_db.errors import Busy, Unavailable
from cache_db.store import Store

if TYPE_CHECKING:
    from postgres import Cluster, Proxy

SECONDS = 1.0
PATIENT = 30.0
# Who waits for a server waits PATIENT; a call on a busy machine that does not wait is over long before.
UNAWAITED = PATIENT / 3
CHILD = Path(__file__).with_name("store_child.py")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the thread that waits for a server ask again soon."""
    monkeypatch.setattr("cache_db.remote.FIRST_PAUSE", 0.1)
    monkeypatch.setattr("cache_db.remote.LONGEST_PAUSE", 0.3)
    monkeypatch.setattr("cache_db.remote.COURIER_SECONDS", 2.0)


@pytest.fixture
def stalling(own: Address, cluster: Cluster, proxy: Proxy) -> Address:
    """The address of the schema ``own``, through the proxy."""
    return Address.parse(own.url.replace(f":{cluster.port}/", f":{proxy.port}/"))


@pytest.fixture
def layers(request: pytest.FixtureRequest, stalling: Address, tmp_path: Path) -> Iterator[Layers]:
    """Layers that have met their server, through the proxy, and wait SECONDS for it from now on."""
    found = open_layers(tmp_path / "cache", stalling, PATIENT)
    found.add_trial(examples.trial(1))
    _wait_for(found, SECONDS)
    yield found
    found.close()


def _wait_for(layers: Layers, seconds: float) -> None:
    """Has calls wait that long for the server; a busy machine must not look like a silent server to the rest of a test."""
    assert layers._remote is not None
    layers._remote._patience = seconds


def _until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come to pass"
        time.sleep(0.02)


def _work(layers: Layers, first: int) -> float:
    """Does what a sweep does, checks that all of it holds, and returns how long the slowest call took."""
    at, taken = examples.problem(fields={"first": first}), []

    def timed(action: Callable[[], object]) -> object:
        started = time.monotonic()
        found = action()
        taken.append(time.monotonic() - started)
        return found

    timed(lambda: layers.winners(at))
    lease = layers.claim(at.hash, "me", "host", 60.0)
    assert lease is not None
    for block in range(first, first + 3):
        timed(lambda block=block: layers.add_trial(examples.trial(block, at=at)))
    timed(lambda: layers.renew(lease, 60.0))
    timed(lambda: layers.put_winner(examples.winner(first, at=at)))
    timed(lambda: layers.release(lease))
    assert timed(lambda: layers.winners(at)) == {"forward": examples.winner(first, at=at)}
    assert len(layers.trials(at)) == 3
    return max(taken)


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_stalled_link_costs_one_short_wait(
    layers: Layers, own: Address, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    """A link that keeps every byte holds one call up for its time, the others not at all; what was done lands later."""
    proxy.stalled = True
    started = time.monotonic()
    layers.add_trial(examples.trial(2))
    assert SECONDS <= time.monotonic() - started < SECONDS + 0.5
    assert (layers.server, layers.reachable) == ("away", False)
    assert _work(layers, 100) < SECONDS / 2
    assert len(_warnings(caplog)) == 1
    assert "no answer within 1 s" in caplog.text
    proxy.stalled = False
    _until(lambda: layers.server == "ready" and not layers._local.debts(1))
    server = Store.connect(own)
    assert server.counts() | {"leases": 0} == {
        "trials": 5, "verifications": 0, "lifts": 0, "pins": 0, "winners": 1, "leases": 0, "jobs": 0,
    }  # fmt: skip
    _work(layers, 200)


def test_stall_in_the_middle_of_an_answer_ends_the_thread(layers: Layers, stalling: Address, proxy: Proxy) -> None:
    """Who waits leaves in time, and the thread that asked ends too: its socket is shut down under it."""
    inside = threading.Event()

    def action() -> None:
        with Store.connect(stalling)._reading() as connection:
            proxy.stalled = True
            inside.set()
            connection.exec_driver_sql("SELECT 1")

    before = set(threading.enumerate())
    with pytest.raises(deadline.Overdue):
        deadline.within(0.5, action)
    assert inside.is_set()
    _until(lambda: not [each for each in set(threading.enumerate()) - before if each.name == "cache-db-call"], 5.0)
    proxy.stalled = False


def test_slow_server_costs_no_more_than_a_silent_one(
    layers: Layers, own: Address, caplog: pytest.LogCaptureFixture
) -> None:
    """Answers that each come in time, but late, are waited for no longer in all than one that does not come."""
    started = time.monotonic()
    for _ in range(20):
        layers._ask(lambda store: _sleep(store, 0.3))
    assert time.monotonic() - started < 2 * SECONDS + 0.5
    assert "slow answers took" in caplog.text
    _until(lambda: layers.server == "ready")


def test_later_outages_cost_less_and_less(layers: Layers, proxy: Proxy) -> None:
    """A server that comes and goes takes twice the first wait from a process at most, to a floor."""
    waits = []
    for number in range(2):
        proxy.stalled = True
        started = time.monotonic()
        layers.add_trial(examples.trial(10 + number))
        waits.append(time.monotonic() - started)
        proxy.stalled = False
        _until(lambda: layers.server == "ready" and not layers._local.debts(1))
    assert waits[1] < 0.75 * waits[0]


def test_stopped_server_costs_no_wait_and_gets_all_when_it_is_back(
    cluster: Cluster, own: Address, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A server stopped in mid-run is one warning; everything found meanwhile is on it soon after its restart."""
    layers = open_layers(tmp_path, own, PATIENT)
    _work(layers, 100)
    cluster.stop()
    try:
        assert _work(layers, 200) < UNAWAITED
    finally:
        cluster.start()
    _until(lambda: layers.server == "ready" and not layers._local.debts(1))
    assert len(_warnings(caplog)) == 1
    for first in (100, 200):
        at = examples.problem(fields={"first": first})
        assert Store.connect(own).winners(at) == {"forward": examples.winner(first, at=at)}
        assert len(Store.connect(own).trials(at)) == 3
    layers.close()


def test_what_is_owed_is_sent_by_a_later_process(own: Address, tmp_path: Path) -> None:
    """A process that ends, or is killed, before the server is back leaves its debts to the next one."""
    away = Address.parse(own.url.rpartition("@")[0] + "@127.0.0.1:9/postgres" + own.url.partition("/postgres")[2])
    owing = open_layers(tmp_path, away, SECONDS)
    _work(owing, 100)
    owing.close()
    # The same database as far as debts go: only its port has changed.
    owed = Store.open(tmp_path / "flashbias.db")
    with owed._writing() as connection:
        connection.exec_driver_sql(f"UPDATE flashbias_outbox SET target = '{own.target}'")
    later = open_layers(tmp_path, own, SECONDS)
    _until(lambda: not later._local.debts(1))
    counts = Store.connect(own).counts()
    assert (counts["trials"], counts["winners"]) == (3, 1)
    later.close()


def test_killed_process_loses_nothing_it_was_told_is_stored(own: Address, tmp_path: Path) -> None:
    """Killed at any moment, between the file and the server too: the next process sends what is missing."""
    process = subprocess.Popen(
        [sys.executable, CHILD, "write_layers", tmp_path, "0", "100000"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(CHILD.parents[2]), "STORE_CHILD_URL": own.url},
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    lines = process.communicate()[0].splitlines(keepends=True)
    acknowledged = {0} | {int(line) for line in lines if line.endswith("\n")}
    later = open_layers(tmp_path, own, SECONDS)
    _until(lambda: not later._local.debts(1))
    stored = {trial.config.params["BLOCK_M"] for trial in Store.connect(own).trials(examples.problem())}
    assert stored >= acknowledged
    assert len(acknowledged) > 1
    later.close()


def test_server_that_turns_read_only_is_read_and_later_written(
    cluster: Cluster, own: Address, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that takes no writes (a standby after a failover) still answers; what it refused lands when it takes them."""
    layers = open_layers(tmp_path, own, PATIENT)
    Store.connect(own).put_winner(examples.winner())
    cluster.execute("ALTER SYSTEM SET default_transaction_read_only = on")
    cluster.execute("SELECT pg_reload_conf()")
    try:
        _until(lambda: _is_read_only(own))
        assert _work(layers, 100) < UNAWAITED
        assert layers.winners(examples.problem()) == {"forward": examples.winner()}
        assert (layers.server, layers.reachable) == ("read-only", True)
        assert len(_warnings(caplog)) == 1
    finally:
        cluster.execute("ALTER SYSTEM RESET default_transaction_read_only")
        cluster.execute("SELECT pg_reload_conf()")
    _until(lambda: layers.server == "ready" and not layers._local.debts(1))
    assert Store.connect(own).counts()["trials"] == 3
    layers.close()


def _is_read_only(address: Address) -> bool:
    with Store.connect(address)._reading() as connection:
        return bool(connection.exec_driver_sql("SHOW default_transaction_read_only").scalar_one() == "on")


def test_server_that_was_never_there_costs_one_wait(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A name that leads nowhere, or to nobody, is one warning and the user's database."""
    layers = open_layers(tmp_path, Address.parse("postgresql://me:x@127.0.0.1:9/tuning"), SECONDS)
    assert layers.reachable is False
    started = time.monotonic()
    _work(layers, 100)
    assert time.monotonic() - started < SECONDS
    assert len(_warnings(caplog)) == 1
    layers.close()


def test_replaced_winner_lands_over_the_older_one(layers: Layers, own: Address, proxy: Proxy) -> None:
    """A winner that took another's place while the server was away takes it there as well, faster or not."""
    _wait_for(layers, PATIENT)
    layers.put_winner(examples.winner(16, ms=0.1))
    _wait_for(layers, SECONDS)
    proxy.stalled = True
    slower = examples.winner(32, ms=0.3, created_at=9000.0)
    assert layers.put_winner(slower, replace=True) == slower
    proxy.stalled = False
    _until(lambda: layers.server == "ready" and not layers._local.debts(1))
    assert Store.connect(own).winners(examples.problem()) == {"forward": slower}


def test_without_a_file_memory_owes(own: Address, cluster: Cluster, proxy: Proxy, stalling: Address) -> None:
    """Where the user's database cannot be written, this process remembers what the server lacks."""
    layers = open_layers(None, stalling, PATIENT)
    assert layers.reachable
    _wait_for(layers, SECONDS)
    proxy.stalled = True
    _work(layers, 100)
    proxy.stalled = False
    _until(lambda: layers.server == "ready" and not layers._local.debts(1))
    assert Store.connect(own).counts()["trials"] == 3
    layers.close()


def test_lease_outlives_a_short_outage(layers: Layers, own: Address, proxy: Proxy) -> None:
    """The lease a sweep holds is not given up while the server cannot be asked, and is lost only to a new owner."""
    lease = layers.claim("p" * 64, "me", "host", 60.0)
    assert lease is not None
    proxy.stalled = True
    assert layers.renew(lease, 60.0) == lease
    proxy.stalled = False
    _until(lambda: layers.reachable)
    _wait_for(layers, PATIENT)
    renewed = layers.renew(lease, 60.0)
    assert renewed is not None
    assert renewed.expires_at > lease.expires_at
    Store.connect(own).release(lease)
    assert layers.renew(renewed, 60.0) is None


def test_forked_child_has_a_connection_of_its_own(layers: Layers, own: Address, proxy: Proxy) -> None:
    """Forked in the middle of its parent's call, a child works with the same object, and the parent's call ends well."""
    _wait_for(layers, PATIENT)
    slow = threading.Thread(target=layers._ask, args=(lambda store: _sleep(store, 0.5),))
    slow.start()
    time.sleep(0.1)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(10)
            layers.add_trial(examples.trial(2))
            status = int(layers.server != "ready" or bool(layers._local.debts(1)))
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    slow.join()
    layers.add_trial(examples.trial(3))
    assert layers.server == "ready"
    stored = Store.connect(own).trials(examples.problem())
    assert [trial.config.params["BLOCK_M"] for trial in stored] == [1, 2, 3]


def _sleep(store: Store, seconds: float) -> None:
    with store._reading() as connection:
        connection.exec_driver_sql(f"SELECT pg_sleep({seconds})")


def test_too_many_clients_are_waited_for(cluster: Cluster, own: Address, tmp_path: Path) -> None:
    """With fewer connections than clients every call finds one in time, for each holds its own for milliseconds."""
    cluster.stop()
    cluster.start(max_connections=5, superuser_reserved_connections=0)
    try:
        several = [open_layers(tmp_path / str(number), own, 20.0) for number in range(10)]
        threads = [threading.Thread(target=_work, args=(each, 100 * n)) for n, each in enumerate(several)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [each.server for each in several] == ["ready"] * 10
        assert Store.connect(own).counts()["trials"] == 30
    finally:
        cluster.stop()
        cluster.start()


def test_busy_call_is_repeated_within_its_time() -> None:
    """A call that finds no room is made again until its time is over, and then fails for that reason."""
    calls: list[float] = []

    def busy() -> None:
        calls.append(time.monotonic())
        raise Busy("no room")

    started = time.monotonic()
    with pytest.raises(Busy):
        deadline.within(0.3, busy)
    assert time.monotonic() - started < 0.5
    assert len(calls) > 2


def test_process_without_threads_to_spare_goes_on(
    layers: Layers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where no thread can be started, the server is away, and nothing fails."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(Unavailable, match="no thread"):
        deadline.within(1.0, lambda: None)
    layers.add_trial(examples.trial(2))
    assert len(layers.trials(examples.problem())) == 2
    assert "no thread for a call" in caplog.text
