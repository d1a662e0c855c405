"""How problems and misses are told to people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autotune.settings import Mode, Settings
from cache_db.models import Problem

if TYPE_CHECKING:
    from cache_db import Layers


def summary(problem: Problem) -> str:
    """Returns one line that names ``problem`` for a person."""
    fields = " ".join(f"{name}={value}" for name, value in sorted(problem.fields.items()))
    return f"{problem.spec.partition(':')[2].lower()} {problem.layout} {fields}"


def miss(problem: Problem, store: Layers, reason: str) -> str:
    """Returns what mode "assert" says of a miss: how the nearest stored problems differ, and the cure."""
    wanted = _flat(problem)
    lines = [f'{summary(problem)}: {reason} in {store.location}, and mode "assert" forbids to tune.']
    for row in store.nearest(problem):
        stored = _flat(row)
        differing = [
            f"{name} is {stored.get(name)!r} there, {wanted.get(name)!r} wanted"
            for name in sorted(wanted.keys() | stored.keys())
            if wanted.get(name) != stored.get(name)
        ]
        lines.append(f"  stored problem {row.hash[:12]}: {'; '.join(differing) or 'the same'}")
    if len(lines) == 1:
        lines.append("  The database holds no problem of this spec.")
    lines.append('  Tune it with mode "tune" or beforehand.')
    return "\n".join(lines)


def remedy(settings: Settings) -> str:
    """Returns what would give a problem that runs down the ladder a winner, whatever the mode."""
    if settings.mode is Mode.OFF:
        return f'{settings.remedy}, and use mode "tune" or "read": mode "off" reads no database'
    return f'{settings.remedy}, or use mode "tune"' if settings.mode is Mode.READ else settings.remedy


def _flat(problem: Problem) -> dict[str, object]:
    columns = problem.model_dump(exclude={"fields"})
    return {**columns, **problem.fields}
