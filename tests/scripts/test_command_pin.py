"""``flashbias pin``, ``unpin`` and ``pins``: with real kernels, children and database files."""

from __future__ import annotations

import json
import sqlite3
import time
from pathlib import Path

import pytest

import autotune
from autotune import Settings, resolve
from cache_db import open_layers
from cache_db.models import Pin, Verdict
from tests.autotune.softmax_spec import softmax_config
from tests.scripts.command_cases import DEVICE, GOOD, KEY, PROBLEM, WRONG, Run, proofs, python

PARAMS = ("--params", '{"block": 128}', "--variant", "rows")
PINNED = softmax_config(128)


def pinned(folder: Path) -> None:
    """Pins ``GOOD`` as another process would."""
    row = Pin(problem=PROBLEM, kernel="forward", config=GOOD, pinned_by="me", host="here", created_at=time.time())
    open_layers(folder).put_pin(row)


def test_pin_is_proven_stored_listed_used_and_taken_back(run: Run, folder: Path) -> None:
    """A config spelled out is pinned with its proof, shows in the list, runs, and is gone after unpin."""
    winner = open_layers(folder).winners(PROBLEM)["forward"]
    code, output, errors = run("pin", "--key", KEY[:10], *PARAMS, "--reason", "to compare")
    assert code == 0, errors
    assert f"{KEY[:12]} forward {PINNED.hash[:12]} {PINNED}: pinned" in output
    assert "proving forward" in errors
    (proof,) = proofs(folder)
    assert (proof.config, proof.verdict, proof.level) == (PINNED, Verdict.SAFE, 2)
    (row,) = json.loads(run("pins", "--json")[1])["rows"]
    assert (row["key"], row["kernel"], row["config_hash"]) == (KEY, "forward", PINNED.hash)
    assert (row["config"], row["reason"]) == (PINNED.model_dump(), "to compare")
    assert row["created_at"] == pytest.approx(time.time(), abs=60)
    listed = run("pins")[1]
    assert all(part in listed for part in (KEY[:12], str(PINNED), "to compare", "pinned by", "1 pins in"))
    choice = resolve(PROBLEM, DEVICE, Settings(cache_dir=folder)).choices["forward"]
    assert (choice.rung, choice.config) == ("pinned", PINNED)
    code, output, _ = run("unpin", "--key", KEY[:10])
    assert (code, "not pinned any more" in output) == (0, True)
    assert "0 pins in" in run("pins")[1]
    autotune.forget()
    choice = resolve(PROBLEM, DEVICE, Settings(cache_dir=folder)).choices["forward"]
    assert (choice.rung, choice.config) == ("winner", winner.config)


def test_stored_config_is_pinned_by_its_hash_and_replaces_the_pin_before(run: Run, folder: Path) -> None:
    """What was tried is named by its hash; a key has one pin, and the one that it replaces is told."""
    assert run("pin", "--key", KEY, *PARAMS)[0] == 0
    code, output, _ = run("pin", "--key", KEY, "--config", GOOD.hash[:12])
    assert code == 0
    assert f"in place of {PINNED.hash[:12]}" in output
    assert open_layers(folder).pins(PROBLEM)["forward"].config == GOOD
    code, output, _ = run("pin", "--key", PROBLEM.key("backward"), "--config", GOOD.hash[:12])
    assert f"proven behind forward {GOOD.hash[:12]}" in output
    assert set(open_layers(folder).pins(PROBLEM)) == {"forward", "backward"}
    code, _, errors = run("unpin", "--key", "0" * 12)
    assert (code, KEY[:12] in errors, PROBLEM.key("backward")[:12] in errors) == (2, True, True)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--config", WRONG.hash), "it is in quarantine: wrong"),
        (("--params", '{"block": 256, "fault": "zeroed_row"}', "--variant", "rows"), "wrong, 'y' is off by 1 in row 3"),
        (("--params", '{"block": 8}', "--variant", "rows"), "the rules refuse it: block 8 does not hold"),
    ],
    ids=["barred", "wrong", "refused"],
)
def test_what_is_not_safe_is_not_pinned(run: Run, folder: Path, arguments: tuple[str, ...], expected: str) -> None:
    """The exit code is 1, the reason is on stderr, nothing is pinned; what the gate found is kept."""
    code, output, errors = run("pin", "--key", KEY, *arguments)
    assert (code, output) == (1, "")
    assert "nothing is pinned" in errors
    assert expected in errors
    assert open_layers(folder).counts()["pins"] == 0
    kept = [row.verdict for row in proofs(folder)]
    assert kept == ([Verdict.WRONG] if expected.startswith("wrong") else [])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["pin"], "required: --key"),
        (["pin", "--key", KEY], "one of the arguments --config --params is required"),
        (["pin", "--key", KEY, "--config", "00", "--params", "{}"], "not allowed with"),
        (["pin", "--key", "xyz", "--config", "00"], "hexadecimal"),
        (["pin", "--key", "0" * 64, "--config", "00"], "has to be tuned first: scripts/prewarm.py"),
        (["pin", "--key", KEY, "--config", "0" * 64], f"There are:\n  {min(GOOD.hash, WRONG.hash)[:12]}"),
        (["pin", "--key", KEY, "--config", GOOD.hash, "--variant", "rows"], "--variant: expected --params beside it"),
        (["pin", "--key", KEY, "--params", "{}"], "expected --variant beside it, e.g. of rows"),
        (["pin", "--key", KEY, "--params", "{", "--variant", "rows"], "--params: expected a JSON object"),
        (["pin", "--key", KEY, "--params", "[64]", "--variant", "rows"], "--params: expected a JSON object"),
        (["pin", "--key", KEY, "--params", '{"block": [1]}', "--variant", "rows"], "got '{\"block\": [1]}'"),
        (["pin", "--key", KEY, "--params", '{"block": NaN}', "--variant", "rows"], "--params: expected a JSON object"),
        (["pin", "--key", KEY, "--params", "[" * 100_000, "--variant", "rows"], "RecursionError"),
        (["unpin"], "required: --key"),
        (["unpin", "--key", "00"], "There are none at all"),
    ],
)
def test_wrong_usage_ends_with_2_and_says_what_was_expected(run: Run, arguments: list[str], expected: str) -> None:
    """Whatever is wrong with the command line is on stderr, with what there is instead; nothing is on stdout."""
    code, output, errors = run(*arguments)
    assert (code, output) == (2, "")
    assert expected in errors


