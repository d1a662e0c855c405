"""A thousand binaries through one compiler and one runner on the GPU: nothing is left behind, and it takes no time."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from autotune.device import describe
from autotune.sandbox import Sandbox
from cache_db.models import Verdict
from tests.autotune.planted_spec import planted_problem
from tests.autotune.softmax_spec import softmax_config
from tests.autotune.test_leaks import Count, assert_none_last, shared

pytestmark = pytest.mark.timeout(600)

CANDIDATES = 1000
WARM_UP = 50
CRASHES = 5
SECONDS = 90.0
CORES = 16
# What the driver keeps of one small kernel on the device; a leaked set of buffers takes more.
KERNEL_BYTES = 256 << 10
SLACK_BYTES = 64 << 20


def free() -> int:
    """Returns the device's free bytes, with nothing of this process's cached."""
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    return int(torch.cuda.mem_get_info()[0])


def test_a_thousand_binaries_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    """Descriptors, threads, children and shared memory stay; device memory grows by no more than loaded kernels take."""
    device = describe(0)
    torch.ones(1, device="cuda")
    untouched, in_memory = free(), shared()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with Sandbox(planted_problem(device=device), device) as sandbox:

        def work(first: int, last: int) -> int:
            items = [("forward", softmax_config(number=number)) for number in range(first, last)]
            binaries = set()
            for kernel, config, compiled in sandbox.compile(items):
                assert compiled.safe, compiled.reason
                binaries.add(compiled.binary)
                assert sandbox.prove(kernel, config, {}, 1, 0).safe
            return len(binaries)

        work(1, 1 + WARM_UP)
        gc.collect()
        runner = sandbox._runner.pid
        assert runner is not None
        before, before_runner, room = Count.of("self"), Count.of(runner), free()
        started = time.monotonic()
        binaries = work(1 + WARM_UP, 1 + WARM_UP + CANDIDATES)
        seconds = time.monotonic() - started
        gc.collect()
        assert sandbox._runner.pid == runner
        after, after_runner = Count.of("self"), Count.of(runner)
        record_property("seconds", seconds)
        record_property("device_bytes_a_candidate", (room - free()) / CANDIDATES)
        assert binaries == CANDIDATES
        assert after.grown(before) == {}
        assert after_runner.grown(before_runner) == {}
        assert room - free() < CANDIDATES * KERNEL_BYTES
    assert untouched - free() < SLACK_BYTES
    assert_none_last(shared() - in_memory)
    assert seconds < SECONDS * max(1.0, CORES / len(os.sched_getaffinity(0)))


def test_runners_that_crash_give_the_device_back() -> None:
    """After each illegal access a fresh runner proves again, and the dead ones hold neither descriptors nor memory."""
    device = describe(0)
    torch.ones(1, device="cuda")
    with Sandbox(planted_problem(device=device), device) as sandbox:
        good, bad = softmax_config(), softmax_config(fault="illegal_access")
        assert [outcome.safe for *_, outcome in sandbox.compile([("forward", good), ("forward", bad)])] == [True, True]
        assert sandbox.prove("forward", good, {}, 1, 0).safe
        gc.collect()
        before, room = Count.of("self"), free()
        for _ in range(CRASHES):
            assert sandbox.prove("forward", bad, {}, 1, 0).verdict is Verdict.CRASHED
            assert sandbox.prove("forward", good, {}, 1, 0).safe
        gc.collect()
        assert Count.of("self").grown(before) == {}
        assert room - free() < SLACK_BYTES
