"""One config on its way through a sweep, and what is known of it by then."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from cache_db.models import Config, Scalar, Trial, Verdict

TIMES: Final = ("ms", "p20", "p80", "paired", "host_ms")


@dataclass
class Candidate:
    """One config on its way through the sweep: ``ready`` to run (compiled), then ``settled`` (judged or dropped)."""

    config: Config
    ready: bool = False
    settled: bool = False
    figures: dict[str, Scalar] = field(default_factory=dict)
    trial: Trial | None = None

    @property
    def ms(self) -> float:
        """Median milliseconds at the representative size, infinite while unknown."""
        return float(self.figures.get("ms", math.inf))

    @property
    def host_ms(self) -> float:
        """Median milliseconds that the host takes to queue a launch, infinite while unknown."""
        return float(self.figures.get("host_ms", math.inf))

    @property
    def repeats(self) -> int:
        """How many race repeats a stored proof of it has passed, 0 where that is not known."""
        found = self.trial.figures.get("repeats") if self.trial else None
        return found if type(found) is int and self.safe else 0  # a row's may be anything

    @property
    def paired(self) -> tuple[float, float]:
        """What the best few are ordered by: their time beside the best's in the same rounds, then milliseconds."""
        return float(self.figures.get("paired", math.inf)) if self.ms < math.inf else math.inf, self.ms

    @property
    def safe(self) -> bool:
        """Whether this candidate has passed the gate and has a time to be compared by."""
        proven = self.trial is not None and self.trial.verdict is Verdict.SAFE and self.trial.level >= 2
        return proven and self.ms < math.inf

    def resume(self, trial: Trial) -> None:
        """Takes over what ``trial`` found.

        A time that cannot be one (an edited row, or one of another program's) is dropped, to be taken again, and so is
        one at smaller sizes than the problem's own.
        """
        self.trial = trial
        self.figures = dict(trial.figures)
        if "timed_at" in self.figures or not all(_timed(self.figures[name]) for name in TIMES if name in self.figures):
            self.untime()
        self.settled = trial.verdict is not Verdict.SAFE or self.safe

    def untime(self) -> None:
        """Forgets the times, and at which smaller sizes they were taken."""
        for name in (*TIMES, "timed_at"):
            self.figures.pop(name, None)


def at_other_sizes(pool: Iterable[Candidate], timed: Iterable[Candidate]) -> list[Candidate]:
    """Returns those of ``pool`` whose times do not compare with those just ``timed``: they are of other sizes."""
    sizes = {each.figures.get("timed_at") for each in timed if each.ms < math.inf}
    return [each for each in pool if sizes and each.ms < math.inf and each.figures.get("timed_at") not in sizes]


def hosts(pool: Iterable[Candidate]) -> dict[str, float]:
    """Returns the least host time met of each implementation in ``pool``; nothing where there is only one, or no time.

    Configs of one implementation queue the same launches: what differs between their host times is noise, which must
    not choose among them. Between implementations it decides where the device is done before the host.
    """
    found: dict[str, float] = {}
    timed = [each for each in pool if each.ms < math.inf]
    for each in timed:
        name = each.config.implementation
        found[name] = min(found.get(name, math.inf), each.host_ms)
    return found if len(found) > 1 and max(found.values()) < math.inf else {}


def cost(candidate: Candidate, host: Mapping[str, float]) -> float:
    """Returns the milliseconds that a caller waits: the device's, or the host's (of ``hosts``) where those are more."""
    return max(candidate.ms, host.get(candidate.config.implementation, 0.0))


def ranked(finalists: Iterable[Candidate]) -> list[Candidate]:
    """Returns those that were timed in the same rounds, best first: implementations by cost, then each by itself."""
    found = sorted(finalists, key=lambda each: each.paired)
    host = hosts(found)
    if not host:
        return found
    fastest = found[0].ms
    best: dict[str, float] = {}
    for each in found:  # the first of each implementation is its best
        name = each.config.implementation
        best.setdefault(name, max(each.paired[0], host[name] / fastest) if each.ms < math.inf else math.inf)
    return sorted(found, key=lambda each: (best[each.config.implementation], each.config.implementation, each.paired))


def told(trial: Trial) -> str:
    """Returns the trial's verdict in words: what was too slow to be proven is not called safe."""
    return "timed only" if trial.verdict is Verdict.SAFE and not trial.level else trial.verdict.value


def _timed(value: Scalar) -> bool:
    """Returns whether ``value`` can be a time in milliseconds."""
    return isinstance(value, float) and 0.0 < value < math.inf
