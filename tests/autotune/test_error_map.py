"""The error map names exactly the rows that are wrong."""

from __future__ import annotations

import pytest
import torch

from autotune.detail import OutputDetail
from autotune.device import describe
from autotune.gate.accuracy import Yardstick, yardstick
from autotune.gate.error_map import RANGES
from autotune.gate.error_map import describe as describe_errors
from autotune.sandbox import Sandbox
from autotune.spec import Reference, Rule
from cache_db.models import Verdict
from tests.autotune.planted_spec import planted_problem
from tests.autotune.softmax_spec import softmax_config

AXES = ("batch", "row", "head")

UNJUDGEABLE_LATER = 0  # with these inputs the ideal itself is too far off in case "large"


def detail(wrong: torch.Tensor, axes: tuple[str, ...] | None = AXES, kind: str = "rows") -> OutputDetail:
    """Returns what is told of an output whose rows are off by ``wrong`` (same shape as the rows)."""
    value = torch.ones(*wrong.shape, 4) if kind == "rows" else torch.ones(*wrong.shape)
    rule = Rule("rows") if kind == "rows" else Rule("log")
    measure: Yardstick = yardstick("o", rule, Reference(value.double()), value, torch.float32)
    output = value + (wrong[..., None] if kind == "rows" else wrong)
    finding = measure.finding(measure.judge(output).tolist())
    return describe_errors("o", "ragged", output, measure, finding, axes)


@pytest.mark.parametrize("kind", ["rows", "log"])
def test_map_counts_by_batch_and_head_and_gives_ranges_of_rows(kind: str) -> None:
    """Rows of one (batch, head) are gathered, the others are not mentioned, the worst come first with their indices."""
    wrong = torch.zeros(2, 20, 3)
    wrong[1, 3:8, 2] = 0.5
    wrong[1, 12, 2] = 3.0
    wrong[0, 0, 1] = 0.25
    found = detail(wrong, kind=kind)
    assert (found.shape, found.rows, found.bad, found.along) == ((2, 20, 3), 120, 7, "row")
    assert [(group.at, group.bad, group.rows, group.ranges) for group in found.groups] == [
        ({"batch": 0, "head": 1}, 1, 20, ((0, 0),)),
        ({"batch": 1, "head": 2}, 6, 20, ((3, 7), (12, 12))),
    ]
    assert found.row == found.worst[0].index == (1, 12, 2)
    assert [row.index for row in found.worst[1:]] == [*((1, row, 2) for row in range(3, 8)), (0, 0, 1)]
    assert found.worst[0].error == pytest.approx(3.0)
    assert found.worst[0].ratio == pytest.approx(found.ratio)


def test_unnamed_axes_are_numbered_and_ranges_follow_the_longest() -> None:
    """A spec that names nothing gets a map all the same."""
    wrong = torch.zeros(5, 2)
    wrong[4, 1] = 1.0
    found = detail(wrong, None)
    assert (found.axes, found.along) == (("dim 0", "dim 1"), "dim 0")
    assert [(group.at, group.ranges) for group in found.groups] == [({"dim 1": 1}, ((4, 4),))]


def test_map_of_an_output_that_is_wrong_throughout_stays_short() -> None:
    """Ten worst rows and a bounded number of ranges, with the number of those left out; NaN counts as wrong."""
    wrong = torch.zeros(1, 200, 1)
    wrong[:, ::2] = torch.nan
    found = detail(wrong)
    assert (found.bad, len(found.worst)) == (100, 10)
    (group,) = found.groups
    assert (group.bad, len(group.ranges), group.hidden) == (100, RANGES, 100 - RANGES)


def test_right_output_has_figures_and_no_map() -> None:
    """Where nothing is wrong, nothing is listed."""
    found = detail(torch.zeros(1, 7, 2))
    assert (found.bad, found.ratio, found.groups, found.worst) == (0, 0.0, (), ())


def test_gate_tells_details_of_every_output_and_case_when_asked_and_only_then() -> None:
    """A wrong config is judged on all cases, its map names the planted row; without being asked nothing is told."""
    wrong = softmax_config(32, "zeroed_row")
    with Sandbox(planted_problem(), describe(-1)) as sandbox:
        asked = sandbox.prove("forward", wrong, {}, 2, 3, detail=True)
        plain = sandbox.prove("forward", wrong, {}, 2, 3)
        partly = sandbox.prove("forward", wrong, {}, 2, UNJUDGEABLE_LATER, detail=True)
    assert (asked.verdict, asked.reason) == (plain.verdict, plain.reason) == (Verdict.WRONG, plain.reason)
    assert plain.details == ()
    assert partly.verdict is Verdict.WRONG, "a later case that proves nothing does not take the verdict back"
    assert {each.case for each in partly.details} == {"ragged", "dead row"}
    cases = ("ragged", "large", "dead row")
    assert [(each.case, each.output) for each in asked.details] == [
        (case, name) for case in cases for name in ("y", "lse")
    ]
    bad = {(each.case, each.output): each for each in asked.details if each.bad}
    assert set(bad) == {(case, "y") for case in cases}
    assert {each.row for each in bad.values()} == {(3,)}
    assert {each.groups[0].ranges for each in bad.values()} == {((3, 3),)}
