"""``flashbias doctor``: what here keeps kernels from being tuned, proven or remembered, each with its cure.

Nothing is changed: no context is made on a GPU and no database is made. The exit code is 1 if anything is bad.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flashbias.cli import facts
from flashbias.cli.checks import Check, State, gpu_checks, software_checks, storage_checks
from flashbias.cli.text import tell
from flashbias.settings import current


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds ``doctor`` to ``commands``; ``common`` has the flags of every command."""
    parser = commands.add_parser(
        "doctor", parents=[common], help="check GPU, compilers and database, with cures", description=__doc__
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Checks everything; returns 1 if anything is bad, else 0."""
    found = list(checks(options.cache_dir))
    bad, warnings = (sum(each.state is state for each in found) for state in (State.BAD, State.WARNING))
    if options.json:
        rows = [{"name": each.name, "state": each.state, "told": each.told, "cure": each.cure} for each in found]
        print(json.dumps({"bad": bad, "warnings": warnings, "checks": rows}, indent=1))
    else:
        tell(line for each in found for line in _lines(each))
        print(f"{len(found)} checks: {bad} bad, {warnings} warnings")
    return int(bad > 0)


def checks(folder: Path | None) -> Iterator[Check]:
    """Yields every check; the database is that in ``folder``, or that of the library's settings."""
    cuda, driver = facts.cuda(), facts.driver()
    settings = current()
    yield from gpu_checks(cuda, driver)
    yield from software_checks(cuda)
    yield from storage_checks(facts.database(folder or settings.cache_dir), settings)


def _lines(each: Check) -> Iterator[str]:
    yield f"{each.state:9}{each.name:13}{each.told}"
    if each.cure:
        yield f"{'':22}cure: {each.cure}"
