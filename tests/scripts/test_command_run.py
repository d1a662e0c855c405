"""``flashbias run``: one stored config alone, in this process: what runs, what is refused, and that nothing is stored."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cache_db import open_layers
from cache_db.models import Environment, Verdict, Verification
from cache_db.store import Store
from tests.autotune.planted_spec import PlantedSpec
from tests.autotune.softmax_spec import softmax_config
from tests.scripts.command_cases import GOOD, KEY, PROBLEM, WRONG, Run, trial

BACKWARD = ("run", "--key", PROBLEM.key("backward"), "--config", GOOD.hash)
FORWARD = ("run", "--key", KEY, "--config", GOOD.hash)
BAD = ("run", "--key", KEY, "--config", WRONG.hash)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, int]]:
    """Counts the launches by kernel and rows; they happen all the same."""
    counted: Counter[tuple[str, int]] = Counter()
    launch = PlantedSpec.launch

    def counting(self: PlantedSpec, kernel: str, compiled: Any, problem: Any, inputs: Any, *buffers: Any) -> None:
        counted[kernel, inputs["x"].shape[0]] += 1
        launch(self, kernel, compiled, problem, inputs, *buffers)

    monkeypatch.setattr(PlantedSpec, "launch", counting)
    return counted


def test_config_runs_behind_those_it_was_judged_through(run: Run, folder: Path, launches: Counter[Any]) -> None:
    """The forward runs once, then the backward alone; its time and what it ran are told, and nothing is stored."""
    before = Store.open(folder / "flashbias.db").counts()
    code, output, errors = run(*BACKWARD, "--iterations", "4")
    assert code == 0
    assert launches == {("forward", 8): 1, ("backward", 8): 5}
    for part in (
        f"key        {PROBLEM.key('backward')[:12]}  backward of planted",
        f"through    forward {GOOD.hash[:12]}  triton/rows block=32",
        "case       representative: rows=8 ",
        "of 4 launches, in Triton's interpreter: these are not speeds",
    ):
        assert part in output
    assert "running backward" in errors
    assert Store.open(folder / "flashbias.db").counts() == before


def test_case_and_seed_can_be_chosen(run: Run, launches: Counter[Any]) -> None:
    """Any case of the proof runs by its name, with other inputs if wanted."""
    code, output, _ = run(*FORWARD, "--case", "large", "--seed", "12", "--iterations", "1")
    assert code == 0
    assert launches == {("forward", 5): 2}
    assert "case       large: rows=5 columns=19 scale=60.0 dead=False, seed 12" in output


def test_config_that_is_not_safe_runs_only_when_told_to(run: Run, launches: Counter[Any]) -> None:
    """The refusal says what was found, what may happen and which flag it takes; nothing has run by then."""
    code, output, errors = run(*BAD)
    assert (code, output) == (1, "")
    for part in ("fault=zeroed_row is wrong ('y' is off", "crash or hang", "nothing is stored", "--unsafe"):
        assert part in errors
    assert not launches
    code, output, errors = run(*BAD, "--unsafe", "--iterations", "2")
    assert code == 0
    assert "of 2 launches" in output
    assert "unsafe: the trial of forward" in errors


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"level": 0, "reason": "over 1.5x"}, "is timed only (over 1.5x)"),
        ({"level": 1}, "is proven at level 1 only"),
        ({"environment": Environment(driver="1", ptxas="2", torch="3")}, "is not proven with this driver"),
        ({"binary": "f" * 64}, "compiles here to another binary"),
    ],
    ids=str,
)
def test_proof_of_less_or_of_something_else_is_no_proof(
    run: Run, folder: Path, launches: Counter[Any], changes: dict[str, Any], expected: str
) -> None:
    """What was only timed, or proven with another driver or as another binary, is refused with the reason."""
    open_layers(folder).add_trial(trial(folder, GOOD).model_copy(update=changes))
    code, output, errors = run(*FORWARD)
    assert (code, output) == (1, "")
    assert expected in errors
    assert not launches


def test_later_judgements_and_lifts_count(run: Run, folder: Path, launches: Counter[Any]) -> None:
    """A forward that was found wrong since bars itself and the backward behind it, and lifted it is proven no more."""
    store = open_layers(folder)
    stored = trial(folder, GOOD)
    later = Verification.of(stored).model_copy(update={"verdict": Verdict.WRONG, "created_at": stored.created_at + 1})
    store.add_verification(later)
    for command in (FORWARD, BACKWARD):
        code, _, errors = run(*command)
        assert code == 1
        assert "forward triton/rows block=32 was found wrong" in errors
    assert run("cache", "quarantine", "lift", "--key", KEY, "--config", GOOD.hash)[0] == 0
    code, _, errors = run(*FORWARD)
    assert code == 1
    assert "or was lifted since" in errors
    assert not launches
    assert run("verify", "--key", KEY, "--config", GOOD.hash)[0] == 0
    assert run(*FORWARD, "--iterations", "1")[0] == 0


def test_launch_that_fails_is_a_message(run: Run, folder: Path) -> None:
    """What the config raises is told in one line, and the exit code is 1."""
    config = softmax_config(64, "raises_at_launch")
    row = trial(folder, GOOD).model_copy(update={"config": config, "verdict": Verdict.CRASHED, "level": 0})
    open_layers(folder).add_trial(row)
    code, output, errors = run("run", "--key", KEY, "--config", config.hash, "--unsafe")
    assert (code, output) == (1, "")
    assert "fault=raises_at_launch failed: RuntimeError: planted: this config does not launch" in errors


def test_rules_stand_above_unsafe(run: Run, folder: Path, launches: Counter[Any]) -> None:
    """A config that the spec refuses today, or a kernel it does not have, is never run: a row is only data."""
    config = softmax_config(2)
    store = open_layers(folder)
    store.add_trial(trial(folder, GOOD).model_copy(update={"config": config}))
    store.add_trial(trial(folder, GOOD).model_copy(update={"kernel": "sideways"}))
    for key, name, expected in (
        (KEY, config.hash, "block 2 does not hold a row of 19"),
        (PROBLEM.key("sideways"), GOOD.hash, "no such kernel"),
    ):
        code, output, errors = run("run", "--key", key, "--config", name, "--unsafe")
        assert (code, output) == (1, "")
        assert expected in errors
    assert not launches


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "--key", KEY], "--config"),
        ([*FORWARD, "--case", "huge"], "expected one of 'representative', 'ragged', 'large', 'dead row', 'race', got"),
        ([*FORWARD, "--iterations", "0"], "expected a whole number from 1 to 100000, got '0'"),
        ([*FORWARD, "--seed", str(2**63)], "64 bits"),
        (["run", "--key", "0" * 64, "--config", "00"], f"There are:\n  {min(KEY, PROBLEM.key('backward'))[:12]}"),
    ],
)
def test_wrong_usage_runs_nothing(run: Run, launches: Counter[Any], arguments: list[str], expected: str) -> None:
    """The exit code is 2 and the message says what was expected."""
    code, output, errors = run(*arguments)
    assert (code, output) == (2, "")
    assert expected in errors
    assert not launches


def test_trial_of_another_gpu_is_not_run_here(run: Run, folder: Path) -> None:
    """The message names what differs."""
    there = PROBLEM.model_copy(update={"gpu_name": "NVIDIA H200"})
    open_layers(folder).add_trial(trial(folder, GOOD).model_copy(update={"problem": there}))
    code, _, errors = run("run", "--key", there.key("forward"), "--config", GOOD.hash, "--unsafe")
    assert code == 2
    assert "another gpu name: 'NVIDIA H200', here 'triton-interpreter'" in errors
