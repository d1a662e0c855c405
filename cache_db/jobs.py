"""What the ranks of one job have agreed on: the first row of a problem stays, and every rank reads that one.

Insert-if-absent decides the race on either engine. Rows of jobs that must be long over are deleted when a new one comes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from pydantic import ValidationError
from sqlalchemy import Connection, delete, select

from cache_db.models import Agreement
from cache_db.schema import jobs

Insert = Callable[[Any], Any]

LONGEST_JOB = 90 * 86_400.0
"""Seconds after which an agreement is nobody's any more."""

logger = logging.getLogger(__name__)


def agree(connection: Connection, insert: Insert, wanted: Agreement, now: float) -> Agreement | None:
    """Stores ``wanted`` unless its job has agreed on the problem before; returns what is stored, None if it is unreadable.

    ``now`` is the database's time, and becomes the row's: a host whose clock is wrong must not outdate the others' rows.
    """
    connection.execute(delete(jobs).where(jobs.c.created_at < now - LONGEST_JOB))
    names = [column.name for column in jobs.primary_key]
    values = wanted.model_dump() | {"created_at": now}
    connection.execute(insert(jobs).values(values).on_conflict_do_nothing(index_elements=names))
    return agreed(connection, wanted.job_id, wanted.problem_hash)


def agreed(connection: Connection, job_id: str, problem_hash: str) -> Agreement | None:
    """Returns what a job has agreed on for a problem, None if nothing (that can be read)."""
    query = select(jobs).where(jobs.c.job_id == job_id, jobs.c.problem_hash == problem_hash)
    row = connection.execute(query).mappings().first()
    if row is None:
        return None
    try:
        return Agreement.model_validate(dict(row))
    except ValidationError as error:
        logger.warning("what job %r agreed on for problem %.12s cannot be read: %s", job_id, problem_hash, error)
        return None
