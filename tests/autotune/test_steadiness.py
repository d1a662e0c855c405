"""A device that computes one thing in two ways is believed nothing."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

import autotune
from autotune import Mode, Settings, resolve
from autotune.device import describe
from autotune.errors import SuspectDevice
from autotune.sandbox import GateFault, Sandbox, SandboxError
from autotune.scene import Scene
from autotune.spec import load
from autotune.steadiness import Watch
from cache_db import open_layers
from tests.autotune.planted_spec import planted_problem
from tests.autotune.softmax_spec import UNJUDGEABLE_SEED, softmax_config

DEVICE = describe(-1)
NO_HANDLE = "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    """Makes each test start like a new process."""
    autotune.forget()
    yield
    autotune.forget()


@pytest.fixture
def unsteady(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file whose presence makes the device unsteady."""
    monkeypatch.setenv("PLANTED_UNSTEADY", str(tmp_path / "unsteady"))
    return tmp_path / "unsteady"


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Returns all that was warned of."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def fill_and_fail(unsteady: Path) -> None:
    """Fills the device up and raises SandboxError."""
    unsteady.write_text("full", encoding="utf-8")
    raise SandboxError("planted")


def test_healthy_device_repeats_the_computation_in_another_process() -> None:
    """The same seed gives the same bits in every run of every child, another seed others, and a spec's failure a fault."""
    found = []
    for _ in range(2):
        with Sandbox(planted_problem(), DEVICE) as sandbox:
            found.append(set(sandbox.fingerprints(1)))
            other = set(sandbox.fingerprints(2))
            with pytest.raises(GateFault, match="planted: no oracle for this seed"):
                sandbox.fingerprints(UNJUDGEABLE_SEED)
    assert [len(each) for each in (*found, other)] == [1, 1, 1]
    assert found[0] == found[1] != other


def test_unsteady_device_stores_nothing_and_takes_the_ladder(
    tmp_path: Path, unsteady: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Suspect before the sweep: no row of any kind, one warning, the default after a quick proof."""
    unsteady.touch()
    found = resolve(planted_problem(), DEVICE, Settings(cache_dir=tmp_path))
    assert {choice.rung for choice in found.choices.values()} == {"default"}
    assert set(open_layers(tmp_path).counts().values()) == {0}
    (warning,) = warnings(caplog)
    assert "is suspect" in warning
    assert "running forward by default" in warning


def test_what_a_device_judged_while_it_broke_counts_for_nothing(
    tmp_path: Path, unsteady: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Suspect after the sweep: no winner, one warning, and the next sweep of a sound device tries all of it again."""
    problem = planted_problem("32 64:zeroed_row 128:breaks_device")
    found = resolve(problem, DEVICE, Settings(cache_dir=tmp_path))
    store = open_layers(tmp_path)
    trials = {trial.config: trial.created_at for trial in store.trials(problem, "forward")}
    assert {choice.rung for choice in found.choices.values()} == {"default"}
    assert store.winners(problem) == {}
    assert [row.config for row in store.verifications(problem)] == [softmax_config(64, "zeroed_row")]
    assert len(trials) == 3
    assert {lift.config for lift in store.lifts(problem, "forward")} == set(trials)
    (warning,) = warnings(caplog)
    assert "is suspect" in warning
    unsteady.unlink()
    autotune.forget()
    sound = planted_problem("32 64:zeroed_row", default="256")
    for row in store.trials(problem):
        store.add_trial(row.model_copy(update={"problem": sound}))
    for judgement in store.verifications(problem):
        store.add_verification(judgement.model_copy(update={"problem": sound}))
    for lift in store.lifts(problem):
        store.add_lift(lift.model_copy(update={"problem": sound}))
    assert resolve(sound, DEVICE, Settings(cache_dir=tmp_path)).choices["forward"].config == softmax_config(32)
    again = {trial.config: trial.created_at for trial in store.trials(sound, "forward")}
    assert all(again[config] > trials[config] for config in (softmax_config(32), softmax_config(64, "zeroed_row")))


def test_a_device_that_filled_up_meanwhile_is_not_suspect(
    tmp_path: Path, unsteady: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A caller may take all memory during a sweep: the second look is given up with a warning, and trials keep their force."""
    problem = planted_problem("32", "32:fills_device")
    resolve(problem, DEVICE, Settings(cache_dir=tmp_path))
    store = open_layers(tmp_path)
    assert unsteady.read_text() == "full"
    assert store.trials(problem, "forward")
    assert not store.lifts(problem)
    assert any("could not be watched after the trials" in warning for warning in warnings(caplog))


def test_a_sweep_that_fails_while_the_device_fills_up_warns_once(
    tmp_path: Path, unsteady: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No winner, and no memory for the second look: the one warning is of what runs instead."""
    resolve(planted_problem("32", "32:fills_and_fails"), DEVICE, Settings(cache_dir=tmp_path))
    assert unsteady.read_text() == "full"
    (warning,) = warnings(caplog)
    assert "running without a tuned kernel" in warning


@pytest.mark.parametrize(
    ("failure", "suspect", "told"),
    [("full", False, 1), (NO_HANDLE, False, 1), ("CUDA error: unspecified launch failure", True, 0)],
)
def test_what_the_second_look_dies_of_decides_whether_the_device_is_believed(
    failure: str, suspect: bool, told: int, unsteady: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Want of memory, in whatever words, is a warning; any other failure makes the device suspect."""
    problem = planted_problem()
    with Sandbox(problem, DEVICE) as sandbox:
        scene = Scene(problem, DEVICE, Settings(), load(problem.spec), open_layers(None), sandbox)
        with pytest.raises(SuspectDevice) if suspect else contextlib.nullcontext(), Watch(scene):
            unsteady.write_text(failure, encoding="utf-8")
    assert scene.suspect is suspect
    assert len(warnings(caplog)) == told


def test_a_block_that_raises_has_the_only_say(unsteady: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever handles the error warns of it; that the device filled up besides is for the log of level debug."""
    problem = planted_problem()
    with Sandbox(problem, DEVICE) as sandbox:
        scene = Scene(problem, DEVICE, Settings(), load(problem.spec), open_layers(None), sandbox)
        with pytest.raises(SandboxError, match="planted"), Watch(scene):
            fill_and_fail(unsteady)
    assert warnings(caplog) == []


def test_unsteady_device_goes_on_with_the_stored_winner(
    tmp_path: Path, unsteady: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A sweep that was to go on where the budget ended leaves the winner in place, and says why in one warning."""
    problem = planted_problem("32 64 128", "32 64 128")
    resolve(problem, DEVICE, Settings(cache_dir=tmp_path, budget_seconds=0.001))
    before = open_layers(tmp_path).counts()
    autotune.forget()
    unsteady.touch()
    caplog.clear()
    found = resolve(problem, DEVICE, Settings(mode=Mode.TUNE, cache_dir=tmp_path, finish=True))
    assert {choice.rung for choice in found.choices.values()} == {"winner"}
    assert open_layers(tmp_path).counts() == before
    (warning,) = warnings(caplog)
    assert "is suspect" in warning
    assert "running the stored winner" in warning
