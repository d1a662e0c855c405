"""Tunes attention shapes before they are needed; what is tuned already is left alone.

Every trial is stored as it ends, so a run that was stopped or killed goes on where it was when it is started again. Under
torchrun or srun, or started many times with one database, it shares the work out (:mod:`flashbias.cli.crew`).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from autotune import DeviceInfo, Mode, Resolution, Settings, SettingsError, resolve, spaces
from autotune.messages import summary
from autotune.progress import heading
from autotune.soak import INTERPRETER_REPEATS, REPEATS
from autotune.spec import load
from cache_db import open_layers
from cache_db.layers import FILE_NAME
from cache_db.models import Problem
from flashbias.cli import precompile, shapes
from flashbias.cli.crew import Place, Speaker, has_winners, shared_out
from flashbias.cli.devices import device as device_of
from flashbias.cli.guard import guarded
from flashbias.cli.soak import soaked
from flashbias.errors import ArgumentError, FlashBiasError
from flashbias.kernels.problem import Shape, problem
from flashbias.settings import current, settings

BUDGET_SECONDS: Final = 600.0
DONE, UNFINISHED = 0, 1
ALONE: Final = Place()
PATIENCE: Final = 1.5  # budgets that a worker waits for another one that shows no progress
_STOPPED: Final = "stopped; finished trials are kept, run the same command to go on"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code: 0 when every problem has a winner, else 1 (2 for wrong usage)."""
    return guarded("prewarm", lambda: _run(arguments), (FlashBiasError, SettingsError), _STOPPED)


def _run(arguments: Sequence[str] | None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    folder = options.cache_dir or current().cache_dir
    if options.compile_only:
        given = any(getattr(options, name) != getattr(parser.parse_args([]), name) for name in shapes.NAMES)
        wanted = shapes.from_arguments(options) if given else None
        return precompiled(wanted, folder, options.target)
    place = Place.of(os.environ)
    place.keep_to_share()
    device = _device(options.device, place)
    problems = _problems(shapes.from_arguments(options), device)
    mode = Mode.RETUNE if options.retune else Mode.TUNE
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
        # The workers of a crew tune different problems, and agree on none.
        return warm(problems, device, replace(chosen, alone=True), _repeats(options.soak, device), place)


def warm(
    problems: Sequence[Problem], device: DeviceInfo, chosen: Settings, repeats: int = 0, place: Place = ALONE
) -> int:
    """Tunes ``problems``, printing lines for each unless another worker does; returns the exit code.

    With ``repeats`` each problem's winners are soaked with so many. ``place`` is this worker's in its crew.
    """
    store = open_layers(chosen.cache_dir, chosen.db_url, chosen.db_seconds, chosen.seeds)
    start = time.monotonic()
    since = time.time() if chosen.mode is Mode.RETUNE else 0.0
    done = failed = 0
    with Speaker(problems, store, place.size, since) as speaker:

        def tune(each: Problem, last: bool) -> Resolution:
            """Tunes one problem, or finds it tuned; when it is the ``last`` chance also below what others are at."""
            speaker.listen()
            note = f"{failed} without a winner" if failed else ""
            speaker.say(f"{heading(done, len(problems), time.monotonic() - start, note)} {summary(each)}")
            for line in _offered(each, device, chosen) if speaker.speaking else ():
                speaker.say(f"    {line}")
            again = chosen.mode is not Mode.RETUNE or has_winners(each, store, since)  # by another worker
            mode = Mode.TUNE if again else Mode.RETUNE
            before = time.monotonic()
            log = chosen.log if speaker.speaking else "quiet"  # bars of several workers would overwrite each other
            found = resolve(each, device, replace(chosen, mode=mode, leave=not last, wait_seconds=0.0, log=log))
            if repeats and found.won:
                found = soaked(each, device, chosen, found, repeats, lambda line: speaker.say(f"    {line}"))
            speaker.say(f"    {_told(found, time.monotonic() - before)}")
            return found

        for each, found in shared_out(place.first(problems), store, tune, PATIENCE * chosen.budget_seconds):
            done, failed = done + 1, failed + (not found.won)
            if not found.swept and problems.index(each) % place.local_size == place.local_rank:
                _compile(each, device, found, speaker)
        ready = len(problems) - failed
        speaker.say(f"{ready} of {len(problems)} problems have proven winners in {time.monotonic() - start:.0f} s")
    return UNFINISHED if failed else DONE


def precompiled(wanted: Sequence[Shape] | None, folder: Path | None, target: str | None) -> int:
    """Compiles stored winners (of ``wanted`` shapes, or all) into Triton's cache, without a GPU; returns the exit code.

    Raises ArgumentError for a ``target`` that is no architecture, and where there is nothing to compile.
    """
    from autotune.device import interpreting

    if interpreting():
        raise ArgumentError(
            "--compile-only: TRITON_INTERPRET is set, and functions of the interpreter cannot be compiled"
        )
    rows = precompile.winners(folder and folder / FILE_NAME, current().db_url)
    work = precompile.items(rows, wanted, target and precompile.capability(target))
    if not work:
        raise ArgumentError(
            f"--compile-only: none of the {len(rows)} stored winners is of this Triton and these kernels"
            f"{f' for {target}' if target else ''}; tune where the GPU is, or name shapes and a --target"
        )
    start, failed = time.monotonic(), 0
    for number, (item, fault) in enumerate(precompile.compiled(work, len(os.sched_getaffinity(0))), start=1):
        failed += bool(fault)
        print(f"[{number}/{len(work)}] {precompile.told(item, fault)}", flush=True)
    print(f"{len(work) - failed} of {len(work)} configs are in Triton's cache after {time.monotonic() - start:.0f} s")
    return UNFINISHED if failed else DONE


def _compile(each: Problem, device: DeviceInfo, found: Resolution, speaker: Speaker) -> None:
    """Has this node's Triton cache hold what was tuned elsewhere."""
    if not device.interpreted:
        configs = {kernel: choice.config for kernel, choice in found.choices.items()}
        fault = precompile.compile_here(each, configs, device)
        if fault:
            speaker.say(f"    not compiled ahead: {fault}")


def _device(asked: int | None, place: Place) -> DeviceInfo:
    """Returns the device that was ``asked`` for, else this worker's own of its node's."""
    import torch

    return device_of(place.device(torch.cuda.device_count()) if asked is None else asked)


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
        description="Tunes attention shapes before they are needed. Stop it at any time; started again it goes on. Any number "
        "of processes with one database, as torchrun or srun start them, share the work.",
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
    parser.add_argument(
        "--compile-only",
        action="store_true",
        help="tune nothing: compile stored winners into Triton's cache, where no GPU is needed",
    )
    parser.add_argument("--target", metavar="ARCH", help="with --compile-only: only for this architecture, e.g. sm_90")
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
