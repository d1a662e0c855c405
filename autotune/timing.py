"""Times kernels against each other: interleaved, so that a change of clocks meets all of them, and with a cold L2.

Each round also tells the multiprocessors' clock: the busy-wait that gives the host its lead counts cycles, and events
time it. Rounds in which the clock was down are dropped; candidates are compared round by round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
# A round whose clock is below this part of the median round's was throttled.
THROTTLED: Final = 0.97


@dataclass
class Record:
    """Milliseconds of every candidate, one a round from the first on, and the clock (MHz) of each round on a GPU."""

    samples: dict[str, list[float]] = field(default_factory=dict)
    clocks: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, dict[str, Scalar]]:
        """Returns what is known of each candidate that has samples: :func:`summary` of its rounds at full clock; and more.

        ``paired`` is the median over those rounds of its time as a multiple of the best one's in the same round (the
        best: the one of the lowest median). ``sm_mhz`` is the clock, ``throttled`` how many rounds were dropped.
        """
        steady = self._steady()
        # One that was timed in dropped rounds only keeps them.
        rounds = {
            name: [each for each in range(len(values)) if each in steady] or list(range(len(values)))
            for name, values in self.samples.items()
            if values
        }
        found = {name: summary([self.samples[name][each] for each in kept]) for name, kept in rounds.items()}
        if not found:
            return {}
        best = self.samples[min(found, key=lambda name: found[name]["ms"])]
        for name, kept in rounds.items():
            mine = self.samples[name]
            found[name]["paired"] = statistics.median(mine[each] / best[each] for each in kept if each < len(best))
            if self.clocks:
                found[name]["sm_mhz"] = round(statistics.median(self.clocks[each] for each in steady))
                found[name]["throttled"] = len(self.clocks) - len(steady)
        return found

    def _steady(self) -> list[int]:
        """Returns the rounds at full clock; all of them where clocks are not known."""
        if not self.clocks:
            return list(range(max(map(len, self.samples.values()), default=0)))
        limit = THROTTLED * statistics.median(self.clocks)
        return [number for number, clock in enumerate(self.clocks) if clock >= limit]


def interleaved(
    launches: Mapping[str, Launch],
    rounds: int,
    device: torch.device,
    notice: Callable[[], None] = lambda: None,
    lead_cycles: int = LEAD_CYCLES,
) -> Record:
    """Runs every launch once a round, ``rounds`` times, and records the milliseconds of each.

    On a GPU the L2 is flushed before each launch and CUDA events time it, behind a busy-wait of ``lead_cycles`` for each
    launch, which must outlast the host's work for it; ``notice`` is called before each round.
    Candidates slower than ``LAGGARD`` times the fastest of the first round keep that one sample.
    """
    record = Record({name: [] for name in launches})
    running = dict(launches)
    buffer = _flush_buffer(device) if device.type == "cuda" else None
    for number in range(rounds):
        notice()
        if buffer is None:
            timed = _time_on_cpu(running)
        else:
            timed, clock = _time_on_gpu(running, buffer, lead_cycles)
            record.clocks.append(clock)
        for name, milliseconds in timed.items():
            record.samples[name].append(milliseconds)
        if number == 0:
            fastest = min(timed.values(), default=0.0)
            running = {name: run for name, run in launches.items() if timed[name] <= LAGGARD * fastest}
    return record


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


def _time_on_gpu(
    launches: Mapping[str, Launch], flush: torch.Tensor, lead_cycles: int
) -> tuple[dict[str, float], float]:
    """Returns the milliseconds of each launch, and the multiprocessors' clock in MHz (the lowest met)."""
    result: dict[str, float] = {}
    clocks: list[float] = []
    names = list(launches)
    for first in range(0, len(names), LAUNCHES_A_LEAD):
        chunk = names[first : first + LAUNCHES_A_LEAD]
        events: dict[str, tuple[Any, Any]] = {}
        lead = _events()
        lead[0].record()
        torch.cuda._sleep(lead_cycles * len(chunk))  # noqa: SLF001  # the only busy-wait
        lead[1].record()
        for name in chunk:
            before, after = _events()
            flush.zero_()
            before.record()
            launches[name]()
            after.record()
            events[name] = (before, after)
        torch.cuda.synchronize()
        clocks.append(lead_cycles * len(chunk) / (1e3 * lead[0].elapsed_time(lead[1])))
        result |= {name: before.elapsed_time(after) for name, (before, after) in events.items()}
    return result, min(clocks, default=0.0)


def _events() -> tuple[Any, Any]:
    """Returns two events that take times."""
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


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
