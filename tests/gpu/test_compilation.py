"""Candidates compile in parallel: all cores of the host work on a sweep."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from autotune.device import DeviceInfo, describe
from autotune.sandbox import Limits, Sandbox
from cache_db.models import Config, Problem
from flashbias.kernels.problem import GRADIENTS, Shape, problem
from flashbias.kernels.spec import ATTENTION

SHAPE = Shape(batch=2, nheads=16, seqlen_q=8192, seqlen_k=8192, headdim=64, rank=8, causal=True, grads=GRADIENTS)
SAMPLE = 5


def seconds(found: Problem, device: DeviceInfo, items: Sequence[tuple[str, Config]], workers: int) -> float:
    """Returns how long ``items`` take on ``workers`` cores, the start of the compiling process not counted."""
    with Sandbox(found, device, Limits(workers=workers)) as sandbox:
        first, *rest = items
        assert len(list(sandbox.compile([first]))) == 1
        started = time.monotonic()
        assert len(list(sandbox.compile(rest))) == len(rest)
        return time.monotonic() - started


def touch_memory(gibibytes: int) -> None:
    """Has the machine own that much memory already.

    A virtual machine is given memory by its host when it first touches it, 8 GiB in about 3 s on the hosts met, and the
    first of two measurements would pay for both.
    """
    subprocess.run([sys.executable, "-c", f"len(b'1' * ({gibibytes} << 30))"], check=True)


def test_all_candidates_of_a_problem_compile_in_little_more_than_serial_time_over_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    """At least 40 configs take at most 1.3 times what one core would need, divided by the number of cores."""
    device = describe(0)
    found = problem(SHAPE, device)
    items = [
        (kernel, config)
        for kernel in ATTENTION.kernels(found)
        for config in ATTENTION.candidates(kernel, found, device)
        if config.implementation == "triton" and not ATTENTION.rejects(kernel, config, found, device)
    ]
    assert len(items) >= 40
    cores = len(os.sched_getaffinity(0))
    touch_memory(cores)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "parallel"))
    together = seconds(found, device, items, Limits().workers) / (len(items) - 1)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "serial"))
    sample = items[::SAMPLE]
    alone = seconds(found, device, sample, 1) / (len(sample) - 1)
    record_property("share_of_serial_over_cores", together / (alone / cores))
    assert together <= 1.3 * alone / cores
