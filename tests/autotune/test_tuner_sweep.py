"""The sweep: what becomes of good and bad candidates, of little time, and of trials that an earlier sweep left."""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import autotune
from autotune import Mode, Settings, resolve
from autotune.candidate import Candidate
from autotune.device import describe
from autotune.lease import hostname
from autotune.nursery import Nursery
from cache_db import open_layers
from cache_db.models import Config, Environment, Problem, Scalar, Trial, Verdict
from tests.autotune.planted_spec import planted_problem
from tests.autotune.softmax_spec import softmax_config

DEVICE = describe(-1)


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    """Makes each test start like a new process."""
    autotune.forget()
    yield
    autotune.forget()


def trials(folder: Path, problem: Problem, kernel: str = "forward") -> dict[Config, Trial]:
    """Returns the stored trials of a kernel by config."""
    return {trial.config: trial for trial in open_layers(folder).trials(problem, kernel)}


@pytest.mark.parametrize(
    ("fault", "verdict"),
    [
        ("zeroed_row", Verdict.WRONG),
        ("foreign_row", Verdict.WRONG),
        ("lse_off", Verdict.WRONG),
        ("modifies_input", Verdict.OUT_OF_BOUNDS),
        ("aborts_at_launch", Verdict.CRASHED),
        ("killed_at_launch", Verdict.KILLED),
        ("raises_at_compile", Verdict.COMPILE_ERROR),
        ("aborts_at_compile", Verdict.CRASHED),
    ],
)
def test_bad_candidate_gets_its_verdict_and_the_sweep_goes_on(tmp_path: Path, fault: str, verdict: Verdict) -> None:
    """Whatever the first candidate does, it is recorded with its reason and the good one wins."""
    problem = planted_problem(f"32:{fault} 64")
    found = resolve(problem, DEVICE, Settings(cache_dir=tmp_path))
    stored = trials(tmp_path, problem)
    assert found.choices["forward"].config == softmax_config(64)
    assert stored[softmax_config(32, fault)].verdict is verdict
    assert stored[softmax_config(32, fault)].reason
    assert stored[softmax_config(64)].verdict is Verdict.SAFE
    assert float(stored[softmax_config(64)].figures["ms"]) > 0


