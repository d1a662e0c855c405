"""``flashbias verify``: one stored trial once more, exactly as it was, or every stored winner of this device.

What is found is stored as a verification, beside what was found before.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from autotune.messages import summary
from autotune.progress import counted, heading
from cache_db.errors import CacheError
from cache_db.models import Problem, Verification, Winner
from flashbias.cli import findings
from flashbias.cli.database import (
    WrongUsage,
    about,
    add_spec,
    check_spec,
    distrust,
    key_of,
    one_trial,
    open_store,
    prefix,
    short,
    through,
)
from flashbias.cli.devices import device as device_of
from flashbias.cli.text import printable, tell
from flashbias.settings import current

if TYPE_CHECKING:
    from autotune.device import DeviceInfo
    from autotune.reproof import Reproof
    from cache_db.store import Store

SEED_LIMIT: Final = 2**63
_CURE: Final = "`flashbias cache quarantine list` shows the hashes of what is in quarantine"


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds ``verify`` to ``commands``; ``common`` has the flags of every command."""
    parser = commands.add_parser(
        "verify", parents=[common], help="prove a stored trial again, or every winner", description=__doc__
    )
    parser.add_argument("--key", type=prefix, help="first digits of the hash of the key (problem and kernel)")
    parser.add_argument("--config", type=prefix, help="first digits of the config's hash")
    parser.add_argument("--seed", type=seed, help="draw other inputs (default: those of the stored trial)")
    parser.add_argument("--repeats", type=_repeats, metavar="N", help="race repeats (default: those of the gate)")
    parser.add_argument("--all", action="store_true", help="prove every stored winner of this device's problems")
    parser.add_argument("--device", type=int, metavar="N", help="CUDA device (default: the current one)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_spec(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs ``verify``; returns 0 when all that was proven is safe, else 1.

    Raises WrongUsage for flags that do not go together and for what is not stored.
    """
    one = [flag for flag in ("key", "config") if getattr(options, flag) is not None]
    extra = [flag for flag in ("key", "config", "seed", "repeats") if getattr(options, flag) is not None]
    if options.all and extra:
        raise WrongUsage.explain("--all", expected="no other choice", got=f"--{extra[0]} too", cure="Leave one out")
    if not options.all and len(one) < 2:
        got = f"only --{one[0]}" if one else "neither"
        raise WrongUsage.explain("verify", expected="--key and --config, or --all", got=got, cure=_CURE)
    store = open_store(options.cache_dir)
    return _verify_all(store, options) if options.all else _verify_one(store, options)


def _verify_one(store: Store, options: argparse.Namespace) -> int:
    trial = one_trial(store, options.key, options.config)
    check_spec(trial.problem, options.specs)
    upstream = through(store, trial)
    device = device_of(options.device)
    from autotune.reproof import mismatch, rerun
    from cache_db import Layers

    reason = mismatch(trial.problem, device)
    if reason is not None:
        raise WrongUsage(f"the trial cannot be repeated here: {reason}. Run this where the trial was made")
    drawn = trial.seed if options.seed is None else options.seed
    _progress(f"proving {trial.kernel} {trial.config} with seed {drawn} on {device.name}")
    layers = Layers(store.path)
    outcome, judgement = rerun(trial, upstream, device, current(), layers, drawn, options.repeats)
    fault = _keep(store, [judgement])
    if options.json:
        print(json.dumps(findings.as_json(trial, upstream, outcome) | {"stored": not fault}, indent=1))
    else:
        tell(findings.lines(trial, upstream, outcome))
        if not fault:
            print(f"stored    as a verification in {store.path}")
    return int(not outcome.safe or fault)


def _verify_all(store: Store, options: argparse.Namespace) -> int:
    winners: dict[Problem, dict[str, Winner]] = defaultdict(dict)
    for winner in store.find(Winner):
        winners[winner.problem][winner.kernel] = winner
    device = device_of(options.device)
    found: list[Reproof] = []
    fault = False
    start = time.monotonic()
    for number, (problem, rows) in enumerate(winners.items()):
        head = heading(number, len(winners), time.monotonic() - start, counted(map(_verdict, found)))
        _progress(f"{head} {summary(problem)}")
        proofs = list(_proofs(store, device, problem, rows, options.specs))
        fault |= _keep(store, [proof.verification for proof in proofs if proof.verification is not None])
        found += proofs
        if not options.json:
            tell(line for proof in proofs for line in _lines(proof))
            sys.stdout.flush()
    bad = sum(not proof.safe and not proof.skipped for proof in found)
    skipped = sum(proof.skipped for proof in found)
    if options.json:
        rows_ = [_data(proof) for proof in found]
        print(json.dumps({"database": str(store.path), "unsafe": bad, "skipped": skipped, "rows": rows_}, indent=1))
    else:
        print(f"{len(found) - bad - skipped} of {len(found)} winners are safe, {bad} are not, {skipped} were skipped")
    return int(bool(bad) or fault)


def _proofs(
    store: Store, device: DeviceInfo, problem: Problem, rows: Mapping[str, Winner], specs: Collection[str]
) -> Iterable[Reproof]:
    """Returns what becomes of the winners of ``problem``; raises nothing that concerns this problem alone."""
    from autotune.errors import AutotuneError, SuspectDevice
    from autotune.reproof import Reproof, mismatch, reprove
    from cache_db import Layers

    reason = distrust(problem, specs) or mismatch(problem, device)
    if reason is not None:
        return [Reproof(winner, reason=reason, skipped=True) for winner in rows.values()]
    try:
        return reprove(problem, rows, device, current(), Layers(store.path))
    except SuspectDevice:
        raise
    except AutotuneError as error:
        return [Reproof(winner, reason=f"it could not be judged: {error}") for winner in rows.values()]


def _keep(store: Store, judgements: Iterable[Verification]) -> bool:
    """Stores ``judgements``; returns, and says, whether that failed."""
    try:
        for judgement in judgements:
            store.add_verification(judgement)
    except CacheError as error:
        _tell(f"what was found could not be stored: {error}")
        return True
    return False


def _lines(proof: Reproof) -> tuple[str, str]:
    winner = proof.winner
    name = f"{short(key_of(winner))}  {winner.kernel}  {short(winner.config.hash)}"
    return f"{name}  {_verdict(proof)}{f': {_reason(proof)}' if _reason(proof) else ''}", f"    {winner.config}"


def _verdict(proof: Reproof) -> str:
    if proof.verification is not None:
        return proof.verification.verdict.value
    return "skipped" if proof.skipped else "not judged"


def _reason(proof: Reproof) -> str:
    return proof.reason if proof.verification is None else proof.verification.reason


def _data(proof: Reproof) -> dict[str, object]:
    winner, made = proof.winner, proof.verification
    return {
        "key": key_of(winner),
        "kernel": winner.kernel,
        "problem": about(winner.problem),
        "config_hash": winner.config.hash,
        "config": winner.config.model_dump(),
        "verdict": _verdict(proof),
        "reason": _reason(proof),
        "level": made.level if made else 0,
        "seed": made.seed if made else None,
    }


def _progress(text: str) -> None:
    if current().log != "quiet":
        _tell(text)


def _tell(text: str) -> None:
    print(f"verify: {printable(text)}", file=sys.stderr, flush=True)


def seed(text: str) -> int:
    """Returns the seed that ``text`` means, for argparse."""
    try:
        number = int(text)
    except ValueError:
        number = SEED_LIMIT
    if not -SEED_LIMIT <= number < SEED_LIMIT:
        raise argparse.ArgumentTypeError(f"expected a whole number of 64 bits, got {text!r}")
    return number


def _repeats(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text[:12]) < SEED_LIMIT:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)
