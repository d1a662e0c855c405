"""``flashbias cache quarantine``: what is listed, what a lift does, and databases that are old, damaged or locked."""

from __future__ import annotations

import json
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

import autotune
from autotune import Settings, resolve
from cache_db import open_layers
from cache_db.models import Verdict
from tests.autotune.softmax_spec import softmax_config
from tests.scripts.command_cases import DEVICE, GOOD, KEY, PROBLEM, WRONG, Run, python, trial


def listed(run: Run) -> list[dict[str, Any]]:
    """Returns the rows of the quarantine."""
    code, output, _ = run("cache", "quarantine", "list", "--json")
    assert code == 0
    rows: list[dict[str, Any]] = json.loads(output)["rows"]
    return rows


def test_reading_commands_load_neither_torch_nor_triton(folder: Path) -> None:
    """Who only looks into the database waits for no GPU library, with the folder of the settings as default."""
    code = (
        "import sys; from flashbias.cli.main import main; code = main(sys.argv[1:])\n"
        "assert not {'torch', 'triton'} & set(sys.modules); sys.exit(code)"
    )
    quarantine = ("cache", "quarantine")
    listed = python("-c", code, *quarantine, "list", "--json", FLASHBIAS_CACHE_DIR=str(folder))
    assert (listed.returncode, listed.stderr) == (0, "")
    assert [row["verdict"] for row in json.loads(listed.stdout)["rows"]] == ["wrong"]
    done = python("-c", code, *quarantine, "lift", "--key", KEY[:8], FLASHBIAS_CACHE_DIR=str(folder))
    assert (done.returncode, done.stderr) == (0, "")


def test_list_tells_what_where_when_and_whether_it_holds_here(run: Run, folder: Path) -> None:
    """Every judgement but safe is listed: final ones hold everywhere, another host's crash holds there."""
    there = PROBLEM.model_copy(update={"gpu_name": "NVIDIA H200"})
    changes = {"problem": there, "verdict": Verdict.CRASHED, "host": "node-7", "gpu_uuid": "GPU-7", "level": 0}
    crash = trial(folder, GOOD).model_copy(update={**changes, "created_at": time.time(), "reason": "SIGSEGV"})
    open_layers(folder).add_trial(crash)
    wrong, crashed = listed(run)
    assert (wrong["key"], wrong["config_hash"], wrong["kernel"]) == (KEY, WRONG.hash, "forward")
    assert (wrong["verdict"], wrong["holds"], wrong["holds_here"], wrong["lifted"]) == (
        "wrong",
        "everywhere",
        True,
        None,
    )
    assert (crashed["host"], crashed["gpu_uuid"], crashed["holds"]) == ("node-7", "GPU-7", "elsewhere")
    assert not crashed["holds_here"]
    _, output, _ = run("cache", "quarantine", "list")
    for part in (
        KEY[:12],
        WRONG.hash[:12],
        "holds everywhere",
        "not here, only there until",
        "node-7, GPU-7",
        "SIGSEGV",
    ):
        assert part in output
    assert "2 judgements, 1 of them hold here" in output


def test_lifted_config_is_tried_again_and_its_new_failure_counts(run: Run, folder: Path) -> None:
    """The row stays, marked with who and when; the next sweep judges anew, and what it finds bars again."""
    before = trial(folder, WRONG)
    code, output, _ = run("cache", "quarantine", "lift", "--key", KEY[:12], "--config", WRONG.hash[:12])
    assert code == 0
    assert f"{WRONG.hash[:12]}" in output
    assert trial(folder, WRONG) == before
    (row,) = listed(run)
    assert (row["holds"], row["holds_here"], row["verdict"]) == ("lifted", False, "wrong")
    assert row["lifted"]["by"]
    assert row["lifted"]["at"] == pytest.approx(time.time(), abs=60)
    assert "lifted by" in run("cache", "quarantine", "list")[1]
    assert run("cache", "quarantine", "lift", "--key", KEY[:12])[0] == 2
    resolve(PROBLEM, DEVICE, Settings(mode=autotune.Mode.RETUNE, cache_dir=folder))
    after = trial(folder, WRONG)
    assert after.verdict is Verdict.WRONG
    assert after.created_at > before.created_at
    assert [(row["holds"], row["created_at"]) for row in listed(run)] == [
        ("lifted", before.created_at),
        ("everywhere", after.created_at),
    ]


