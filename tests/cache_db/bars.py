"""The big counts that a shared database must hold, too slow for every run: ``python tests/cache_db/bars.py [NAME ...]``.

Each bar prints one line with its figures and whether it was met; the exit status is 1 if one was not.
"""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import store_child
import store_examples as examples
from postgres import Cluster, fresh_schema

from cache_db import rows, schema
from cache_db.address import Address
from cache_db.models import Trial, Winner
from cache_db.store import Store

ROOT = Path(__file__).parents[2]


def _start(folder: Path, address: Address | None, *words: object, **more: str) -> subprocess.Popen[str]:
    shared = {} if address is None else {"STORE_CHILD_URL": address.url}
    return subprocess.Popen(
        [sys.executable, store_child.__file__, *map(str, (words[0], folder, *words[1:]))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), **shared, **more},
    )


def _together(folder: Path, processes: Sequence[subprocess.Popen[str]]) -> tuple[list[str], list[str], float]:
    """Lets all go at once when all are ready; returns their lines, the errors of those that failed, and the seconds."""
    while len(list(folder.glob("ready-*"))) < len(processes):
        assert all(process.poll() is None for process in processes), [p.communicate() for p in processes if p.poll()]
        time.sleep(0.05)
    started = time.monotonic()
    (folder / "go").touch()
    ended = [process.communicate(timeout=600) for process in processes]
    failed = [err.strip() for process, (_, err) in zip(processes, ended, strict=True) if process.returncode]
    return [line for out, _ in ended for line in out.splitlines()], failed, time.monotonic() - started


def modify(folder: Path, address: Address | None) -> tuple[bool, str]:
    """32 processes x 50 read-modify-writes."""
    lines, failed, seconds = _together(folder, [_start(folder, address, "modify", owner, 50) for owner in range(32)])
    store = Store.open(folder / "flashbias.db") if address is None else Store.connect(address)
    stored = len(store.find(Trial))
    return (
        stored == len(lines) == 1600 and not failed,
        f"{stored} of 1600 committed, {len(failed)} errors, {seconds:.1f} s",
    )


def create(folder: Path, address: Address | None) -> tuple[bool, str]:
    """24 processes that make the schema at once."""
    _, failed, seconds = _together(folder, [_start(folder, address, "create") for _ in range(24)])
    return not failed, f"{len(failed)} of 24 failed, {seconds:.1f} s {' '.join(failed[:1])}"


def _read(process: subprocess.Popen[str], lines: list[str]) -> None:
    assert process.stdout is not None
    lines.extend(map(str.strip, process.stdout))


def sweep(folder: Path, address: Address | None) -> tuple[bool, str]:
    """24 processes x 40 problems, each swept once, while owners are killed by SIGKILL."""

    def begin(owner: str) -> subprocess.Popen[str]:
        where = folder if address is None else folder / owner
        return _start(where, address, "sweep", owner, "0.2", "8", STORE_CHILD_KEYS="40")

    processes = [begin(f"owner-{number}") for number in range(24)]
    printed: list[list[str]] = [[] for _ in processes]
    readers = [threading.Thread(target=_read, args=each) for each in zip(processes, printed, strict=True)]
    for reader in readers:
        reader.start()
    victims: list[subprocess.Popen[str]] = []
    until = time.monotonic() + 300
    while len(victims) < 6 and any(reader.is_alive() for reader in readers) and time.monotonic() < until:
        for process, lines in zip(processes, printed, strict=True):
            if lines and lines[-1].startswith("begin") and process not in victims and random.random() < 0.3:
                process.kill()
                victims.append(process)
        time.sleep(0.1)
    for reader in readers:
        reader.join()
    ended = ["\n".join(lines) for lines in printed]
    steps = Counter(line for out in ended for line in out.splitlines())
    torn = {each.split()[1] for out in ended for each in out.splitlines()[-1:] if each.startswith("begin")}
    twice = [key for key in range(40) if steps[f"begin {key}"] > 1 and str(key) not in torn]
    store = Store.open(folder / "flashbias.db") if address is None else Store.connect(address)
    winners = Counter(winner.problem.hash for winner in store.find(Winner))
    met = not twice and len(winners) == 40 and set(winners.values()) == {1}
    failed = sum(process.wait() != 0 for process in processes if process not in victims)
    return (
        met and not failed,
        f"{len(winners)} problems with a winner, {len(twice)} swept twice, {len(torn)} owners killed in a sweep",
    )


