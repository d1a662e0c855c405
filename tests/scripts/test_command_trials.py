"""``flashbias trials``: what an export holds, in every format, and what it makes of rows that are odd or broken."""

from __future__ import annotations

import csv
import io
import json
import math
import sqlite3
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from cache_db import open_layers
from cache_db.models import Verdict
from cache_db.store import Store
from flashbias.cli.trials import RESOURCES, TIMES
from tests.autotune.softmax_spec import softmax_config
from tests.scripts.command_cases import GOOD, KEY, PROBLEM, WRONG, Run, python, trial

FIXED = [
    "key",
    "problem_hash",
    "config_hash",
    "spec",
    "gpu_name",
    "capability",
    "sm_count",
    "mig_profile",
    "triton_version",
    "source_hash",
    "layout",
    "kernel",
    "implementation",
    "variant",
    "verdict",
    "level",
    "reason",
    "winner",
    "ms",
    "p20",
    "p50",
    "p80",
    "samples",
    "registers",
    "spills",
    "shared",
    "num_warps",
    "occupancy",
    "compile_seconds",
    "seed",
    "binary",
    "driver",
    "ptxas",
    "torch",
    "gpu_uuid",
    "host",
    "created_at",
    "seconds",
]


def exported(run: Run, *arguments: str) -> list[dict[str, Any]]:
    """Returns the trials as JSON lines tell them."""
    code, output, _ = run("trials", "--format", "jsonl", *arguments)
    assert code == 0
    return [json.loads(line) for line in output.splitlines()]


def cells(run: Run, *arguments: str) -> tuple[list[str], list[dict[str, str]]]:
    """Returns the header and the rows of the CSV."""
    code, output, _ = run("trials", "--format", "csv", *arguments)
    assert code == 0
    reader = csv.DictReader(io.StringIO(output, newline=""))
    rows = list(reader)
    assert all(None not in row and None not in row.values() for row in rows)
    return list(reader.fieldnames or ()), rows


def test_trials_load_neither_torch_nor_triton(folder: Path) -> None:
    """Who only exports waits for no GPU library."""
    code = (
        "import sys; from flashbias.cli.main import main; code = main(sys.argv[1:])\n"
        "assert not {'torch', 'triton'} & set(sys.modules); sys.exit(code)"
    )
    done = python("-c", code, "trials", "--format", "jsonl", FLASHBIAS_CACHE_DIR=str(folder))
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 3


def test_json_lines_hold_every_trial_as_it_is_stored(run: Run, folder: Path) -> None:
    """One object a trial, nested and with its types, and which one won."""
    rows = exported(run)
    told = {(row["kernel"], row["verdict"], row["winner"]): row for row in rows}
    assert told.keys() == {("forward", "safe", True), ("forward", "wrong", False), ("backward", "safe", True)}
    row, stored = told["forward", "wrong", False], trial(folder, WRONG)
    assert row["key"] == KEY
    assert row["problem"] == {"hash": PROBLEM.hash, **PROBLEM.model_dump()}
    assert (row["config_hash"], row["config"]) == (WRONG.hash, WRONG.model_dump())
    assert row["figures"] == {**stored.figures, "p50": stored.figures["ms"]}
    assert row["environment"] == stored.environment.model_dump()
    assert datetime.fromisoformat(row["created_at"]).timestamp() == pytest.approx(stored.created_at, abs=1e-5)
    assert row["created_at"].endswith("+00:00")
    for name in ("level", "reason", "seed", "proven_with", "binary", "gpu_uuid", "host", "seconds"):
        assert row[name] == getattr(stored, name), name
    assert told["backward", "safe", True]["proven_with"] == {"forward": GOOD.hash}
    assert [row["created_at"] for row in rows] == sorted(row["created_at"] for row in rows)


