"""``flashbias pin``, ``unpin`` and ``pins``: a config of one's own choice, instead of the winner, for one key.

A pin is gated: it is proven before it is stored, and again wherever a stored winner would be.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from autotune.evidence import when
from autotune.lease import hostname
from autotune.messages import summary
from cache_db.models import Config, Pin, Trial, Verification, Winner
from flashbias.cli.database import (
    WrongUsage,
    about,
    add_spec,
    check_spec,
    key_of,
    one_config,
    one_key,
    open_store,
    prefix,
    short,
    user,
)
from flashbias.cli.devices import device as device_of
from flashbias.cli.text import printable, tell
from flashbias.errors import FlashBiasError
from flashbias.settings import IMPLEMENTATIONS, current

if TYPE_CHECKING:
    from autotune.pinning import PinProof
    from cache_db.store import Store

HASH_DIGITS: Final = 64
REASON_CHARACTERS: Final = 500
_UNTUNED: Final = "A problem that is not among them has to be tuned first: scripts/prewarm.py"
_LATER: Final = "Processes that have met the problem already keep to what they decided until they end"

Row = Trial | Winner | Verification


def add_parsers(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds ``pin``, ``unpin`` and ``pins`` to ``commands``; ``common`` has the flags of every command."""
    pinning = commands.add_parser("pin", parents=[common], help="run a key with a config of your choice, once proven")
    pinning.add_argument("--key", type=prefix, required=True, help="first digits of the hash of the key")
    which = pinning.add_mutually_exclusive_group(required=True)
    which.add_argument("--config", type=prefix, help="first digits of the hash of a config stored for the key")
    which.add_argument("--params", metavar="JSON", help="a config's parameters, as '{\"BLOCK_M\": 64, …}'")
    pinning.add_argument("--variant", help="the variant that --params are of")
    pinning.add_argument(
        "--implementation",
        help=f"the implementation that --params are of: {', '.join(IMPLEMENTATIONS)} (default: the first)",
    )
    pinning.add_argument(
        "--reason", type=_reason, default="", metavar="TEXT", help="why, for those who look at the pins later"
    )
    pinning.add_argument("--device", type=int, metavar="N", help="CUDA device (default: the current one)")
    add_spec(pinning)
    pinning.set_defaults(run=pin)
    freeing = commands.add_parser("unpin", parents=[common], help="run a key with its winner again")
    freeing.add_argument("--key", type=prefix, required=True, help="first digits of the key's hash, as pins shows it")
    freeing.set_defaults(run=unpin)
    listing = commands.add_parser("pins", parents=[common], help="list what is pinned")
    listing.add_argument("--json", action="store_true", help="print JSON")
    listing.set_defaults(run=show)


def pin(options: argparse.Namespace) -> int:
    """Proves a config and pins it; returns 0, or 1 with nothing pinned when it is not safe.

    Raises WrongUsage for what is not stored and for what is no config, CacheError when it cannot be stored.
    """
    store = open_store(options.cache_dir)
    rows = _rows(store, options.key)
    config = _config(options, rows)
    problem, kernel = rows[0].problem, rows[0].kernel
    check_spec(problem, options.specs)
    device = device_of(options.device)
    from autotune.pinning import prove_pin
    from autotune.reproof import mismatch
    from cache_db import Layers

    reason = mismatch(problem, device)
    if reason is not None:
        raise WrongUsage(f"the problem cannot be run here: {reason}. Run this where it was tuned")
    _tell(f"proving {kernel} {config} on {device.name}")
    proof = prove_pin(problem, kernel, config, device, current(), Layers(store.path))
    if proof.verification is not None:
        store.add_verification(proof.verification)
    if not proof.safe:
        raise FlashBiasError(f"nothing is pinned, {kernel} {config} may not run: {proof.reason}")
    earlier = store.pins(problem).get(kernel)
    wish = {"pinned_by": user(), "host": hostname(), "reason": options.reason, "created_at": time.time()}
    store.put_pin(Pin(problem=problem, kernel=kernel, config=config, **wish))
    tell(_pinned(rows[0], config, proof, earlier))
    return 0


