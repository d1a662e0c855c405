"""What the gate tells of one output on request: its figures, and which of its rows are wrong."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class _Detail(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RowError(_Detail):
    """One row: where it lies (one number for each of the output's ``axes``), its error, and that by its budget."""

    index: tuple[int, ...]
    error: float
    ratio: float


class Group(_Detail):
    """The rows that share all indices but the one along the output's longest axis, or the axis called "row".

    ``at`` are those indices by axis; ``bad`` of ``rows`` are over budget: those in ``ranges`` (first, last), of which
    ``hidden`` more are left out.
    """

    at: dict[str, int]
    bad: int
    rows: int
    ranges: tuple[tuple[int, int], ...]
    hidden: int = 0


class OutputDetail(_Detail):
    """One output on one case: the worst row, how many are over budget and, if any are, where.

    ``budget`` is the smallest error allowed (a row may be allowed more), ``row`` the index of the worst row along
    ``axes``, whose sizes are ``shape``; ``along`` is the axis that the ranges of the groups run along.
    """

    output: str
    case: str
    error: float
    budget: float
    ratio: float
    row: tuple[int, ...]
    rows: int
    bad: int
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    along: str = ""
    groups: tuple[Group, ...] = ()
    worst: tuple[RowError, ...] = ()
