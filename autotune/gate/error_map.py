"""Where an output is wrong: rows over budget, gathered into ranges along the longest axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from autotune.detail import Group, OutputDetail, RowError
from autotune.gate.accuracy import Finding, Yardstick

WORST_ROWS: Final = 10
RANGES: Final = 32
ROW: Final = "row"


def describe(
    output: str, case: str, tensor: torch.Tensor, yardstick: Yardstick, finding: Finding, axes: Sequence[str] | None
) -> OutputDetail:
    """Returns all there is to say of ``tensor`` as ``output``; ``axes`` names its dimensions short of a row's elements."""
    shape = tuple(tensor.shape if yardstick.rule.kind == "log" else tensor.shape[:-1])
    names = (
        tuple(axes) if axes is not None and len(axes) == len(shape) else tuple(f"dim {n}" for n in range(len(shape)))
    )
    plain = OutputDetail(
        output=output,
        case=case,
        error=finding.error,
        budget=finding.budget,
        ratio=finding.ratio,
        row=_index(finding.row, shape),
        rows=finding.rows,
        bad=finding.bad,
        axes=names,
        shape=shape,
    )
    if not finding.bad or not shape:
        return plain
    errors, ratios = (each.cpu() for each in yardstick.errors(tensor))
    along = names.index(ROW) if ROW in names else max(range(len(shape)), key=lambda axis: shape[axis])
    order = ratios.argsort(descending=True, stable=True)[: min(WORST_ROWS, finding.bad)].tolist()
    worst = (RowError(index=_index(at, shape), error=float(errors[at]), ratio=float(ratios[at])) for at in order)
    groups = _groups((ratios > 1).reshape(shape), names, along)
    return plain.model_copy(update={"along": names[along], "groups": groups, "worst": tuple(worst)})


def _groups(bad: torch.Tensor, names: Sequence[str], along: int) -> tuple[Group, ...]:
    """Returns the groups with bad rows, in the order of their indices."""
    lines = bad.movedim(along, -1)
    others = [name for axis, name in enumerate(names) if axis != along]
    found = []
    for flat, line in enumerate(lines.reshape(-1, lines.shape[-1])):
        if bool(line.any()):
            ranges = _ranges(line.nonzero().reshape(-1).tolist())
            at = dict(zip(others, _index(flat, tuple(lines.shape[:-1])), strict=True))
            kept, hidden = tuple(ranges[:RANGES]), max(len(ranges) - RANGES, 0)
            found.append(Group(at=at, bad=int(line.sum()), rows=line.numel(), ranges=kept, hidden=hidden))
    return tuple(found)


def _ranges(rows: Sequence[int]) -> list[tuple[int, int]]:
    """Returns ascending ``rows`` as (first, last) of each run without a gap."""
    ranges: list[tuple[int, int]] = []
    for row in rows:
        if ranges and row == ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], row)
        else:
            ranges.append((row, row))
    return ranges


def _index(flat: int, shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the indices of element ``flat`` of a row-major tensor of ``shape``."""
    found: list[int] = []
    for size in reversed(shape):
        flat, at = divmod(flat, max(size, 1))
        found.append(at)
    return tuple(reversed(found))
