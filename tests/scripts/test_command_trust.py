"""Rows are data: a database names specs, and only those that the user trusts are imported."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from cache_db import open_layers
from cache_db.models import Problem
from flashbias.kernels.problem import SPEC
from tests.scripts.command_cases import GOOD, KEY, PROBLEM, Run, proofs, trial

COMMANDS = ("verify", "ptx", "run", "pin")


def planted(folder: Path, spec: str) -> Problem:
    """Stores a trial and a winner whose problem names ``spec``; returns that problem."""
    found = PROBLEM.model_copy(update={"spec": spec})
    store = open_layers(folder)
    store.add_trial(trial(folder, GOOD).model_copy(update={"problem": found}))
    store.put_winner(store.winners(PROBLEM)["forward"].model_copy(update={"problem": found}))
    return found


def module(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    """Puts a module onto the import path."""
    (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))


@pytest.mark.parametrize("trust", [False, True], ids=["none is trusted", "another is trusted"])
@pytest.mark.parametrize("command", COMMANDS)
def test_spec_that_only_a_row_names_is_not_imported(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, command: str, trust: bool
) -> None:
    """Its module lies on the path and does not run: the exit code is 2, and the message names the flag to trust it."""
    module(folder, monkeypatch, "named_by_a_row", "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n")
    key = planted(folder, "named_by_a_row:SPEC").key("forward")
    code, output, errors = run(command, "--key", key, "--config", GOOD.hash, trust=trust)
    assert (code, output) == (2, "")
    assert "--spec named_by_a_row:SPEC" in errors
    assert "named_by_a_row" not in sys.modules
    assert not (folder / "ran").exists()


def test_verify_all_skips_winners_of_specs_that_are_not_trusted(run: Run, folder: Path) -> None:
    """Without the flag neither the planted winners nor a stranger's run; each tells the flag it takes."""
    planted(folder, "json:loads")
    code, output, _ = run("verify", "--all", "--json", trust=False)
    found = json.loads(output)
    assert (code, found["unsafe"], found["skipped"], len(found["rows"])) == (0, 0, 3, 3)
    wanted = [f"--spec {row['problem']['spec']}" for row in found["rows"]]
    assert all(flag in row["reason"] for flag, row in zip(wanted, found["rows"], strict=True))
    assert proofs(folder) == []


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("spec_that_raises", "raise RuntimeError('planted')", "cannot be imported: RuntimeError: planted"),
        ("spec_that_exits", "raise SystemExit(5)", "cannot be imported: SystemExit: 5"),
        ("spec_of_no_source", "SPEC = 1\ndef source(): return 1 // 0", "cannot be imported: ZeroDivisionError"),
        ("spec_that_lacks_it", "", "cannot be imported: AttributeError"),
    ],
)
def test_trusted_module_that_fails_is_a_message(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, expected: str
) -> None:
    """Whatever a module raises, SystemExit too, ends with 2 and is told with the spec's name."""
    module(folder, monkeypatch, name, text)
    key = planted(folder, f"{name}:SPEC").key("forward")
    code, output, errors = run("verify", "--key", key, "--config", GOOD.hash, "--spec", f"{name}:SPEC")
    assert (code, output) == (2, "")
    assert f"its spec {name}:SPEC {expected}" in errors


def test_attentions_own_spec_needs_no_flag(run: Run, folder: Path) -> None:
    """Rows of the library are repeated without more ado; here only their source is another."""
    key = planted(folder, SPEC).key("forward")
    code, _, errors = run("verify", "--key", key, "--config", GOOD.hash, trust=False)
    assert code == 2
    assert "another source" in errors


def test_spec_is_named_in_full(run: Run) -> None:
    """A module alone is no spec."""
    code, _, errors = run("verify", "--key", KEY, "--config", GOOD.hash, "--spec", "tests")
    assert code == 2
    assert "expected MODULE:ATTRIBUTE, got 'tests'" in errors
