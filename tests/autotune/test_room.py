"""Little memory: the sweep times smaller sizes or declines with one warning, and nobody else notices."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import autotune
from autotune import Settings, resolve, room
from autotune.candidate import Candidate, at_other_sizes
from autotune.device import DeviceInfo, describe
from autotune.errors import NoRoom
from autotune.sandbox import Sandbox
from autotune.verdicts import verdict_of
from cache_db import open_layers
from cache_db.models import Config, Scalar, Verdict
from tests.autotune.planted_spec import planted_problem
from tests.autotune.roomy_spec import roomy_problem
from tests.autotune.softmax_spec import softmax_config

DEVICE = describe(-1)
GOOD = softmax_config()
STARVING = softmax_config(32, "out_of_memory")


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    """Makes each test start like a new process."""
    autotune.forget()
    yield
    autotune.forget()


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that says how many rows the device holds."""
    monkeypatch.setenv("PLANTED_ROWS", str(tmp_path / "rows"))
    return tmp_path / "rows"


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Returns all that was warned of."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_sweep_shrinks_its_sizes_and_is_finished_when_there_is_room(rows: Path, tmp_path: Path) -> None:
    """Times at fewer rows say so and make no complete winner; the next sweep with room takes them at full size."""
    problem = roomy_problem()
    rows.write_text("40", encoding="utf-8")
    found = resolve(problem, DEVICE, Settings(cache_dir=tmp_path))
    assert {choice.rung for choice in found.choices.values()} == {"winner"}
    store = open_layers(tmp_path)
    assert {trial.figures["timed_at"] for trial in store.trials(problem)} == {"rows=32"}
    assert {winner.complete for winner in store.winners(problem).values()} == {False}
    rows.write_text("1000", encoding="utf-8")
    autotune.forget()
    assert resolve(problem, DEVICE, Settings(cache_dir=tmp_path, finish=True)).swept
    assert {winner.complete for winner in open_layers(tmp_path).winners(problem).values()} == {True}


def test_smaller_sizes_stay_for_the_whole_sandbox(rows: Path) -> None:
    """Times of one sweep compare: a fresh child starts where the last one arrived, whatever is free by then."""
    rows.write_text("20", encoding="utf-8")
    with Sandbox(roomy_problem(), DEVICE) as sandbox:
        before = sandbox.measure("forward", [GOOD], {}, 1)
        sandbox._runner.kill()
        rows.write_text("1000", encoding="utf-8")
        after = sandbox.measure("backward", [GOOD], {"forward": GOOD}, 1)
    assert [figures[GOOD.hash]["timed_at"] for figures in (before, after)] == ["rows=16", "rows=16"]


def test_what_a_child_keeps_makes_room_before_anybody_else_does(rows: Path) -> None:
    """The timed inputs stay for the next question, unless a proof needs their memory; nothing shrinks for that."""
    rows.write_text("70", encoding="utf-8")
    with Sandbox(roomy_problem(), DEVICE) as sandbox:
        for _ in range(2):
            assert "timed_at" not in sandbox.measure("forward", [GOOD], {}, 1)[GOOD.hash]
            assert sandbox.prove("forward", GOOD, {}, 2, 1).safe


def test_one_candidate_that_wants_too_much_shrinks_nothing_for_the_others(rows: Path, tmp_path: Path) -> None:
    """A launch that finds no memory at any size is that candidate's failure; the sweep goes on at the sizes it had."""
    rows.write_text("1000", encoding="utf-8")
    problem = roomy_problem(forward="32:out_of_memory 64")
    found = resolve(problem, DEVICE, Settings(cache_dir=tmp_path))
    assert found.choices["forward"].config == softmax_config(64)
    trials = {trial.config: trial for trial in open_layers(tmp_path).trials(problem, "forward")}
    assert trials[STARVING].verdict == "killed"
    assert "timed_at" not in trials[softmax_config(64)].figures
    with Sandbox(problem, DEVICE) as sandbox:
        assert sandbox.measure("forward", [STARVING], {}, 1) == {}
        assert "timed_at" not in sandbox.measure("forward", [GOOD], {}, 1)[GOOD.hash]


