"""``flashbias cache list`` and ``cache show``: what the tuning database holds, without torch and without writing."""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from autotune.candidate import told
from autotune.evidence import level, plain, proof_lines, when
from cache_db.models import Lease, Lift, Pin, Problem, Trial, Verification, Winner
from flashbias.cli import layers
from flashbias.cli.database import Row, about, open_store, prefix, short
from flashbias.cli.problems import brief, one_problem, place
from flashbias.cli.text import tell

if TYPE_CHECKING:
    from cache_db.store import Store


@dataclass
class Known:
    """All that is stored of one problem, by kernel."""

    problem: Problem
    winners: dict[str, Winner] = field(default_factory=dict)
    pins: dict[str, Pin] = field(default_factory=dict)
    trials: dict[str, list[Trial]] = field(default_factory=lambda: defaultdict(list))
    verifications: dict[str, list[Verification]] = field(default_factory=lambda: defaultdict(list))
    lifts: dict[str, list[Lift]] = field(default_factory=lambda: defaultdict(list))

    @property
    def kernels(self) -> list[str]:
        """The kernels that anything is stored of, the forward first."""
        names = {*self.winners, *self.pins, *self.trials, *self.verifications, *self.lifts}
        return sorted(names, key=lambda name: (not name.startswith("forward"), name))

    @property
    def latest(self) -> float:
        """When the newest row was stored (epoch seconds)."""
        rows: list[Row] = [*self.winners.values(), *self.pins.values()]
        for part in (self.trials, self.verifications, self.lifts):
            for each in part.values():
                rows += each
        return max(row.created_at for row in rows)


