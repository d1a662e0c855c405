"""``flashbias cache init``: makes the tables of a shared database, so that jobs need no right to."""

from __future__ import annotations

import argparse
from typing import Any, Final

from autotune.errors import SettingsError
from flashbias.cli.database import WrongUsage
from flashbias.cli.text import tell
from flashbias.settings import current, settings

WAIT_SECONDS: Final = 30.0


def add_parser(commands: Any) -> None:
    """Adds ``init`` to ``commands``."""
    parser = commands.add_parser(
        "init",
        help="make the tables of a shared database",
        description="Makes the tables of a shared PostgreSQL database, once and by an account that may.",
    )
    parser.add_argument(
        "url",
        nargs="?",
        metavar="URL",
        help="the database (default: FLASHBIAS_DB_URL, which other users cannot see in a list of processes)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Makes what is missing and says what there is; returns 0.

    Raises WrongUsage where no database is named or its name is none, CacheError when it cannot be used.
    """
    try:
        with settings(**({"db_url": options.url} if options.url else {})):
            address = current().db_url
    except SettingsError as error:
        raise WrongUsage(f"URL: {error}") from None
    if address is None:
        raise WrongUsage.explain(
            "URL",
            expected="postgresql+psycopg://user:password@host/database",
            got="none, and none in the settings",
            cure="Name the shared database, or set FLASHBIAS_DB_URL",
        )
    from cache_db import deadline
    from cache_db.store import Store

    counts = deadline.within(WAIT_SECONDS, lambda: Store.connect(address, WAIT_SECONDS).counts())
    rows = ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "no rows yet"
    tell([f"{address} is ready: {rows}"])
    return 0
