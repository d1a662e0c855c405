"""The big counts that a shared database must hold, too slow for every run: ``python tests/cache_db/bars.py [NAME ...]``.

Each bar prints one line with its figures and whether it was met; the exit status is 1 if one was not.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import store_child
from postgres import Cluster, fresh_schema

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


BARS: dict[str, tuple[Callable[[Path, Address | None], tuple[bool, str]], int, bool, bool]] = {
    # what, rounds, on SQLite, on PostgreSQL
    "modify": (modify, 1, True, True),
    "create": (create, 10, True, True),
    "sweep": (sweep, 1, True, True),
    "crowd": (crowd, 1, False, True),
}


def main(names: Sequence[str]) -> int:
    """Runs the bars of these ``names``, or all; returns the exit status."""
    cluster, bad = Cluster(), False
    try:
        for name in names or BARS:
            action, rounds, file, server = BARS[name]
            cluster.stop()
            cluster.start(**({"max_connections": 20} if name == "crowd" else {}))
            for engine in [*["SQLite"] * file, *["PostgreSQL"] * server]:
                for _ in range(rounds):
                    with tempfile.TemporaryDirectory() as folder, fresh_schema(cluster.url()) as address:
                        met, figures = action(Path(folder), address if engine == "PostgreSQL" else None)
                    bad |= not met
                    sys.stdout.write(f"{name:8}{engine:11}{'met' if met else 'NOT MET':8}{figures}\n")
                    sys.stdout.flush()
    finally:
        cluster.remove()
    return int(bad)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
