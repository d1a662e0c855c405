"""``flashbias trials``: every stored trial with all that is known of it, as a table, CSV or JSON lines."""

from __future__ import annotations

import argparse
import csv
import json
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TextIO

from cache_db.models import Problem, Scalar, Trial, Verdict, Winner
from flashbias.cli.database import WrongUsage, about, key_of, one_key, open_store, prefix, short
from flashbias.cli.destination import destination
from flashbias.cli.text import printable

TIMES: Final = ("ms", "p20", "p50", "p80", "samples")
RESOURCES: Final = ("registers", "spills", "shared", "num_warps", "occupancy", "compile_seconds")
FIGURES: Final = (*TIMES, *RESOURCES)
# The CSV's columns in their order; each list of names between them is followed by what rows have under that name.
_OF_PROBLEM: Final = tuple(name for name in Problem.model_fields if name != "fields")
_HEAD: Final = ("key", "problem_hash", "config_hash", *_OF_PROBLEM)
_OF_CONFIG: Final = ("kernel", "implementation", "variant")
_OF_JUDGEMENT: Final = ("verdict", "level", "reason", "winner", *FIGURES)
_TAIL: Final = ("binary", "driver", "ptxas", "torch", "gpu_uuid", "host", "created_at", "seconds")
_FORMULAS: Final = frozenset("=+-@")
_TABLE: Final = (
    f"{'key':13}{'kernel':15}{'config':13}{'verdict':17}{'level':6}{'win':4}{'p50 ms':>9}{'p20':>9}{'p80':>9}"
    f"{'regs':>6}{'spills':>7}{'shared':>8}{'occup.':>7}  config"
)


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds ``trials`` to ``commands``; ``common`` has the flags of every command."""
    parser = commands.add_parser(
        "trials", parents=[common], help="list every stored trial, for people or as CSV or JSON", description=__doc__
    )
    parser.add_argument("--key", type=prefix, help="only of this key (problem and kernel): first digits of its hash")
    parser.add_argument("--kernel", metavar="NAME", help="only of this kernel")
    parser.add_argument(
        "--verdict", nargs="+", action="extend", choices=[str(each) for each in Verdict], help="only these verdicts"
    )
    parser.add_argument("--format", choices=tuple(_WRITERS), default="table", help="default: table")
    parser.add_argument("--json", dest="format", action="store_const", const="jsonl", help="as --format jsonl")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write to FILE instead of stdout")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Writes the trials asked for, oldest first; returns 0.

    Raises WrongUsage for a key or kernel that is not stored and the database as output, CacheError and OSError for what cannot be read or written.
    """
    store = open_store(options.cache_dir)
    trials = _chosen(store.find(Trial), options)
    winners = {(key_of(row), row.config) for row in store.find(Winner)}
    rows = [_row(trial, (key_of(trial), trial.config) in winners) for trial in trials]
    with destination(options.output, store.path) as file:
        _WRITERS[options.format](rows, file)
    return 0


def _chosen(everything: Sequence[Trial], options: argparse.Namespace) -> list[Trial]:
    trials = list(everything)
    if options.key is not None:
        key = one_key([row for row in trials if key_of(row).startswith(options.key)], options.key, trials)
        trials = [row for row in trials if key_of(row) == key]
    if options.kernel is not None:
        kernels = sorted({row.kernel for row in everything})
        if kernels and options.kernel not in kernels:
            names = ", ".join(kernels)
            raise WrongUsage.explain("--kernel", expected=f"one of those stored, {names}", got=options.kernel)
        trials = [row for row in trials if row.kernel == options.kernel]
    return [row for row in trials if options.verdict is None or row.verdict in options.verdict]


