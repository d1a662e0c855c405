"""Nothing grows with the number of candidates: descriptors, threads, processes, shared memory, resident memory."""

from __future__ import annotations

import gc
import itertools
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from autotune import nursery
from autotune.device import describe
from autotune.sandbox import Limits, Sandbox
from cache_db.models import Verdict
from tests.autotune.cheap_spec import cheap_config, cheap_problem

CANDIDATES = 1000
BATCHES = 2
WARM_UP = 200
CRASHES = 5
# A leaked message of 2 KiB or a leaked buffer (the case's guarded outputs take 130 KiB) a candidate would exceed it.
BYTES_A_CANDIDATE = 2048
PAGE = 4096


@dataclass(frozen=True)
class Count:
    """What one process holds."""

    descriptors: int
    threads: int
    children: int
    resident: int

    @classmethod
    def of(cls, pid: int | str) -> Count:
        """Counts what process ``pid`` holds now."""
        process = Path(f"/proc/{pid}")
        tasks = list((process / "task").iterdir())
        children = sum(len((task / "children").read_text(encoding="ascii").split()) for task in tasks)
        resident = int((process / "statm").read_text(encoding="ascii").split()[1]) * PAGE
        return cls(len(list((process / "fd").iterdir())), len(tasks), children, resident)

    def grown(self, before: Count) -> dict[str, int]:
        """Returns what there is more of than ``before`` and must not be; less there may be, an earlier test's linger."""
        grown = {name: value - asdict(before)[name] for name, value in asdict(self).items()}
        return {name: value for name, value in grown.items() if name != "resident" and value > 0}


def shared() -> set[str]:
    """Returns the names of all that is in shared memory on this machine."""
    return {each.name for each in Path("/dev/shm").iterdir()}


def assert_none_last(names: set[str]) -> None:
    """Holds that none of these stays in shared memory: what other processes have there comes and goes."""
    until = time.monotonic() + 10
    while (left := names & shared()) and time.monotonic() < until:
        time.sleep(0.1)
    assert not left


def test_a_thousand_candidates_leave_nothing_behind() -> None:
    """Caller and runner hold after 1,000 compiles and proofs what they held before; memory stays within a small slope."""
    in_memory = shared()
    with Sandbox(cheap_problem(), describe(-1)) as sandbox:

        def work(first: int, last: int) -> None:
            configs = [cheap_config(number) for number in range(first, last)]
            assert all(outcome.safe for *_, outcome in sandbox.compile([("forward", each) for each in configs]))
            assert all(sandbox.prove("forward", each, {}, 1, 0).safe for each in configs)
            assert len(sandbox.measure("forward", configs, {}, 1)) == last - first

        work(0, WARM_UP)
        gc.collect()
        runner = sandbox._runner.pid
        assert runner is not None
        counts = [(Count.of("self"), Count.of(runner))]
        size = CANDIDATES // BATCHES
        for first in range(WARM_UP, WARM_UP + CANDIDATES, size):
            work(first, first + size)
            gc.collect()
            counts.append((Count.of("self"), Count.of(runner)))
        assert sandbox._runner.pid == runner
    assert_none_last(shared() - in_memory)
    for process in zip(*counts, strict=True):
        assert process[-1].grown(process[0]) == {}
        # The caller's heap may also take in what an earlier test has left in pieces, but not in every batch.
        grown = min(now.resident - then.resident for then, now in itertools.pairwise(process))
        assert grown < size * BYTES_A_CANDIDATE


def test_children_that_crash_and_start_again_leave_nothing_behind() -> None:
    """Each respawn takes a process, a thread, a pipe and a file, and gives all of them back."""
    with Sandbox(cheap_problem(), describe(-1), Limits(trial_seconds=60)) as sandbox:
        assert sandbox.prove("forward", cheap_config(0), {}, 1, 0).safe
        gc.collect()
        before = Count.of("self")
        pids = set()
        for number in range(CRASHES):
            pids.add(sandbox._runner.pid)
            outcome = sandbox.prove("forward", cheap_config(number, crash=True), {}, 1, 0)
            assert outcome.verdict is Verdict.CRASHED
            assert sandbox.prove("forward", cheap_config(number), {}, 1, 0).safe
        assert len(pids) == CRASHES
        gc.collect()
        assert Count.of("self").grown(before) == {}


def test_sandboxes_that_are_closed_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Descriptors, threads and children are after the last sandbox what they were before the first, once nothing lingers."""
    monkeypatch.setattr(nursery, "LINGER_SECONDS", 0.2)
    nursery.Nursery.forget()
    gc.collect()
    before = Count.of("self")
    for _ in range(2):
        with Sandbox(cheap_problem(), describe(-1)) as sandbox:
            assert sandbox.prove("forward", cheap_config(0), {}, 1, 0).safe
    del sandbox
    gc.collect()
    until = time.monotonic() + 10
    while Count.of("self").grown(before) and time.monotonic() < until:
        time.sleep(0.05)
    assert Count.of("self").grown(before) == {}
