"""Pins: what runs instead of a winner, that it is gated like one, and what sweeps make of it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import autotune
from autotune import CacheMiss, Mode, Resolution, Settings, resolve, room
from autotune.device import describe
from autotune.pinning import PinProof, prove_pin
from autotune.sandbox import SandboxError
from autotune.soak import soak
from cache_db import open_layers
from cache_db.models import Config, Environment, Lift, Pin, Problem, Verdict
from tests.autotune.planted_spec import planted_problem
from tests.autotune.softmax_spec import softmax_config

DEVICE = describe(-1)
PROBLEM = planted_problem("32 64", "32")
PINNED = softmax_config(128)
ASSERT = Mode.ASSERT


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    """Makes each test start like a new process."""
    autotune.forget()
    yield
    autotune.forget()


@pytest.fixture(scope="module")
def tuned_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database in which ``PROBLEM`` has been tuned, and its forward proven for ``PINNED``."""
    folder = tmp_path_factory.mktemp("tuned")
    assert resolve(PROBLEM, DEVICE, Settings(cache_dir=folder)).swept
    proof = proven(folder, PINNED)
    assert proof.safe
    assert proof.verification is not None
    open_layers(folder).add_verification(proof.verification)
    return folder / "flashbias.db"


@pytest.fixture
def tuned(tmp_path: Path, tuned_file: Path) -> Settings:
    """The settings of a folder with a copy of that database."""
    shutil.copy(tuned_file, tmp_path)
    return Settings(cache_dir=tmp_path)


def proven(folder: Path, config: Config, kernel: str = "forward", problem: Problem = PROBLEM) -> PinProof:
    """Returns what the command ``pin`` would find of ``config``."""
    return prove_pin(problem, kernel, config, DEVICE, Settings(cache_dir=folder), open_layers(folder))


def pin(folder: Path, config: Config = PINNED, kernel: str = "forward", problem: Problem = PROBLEM) -> None:
    """Pins ``config``, as a row alone: what it takes to run is found when it is used."""
    row = Pin(problem=problem, kernel=kernel, config=config, pinned_by="me", host="here", created_at=time.time())
    open_layers(folder).put_pin(row)


def ran(settings: Settings, problem: Problem = PROBLEM) -> Resolution:
    """Returns what a new process would run."""
    autotune.forget()
    return resolve(problem, DEVICE, settings)


def rungs(found: Resolution) -> list[str]:
    """Returns the rung of each kernel."""
    return [choice.rung for choice in found.choices.values()]


def test_pin_runs_instead_of_the_winner_until_it_is_removed(tuned: Settings, tmp_path: Path) -> None:
    """A pin needs no sweep, and the backward is proven again behind it, once; without it the winner is back."""
    winners = open_layers(tmp_path).winners(PROBLEM)
    pin(tmp_path)
    found = ran(replace(tuned, mode=ASSERT))
    assert (rungs(found), found.swept, found.choices["forward"].config) == (["pinned", "winner"], False, PINNED)
    assert found.choices["forward"].level == 2
    assert "pinned: forward" in found.reason
    (proof,) = open_layers(tmp_path).verifications(PROBLEM, "backward")
    assert (proof.proven_with, proof.level) == ({"forward": PINNED.hash}, 2)
    before = (tmp_path / "flashbias.db").read_bytes()
    assert ran(tuned).choices == found.choices
    assert (tmp_path / "flashbias.db").read_bytes() == before, "a pin that is proven writes nothing"
    assert open_layers(tmp_path).remove_pin(PROBLEM.key("forward"))
    assert open_layers(tmp_path).winners(PROBLEM) == winners
    assert {kernel: choice.config for kernel, choice in ran(tuned).choices.items()} == {
        kernel: winner.config for kernel, winner in winners.items()
    }


def test_retune_sweeps_round_a_pin_and_keeps_the_winner_it_hides(tuned: Settings, tmp_path: Path) -> None:
    """The pinned kernel is neither swept nor its winner replaced; the others are tuned behind the pin."""
    winners = open_layers(tmp_path).winners(PROBLEM)
    pin(tmp_path)
    found = ran(replace(tuned, mode=Mode.RETUNE))
    assert (rungs(found), found.swept, found.choices["forward"].config) == (["pinned", "winner"], True, PINNED)
    after = open_layers(tmp_path).winners(PROBLEM)
    assert after["forward"] == winners["forward"]
    assert after["backward"].proven_with == {"forward": PINNED.hash}
    assert ran(replace(tuned, finish=True)).swept is False


