"""A caller that has almost all of the GPU's memory: its call is right, its next allocation succeeds, the sweep makes do."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import pytest
import torch

import autotune
from autotune import Settings, resolve, room
from autotune.device import describe
from cache_db import open_layers
from flashbias import flash_bias_func, settings
from flashbias.band import Band
from flashbias.plans import forget
from flashbias.reference import forward
from tests.autotune.planted_spec import planted_problem
from tests.autotune.roomy_spec import roomy_problem

pytestmark = pytest.mark.timeout(300)
CUDA = torch.device("cuda")
NEXT_BYTES = 512 << 20


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    """Makes each test start like a new process, with an empty cache of memory, and leave one."""
    autotune.forget()
    forget()
    torch.cuda.empty_cache()
    yield
    autotune.forget()
    forget()
    torch.cuda.empty_cache()


@contextmanager
def filled(left: float, cached: float = 0.0) -> Iterator[None]:
    """Takes all memory but ``left`` GiB; of what it takes ``cached`` GiB are given back to torch's cache at once."""
    torch.ones(1, device=CUDA)
    free, _ = torch.cuda.mem_get_info()
    taken = free - int((left + cached) * room.GIB)
    if taken <= 0:
        pytest.skip(f"less than {left + cached} GiB are free")
    model = torch.empty(taken, dtype=torch.uint8, device=CUDA)
    if cached:
        torch.empty(int(cached * room.GIB), dtype=torch.uint8, device=CUDA)
    try:
        yield
    finally:  # the frames of a failed test live on
        del model
        torch.cuda.empty_cache()


class Neighbour:
    """A thread of the caller that goes on taking and giving back 512 MiB while the caller's call is tuned."""

    def __init__(self) -> None:
        self.taken = 0
        self.failures: list[str] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _work(self) -> None:
        while True:
            try:
                torch.empty(NEXT_BYTES, dtype=torch.uint8, device=CUDA)
                self.taken += 1
            except torch.OutOfMemoryError as error:
                self.failures.append(str(error))
            torch.cuda.empty_cache()
            if self._over.wait(0.1):
                return


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Returns all that was warned of."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("left", [3.0, 1.6, 0.8])
def test_a_call_on_a_full_device_is_right_and_leaves_its_caller_room(
    left: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With 3, 1.6 or 0.8 GiB left the result is that of the reference, and 512 MiB can be had during the call and after."""
    generator = torch.Generator(CUDA).manual_seed(0)
    made = [
        torch.randn((2, 384, 4, size), generator=generator, device=CUDA, dtype=torch.bfloat16)
        for size in (64, 64, 64, 8, 8)
    ]
    q, k, v, q_bias, k_bias = made
    expected, _ = forward(*made, None, Band(None, None), 0.125, compute_dtype=torch.float64)
    with filled(left):
        with settings(cache_dir=tmp_path, budget_seconds=20), Neighbour() as neighbour:
            out = flash_bias_func(q, k, v, q_bias, k_bias, softmax_scale=0.125)
            torch.cuda.synchronize()
        torch.empty(NEXT_BYTES, dtype=torch.uint8, device=CUDA)
    assert neighbour.failures == []
    assert neighbour.taken
    assert float((out.double() - expected).norm() / expected.norm()) < 1e-2
    told = warnings(caplog)
    assert len(told) <= 1
    if left < 1:
        assert len(told) == 1, f"{torch.cuda.mem_get_info()[0] / room.GIB:.1f} GiB free now"
        assert "GPU memory are free" in told[0]
        assert "prewarm" in told[0]


def test_a_sweep_with_little_memory_times_smaller_sizes(tmp_path: Path) -> None:
    """Where the timed 2 GiB do not fit into what 3 leave, fewer rows are timed, and the winners wait to be finished."""
    device = describe(0)
    problem = roomy_problem("BIG", "32", device=device)
    with filled(3.0):
        found = resolve(problem, device, Settings(cache_dir=tmp_path, budget_seconds=120))
    assert {choice.rung for choice in found.choices.values()} == {"winner"}
    store = open_layers(tmp_path)
    assert all(str(trial.figures["timed_at"]).startswith("rows=") for trial in store.trials(problem))
    assert {winner.complete for winner in store.winners(problem).values()} == {False}


def test_what_the_caller_keeps_unused_is_given_back_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """0.5 GiB free and 20 GiB in torch's cache: the cache is emptied and the problem tuned."""
    device = describe(0)
    problem = planted_problem("32 64", device=device)
    with filled(0.5, cached=20.0):
        assert room.free_memory(device) < room.SMALLEST  # type: ignore[operator]
        found = resolve(problem, device, Settings(cache_dir=tmp_path))
        assert torch.cuda.mem_get_info()[0] > 15 * room.GIB
    assert {choice.rung for choice in found.choices.values()} == {"winner"}
    assert warnings(caplog) == []


def test_a_rank_of_a_job_gives_nothing_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Emptying the cache waits for the device, where a collective may wait for the others: the sweep declines instead."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    device = describe(0)
    with filled(0.5, cached=20.0):
        found = resolve(planted_problem("32 64", device=device), device, Settings(cache_dir=tmp_path))
        assert torch.cuda.mem_get_info()[0] < room.SMALLEST
    assert found.choices == {}
    (warning,) = warnings(caplog)
    assert "before the model is loaded" in warning
