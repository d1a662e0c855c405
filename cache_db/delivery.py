"""Sending what the user's database owes to the shared one, some rows at a time, each batch all or none."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from cache_db.batch import Batch, Shared
from cache_db.errors import RowRefused
from cache_db.local import Local

if TYPE_CHECKING:
    from cache_db.store import Store

Ask = Callable[[Callable[["Store"], None]], None]
"""Runs an action on the server within its time."""

TOGETHER = 50

logger = logging.getLogger(__name__)


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
        local.settle(owed)
        before = owed


def _send(ask: Ask, rows: Sequence[Shared], renewed: frozenset[str]) -> None:
    batch = Batch.of(rows, renewed)
    ask(lambda store: store.merge(batch))


def _send_singly(ask: Ask, rows: Sequence[Shared], renewed: frozenset[str]) -> None:
    """One row that the server cannot hold must not keep the others here."""
    for row in rows:
        try:
            _send(ask, [row], renewed)
        except RowRefused as error:
            logger.warning("Tuning server: %s; this result stays in the user's database.", error)