def test_problem_with_pins_alone_runs_without_a_sweep(tmp_path: Path) -> None:
    """Every kernel pinned is nothing to tune, even in mode retune; in mode off there is no database to hold a pin."""
    pin(tmp_path)
    pin(tmp_path, softmax_config(64), "backward")
    found = ran(Settings(mode=Mode.RETUNE, cache_dir=tmp_path, finish=True))
    assert (rungs(found), found.swept) == (["pinned", "pinned"], False)
    assert open_layers(tmp_path).counts()["trials"] == 0
    assert rungs(ran(Settings(mode=Mode.OFF, cache_dir=tmp_path))) == ["default", "default"]


def test_sweep_of_a_problem_whose_forward_is_pinned_has_one_candidate_for_it(tmp_path: Path) -> None:
    """The pin is tried alone and stored as an unfinished winner; after it is removed, prewarming tries the others."""
    pin(tmp_path)
    prewarm = Settings(cache_dir=tmp_path, finish=True)
    first = ran(prewarm)
    winner = open_layers(tmp_path).winners(PROBLEM)["forward"]
    assert (rungs(first), first.swept) == (["pinned", "winner"], True)
    assert (winner.config, winner.tried, winner.total, winner.complete) == (PINNED, 1, 2, False)
    assert not ran(prewarm).swept, "while it is pinned nothing is missing"
    open_layers(tmp_path).remove_pin(PROBLEM.key("forward"))
    last = ran(prewarm)
    winner = open_layers(tmp_path).winners(PROBLEM)["forward"]
    assert (rungs(last), last.swept, winner.complete) == (["winner", "winner"], True, True)
    assert winner.config in (softmax_config(32), softmax_config(64))


def test_pin_takes_the_ladders_first_rung(tmp_path: Path) -> None:
    """Where nothing may be tuned the pin runs, fully proven, and the other kernel takes its default."""
    pin(tmp_path)
    found = ran(Settings(mode=Mode.READ, cache_dir=tmp_path))
    assert rungs(found) == ["pinned", "default"]
    assert [choice.level for choice in found.choices.values()] == [2, 1]
    with pytest.raises(CacheMiss, match="no winner of backward"):
        ran(Settings(mode=ASSERT, cache_dir=tmp_path))


def test_new_driver_has_the_pin_proven_again(tuned: Settings, tmp_path: Path) -> None:
    """What a pin was proven with is compared as a winner's is."""
    pin(tmp_path)
    environment = Environment(driver="999.1", ptxas="", torch=DEVICE.environment.torch)
    found = resolve(PROBLEM, replace(DEVICE, environment=environment), replace(tuned, mode=ASSERT))
    assert rungs(found) == ["pinned", "winner"]
    proofs = [row for row in open_layers(tmp_path).verifications(PROBLEM, "forward") if row.environment == environment]
    assert [(row.config, row.verdict, row.level) for row in proofs] == [(PINNED, Verdict.SAFE, 2)]


def bar(folder: Path) -> None:
    """Has ``PINNED`` found racy by somebody."""
    store = open_layers(folder)
    proof = store.verifications(PROBLEM, "forward")[-1]
    racy = {"verdict": Verdict.RACY, "level": 0, "reason": "planted", "created_at": time.time()}
    store.add_verification(proof.model_copy(update=racy))