def test_problem_of_another_gpu_is_not_pinned_here(run: Run, folder: Path) -> None:
    """A proof on this machine would say nothing of that one."""
    there = PROBLEM.model_copy(update={"gpu_name": "NVIDIA H200"})
    store = open_layers(folder)
    store.put_winner(store.winners(PROBLEM)["forward"].model_copy(update={"problem": there}))
    code, output, errors = run("pin", "--key", there.key("forward"), "--config", GOOD.hash)
    assert (code, output) == (2, "")
    assert "Run this where it was tuned" in errors


def test_file_of_an_earlier_version_has_no_pins_until_the_first(run: Run, folder: Path) -> None:
    """A database without the table of pins is read as it is, and gets the table with its first pin."""
    connection = sqlite3.connect(folder / "flashbias.db", isolation_level=None)
    connection.execute("DROP TABLE flashbias_pins")
    connection.close()
    assert open_layers(folder).pins(PROBLEM) == {}
    assert open_layers(folder).counts()["pins"] == 0
    assert not open_layers(folder).remove_pin(KEY)
    assert "0 pins in" in run("pins")[1]
    pinned(folder)
    assert "1 pins in" in run("pins")[1]


def test_edited_pin_is_warned_about_and_goes_by_its_whole_hash(
    run: Run, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A row that is no pin any more pins nothing and can be taken back by the key's whole hash."""
    pinned(folder)
    connection = sqlite3.connect(folder / "flashbias.db", isolation_level=None)
    connection.execute("UPDATE flashbias_pins SET params = '{}'")
    connection.close()
    assert "0 pins in" in run("pins")[1]
    assert "1 stored Pin row(s) ignored" in caplog.text
    assert run("unpin", "--key", KEY[:12])[0] == 2
    code, output, _ = run("unpin", "--key", KEY)
    assert (code, "could not be read is gone" in output) == (0, True)
    assert open_layers(folder).counts()["pins"] == 0


def test_listing_and_unpinning_load_neither_torch_nor_triton(folder: Path) -> None:
    """Who only looks into the database waits for no GPU library."""
    code = (
        "import sys; from flashbias.cli.main import main; code = main(sys.argv[1:])\n"
        "assert not {'torch', 'triton'} & set(sys.modules); sys.exit(code)"
    )
    pinned(folder)
    listed = python("-c", code, "pins", "--json", FLASHBIAS_CACHE_DIR=str(folder))
    assert (listed.returncode, listed.stderr) == (0, "")
    assert [row["key"] for row in json.loads(listed.stdout)["rows"]] == [KEY]
    freed = python("-c", code, "unpin", "--key", KEY[:8], FLASHBIAS_CACHE_DIR=str(folder))
    assert freed.returncode == 0, freed.stderr


def test_pin_that_cannot_be_stored_is_an_error(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database that nobody may write to now ends the command with 1, and the message says so."""
    monkeypatch.setattr("cache_db.engines.BUSY_SECONDS", 0.2)
    connection = sqlite3.connect(folder / "flashbias.db", isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")  # the one state in which even root may read and not write
    code, output, errors = run("pin", "--key", KEY, "--config", GOOD.hash)
    connection.close()
    assert (code, output) == (1, "")
    assert "cannot be used" in errors
    assert open_layers(folder).counts()["pins"] == 0
