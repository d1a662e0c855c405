"""The tuner on a GPU: what the interpreter cannot show, above all races, hangs and machine code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import autotune
from autotune import Settings, confirm, resolve
from autotune.device import describe
from autotune.soak import soak
from cache_db import open_layers
from cache_db.models import Config, Problem, Trial, Verdict
from tests.autotune.planted_spec import planted_problem
from tests.autotune.softmax_spec import softmax_config

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    """Makes each test start like a new process."""
    autotune.forget()
    yield
    autotune.forget()


def trials(folder: Path, problem: Problem) -> dict[Config, Trial]:
    """Returns the forward's stored trials by config."""
    return {trial.config: trial for trial in open_layers(folder).trials(problem, "forward")}


def test_winner_passed_the_long_race_screen_and_names_its_binary(tmp_path: Path) -> None:
    """Every kernel's winner has 10,000 bitwise equal repeats and the hash of proven machine code."""
    device = describe(0)
    problem = planted_problem("32 64 128", "32 64", device=device)
    found = resolve(problem, device, Settings(cache_dir=tmp_path))
    stored = {(row.kernel, row.config): row for row in open_layers(tmp_path).trials(problem)}
    for kernel, choice in found.choices.items():
        assert choice.rung == "winner"
        assert len(choice.binary) == 64
        assert int(stored[kernel, choice.config].figures["repeats"]) >= 10_000
        assert confirm(problem, device, Settings(cache_dir=tmp_path), kernel, choice, choice.binary)


@pytest.mark.parametrize(
    ("fault", "verdict"),
    [
        ("racy", Verdict.RACY),
        ("hangs_at_launch", Verdict.TIMEOUT),
        ("past_end", Verdict.OUT_OF_BOUNDS),
        ("zeroed_row", Verdict.WRONG),
        ("raises_at_compile", Verdict.COMPILE_ERROR),
        ("aborts_at_compile", Verdict.CRASHED),
    ],
)
def test_bad_candidate_loses_to_the_good_one(tmp_path: Path, fault: str, verdict: Verdict) -> None:
    """Whatever the first candidate does on the GPU, it is recorded and the good one wins."""
    device = describe(0)
    problem = planted_problem(f"32:{fault} 64", device=device)
    # A hang is met twice, timed and proven: the budget must outlast the first.
    found = resolve(problem, device, Settings(cache_dir=tmp_path, budget_seconds=70))
    stored = trials(tmp_path, problem)
    assert found.choices["forward"].config == softmax_config(64)
    assert stored[softmax_config(32, fault)].verdict is verdict


def test_a_soak_raises_winners_to_level_3(tmp_path: Path) -> None:
    """Both kernels agree with themselves 20,000 times on four draws, while the timing of the sweep stays."""
    device, settings = describe(0), Settings(cache_dir=tmp_path)
    # In fp32 a softmax of large logits is no test for many draws: on some, any honest kernel is over the spec's budget.
    problem = planted_problem("32 64", "32", dtype="bfloat16", device=device)
    resolve(problem, device, settings)
    results = soak(problem, device, settings, open_layers(tmp_path), 20_000)
    assert [(each.passed, each.repeats) for each in results] == [(True, 20_000)] * 2
    assert {winner.level for winner in open_layers(tmp_path).winners(problem).values()} == {3}


def test_every_candidate_is_tried_when_there_is_time(tmp_path: Path) -> None:
    """Eight candidates are compiled, timed and judged to the last within the budget."""
    device = describe(0)
    problem = planted_problem(" ".join(str(32 << step) for step in range(8)), device=device)
    resolve(problem, device, Settings(cache_dir=tmp_path))
    winner = open_layers(tmp_path).winners(problem)["forward"]
    assert (winner.tried, winner.total, winner.complete) == (8, 8, True)
