"""The report and the picks, small and in the interpreter: what a GPU will be measured with works."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

import pytest

from autotune.device import describe
from autotune.sandbox import Outcome
from cache_db.models import Verdict
from flashbias.kernels.problem import problem
from tests.zoo import picks, report
from tests.zoo.survey import SHAPES, Case, Survey, quantile, survey
from tests.zoo.zoo_spec import bearer, planted, slow

DEVICE = describe(-1)


def test_the_report_shows_the_zoo_and_tells_good_candidates_from_bad(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fault's verdict, what one good candidate cost, and a planted one that is rejected rightly."""
    file = tmp_path / "report.json"
    assert report.main(["--good", "1", "--faults", "zeroed_row", "--json", str(file)]) == 0
    printed, data = capsys.readouterr().out, json.loads(file.read_text(encoding="utf-8"))
    assert "| forward | one row of O is zero | `wrong` |" in printed
    assert "1 of 1 faults ended as their own verdict." in printed
    assert "0 of 1 good candidates were rejected (1 were asked for)" in printed
    assert [(each["fault"], each["verdict"]) for each in data["zoo"]] == [("zeroed_row", "wrong")]
    bad, good = data["candidates"]
    assert (bad["config"]["params"]["fault"], bad["level2"], bad["rejected_wrongly"]) == ("scaled_lse", "wrong", False)
    assert (good["config"], good["level1"], good["level2"]) == (slow(DEVICE).model_dump(), "safe", "safe")
    assert min(good["level1_seconds"], good["level2_seconds"]) > 0


def test_nothing_is_looked_at_after_the_deadline() -> None:
    """The report ends by itself: with no time left it starts no candidate."""
    found = survey(DEVICE, 500, time.monotonic())
    assert (found.cases, found.given_up) == ([], {})
    assert not list(report.look(DEVICE, ["zeroed_row"], time.monotonic()))


def test_a_false_rejection_is_counted_and_named() -> None:
    """A candidate that only the first screen refused counts as good and as falsely rejected."""
    safe, racy = Outcome(Verdict.SAFE, 2, seconds=0.5), Outcome(Verdict.RACY, reason="1 of 300 repeats differ")
    cases = [
        Case("one", "forward", slow(DEVICE), safe, safe, first=True),
        Case("one", "forward", bearer("", DEVICE), safe, racy, first=False, rejected_wrongly=True),
        Case("one", "forward", planted(slow(DEVICE), "rare_race"), safe, racy, first=False),
    ]
    printed = report.rejection_table(Survey(cases), 500)
    assert "| one | 3 | 2 | 2 | 1 |" in printed
    assert "1 of 2 good candidates were rejected" in printed
    assert printed.count("* falsely rejected: ") == printed.count("* rejected: ") == 1


def test_a_fault_with_another_verdict_is_named() -> None:
    """Who reads the report sees which fault got away, and how."""
    sightings = [report.Sighting("rare_race", Verdict.SAFE, "", 1.0), report.Sighting("zeroed_row", None, "why", 2.0)]
    printed = report.zoo_table(sightings, ["rare_race", "zeroed_row", "wrong_lse"])
    assert "0 of 3 faults ended as their own verdict." in printed
    assert "* rare_race: expected racy, got safe: " in printed
    assert "* zeroed_row: expected wrong, got None: why" in printed


def test_quantiles_are_values_that_were_measured() -> None:
    """Half, nine tenths and all of the candidates took no longer."""
    values = [float(each) for each in range(10, 0, -1)]
    assert [quantile(values, part) for part in (0.5, 0.9, 1.0)] == [5.0, 9.0, 10.0]
    assert quantile([], 0.5) == 0.0


@pytest.mark.parametrize("name", SHAPES)
def test_surveyed_shapes_are_problems_of_their_own(name: str) -> None:
    """Every shape that the report measures on a GPU is one that the operator can have."""
    found = {problem(shape, DEVICE) for shape in SHAPES.values()}
    assert len(found) == len(SHAPES)
    assert problem(SHAPES[name], DEVICE) in found


def test_two_sweeps_from_fresh_databases_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every sweep is counted once, and every distinct pick is timed; the exit code says whether they differ by much."""
    file = tmp_path / "picks.json"
    flags = {
        "sweeps": 2,
        "rounds": 3,
        "nheads": 2,
        "seqlen-q": 100,
        "headdim": 16,
        "rank": 0,
        "grads": "none",
        "json": file,
    }
    code = picks.main([text for name, value in flags.items() for text in (f"--{name}", str(value))])
    ((kernel, found),) = json.loads(file.read_text(encoding="utf-8"))[0]["kernels"].items()
    assert kernel == "forward"
    assert sum(pick["sweeps"] for pick in found["picks"]) == 2
    assert all(pick["ms"] > 0 and pick["samples"] >= 1 for pick in found["picks"])
    assert code == (found["spread_per_cent"] > picks.GOAL_PER_CENT)
    assert f"forward: spread {found['spread_per_cent']:.2f} %" in capsys.readouterr().out


def test_the_spread_is_that_of_the_slowest_pick_and_unknown_where_one_failed() -> None:
    """A pick that cannot be timed again is no pick like the others."""
    configs = [bearer("", DEVICE), slow(DEVICE)]
    figures = {config: {"ms": ms} for config, ms in zip(configs, (2.0, 2.1), strict=True)}
    assert picks.Spread("forward", Counter(configs), figures).per_cent == pytest.approx(5.0)
    assert picks.Spread("forward", Counter(configs), {configs[0]: {"ms": 2.0}}).per_cent == float("inf")
