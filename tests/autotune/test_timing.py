"""Interleaved timing, on launches of known length."""

from __future__ import annotations

import time

import pytest
import torch

from autotune.timing import LAGGARD, interleaved, summary

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
    samples = interleaved(launches, 3, CPU)
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
    assert interleaved({}, 3, CPU) == {}


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
