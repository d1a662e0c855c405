"""How a command ends: errors, Ctrl-C and outputs that are closed, full or left by their reader become exit codes."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final, TextIO

from autotune.errors import AutotuneError
from cache_db.errors import CacheError
from flashbias.cli.text import printable
from flashbias.errors import FlashBiasError

FAILED: Final = 1
MISUSED: Final = 2
STOPPED: Final = 130
_STDERR: Final = 2  # its descriptor, the last of the three


def guarded(
    name: str, command: Callable[[], int], misused: tuple[type[Exception], ...], stopped: str = "stopped"
) -> int:
    """Runs ``command``, which may print; returns its exit code, or that of what ended it, told on stderr after ``name``.

    Errors in ``misused`` are wrong usage, ``stopped`` is said after Ctrl-C. SystemExit, with which argparse ends, is
    raised on.
    """
    _open_closed_streams()
    _speak_any_language()
    try:
        return _finished(command)
    except misused as error:
        _complain(name, error)
        return MISUSED
    except (FlashBiasError, AutotuneError, CacheError) as error:
        _complain(name, error)
        return FAILED
    except KeyboardInterrupt:
        _complain(name, stopped)
        return STOPPED
    except BrokenPipeError:  # whoever read stdout has seen enough
        _drop(sys.stdout)
        return FAILED
    except OSError as error:  # stdout on a full disk, a folder that may not be looked into
        _complain(name, error)
        _drop(sys.stdout)
        return FAILED


def _finished(command: Callable[[], int]) -> int:
    """Returns what ``command`` returns once all that it printed is written."""
    try:
        code = command()
    except SystemExit:  # argparse has printed its help or the version
        sys.stdout.flush()
        raise
    sys.stdout.flush()
    return code


def _complain(name: str, what: object) -> None:
    """Prints ``what`` to stderr; its own lines stay lines."""
    text = "\n".join(printable(line) for line in f"{name}: {what}".split("\n"))
    with contextlib.suppress(OSError):  # nobody can be told
        print(text, file=sys.stderr)


def _open_closed_streams() -> None:
    """Has standard streams that the caller closed be the null device.

    Python has None in their places. Their numbers are taken too: a file opened later would get them, and what a library
    prints would go into it.
    """
    closed = [name for name in ("stdin", "stdout", "stderr") if getattr(sys, name) is None]
    if not closed:
        return
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
        pass
    os.close(descriptor)
    for name in closed:
        setattr(sys, name, Path(os.devnull).open("r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115 - for good


def _speak_any_language() -> None:
    """Has characters that the terminal's encoding lacks printed as escapes: reasons may hold any."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _drop(stream: TextIO) -> None:
    """Has what ``stream`` cannot write go nowhere, for Python would try again, and complain, at its end."""
    try:
        stream.flush()
    except OSError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
