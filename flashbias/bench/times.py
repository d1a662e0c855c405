"""Takes the times of providers: forward and backward apart, interleaved, with a cold L2, paired with ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import torch

from autotune.timing import Record, interleaved
from flashbias.bench.results import OURS, Timing

Launch = Callable[[], None]

# A head start of about 1 ms for the host: a whole backward through autograd takes it up to 0.8 ms, and kernels shall be
# timed, not the host.
_LEAD_CYCLES: Final = 2_000_000


def timings(launches: Mapping[str, Launch], rounds: int, device: torch.device, work: float) -> dict[str, Timing]:
    """Returns the figures of each launch, all of them run once a round; ``work`` is the useful operations of each."""
    record = interleaved(launches, rounds, device, lead_cycles=_LEAD_CYCLES)
    found = {}
    for name, figures in record.figures().items():
        ms = float(figures["ms"])
        found[name] = Timing(
            ms=ms,
            p20=float(figures["p20"]),
            p80=float(figures["p80"]),
            samples=int(figures["samples"]),
            tflops=work / ms / 1e9,
            over_ours=_over(record, name, OURS) if OURS in launches else None,
            sm_mhz=int(figures["sm_mhz"]) if "sm_mhz" in figures else None,
            throttled=int(figures.get("throttled", 0)),
        )
    return found


def _over(record: Record, name: str, other: str) -> float:
    """Returns the median over rounds of the time of ``name`` as a multiple of that of ``other`` in the same round."""
    if name == other:
        return 1.0
    pair = Record({each: record.samples[each] for each in (name, other)}, record.clocks).figures()
    if float(pair[other]["ms"]) <= float(pair[name]["ms"]):
        return float(pair[name]["paired"])
    return 1.0 / float(pair[other]["paired"])


def groups(held: Mapping[str, int], room: int) -> list[list[str]]:
    """Returns the providers in groups whose graphs, of ``held`` bytes each, fit in ``room`` together.

    Ours leads every group, so that everyone is timed beside it. One that does not fit beside ours has a group to try it.
    """
    first = [OURS] if OURS in held else []
    made: list[list[str]] = []
    left = 0
    for name in sorted((name for name in held if name not in first), key=lambda name: held[name]):
        if not made or held[name] > left:
            made.append([*first])
            left = room - sum(held[each] for each in first)
        made[-1].append(name)
        left -= held[name]
    return made or [first]


def in_groups(
    parts: Sequence[Sequence[str]],
    build: Callable[[str], Launch],
    rounds: int,
    device: torch.device,
    work: float,
) -> dict[str, Timing]:
    """Returns the figures of each provider, one group after the other; ``build`` makes what is launched, and holds its graph.

    A group that runs out of memory is taken apart; a provider that does so even beside ours alone has no figures.
    """
    found: dict[str, Timing] = {}
    for part in parts:
        measured = _group(part, build, rounds, device, work)
        if measured is None:
            others = [[OURS, name] if OURS in part else [name] for name in part if name != OURS]
            smaller = others if len(others) > 1 else [[OURS]] if len(part) > 1 else []
            measured = in_groups(smaller, build, rounds, device, work)
        for name, timing in measured.items():
            found.setdefault(name, timing)
    return found


def _group(
    part: Sequence[str], build: Callable[[str], Launch], rounds: int, device: torch.device, work: float
) -> dict[str, Timing] | None:
    """Returns the figures of one group, None when it ran out of memory; its graphs end here."""
    launches: dict[str, Launch] = {}
    try:
        for name in part:
            launches[name] = build(name)
        return timings(launches, rounds, device, work)
    except torch.OutOfMemoryError:
        return None
