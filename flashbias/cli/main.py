"""The command ``flashbias``: looks into the tuning database, proves again what it holds, and pins configs in it.

Results go to stdout, progress and complaints to stderr. The exit code is 0 when all is well, 1 when something is
unsafe or failed, 2 for wrong usage, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import flashbias
from autotune.errors import AutotuneError, SettingsError
from cache_db.errors import CacheError
from flashbias.cli import pin, ptx, quarantine, run, trials, verify
from flashbias.cli.database import WrongUsage
from flashbias.errors import FlashBiasError
from flashbias.settings import current

FAILED: Final = 1
MISUSED: Final = 2
STOPPED: Final = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    _speak_any_language()
    options = _parser().parse_args(arguments)
    try:
        current()  # lets the library's loggers speak, and refuses wrong settings before anything else
        code: int = options.run(options)
        sys.stdout.flush()
    except (WrongUsage, SettingsError) as error:
        print(f"flashbias: {error}", file=sys.stderr)
        return MISUSED
    except (FlashBiasError, AutotuneError, CacheError) as error:
        print(f"flashbias: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("flashbias: stopped", file=sys.stderr)
        return STOPPED
    except BrokenPipeError:  # whoever read stdout has seen enough
        _drop_output()
        return FAILED
    except OSError as error:  # stdout on a full disk, a folder that may not be looked into
        print(f"flashbias: {error}", file=sys.stderr)
        _drop_output()
        return FAILED
    return code


def _speak_any_language() -> None:
    """Has characters that the terminal's encoding lacks printed as escapes: reasons may hold any."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    """Has what stdout cannot write go nowhere, for Python would try again, and complain, at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="flashbias", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--version", action="version", version=f"flashbias {flashbias.__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--cache-dir", type=Path, metavar="DIR", help="folder of the database (default: as for the library)"
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (verify, trials, ptx, run):
        command.add_parser(commands, common)
    pin.add_parsers(commands, common)
    cache = commands.add_parser("cache", help="look into the tuning database")
    parts = cache.add_subparsers(title="commands", required=True, metavar="COMMAND")
    quarantine.add_parser(parts, common)
    return parser
