"""The soak: what passes reaches level 3 with its count, what fails is out, and what has passed is not run again."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

import autotune
from autotune import AutotuneError, Settings, progress, resolve
from autotune.device import describe, interpreting
from autotune.soak import soak
from cache_db import open_layers
from cache_db.models import Problem, Trial, Verdict
from tests.autotune.planted_spec import planted_problem
from tests.autotune.softmax_spec import softmax_config

pytestmark = pytest.mark.skipif(not interpreting(), reason="runs kernels in Triton's interpreter (TRITON_INTERPRET=1)")


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    """Makes each test start like a new process."""
    autotune.forget()
    yield
    autotune.forget()


def tuned(folder: Path, forward: str) -> Problem:
    """Returns a problem with these candidates and a stored winner."""
    problem = planted_problem(forward)
    assert resolve(problem, describe(-1), Settings(cache_dir=folder)).choices
    return problem


def forward_trial(folder: Path, problem: Problem) -> Trial:
    """Returns the forward's first trial."""
    return open_layers(folder).trials(problem, "forward")[0]


def test_winners_that_pass_have_level_3_once_and_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Parts add up to what was asked for and are told of, the sweep's times stay; what has passed as many is not run again."""
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    caplog.set_level(logging.INFO, logger="autotune.progress")
    problem, settings = tuned(tmp_path, "32"), Settings(cache_dir=tmp_path)
    before = forward_trial(tmp_path, problem)
    results = soak(problem, describe(-1), settings, open_layers(tmp_path), 10)
    assert [(each.kernel, each.passed, each.repeats, each.already) for each in results] == [
        ("forward", True, 10, False),
        ("backward", True, 10, False),
    ]
    (told,) = (line for line in caplog.messages if line.startswith("soaking backward: 2 of 4 done, "))
    assert told.endswith(" left, 5 of 10 repeats agree")
    after = forward_trial(tmp_path, problem)
    assert (after.level, after.figures["repeats"], after.figures["ms"]) == (3, 10, before.figures["ms"])
    autotune.forget()
    found = resolve(problem, describe(-1), Settings(mode=autotune.Mode.ASSERT, cache_dir=tmp_path))
    assert {choice.level for choice in found.choices.values()} == {3}
    again = soak(problem, describe(-1), settings, open_layers(tmp_path), 8)
    assert [(each.already, each.repeats) for each in again] == [(True, 10), (True, 10)]
    assert forward_trial(tmp_path, problem) == after
    longer = soak(problem, describe(-1), settings, open_layers(tmp_path), 12)
    assert [(each.already, each.repeats) for each in longer] == [(False, 12), (False, 12)]


def test_a_winner_that_fails_is_out_and_the_next_takes_its_place(tmp_path: Path) -> None:
    """What only the soak's other inputs show becomes the trial's verdict, and the next resolve has another winner."""
    problem, settings = tuned(tmp_path, "32:wrong_for_some"), Settings(cache_dir=tmp_path)
    results = soak(problem, describe(-1), settings, open_layers(tmp_path), 4)
    assert [(each.kernel, each.verdict, each.repeats) for each in results] == [("forward", Verdict.WRONG, 1)]
    stored = forward_trial(tmp_path, problem)
    assert (stored.verdict, stored.level) == (Verdict.WRONG, 0)
    assert "'y' is off" in stored.reason
    autotune.forget()
    found = resolve(problem, describe(-1), settings)
    assert found.choices["forward"].rung == "default"
    assert found.choices["forward"].config == softmax_config(256)


def test_an_edited_count_is_no_count(tmp_path: Path) -> None:
    """Repeats that are no whole number were not passed: the winner is soaked again."""
    problem, settings = tuned(tmp_path, "32"), Settings(cache_dir=tmp_path)
    soak(problem, describe(-1), settings, open_layers(tmp_path), 4)
    with contextlib.closing(sqlite3.connect(tmp_path / "flashbias.db")) as database:
        database.execute("""update flashbias_trials set figures = replace(figures, '"repeats":4', '"repeats":"999"')""")
        database.commit()
    assert forward_trial(tmp_path, problem).figures["repeats"] == "999"
    results = soak(problem, describe(-1), settings, open_layers(tmp_path), 4)
    assert [(each.repeats, each.already) for each in results] == [(4, False), (4, False)]


def test_without_winners_there_is_nothing_to_soak(tmp_path: Path) -> None:
    """It says so instead of finding that all of them passed."""
    with pytest.raises(AutotuneError, match="nothing to soak: no winner of forward is stored"):
        soak(planted_problem(), describe(-1), Settings(cache_dir=tmp_path), open_layers(tmp_path), 4)


def test_a_problem_that_another_process_tunes_is_not_soaked(tmp_path: Path) -> None:
    """Both would store winners and levels of one problem: the second waits as long as it may, then says why not."""
    layers, problem = open_layers(tmp_path), planted_problem()
    layers.claim(problem.hash, "somebody", "elsewhere", 30.0)
    with pytest.raises(AutotuneError, match="another process is tuning"):
        soak(problem, describe(-1), Settings(cache_dir=tmp_path), layers, 4)
