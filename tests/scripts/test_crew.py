"""Workers that prewarm together: each problem once, a dead worker's taken over, progress shown once, everybody's share."""

from __future__ import annotations

import os
import re
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from autotune import Resolution
from autotune.errors import Taken
from cache_db import Layers, open_layers
from cache_db.models import Problem
from flashbias.cli.crew import Place, shared_out
from tests.autotune.planted_spec import planted_problem
from tests.autotune.test_jobs import Start, server, start

__all__ = ["server", "start"]  # fixtures

PROBLEMS = [planted_problem("32", "32", columns=11 + number, slow=0.05) for number in range(4)]


def swept(log: str) -> list[str]:
    """Returns the lines of a worker that tell of a finished sweep."""
    return re.findall(r": tuned in [0-9.]+ s$", log, re.MULTILINE)


@pytest.mark.timeout(170)
def test_two_workers_share_the_problems_and_a_dead_ones_is_taken_over(start: Start, tmp_path: Path) -> None:
    """The first worker is killed at its first problem; the second, who joins then, does the rest, and speaks for all."""

    def begin(rank: int) -> object:
        environment = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
        dumped = [each.model_dump() for each in PROBLEMS]
        return start("warm", environment, folder=str(tmp_path / "shared"), problems=dumped)

    victim = begin(0)
    database = open_layers(tmp_path / "shared")
    until = time.monotonic() + 60
    while database.holder(PROBLEMS[0].hash) is None:
        assert time.monotonic() < until, victim.log
        time.sleep(0.01)
    survivor = begin(1)
    while database.holder(PROBLEMS[2].hash) is None:  # where the second of two begins
        assert time.monotonic() < until, survivor.log
        time.sleep(0.01)
    os.kill(victim.pid, signal.SIGKILL)
    assert survivor.answer()["status"] == 0
    for each in PROBLEMS:
        assert {row.complete for row in database.winners(each).values()} == {True}
    assert database.counts()["leases"] == 0
    told = [number for log in (victim.log, survivor.log) for number in re.findall(r"^\[(\d)/4", log, re.MULTILINE)]
    assert victim.log.count("[1/4] ") == 1, "the first to come speaks"
    assert Counter(told)["4"] == 1
    assert survivor.log.count("4 of 4 problems have proven winners") == 1
    # A worker that dies at the very end of a sweep may have stored it without a word, or said so without storing it.
    assert 3 <= len(swept(victim.log)) + len(swept(survivor.log)) <= 5


class Script:
    """What ``tune`` does in a test without children: what others hold is left, the rest is decided."""

    def __init__(self, store: Layers) -> None:
        self.store = store
        self.tuned: list[Problem] = []
        self.lasts: list[bool] = []

    def __call__(self, problem: Problem, last: bool) -> Resolution:
        """Returns a decision, or raises Taken where somebody came between."""
        if not last and self.store.holder(problem.hash) is not None:
            raise Taken("somebody")
        self.tuned.append(problem)
        self.lasts.append(last)
        return Resolution({}, "decided", swept=True, location="memory")


def test_what_others_hold_comes_last_and_who_shows_no_progress_is_not_waited_for(tmp_path: Path) -> None:
    """A held problem is put off; when its holder has kept it for the patience, it is decided without."""
    store = open_layers(tmp_path)
    store.claim(PROBLEMS[0].hash, "another", "elsewhere", 600)
    tune = Script(store)
    before = time.monotonic()
    found = [each for each, _ in shared_out(PROBLEMS[:3], store, tune, 0.5)]
    assert found == tune.tuned == [PROBLEMS[1], PROBLEMS[2], PROBLEMS[0]]
    assert tune.lasts == [False, False, True]
    assert 0.5 <= time.monotonic() - before < 10


def test_problem_that_is_given_back_is_taken_up(tmp_path: Path) -> None:
    """As soon as its holder is gone a problem is this worker's, long before its patience ends."""
    store = open_layers(tmp_path)
    lease = store.claim(PROBLEMS[0].hash, "another", "elsewhere", 600)
    assert lease is not None
    tune = Script(store)
    work = shared_out(PROBLEMS[:2], store, tune, 600)
    assert next(work)[0] == PROBLEMS[1]
    store.release(lease)
    assert [each for each, _ in work] == [PROBLEMS[0]]
    assert tune.lasts == [False, False]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Place()),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, Place(5, 8, 1, 4)),
        (
            {
                "SLURM_PROCID": "5",
                "SLURM_STEP_NUM_TASKS": "8",
                "SLURM_LOCALID": "1",
                "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
            },
            Place(5, 8, 1, 4),
        ),
        (
            {
                "SLURM_PROCID": "5",
                "SLURM_STEP_NUM_TASKS": "6",
                "SLURM_LOCALID": "3",
                "SLURM_STEP_TASKS_PER_NODE": "2,4",
            },
            Place(5, 6, 3, 4),
        ),
        ({"RANK": "8", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}, Place()),
        ({"RANK": "0", "WORLD_SIZE": "8"}, Place()),
    ],
)
def test_place_is_what_the_launcher_says(environment: dict[str, str], expected: Place) -> None:
    """Torchrun's variables, srun's, or a worker that knows of no other."""
    assert Place.of(environment) == expected


def test_workers_of_a_node_have_devices_cores_and_beginnings_of_their_own() -> None:
    """Each of four workers has its GPU, an equal part of the cores that no other has, and begins elsewhere in the list."""
    places = [Place(rank, 4, rank, 4) for rank in range(4)]
    assert [place.device(4) for place in places] == [0, 1, 2, 3]
    assert [place.device(1) for place in places] == [None] * 4
    assert Place().device(4) is None
    cores = [place.cores(range(10, 27)) for place in places]
    assert [len(each) for each in cores] == [4] * 4
    assert len({core for each in cores for core in each}) == 16
    assert Place(1, 4, 1, 4).cores([7, 3]) == [3, 7]
    assert [place.first(PROBLEMS)[0] for place in places] == PROBLEMS
    assert all(set(place.first(PROBLEMS)) == set(PROBLEMS) for place in places)
