"""Finding rows for the command line: the database, hashes by their beginnings, and what is said when there are none."""

from __future__ import annotations

import argparse
import getpass
import os
import re
import shlex
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from autotune.messages import summary
from cache_db.layers import FILE_NAME
from cache_db.models import Config, Lift, Pin, Problem, Trial, Verification, Winner
from flashbias.cli.text import printable
from flashbias.errors import FlashBiasError
from flashbias.settings import current

if TYPE_CHECKING:
    from cache_db.store import Store

SHOWN: Final = 12  # hexadecimal digits of a hash that people are shown
LISTED: Final = 20
_HEX: Final = re.compile(r"[0-9a-f]{1,64}")

Row = Trial | Verification | Winner | Lift | Pin


class WrongUsage(FlashBiasError):
    """The command line asks for what does not exist or makes no sense; the message says what there is."""


def prefix(text: str) -> str:
    """Returns ``text`` as the beginning of a hash, for argparse."""
    if not _HEX.fullmatch(text.lower()):
        raise argparse.ArgumentTypeError(f"expected the first hexadecimal digits of a hash, got {text!r}")
    return text.lower()


def open_store(folder: Path | None, *, make: bool = False) -> Store:
    """Returns the database in ``folder``, or in that of the library's settings; makes one only with ``make``.

    What is written to it is owed to the shared database of the settings, if any: ``flashbias.cli.owed`` sends it. Raises
    WrongUsage where there is no database, and CacheError for one that cannot be read.
    """
    from cache_db.own import open_own

    place = folder or current().cache_dir
    if place is None:
        raise WrongUsage.explain(
            "the database", expected="a folder", got="none in the settings", cure="Name one: --cache-dir"
        )
    path = place / FILE_NAME
    if not make and (not path.exists() or not path.stat().st_size):  # SQLite would make a database of an empty file
        raise WrongUsage.explain(
            "--cache-dir",
            expected=f"a folder with a {FILE_NAME}",
            got=f"{place}, which has none",
            cure="Nothing was tuned into it yet, or the database lies elsewhere: name its folder with --cache-dir",
        )
    address = current().db_url
    return open_own(path).owing("" if address is None else address.target)


def add_spec(parser: argparse.ArgumentParser) -> None:
    """Adds the flag ``--spec`` to a command that imports the spec of stored rows."""
    parser.add_argument(
        "--spec",
        dest="specs",
        action="append",
        default=[],
        type=_spec,
        metavar="MODULE:ATTRIBUTE",
        help="trust rows of this spec of your own, that is import its module (may be repeated)",
    )


def distrust(problem: Problem, specs: Collection[str]) -> str | None:
    """Returns why the spec of ``problem`` must not be imported, or None for attention's own and those in ``specs``.

    Importing runs code, and rows are data: a database from elsewhere must not choose what runs here.
    """
    from flashbias.kernels.problem import SPEC

    if problem.spec == SPEC or problem.spec in specs:
        return None
    return (
        f"its spec {problem.spec!r} is not flashbias' own, and its module runs when it is imported; "
        f"if you trust it: --spec {shlex.quote(problem.spec)}"
    )


def check_spec(problem: Problem, specs: Collection[str]) -> None:
    """Raises WrongUsage, which names the flag, where ``distrust`` has a reason. Call it before anything imports."""
    reason = distrust(problem, specs)
    if reason is not None:
        raise WrongUsage(f"the problem is not touched: {reason}")


def key_of(row: Row) -> str:
    """Returns the hash of the key (problem and kernel) that ``row`` belongs to."""
    return row.problem.key(row.kernel)


def one_key(rows: Iterable[Row], text: str, everything: Iterable[Row]) -> str:
    """Returns the only key among ``rows``, which were found by ``text``.

    Raises WrongUsage when there is none (and names those of ``everything``) or more than one.
    """
    found = {key_of(row): f"{row.kernel} of {summary(row.problem)}" for row in rows}
    if len(found) == 1:
        return next(iter(found))
    known = found or {key_of(row): f"{row.kernel} of {summary(row.problem)}" for row in everything}
    raise _not_one("--key", text, len(found), known)


def one_config(rows: Iterable[Row], text: str, everything: Iterable[Row]) -> Config:
    """Returns the only config among ``rows``, which were found by ``text``. Raises WrongUsage as ``one_key`` does."""
    found = {row.config.hash: row.config for row in rows}
    if len(found) == 1:
        return next(iter(found.values()))
    known = found or {row.config.hash: row.config for row in everything}
    names = {name: str(config) for name, config in known.items()}
    raise _not_one("--config", text, len(found), names)


def one_trial(store: Store, key: str, config: str) -> Trial:
    """Returns the one trial whose hashes begin with ``key`` and ``config``. Raises WrongUsage as ``one_key`` does."""
    everything = store.find(Trial)
    found_key = one_key([row for row in everything if key_of(row).startswith(key)], key, everything)
    rows = [row for row in everything if key_of(row) == found_key]
    wanted = one_config([row for row in rows if row.config.hash.startswith(config)], config, rows)
    return next(row for row in rows if row.config == wanted)


def short(name: str) -> str:
    """Returns the part of a hash that people are shown."""
    return name[:SHOWN]


def user() -> str:
    """Returns who runs this command; a container's user may have no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return f"uid {os.getuid()}"


def through(store: Store, trial: Trial) -> dict[str, Config]:
    """Returns the configs ``trial`` was judged through, looked up by hash among all that is stored of its problem.

    Raises FlashBiasError when one is stored no more.
    """
    rows: list[Trial | Verification | Winner] = [*store.trials(trial.problem), *store.verifications(trial.problem)]
    rows += store.winners(trial.problem).values()
    known = {(row.kernel, row.config.hash): row.config for row in rows}
    found = {}
    for kernel, name in trial.proven_with.items():
        if (kernel, name) not in known:
            raise FlashBiasError(
                f"config {short(name)} of {kernel}, which this trial was judged through, is not stored any more: "
                "the trial cannot be repeated as it was. Tune the problem again"
            )
        found[kernel] = known[kernel, name]
    return found


def about(problem: Problem) -> dict[str, object]:
    """Returns ``problem`` as ``--json`` shows it."""
    return {"hash": problem.hash, **problem.model_dump()}


def _spec(text: str) -> str:
    module, _, attribute = text.partition(":")
    if not module or not attribute:
        raise argparse.ArgumentTypeError(f"expected MODULE:ATTRIBUTE, got {text!r}")
    return text


def _not_one(flag: str, text: str, count: int, known: Mapping[str, str]) -> WrongUsage:
    lines = [f"  {short(name)}  {printable(what)}" for name, what in sorted(known.items())[:LISTED]]
    if len(known) > LISTED:
        lines.append(f"  … and {len(known) - LISTED} more")
    got = f"{text!r}, with which {count or 'none'} {'begin' if count else 'begins'}"
    listed = "There are:\n" + "\n".join(lines) if lines else "There are none at all: tune something first"
    cure = f"{'Give more digits. ' if count else ''}{listed}"
    return WrongUsage.explain(flag, expected="the beginning of exactly one stored hash", got=got, cure=cure)
