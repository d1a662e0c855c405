"""Many processes on one file, and processes that die: nothing acknowledged is lost, nothing is swept twice."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import store_child
import store_examples as examples

from cache_db import memory as memory_module
from cache_db.memory import Memory
from cache_db.store import Store

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Returns what starts ``store_child.py`` on this test's own folder."""

    def begin(action: str, *arguments: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, store_child.__file__, action, tmp_path, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        )

    return begin


def _finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


def test_processes_creating_the_file_at_once_lose_nothing(start: Start, tmp_path: Path) -> None:
    """Eight processes that find no file make one together, and every trial of each of them is in it."""
    processes = [start("write", 100 * owner, 25) for owner in range(8)]
    acknowledged = [int(line) for process in processes for line in _finish(process).split()]
    stored = Store.open(tmp_path / "flashbias.db").trials(examples.problem())
    assert sorted(trial.config.params["BLOCK_M"] for trial in stored) == sorted(acknowledged)
    assert len(stored) == 200


def test_each_key_is_swept_by_one_of_eight_processes(start: Start) -> None:
    """With every process wanting every key at once, each key is swept exactly once."""
    processes = [start("sweep", f"owner-{owner}", 0.02, 60) for owner in range(8)]
    lines = [line for process in processes for line in _finish(process).splitlines()]
    assert Counter(lines) == {f"{step} {key}": 1 for key in range(store_child.KEYS) for step in ("begin", "end")}


def test_key_of_a_killed_owner_is_swept_by_another(start: Start, tmp_path: Path) -> None:
    """The lease of a process killed in the middle of a sweep runs out; the key is then swept once, with one winner."""
    victim = start("sweep", "victim", 600, 1)
    assert victim.stdout is not None
    assert victim.stdout.readline() == "begin 0\n"
    victim.kill()
    victim.communicate()
    processes = [start("sweep", f"owner-{owner}", 0.02, 60) for owner in range(4)]
    lines = [line for process in processes for line in _finish(process).splitlines()]
    assert Counter(lines) == {f"{step} {key}": 1 for key in range(store_child.KEYS) for step in ("begin", "end")}
    assert Store.open(tmp_path / "flashbias.db").counts() | {"trials": 0} == {
        "trials": 0, "verifications": 0, "lifts": 0, "pins": 0, "winners": store_child.KEYS, "leases": 0, "jobs": 0,
    }  # fmt: skip


@pytest.mark.parametrize("after", [0.01, 0.05, 0.11, 0.2])
def test_kill_loses_no_acknowledged_row(start: Start, tmp_path: Path, after: float) -> None:
    """Whenever three writers are killed, what they were told is stored is there, and the file is whole."""
    processes = [start("write", 100_000 * owner, 100_000) for owner in range(3)]
    acknowledged: list[int] = []
    for process in processes:
        assert process.stdout is not None
        acknowledged.append(int(process.stdout.readline()))
    time.sleep(after)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    for process in processes:
        out, _ = process.communicate()
        # A line cut off by the kill names no row.
        acknowledged += [int(line) for line in out.splitlines(keepends=True) if line.endswith("\n")]
    stored = Store.open(tmp_path / "flashbias.db").trials(examples.problem())
    assert {trial.config.params["BLOCK_M"] for trial in stored} >= set(acknowledged)
    with sqlite3.connect(tmp_path / "flashbias.db") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


def test_threads_share_a_store(tmp_path: Path) -> None:
    """One store serves many threads: each call has its own connection."""
    store = Store.open(tmp_path / "flashbias.db")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda block: store.add_trial(examples.trial(block)), range(64)))
        claims = list(pool.map(lambda owner: store.claim("p" * 64, f"owner-{owner}", "host", 60.0), range(16)))
    assert store.counts()["trials"] == 64
    assert sum(claim is not None for claim in claims) == 1


def test_forked_child_uses_its_parents_store(tmp_path: Path) -> None:
    """Nothing is open between calls, so a forked child can go on with the object it inherited."""
    store = Store.open(tmp_path / "flashbias.db")
    store.add_trial(examples.trial(1))
    _in_fork(lambda: store.add_trial(examples.trial(2)))
    store.add_trial(examples.trial(3))
    assert [trial.config.params["BLOCK_M"] for trial in store.trials(examples.problem())] == [1, 2, 3]


def test_fork_while_another_thread_uses_memory_leaves_no_lock_behind() -> None:
    """A fork waits for the few dict operations of another thread instead of inheriting their lock for ever."""
    memory, inside = Memory(), threading.Event()

    def busy() -> None:
        with memory_module._lock:
            inside.set()
            time.sleep(0.2)

    thread = threading.Thread(target=busy)
    thread.start()
    inside.wait()
    _in_fork(lambda: memory.claim("p" * 64, "me", "host", 60.0))
    thread.join()


def _in_fork(action: Callable[[], object]) -> None:
    """Runs ``action`` in a forked child and fails if it raises or takes more than 10 s there."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(10)
            action()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert status == 0
