"""Sending what the user's database owes to the shared one, some rows at a time, each batch all or none."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cache_db import deadline
from cache_db.batch import Batch, Shared
from cache_db.errors import RowRefused
from cache_db.local import Local

if TYPE_CHECKING:
    from cache_db.address import Address
    from cache_db.store import Store

Ask = Callable[[Callable[["Store"], object]], object]
"""Runs an action on the server within its time."""

TOGETHER = 50
GONE = "gone"  # the word of cache_db.outbox, which would load SQLAlchemy here

logger = logging.getLogger(__name__)


def send_now(path: Path, address: Address, seconds: float) -> None:
    """Sends all that the database at ``path`` owes to the one at ``address``, each step within ``seconds``.

    Raises CacheError when the server fails; what was sent by then stays sent, the rest stays owed.
    """
    from cache_db.store import Store

    local = Local(path, address.target)
    if local.debts(1):
        store = deadline.within(seconds, lambda: Store.connect(address))
        deliver(local, lambda action: deadline.within(seconds, lambda: action(store)))


def deliver(local: Local, ask: Ask) -> None:
    """Sends all that ``local`` owes.

    Raises CacheError when the server fails; what was sent by then stays sent.
    """
    before = None
    while owed := local.debts(TOGETHER):
        if owed == before:  # the file turned read-only: its marks stay, and its rows are sent again some day
            return
        renewed = frozenset(debt.row.problem.key(debt.row.kernel) for debt in owed if debt.replace and debt.row)
        rows = [debt.row for debt in owed if debt.row is not None]
        try:
            _send(ask, rows, renewed)
        except RowRefused:
            _send_singly(ask, rows, renewed)
        gone = frozenset(debt.name for debt in owed if debt.kind == GONE)
        if gone:
            _forget(ask, gone)
        local.settle(owed)
        before = owed


def _send(ask: Ask, rows: Sequence[Shared], renewed: frozenset[str]) -> None:
    batch = Batch.of(rows, renewed)
    ask(lambda store: store.merge(batch))


def _forget(ask: Ask, gone: frozenset[str]) -> None:
    ask(lambda store: store.forget(gone))


def _send_singly(ask: Ask, rows: Sequence[Shared], renewed: frozenset[str]) -> None:
    """One row that the server cannot hold must not keep the others here."""
    for row in rows:
        try:
            _send(ask, [row], renewed)
        except RowRefused as error:
            logger.warning("Tuning server: %s; this result stays in the user's database.", error)
