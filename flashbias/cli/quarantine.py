"""``flashbias cache quarantine``: which configs are kept from running and why, and leave to try one again."""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from autotune.evidence import when
from autotune.judgements import QUARANTINE_SECONDS, Judgement, Judgements, Reach
from autotune.lease import hostname
from autotune.messages import summary
from autotune.place import Place
from cache_db.models import Lift, Trial, Verification
from flashbias.cli import owed
from flashbias.cli.database import WrongUsage, about, key_of, one_config, one_key, open_store, prefix, short, user
from flashbias.cli.text import tell

if TYPE_CHECKING:
    from cache_db.store import Store

_STANDING = (Reach.EVERYWHERE, Reach.HERE, Reach.ELSEWHERE)


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds ``quarantine list`` and ``quarantine lift`` to ``commands``; ``common`` has the flags of every command."""
    group = commands.add_parser("quarantine", help="configs that are kept from running, and why")
    parts = group.add_subparsers(title="commands", required=True, metavar="COMMAND")
    listing = parts.add_parser("list", parents=[common], help="list every judgement that bars a config, and where")
    listing.add_argument("--json", action="store_true", help="print JSON")
    listing.set_defaults(run=show)
    lifting = parts.add_parser("lift", parents=[common], help="let configs be tried again by the next sweep or proof")
    lifting.add_argument("--key", type=prefix, required=True, help="first digits of the key's hash, as list shows it")
    lifting.add_argument("--config", type=prefix, help="first digits of the config's hash (default: all of the key)")
    lifting.set_defaults(run=lift)


def show(options: argparse.Namespace) -> int:
    """Prints all that was found of any config but that it is safe; returns 0."""
    store = open_store(options.cache_dir)
    found = [(judgements, row) for judgements in _all(store).values() for row in judgements.unsafe()]
    if options.json:
        rows = [_data(judgements, row) for judgements, row in found]
        print(json.dumps({"database": str(store.path), "rows": rows}, indent=1))
        return 0
    for judgements, row in found:
        tell(_lines(judgements, row))
    holding = sum(judgements.reach(row) in (Reach.EVERYWHERE, Reach.HERE) for judgements, row in found)
    print(f"{len(found)} judgements, {holding} of them hold here, in {store.path}")
    return 0


def lift(options: argparse.Namespace) -> int:
    """Stores leave to try the configs asked for again; returns 0.

    Raises WrongUsage when nothing, or more than one thing, is meant; CacheError when it cannot be stored.
    """
    store = open_store(options.cache_dir)
    barred = [(each, row) for each in _all(store).values() for row in each.unsafe() if each.reach(row) in _STANDING]
    everything = [row for _, row in barred]
    if not everything:
        raise WrongUsage(f"nothing in {store.path} is in quarantine, so there is nothing to lift")
    key = one_key([row for row in everything if key_of(row).startswith(options.key)], options.key, everything)
    of_key = [row for row in everything if key_of(row) == key]
    if options.config is not None:
        chosen = [row for row in of_key if row.config.hash.startswith(options.config)]
        config = one_config(chosen, options.config, of_key)
        of_key = [row for row in of_key if row.config == config]
    for row in {row.config: row for row in of_key}.values():
        _lift(store, row, [each for each in of_key if each.config == row.config])
        tell([f"{short(key)} {row.kernel} {short(row.config.hash)} {row.config}: may be tried again"])
    owed.send(store)
    return 0


def _lift(store: Store, row: Judgement, rows: Sequence[Judgement]) -> None:
    """Stores the lift of one config, and first its trial as a proof: the trial's place is taken when it is tried again."""
    for each in rows:
        if isinstance(each, Trial):
            store.add_verification(Verification.of(each))
    verdicts = ", ".join(dict.fromkeys(each.verdict.value for each in rows))
    given = Lift(
        problem=row.problem,
        kernel=row.kernel,
        config=row.config,
        lifted_by=user(),
        host=hostname(),
        reason=f"lifted by hand: {verdicts}",
        created_at=max(time.time(), *(each.created_at for each in rows)),
    )
    store.add_lift(given)


def _all(store: Store) -> dict[str, Judgements]:
    """Returns every stored judgement, by key, as seen from this host with all of its GPUs."""
    place = Place.here()
    parts: dict[str, tuple[list[Trial], list[Verification], list[Lift]]] = defaultdict(lambda: ([], [], []))
    for trial in store.find(Trial):
        parts[key_of(trial)][0].append(trial)
    for verification in store.find(Verification):
        parts[key_of(verification)][1].append(verification)
    for given in store.find(Lift):
        parts[key_of(given)][2].append(given)
    return {key: Judgements(place, *rows) for key, rows in parts.items()}


def _lines(judgements: Judgements, row: Judgement) -> list[str]:
    head = (short(key_of(row)), row.kernel, short(row.config.hash), row.verdict.value, _where(judgements, row))
    return [
        "  ".join(head),
        f"    {row.config}",
        f"    {summary(row.problem)} on {row.problem.gpu_name}",
        f"    {row.reason or 'no reason given'}",
        f"    judged on {row.host}{f', {row.gpu_uuid}' if row.gpu_uuid else ''}, {when(row.created_at)}",
    ]


def _where(judgements: Judgements, row: Judgement) -> str:
    """Returns where ``row`` holds, in words."""
    reach = judgements.reach(row)
    until = when(row.created_at + QUARANTINE_SECONDS)
    if reach is Reach.LIFTED:
        given = judgements.lift(row.config)
        assert given is not None, "only a lift makes a row lifted"
        return f"lifted by {given.lifted_by} on {given.host}, {when(given.created_at)}"
    return {
        Reach.EVERYWHERE: "holds everywhere",
        Reach.HERE: f"holds here until {until}",
        Reach.ELSEWHERE: f"not here, only there until {until}",
        Reach.OVER: "holds no more",
        Reach.NEVER: "never held: the interpreter is slow",
    }[reach]


def _data(judgements: Judgements, row: Judgement) -> dict[str, object]:
    reach, given = judgements.reach(row), judgements.lift(row.config)
    lifted = None
    if reach is Reach.LIFTED and given is not None:
        lifted = {"by": given.lifted_by, "host": given.host, "at": given.created_at, "reason": given.reason}
    return {
        "table": "trials" if isinstance(row, Trial) else "verifications",
        "key": key_of(row),
        "kernel": row.kernel,
        "problem": about(row.problem),
        "config_hash": row.config.hash,
        "config": row.config.model_dump(),
        "verdict": row.verdict,
        "reason": row.reason,
        "seed": row.seed,
        "proven_with": row.proven_with,
        "host": row.host,
        "gpu_uuid": row.gpu_uuid,
        "created_at": row.created_at,
        "holds": reach,
        "holds_here": reach in (Reach.EVERYWHERE, Reach.HERE),
        "lifted": lifted,
    }