def crowd(folder: Path, address: Address | None) -> tuple[bool, str]:
    """64 processes against a server with max_connections = 20."""
    assert address is not None
    lines, failed, seconds = _together(folder, [_start(folder, address, "work", owner, 3) for owner in range(64)])
    waits = [float(line.split()[0]) for line in lines]
    ready = sum(line.endswith("ready") for line in lines)
    counts = Store.connect(address).counts()
    met = not failed and len(lines) == 64 and (counts["trials"], counts["winners"]) == (960, 192) and max(waits) <= 5.0
    return met, (
        f"{len(lines)} of 64 finished in {seconds:.1f} s, {ready} never lost the server, slowest call {max(waits):.2f} s, "
        f"{counts['trials']} of 960 trials and {counts['winners']} of 192 winners on the server"
    )


def kill(folder: Path, address: Address | None) -> tuple[bool, str]:
    """200 writers, four at a time, killed by SIGKILL in the middle of their work."""
    acknowledged: set[int] = set()
    broken = 0
    for number in range(50):
        writers = [_start(folder, address, "write", 1_000_000 * (4 * number + each), 1_000_000) for each in range(4)]
        for writer in writers:
            assert writer.stdout is not None
            acknowledged.add(int(writer.stdout.readline()))
        time.sleep(random.uniform(0.0, 0.3))
        for writer in writers:
            writer.kill()
        for writer in writers:
            lines = writer.communicate()[0].splitlines(keepends=True)
            acknowledged |= {int(line) for line in lines if line.endswith("\n")}  # one that is cut off names no row
        with contextlib.closing(sqlite3.connect(folder / "flashbias.db")) as connection:
            broken += connection.execute("PRAGMA integrity_check").fetchall() != [("ok",)]
    stored = {row.config.params["BLOCK_M"] for row in Store.open(folder / "flashbias.db").find(Trial)}
    lost = len(acknowledged - stored)
    return not lost and not broken, (
        f"200 killed, {lost} of {len(acknowledged)} acknowledged rows lost, {broken} of 50 integrity checks failed"
    )


def stored(folder: Path, address: Address | None) -> tuple[bool, str]:
    """10,000 problems of three winners and twelve trials: how long a fresh process's look-ups take."""
    count = 10_000
    store = Store.open(folder / "flashbias.db")
    for first in range(0, count, 1000):
        places = [examples.problem(fields={"seqlen_q": each}) for each in range(first, first + 1000)]
        winners = [examples.winner(at=at, kernel=kernel) for at in places for kernel in ("forward", "dkdv", "dq")]
        trials = [examples.trial(block, at=at) for at in places for block in range(12)]
        with store._writing() as connection:
            connection.execute(schema.winners.insert(), list(map(rows.encode, winners)))
            connection.execute(schema.trials.insert(), list(map(rows.encode, trials)))
    runs = []
    for _ in range(5):
        out, err = _start(folder, address, "look", count).communicate()
        assert out, err
        runs.append([float(word) for word in out.split()])
    first, later, worst, spent = (sorted(column)[2] for column in zip(*runs, strict=True))
    size = store.path.stat().st_size >> 20
    told = f"first look-up {first:.1f} ms ({spent:.1f} of processor time), later ones {later:.2f} ms, slowest of 200 {worst:.2f} ms (medians of 5 processes, {size} MiB)"
    return first <= 25.0 and later <= 1.0, told


BARS: dict[str, tuple[Callable[[Path, Address | None], tuple[bool, str]], int, bool, bool]] = {
    # what, rounds, on SQLite, on PostgreSQL
    "modify": (modify, 1, True, True),
    "create": (create, 10, True, True),
    "sweep": (sweep, 1, True, True),
    "crowd": (crowd, 1, False, True),
    "kill": (kill, 1, True, False),
    "stored": (stored, 1, True, False),
}


def main(names: Sequence[str]) -> int:
    """Runs the bars of these ``names``, or all; returns the exit status."""
    cluster = Cluster() if any(BARS[name][3] for name in names or BARS) else None
    bad = False
    try:
        for name in names or BARS:
            _, rounds, file, server = BARS[name]
            if file:
                bad |= {_run(name, None) for _ in range(rounds)} != {True}
            if server and cluster is not None:
                cluster.stop()
                cluster.start(**({"max_connections": 20} if name == "crowd" else {}))
                bad |= {_run(name, cluster) for _ in range(rounds)} != {True}
    finally:
        if cluster is not None:
            cluster.remove()
    return int(bad)


def _run(name: str, cluster: Cluster | None) -> bool:
    """Runs a bar once, on SQLite without a ``cluster``; prints its figures and returns whether it was met."""
    engine = "SQLite" if cluster is None else "PostgreSQL"
    place = contextlib.nullcontext() if cluster is None else fresh_schema(cluster.url())
    with tempfile.TemporaryDirectory() as folder, place as address:
        met, figures = BARS[name][0](Path(folder), address)
    sys.stdout.write(f"{name:8}{engine:11}{'met' if met else 'NOT MET':8}{figures}\n")
    sys.stdout.flush()
    return met


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