def test_candidate_that_crashed_when_timed_gets_a_second_chance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash that does not repeat in a fresh child is no verdict: the candidate is proven and timed after all."""
    monkeypatch.setenv("SOFTMAX_MARKER", str(tmp_path / "crashed"))
    found = resolve(planted_problem("32:crashes_once"), DEVICE, Settings(cache_dir=tmp_path))
    assert found.choices["forward"].config == softmax_config(32, "crashes_once")
    assert (tmp_path / "crashed").exists()


def test_gradient_is_judged_as_strictly_as_the_forward(tmp_path: Path) -> None:
    """A backward that zeroes a row loses, and both winners come from the good candidates."""
    problem = planted_problem("32", "32:zeroed_row 64")
    found = resolve(problem, DEVICE, Settings(cache_dir=tmp_path))
    assert found.choices["backward"].config == softmax_config(64)
    assert trials(tmp_path, problem, "backward")[softmax_config(32, "zeroed_row")].verdict is Verdict.WRONG


def test_candidates_that_the_rules_reject_are_never_tried(tmp_path: Path) -> None:
    """A block too short for the row leaves no trial and is not counted."""
    problem = planted_problem("16 32")
    resolve(problem, DEVICE, Settings(cache_dir=tmp_path))
    assert set(trials(tmp_path, problem)) == {softmax_config(32)}
    assert open_layers(tmp_path).winners(problem)["forward"].total == 1


def test_interpreter_tries_three_candidates_at_most(tmp_path: Path) -> None:
    """Interpreted kernels are slow, so the list is cut short there."""
    problem = planted_problem("32 64 128 256 512")
    resolve(problem, DEVICE, Settings(cache_dir=tmp_path))
    assert set(trials(tmp_path, problem)) == {softmax_config(block) for block in (32, 64, 128)}


def test_problem_without_a_safe_candidate_takes_the_ladder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """When every candidate of one kernel fails, no winner is stored and the proven default runs."""
    problem = planted_problem("32", "32:zeroed_row 64:modifies_input")
    found = resolve(problem, DEVICE, Settings(cache_dir=tmp_path))
    assert {choice.rung for choice in found.choices.values()} == {"default"}
    assert open_layers(tmp_path).winners(problem) == {}
    assert len(trials(tmp_path, problem, "backward")) == 2
    assert "no candidate of backward passed (1 wrong, 1 out_of_bounds of 2)" in caplog.text


def test_default_found_wrong_by_the_sweep_is_not_even_proven_again(tmp_path: Path) -> None:
    """The ladder believes the trials: a config found wrong a moment ago does not run."""
    problem = planted_problem("32:zeroed_row", default="32:zeroed_row")
    found = resolve(problem, DEVICE, Settings(cache_dir=tmp_path))
    assert found.choices == {}
    (judgement,) = open_layers(tmp_path).verifications(problem)  # the sweep's own
    assert judgement.created_at == trials(tmp_path, problem)[softmax_config(32, "zeroed_row")].created_at


def test_tiny_budget_still_proves_one_config_and_says_how_many(tmp_path: Path) -> None:
    """However little time there is, one config of each kernel is proven; the row and the reason admit the rest."""
    problem = planted_problem("32 64 128", "32 64 128")
    found = resolve(problem, DEVICE, Settings(cache_dir=tmp_path, budget_seconds=0.001))
    winners = open_layers(tmp_path).winners(problem)
    assert set(found.choices) == {"forward", "backward"}
    assert not any(row.complete for row in winners.values())
    assert all(1 <= row.tried < row.total == 3 for row in winners.values())
    assert re.search(r"forward: \d of 3 tried", found.reason)


def test_unfinished_sweep_is_a_hit_until_it_is_asked_to_finish(tmp_path: Path) -> None:
    """A winner found under a short budget is used as it is; with ``finish`` the rest is tried, and only the rest."""
    problem = planted_problem("32 64 128", "32 64 128")
    resolve(problem, DEVICE, Settings(cache_dir=tmp_path, budget_seconds=0.001))
    before = trials(tmp_path, problem)
    autotune.forget()
    assert not resolve(problem, DEVICE, Settings(cache_dir=tmp_path)).swept
    autotune.forget()
    assert resolve(problem, DEVICE, Settings(cache_dir=tmp_path, finish=True)).swept
    after = trials(tmp_path, problem)
    assert len(after) == 3
    assert all(after[config].created_at == trial.created_at for config, trial in before.items())
    assert all(row.complete for row in open_layers(tmp_path).winners(problem).values())
    autotune.forget()
    assert not resolve(problem, DEVICE, Settings(cache_dir=tmp_path, finish=True)).swept


def test_candidate_too_slow_to_win_is_timed_and_not_proven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With enough safe ones a much slower candidate is recorded as such, counts as tried, and proves nothing."""
    monkeypatch.setattr("autotune.search.FINALISTS", 1)
    monkeypatch.setattr("autotune.search.HOPELESS", 1e-9)
    problem = planted_problem("32 64 128:zeroed_row")
    found = resolve(problem, DEVICE, Settings(cache_dir=tmp_path))
    stored = trials(tmp_path, problem)
    skipped = {config for config, trial in stored.items() if "not proven" in trial.reason}
    assert open_layers(tmp_path).winners(problem)["forward"].complete
    assert len(stored) == 3
    assert skipped == {config for config, trial in stored.items() if trial.level == 0 and trial.verdict is Verdict.SAFE}
    assert skipped
    assert found.choices["forward"].config not in skipped


def stored_trial(problem: Problem, config: Config, verdict: Verdict, environment: Environment, age: float) -> Trial:
    """Returns a forward trial as an earlier sweep on this machine would have left it."""
    return Trial(
        problem=problem,
        kernel="forward",
        config=config,
        verdict=verdict,
        level=2 if verdict is Verdict.SAFE else 0,
        reason="earlier",
        figures={"ms": 0.001} if verdict is Verdict.SAFE else {},
        environment=environment,
        gpu_uuid=DEVICE.uuid,
        host=hostname(),
        created_at=time.time() - age,
        seconds=1.0,
    )


