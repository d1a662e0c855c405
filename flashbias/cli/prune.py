"""``flashbias cache prune``: deletes rows that are old, or of a driver or Triton that is gone.

Nothing is ever proven, or let out of quarantine, by what is deleted. What was judged of a config that failed anything, or
was lifted, therefore goes as a whole or stays; and so do the winners of one problem. A shared database is told which rows
went, and deletes those of them that nothing of its own rests on.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from autotune.judgements import Judgements, Reach
from autotune.place import Place
from cache_db.models import Lift, Pin, Problem, Trial, Verdict, Verification, Winner
from flashbias.cli import owed
from flashbias.cli.database import WrongUsage, key_of, open_store, short
from flashbias.cli.problems import brief, place
from flashbias.cli.text import tell

if TYPE_CHECKING:
    from cache_db.store import Store

_SECONDS: Final = {"h": 3600.0, "d": 86_400.0, "w": 604_800.0}
_STANDING: Final = (Reach.EVERYWHERE, Reach.HERE, Reach.ELSEWHERE)
_TABLES: Final = {Trial: "trials", Verification: "verifications", Winner: "winners", Lift: "lifts"}

Row = Trial | Verification | Winner | Lift
Dated = Trial | Verification | Winner


@dataclass
class Selection:
    """The rows to delete, and how many of those asked for stay for being in quarantine, or behind a winner or pin that stays."""

    rows: list[Row] = field(default_factory=list)
    quarantined: int = 0
    needed: int = 0


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds ``prune`` to ``commands``; ``common`` has the flags of every command."""
    parser = commands.add_parser("prune", parents=[common], help="delete old rows", description=__doc__)
    parser.add_argument("--older-than", type=_age, metavar="AGE", help="rows stored so long ago: 12h, 30d, 8w")
    parser.add_argument("--driver", nargs="+", metavar="V", help="rows proven with these drivers")
    parser.add_argument("--version", nargs="+", metavar="V", dest="versions", help="rows of these versions of Triton")
    parser.add_argument(
        "--keep-quarantine",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep what bars a config from running (the default)",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be deleted, and delete nothing")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Deletes what the flags choose; several of them choose what all of them do. Returns 0.

    Raises WrongUsage without any such flag, CacheError when the database cannot be read or written.
    """
    if options.older_than is None and not options.driver and not options.versions:
        raise WrongUsage.explain(
            "prune", expected="--older-than, --driver or --version", got="none of them", cure="Say what may go"
        )
    store = open_store(options.cache_dir)
    found = select(store, _chosen(options), keep_quarantine=options.keep_quarantine)
    count = len(found.rows) if options.dry_run else store.remove(found.rows)
    if not options.dry_run:
        owed.send(store)
    if options.json:
        print(json.dumps(_data(found, store, count, dry=options.dry_run), indent=1))
        return 0
    tell(_lines(found, "would delete" if options.dry_run else "deleted"))
    for number, why in ((found.quarantined, "in quarantine"), (found.needed, "behind a winner or pin that stays")):
        if number:
            print(f"kept {number} rows {why}")
    print(f"{count} rows {'would be ' if options.dry_run else ''}deleted from {store.path}")
    return 0


def select(store: Store, chosen: Callable[[Dated], bool], *, keep_quarantine: bool = True) -> Selection:
    """Returns which rows of ``store`` may go of those that ``chosen`` asks for. Pins and leases always stay."""
    winners: dict[Problem, list[Winner]] = defaultdict(list)
    for winner in store.find(Winner):
        winners[winner.problem].append(winner)
    gone = [row for rows in winners.values() if all(map(chosen, rows)) for row in rows]
    staying = [row for rows in winners.values() if not all(map(chosen, rows)) for row in rows]
    needed = {(key_of(pin), pin.config.hash) for pin in store.find(Pin)}
    for row in staying:
        needed.add((key_of(row), row.config.hash))
        needed |= {(row.problem.key(kernel), name) for kernel, name in row.proven_with.items()}
    found = Selection(list(gone))
    for name, (judged, lifts) in _configs(store).items():
        wanted = [row for row in judged if chosen(row)]
        if not wanted:  # a lift alone is of no age: what it speaks of may be a row that cannot be read here
            continue
        if name in needed:
            found.needed += len(wanted)
        elif lifts or any(row.verdict is not Verdict.SAFE for row in judged):
            if len(wanted) == len(judged) and not (keep_quarantine and _bars(judged, lifts)):
                found.rows += [*judged, *lifts]
            else:
                found.quarantined += len(wanted)
        else:
            found.rows += wanted
    return found


def _configs(store: Store) -> dict[tuple[str, str], tuple[list[Trial | Verification], list[Lift]]]:
    """Returns (key, config hash) -> what was judged of the config, and its lifts."""
    parts: dict[tuple[str, str], tuple[list[Trial | Verification], list[Lift]]] = defaultdict(lambda: ([], []))
    rows: list[Trial | Verification] = [*store.find(Trial), *store.find(Verification)]
    for row in rows:
        parts[key_of(row), row.config.hash][0].append(row)
    for lift in store.find(Lift):
        parts[key_of(lift), lift.config.hash][1].append(lift)
    return parts


def _bars(judged: list[Trial | Verification], lifts: list[Lift]) -> bool:
    """Returns whether a judgement keeps the config from running, here or elsewhere."""
    trials = [row for row in judged if isinstance(row, Trial)]
    proofs = [row for row in judged if isinstance(row, Verification)]
    judgements = Judgements(Place("", frozenset()), trials, proofs, lifts)
    return any(judgements.reach(row) in _STANDING for row in judgements.unsafe())


def _chosen(options: argparse.Namespace) -> Callable[[Dated], bool]:
    until = None if options.older_than is None else time.time() - options.older_than

    def chosen(row: Dated) -> bool:
        return (
            (until is None or row.created_at < until)
            and (not options.driver or row.environment.driver in options.driver)
            and (not options.versions or row.problem.triton_version in options.versions)
        )

    return chosen


def _age(text: str) -> float:
    found = re.fullmatch(r"(\d{1,6})([hdw])", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected hours, days or weeks as 12h, 30d or 8w, got {text!r}")
    return int(found[1]) * _SECONDS[found[2]]


def _of_problem(found: Selection) -> dict[Problem, Counter[str]]:
    counts: dict[Problem, Counter[str]] = defaultdict(Counter)
    for row in found.rows:
        counts[row.problem][_TABLES[type(row)]] += 1
    return counts


def _lines(found: Selection, verb: str) -> Iterator[str]:
    for problem, counts in _of_problem(found).items():
        told = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
        yield f"{verb}  {short(problem.hash)}  {place(problem)}  {brief(problem)}: {told}"


def _data(found: Selection, store: Store, count: int, *, dry: bool) -> dict[str, Any]:
    return {
        "database": str(store.path),
        "dry_run": dry,
        "rows": count,
        "tables": dict(Counter(_TABLES[type(row)] for row in found.rows)),
        "kept_in_quarantine": found.quarantined,
        "kept_behind_winners": found.needed,
        "problems": [{"problem_hash": each.hash, **counts} for each, counts in _of_problem(found).items()],
    }
