"""Tunes attention shapes before they are needed; what is tuned already is left alone.

Every trial is stored as it ends, so a run that was stopped or killed goes on where it was when it is started again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from autotune import DeviceInfo, Mode, Resolution, Settings, SettingsError, resolve, spaces
from autotune.messages import summary
from autotune.progress import remaining
from autotune.soak import INTERPRETER_REPEATS, REPEATS
from autotune.spec import load
from cache_db.models import Problem
from flashbias.cli import shapes
from flashbias.cli.devices import device as device_of
from flashbias.cli.guard import guarded
from flashbias.cli.soak import soaked
from flashbias.errors import FlashBiasError
from flashbias.kernels.problem import Shape, problem
from flashbias.settings import current, settings

BUDGET_SECONDS: Final = 600.0
DONE, UNFINISHED = 0, 1
_STOPPED: Final = "stopped; finished trials are kept, run the same command to go on"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code: 0 when every problem has a winner, else 1 (2 for wrong usage)."""
    return guarded("prewarm", lambda: _run(arguments), (FlashBiasError, SettingsError), _STOPPED)


def _run(arguments: Sequence[str] | None) -> int:
    options = _parser().parse_args(arguments)
    device = device_of(options.device)
    problems = _problems(shapes.from_arguments(options), device)
    mode = Mode.RETUNE if options.retune else Mode.TUNE
    folder = options.cache_dir or current().cache_dir
    if options.space is not None:
        # As `python -m` would, but last: nothing there may shadow what is installed.
        sys.path.append(str(Path.cwd()))
    with settings(
        mode=mode,
        cache_dir=folder,
        budget_seconds=options.budget,
        wait_seconds=options.budget,
        finish=True,
        space=options.space,
    ) as chosen:
        return warm(problems, device, chosen, _repeats(options.soak, device))


def warm(problems: Sequence[Problem], device: DeviceInfo, chosen: Settings, repeats: int = 0) -> int:
    """Tunes ``problems`` one after the other, printing a line for each; returns the exit code.

    With ``repeats`` each problem's winners are soaked with so many.
    """
    failed = 0
    start = time.monotonic()
    for number, each in enumerate(problems):
        left = f", {remaining(number, len(problems), time.monotonic() - start)} left" if number else ""
        print(f"[{number + 1}/{len(problems)}{left}] {summary(each)}", flush=True)
        for line in _offered(each, device, chosen):
            print(f"    {line}", flush=True)
        before = time.monotonic()
        found = resolve(each, device, chosen)
        if repeats and found.won:
            found = soaked(each, device, chosen, found, repeats, lambda line: print(f"    {line}", flush=True))
        failed += not found.won
        print(f"    {_told(found, time.monotonic() - before)}", flush=True)
    ready = len(problems) - failed
    print(f"{ready} of {len(problems)} problems have proven winners in {time.monotonic() - start:.0f} s")
    return UNFINISHED if failed else DONE


def _repeats(asked: int | None, device: DeviceInfo) -> int:
    """Returns how many repeats a soak has: 0 for none, ``asked`` -1 means the usual number."""
    usual = INTERPRETER_REPEATS if device.interpreted else REPEATS
    return 0 if asked is None else usual if asked < 0 else asked


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text[:12]) <= 10**9:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to 1000000000, got {text!r}")
    return int(text)


def _offered(each: Problem, device: DeviceInfo, chosen: Settings) -> Iterator[str]:
    """Yields what the space adds to each kernel's candidates, and how many of its configs the rules refuse, and why."""
    if chosen.space is None:
        return
    for kernel in load(each.spec).kernels(each):
        offer = spaces.offer(chosen.space, kernel, each, device)
        line = f"{chosen.space}: {len(offer.configs)} configs for {kernel}"
        if offer.refused:
            config, reason = offer.refused[0]
            line += f", {len(offer.refused)} refused by the rules, the first: {config}: {reason}"
        yield line


def _told(found: Resolution, seconds: float) -> str:
    if not found.won:
        return f"NO WINNER after {seconds:.1f} s: {found.reason}"
    verb = f"tuned in {seconds:.1f} s" if found.swept else "already tuned"
    configs = "; ".join(f"{kernel}: {choice.config}" for kernel, choice in found.choices.items())
    return f"{verb}, {found.reason} in {found.location}; {configs}"


def _problems(wanted: Sequence[Shape], device: DeviceInfo) -> list[Problem]:
    """Returns the problems of the shapes, each once: several shapes may share one."""
    return list(dict.fromkeys(problem(shape, device) for shape in wanted))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prewarm",
        description="Tunes attention shapes before they are needed. Stop it at any time; started again it goes on.",
    )
    shapes.add_arguments(parser)
    parser.add_argument(
        "--budget",
        type=float,
        default=BUDGET_SECONDS,
        metavar="SECONDS",
        help=f"longest sweep of one problem (default {BUDGET_SECONDS:g})",
    )
    parser.add_argument("--cache-dir", type=Path, help="folder of the database (default: as for the library)")
    parser.add_argument("--device", type=int, metavar="N", help="CUDA device (default: the current one)")
    parser.add_argument(
        "--space", metavar="MODULE:ATTRIBUTE", help="candidates of your own, tried and proven beside the others"
    )
    parser.add_argument("--retune", action="store_true", help="sweep again over stored winners")
    parser.add_argument(
        "--soak",
        nargs="?",
        type=_count,
        const=-1,
        metavar="REPEATS",
        help=f"then put each winner through so many race repeats (default {REPEATS:,}), for level 3",
    )
    return parser