def test_lift_without_a_config_means_all_of_the_key(run: Run, folder: Path) -> None:
    """All that is in quarantine of one key is lifted, another key's is not."""
    store = open_layers(folder)
    for kernel, block in (("forward", 200), ("backward", 300)):
        bad = trial(folder, WRONG).model_copy(update={"kernel": kernel, "config": softmax_config(block, "racy")})
        store.add_trial(bad)
    assert run("cache", "quarantine", "lift", "--key", KEY)[0] == 0
    assert {(row["kernel"], row["holds"]) for row in listed(run)} == {("forward", "lifted"), ("backward", "everywhere")}


def test_failed_rerun_of_a_winner_bars_it_until_it_is_lifted(run: Run, folder: Path) -> None:
    """A winner that verify finds wrong is not run again; lifted, it is proven again before it runs."""
    stored = trial(folder, GOOD)
    store = open_layers(folder)
    wrong = stored.model_copy(update={"verdict": Verdict.WRONG, "level": 0, "created_at": time.time()})
    store.add_trial(wrong)
    read = Settings(mode=autotune.Mode.READ, cache_dir=folder)
    assert resolve(PROBLEM, DEVICE, read).choices["forward"].rung == "default"
    autotune.forget()
    assert run("cache", "quarantine", "lift", "--key", KEY, "--config", GOOD.hash)[0] == 0
    assert resolve(PROBLEM, DEVICE, read).choices["forward"].rung == "winner"
    proofs = [row for row in store.verifications(PROBLEM, "forward") if row.config == GOOD]
    assert [(row.verdict, row.level) for row in proofs] == [(Verdict.WRONG, 0), (Verdict.SAFE, 2)]


def test_lift_of_a_database_that_cannot_be_written_is_an_error(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command says so, ends with 1, and everything is as it was; a rerun still tells what it found."""
    monkeypatch.setattr("cache_db.engines.BUSY_SECONDS", 0.2)
    connection = sqlite3.connect(folder / "flashbias.db", isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")  # the one state in which even root may read and not write
    code, output, errors = run("cache", "quarantine", "lift", "--key", KEY)
    assert (code, output) == (1, "")
    assert "cannot be used" in errors
    code, output, errors = run("verify", "--key", KEY, "--config", GOOD.hash, "--json")
    found = json.loads(output)
    assert (code, found["verdict"], found["stored"]) == (1, "safe", False)
    assert "could not be stored" in errors
    connection.close()
    assert [row["holds"] for row in listed(run)] == ["everywhere"]


def test_file_of_an_earlier_version_has_no_lifts_until_the_first(run: Run, folder: Path) -> None:
    """A database without the table of lifts is read as it is, and gets the table with its first lift."""
    connection = sqlite3.connect(folder / "flashbias.db", isolation_level=None)
    connection.execute("DROP TABLE flashbias_lifts")
    connection.close()
    assert [row["holds"] for row in listed(run)] == ["everywhere"]
    assert open_layers(folder).lifts(PROBLEM) == []
    assert open_layers(folder).counts()["lifts"] == 0
    assert run("cache", "quarantine", "lift", "--key", KEY)[0] == 0
    assert [row["holds"] for row in listed(run)] == ["lifted"]


def test_file_that_is_no_database_is_an_error(run: Run, tmp_path: Path) -> None:
    """A damaged file is named, left alone, and ends the command with 1."""
    (tmp_path / "flashbias.db").write_bytes(b"no database at all" * 100)
    code, output, errors = run("cache", "quarantine", "list")
    assert (code, output) == (1, "")
    assert "is damaged" in errors
    assert (tmp_path / "flashbias.db").exists()
