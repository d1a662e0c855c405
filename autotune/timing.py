"""Times kernels against each other: interleaved, so that a change of clocks meets all of them, and with a cold L2.

Only the device is timed. Everything is queued behind a busy-wait before the device begins, and what can be captured is
replayed as a CUDA graph, so that many small operations of one launch follow each other without the host.

Each round also tells the multiprocessors' clock: the busy-wait counts cycles, and events time it. Rounds in which the
clock was down are dropped; candidates are compared round by round.
"""

from __future__ import annotations

import statistics
import time
import warnings
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
# Clock cycles of that wait for each launch (about 65 us): the host is to be done before the wait is over, so that the
# events of a launch never enclose the time the host took to queue it. Where it was late, it gets up to 2**5 times that.
LEAD_CYCLES: Final = 120_000
MOST_DOUBLINGS: Final = 5
# Launches by which the host's time is known, and the time of one from which on it does not matter.
HOST_LAUNCHES: Final = 7
BUSY_SECONDS: Final = 0.005
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
    launch, which grows where the host's work outlasts it; ``notice`` is called before each round.
    Candidates slower than ``LAGGARD`` times the fastest of the first round keep that one sample.
    """
    record = Record({name: [] for name in launches})
    running = dict(launches)
    stopwatch = _Stopwatch(device, lead_cycles) if device.type == "cuda" else None
    for number in range(rounds):
        notice()
        if stopwatch is None:
            timed = _time_on_cpu(running)
        else:
            timed, clock = stopwatch.time(running)
            record.clocks.append(clock)
        for name, milliseconds in timed.items():
            record.samples[name].append(milliseconds)
        if number == 0:
            fastest = min(timed.values(), default=0.0)
            running = {name: run for name, run in launches.items() if timed[name] <= LAGGARD * fastest}
    return record


def pool(device: torch.device) -> Any:
    """Returns a pool of memory that graphs may share of which one runs at a time; None on a CPU."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


def replay(launch: Launch, pool: Any) -> Launch:
    """Returns the replay of a CUDA graph of ``launch``, which must have run before, with its memory in ``pool``.

    Returns ``launch`` itself without a pool, and where it cannot be captured: because it waits for the device, for
    example, or for want of memory. Raises what a replay raises.
    """
    if pool is None:
        return launch
    graph = torch.cuda.CUDAGraph()
    try:
        # A capture that fails leaves its stream behind as the current one; the stream's context brings ours back.
        with warnings.catch_warnings(), torch.cuda.stream(torch.cuda.current_stream()):
            warnings.simplefilter("ignore")  # torch's, of the empty graph that a failure leaves
            with torch.cuda.graph(graph, pool=pool):
                launch()
    except RuntimeError:
        return launch
    graph.replay()  # the first one uploads it
    torch.cuda.synchronize()
    return graph.replay


def host_ms(launch: Launch, wait: Launch) -> float:
    """Returns the median milliseconds that the host takes to queue ``launch``, each time for an idle device.

    One sample will do where the device takes so long that nobody waits for the host.
    """
    samples = []
    for _ in range(HOST_LAUNCHES):
        started = time.perf_counter()
        launch()
        samples.append(1e3 * (time.perf_counter() - started))
        wait()
        if time.perf_counter() - started > BUSY_SECONDS:
            break
    return statistics.median(samples)


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


class _Stopwatch:
    """Times launches on a GPU; knows how much of a lead the host needs, and finds more if it was late."""

    def __init__(self, device: torch.device, lead_cycles: int) -> None:
        self._flush = _flush_buffer(device)
        self._lead_cycles = lead_cycles
        self._most_cycles = lead_cycles << MOST_DOUBLINGS
        self._at_once = LAUNCHES_A_LEAD

    def time(self, launches: Mapping[str, Launch]) -> tuple[dict[str, float], float]:
        """Returns the milliseconds of each launch, and the multiprocessors' clock in MHz (the lowest met)."""
        result: dict[str, float] = {}
        clocks: list[float] = []
        waiting = list(launches)
        while waiting:
            chunk = waiting[: self._at_once]
            timed, clock, late = self._time({name: launches[name] for name in chunk})
            if late and self._lead_cycles < self._most_cycles:
                self._lead_cycles *= 2
                self._at_once = max(self._at_once // 2, 1)  # it may have been the queue that was full
                continue
            result |= timed
            clocks.append(clock)
            waiting = waiting[len(chunk) :]
        return result, min(clocks, default=0.0)

    def _time(self, launches: Mapping[str, Launch]) -> tuple[dict[str, float], float, bool]:
        """Returns milliseconds, the clock in MHz, and whether the device began before the host had queued everything."""
        cycles = self._lead_cycles * len(launches)
        wait = _events()
        wait[0].record()
        torch.cuda._sleep(cycles)  # noqa: SLF001  # the only busy-wait
        wait[1].record()
        events: dict[str, tuple[Any, Any]] = {}
        for name, launch in launches.items():
            before, after = _events()
            self._flush.zero_()
            before.record()
            launch()
            after.record()
            events[name] = (before, after)
        late = wait[1].query()
        torch.cuda.synchronize()
        clock = cycles / (1e3 * wait[0].elapsed_time(wait[1]))
        return {name: before.elapsed_time(after) for name, (before, after) in events.items()}, clock, late


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
