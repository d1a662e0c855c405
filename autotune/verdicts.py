"""What becomes of a config that is compiled or raises: a verdict, and its reason in one line."""

from __future__ import annotations

import time
from typing import Final

from triton.runtime.errors import OutOfResources

from autotune import room
from autotune.device import DeviceInfo
from autotune.process import Message
from autotune.spec import KernelSpec
from cache_db.models import Config, Problem, Verdict

LONGEST_REASON: Final = 400


def summarize(error: BaseException) -> str:
    """Returns an exception as one line: its type and first line, and the last where there are more.

    Triton's compile errors name the place first and the trouble last, with the source between.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ... ".join(dict.fromkeys(lines[:1] + lines[-1:]))
    return f"{type(error).__name__}: {text}"[:LONGEST_REASON]


def verdict_of(error: BaseException, *, compiling: bool) -> Verdict:
    """Returns what an exception raised by a candidate makes of it."""
    if isinstance(error, OutOfResources):
        return Verdict.OUT_OF_RESOURCES
    if room.ran_out(error):
        return Verdict.KILLED  # the device may just be full today
    if compiling and not _passing(error):
        return Verdict.COMPILE_ERROR
    return Verdict.CRASHED


def _passing(error: BaseException) -> bool:
    """Returns whether a compile failed for want of disk, memory or an assembler, which is no candidate's fault.

    Triton reports an assembler that was killed or could not write as an error of its own.
    """
    text = str(error)
    return isinstance(error, OSError) or any(sign in text for sign in ("No space left", "Cannot find", "error code -"))


def compile_one(spec: KernelSpec, problem: Problem, device: DeviceInfo, question: Message) -> Message:
    """Compiles one config and returns the outcome; raises nothing."""
    started = time.monotonic()
    try:
        compiled = spec.compile(question["kernel"], Config(**question["config"]), problem, device)
    except Exception as error:  # noqa: BLE001  # a candidate may raise anything; all of it is a verdict
        verdict = verdict_of(error, compiling=True)
        return {"verdict": verdict, "reason": summarize(error), "seconds": time.monotonic() - started}
    seconds = time.monotonic() - started
    figures = {**compiled.stats, "compile_seconds": seconds}
    return {"verdict": Verdict.SAFE, "figures": figures, "binary": compiled.binary, "seconds": seconds}
