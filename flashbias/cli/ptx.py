"""``flashbias ptx``: saves what a stored trial's config compiles to, and says whether that is what was judged."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cache_db.models import Trial, Verdict, Verification
from flashbias.cli.database import WrongUsage, about, add_spec, check_spec, key_of, one_trial, open_store, prefix, short
from flashbias.cli.text import tell
from flashbias.errors import FlashBiasError

if TYPE_CHECKING:
    from autotune.remake import Remade
    from cache_db.store import Store

_DEADLY: Final = frozenset({Verdict.CRASHED, Verdict.TIMEOUT, Verdict.KILLED})


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds ``ptx`` to ``commands``; ``common`` has the flags of every command."""
    parser = commands.add_parser(
        "ptx", parents=[common], help="save the IR, PTX and machine code of a stored trial", description=__doc__
    )
    parser.add_argument("--key", type=prefix, required=True, help="first digits of the hash of the key")
    parser.add_argument("--config", type=prefix, required=True, help="first digits of the config's hash")
    parser.add_argument("--output", type=Path, default=Path(), metavar="DIR", help="folder to write to (default: here)")
    parser.add_argument("--unsafe", action="store_true", help="compile it even if it ended or held up a process before")
    add_spec(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Writes one file for each stage; returns 0 unless the machine code is another than the trial's, then 1.

    Raises WrongUsage for a trial that cannot be compiled here and today, FlashBiasError for one that may end or hang
    this process, AutotuneError for one that does not compile.
    """
    store = open_store(options.cache_dir)
    trial = one_trial(store, options.key, options.config)
    check_spec(trial.problem, options.specs)
    if not options.unsafe:
        _check_survives(store, trial)
    from autotune.remake import obstacle, remake

    reason = obstacle(trial.problem)
    if reason is not None:
        raise WrongUsage(f"the trial cannot be compiled again here: {reason}")
    made = remake(trial)
    tell(map(str, _write(options.output, trial, made)))
    tell([_compared(trial, made)])
    return int(_same(trial, made) is False)


def _check_survives(store: Store, trial: Trial) -> None:
    """Raises FlashBiasError when the newest judgement of the config says that its process did not survive it.

    Whether it was the compiler or the launch that ended the process is not stored, so neither is risked in this one.
    """
    later = [
        row for row in store.verifications(trial.problem) if (row.kernel, row.config) == (trial.kernel, trial.config)
    ]
    rows: list[Trial | Verification] = [trial, *later]
    last = max(rows, key=lambda row: row.created_at)
    if last.verdict in _DEADLY:
        raise FlashBiasError(
            f"{trial.kernel} {trial.config} is stored as {last.verdict.value} ({last.reason or 'no reason given'}): "
            "compiling it may crash or hang this process too; to compile it all the same: --unsafe"
        )


def _write(folder: Path, trial: Trial, made: Remade) -> list[Path]:
    """Writes ``<kernel>-<config>.<stage>`` for each stage, and what they are as JSON; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{re.sub(r'[^0-9A-Za-z_-]', '_', trial.kernel)}-{short(trial.config.hash)}"
    files = []
    for suffix, content in made.assembly.items():
        files.append(folder / f"{stem}.{re.sub(r'[^0-9A-Za-z_.-]', '_', suffix)}")
        files[-1].write_bytes(content if isinstance(content, bytes) else content.encode())
    files.append(folder / f"{stem}.json")
    files[-1].write_text(json.dumps(_data(trial, made), indent=1), encoding="utf-8")
    return files


def _data(trial: Trial, made: Remade) -> dict[str, object]:
    return {
        "key": key_of(trial),
        "kernel": trial.kernel,
        "problem": about(trial.problem),
        "config_hash": trial.config.hash,
        "config": trial.config.model_dump(),
        "verdict": trial.verdict,
        "figures": {**trial.figures, **made.figures},
        "binary": trial.binary,
        "binary_here": made.binary,
        "same_binary": _same(trial, made),
        "environment": trial.environment.model_dump(),
        "environment_here": made.environment.model_dump(),
    }


def _same(trial: Trial, made: Remade) -> bool | None:
    """Returns whether the machine code is that of the trial; None for a trial that stored none."""
    return made.binary == trial.binary if trial.binary else None


def _compared(trial: Trial, made: Remade) -> str:
    same = _same(trial, made)
    if same is None:
        return f"binary    {short(made.binary)}; the trial stored none to compare with: it was not proven"
    if same:
        return f"binary    {short(made.binary)}, that of the trial"
    then, here = trial.environment.ptxas, made.environment.ptxas
    assembler = f"assembler {here or 'unknown'} here, {then or 'unknown'} then" if here != then else f"assembler {here}"
    return f"binary    {short(made.binary)}, ANOTHER than the trial's {short(trial.binary)} ({assembler})"
