"""The command ``flashbias`` as such, and ``verify``: with real kernels, children and database files."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from autotune.detail import OutputDetail
from autotune.sandbox import Outcome
from cache_db import open_layers
from cache_db.models import Config, Verdict, Winner
from flashbias.cli import findings
from flashbias.cli.main import main
from flashbias.settings import settings
from tests.autotune.softmax_spec import softmax_config
from tests.scripts.command_cases import GOOD, KEY, PROBLEM, ROOT, WRONG, Run, proofs, python, trial


def verify(run: Run, config: Config, *more: str) -> tuple[int, dict[str, Any]]:
    """Verifies the forward trial of ``config``; returns exit code and what the JSON says."""
    code, output, errors = run("verify", "--key", KEY[:10], "--config", config.hash[:10], "--json", *more)
    assert output, errors
    return code, json.loads(output)


def test_error_map_of_a_wrong_config_names_the_planted_row(run: Run, folder: Path) -> None:
    """The rerun finds what the sweep found, tells each output's figures and the row, and keeps its judgement."""
    code, found = verify(run, WRONG)
    assert (code, found["verdict"], found["stored_verdict"], found["stored"]) == (1, "wrong", "wrong", True)
    assert found["reason"] == trial(folder, WRONG).reason
    assert (found["level"], found["seed"]) == (0, trial(folder, WRONG).seed)
    assert found["seconds"] > 0
    ragged = {each["output"]: each for each in found["outputs"] if each["case"] == "ragged"}
    assert ragged["lse"]["bad"] == 0
    assert (ragged["y"]["row"], ragged["y"]["bad"], ragged["y"]["rows"]) == ([3], 1, 7)
    assert ragged["y"]["groups"] == [{"at": {}, "bad": 1, "rows": 7, "ranges": [[3, 3]], "hidden": 0}]
    assert [row["index"] for row in ragged["y"]["worst"]] == [[3]]
    (kept,) = proofs(folder)
    assert (kept.config, kept.verdict, kept.seed) == (WRONG, Verdict.WRONG, found["seed"])
    details = tuple(OutputDetail.model_validate(each) for each in found["outputs"])
    outcome = Outcome(Verdict.WRONG, reason=found["reason"], seed=found["seed"], details=details)
    told = "\n".join(findings.lines(trial(folder, WRONG), {}, outcome))
    assert "'y' on case 'ragged': 1 of 7 rows over budget (row 7)\n  1 of 7: row 3\n" in told
    assert "    row 3: off by 1, " in told


def test_safe_config_is_proven_with_other_inputs_and_repeats(run: Run, folder: Path) -> None:
    """Seed and race repeats can be chosen; a person reads it on stdout, progress is on stderr; the trial stays."""
    before = trial(folder, GOOD)
    names = ("--key", KEY[:10], "--config", GOOD.hash[:10])
    code, output, errors = run("verify", *names, "--seed", "12345", "--repeats", "7")
    assert code == 0
    for part in (KEY[:12], GOOD.hash[:12], "safe (stored: safe), level 2, seed 12345", "0 of 7  row ", "stored    as"):
        assert part in output
    assert "proving forward" in errors
    assert "proving" not in output
    assert trial(folder, GOOD) == before
    assert [row.seed for row in proofs(folder)] == [12345]


def test_backward_is_repeated_through_the_forward_it_was_judged_with(run: Run) -> None:
    """The configs of ``proven_with`` are found by their hashes."""
    key = PROBLEM.key("backward")
    code, output, _ = run("verify", "--key", key, "--config", GOOD.hash, "--json")
    assert code == 0
    assert json.loads(output)["proven_with"] == {"forward": GOOD.model_dump()}


def test_backward_whose_forward_is_gone_cannot_be_repeated(run: Run, folder: Path) -> None:
    """Nothing else takes the lost forward's place: the exit code is 1 and the message says what is missing."""
    with sqlite3.connect(folder / "flashbias.db") as connection:
        for table in ("trials", "winners"):
            connection.execute(f"DELETE FROM flashbias_{table} WHERE kernel = 'forward'")
    connection.close()
    code, output, errors = run("verify", "--key", PROBLEM.key("backward"), "--config", GOOD.hash)
    assert (code, output) == (1, "")
    assert f"config {GOOD.hash[:12]} of forward" in errors


