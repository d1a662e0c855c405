"""``flashbias report``: all that the tuning database holds, as one HTML page that needs no network."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

from flashbias.cli.database import open_store
from flashbias.cli.destination import destination
from flashbias.cli.text import tell

OUTPUT: Final = Path("report.html")
STDOUT: Final = Path("-")


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds ``report`` to ``commands``; ``common`` has the flags of every command."""
    parser = commands.add_parser(
        "report", parents=[common], help="write a page with a heat map of each kernel's configs", description=__doc__
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FILE", help=f"default: {OUTPUT}; - is stdout")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Writes the page; returns 0.

    Raises WrongUsage for the database as output, CacheError and OSError for what cannot be read or written.
    """
    from flashbias.cli.reporting.keys import report
    from flashbias.cli.reporting.page import page
    from flashbias.cli.stored import everything

    store = open_store(options.cache_dir)
    data = report(everything(store).values())
    text = page(data)
    to_stdout = options.output == STDOUT
    with destination(None if to_stdout else options.output, store.path) as file:
        file.write(text)
    if not to_stdout:
        tell([f"{len(data['problems'])} problems of {store.path} in {options.output}"])
    return 0
