"""The lease of a problem: one row says who sweeps it and until when.

A row (not a lock) because it outlives no crash by more than its seconds, survives a sweep without an open
connection, works on every engine and can be read by a person. One upsert decides the race. A row that was damaged
counts as none: the next to claim it writes over it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError
from sqlalchemy import ColumnElement, Connection, delete, or_, select, true, update

from cache_db.models import Lease
from cache_db.rules import CLOCK_SLACK, LONGEST_LEASE
from cache_db.schema import leases

Insert = Callable[[Any], Any]

_ATTEMPTS = 3

logger = logging.getLogger(__name__)


def _decode(columns: Mapping[Any, Any]) -> Lease | None:
    """Returns the lease of ``columns``, None, with a word to those who debug, when there is none to read."""
    try:
        return Lease.model_validate(dict(columns))
    except ValidationError as error:
        logger.debug("lease of %.12s ignored: %s", columns["problem_hash"], error)
        return None


def _over(now: float) -> ColumnElement[bool]:
    """The SQL form of ``not rules.standing``."""
    return or_(
        leases.c.expires_at <= now,
        leases.c.expires_at > now + LONGEST_LEASE + CLOCK_SLACK,
        leases.c.acquired_at > now + CLOCK_SLACK,
    )


def claim(connection: Connection, insert: Insert, lease: Lease) -> Lease | None:
    """Stores ``lease`` unless another owner's stands; returns what is stored, None if it is another's."""
    free = or_(_over(lease.acquired_at), leases.c.owner == lease.owner)
    # Locked where rows can be: nobody else's lease may come between the look and the overwriting.
    query = select(leases).where(leases.c.problem_hash == lease.problem_hash).with_for_update()
    for _ in range(_ATTEMPTS):
        if _put(connection, insert, lease, free):
            return lease
        row = connection.execute(query).mappings().first()
        if row is None:  # given back at this very moment
            continue
        if _decode(row) is not None:
            return None
        logger.warning("the stored lease of problem %.12s cannot be read and is written over", lease.problem_hash)
        return lease if _put(connection, insert, lease, true()) else None
    return None


def _put(connection: Connection, insert: Insert, lease: Lease, where: ColumnElement[bool]) -> bool:
    """Stores ``lease``, over another one ``where`` that is allowed; returns whether it did."""
    statement = insert(leases).values(lease.model_dump())
    columns = {name: statement.excluded[name] for name in ("owner", "host", "acquired_at", "expires_at")}
    statement = statement.on_conflict_do_update(index_elements=[leases.c.problem_hash], set_=columns, where=where)
    return connection.execute(statement.returning(leases.c.owner)).first() is not None


def renew(connection: Connection, lease: Lease) -> bool:
    """Stores ``lease`` over the same owner's; returns whether there was one."""
    mine = (leases.c.problem_hash == lease.problem_hash, leases.c.owner == lease.owner)
    statement = update(leases).where(*mine).values(lease.model_dump()).returning(leases.c.owner)
    return connection.execute(statement).first() is not None


def release(connection: Connection, lease: Lease) -> None:
    """Removes the lease if it is still ``lease.owner``'s."""
    connection.execute(delete(leases).where(leases.c.problem_hash == lease.problem_hash, leases.c.owner == lease.owner))


def holder(connection: Connection, problem_hash: str, now: float) -> Lease | None:
    """Returns the standing lease of a problem."""
    query = select(leases).where(leases.c.problem_hash == problem_hash, ~_over(now))
    row = connection.execute(query).mappings().first()
    return None if row is None else _decode(row)
