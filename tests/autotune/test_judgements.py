"""How far each stored judgement reaches, and what a lift takes back."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autotune import DeviceInfo, Settings
from autotune.device import describe
from autotune.judgements import Judgement, Judgements, Reach
from autotune.lease import hostname
from autotune.place import INTERPRETER, Place
from autotune.plan import Plan
from autotune.proofs import Choice, Prover
from autotune.sandbox import Outcome, Sandbox
from autotune.scene import Scene
from cache_db import Layers, open_layers
from cache_db.models import FINAL, Environment, Lift, Problem, Trial, Verdict, Verification, Winner
from tests.autotune.planted_spec import PLANTED, planted_problem
from tests.autotune.softmax_spec import softmax_config

ENVIRONMENT = Environment(driver="580.1", ptxas="12.9", torch="2.13.0")
GPU = replace(describe(-1), index=0, name="NVIDIA H200", uuid="GPU-here", environment=ENVIRONMENT)
HERE = Place(hostname(), frozenset({"GPU-here"}))
PROBLEM = planted_problem("32 64", device=GPU)
CONFIG = softmax_config(32)
PASSING = sorted(set(Verdict) - FINAL)
BARRING = sorted(FINAL - {Verdict.SAFE})
THROUGH = {"forward": softmax_config(64).hash}


def judged(
    verdict: Verdict,
    *,
    age: float = 60.0,
    kind: type[Trial | Verification] = Verification,
    problem: Problem = PROBLEM,
    gpu: str = "GPU-here",
    **changes: Any,
) -> Any:
    """Returns a judgement of ``CONFIG`` made ``age`` seconds ago on ``gpu`` of this host."""
    values: dict[str, Any] = {
        "problem": problem,
        "kernel": "forward",
        "config": CONFIG,
        "verdict": verdict,
        "level": 2 if verdict is Verdict.SAFE else 0,
        "reason": "earlier",
        "environment": ENVIRONMENT,
        "gpu_uuid": gpu,
        "host": hostname(),
        "created_at": time.time() - age,
    }
    return kind(**{**values, **({"seconds": 1.0} if kind is Trial else {}), **changes})


def lifted(age: float) -> Lift:
    """Returns a lift of ``CONFIG`` given ``age`` seconds ago."""
    return Lift(
        problem=PROBLEM,
        kernel="forward",
        config=CONFIG,
        lifted_by="somebody",
        host="somewhere",
        created_at=time.time() - age,
    )


def seen(*rows: Judgement, lifts: tuple[Lift, ...] = ()) -> Judgements:
    """Returns ``rows`` as this host and GPU sees them."""
    trials = [row for row in rows if isinstance(row, Trial)]
    return Judgements(HERE, trials, [row for row in rows if isinstance(row, Verification)], lifts)


def bars(*rows: Judgement, lifts: tuple[Lift, ...] = ()) -> bool:
    """Returns whether ``rows`` keep ``CONFIG`` from running here."""
    return seen(*rows, lifts=lifts).bar(CONFIG, {}) is not None


@pytest.mark.parametrize("verdict", BARRING)
@pytest.mark.parametrize("kind", [Trial, Verification])
def test_final_failure_holds_everywhere_for_good(verdict: Verdict, kind: type[Trial]) -> None:
    """Neither another host, another GPU, another driver nor a year makes a wrong config right."""
    other = Environment(driver="1", ptxas="", torch="")
    assert bars(judged(verdict, kind=kind, age=3e7, gpu="GPU-far", host="far", environment=other))


@pytest.mark.parametrize("verdict", PASSING)
@pytest.mark.parametrize("kind", [Trial, Verification])
def test_passing_failure_holds_a_day_on_its_own_host_and_gpu(verdict: Verdict, kind: type[Trial]) -> None:
    """A crash, a time-out or a kill keeps a config away where it happened, for a day."""
    assert bars(judged(verdict, kind=kind, age=86_000))
    assert not bars(judged(verdict, kind=kind, age=87_000))
    assert not bars(judged(verdict, kind=kind, host="another"))
    assert not bars(judged(verdict, kind=kind, gpu="GPU-another"))


def test_passing_failure_on_two_gpus_holds_everywhere_for_good() -> None:
    """Two GPUs are no accident: what failed on both runs nowhere, however long ago; twice on one GPU is one."""
    first, again = judged(Verdict.CRASHED, gpu="GPU-1", age=9e6), judged(Verdict.TIMEOUT, gpu="GPU-1", age=8e6)
    second = judged(Verdict.KILLED, gpu="GPU-2", age=7e6, kind=Trial)
    assert not bars(first, again)
    assert bars(first, second)
    assert {seen(first, second).reach(row) for row in (first, second)} == {Reach.EVERYWHERE}


def test_proof_on_the_same_gpu_answers_an_earlier_passing_failure() -> None:
    """What crashed once and then passed the gate there counts no more, for the day and for the two GPUs."""
    crash = judged(Verdict.CRASHED, age=600)
    assert not bars(crash, judged(Verdict.SAFE, age=60))
    assert bars(crash, judged(Verdict.SAFE, age=60, level=1))
    assert bars(crash, judged(Verdict.SAFE, age=6000))
    assert bars(crash, judged(Verdict.SAFE, age=60, gpu="GPU-2"), judged(Verdict.CRASHED, gpu="GPU-3"))
    assert not bars(crash, judged(Verdict.SAFE, age=60), judged(Verdict.CRASHED, gpu="GPU-3"))


def test_proof_on_any_gpu_answers_no_final_failure() -> None:
    """A race seen once is a race, whatever later repeats show."""
    assert bars(judged(Verdict.RACY, age=600), judged(Verdict.SAFE, age=60))


@pytest.mark.parametrize("verdict", PASSING)
def test_interpreter_never_quarantines(verdict: Verdict) -> None:
    """The interpreter is slow by nature: its failures hold nowhere."""
    at = planted_problem()
    assert at.gpu_name == INTERPRETER
    assert not bars(judged(verdict, problem=at), judged(verdict, problem=at, gpu="GPU-2"))


def test_failed_proof_holds_behind_the_configs_it_went_through() -> None:
    """What is wrong behind one forward may be right behind another; a trial's verdict holds behind all."""
    proof, trial = judged(Verdict.WRONG, proven_with=THROUGH), judged(Verdict.WRONG, kind=Trial, proven_with=THROUGH)
    assert seen(proof).bar(CONFIG, THROUGH) == proof
    assert seen(proof).bar(CONFIG, {"forward": "0" * 64}) is None
    assert seen(trial).bar(CONFIG, {"forward": "0" * 64}) == trial


