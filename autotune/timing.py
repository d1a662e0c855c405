"""Times kernels against each other: interleaved, so that a change of clocks meets all of them, and with a cold L2."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch

from cache_db.models import Scalar

Launch = Callable[[], None]

# After the first round only candidates within this factor of the fastest are timed again.
LAGGARD: Final = 3.0
WARM_SECONDS: Final = 0.05
SMALLEST_FLUSH: Final = 64 << 20
# Launches queued behind one busy-wait. CUDA blocks the host near 1024 queued operations; a launch needs about five.
LAUNCHES_A_LEAD: Final = 64
# Clock cycles of that wait for each launch (about 65 us): with it the host is always ahead, and the events of a
# launch never enclose the time the host took to enqueue it.
LEAD_CYCLES: Final = 120_000


def interleaved(
    launches: Mapping[str, Launch],
    rounds: int,
    device: torch.device,
    notice: Callable[[], None] = lambda: None,
    lead_cycles: int = LEAD_CYCLES,
) -> dict[str, list[float]]:
    """Runs every launch once a round, ``rounds`` times, and returns the milliseconds of each.

    On a GPU the L2 is flushed before each launch and CUDA events time it, behind a busy-wait of ``lead_cycles`` for each
    launch, which must outlast the host's work for it; ``notice`` is called before each round.
    Candidates slower than ``LAGGARD`` times the fastest of the first round keep that one sample.
    """
    samples: dict[str, list[float]] = {name: [] for name in launches}
    running = dict(launches)
    buffer = _flush_buffer(device) if device.type == "cuda" else None
    for number in range(rounds):
        notice()
        timed = _time_on_cpu(running) if buffer is None else _time_on_gpu(running, buffer, lead_cycles)
        for name, milliseconds in timed.items():
            samples[name].append(milliseconds)
        if number == 0:
            fastest = min((values[0] for values in samples.values()), default=0.0)
            running = {name: run for name, run in launches.items() if samples[name][0] <= LAGGARD * fastest}
    return samples


def summary(samples: Sequence[float]) -> dict[str, Scalar]:
    """Returns the figures of one candidate: ``ms`` (median), ``p20``, ``p80`` and how many ``samples``."""
    ordered = sorted(samples)
    return {
        "ms": statistics.median(ordered),
        "p20": _quantile(ordered, 0.2),
        "p80": _quantile(ordered, 0.8),
        "samples": len(ordered),
    }


def _quantile(ordered: Sequence[float], part: float) -> float:
    """Returns the quantile ``part`` of sorted values, interpolated linearly."""
    place = part * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _time_on_cpu(launches: Mapping[str, Launch]) -> dict[str, float]:
    result = {}
    for name, launch in launches.items():
        started = time.perf_counter()
        launch()
        result[name] = 1e3 * (time.perf_counter() - started)
    return result


def _time_on_gpu(launches: Mapping[str, Launch], flush: torch.Tensor, lead_cycles: int) -> dict[str, float]:
    result: dict[str, float] = {}
    names = list(launches)
    for first in range(0, len(names), LAUNCHES_A_LEAD):
        chunk = names[first : first + LAUNCHES_A_LEAD]
        events: dict[str, tuple[Any, Any]] = {}
        torch.cuda._sleep(lead_cycles * len(chunk))  # noqa: SLF001  # the only busy-wait
        for name in chunk:
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            before.record()
            launches[name]()
            after.record()
            events[name] = (before, after)
        torch.cuda.synchronize()
        result |= {name: before.elapsed_time(after) for name, (before, after) in events.items()}
    return result


def _flush_buffer(device: torch.device) -> torch.Tensor:
    """Returns a buffer twice the L2's size, having written to it until the clocks are up."""
    l2_bytes = int(torch.cuda.get_device_properties(device).L2_cache_size)
    buffer = torch.empty(max(2 * l2_bytes, SMALLEST_FLUSH), dtype=torch.uint8, device=device)
    until = time.perf_counter() + WARM_SECONDS
    while time.perf_counter() < until:
        for _ in range(LAUNCHES_A_LEAD):
            buffer.zero_()
        torch.cuda.synchronize()
    return buffer