def unpin(options: argparse.Namespace) -> int:
    """Deletes one pin; returns 0. Raises WrongUsage when none, or more than one, is meant."""
    store = open_store(options.cache_dir)
    everything = store.find(Pin)
    found = [row for row in everything if key_of(row).startswith(options.key)]
    # A row that was edited is found by nothing but its whole hash.
    key = options.key if len(options.key) == HASH_DIGITS and not found else ""
    if key and store.remove_pin(key):
        print(f"{short(key)}: a pin that could not be read is gone")
        return 0
    key = one_key(found, options.key, everything)
    store.remove_pin(key)
    tell([f"{short(key)} {found[0].kernel} {short(found[0].config.hash)} {found[0].config}: not pinned any more"])
    _tell(_LATER)
    return 0


def show(options: argparse.Namespace) -> int:
    """Prints every pin; returns 0."""
    store = open_store(options.cache_dir)
    found = store.find(Pin)
    if options.json:
        print(json.dumps({"database": str(store.path), "rows": [_data(row) for row in found]}, indent=1))
        return 0
    for row in found:
        tell(_lines(row))
    print(f"{len(found)} pins in {store.path}")
    return 0


def _reason(text: str) -> str:
    """Returns ``text`` for argparse: what cannot be stored or shown is refused before a proof is spent on it."""
    if len(text) > REASON_CHARACTERS:
        raise argparse.ArgumentTypeError(f"expected at most {REASON_CHARACTERS} characters, got {len(text)}")
    if not text.isprintable():  # undecodable bytes are surrogates here, and those are not printable either
        raise argparse.ArgumentTypeError(f"expected one line of printable characters, got {text!r}")
    return text


def _rows(store: Store, text: str) -> list[Row]:
    """Returns all that is stored of the one key whose hash begins with ``text``."""
    everything: list[Row] = [*store.find(Trial), *store.find(Winner), *store.find(Verification)]
    found = [row for row in everything if key_of(row).startswith(text)]
    try:
        key = one_key(found, text, everything)
    except WrongUsage as error:
        raise WrongUsage(f"{error}\n{_UNTUNED}") from None
    return [row for row in found if key_of(row) == key]


def _config(options: argparse.Namespace, rows: list[Row]) -> Config:
    """Returns the config that the flags name among ``rows``, or spell out."""
    spelled = [flag for flag in ("variant", "implementation") if getattr(options, flag) is not None]
    if options.params is None:
        if spelled:
            raise WrongUsage.explain(f"--{spelled[0]}", expected="--params beside it", got="--config")
        return one_config([row for row in rows if row.config.hash.startswith(options.config)], options.config, rows)
    if options.variant is None:
        names = ", ".join(sorted({row.config.variant for row in rows}))
        raise WrongUsage.explain("--params", expected=f"--variant beside it, e.g. of {names}", got="none")
    try:
        params = json.loads(options.params)
        implementation = options.implementation or IMPLEMENTATIONS[0]
        config = Config(implementation=implementation, variant=options.variant, params=params)
        config.hash  # noqa: B018 - NaN is no JSON, though Python reads it
    except (ValueError, RecursionError) as error:
        raise WrongUsage.explain(
            "--params",
            expected='a JSON object of numbers, flags and texts, as {"BLOCK_M": 64}',
            got=f"{options.params[:200]!r}",
            cure=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
        ) from None
    return config


def _pinned(row: Row, config: Config, proof: PinProof, earlier: Pin | None) -> Iterator[str]:
    """Yields what a person reads of a new pin."""
    assert proof.outcome is not None, "only what was proven is pinned"
    yield f"{short(key_of(row))} {row.kernel} {short(config.hash)} {config}: pinned"
    for kernel, before in proof.through.items():
        yield f"    proven behind {kernel} {short(before.hash)}  {before}"
    yield f"    level {proof.outcome.level}, {proof.outcome.seconds:.1f} s"
    if earlier is not None and earlier.config != config:
        yield f"    in place of {short(earlier.config.hash)}  {earlier.config}"
    yield f"    {_LATER}"


def _lines(row: Pin) -> list[str]:
    return [
        f"{short(key_of(row))}  {row.kernel}  {short(row.config.hash)}",
        f"    {row.config}",
        f"    {summary(row.problem)} on {row.problem.gpu_name}",
        f"    {row.reason or 'no reason given'}",
        f"    pinned by {row.pinned_by} on {row.host}, {when(row.created_at)}",
    ]


def _data(row: Pin) -> dict[str, object]:
    return {
        "key": key_of(row),
        "kernel": row.kernel,
        "problem": about(row.problem),
        "config_hash": row.config.hash,
        "config": row.config.model_dump(),
        "pinned_by": row.pinned_by,
        "host": row.host,
        "reason": row.reason,
        "created_at": row.created_at,
    }


def _tell(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)