def test_trials_of_an_earlier_sweep_are_not_repeated(tmp_path: Path) -> None:
    """A safe trial of this environment keeps its time and may win; a wrong one stays out."""
    problem = planted_problem("32 64 128")
    database = open_layers(tmp_path)
    database.add_trial(stored_trial(problem, softmax_config(64), Verdict.SAFE, DEVICE.environment, 60))
    database.add_trial(stored_trial(problem, softmax_config(32), Verdict.WRONG, DEVICE.environment, 60))
    found = resolve(problem, DEVICE, Settings(cache_dir=tmp_path))
    stored = trials(tmp_path, problem)
    assert found.choices["forward"].config == softmax_config(64)
    assert [stored[softmax_config(block)].reason for block in (32, 64)] == ["earlier", "earlier"]
    assert stored[softmax_config(128)].reason != "earlier"


@pytest.mark.parametrize(
    "ms", ["fast", math.nan, math.inf, -math.inf, -1.0, 0.0, True, 10**400], ids=lambda ms: str(ms)[:9]
)
def test_what_cannot_be_a_time_is_dropped(ms: Scalar) -> None:
    """A proven trial without a real time is neither safe nor settled until it is timed again."""
    candidate = Candidate(softmax_config(32))
    trial = stored_trial(planted_problem("32"), softmax_config(32), Verdict.SAFE, DEVICE.environment, 60)
    candidate.resume(trial.model_copy(update={"figures": {"ms": ms, "p20": 1.0, "registers": 7}}))
    assert (candidate.figures, candidate.ms) == ({"registers": 7}, math.inf)
    assert not candidate.safe
    assert not candidate.settled


def test_what_cannot_be_beside_a_time_is_dropped_with_it() -> None:
    """An edited ratio would order the best few, or end the sweep: the whole measurement is taken again."""
    candidate = Candidate(softmax_config(32))
    trial = stored_trial(planted_problem("32"), softmax_config(32), Verdict.SAFE, DEVICE.environment, 60)
    candidate.resume(trial.model_copy(update={"figures": {"ms": 1.0, "paired": "abc", "registers": 7}}))
    assert candidate.figures == {"registers": 7}
    assert not candidate.settled


@pytest.mark.parametrize(("repeats", "counted"), [(300, 300), (20_000, 20_000), ("20000", 0), (True, 0), (2e4, 0)])
def test_a_long_screen_that_was_passed_counts(repeats: Scalar, counted: int) -> None:
    """What a soak or an earlier sweep ran is not run again by the next; what is no count counts for nothing."""
    candidate = Candidate(softmax_config(32))
    trial = stored_trial(planted_problem("32"), softmax_config(32), Verdict.SAFE, DEVICE.environment, 60)
    candidate.resume(trial.model_copy(update={"level": 3, "figures": {"ms": 1.0, "repeats": repeats}}))
    assert candidate.repeats == counted


@pytest.mark.parametrize("ms", ["fast", math.nan, -1.0, None], ids=str)
def test_stored_time_that_is_none_is_taken_again(tmp_path: Path, ms: Scalar | None) -> None:
    """Whatever a row calls its time, the sweep resumes, keeps the proof, and its winner has a real time."""
    problem = planted_problem("32")
    trial = stored_trial(problem, softmax_config(32), Verdict.SAFE, DEVICE.environment, 60)
    figures: dict[str, Scalar] = {} if ms is None else {"ms": ms}
    open_layers(tmp_path).add_trial(trial.model_copy(update={"figures": figures}))
    resolve(problem, DEVICE, Settings(cache_dir=tmp_path))
    winner = open_layers(tmp_path).winners(problem)["forward"]
    assert winner.config == softmax_config(32)
    assert 0.001 < winner.ms < 10_000
    assert trials(tmp_path, problem)[softmax_config(32)].reason == "earlier"