def test_csv_has_a_column_for_everything_and_says_the_same(run: Run, folder: Path) -> None:
    """The header is the documented columns with what is nested between them; cells are those of the JSON lines."""
    header, rows = cells(run)
    nested = ("field.", "param.", "figure.", "proven_with.")
    assert [name for name in header if not name.startswith(nested)] == FIXED
    assert header.index("layout") < header.index("field.backward") < header.index("field.slow") < header.index("kernel")
    assert header.index("variant") < header.index("param.block") < header.index("param.fault") < header.index("verdict")
    assert header.index("compile_seconds") < header.index("figure.repeats") < header.index("seed")
    for row, told in zip(rows, exported(run), strict=True):
        assert row["winner"] == str(told["winner"]).lower()
        assert row["field.forward"] == PROBLEM.fields["forward"]
        assert row["param.block"] == str(told["config"]["params"]["block"])
        assert row["param.fault"] == told["config"]["params"].get("fault", "")
        assert float(row["p50"]) == float(row["ms"]) == told["figures"]["ms"]
        assert float(row["figure.repeats"] or -1) == told["figures"].get("repeats", -1)
        assert row["reason"] == told["reason"]
        assert row["proven_with.forward"] == told["proven_with"].get("forward", "")


def test_csv_columns_are_those_of_all_rows(run: Run, folder: Path) -> None:
    """A figure or parameter that one trial alone has is a column, empty elsewhere; known figures need no trial."""
    more = {"registers": 168, "occupancy": 0.125, "made_up": True}
    config = softmax_config(256, warps=8)
    open_layers(folder).add_trial(trial(folder, GOOD).model_copy(update={"config": config, "figures": more}))
    header, rows = cells(run)
    assert {*TIMES, *RESOURCES, "param.warps", "figure.made_up"} <= set(header)
    (found,) = (row for row in rows if row["config_hash"] == config.hash)
    assert [found[name] for name in ("registers", "occupancy", "figure.made_up", "param.warps", "ms")] == [
        "168",
        "0.125",
        "true",
        "8",
        "",
    ]
    assert all(row["param.warps"] == row["registers"] == "" for row in rows if row is not found)


@pytest.mark.parametrize("text", ["=1+1", "+1", "-2", "@SUM(A1)", "\t=1", "\r=1", "  =1", "\uff1d1+1", "-inf", "\n"])
def test_no_cell_is_a_formula(run: Run, folder: Path, text: str) -> None:
    """Text that a spreadsheet would evaluate is quoted with an apostrophe; numbers stay numbers, JSON stays as it is."""
    config = softmax_config(256, note=text)
    row = trial(folder, GOOD).model_copy(update={"config": config, "reason": text, "host": text, "seed": -7})
    open_layers(folder).add_trial(row)
    (found,) = (row for row in cells(run)[1] if row["config_hash"] == config.hash)
    assert found["reason"] == found["host"] == found["param.note"] == f"'{text}"
    assert found["seed"] == "-7"
    assert [row["reason"] for row in exported(run) if row["config_hash"] == config.hash] == [text]


def test_numbers_that_are_none_are_empty_or_null(run: Run, folder: Path) -> None:
    """What JSON cannot hold is null there; in a CSV it is text, and text is never a formula."""
    odd = trial(folder, GOOD).model_copy(update={"figures": {"ms": math.inf, "worst": -math.inf}, "created_at": 1e300})
    open_layers(folder).add_trial(odd)
    (told,) = (row for row in exported(run) if row["key"] == KEY and row["config_hash"] == GOOD.hash)
    assert told["figures"] == {"ms": None, "worst": None, "p50": None}
    assert told["created_at"] is None
    (found,) = (row for row in cells(run)[1] if row["key"] == KEY and row["config_hash"] == GOOD.hash)
    assert (found["ms"], found["figure.worst"], found["created_at"]) == ("inf", "'-inf", "")
    assert run("trials")[0] == 0