def _row(trial: Trial, winner: bool) -> dict[str, Any]:
    """Returns one trial as the JSON line that tells of it."""
    figures: dict[str, Scalar] = dict(trial.figures)
    if "ms" in figures:
        figures["p50"] = figures["ms"]
    return {
        "key": key_of(trial),
        "problem": about(trial.problem),
        "kernel": trial.kernel,
        "config_hash": trial.config.hash,
        "config": trial.config.model_dump(),
        "verdict": str(trial.verdict),
        "level": trial.level,
        "reason": trial.reason,
        "winner": winner,
        "figures": figures,
        "seed": trial.seed,
        "proven_with": trial.proven_with,
        "binary": trial.binary,
        "environment": trial.environment.model_dump(),
        "gpu_uuid": trial.gpu_uuid,
        "host": trial.host,
        "created_at": _when(trial.created_at),
        "seconds": trial.seconds,
    }


def _write_table(rows: Iterable[Mapping[str, Any]], file: TextIO) -> None:
    print(_TABLE, file=file)
    for row in rows:
        config, figures = row["config"], row["figures"]
        params = " ".join(f"{name}={value}" for name, value in config["params"].items())
        verdict = "timed only" if row["verdict"] == "safe" and not row["level"] else row["verdict"]
        cells = [
            f"{short(row['key']):13}{row['kernel']:15}{short(row['config_hash']):13}",
            f"{verdict:17}{row['level']:<6}{'*' if row['winner'] else '':4}",
            *(f"{_number(figures.get(name)):>9}" for name in ("p50", "p20", "p80")),
            f"{_number(figures.get('registers')):>6}{_number(figures.get('spills')):>7}",
            f"{_number(figures.get('shared')):>8}{_number(figures.get('occupancy')):>7}",
            f"  {config['implementation']}/{config['variant']} {params}",
        ]
        print(printable("".join(cells)), file=file)


def _write_csv(rows: Sequence[Mapping[str, Any]], file: TextIO) -> None:
    """Writes RFC 4180: one header, lines that end in CR LF, empty cells for what a trial does not have."""
    cells = [_flat(row) for row in rows]
    names = [name for row in cells for name in row]

    def under(part: str) -> list[str]:
        return sorted({name for name in names if name.startswith(f"{part}.")})

    header = [*_HEAD, *under("field"), *_OF_CONFIG, *under("param"), *_OF_JUDGEMENT, *under("figure"), "seed"]
    header += [*under("proven_with"), *_TAIL]
    writer = csv.DictWriter(file, header)
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in cells)


def _write_json_lines(rows: Iterable[Mapping[str, Any]], file: TextIO) -> None:
    for row in rows:
        print(json.dumps(_plain(row)), file=file)


_WRITERS: Final = {"table": _write_table, "csv": _write_csv, "jsonl": _write_json_lines}


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns one row as column to value; what is under a name of its own carries it, as ``field.head_dim``."""
    problem, config, figures = dict(row["problem"]), row["config"], row["figures"]
    nested = {
        "field": problem.pop("fields"),
        "param": config["params"],
        "figure": {name: value for name, value in figures.items() if name not in FIGURES},
        "proven_with": row["proven_with"],
    }
    named = {
        name: row[name] for name in (*_OF_JUDGEMENT, *_TAIL, "key", "config_hash", "kernel", "seed") if name in row
    }
    return (
        {"problem_hash": problem.pop("hash"), **problem, **row["environment"], **named}
        | {"implementation": config["implementation"], "variant": config["variant"]}
        | {name: figures[name] for name in FIGURES if name in figures}
        | {f"{part}.{name}": value for part, values in nested.items() for name, value in values.items()}
    )


def _cell(value: object) -> object:
    """Returns what a cell holds: text that a spreadsheet would take for a formula begins with an apostrophe."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    text = "" if value is None else str(value)
    first = unicodedata.normalize("NFKC", text.lstrip()[:1])  # full-width signs count too
    return f"'{text}" if first in _FORMULAS or text[:1] in {"\t", "\r", "\n"} else text


def _plain(value: Any) -> Any:
    """Returns what JSON can hold: None for what is no number."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def _when(seconds: float) -> str | None:
    """Returns a time in ISO 8601, UTC; None for one that no calendar has (a row's may be anything)."""
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat()
    except (OverflowError, OSError, ValueError):
        return None
