"""Compares the tuned operator with its peers: times, and errors against an fp64 oracle, on shapes given as for ``prewarm``.

With ``--json`` every result is kept as it comes, and a run with the same file goes on where an earlier one was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import torch

from autotune.errors import SettingsError
from flashbias.bench import figures, report, scoreboard
from flashbias.bench.campaign import measure
from flashbias.bench.compare import DeviceLost
from flashbias.bench.results import OURS, Book, Result
from flashbias.cli import shapes
from flashbias.cli.guard import FAILED, guarded
from flashbias.errors import ArgumentError
from flashbias.kernels.problem import Shape
from flashbias.settings import current

ROUNDS: Final = 15
_STOPPED: Final = "stopped; finished shapes are kept with --json, run the same command to go on"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code: 0 when ours was right everywhere, else 1 (2 for wrong usage)."""
    return guarded("benchmark", lambda: _run(_parser().parse_args(arguments)), _misuse(), _STOPPED)


def alibi_gpt2(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line of upstream's own benchmark; returns the same exit codes."""
    return guarded("benchmark", lambda: _run_settings(_settings_parser().parse_args(arguments)), _misuse(), _STOPPED)


def _misuse() -> tuple[type[Exception], ...]:
    return ArgumentError, SettingsError, figures.NoMatplotlib


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what both benchmarks take."""
    parser.add_argument(
        "--rounds", type=_positive, default=ROUNDS, help=f"timed runs of each provider (default {ROUNDS})"
    )
    parser.add_argument(
        "--providers", type=_names, default=(), metavar="A,B", help="only these providers (default: all)"
    )
    parser.add_argument(
        "--upstream", type=Path, metavar="DIR", help="upstream's folder flash_bias, to compare with it too"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep every figure in FILE, and skip what is there")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write a line for each provider and shape to FILE")
    parser.add_argument("--from-json", type=Path, metavar="FILE", help="measure nothing: show what an earlier run kept")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmark.py", description=__doc__)
    shapes.add_arguments(parser)
    add_arguments(parser)
    parser.add_argument(
        "--scoreboard", action="store_true", help="the ten shapes of the scoreboard, and what must hold there"
    )
    return parser


def _settings_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmark_alibi_gpt2.py",
        description="Upstream's own benchmark, forward and backward apart: 50 heads of GPT-2 with ALiBi's rank, by length.",
    )
    add_arguments(parser)
    known = list(figures.SETTINGS)
    parser.add_argument("--setting", nargs="+", choices=known, default=known[:1], help=f"which (default {known[0]})")
    lengths = figures.LENGTHS
    span = f"{lengths[0]} to {lengths[-1]}"
    parser.add_argument("--lengths", nargs="+", type=_positive, default=lengths, metavar="N", help=f"(default {span})")
    parser.add_argument(
        "--figure", type=Path, metavar="FILE", help="draw TFLOP/s over length as PNG, one for each setting"
    )
    return parser


def _run(options: argparse.Namespace) -> int:
    if options.from_json:
        found = _kept(options.from_json)
    else:
        wanted = list(scoreboard.SHAPES) if options.scoreboard else shapes.from_arguments(options)
        for shape in wanted:
            _comparable(shape)
        found = _measured(wanted, options)
    _show(found, options.csv)
    if options.scoreboard:
        _print(scoreboard.markdown([result for result in found if result.shape in scoreboard.SHAPES]))
    return _code(found)


def _run_settings(options: argparse.Namespace) -> int:
    if options.figure:
        figures.require()
    if options.from_json:
        found = _kept(options.from_json)
    else:
        wanted = [shape for setting in options.setting for shape in figures.shapes(setting, options.lengths)]
        found = _measured(wanted, options)
    _show(found, options.csv)
    if options.figure:
        for setting in options.setting:
            path = options.figure
            if len(options.setting) > 1:
                path = path.with_name(f"{path.stem}-{setting}{path.suffix}")
            figures.draw(found, setting, path)
            print(f"figure: {path}", file=sys.stderr)
    return _code(found)


def _measured(wanted: Sequence[Shape], options: argparse.Namespace) -> list[Result]:
    """Measures the shapes on the current GPU."""
    if not torch.cuda.is_available():
        raise ArgumentError("needs a CUDA device; timings of Triton's interpreter are not speeds")
    device = torch.device("cuda", torch.cuda.current_device())
    book = Book(options.json)
    try:
        return measure(wanted, options.providers, options.upstream, book, options.rounds, device, _notice)
    except DeviceLost:
        if options.json:
            print("benchmark: run the same command again: it goes on without that provider there", file=sys.stderr)
        raise


def _kept(path: Path) -> list[Result]:
    if not path.exists():
        raise ArgumentError(f"--from-json: there is no file {path}")
    return list(Book(path))


def _comparable(shape: Shape) -> None:
    """Raises ArgumentError for what would be left out of every figure without a word."""
    if shape.varlen:
        raise ArgumentError("varlen: packed sequences cannot be compared, the other providers have none")
    if shape.mask != "none":
        raise ArgumentError(f"mask: expected none, got {shape.mask}: masks are not compared yet")
    if shape.layout != "aligned":
        raise ArgumentError(f"layout: expected aligned, got {shape.layout}: inputs are contiguous here")


def _show(found: Sequence[Result], path: Path | None) -> None:
    for result in found:
        _print(report.markdown(result))
    if path is not None:
        with path.open("w", encoding="utf-8", newline="") as file:
            report.write_csv(found, file)


def _code(found: Sequence[Result]) -> int:
    """Returns 0 when ours was right in all that it computed."""
    ours = [row for result in found if (row := result.row(OURS)) is not None]
    return (
        FAILED if any(row.missing or row.right_forward is False or row.right_backward is False for row in ours) else 0
    )


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)


def _notice(line: str) -> None:
    if current().log != "quiet":
        print(line, file=sys.stderr, flush=True)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of 1 or more, got {text}")
    return value
