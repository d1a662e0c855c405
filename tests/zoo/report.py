"""Measures the gate against the zoo: ``python -m tests.zoo.report [--good 500] [--seconds 240] [--json FILE]``.

Prints three tables in Markdown: what became of every bad kernel and in how many seconds, what the gate costs for each
candidate, and how many good candidates it rejected. On the first GPU, or with TRITON_INTERPRET=1 in the interpreter,
small. It ends itself when its seconds are over and says how far it came.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotune.device import DeviceInfo, describe, interpreting
from autotune.errors import AutotuneError
from cache_db.models import Verdict
from tests.zoo.faults import ZOO
from tests.zoo.keeper import cages
from tests.zoo.survey import Case, Survey, quantile, survey

TRIAL_SECONDS = 10


@dataclass(frozen=True)
class Sighting:
    """One fault's verdict (None if it could not be judged), why, and the seconds until it was out."""

    fault: str
    verdict: Verdict | None
    reason: str
    seconds: float

    @property
    def right(self) -> bool:
        """Whether the verdict is the one that the fault deserves."""
        return self.verdict is ZOO[self.fault].verdict


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0 if every verdict was right and no good candidate was rejected, else 1."""
    device = describe(-1 if interpreting() else 0)
    shown = [name for name, exhibit in ZOO.items() if exhibit.interpreted or not device.interpreted]
    parser = argparse.ArgumentParser(prog="python -m tests.zoo.report", description=__doc__)
    parser.add_argument("--good", type=int, default=500, metavar="N", help="good candidates to meet (default 500)")
    parser.add_argument("--seconds", type=float, default=240, help="when to stop (default 240)")
    parser.add_argument("--faults", nargs="*", choices=shown, default=shown, metavar="NAME", help="of these alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to FILE")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + options.seconds
    sightings = list(look(device, options.faults, deadline))
    found = survey(device, options.good, deadline)
    tables = [zoo_table(sightings, options.faults), cost_table(found), rejection_table(found, options.good)]
    print("\n\n".join(tables))  # noqa: T201  # a command's output
    if options.json:
        options.json.write_text(json.dumps(as_json(device, sightings, found), indent=1), encoding="utf-8")
    right = all(sighting.right for sighting in sightings)
    return int(not right or any(case.rejected_wrongly for case in found.cases))


def look(device: DeviceInfo, faults: Sequence[str], deadline: float) -> Iterator[Sighting]:
    """Yields what becomes of each fault, in one pair of sandboxes, until the ``deadline``."""
    with cages(device, TRIAL_SECONDS) as zoo:
        if faults and time.monotonic() < deadline:  # the children start, and know the answers, before anything is timed
            for layout in {ZOO[fault].layout for fault in faults}:
                zoo.show_good(level=2, layout=layout)
        for fault in faults:
            if time.monotonic() >= deadline:
                return
            started = time.monotonic()
            try:
                outcome = zoo.show(fault)
            except AutotuneError as error:
                yield Sighting(fault, None, str(error), time.monotonic() - started)
            else:
                yield Sighting(fault, outcome.verdict, outcome.reason, time.monotonic() - started)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Returns a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |" for line in lines)


def zoo_table(sightings: Sequence[Sighting], faults: Sequence[str]) -> str:
    """Returns fault, verdict and seconds of each sighting, as docs/proof.md has them, and what went wrong."""
    rows = [
        (ZOO[each.fault].kernel, ZOO[each.fault].sentence, f"`{each.verdict}`", f"{each.seconds:.2f}")
        for each in sightings
    ]
    lines = [table(("kernel", "fault", "verdict", "seconds"), rows), ""]
    right = sum(each.right for each in sightings)
    lines.append(f"{right} of {len(faults)} faults ended as their own verdict.")
    lines += [
        f"* {each.fault}: expected {ZOO[each.fault].verdict}, got {each.verdict}: {each.reason}"
        for each in sightings
        if not each.right
    ]
    return "\n".join(lines)


def cost_table(found: Survey) -> str:
    """Returns the gate's seconds for one candidate that is compiled already, at both levels."""
    rows = []
    for level, of in (("1", lambda case: case.quick), ("2", lambda case: case.whole)):
        for name, first in (("a problem's first", True), ("every other", False)):
            seconds = [of(case).seconds for case in found.cases if case.first is first and of(case).safe]
            figures = [f"{quantile(seconds, part):.3f}" for part in (0.5, 0.9, 1.0)]
            rows.append((level, name, len(seconds), *figures))
    longest = max((case.quick.seconds for case in found.cases if case.quick.safe), default=0.0)
    summary = f"Level 1 took at most {longest:.2f} s after compilation (goal: 1 s)."
    return table(("level", "candidate", "count", "p50 s", "p90 s", "max s"), rows) + f"\n\n{summary}"


def rejection_table(found: Survey, good: int) -> str:
    """Returns how many candidates of each problem were good and rejected, and every rejection with its reason."""
    rows = []
    for name in dict.fromkeys(case.problem for case in found.cases):
        mine = [case for case in found.cases if case.problem == name]
        rejected = [case for case in mine if not case.whole.safe]
        wrongly = sum(case.rejected_wrongly for case in rejected)
        rows.append((name, len(mine), sum(case.good for case in mine), len(rejected), wrongly))
    lines = [table(("problem", "candidates", "good", "rejected", "falsely"), rows), ""]
    wrongly = sum(case.rejected_wrongly for case in found.cases)
    lines.append(
        f"{wrongly} of {found.good} good candidates were rejected ({good} were asked for); {found.impossible} more do "
        f"not compile or fit here; {found.seconds:.0f} s."
    )
    lines += [f"* {_rejection(case)}" for case in found.rejected]
    lines += [f"* {name} was given up: {reason}" for name, reason in found.given_up.items()]
    return "\n".join(lines)


def as_json(device: DeviceInfo, sightings: Sequence[Sighting], found: Survey) -> dict[str, Any]:
    """Returns every figure as plain data."""
    return {
        "device": device.to_json(),
        "zoo": [{**vars(each), "expected": ZOO[each.fault].verdict} for each in sightings],
        "candidates": [
            {
                "problem": case.problem,
                "kernel": case.kernel,
                "config": case.config.model_dump(),
                "first": case.first,
                "level1_seconds": case.quick.seconds,
                "level2_seconds": case.whole.seconds,
                "level1": case.quick.verdict,
                "level2": case.whole.verdict,
                "reason": case.whole.reason,
                "rejected_wrongly": case.rejected_wrongly,
            }
            for case in found.cases
        ],
        "impossible": found.impossible,
        "given_up": found.given_up,
        "seconds": found.seconds,
    }


def _rejection(case: Case) -> str:
    how = "falsely rejected" if case.rejected_wrongly else "rejected"
    return f"{how}: {case.problem}, {case.kernel} {case.config}: {case.whole.verdict}, {case.whole.reason}"


if __name__ == "__main__":
    sys.exit(main())