@pytest.mark.parametrize(("holds", "config", "asked"), [(1000, STARVING, 0), (8, GOOD, 1)])
def test_only_what_every_candidate_lacks_empties_the_callers_cache(
    holds: int, config: Config, asked: int, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That stops the caller's GPU: one candidate's appetite, measured alone, is no reason, and inputs without room are."""
    rows.write_text(str(holds), encoding="utf-8")
    released: list[DeviceInfo] = []
    release = room.release

    def counted(device: DeviceInfo) -> bool:
        released.append(device)
        return release(device)

    monkeypatch.setattr(room, "release", counted)
    with Sandbox(roomy_problem(), DEVICE) as sandbox, contextlib.suppress(NoRoom):
        assert sandbox.measure("forward", [config], {}, 1) == {}
    assert len(released) == asked


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_a_full_device_is_known_by_what_libraries_say_of_it(error: Exception, full: bool) -> None:
    """A fresh process whose cuBLAS finds no memory calls it not initialised: no candidate's fault, and no device's."""
    assert room.ran_out(error) is full
    assert (verdict_of(error, compiling=False) is Verdict.KILLED) is full
    if isinstance(error, RuntimeError):  # what a parent hears of its child's
        assert room.tells_of_no_memory(repr(error)) is full


def test_what_cannot_shrink_declines_with_one_warning_and_other_problems_go_on(
    rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A spec without smaller sizes: no sweep, the ladder's quick proof, one warning with size and cures."""
    rows.write_text("40", encoding="utf-8")
    settings = Settings(cache_dir=tmp_path, remedy="turn the handle")
    found = resolve(roomy_problem("CROWDED"), DEVICE, settings)
    assert {choice.rung for choice in found.choices.values()} == {"default"}
    (warning,) = warnings(caplog)
    for part in ("no room for case 'representative'", "7.00 GiB", "before the model is loaded", "turn the handle"):
        assert part in warning
    assert open_layers(tmp_path).winners(roomy_problem("CROWDED")) == {}
    other = resolve(planted_problem(), DEVICE, settings)
    assert {choice.rung for choice in other.choices.values()} == {"winner"}


@pytest.mark.parametrize(("limit", "rungs"), [("8", {"default"}), ("6", set())])
def test_proofs_that_do_not_fit_decline_with_one_warning(
    limit: str, rungs: set[str], rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without room for the race case the ladder is left, without room for the first case nothing; no candidate is blamed."""
    rows.write_text(limit, encoding="utf-8")
    found = resolve(roomy_problem(), DEVICE, Settings(cache_dir=tmp_path))
    assert {choice.rung for choice in found.choices.values()} == rungs
    (warning,) = warnings(caplog)
    assert "no room for case" in warning
    store = open_layers(tmp_path)
    assert store.trials(roomy_problem()) == []
    assert all(row.verdict == "safe" for row in store.verifications(roomy_problem()))


def test_the_least_timed_size_that_does_not_fit_either_declines(rows: Path) -> None:
    """Shrinking ends where the spec ends it, with what was wanted."""
    rows.write_text("12", encoding="utf-8")
    with Sandbox(roomy_problem(), DEVICE) as sandbox:
        assert sandbox.prove("forward", GOOD, {}, 1, 0).safe
        with pytest.raises(NoRoom, match=r"no room for case 'representative': 7\.00 GiB more were needed"):
            sandbox.measure("forward", [GOOD], {}, 1)
        assert sandbox.prove("forward", GOOD, {}, 1, 0).safe


def test_times_of_other_sizes_are_taken_again() -> None:
    """When sizes shrank in the middle of a sweep, what was timed before does not compare; what has no time has none."""
    figures: list[dict[str, Scalar]] = [
        {"ms": 1.0},
        {"ms": 2.0, "timed_at": "rows=8"},
        {"ms": 3.0, "timed_at": "rows=4"},
        {},
    ]
    first, second, third, untimed = (Candidate(softmax_config(), figures=each) for each in figures)
    pool = [first, second, third, untimed]
    assert at_other_sizes(pool, [third, untimed]) == [first, second]
    assert at_other_sizes(pool, [first]) == [second, third]
    assert at_other_sizes(pool, [untimed]) == []
    third.untime()
    assert third.figures == {}


@pytest.mark.parametrize(("free", "kept"), [(0, 1.0), (3, 1.0), (10, 1.0), (80, 8.0), (140, 14.0)])
def test_a_child_leaves_a_gibibyte_or_a_tenth(free: int, kept: float) -> None:
    """What the caller may soon need stays free."""
    assert room.reserve(free * room.GIB) == pytest.approx(kept * room.GIB, abs=1)


@pytest.mark.parametrize(("size", "peers"), [("1", False), ("2", True), ("", False), ("many", False)])
def test_a_rank_of_a_job_keeps_its_cache(size: str, peers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Giving memory back waits for the device, and that may wait for a peer."""
    monkeypatch.setenv("WORLD_SIZE", size)
    assert room.in_job() is peers
