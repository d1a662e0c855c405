"""The command ``flashbias``: explains what runs, looks into the tuning database, proves again what it holds, and pins configs in it.

Results go to stdout, progress and complaints to stderr. The exit code is 0 when all is well, 1 when something is
unsafe or failed, 2 for wrong usage, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import flashbias
from autotune.errors import SettingsError
from flashbias.cli import (
    doctor,
    env,
    explain,
    init,
    packs,
    pin,
    prune,
    ptx,
    quarantine,
    report,
    run,
    stored,
    sweeps,
    trials,
    verify,
)
from flashbias.cli.database import WrongUsage
from flashbias.cli.deferred import Deferred
from flashbias.cli.guard import guarded
from flashbias.settings import current


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    return guarded("flashbias", lambda: _run(arguments), (WrongUsage, SettingsError))


def _run(arguments: Sequence[str] | None) -> int:
    options = _parser().parse_args(arguments)
    current()  # lets the library's loggers speak, and refuses wrong settings before anything else
    code: int = options.run(options)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="flashbias", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--version", action="version", version=f"flashbias {flashbias.__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--cache-dir", type=Path, metavar="DIR", help="folder of the database (default: as for the library)"
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=Deferred)
    for command in (explain, verify, trials, report, ptx, run, doctor, env):
        command.add_parser(commands, common)
    pin.add_parsers(commands, common)
    cache = commands.add_parser("cache", help="look into the tuning database, or make a shared one")
    parts = cache.add_subparsers(title="commands", required=True, metavar="COMMAND")
    stored.add_parsers(parts, common)
    sweeps.add_parser(parts, common)
    packs.add_parsers(parts, common)
    prune.add_parser(parts, common)
    quarantine.add_parser(parts, common)
    init.add_parser(parts)
    return parser
