"""Asks whether a sweep repeats: ``python -m tests.zoo.picks [--sweeps 10] [--rounds 200] [shape flags]``.

Each sweep starts from a fresh database (Triton's cache is shared, so that only the first compiles) and picks a config of
each kernel. All distinct picks of a kernel are then timed against each other, behind the same upstream configs: those of
the first sweep. The spread is how much slower the worst pick is than the best. The shape flags are those of
scripts/prewarm.py. On the first GPU, or with TRITON_INTERPRET=1 in the interpreter, whose times are no speeds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from autotune import AutotuneError, Settings, resolve
from autotune.device import DeviceInfo, describe, interpreting
from autotune.sandbox import Sandbox
from autotune.spec import load
from cache_db.models import Config, Problem, Scalar
from flashbias.cli import shapes
from flashbias.errors import FlashBiasError
from flashbias.kernels.problem import problem
from tests.zoo.report import table

Picks = dict[str, Config]
GOAL_PER_CENT = 2.0


@dataclass(frozen=True)
class Spread:
    """The distinct picks of one kernel: how often each was picked, and its times against the others."""

    kernel: str
    counts: Counter[Config]
    figures: Mapping[Config, Mapping[str, Scalar]]

    @property
    def per_cent(self) -> float:
        """By how many per cent the slowest pick is slower than the fastest; infinite where one could not be timed."""
        times = [float(figures["ms"]) for figures in self.figures.values()]
        return 100 * (max(times) / min(times) - 1) if len(times) == len(self.counts) else float("inf")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0 if no spread is over 2 %, 1 if one is, 2 if a sweep found nothing."""
    parser = argparse.ArgumentParser(prog="python -m tests.zoo.picks", description=__doc__)
    shapes.add_arguments(parser)
    parser.add_argument("--sweeps", type=int, default=10, metavar="N", help="fresh sweeps of each problem (default 10)")
    parser.add_argument("--rounds", type=int, default=200, metavar="N", help="times of each pick (default 200)")
    parser.add_argument("--budget", type=float, default=120, metavar="S", help="seconds of one sweep (default 120)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to FILE")
    options = parser.parse_args(arguments)
    device = describe(-1 if interpreting() else 0)
    results: list[tuple[str, list[Spread]]] = []
    try:
        for shape in shapes.from_arguments(options):
            found = problem(shape, device)
            picked = sweeps(found, device, options.sweeps, options.budget)
            spreads = compare(found, device, picked, options.rounds)
            results.append((shape.model_dump_json(exclude_defaults=True), spreads))
            text = f"{results[-1][0]}\n\n{as_table(spreads, options.sweeps)}\n"
            print(text, flush=True)  # noqa: T201  # a command's output
    except (FlashBiasError, AutotuneError) as error:
        print(f"picks: {error}", file=sys.stderr)  # noqa: T201  # a command's complaint
        return 2
    if options.json:
        options.json.write_text(json.dumps([as_json(*each) for each in results], indent=1), encoding="utf-8")
    worst = max(spread.per_cent for _, spreads in results for spread in spreads)
    return int(worst > GOAL_PER_CENT)


def sweeps(found: Problem, device: DeviceInfo, count: int, budget: float) -> list[Picks]:
    """Returns what each of ``count`` sweeps picks, each from a fresh database. Raises AutotuneError if one picks nothing."""
    picked: list[Picks] = []
    for _ in range(count):
        with tempfile.TemporaryDirectory() as folder:
            how = Settings(cache_dir=Path(folder), budget_seconds=budget, finish=True, log="quiet")
            result = resolve(found, device, how)
        rungs = {choice.rung for choice in result.choices.values()}
        if rungs != {"winner"}:
            raise AutotuneError(f"sweep {len(picked) + 1} of {count} has no winner: {result.reason}")
        picked.append({kernel: choice.config for kernel, choice in result.choices.items()})
    return picked


def compare(found: Problem, device: DeviceInfo, picked: Sequence[Picks], rounds: int) -> list[Spread]:
    """Returns the distinct picks of each kernel, timed in turn for ``rounds`` rounds behind those of the first sweep."""
    spec = load(found.spec)
    spreads = []
    with Sandbox(found, device) as sandbox:
        for kernel in spec.kernels(found):
            counts = Counter(each[kernel] for each in picked)
            through = {name: picked[0][name] for name in spec.depends_on(kernel, found)}
            timed = sandbox.measure(kernel, list(counts), through, rounds)
            figures = {config: timed[config.hash] for config in counts if config.hash in timed}
            spreads.append(Spread(kernel, counts, figures))
    return spreads


def as_table(spreads: Sequence[Spread], count: int) -> str:
    """Returns a Markdown table of every pick with its times, and the spread of each kernel."""
    rows = []
    for spread in spreads:
        for config, times in spread.counts.most_common():
            figures = spread.figures.get(config, {})
            row = [f"{float(figures[name]):.4f}" if name in figures else "failed" for name in ("ms", "p20", "p80")]
            rows.append((spread.kernel, config, f"{times} of {count}", *row))
    lines = [f"{spread.kernel}: spread {spread.per_cent:.2f} % ({len(spread.counts)} picks)" for spread in spreads]
    return table(("kernel", "pick", "sweeps", "median ms", "p20", "p80"), rows) + "\n\n" + "\n".join(lines)


def as_json(shape: str, spreads: Sequence[Spread]) -> dict[str, object]:
    """Returns every figure of one shape as plain data."""
    return {
        "shape": json.loads(shape),
        "kernels": {
            spread.kernel: {
                "spread_per_cent": spread.per_cent,
                "picks": [
                    {"config": config.model_dump(), "sweeps": times, **spread.figures.get(config, {})}
                    for config, times in spread.counts.items()
                ],
            }
            for spread in spreads
        },
    }


if __name__ == "__main__":
    sys.exit(main())