def test_trial_of_another_gpu_is_not_repeated_here(run: Run, folder: Path) -> None:
    """A judgement of another machine's binary says nothing; the message names what differs."""
    there = PROBLEM.model_copy(update={"gpu_name": "NVIDIA H200"})
    row = trial(folder, GOOD).model_copy(update={"problem": there})
    open_layers(folder).add_trial(row)
    code, output, errors = run("verify", "--key", there.key("forward"), "--config", GOOD.hash)
    assert (code, output) == (2, "")
    assert "another gpu name: 'NVIDIA H200', here 'triton-interpreter'" in errors


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        (["verify"], "expected --key and --config, or --all, got neither"),
        (["verify", "--key", "00"], "got only --key"),
        (["verify", "--config", "00"], "got only --config"),
        (["verify", "--all", "--seed", "1"], "--all: expected no other choice, got --seed too"),
        (["verify", "--all", "--key", "00"], "got --key too"),
        (["verify", "--key", "xyz", "--config", "00"], "expected the first hexadecimal digits of a hash, got 'xyz'"),
        (["verify", "--key", "", "--config", "00"], "expected the first hexadecimal digits of a hash, got ''"),
        (["verify", "--key", "0" * 65, "--config", "00"], "hexadecimal"),
        (["verify", "--key", "0" * 64, "--config", "00"], "with which none begin"),
        (["verify", "--key", KEY, "--config", "0" * 64], f"There are:\n  {min(GOOD.hash, WRONG.hash)[:12]}"),
        (["verify", "--all", "--seed", "one"], "expected a whole number of 64 bits, got 'one'"),
        (["verify", "--all", "--seed", str(2**63)], "64 bits"),
        (["verify", "--all", "--repeats", "0"], "expected a whole number from 1 on, got '0'"),
        (["cache", "quarantine", "lift"], "--key"),
        (["cache", "quarantine", "lift", "--key", "0" * 64], f"There are:\n  {KEY[:12]}  forward of planted"),
        (["cache", "quarantine", "lift", "--key", KEY, "--config", GOOD.hash], f"There are:\n  {WRONG.hash[:12]}"),
    ],
)
def test_wrong_usage_ends_with_2_and_says_what_was_expected(run: Run, arguments: list[str], expected: str) -> None:
    """Whatever is wrong with the command line is on stderr, with what there is instead; nothing is on stdout."""
    code, output, errors = run(*arguments)
    assert (code, output) == (2, "")
    assert expected in errors


@pytest.mark.parametrize("arguments", [[], ["cache"], ["cache", "quarantine"]])
def test_half_a_command_is_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Without its command the line ends with 2 and the usage."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "required: COMMAND" in capsys.readouterr().err


def test_beginning_that_fits_several_hashes_names_them(run: Run, folder: Path) -> None:
    """An ambiguous beginning is refused with all that it may mean."""
    configs = [softmax_config(block) for block in range(100, 140)]
    (first, second), *_ = (
        (one, other) for one in configs for other in configs if one != other and one.hash[0] == other.hash[0]
    )
    for config in (first, second):
        open_layers(folder).add_trial(trial(folder, GOOD).model_copy(update={"config": config}))
    code, _, errors = run("verify", "--key", KEY, "--config", first.hash[0])
    assert code == 2
    assert "Give more digits" in errors
    assert {first.hash[:12], second.hash[:12]} <= set(re.findall(r"[0-9a-f]{12}", errors))


