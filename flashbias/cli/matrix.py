"""Compiles every candidate of representative problems for every architecture, without a GPU, or says which rule prunes it.

Each compile has a process of its own. Started again with the same file, it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from autotune.device import interpreting
from flashbias.bench import compiling, matrix, matrix_tables
from flashbias.bench.matrix import Row
from flashbias.cli.text import tell

_ROW_SECONDS = 180.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0, 1 where a candidate is neither pruned nor compiles, 2 for wrong usage."""
    options = _parser().parse_args(arguments)
    if interpreting():
        print(
            "compile_matrix: TRITON_INTERPRET is set: functions of the interpreter cannot be compiled", file=sys.stderr
        )
        return 2
    made_by = compiling.environment()
    every = [row for arch in options.arch for name in options.problems for row in matrix.rows(arch, name)]
    pruned, left = matrix.split(every)
    try:
        known = _read(options.output, made_by)
        wanted = matrix.fair(left, options.seed)[: options.sample]
        done = {row.key: known[row.key] for row in left if row.key in known and known[row.key].status != "pruned"}
        _write(options.output, made_by, known.values())
        with options.output.open("a", encoding="utf-8") as file:
            todo = [row for row in wanted if row.key not in done]
            for row in compiling.compiled(todo, options.jobs, _ROW_SECONDS, options.seconds):
                file.write(json.dumps(row.to_json()) + "\n")
                file.flush()
                done[row.key] = row
                _progress(len(done), len(left), row)
    except (OSError, ValueError) as error:
        print(f"compile_matrix: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ncompile_matrix: stopped; the same command goes on", file=sys.stderr)
    rows = [*pruned, *done.values()]
    current = {row.key for row in every}
    _write(options.output, made_by, [row for key, row in known.items() if key not in current] + rows)
    tell(matrix_tables.summary(rows, [row for row in left if row.key not in done]))
    tell(["", *matrix_tables.faults(rows)] if any(row.fault for row in rows) else [])
    return int(any(row.fault for row in rows))


def _progress(done: int, total: int, row: Row) -> None:
    """Tells of a row on stderr, so that stdout holds the tables alone."""
    told = f"{row.arch} {row.problem} {row.kernel} {row.config.variant}: {row.status} {row.reason}"
    print(f"[{done}/{total}] {float(row.figures['seconds']):.1f} s {told}", file=sys.stderr, flush=True)


def _read(path: Path, made_by: Mapping[str, str]) -> dict[matrix.Key, Row]:
    """Returns the rows of ``path`` but those worth another try; none if there is no such file.

    Raises ValueError for a file of other compilers or kernels, or of something else.
    """
    if not path.exists():
        return {}
    first, *lines = path.read_text(encoding="utf-8").splitlines() or [""]
    try:
        head = json.loads(first)
        rows = [Row.from_json(json.loads(line)) for line in lines if line.endswith("}")]  # the last may be half a line
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no compile matrix ({error}): give --output another name") from error
    if head != made_by:
        differing = ", ".join(name for name in made_by if not isinstance(head, dict) or head.get(name) != made_by[name])
        raise ValueError(f"{path} was made with another {differing}: give --output another name, or delete it")
    return {row.key: row for row in rows if row.final}


def _write(path: Path, made_by: Mapping[str, str], rows: Iterable[Row]) -> None:
    """Writes the whole file anew, in one step."""
    lines = [json.dumps(dict(made_by)), *(json.dumps(row.to_json()) for row in rows)]
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text("\n".join(lines) + "\n", encoding="utf-8")
    beside.replace(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="compile_matrix.py", description=__doc__)
    archs, names = list(matrix.ARCHITECTURES), list(matrix.PROBLEMS)
    parser.add_argument("--arch", nargs="+", choices=archs, default=archs, help="architectures (default: all)")
    parser.add_argument("--problems", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--sample", type=_count, metavar="N", help="compile N at most, spread over all of them")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="another number draws another sample")
    parser.add_argument("--jobs", type=_count, default=len(os.sched_getaffinity(0)), help="compiles at a time")
    parser.add_argument("--seconds", type=float, metavar="T", help="begin no more compiles after T seconds")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("compile-matrix.jsonl"),
        metavar="FILE",
        help="every row, and what to go on from",
    )
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text[:12]) <= 10**9:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to 1000000000, got {text!r}")
    return int(text)
