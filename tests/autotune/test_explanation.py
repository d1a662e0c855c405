"""autotune.explanation: what it foresees is what resolve then does, and foreseeing it leaves no trace."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import autotune
from autotune import CacheMiss, Mode, Settings, resolve
from autotune.device import describe
from autotune.evidence import differences, level, margins, plain, when
from autotune.explanation import Doing, Explanation, explain
from autotune.judgements import Judgement
from autotune.tuner import decided, opened
from cache_db import open_layers
from cache_db.models import Config, Environment, Pin, Problem, Verdict, Verification
from tests.autotune.planted_spec import planted_problem
from tests.autotune.softmax_spec import softmax_config

DEVICE = describe(-1)
PROBLEM = planted_problem("32 64", "32")
OTHER = planted_problem("32 64", "32", columns=23)


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    """Makes each test start like a new process."""
    autotune.forget()
    yield
    autotune.forget()


@pytest.fixture(scope="module")
def tuned_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database in which ``PROBLEM`` has been tuned."""
    folder = tmp_path_factory.mktemp("tuned")
    assert resolve(PROBLEM, DEVICE, Settings(cache_dir=folder)).won
    return folder / "flashbias.db"


@pytest.fixture
def tuned(tmp_path: Path, tuned_file: Path) -> Settings:
    """The settings of a folder with a copy of that database."""
    shutil.copy(tuned_file, tmp_path)
    return Settings(cache_dir=tmp_path)


def explained(settings: Settings, problem: Problem = PROBLEM) -> Explanation:
    """Explains as a new process would, and checks that nothing was started, said or written on the way."""
    folder = settings.cache_dir
    file = None if folder is None else folder / "flashbias.db"
    store = open_layers(None if settings.mode is Mode.OFF else folder)
    before = file.read_bytes() if file and file.exists() else b""
    children = offspring()
    found = explain(problem, DEVICE, settings, store)
    assert offspring() == children
    assert (file.read_bytes() if file and file.exists() else b"") == before
    assert store.counts()["verifications"] == open_layers(folder).counts()["verifications"] or settings.mode is Mode.OFF
    return found