def test_folder_without_a_database_is_told_and_stays_as_it_is(run: Run, tmp_path: Path) -> None:
    """A mistyped folder is wrong usage, and no file is made there."""
    for command in (["verify", "--all"], ["cache", "quarantine", "list"]):
        code, output, errors = run(*command, cache=tmp_path / "nowhere")
        assert (code, output) == (2, "")
        assert str(tmp_path / "nowhere") in errors
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(("device", "complaint"), [("/dev/full", "flashbias: [Errno 28]"), ("a closed pipe", "")])
def test_stdout_that_takes_nothing_is_no_traceback(folder: Path, device: str, complaint: str) -> None:
    """A full disk is named, a reader that has left is not, and either ends with 1."""
    command = [sys.executable, "-m", "flashbias", "cache", "quarantine", "list", "--cache-dir", str(folder)]
    if device == "/dev/full":
        descriptor = os.open(device, os.O_WRONLY)
    else:
        reader, descriptor = os.pipe()
        os.close(reader)
    try:
        done = subprocess.run(command, cwd=ROOT, stdout=descriptor, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(descriptor)
    assert done.returncode == 1
    assert done.stderr.startswith(complaint)
    assert len(done.stderr.splitlines()) == bool(complaint)


def test_characters_that_stdout_lacks_are_escaped(folder: Path) -> None:
    """Reasons may hold any character, and a terminal need not be UTF-8."""
    row = trial(folder, WRONG).model_copy(update={"reason": "planted ᵀ"})
    open_layers(folder).add_trial(row)
    done = python(
        "-m", "flashbias", "cache", "quarantine", "list", "--cache-dir", str(folder), PYTHONIOENCODING="latin-1"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "planted \\u1d40" in done.stdout


def test_wrong_setting_is_wrong_usage(folder: Path) -> None:
    """A FLASHBIAS variable with an impossible value ends any command with 2 and is named."""
    done = python("-m", "flashbias", "cache", "quarantine", "list", FLASHBIAS_MODE="sideways")
    assert done.returncode == 2
    assert "FLASHBIAS_MODE" in done.stderr


def test_command_runs_as_a_module() -> None:
    """``python -m flashbias`` is the command, with the library's version."""
    done = python("-m", "flashbias", "--version")
    assert (done.returncode, done.stdout) == (0, "flashbias 0.1.0\n")


def test_verify_all_proves_this_devices_winners_and_skips_the_others(run: Run, folder: Path) -> None:
    """Winners of another GPU, Triton or source are skipped with the reason; the rest is proven and all is well."""
    store = open_layers(folder)
    elsewhere = {"gpu_name": "NVIDIA H200", "triton_version": "0.0", "source_hash": "f" * 64}
    for column, value in elsewhere.items():
        there = PROBLEM.model_copy(update={column: value})
        store.put_winner(store.winners(PROBLEM)["forward"].model_copy(update={"problem": there}))
    code, output, _ = run("verify", "--all", "--json")
    found = json.loads(output)
    assert (code, found["unsafe"], found["skipped"]) == (0, 0, 3)
    assert sorted(row["verdict"] for row in found["rows"]) == ["safe", "safe", "skipped", "skipped", "skipped"]
    reasons = " ".join(row["reason"] for row in found["rows"])
    assert all(f"another {word}" in reasons for word in ("gpu name", "triton version", "source"))
    assert [(row.kernel, row.verdict) for row in proofs(folder)] == [
        ("forward", Verdict.SAFE),
        ("backward", Verdict.SAFE),
    ]


def test_verify_shows_no_progress_when_asked_to_be_quiet(run: Run) -> None:
    """With ``FLASHBIAS_LOG=quiet`` results are on stdout and nothing is on stderr."""
    with settings(log="quiet"):
        code, output, errors = run("verify", "--all")
    assert (code, errors) == (0, "")
    assert output.endswith("2 of 2 winners are safe, 0 are not, 0 were skipped\n")


def test_verify_all_fails_when_a_winner_is_unsafe(run: Run, folder: Path) -> None:
    """A wrong winner makes the exit code 1 and is not run again; what runs behind it is skipped, not blamed."""
    store = open_layers(folder)
    winner: Winner = store.winners(PROBLEM)["forward"]
    store.put_winner(winner.model_copy(update={"config": WRONG}), replace=True)
    code, output, errors = run("verify", "--all")
    assert code == 1
    assert "0 of 2 winners are safe, 1 are not, 1 were skipped" in output
    assert "wrong: 'y' is off by 1 in row 3" in output
    assert "no config of forward that it could run behind is safe" in output
    assert "[1/1] planted" in errors
    assert [row.verdict for row in proofs(folder)] == [Verdict.WRONG]


def test_verify_on_a_suspect_device_stores_nothing(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that does not repeat itself judges nothing: one message, exit code 1, no row."""
    (folder / "unsteady").touch()
    monkeypatch.setenv("PLANTED_UNSTEADY", str(folder / "unsteady"))
    code, _, errors = run("verify", "--key", KEY, "--config", GOOD.hash)
    assert code == 1
    assert "is suspect" in errors
    assert proofs(folder) == []
