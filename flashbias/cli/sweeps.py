"""``flashbias cache sweeps``: who tuned what, where, when, and how long it took.

A sweep has no row of its own: it is told from its trials, each of which names its host, its GPU, when it ended and how long it
took. A trial that a later sweep repeated is counted there.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from autotune.candidate import told
from autotune.evidence import when
from cache_db.models import Problem, Trial
from flashbias.cli.database import about, open_store, short
from flashbias.cli.problems import brief, place
from flashbias.cli.text import tell

PAUSE_SECONDS: Final = 600.0
"""What lies further apart is told as two sweeps: longer than any candidate takes, and than a lease lasts."""


@dataclass(frozen=True)
class Swept:
    """The trials of one problem that one GPU made without a long pause, oldest first."""

    problem: Problem
    trials: tuple[Trial, ...]

    @property
    def began(self) -> float:
        """When the first trial began (epoch seconds)."""
        return self.trials[0].created_at - max(0.0, self.trials[0].seconds)

    @property
    def ended(self) -> float:
        """When the last trial ended (epoch seconds)."""
        return self.trials[-1].created_at

    @property
    def judging(self) -> float:
        """The seconds that went into compiling, timing and proving its candidates, one beside the other counted twice."""
        return sum(max(0.0, row.seconds) for row in self.trials)


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds ``sweeps`` to ``commands``; ``common`` has the flags of every command."""
    parser = commands.add_parser(
        "sweeps", parents=[common], help="who tuned what, where and how long", description=__doc__
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints every sweep, the oldest first; returns 0."""
    store = open_store(options.cache_dir)
    found = sweeps(store.find(Trial))
    if options.json:
        print(json.dumps({"database": str(store.path), "rows": [_data(each) for each in found]}, indent=1))
        return 0
    for each in found:
        tell(_lines(each))
    spent = sum(each.ended - each.began for each in found)
    print(f"{len(found)} sweeps, {spent:.1f} s in all, in {store.path}")
    return 0


def sweeps(trials: Iterable[Trial]) -> list[Swept]:
    """Returns ``trials`` by sweep, the oldest first."""
    groups: dict[tuple[Problem, str, str], list[Trial]] = defaultdict(list)
    for row in sorted(trials, key=lambda row: row.created_at):
        groups[row.problem, row.host, row.gpu_uuid].append(row)
    found = [Swept(at, part) for (at, _, _), rows in groups.items() for part in _parts(rows)]
    return sorted(found, key=lambda each: (each.began, each.problem.hash))


def _parts(rows: list[Trial]) -> Iterator[tuple[Trial, ...]]:
    """Yields ``rows`` in parts with a long pause between them."""
    first = 0
    for index in range(1, len(rows)):
        if rows[index].created_at - max(0.0, rows[index].seconds) - rows[index - 1].created_at > PAUSE_SECONDS:
            yield tuple(rows[first:index])
            first = index
    yield tuple(rows[first:])


def _lines(each: Swept) -> Iterator[str]:
    row = each.trials[0]
    where = f"{row.host}{f', {row.gpu_uuid}' if row.gpu_uuid else ''}"
    yield f"{short(each.problem.hash)}  {place(each.problem)}  {brief(each.problem)}"
    counts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(_verdicts(each).items()))
    spent = f"{each.ended - each.began:.1f} s, {each.judging:.1f} s of them judging"
    yield f"    on {where}, {when(each.began)}: {len(each.trials)} tried ({counts}) in {spent}"


def _verdicts(each: Swept) -> Counter[str]:
    return Counter(told(row) for row in each.trials)


def _data(each: Swept) -> dict[str, object]:
    row = each.trials[0]
    return {
        "problem": about(each.problem),
        "host": row.host,
        "gpu_uuid": row.gpu_uuid,
        "driver": row.environment.driver,
        "began": each.began,
        "ended": each.ended,
        "judging_seconds": each.judging,
        "tried": len(each.trials),
        "verdicts": dict(_verdicts(each)),
    }