def test_quotes_commas_and_line_ends_survive_the_file(run: Run, folder: Path, tmp_path: Path) -> None:
    """The file is RFC 4180: lines end in CR LF, and what is inside a cell comes back as it was."""
    reason = 'said "no", then\nleft ᵀ'
    open_layers(folder).add_trial(trial(folder, WRONG).model_copy(update={"reason": reason}))
    target = tmp_path / "trials.csv"
    assert run("trials", "--format", "csv", "--output", str(target)) == (0, "", "")
    raw = target.read_bytes()
    assert raw.count(b"\r\n") == 4
    with target.open(encoding="utf-8", newline="") as file:
        reasons = [row["reason"] for row in csv.DictReader(file) if row["verdict"] == "wrong"]
    assert reasons == [reason]


def test_table_has_one_line_a_trial(run: Run, folder: Path) -> None:
    """People get a heading and a line each, with the verdict in words and the winner marked."""
    timed = trial(folder, GOOD).model_copy(update={"config": softmax_config(256), "level": 0})
    open_layers(folder).add_trial(timed)
    code, output, _ = run("trials", "--kernel", "forward")
    assert code == 0
    heading, *lines = output.splitlines()
    assert heading.split()[:4] == ["key", "kernel", "config", "verdict"]
    assert len(lines) == 3
    assert [line.split()[3:6] for line in lines if "safe" in line] == [["safe", "2", "*"]]
    assert ["timed only" in line for line in lines].count(True) == 1
    assert all(KEY[:12] in line for line in lines)


def test_trials_can_be_chosen(run: Run) -> None:
    """By key, by kernel, by one or several verdicts; a verdict that nothing has is no fault."""
    assert {row["kernel"] for row in exported(run, "--key", PROBLEM.key("backward")[:10])} == {"backward"}
    assert len(exported(run, "--kernel", "forward")) == 2
    assert [row["verdict"] for row in exported(run, "--verdict", "wrong")] == ["wrong"]
    assert len(exported(run, "--verdict", "wrong", "safe")) == len(exported(run)) == 3
    assert exported(run, "--verdict", "racy") == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--key", "0" * 64], f"There are:\n  {min(KEY, PROBLEM.key('backward'))[:12]}"),
        (["--kernel", "sideways"], "expected one of those stored, backward, forward, got sideways"),
        (["--verdict", "fine"], "invalid choice: 'fine'"),
        (["--format", "xml"], "invalid choice: 'xml'"),
    ],
)
def test_wrong_choice_says_what_there_is(run: Run, arguments: list[str], expected: str) -> None:
    """Nothing is on stdout, the exit code is 2, and the message names the choices."""
    code, output, errors = run("trials", *arguments)
    assert (code, output) == (2, "")
    assert expected in errors


def test_empty_database_is_an_empty_export(run: Run, tmp_path: Path) -> None:
    """A header without rows, or nothing at all, and all is well."""
    empty = tmp_path / "empty"
    Store.open(empty / "flashbias.db")
    code, output, _ = run("trials", "--format", "csv", cache=empty)
    assert (code, output.split("\r\n")) == (0, [",".join(FIXED), ""])
    assert run("trials", "--format", "jsonl", "--kernel", "forward", cache=empty)[:2] == (0, "")


def test_broken_row_is_skipped_with_a_warning(run: Run, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A row that was edited by hand is named and left out; the others come."""
    with sqlite3.connect(folder / "flashbias.db") as connection:
        connection.execute("UPDATE flashbias_trials SET params = '{}' WHERE verdict = 'wrong'")
    connection.close()
    assert [row["verdict"] for row in exported(run)] == [Verdict.SAFE] * 2
    assert "1 stored Trial row(s) ignored" in caplog.text


def test_output_that_cannot_be_written_is_an_error(run: Run, tmp_path: Path) -> None:
    """A folder that is missing and a full disk end with 1 and a message, not with a traceback."""
    for target, complaint in ((tmp_path / "no" / "file", "No such file"), (Path("/dev/full"), "No space left")):
        code, output, errors = run("trials", "--output", str(target))
        assert (code, output) == (1, "")
        assert complaint in errors
