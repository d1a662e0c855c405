"""Interleaved timing, on launches of known length."""

from __future__ import annotations

import time

import pytest
import torch

from autotune.timing import LAGGARD, Record, interleaved, summary

CPU = torch.device("cpu")


def test_candidates_take_turns_and_a_laggard_is_timed_once() -> None:
    """Each round runs every candidate still in the race, so a drift of clocks meets all of them."""
    order: list[str] = []

    def launch(name: str, seconds: float) -> None:
        order.append(name)
        time.sleep(seconds)

    launches = {
        "quick": lambda: launch("quick", 0.02),
        "near": lambda: launch("near", 0.025),
        "slow": lambda: launch("slow", 0.02 * LAGGARD * 2),
    }
    samples = interleaved(launches, 3, CPU).samples
    assert order == ["quick", "near", "slow", "quick", "near", "quick", "near"]
    assert [len(samples[name]) for name in launches] == [3, 3, 1]
    assert all(20 <= value < 60 for value in samples["quick"])


def test_every_round_is_noticed_before_it_starts() -> None:
    """The watchdog hears of each round, so its limit is for one."""
    events: list[str] = []
    interleaved({"only": lambda: events.append("run")}, 2, CPU, lambda: events.append("round"))
    assert events == ["round", "run", "round", "run"]


def test_nothing_to_time_gives_nothing() -> None:
    """An empty list of candidates is no error."""
    assert interleaved({}, 3, CPU).figures() == {}


def test_rounds_with_the_clock_down_are_dropped() -> None:
    """One slow clock of four spoils no median; how many were dropped is told, and the clock of the others."""
    record = Record({"one": [1.0, 9.0, 1.2, 1.1], "other": [2.0, 18.0, 2.4, 2.2]}, [1980, 990, 1975, 1980])
    figures = record.figures()
    assert figures["one"] == pytest.approx(
        {"ms": 1.1, "p20": 1.04, "p80": 1.16, "samples": 3, "paired": 1, "sm_mhz": 1980, "throttled": 1}
    )
    assert (figures["other"]["ms"], figures["other"]["paired"]) == (2.2, 2)


def test_clocks_that_are_down_all_the_time_are_the_clocks() -> None:
    """Under a power cap the rounds differ by little, and all of them count."""
    figures = Record({"one": [1.0, 1.1, 1.2]}, [1500, 1490, 1510]).figures()
    assert (figures["one"]["samples"], figures["one"]["throttled"], figures["one"]["sm_mhz"]) == (3, 0, 1500)


def test_candidates_are_compared_within_rounds() -> None:
    """A drift that meets both hides nothing: the ratio of each round decides, not the medians alone."""
    drift = [1.0, 1.5, 2.0, 2.5, 3.0]
    record = Record({"fast": drift, "slow": [1.01 * each for each in drift], "laggard": [4.0]})
    figures = record.figures()
    assert figures["fast"]["paired"] == 1
    assert figures["slow"]["paired"] == pytest.approx(1.01)
    assert figures["laggard"]["paired"] == 4


def test_a_laggard_of_a_dropped_round_keeps_its_sample() -> None:
    """What was timed once, with the clock down, is compared with the best of that very round."""
    figures = Record({"fast": [2.0, 1.0, 1.0], "laggard": [8.0]}, [900, 1980, 1980]).figures()
    assert (figures["laggard"]["ms"], figures["laggard"]["paired"]) == (8.0, 4)
    assert figures["fast"]["samples"] == 2


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([5.0, 1.0, 2.0, 3.0, 4.0], {"ms": 3.0, "p20": 1.8, "p80": 4.2, "samples": 5}),
        ([7.0], {"ms": 7.0, "p20": 7.0, "p80": 7.0, "samples": 1}),
    ],
)
def test_a_summary_holds_median_and_quantiles(samples: list[float], expected: dict[str, float]) -> None:
    """The figures of a candidate are its median and the 20 % and 80 % quantiles."""
    assert summary(samples) == pytest.approx(expected)
