"""From validated models to flat rows and back.

The way back is the gate every stored row passes: JSON only, strict models, and hashes computed anew, so a
row that was damaged or edited is refused instead of launched.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel

from cache_db.errors import RowRefused
from cache_db.models import (
    Config,
    Environment,
    Lift,
    Pin,
    Problem,
    Scalar,
    Trial,
    Verdict,
    Verification,
    Winner,
    digest,
)

logger = logging.getLogger(__name__)

Row = TypeVar("Row", Trial, Verification, Winner, Lift, Pin)

PROBLEM_COLUMNS = tuple(Problem.model_fields)
ENVIRONMENT_COLUMNS = tuple(name for name in PROBLEM_COLUMNS if name != "fields")
_PARTS: dict[str, type[BaseModel]] = {"problem": Problem, "config": Config, "environment": Environment}
_JSON = ("fields", "params", "figures", "proven_with")


def to_json(values: Mapping[str, Scalar]) -> str:
    """Returns valid JSON for a flat map that may hold what JSON cannot: inf is written 1e999, NaN null."""
    return "{" + ",".join(f"{json.dumps(name)}:{scalar(values[name])}" for name in sorted(values)) + "}"


def from_json(text: str) -> Any:
    """Returns what :meth:`to_json` wrote."""
    values = json.loads(text)
    if not isinstance(values, dict):
        raise TypeError(f"expected a JSON object, got {text[:40]!r}")
    return {name: math.nan if value is None else value for name, value in values.items()}


def scalar(value: Scalar) -> str:
    """Returns valid JSON for ``value``: inf is written 1e999, NaN null."""
    if isinstance(value, float) and not math.isfinite(value):
        return "null" if math.isnan(value) else f"{'-' if value < 0 else ''}1e999"
    return json.dumps(value)


def problem_columns(problem: Problem) -> dict[str, Any]:
    """Returns the columns that say where a problem runs: all but ``fields``."""
    return {name: getattr(problem, name) for name in ENVIRONMENT_COLUMNS}


def encode(row: Trial | Verification | Winner | Lift | Pin) -> dict[str, Any]:
    """Returns ``row`` as one flat map of column to value."""
    data = row.model_dump()
    for part in _PARTS.keys() & data.keys():
        data |= data.pop(part)
    for name in _JSON:
        if name in data:
            data[name] = to_json(data[name])
    if isinstance(row, Winner):
        data["complete"] = int(row.complete)
    if isinstance(row, Trial | Verification):
        data["verdict"] = str(row.verdict)
    if isinstance(row, Verification | Lift):
        data["id"] = digest(row.model_dump())
    return data | {
        "key_hash": row.problem.key(row.kernel),
        "problem_hash": row.problem.hash,
        "config_hash": row.config.hash,
    }


def name(columns: Mapping[Any, Any]) -> tuple[str, ...]:
    """Returns what orders the rows of one table by their primary key."""
    return str(columns.get("id", "")), str(columns["key_hash"]), str(columns["config_hash"])


def decode(model: type[Row], columns: Mapping[Any, Any]) -> Row:
    """Returns the validated row of ``columns``. Raises RowRefused."""
    data = dict(columns)
    try:
        for name in _JSON:
            if name in data:
                data[name] = from_json(data[name])
        for part in _PARTS.keys() & model.model_fields.keys():
            part_model = _PARTS[part]
            data[part] = {name: data.pop(name) for name in part_model.model_fields}
        if "verdict" in data:
            data["verdict"] = Verdict(data["verdict"])
        if "complete" in data:
            data["complete"] = {0: False, 1: True}[data["complete"]]
        row = model.model_validate({name: data[name] for name in model.model_fields})
        hashes = (row.problem.key(row.kernel), row.problem.hash, row.config.hash)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise RowRefused(f"{_name(columns)}: {first_line(error)}") from error
    if hashes != tuple(columns[name] for name in ("key_hash", "problem_hash", "config_hash")):
        raise RowRefused(f"{_name(columns)}: contents and hashes disagree")
    return row


def decode_problem(columns: Mapping[Any, Any]) -> Problem:
    """Returns the validated problem of ``columns``. Raises RowRefused."""
    try:
        data = {name: columns[name] for name in PROBLEM_COLUMNS}
        problem = Problem.model_validate({**data, "fields": from_json(data["fields"])})
        agreed = problem.hash == columns["problem_hash"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise RowRefused(f"{_name(columns)}: {first_line(error)}") from error
    if not agreed:
        raise RowRefused(f"{_name(columns)}: contents and hash disagree")
    return problem


def decode_all(model: type[Row], found: Iterable[Mapping[Any, Any]]) -> list[Row]:
    """Returns the rows that pass, and says in one warning how many did not."""
    accepted: list[Row] = []
    refused: list[str] = []
    for columns in found:
        try:
            accepted.append(decode(model, columns))
        except RowRefused as error:
            refused.append(str(error))
    if refused:
        logger.warning(
            "%d stored %s row(s) ignored and left in place; the first: %s", len(refused), model.__name__, refused[0]
        )
    return accepted


def _name(columns: Mapping[Any, Any]) -> str:
    return f"row {str(columns.get('key_hash', columns.get('problem_hash')))[:12]} ({columns.get('kernel', '?')})"


def first_line(error: BaseException) -> str:
    """Returns what ``error`` says, in one line of bounded length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {'; '.join(lines[:3])[:300]}"