def test_lift_takes_the_force_of_what_was_judged_before_it_and_only_that() -> None:
    """After a lift a config neither is barred nor counts as proven, until it is judged anew."""
    wrong, safe = judged(Verdict.WRONG, age=60, kind=Trial), judged(Verdict.SAFE, age=50)
    before = seen(wrong, safe, lifts=(lifted(40),))
    assert before.bar(CONFIG, {}) is None
    assert before.proofs(CONFIG, ENVIRONMENT, {}) == []
    assert before.trials() == []
    assert before.reach(wrong) is Reach.LIFTED
    assert before.unsafe() == [wrong]
    later, proof = judged(Verdict.CRASHED, age=30), judged(Verdict.SAFE, age=20, level=1)
    after = seen(wrong, later, proof, lifts=(lifted(55), lifted(40)))
    assert after.bar(CONFIG, {}) == later
    assert after.proofs(CONFIG, ENVIRONMENT, {}) == [proof]
    assert not bars(judged(Verdict.CRASHED, gpu="GPU-1"), judged(Verdict.CRASHED, gpu="GPU-2"), lifts=(lifted(40),))


def scene(folder: Path, device: DeviceInfo = GPU) -> Scene:
    """Returns ``PROBLEM`` on ``device``, whose children are never started here."""
    store: Layers = open_layers(folder)
    return Scene(PROBLEM, device, Settings(cache_dir=folder), PLANTED, store, Sandbox(PROBLEM, device))


def test_crash_of_a_sweep_is_remembered_when_the_next_gpu_overwrites_it(tmp_path: Path) -> None:
    """A trial has one row; its crash is a verification too, so that the second GPU's makes two, and none a third."""
    crash = Outcome(Verdict.CRASHED, reason="SIGSEGV")
    for gpu in ("GPU-1", "GPU-2"):
        there = scene(tmp_path, replace(GPU, uuid=gpu))
        assert CONFIG in Plan.of(there, "forward").to_compile
        there.commit(there.trial("forward", CONFIG, crash, {}))
    third = scene(tmp_path)
    assert len(third.store.trials(PROBLEM)) == 1
    assert len(third.store.verifications(PROBLEM)) == 2
    assert Plan.of(third, "forward").to_compile == (softmax_config(64),)


@pytest.mark.parametrize("verdict", BARRING)
def test_a_fault_outlives_the_trial_of_a_process_that_did_not_see_it(tmp_path: Path, verdict: Verdict) -> None:
    """Two sweeps or soaks at once: the one that found the race may store first, and the other take its row's place."""
    here = scene(tmp_path)
    for outcome in (Outcome(verdict, reason="1 of 90000 repeats differ"), Outcome(Verdict.SAFE, level=3)):
        here.commit(here.trial("forward", CONFIG, outcome, {}))
    assert [trial.verdict for trial in here.store.trials(PROBLEM)] == [Verdict.SAFE]
    bar = scene(tmp_path).judgements("forward").bar(CONFIG, {})
    assert bar is not None
    assert bar.verdict is verdict


def test_failed_proof_keeps_a_config_out_of_the_next_sweep(tmp_path: Path) -> None:
    """A winner found racy by a later proof is not taken from its old trial again."""
    here = scene(tmp_path)
    here.store.add_trial(judged(Verdict.SAFE, kind=Trial, age=600))
    assert Plan.of(here, "forward").barred(CONFIG, {}) is None
    here.store.add_verification(judged(Verdict.RACY))
    barred = Plan.of(here, "forward").barred(CONFIG, {})
    assert barred is not None
    assert barred.verdict is Verdict.RACY


def test_winner_that_was_lifted_since_is_proven_again(tmp_path: Path) -> None:
    """A winner's row is a proof only if it is younger than the last lift of its config."""
    here = scene(tmp_path)
    winner = Winner(
        problem=PROBLEM,
        kernel="forward",
        config=CONFIG,
        level=2,
        ms=0.1,
        tried=1,
        total=1,
        complete=True,
        binary="",
        environment=ENVIRONMENT,
        created_at=time.time() - 60,
    )
    chosen: dict[str, Choice] = {}
    here.store.add_lift(lifted(600))
    assert Prover(here)._certify("forward", winner, chosen).verdict is Verdict.SAFE
    here.store.add_lift(lifted(30))
    here.store.add_verification(judged(Verdict.SAFE, age=10, binary="anew"))
    assert Prover(here)._certify("forward", winner, chosen).binary == "anew"
