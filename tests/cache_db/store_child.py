"""What the tests of several processes run in them: ``python store_child.py ACTION DIRECTORY [ARGUMENT ...]``."""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import store_examples as examples

from cache_db import Layers, open_layers
from cache_db.address import Address
from cache_db.models import Lease, Problem
from cache_db.store import Store

KEYS = 6


def _say(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def _address() -> Address | None:
    """Returns the shared database that the test names, if any."""
    url = os.environ.get("STORE_CHILD_URL")
    return Address.parse(url) if url else None


def write(directory: Path, first: str, count: str) -> None:
    """Adds ``count`` trials and names each once it is acknowledged."""
    store = Store.open(directory / "flashbias.db")
    for block in range(int(first), int(first) + int(count)):
        store.add_trial(examples.trial(block))
        _say(block)


def write_layers(directory: Path, first: str, count: str) -> None:
    """As ``write``, through layers."""
    layers = open_layers(directory, _address(), 30.0)
    for block in range(int(first), int(first) + int(count)):
        layers.add_trial(examples.trial(block))
        _say(block)


def modify(directory: Path, owner: str, count: str) -> None:
    """Reads, changes and writes back one of twenty keys' winners, ``count`` times, and adds a trial each time."""
    store = _store(directory)
    _wait(directory)
    for number in range(int(count)):
        at = examples.problem(fields={"key": number % 20})
        before = store.winners(at).get("forward", examples.winner(at=at, tried=0))
        store.put_winner(before.model_copy(update={"tried": before.tried + 1}), replace=True)
        store.add_trial(examples.trial(1000 * int(owner) + number, at=at))
        _say(number)


def create(directory: Path) -> None:
    """Makes the schema, at the same moment as others."""
    _wait(directory)
    _say(_store(directory).counts()["trials"])


def work(directory: Path, owner: str, count: str) -> None:
    """Sweeps problems of its own through layers with a file of its own; says how long the slowest call took."""
    layers = open_layers(directory / f"node-{owner}", _address())
    _wait(directory)
    waits = [
        wait
        for number in range(int(count))
        for wait in _waits(layers, examples.problem(fields={"owner": int(owner), "number": number}), owner)
    ]
    _say(f"{max(waits):.2f}", layers.server)
    while layers._local.debts(1):
        time.sleep(0.2)


def _waits(layers: Layers, at: Problem, owner: str) -> Iterator[float]:
    """Does what a sweep of ``at`` does; yields the seconds of each call."""
    for call in (
        lambda: layers.winners(at),
        lambda: layers.claim(at.hash, owner, "host", 60.0),
        *(lambda block=block: layers.add_trial(examples.trial(block, at=at)) for block in range(5)),
        lambda: layers.put_winner(examples.winner(at=at)),
    ):
        started = time.monotonic()
        call()
        yield time.monotonic() - started


def _store(directory: Path) -> Store:
    address = _address()
    return Store.open(directory / "flashbias.db") if address is None else Store.connect(address)


def _wait(directory: Path) -> None:
    """Waits for the others: the test makes the file ``go`` when all have started."""
    (directory / f"ready-{os.getpid()}").touch()
    while not (directory / "go").exists():
        time.sleep(0.005)


def sweep(directory: Path, owner: str, hold: str, seconds: str) -> None:
    """Sweeps every key once in the whole test, by the rules of a call: look, claim, look again, sweep, store, release."""
    layers = open_layers(directory, _address(), 60.0)
    for key in range(int(os.environ.get("STORE_CHILD_KEYS", KEYS))):
        at = examples.problem(fields={"head_dim": 16 + key})
        while not layers.winners(at):
            lease = layers.claim(at.hash, owner, "host", float(seconds))
            if lease is None:
                time.sleep(0.05)
                continue
            with _renewing(layers, lease, float(seconds)):
                if not layers.winners(at):
                    _say("begin", key)
                    time.sleep(float(hold))
                    layers.put_winner(examples.winner(at=at, kernel=f"by-{owner}"))
                    _say("end", key)
            layers.release(lease)


@contextlib.contextmanager
def _renewing(layers: Layers, lease: Lease, seconds: float) -> Iterator[None]:
    """Keeps a lease alive: on a crowded machine the work of a moment may take longer than it lasts."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(seconds / 5):
            layers.renew(lease, seconds)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def look(directory: Path, count: str) -> None:
    """Opens a large database as a process does at its first call; says the milliseconds of its look-ups.

    Those of the first, the median and the slowest of the later ones, and the processor's of the first.
    """
    importlib.import_module("sqlalchemy.dialects.sqlite")  # the rest of what is imported: 20 ms
    gc.collect()  # of what imports leave: 25 ms, which else fall into whatever comes next
    places = [number * 7919 % int(count) for number in range(201)]
    started, worked = time.perf_counter(), time.process_time()
    layers = open_layers(directory)
    taken, spent = [], 0.0
    for place in places:
        found = layers.winners(examples.problem(fields={"seqlen_q": place}))
        taken.append(1000 * (time.perf_counter() - started))
        spent = spent or 1000 * (time.process_time() - worked)
        assert len(found) == 3
        started = time.perf_counter()
    later = sorted(taken[1:])
    _say(f"{taken[0]:.2f} {later[len(later) // 2]:.3f} {later[-1]:.3f} {spent:.2f}")


def recover(directory: Path, owner: str) -> None:
    """Opens a file that may be damaged, together with others, and stores a row of its own."""
    while not (directory / "go").exists():
        time.sleep(0.001)
    layers = open_layers(directory)
    layers.add_trial(examples.trial(int(owner)))
    _say(layers.location)


def use(directory: Path) -> None:
    """Uses a database that can be read but not written: says what was read, what was kept and where."""
    layers = open_layers(directory)
    read = len(layers.trials(examples.problem()))
    for block in (9001, 9002):
        layers.add_trial(examples.trial(block, reason="x" * 8192))
    kept = layers.put_winner(examples.winner(9001))
    claimed = layers.claim("p" * 64, "me", "host", 10.0) is not None
    _say(
        read,
        len(layers.trials(examples.problem())),
        kept.config.params["BLOCK_M"],
        claimed,
        layers.location,
    )


def use_as_nobody(directory: Path) -> None:
    """As ``use``, by a user who owns nothing (where we are root, whom no permission stops)."""
    Store.open(directory / "flashbias.db").counts()
    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    use(directory)


def use_without_space(directory: Path) -> None:
    """As ``use``, where no file may grow beyond what the database has."""
    size = (directory / "flashbias.db").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    use(directory)


ACTIONS: dict[str, Callable[..., None]] = {
    action.__name__: action
    for action in (
        write,
        write_layers,
        modify,
        create,
        work,
        sweep,
        look,
        recover,
        use,
        use_as_nobody,
        use_without_space,
    )
}

if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s %(message)s", stream=sys.stderr)
    ACTIONS[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
