"""How one proof is told: verdict, figures of every output, and for a wrong one which rows are wrong."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from autotune.messages import summary
from cache_db.models import Config, Scalar, Trial
from flashbias.cli.database import about, key_of, short

if TYPE_CHECKING:
    from autotune.detail import Group, OutputDetail
    from autotune.sandbox import Outcome

GROUPS: Final = 16  # told to a person; JSON has them all


def lines(trial: Trial, upstream: Mapping[str, Config], outcome: Outcome) -> Iterator[str]:
    """Yields what a person reads of the rerun of ``trial``."""
    yield f"key       {short(key_of(trial))}  {trial.kernel} of {summary(trial.problem)}"
    yield f"config    {short(trial.config.hash)}  {trial.config}"
    for kernel, config in upstream.items():
        yield f"through   {kernel} {short(config.hash)}  {config}"
    yield (
        f"verdict   {outcome.verdict.value} (stored: {trial.verdict.value}), level {outcome.level}, "
        f"seed {outcome.seed}, {outcome.seconds:.1f} s"
    )
    if outcome.reason:
        yield f"reason    {outcome.reason}"
    if outcome.details:
        yield ""
        yield f"{'output':14}{'case':22}{'worst error':>12}{'budget':>10}{'ratio':>10}  {'over budget':>16}  worst row"
    for each in outcome.details:
        yield (
            f"{each.output:14}{each.case:22}{each.error:12.3g}{each.budget:10.2g}{each.ratio:10.3g}  "
            f"{f'{each.bad} of {each.rows}':>16}  {_at(each.axes, each.row)}"
        )
    for each in outcome.details:
        if each.bad:
            yield ""
            yield from _map(each)


def as_json(trial: Trial, upstream: Mapping[str, Config], outcome: Outcome) -> dict[str, Any]:
    """Returns the rerun of ``trial`` as plain data."""
    return {
        "key": key_of(trial),
        "kernel": trial.kernel,
        "problem": about(trial.problem),
        "config_hash": trial.config.hash,
        "config": trial.config.model_dump(),
        "proven_with": {kernel: config.model_dump() for kernel, config in upstream.items()},
        "stored_verdict": trial.verdict,
        "verdict": outcome.verdict,
        "reason": outcome.reason,
        "level": outcome.level,
        "seed": outcome.seed,
        "seconds": outcome.seconds,
        "binary": outcome.binary,
        "figures": {name: _plain(value) for name, value in outcome.figures.items()},
        "outputs": [each.model_dump() for each in outcome.details],
    }


def _map(detail: OutputDetail) -> Iterator[str]:
    """Yields which rows of one output are over their budget."""
    sizes = ", ".join(f"{name} {size}" for name, size in zip(detail.axes, detail.shape, strict=True))
    yield f"{detail.output!r} on case {detail.case!r}: {detail.bad} of {detail.rows} rows over budget ({sizes})"
    for group in detail.groups[:GROUPS]:
        yield f"  {_group(detail, group)}"
    if len(detail.groups) > GROUPS:
        yield f"  … and {len(detail.groups) - GROUPS} more such groups (all of them with --json)"
    yield "  the worst:"
    for row in detail.worst:
        yield f"    {_at(detail.axes, row.index)}: off by {row.error:.3g}, {row.ratio:.3g} times its budget"


def _group(detail: OutputDetail, group: Group) -> str:
    at = _at(group.at.keys(), group.at.values())
    ranges = [f"{first}-{last}" if first != last else f"{first}" for first, last in group.ranges]
    hidden = [f"and {group.hidden} more ranges"] if group.hidden else []
    return f"{f'{at}: ' if at else ''}{group.bad} of {group.rows}: {detail.along} {', '.join(ranges + hidden)}"


def _at(names: Iterable[str], index: Iterable[int]) -> str:
    return " ".join(f"{name} {number}" for name, number in zip(names, index, strict=True))


def _plain(value: Scalar) -> Scalar | None:
    """Returns what JSON can hold: None for what is no number."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