def offspring() -> str:
    """Returns the children of this process."""
    return " ".join(sorted(Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii").split()))


def choices(found: Explanation) -> dict[str, tuple[str, Config]]:
    """Returns kernel -> rung and config."""
    return {each.kernel: (each.choice.rung, each.choice.config) for each in found.answers}


def assert_comes_true(found: Explanation, settings: Settings, problem: Problem = PROBLEM) -> None:
    """Checks that a call does what ``found`` says."""
    if found.doing is Doing.RAISE:
        with pytest.raises(CacheMiss):
            resolve(problem, DEVICE, settings)
        return
    got = resolve(problem, DEVICE, settings)
    assert got.swept == (found.doing is Doing.TUNE)
    if found.doing is Doing.TUNE:
        assert got.won
        return
    assert {kernel: (choice.rung, choice.config) for kernel, choice in got.choices.items()} == choices(found)
    assert got.reason == found.reason
    assert got.won == found.won
    for each in found.answers:
        assert got.choices[each.kernel].level == (each.due or each.choice.level)


@pytest.mark.parametrize(
    ("mode", "doing", "rung"),
    [
        (Mode.TUNE, Doing.NOTHING, "winner"),
        (Mode.READ, Doing.NOTHING, "winner"),
        (Mode.ASSERT, Doing.NOTHING, "winner"),
        (Mode.RETUNE, Doing.TUNE, "winner"),
        (Mode.OFF, Doing.PROVE, "default"),
    ],
)
def test_every_mode_is_foreseen_where_a_winner_is_stored(tuned: Settings, mode: Mode, doing: Doing, rung: str) -> None:
    """A stored winner runs at once, is swept over, or is not looked at, and the explanation says which."""
    settings = replace(tuned, mode=mode)
    found = explained(settings)
    assert (found.doing, {each.choice.rung for each in found.answers}) == (doing, {rung})
    assert found.won == (doing is Doing.NOTHING)
    if doing is not Doing.TUNE:  # a sweep is seen to come true below, where nothing is stored
        assert_comes_true(found, settings)


@pytest.mark.parametrize(
    ("mode", "doing"), [(Mode.TUNE, Doing.TUNE), (Mode.READ, Doing.PROVE), (Mode.ASSERT, Doing.RAISE)]
)
def test_every_mode_is_foreseen_on_a_miss(tmp_path: Path, mode: Mode, doing: Doing) -> None:
    """A miss is tuned, runs the default after a quick proof, or raises; a sweep's size and length are told before it."""
    settings = Settings(mode=mode, cache_dir=tmp_path, budget_seconds=7.0)
    found = explained(settings)
    assert (found.doing, found.won, found.nearest) == (doing, False, ())
    assert "no winner of forward is stored" in found.reason
    assert found.cure
    if doing is Doing.TUNE:
        assert (found.sizes, found.seconds) == ({"forward": 2, "backward": 1}, 7.0)
    if doing is Doing.PROVE:
        assert {each.due for each in found.answers} == {1}
    assert_comes_true(found, settings)


def test_a_neighbour_is_foreseen_and_named(tuned: Settings) -> None:
    """Where only other lengths were tuned, their winner runs after a quick proof; rows and differing fields are shown."""
    settings = replace(tuned, mode=Mode.READ)
    found = explained(settings, OTHER)
    assert {each.choice.rung for each in found.answers} == {"neighbour"}
    assert {each.neighbour for each in found.answers} == {PROBLEM}
    assert all(each.winner is not None and each.trial is not None for each in found.answers)
    ((near, differing),) = found.nearest
    assert near == PROBLEM
    assert [(each.name, each.there, each.wanted) for each in differing] == [("columns", 19, 23)]
    assert_comes_true(found, settings, OTHER)


def other_torch(settings: Settings) -> None:
    """Has every winner, and what proves it, be of another torch."""
    store = open_layers(settings.cache_dir)
    for row in store.winners(PROBLEM).values():
        made = Environment(driver="", ptxas="", torch="0")
        store.put_winner(row.model_copy(update={"environment": made}), replace=True)
        for trial in store.trials(PROBLEM, row.kernel):
            store.add_trial(trial.model_copy(update={"environment": made}))


def racy(settings: Settings) -> None:
    """Has the forward's winner be found racy later."""
    judge(settings, Verdict.RACY)


def pinned(settings: Settings) -> None:
    """Has the other forward config be pinned, with a proof."""
    store = open_layers(settings.cache_dir)
    wish = {"pinned_by": "me", "host": "here", "reason": "why not", "created_at": time.time()}
    store.put_pin(Pin(problem=PROBLEM, kernel="forward", config=softmax_config(64), **wish))


def judge(settings: Settings, verdict: Verdict) -> None:
    """Stores a later judgement of the forward's winner."""
    store = open_layers(settings.cache_dir)
    config = store.winners(PROBLEM)["forward"].config
    row: Judgement = next(each for each in store.trials(PROBLEM, "forward") if each.config == config)
    changes = {"verdict": verdict, "level": 0, "created_at": time.time(), "reason": "seen later"}
    store.add_verification(Verification.of(row).model_copy(update=changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("spoil", [other_torch, racy, pinned])
def test_what_spoils_a_winner_is_foreseen(tuned: Settings, spoil: Callable[[Settings], None]) -> None:
    """Another environment, a later failure and a pin change what a reading call runs, and the explanation with it."""
    spoil(tuned)
    settings = replace(tuned, mode=Mode.READ)
    found = explained(settings)
    if spoil is other_torch:
        assert found.doing is Doing.PROVE
        assert {each.due for each in found.answers} == {2}
    if spoil is racy:
        assert "failed its proof here: racy, seen later" in found.reason
    if spoil is pinned:
        forward = found.answers[0]
        assert (forward.choice.rung, forward.choice.config) == ("pinned", softmax_config(64))
        assert forward.pin is not None
    assert_comes_true(found, settings)


def test_evidence_is_that_of_the_config_that_runs(tuned: Settings) -> None:
    """Trial and winner row of each kernel are given, with errors below their budgets."""
    for each in explained(tuned).answers:
        assert each.trial is not None
        assert each.winner is not None
        assert each.trial.config == each.winner.config == each.choice.config
        assert each.choice.level == 2
        assert not each.due
        found = margins(each.trial.figures)
        assert found
        assert all(0 <= margin.ratio <= 1 for margin in found)


def test_a_sweep_elsewhere_is_named(tmp_path: Path) -> None:
    """While another process holds the lease a call takes the ladder, and the explanation says who tunes."""
    settings = Settings(cache_dir=tmp_path)
    held = open_layers(tmp_path).claim(PROBLEM.hash, "boot/ns/7-1:x", "node-7", 60.0)
    found = explained(settings)
    assert found.doing is Doing.WAIT
    assert found.lease == held
    assert_comes_true_on_the_ladder(found, settings)


def assert_comes_true_on_the_ladder(found: Explanation, settings: Settings) -> None:
    """Checks the choices alone: the reason names the holder."""
    got = resolve(PROBLEM, DEVICE, settings)
    assert not got.swept
    assert {kernel: (choice.rung, choice.config) for kernel, choice in got.choices.items()} == choices(found)


def test_what_a_process_has_decided_is_what_it_explains(tuned: Settings, tmp_path: Path) -> None:
    """A decision stands whatever the database says since; before it there is none, and no database is open."""
    assert decided(PROBLEM, DEVICE, tuned) is None
    assert opened(tuned) is None
    got = resolve(PROBLEM, DEVICE, tuned)
    racy(tuned)
    found = explained(tuned)
    assert found.doing is Doing.DECIDED
    assert {each.kernel: each.choice for each in found.answers} == got.choices
    assert opened(tuned) is not None
    assert decided(PROBLEM, DEVICE, replace(tuned, mode=Mode.READ)) is None


def test_nothing_is_said_of_proofs_that_are_not_made(tuned: Settings, caplog: pytest.LogCaptureFixture) -> None:
    """A call announces that it proves a winner again; an explanation does not, for it does not."""
    other_torch(tuned)
    with caplog.at_level(logging.INFO):
        explained(tuned)
    assert not caplog.records
    with caplog.at_level(logging.INFO):
        resolve(PROBLEM, DEVICE, tuned)
    assert "proving the stored winner of forward again" in caplog.text


def test_figures_of_any_kind_are_read() -> None:
    """Margins are taken where both numbers are there, the nearest to its budget first; plain data has no infinities."""
    figures = {"a_error": 1.0, "a_ratio": 0.25, "b_error": 2.0, "b_ratio": 0.5, "c_error": 1.0, "d_error": "x"}
    odd = {"d_ratio": 1.0, "e_error": float("nan"), "e_ratio": 1.0, "f_error": True, "f_ratio": 1.0}
    assert [tuple(each) for each in margins({**figures, **odd})] == [("b", 2.0, 0.5), ("a", 1.0, 0.25)]
    assert str(margins(figures)[0]) == "b 2.0e+00 (50% of its budget)"
    assert plain({"a": [float("inf"), {"b": float("nan")}], "c": 1.5}) == {"a": [None, {"b": None}], "c": 1.5}


def test_differences_name_columns_before_fields_and_what_is_missing() -> None:
    """A field that only one of two problems has is None in the other."""
    here = planted_problem()
    there = here.model_copy(update={"gpu_name": "NVIDIA H200", "fields": {**here.fields, "made_up": 3}})
    found = [tuple(each) for each in differences(there, here)]
    assert found == [("gpu_name", "NVIDIA H200", here.gpu_name), ("made_up", 3, None)]


def test_levels_and_times_have_words() -> None:
    """The levels of DESIGN are named, a level of the future is shown as it is, and no time is too odd to be told."""
    assert [level(number) for number in (0, 2, 9)] == ["level 0 (not proven)", "level 2 (gate)", "level 9"]
    assert when(0.0) == "1970-01-01 00:00 UTC"
    assert when(1e300) == "at 1e+300 s"
