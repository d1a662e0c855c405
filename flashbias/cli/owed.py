"""Sending what a command wrote to the shared database, at once if it answers."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

from cache_db.errors import CacheError
from flashbias.cli.text import printable
from flashbias.settings import current

if TYPE_CHECKING:
    from cache_db.store import Store

WAIT_SECONDS: Final = 15.0


def send(store: Store) -> bool:
    """Sends what the database owes to the shared one of the settings; returns whether nothing is owed any more.

    Where that fails, stderr says that it stays owed: the next process that uses both sends it.
    """
    address = current().db_url
    if address is None:
        return True
    from cache_db.delivery import send_now

    try:
        send_now(store.path, address, WAIT_SECONDS)
    except CacheError as error:
        told = f"flashbias: {error}; it is owed to {address}, and sent by the next process that uses both"
        print(printable(told), file=sys.stderr)
        return False
    return True
