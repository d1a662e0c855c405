"""All that is stored, as the plain data that the page of ``flashbias report`` draws: problems, their kernels, their configs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from autotune.evidence import margins, when
from cache_db.models import Pin, Scalar, Trial, Verdict, Winner
from flashbias.cli.database import short
from flashbias.cli.problems import brief, place
from flashbias.cli.reporting.standing import Standing, runner_up, standings
from flashbias.cli.stored import Known
from flashbias.cli.text import printable

FORMAT: Final = 1
LONGEST_REASON: Final = 2_000
LARGEST_MAP: Final = 2_000  # places; sweeps have some dozens, but a row may say anything
AXES: Final = ("BLOCK_M", "BLOCK_N", "num_warps")
# What problems are filtered by: a field's name on the page, and in the database.
FACETS: Final = {"dtype": "dtype", "head_dim": "head_dim", "rank": "rank_dim", "causal": "causal"}
_RESOURCES: Final = ("p20", "p80", "registers", "spills", "shared", "occupancy")


def report(found: Iterable[Known]) -> dict[str, Any]:
    """Returns the page's data of all stored problems, the same for the same rows, whatever their order.

    Hosts, users and paths are left out: a page is handed on.
    """
    problems = [_problem(known) for known in sorted(found, key=_order)]
    return {"format": FORMAT, "facets": ["gpu", *FACETS], "problems": problems}


def _order(known: Known) -> tuple[Any, ...]:
    """Orders problems by device, then as a person counts: by dtype, dims and lengths."""
    fields = known.problem.fields
    numbers = tuple(_number(fields.get(name)) for name in ("head_dim", "rank_dim", "seqlen_q", "seqlen_k"))
    return place(known.problem), known.problem.spec, str(fields.get("dtype")), numbers, known.problem.hash


def _problem(known: Known) -> dict[str, Any]:
    problem = known.problem
    columns = problem.model_dump(exclude={"fields", "source_hash", "gpu_name", "mig_profile"})
    about = {
        "GPU": place(problem),
        **columns,
        "source": short(problem.source_hash),
        **dict(sorted(problem.fields.items())),
    }
    facets = {"gpu": place(problem), **{name: _told(problem.fields.get(field)) for name, field in FACETS.items()}}
    rows = known.winners.values()
    return {
        "hash": problem.hash,
        "title": clean(brief(problem)),
        "facets": {name: clean(value) for name, value in facets.items()},
        "about": [[clean(name), clean(_told(value))] for name, value in about.items()],
        "newest": known.latest,
        "when": when(known.latest),
        "ms": math.fsum(row.ms for row in rows) if rows else None,
        "level": min((row.level for row in rows), default=None),
        "kernels": [_kernel(known, kernel) for kernel in known.kernels],
    }


def _kernel(known: Known, kernel: str) -> dict[str, Any]:
    winner, pin, trials = known.winners.get(kernel), known.pins.get(kernel), known.trials.get(kernel, [])
    pinned = [pin.config] if pin else []
    found = standings(trials, known.verifications.get(kernel, []), known.lifts.get(kernel, []), winner, pinned)
    names = [each.config for each in found]
    cells, rest = folded(found)
    best = next((each.ms for each in found if each.safe and each.ms is not None), None)
    return {
        "name": clean(kernel),
        "key": known.problem.key(kernel),
        "configs": [_config(each) for each in found],
        "cells": cells,
        "rest": rest,
        "best": best,
        "winner": _winner(winner, found) if winner else None,
        "pin": _pin(pin, names.index(pin.config)) if pin else None,
        "cost": _cost(trials, found, winner),
    }


def folded(found: Sequence[Standing]) -> tuple[list[dict[str, Any]], list[int]]:
    """Returns the cells of the heat map, and which of ``found`` have no place in it.

    A cell holds the configs that share BLOCK_M, BLOCK_N and num_warps, whatever their stages and variant, by their
    numbers in ``found``, the best first: safe ones by their time, then others that count nothing against them, then those
    that failed. Where tiles differ so much that the map could not be drawn, it has no cells.
    """
    cells: dict[tuple[int, int, int], list[int]] = {}
    rest = []
    for number, each in enumerate(found):
        at = [each.config.params.get(name) for name in AXES]
        if all(type(value) is int and value > 0 for value in at):
            cells.setdefault((_number(at[0]), _number(at[1]), _number(at[2])), []).append(number)
        else:
            rest.append(number)

    if math.prod(len({at[axis] for at in cells}) for axis in range(3)) > LARGEST_MAP:
        return [], list(range(len(found)))

    def rank(number: int) -> tuple[bool, bool, bool, float]:
        each = found[number]
        return each.failed, not each.safe, each.ms is None, each.ms or 0.0

    ordered = sorted(cells.items(), key=lambda cell: (cell[0][2], cell[0][0], cell[0][1]))
    return [{"m": m, "n": n, "warps": w, "configs": sorted(each, key=rank)} for (m, n, w), each in ordered], rest


def _config(each: Standing) -> dict[str, Any]:
    params = {name: value for name, value in sorted(each.config.params.items()) if name not in AXES}
    data: dict[str, Any] = {
        "hash": each.config.hash,
        "implementation": clean(each.config.implementation),
        "variant": clean(each.config.variant),
        "axes": [clean(_told(each.config.params.get(name))) for name in AXES],
        "params": clean(" ".join(f"{name}={value}" for name, value in params.items())),
        "state": each.state,
        "level": each.level,
        "ms": each.ms,
    }
    if each.reason:
        data["reason"] = clean(each.reason)
    if each.trial is not None:
        worst = margins(each.trial.figures)
        data["seconds"] = max(each.trial.seconds, 0.0)
        data |= {"margin": worst[0].ratio} if worst else {}
        data |= {name: _figure(each.trial.figures[name]) for name in _RESOURCES if name in each.trial.figures}
    return data


def _winner(winner: Winner, found: Sequence[Standing]) -> dict[str, Any]:
    names = [each.config for each in found]
    mine = found[names.index(winner.config)]
    second = runner_up(found, winner.config)
    figures: Mapping[str, Scalar] = mine.trial.figures if mine.trial else {}
    made = winner.environment
    proofs = [f"{row.verdict.value}, level {row.level}, {when(row.created_at)}" for row in mine.judged]
    return {
        "config": names.index(winner.config),
        "ms": winner.ms,
        "level": max(winner.level, mine.level),
        "tried": winner.tried,
        "total": winner.total,
        "complete": winner.complete,
        "second": None if second is None else names.index(second.config),
        "behind": None if second is None or not second.ms or winner.ms <= 0 else second.ms / winner.ms - 1.0,
        "margins": [[clean(each.output), each.error, each.ratio] for each in margins(figures)],
        "case": clean(str(figures.get("worst_case", ""))),
        "repeats": _figure(figures.get("repeats")),
        "made": clean(f"driver {made.driver or 'none'}, ptxas {made.ptxas or 'none'}, torch {made.torch}"),
        "when": when(winner.created_at),
        "proofs": proofs,
    }


def _pin(pin: Pin, number: int) -> dict[str, Any]:
    return {"config": number, "reason": clean(pin.reason), "when": when(pin.created_at)}


def _cost(trials: Sequence[Trial], found: Sequence[Standing], winner: Winner | None) -> dict[str, Any]:
    """Returns what the sweep of one kernel took, and how its configs stand."""
    counts = Counter(each.state for each in found)
    order = [str(Verdict.SAFE), *sorted(counts.keys() - {Verdict.SAFE}, key=lambda name: (-counts[name], name))]
    return {
        "seconds": math.fsum(max(row.seconds, 0.0) for row in trials),
        "tried": len(trials),
        "total": max(winner.total, len(trials)) if winner else len(trials),
        "states": [[name, counts[name]] for name in order if counts[name]],
    }


def clean(text: str) -> str:
    """Returns ``text`` fit for a page: its lines stay lines, other control characters become escapes, and it ends somewhere."""
    cut = text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]} … ({len(text)} characters)"
    return "\n".join(printable(line) for line in cut.split("\n"))


def _told(value: object) -> str:
    return "–" if value is None else {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _figure(value: Scalar | None) -> float | int | str | None:
    """Returns a figure as the page shows it; a row's may be anything."""
    return clean(value) if isinstance(value, str) else value


def _number(value: object) -> int:
    return value if type(value) is int else -1