def add_parsers(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds ``list`` and ``show`` to ``commands``; ``common`` has the flags of every command."""
    listing = commands.add_parser(
        "list", parents=[common], help="list what is tuned: one line a problem, then its kernels"
    )
    listing.add_argument("--brief", action="store_true", help="one line a problem and no more")
    listing.add_argument("--json", action="store_true", help="print JSON")
    listing.set_defaults(run=show_all)
    showing = commands.add_parser("show", parents=[common], help="all that is known of one problem")
    showing.add_argument("key", type=prefix, metavar="KEY", help="first digits of the hash of the problem, or of a key")
    showing.add_argument("--json", action="store_true", help="print JSON")
    showing.set_defaults(run=show)


def show_all(options: argparse.Namespace) -> int:
    """Prints every problem that has a winner or was tried; returns 0."""
    store = open_store(options.cache_dir)
    found = sorted(everything(store).values(), key=lambda known: known.latest)
    if options.json:
        rows = [_brief_data(known) for known in found]
        print(json.dumps(plain({"database": str(store.path), "rows": rows}), indent=1))
        return 0
    for known in found:
        tell(_list_lines(known, only_one=options.brief))
    print(f"{len(found)} problems in {store.path}")
    return 0


def show(options: argparse.Namespace) -> int:
    """Prints all that is stored of one problem; returns 0. Raises WrongUsage when none, or more than one, is meant."""
    store = open_store(options.cache_dir)
    found = everything(store)
    named = [(known.problem, kernel) for known in found.values() for kernel in known.kernels]
    known = found[one_problem(named, options.key).hash]
    lease, found_at = store.holder(known.problem.hash), layers.origins_of(known.problem, store)
    if options.json:
        origins = [layers.as_json(each) for each in found_at]
        print(json.dumps(plain(_data(known, lease, store) | {"origins": origins}), indent=1))
        return 0
    tell([*_lines(known, lease, store), *layers.lines(found_at)])
    return 0


def everything(store: Store) -> dict[str, Known]:
    """Returns every stored problem with its rows, by the problem's hash."""
    found: dict[str, Known] = {}

    def known(problem: Problem) -> Known:
        return found.setdefault(problem.hash, Known(problem))

    for winner in store.find(Winner):
        known(winner.problem).winners[winner.kernel] = winner
    for pin in store.find(Pin):
        known(pin.problem).pins[pin.kernel] = pin
    for trial in store.find(Trial):
        known(trial.problem).trials[trial.kernel].append(trial)
    for verification in store.find(Verification):
        known(verification.problem).verifications[verification.kernel].append(verification)
    for lift in store.find(Lift):
        known(lift.problem).lifts[lift.kernel].append(lift)
    return found


def _list_lines(known: Known, *, only_one: bool) -> Iterator[str]:
    rows = known.winners.values()
    if rows:
        lowest = min(row.level for row in rows)
        state = f"level {lowest}, {sum(row.ms for row in rows):.4g} ms"
    else:
        state = f"no winner, {sum(map(len, known.trials.values()))} tried"
    pinned = f", {len(known.pins)} pinned" if known.pins else ""
    head = f"{short(known.problem.hash)}  {place(known.problem)}  {brief(known.problem)}"
    yield f"{head}: {state}{pinned}, {when(known.latest)}"
    for kernel in () if only_one else known.kernels:
        yield f"    {kernel:14}{short(known.problem.key(kernel))}  {_choice(known, kernel)}"


def _choice(known: Known, kernel: str) -> str:
    """Returns what one kernel runs with, as far as rows say it."""
    pin, winner = known.pins.get(kernel), known.winners.get(kernel)
    if pin is not None:
        return f"{short(pin.config.hash)}  pinned by {pin.pinned_by}: {pin.config}"
    if winner is not None:
        return f"{short(winner.config.hash)}  level {winner.level}  {winner.ms:.4g} ms  {winner.config}"
    return f"no winner: {_verdicts(known.trials[kernel])}"


def _verdicts(trials: Iterable[Trial]) -> str:
    counts = Counter(told(trial) for trial in trials)
    ordered = sorted(counts.items(), key=lambda each: (-each[1], each[0]))
    return ", ".join(f"{count} {verdict}" for verdict, count in ordered) or "nothing tried"


def _lines(known: Known, lease: Lease | None, store: Store) -> Iterator[str]:
    problem = known.problem
    yield f"problem   {problem.hash}"
    yield f"          {brief(problem)}"
    yield f"on        {place(problem)}, {problem.capability}, {problem.sm_count} SMs, Triton {problem.triton_version}"
    yield f"spec      {problem.spec}, source {short(problem.source_hash)}, {problem.layout}"
    yield f"fields    {' '.join(f'{name}={value}' for name, value in sorted(problem.fields.items()))}"
    yield f"database  {store.path}"
    if lease is not None:
        yield f"lease     {lease.owner} on {lease.host} tunes it, until {when(lease.expires_at)} unless renewed"
    for kernel in known.kernels:
        yield ""
        yield f"kernel    {kernel}, key {short(problem.key(kernel))}"
        yield from _kernel_lines(known, kernel)


def _kernel_lines(known: Known, kernel: str) -> Iterator[str]:
    winner, pin, trials = known.winners.get(kernel), known.pins.get(kernel), known.trials[kernel]
    if pin is not None:
        yield f"pin       {short(pin.config.hash)}  {pin.config}"
        yield f"          by {pin.pinned_by} on {pin.host}, {when(pin.created_at)}: {pin.reason or 'no reason given'}"
    if winner is None:
        yield "winner    none"
    else:
        yield from _winner_lines(winner, next((row for row in trials if row.config == winner.config), None))
    yield f"trials    {len(trials)}: {_verdicts(trials)}"
    for trial in sorted(trials, key=_order):
        ms = trial.figures.get("ms")
        time = f"{ms:.4g} ms" if isinstance(ms, float) else ""
        reason = f": {trial.reason}" if trial.reason else ""
        yield f"  {short(trial.config.hash)}  {told(trial):17}{time:>11}  {trial.config}{reason}"
    yield from _proof_lines("proof", known.verifications[kernel])
    for lift in known.lifts[kernel]:
        yield f"lift      {short(lift.config.hash)}  by {lift.lifted_by} on {lift.host}, {when(lift.created_at)}: {lift.reason}"


def _order(trial: Trial) -> tuple[str, float]:
    """Orders trials by verdict, the fastest first; a row's time may be anything."""
    ms = trial.figures.get("ms")
    return told(trial), ms if isinstance(ms, float) and ms == ms else float("inf")  # noqa: PLR0124 - NaN orders nothing


def _winner_lines(winner: Winner, trial: Trial | None) -> Iterator[str]:
    made = winner.environment
    yield f"winner    {short(winner.config.hash)}  {winner.config}"
    ended = "" if winner.complete else " (unfinished)"
    yield f"          {level(winner.level)}, {winner.ms:.4g} ms, {winner.tried} of {winner.total} tried{ended}"
    yield f"          stored {when(winner.created_at)} with driver {made.driver or 'none'}, ptxas {made.ptxas or 'none'}, torch {made.torch}"
    yield f"          binary {short(winner.binary) or 'unknown'}"
    for upstream, name in winner.proven_with.items():
        yield f"          proven behind {upstream} {short(name)}"
    if trial is not None:
        yield f"          tuned on {trial.host}{f', {trial.gpu_uuid}' if trial.gpu_uuid else ''}, judged in {trial.seconds:.1f} s"
        yield from proof_lines(trial.figures)


def _proof_lines(title: str, rows: Sequence[Verification]) -> Iterator[str]:
    """Yields later proofs, and failures as they were first judged."""
    for row in rows:
        made = f"driver {row.environment.driver}" if row.environment.driver else f"torch {row.environment.torch}"
        where = f"{row.host}{f', {row.gpu_uuid}' if row.gpu_uuid else ''}"
        reason = f": {row.reason}" if row.reason else ""
        head = f"{title:10}{short(row.config.hash)}  {row.verdict.value}, level {row.level}"
        yield f"{head}, {when(row.created_at)}, {where}, {made}{reason}"


def _row_data(row: Any) -> dict[str, Any]:
    """Returns a row as plain data, without what it shares with its kernel."""
    return {"config_hash": row.config.hash, **row.model_dump(exclude={"problem", "kernel"})}


def _brief_data(known: Known) -> dict[str, Any]:
    kernels = {
        kernel: {
            "key": known.problem.key(kernel),
            "winner": _row_data(known.winners[kernel]) if kernel in known.winners else None,
            "pin": _row_data(known.pins[kernel]) if kernel in known.pins else None,
            "verdicts": dict(Counter(told(trial) for trial in known.trials[kernel])),
        }
        for kernel in known.kernels
    }
    rows = known.winners.values()
    return {
        "problem": about(known.problem),
        "description": brief(known.problem),
        "level": min((row.level for row in rows), default=None),
        "ms": sum(row.ms for row in rows) if rows else None,
        "latest": known.latest,
        "kernels": kernels,
    }


def _data(known: Known, lease: Lease | None, store: Store) -> dict[str, Any]:
    data = _brief_data(known)
    for kernel, each in data["kernels"].items():
        each["trials"] = [_row_data(row) for row in known.trials[kernel]]
        each["verifications"] = [_row_data(row) for row in known.verifications[kernel]]
        each["lifts"] = [_row_data(row) for row in known.lifts[kernel]]
    return {"database": str(store.path), **data, "lease": None if lease is None else lease.model_dump()}