@pytest.mark.parametrize(
    ("config", "barred", "expected"),
    [
        (softmax_config(8), False, "block 8 does not hold a row of 19"),
        (softmax_config(64, "zeroed_row"), False, "wrong, 'y' is off"),
        (PINNED, True, "racy, planted"),
    ],
    ids=["refused", "wrong", "barred"],
)
def test_pin_that_may_not_run_costs_a_warning_and_the_winner_runs(
    tuned: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture, config: Config, barred: bool, expected: str
) -> None:
    """What the rules refuse, the gate fails or a judgement bars is named once, and all is as if it were not pinned."""
    if barred:
        bar(tmp_path)
    pin(tmp_path, config)
    found = ran(replace(tuned, mode=ASSERT))
    assert rungs(found) == ["winner", "winner"]
    (warning,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    for part in (PROBLEM.key("forward")[:12], str(config), expected, "as if there were none"):
        assert part in warning


def test_lifted_pin_is_proven_before_it_runs_again(tuned: Settings, tmp_path: Path) -> None:
    """A lift gives leave to try, not to run: the proof of before has lost its force too."""
    bar(tmp_path)
    pin(tmp_path)
    lift = Lift(
        problem=PROBLEM, kernel="forward", config=PINNED, lifted_by="me", host="here", created_at=time.time() + 0.01
    )
    open_layers(tmp_path).add_lift(lift)
    time.sleep(0.02)
    assert rungs(ran(replace(tuned, mode=ASSERT))) == ["pinned", "winner"]
    last = open_layers(tmp_path).verifications(PROBLEM, "forward")[-1]
    assert (last.verdict, last.created_at > lift.created_at) == (Verdict.SAFE, True)


def test_pin_that_fails_in_the_sweep_is_dropped_and_all_candidates_are_tried(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A pinned backward whose forward is not yet known is judged in the sweep, which then goes on without it."""
    wrong = softmax_config(64, "zeroed_row")
    pin(tmp_path, wrong, "backward")
    found = ran(Settings(cache_dir=tmp_path))
    assert (rungs(found), found.swept) == (["winner", "winner"], True)
    assert caplog.text.count("is not used here") == 1
    assert all(row.complete for row in open_layers(tmp_path).winners(PROBLEM).values())


def test_proof_for_a_pin_goes_through_the_pins_before_it(tuned: Settings, tmp_path: Path) -> None:
    """A backward is proven behind the pinned forward if there is one, else behind the winner; never behind nothing."""
    winner = open_layers(tmp_path).winners(PROBLEM)["forward"].config
    assert proven(tmp_path, softmax_config(64), "backward").through == {"forward": winner}
    pin(tmp_path)
    proof = proven(tmp_path, softmax_config(64), "backward")
    assert (proof.safe, proof.through) == (True, {"forward": PINNED})
    alone = proven(tmp_path / "empty", softmax_config(64), "backward")
    assert not alone.safe
    assert "tune the problem first: no winner of forward is stored" in alone.reason


def test_config_that_may_not_run_is_no_pin(tuned: Settings, tmp_path: Path) -> None:
    """The rules, a wrong result, and an earlier judgement each keep a config from being pinned, with the reason."""
    refused = proven(tmp_path, softmax_config(8))
    assert (refused.safe, refused.verification) == (False, None)
    assert refused.reason == "the rules refuse it: block 8 does not hold a row of 19"
    wrong = proven(tmp_path, softmax_config(64, "zeroed_row"))
    assert (wrong.safe, wrong.reason.startswith("wrong, ")) == (False, True)
    assert wrong.verification is not None
    assert wrong.verification.verdict is Verdict.WRONG
    bar(tmp_path)
    barred = proven(tmp_path, PINNED)
    assert (barred.safe, barred.verification, barred.reason) == (False, None, "it is in quarantine: racy, planted")


def test_winners_run_where_nothing_can_be_proven_behind_a_pin(
    tuned: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where no child may start, a pin that needs a proof behind it is dropped: the stored winners need none."""

    def refused(*_: object) -> None:
        raise SandboxError("this GPU is not shared")

    pin(tmp_path)
    monkeypatch.setattr(room, "admit", refused)
    assert rungs(ran(tuned)) == ["winner", "winner"]
    assert "nothing can be proven behind it now: this GPU is not shared" in caplog.text


def test_a_soak_behind_a_pin_that_fails_is_behind_the_winner(tuned: Settings, tmp_path: Path) -> None:
    """What a wrong pin would make of the backward is no fault of it; the forward's winner is soaked, for it runs."""
    pin(tmp_path, softmax_config(128, "zeroed_row"))
    results = soak(PROBLEM, DEVICE, tuned, open_layers(tmp_path), 8)
    assert [(each.kernel, each.passed) for each in results] == [("forward", True), ("backward", True)]


def test_a_soak_behind_another_forward_is_another_soak(tuned: Settings, tmp_path: Path) -> None:
    """What the backward passed behind the winner says nothing of it behind a pin; the pinned kernel is left out."""
    soak(PROBLEM, DEVICE, tuned, open_layers(tmp_path), 8)
    pin(tmp_path)
    (result,) = soak(PROBLEM, DEVICE, tuned, open_layers(tmp_path), 8)
    assert (result.kernel, result.already, result.repeats) == ("backward", False, 8)