def test_safe_trial_of_another_driver_is_repeated(tmp_path: Path) -> None:
    """A proof does not outlive its environment."""
    problem = planted_problem("32")
    other = Environment(driver="999.1", ptxas="", torch="")
    open_layers(tmp_path).add_trial(stored_trial(problem, softmax_config(32), Verdict.SAFE, other, 60))
    resolve(problem, DEVICE, Settings(cache_dir=tmp_path))
    assert trials(tmp_path, problem)[softmax_config(32)].environment == DEVICE.environment


def test_timeout_in_the_interpreter_is_no_quarantine(tmp_path: Path) -> None:
    """The interpreter is slow by nature: a config that ran out of time there is tried again."""
    problem = planted_problem("32")
    open_layers(tmp_path).add_trial(stored_trial(problem, softmax_config(32), Verdict.TIMEOUT, DEVICE.environment, 60))
    found = resolve(problem, DEVICE, Settings(cache_dir=tmp_path))
    assert found.choices["forward"].config == softmax_config(32)


def test_winners_of_related_problems_are_tried_first(tmp_path: Path) -> None:
    """With time for one candidate only, it is the one that won on a problem like this."""
    resolve(planted_problem("128", "128"), DEVICE, Settings(cache_dir=tmp_path))
    problem = planted_problem("32 64 128", "32 64 128", slow=0.02)
    first = open_layers(tmp_path)
    resolve(problem, DEVICE, Settings(cache_dir=tmp_path, budget_seconds=0.001))
    assert softmax_config(128) in {trial.config for trial in first.trials(problem, "forward")}


def test_sweep_says_before_it_starts_what_how_long_and_how_to_avoid_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One info line comes first: the problem, the number of candidates, the longest time, the cure."""
    settings = Settings(cache_dir=tmp_path, budget_seconds=7, cure="turn the handle")
    with caplog.at_level(logging.INFO, logger="autotune"):
        resolve(planted_problem("32 64"), DEVICE, settings)
    first = caplog.messages[0]
    for part in ("columns=19", "2 forward, 1 backward", "7 s at most", "turn the handle", str(tmp_path)):
        assert part in first


def test_restricted_sweep_does_not_pass_for_a_whole_one(tmp_path: Path) -> None:
    """Candidates of a forbidden implementation are counted, not tried, and nothing forbidden runs."""
    problem = planted_problem("32 64")
    found = resolve(problem, DEVICE, Settings(cache_dir=tmp_path, implementations=("cute",)))
    assert found.choices == {}
    assert trials(tmp_path, problem) == {}
    autotune.forget()
    again = resolve(problem, DEVICE, Settings(cache_dir=tmp_path, implementations=("triton",)))
    assert {choice.rung for choice in again.choices.values()} == {"winner"}


def test_proofs_through_another_forward_are_made_anew(tmp_path: Path) -> None:
    """A backward that was safe behind one forward is judged again when another forward has won."""
    problem = planted_problem("32 64")
    resolve(problem, DEVICE, Settings(cache_dir=tmp_path))
    database = open_layers(tmp_path)
    winner = database.winners(problem)["forward"]
    other = softmax_config(64 if winner.config == softmax_config(32) else 32)
    database.put_winner(winner.model_copy(update={"config": other}), replace=True)
    autotune.forget()
    found = resolve(problem, DEVICE, Settings(mode=Mode.ASSERT, cache_dir=tmp_path))
    assert found.choices["forward"].config == other
    assert [row.proven_with for row in database.verifications(problem, "backward")] == [{"forward": other.hash}]


def test_gpu_that_can_start_no_child_costs_a_warning_not_a_call(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the sandbox cannot start, the caller gets nothing to run, a reason, and no exception."""
    Nursery.forget()
    monkeypatch.setattr("sys.executable", str(tmp_path / "no-python"))
    found = resolve(planted_problem(), replace(DEVICE), Settings(cache_dir=tmp_path))
    assert found.choices == {}
    assert "without a tuned kernel" in caplog.text
    assert open_layers(tmp_path).holder(planted_problem().hash) is None
