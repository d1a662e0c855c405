"""The SQL of the store: one set of statements for both engines, which speak the same ``ON CONFLICT``.

A row is *added* by the process that found it, and *merged* when it comes from another database. Merging must not depend
on the order in which databases meet; the rules are ``cache_db.rules``, written here once more in SQL.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import ColumnElement, Delete, Select, Table, and_, case, or_, select

from cache_db import rows, rules, schema
from cache_db.models import FINAL, Lift, Pin, Problem, Trial, Verdict, Verification, Winner

Insert = Callable[[Table], Any]
"""The dialect's own ``insert``, with ``on_conflict_do_update``."""

TABLES: dict[type, Table] = {
    Trial: schema.trials,
    Verification: schema.verifications,
    Winner: schema.winners,
    Lift: schema.lifts,
    Pin: schema.pins,
}


def keys(table: Table) -> list[str]:
    """Returns the names of the columns that make a row's primary key."""
    return [column.name for column in table.primary_key]


def add_trial(insert: Insert) -> Any:
    """Stores a trial; a final verdict only gives way to a final one (``rules.supersedes``)."""
    statement = insert(schema.trials)
    allowed = or_(_final(statement.excluded.verdict), ~_final(schema.trials.c.verdict))
    return _replacing(statement, schema.trials, allowed)


def merge_trial(insert: Insert) -> Any:
    """Stores a trial from elsewhere if it ranks above the one that is there (``rules.prevails``)."""
    statement = insert(schema.trials)
    new, stored = statement.excluded, schema.trials.c
    above = _above(
        (_number(_counts(new)), _number(_counts(stored))),
        (_number(_final(new.verdict)), _number(_final(stored.verdict))),
        *((new[name], stored[name]) for name in ("created_at", "seed", *rules.TRIAL_TIES)),
    )
    return _replacing(statement, schema.trials, above)


def merge_winner(insert: Insert) -> Any:
    """Stores a winner from elsewhere if it ranks above the one that is there (``rules.outranks``)."""
    statement = insert(schema.winners)
    new, stored = statement.excluded, schema.winners.c
    above = _above(
        (new.level, stored.level),
        (stored.ms, new.ms),
        (new.created_at, stored.created_at),
        (new.config_hash, stored.config_hash),
        *((new[name], stored[name]) for name in rules.WINNER_TIES),
    )
    return _replacing(statement, schema.winners, above)


def renew_winner(insert: Insert) -> Any:
    """Stores a winner that was meant to take another's place, unless a later one has come meanwhile."""
    statement = insert(schema.winners)
    return _replacing(statement, schema.winners, statement.excluded.created_at > schema.winners.c.created_at)


def put(insert: Insert, table: Table) -> Any:
    """Stores a row in place of another with its primary key."""
    return _replacing(insert(table), table, None)


def keep(insert: Insert, table: Table) -> Any:
    """Stores a row unless there is one with its primary key."""
    return insert(table).on_conflict_do_nothing(index_elements=keys(table))


def of_problem(table: Table, problem: Problem, kernel: str | None = None) -> Select[Any]:
    """Returns the query for the rows of a problem, or of one of its kernels."""
    query = of_hash(table, problem.hash)
    return query if kernel is None else query.where(table.c.kernel == kernel)


def of_hash(table: Table, problem_hash: str) -> Select[Any]:
    """Returns the query for the rows of the problem with this hash."""
    return select(table).where(table.c.problem_hash == problem_hash)


def deletion(row: Trial | Verification | Winner | Lift) -> Delete:
    """Deletes this very row, not what was written in its place meanwhile."""
    table, values = TABLES[type(row)], rows.encode(row)
    names = ["id"] if "id" in values else ["key_hash", "config_hash", "created_at"]
    return table.delete().where(*(table.c[name] == values[name] for name in names))


def problems() -> Select[Any]:
    """Returns the query for all problems with winners."""
    columns = [schema.winners.c[name] for name in ("problem_hash", *rows.PROBLEM_COLUMNS)]
    return select(*columns).distinct()


def _above(*pairs: tuple[ColumnElement[Any], ColumnElement[Any]]) -> ColumnElement[bool]:
    """The SQL form of comparing two tuples: whether the first of ``pairs`` that differs has the greater one first."""
    (left, right), *rest = pairs
    return or_(left > right, and_(left == right, _above(*rest))) if rest else left > right


def _final(verdict: ColumnElement[str]) -> ColumnElement[bool]:
    """The SQL form of ``verdict in FINAL``."""
    return verdict.in_(sorted(map(str, FINAL)))


def _counts(trial: Any) -> ColumnElement[bool]:
    """The SQL form of: the trial with these columns proves its config, or bars it."""
    return or_(trial.verdict != str(Verdict.SAFE), trial.level > 0)


def _number(condition: ColumnElement[bool]) -> ColumnElement[int]:
    """Returns 1 or 0, which compare alike on both engines."""
    return case((condition, 1), else_=0)


def _replacing(statement: Any, table: Table, where: ColumnElement[bool] | None) -> Any:
    key = keys(table)
    changed = {column.name: statement.excluded[column.name] for column in table.columns if column.name not in key}
    return statement.on_conflict_do_update(index_elements=key, set_=changed, where=where)
