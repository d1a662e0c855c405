"""What may be deleted from a database because its rows were deleted from another.

Which rows may go was decided by what the other database knew. This one may know more: a failure that the other never
heard of, a winner that was proven behind a config. So no deletion here leaves a proof without the failure that outweighs
it, half a problem's winners, or a winner without the trials it rests on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import Final

from cache_db import rows
from cache_db.batch import Batch, Shared
from cache_db.models import Lift, Trial, Verdict, Verification, Winner

KINDS: Final[dict[type[Shared], str]] = {Winner: "winner", Trial: "trial", Verification: "verification", Lift: "lift"}

Judged = Trial | Verification


def name(row: Shared) -> str:
    """Returns what tells this very row from every other, one written anew in its place included."""
    return f"{row.problem.hash}/{KINDS[type(row)]}/{primary(row)}/{row.created_at!r}"


def problem_of(named: str) -> str:
    """Returns the hash of the problem of the row that ``named`` stands for."""
    return named.partition("/")[0]


def primary(row: Shared) -> str:
    """Returns the primary key of a row as one text."""
    values = rows.encode(row)
    if isinstance(row, Winner):
        return str(values["key_hash"])
    return str(values["id"]) if "id" in values else f"{values['key_hash']}/{values['config_hash']}"


def removable(known: Batch, wanted: Collection[str]) -> list[Shared]:
    """Returns those rows of one problem, of which ``known`` is all, that may go of those ``wanted`` by their names.

    A lift goes with what it lifts, wanted or not.
    """
    gone: list[Shared] = []
    if all(name(row) in wanted for row in known.winners):
        gone += known.winners
    needed = _needed(row for row in known.winners if row not in gone)
    judged: dict[tuple[str, str], list[Judged]] = defaultdict(list)
    judgements: list[Judged] = [*known.trials, *known.verifications]
    for row in judgements:
        judged[row.kernel, row.config.hash].append(row)
    for config, found in judged.items():
        lifts = [row for row in known.lifts if (row.kernel, row.config.hash) == config]
        named = [row for row in found if name(row) in wanted]
        if config in needed or not named:
            continue
        if lifts or any(row.verdict is not Verdict.SAFE for row in found):
            gone += [*found, *lifts] if len(named) == len(found) else []
        else:
            gone += named
    return gone


def _needed(winners: Iterable[Winner]) -> set[tuple[str, str]]:
    """Returns (kernel, config hash) of all that ``winners`` run, or were proven, with."""
    found: set[tuple[str, str]] = set()
    for row in winners:
        found |= {(row.kernel, row.config.hash), *row.proven_with.items()}
    return found
