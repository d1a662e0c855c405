"""The lease of a problem: one row says who sweeps it and until when.

A row (not a lock) because it outlives no crash by more than its seconds, survives a sweep without an open
connection, works on every engine and can be read by a person. One upsert decides the race.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError
from sqlalchemy import ColumnElement, Connection, case, delete, or_, select, update

from cache_db.errors import RowRefused
from cache_db.models import Lease
from cache_db.rules import CLOCK_SLACK
from cache_db.schema import leases

Insert = Callable[[Any], Any]


def _decode(columns: Mapping[Any, Any]) -> Lease:
    try:
        return Lease.model_validate(dict(columns))
    except ValidationError as error:
        raise RowRefused(f"lease of {str(columns['problem_hash'])[:12]}: {error}") from error


def _over(now: float) -> ColumnElement[bool]:
    """The SQL form of ``not rules.standing``."""
    return or_(leases.c.expires_at <= now, leases.c.acquired_at > now + CLOCK_SLACK)


def claim(connection: Connection, insert: Insert, lease: Lease) -> Lease | None:
    """Stores ``lease`` unless another owner's stands; returns what is stored, None if it is another's."""
    statement = insert(leases).values(lease.model_dump())
    columns = {name: statement.excluded[name] for name in ("owner", "host", "acquired_at", "expires_at")}
    statement = statement.on_conflict_do_update(
        index_elements=[leases.c.problem_hash],
        set_=columns,
        where=or_(_over(lease.acquired_at), leases.c.owner == lease.owner),
    ).returning(leases.c.owner)
    return lease if connection.execute(statement).first() is not None else None


def renew(connection: Connection, lease: Lease, now: float, seconds: float) -> Lease | None:
    """Moves the end of a lease that is still ``lease.owner``'s; None if it was lost."""
    statement = (
        update(leases)
        .where(leases.c.problem_hash == lease.problem_hash, leases.c.owner == lease.owner)
        .values(
            expires_at=now + seconds, acquired_at=case((leases.c.acquired_at > now, now), else_=leases.c.acquired_at)
        )
        .returning(*leases.c)
    )
    row = connection.execute(statement).mappings().first()
    return None if row is None else _decode(row)


def release(connection: Connection, lease: Lease) -> None:
    """Removes the lease if it is still ``lease.owner``'s."""
    connection.execute(delete(leases).where(leases.c.problem_hash == lease.problem_hash, leases.c.owner == lease.owner))


def holder(connection: Connection, problem_hash: str, now: float) -> Lease | None:
    """Returns the standing lease of a problem."""
    query = select(leases).where(leases.c.problem_hash == problem_hash, ~_over(now))
    row = connection.execute(query).mappings().first()
    return None if row is None else _decode(row)
