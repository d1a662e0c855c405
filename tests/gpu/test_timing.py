"""What the sweep's times are made of: the device's work, and nothing of the host's."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from autotune import timing

DEVICE = torch.device("cuda", 0)
ROUNDS = 7
# A small kernel takes a few microseconds on the device; the host is made to take a hundred times that.
MOST_MS = 0.1
HOST_SECONDS = 0.001
LONGER_THAN_ANY_LEAD = 0.01
BLOCK_BYTES = 256 << 20


@pytest.fixture
def small() -> torch.Tensor:
    return torch.zeros(1024, device=DEVICE)


def slow_host(small: torch.Tensor, seconds: float) -> Callable[[], None]:
    """Returns a launch of one small kernel that takes the host ``seconds``."""

    def launch() -> None:
        time.sleep(seconds)
        small.add_(1)

    return launch


def test_a_host_that_is_late_gets_a_longer_lead(small: torch.Tensor) -> None:
    launches = {str(number): slow_host(small, HOST_SECONDS) for number in range(3)}
    for figures in timing.interleaved(launches, ROUNDS, DEVICE).figures().values():
        assert float(figures["ms"]) < MOST_MS


def test_a_full_queue_is_no_part_of_a_time(small: torch.Tensor) -> None:
    def launch() -> None:
        for _ in range(200):
            small.add_(1)

    many = timing.interleaved({str(number): launch for number in range(40)}, ROUNDS, DEVICE).figures()
    alone = timing.interleaved({"alone": launch}, ROUNDS, DEVICE).figures()["alone"]
    for figures in many.values():
        assert float(figures["ms"]) < 2 * float(alone["ms"])


def test_a_replay_runs_the_launch_without_the_host(small: torch.Tensor) -> None:
    launch = slow_host(small, LONGER_THAN_ANY_LEAD)
    launch()
    replay = timing.replay(launch, timing.pool(DEVICE))
    before = small.clone()
    record = timing.interleaved({"": replay}, ROUNDS, DEVICE)
    assert float(record.figures()[""]["ms"]) < MOST_MS
    assert float((small - before).min()) >= ROUNDS


def test_what_waits_for_the_device_is_timed_as_it_is(small: torch.Tensor) -> None:
    def launch() -> None:
        small.add_(1)
        torch.cuda.synchronize()

    launch()
    stream = torch.cuda.current_stream()
    assert timing.replay(launch, timing.pool(DEVICE)) is launch
    assert torch.cuda.current_stream() == stream
    assert timing.interleaved({"": launch}, ROUNDS, DEVICE).figures()[""]["samples"]
    assert float(torch.ones(1 << 20, device=DEVICE).sum()) == 1 << 20


def test_replays_share_the_memory_that_launches_allocate() -> None:
    def launch() -> None:
        torch.empty(BLOCK_BYTES, dtype=torch.uint8, device=DEVICE).zero_()

    launch()
    pool = timing.pool(DEVICE)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    replays = [timing.replay(launch, pool) for _ in range(4)]
    assert torch.cuda.memory_reserved() - before < 2 * BLOCK_BYTES
    del replays
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before


def test_a_launch_that_refuses_to_be_captured_stays_as_it_is() -> None:
    calls = []

    def launch() -> None:
        calls.append(torch.cuda.is_current_stream_capturing())
        if calls[-1]:
            raise RuntimeError("not here")

    launch()
    assert timing.replay(launch, timing.pool(DEVICE)) is launch
    assert calls == [False, True]
