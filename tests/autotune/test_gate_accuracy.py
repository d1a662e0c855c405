"""The accuracy rule on plain bf16 tensors: what must pass, what must not, and what cannot be judged."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from autotune.gate import GateFault, Yardstick, yardstick
from autotune.gate.accuracy import Finding, roundoff
from autotune.spec import Reference, Rule

HEADS, ROWS, KEYS, WIDTH = 3, 70, 90, 16
TILE = slice(32, 64)


@dataclass(frozen=True)
class Attention:
    """A small bf16 attention with ALiBi: fp64 answers, the ideal kernel's, and magnitudes."""

    out: torch.Tensor
    lse: torch.Tensor
    magnitude: torch.Tensor
    ideal_out: torch.Tensor
    ideal_lse: torch.Tensor

    @property
    def out_rule(self) -> Yardstick:
        """The yardstick of O."""
        return yardstick("out", Rule("rows"), Reference(self.out, self.magnitude), self.ideal_out, torch.bfloat16)

    @property
    def lse_rule(self) -> Yardstick:
        """The yardstick of LSE."""
        return yardstick("lse", Rule("log"), Reference(self.lse), self.ideal_lse, torch.bfloat16)


@pytest.fixture(scope="module")
def attention() -> Attention:
    """An attention whose last row of head 0 sees no key."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(HEADS, length, WIDTH, generator=generator).bfloat16() for length in (ROWS, KEYS, KEYS))
    distance = (torch.arange(ROWS)[:, None] - torch.arange(KEYS)[None, :]).abs()
    bias = -distance * torch.tensor([0.5, 0.1, 0.02])[:, None, None]
    bias[0, -1] = -math.inf

    def scores(dtype: torch.dtype) -> torch.Tensor:
        return q.to(dtype) @ k.to(dtype).transpose(1, 2) / math.sqrt(WIDTH) + bias.to(dtype)

    p = scores(torch.float64).softmax(-1).nan_to_num(0.0)
    rounded = scores(torch.float32).softmax(-1).nan_to_num(0.0).bfloat16()
    return Attention(
        out=p @ v.double(),
        lse=scores(torch.float64).logsumexp(-1),
        magnitude=p @ v.double().abs(),
        ideal_out=(rounded.float() @ v.float()).bfloat16(),
        ideal_lse=scores(torch.float32).logsumexp(-1),
    )


def judged(rule: Yardstick, output: torch.Tensor) -> Finding:
    """Returns the finding on ``output``."""
    return rule.finding(rule.judge(output).tolist())


def test_the_ideal_kernel_passes_with_half_its_budget(attention: Attention) -> None:
    """The yardstick accepts the kernel it was made from."""
    out, lse = judged(attention.out_rule, attention.ideal_out), judged(attention.lse_rule, attention.ideal_lse)
    assert (out.bad, lse.bad) == (0, 0)
    assert out.ratio < 0.6
    assert out.rows == HEADS * ROWS


def test_one_zeroed_row_is_found_where_a_tensor_norm_sees_nothing(attention: Attention) -> None:
    """A single row of zeros is wrong, and the finding names it."""
    faulty = attention.ideal_out.clone()
    faulty[1, 17] = 0
    finding = judged(attention.out_rule, faulty)
    assert (finding.row, finding.bad) == (ROWS + 17, 1)
    assert finding.ratio > 10
    assert float((faulty.double() - attention.out).norm() / attention.out.norm()) < 0.15


def test_a_tile_of_another_head_is_found(attention: Attention) -> None:
    """Rows that are right, but of another head, are all wrong."""
    faulty = attention.ideal_out.clone()
    faulty[2, TILE] = attention.ideal_out[1, TILE]
    assert judged(attention.out_rule, faulty).bad == TILE.stop - TILE.start


@pytest.mark.parametrize("factor", [0.97, 1.03])
def test_an_lse_three_percent_off_is_found(attention: Attention, factor: float) -> None:
    """An LSE scaled by 3 % is wrong, O being right."""
    finding = judged(attention.lse_rule, attention.ideal_lse * factor)
    assert finding.bad > HEADS * ROWS // 2
    assert finding.ratio > 10


def test_an_lse_of_one_row_off_by_a_thousandth_nat_is_found(attention: Attention) -> None:
    """LSE is judged in nats for each row, not relative to its size."""
    faulty = attention.ideal_lse.clone()
    faulty[1, 5] += 1e-3
    assert judged(attention.lse_rule, faulty).bad == 1


@pytest.mark.parametrize("value", [0.0, -1e30, math.inf, math.nan])
def test_a_dead_row_must_have_an_lse_of_minus_infinity(attention: Attention, value: float) -> None:
    """Nothing but -inf is right where the oracle says -inf, and NaN never compares as right."""
    faulty = attention.ideal_lse.clone()
    faulty[0, -1] = value
    assert judged(attention.lse_rule, faulty).row == ROWS - 1


def test_a_dead_row_must_be_exactly_zero(attention: Attention) -> None:
    """A row with no key in it may not hold even a tiny number."""
    faulty = attention.ideal_out.clone()
    faulty[0, -1, 3] = 1e-30
    finding = judged(attention.out_rule, faulty)
    assert (finding.row, finding.bad) == (ROWS - 1, 1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_element_that_is_not_finite_is_wrong_and_its_figures_are_finite(attention: Attention, value: float) -> None:
    """NaN and infinity are wrong, and what is reported of them can be stored as JSON."""
    faulty = attention.ideal_out.clone()
    faulty[2, 0, 0] = value
    finding = judged(attention.out_rule, faulty)
    assert finding.bad == 1
    assert math.isfinite(finding.error)
    assert math.isfinite(finding.ratio)


def test_rows_that_cancel_are_judged_against_what_cancelled() -> None:
    """A row that sums to nothing may carry the rounding of its terms, but no more than that."""
    value = torch.ones(4, 8, dtype=torch.float64)
    magnitude = value.clone()
    value[2], magnitude[2] = 0.0, 100.0
    rule = yardstick("dq", Rule("rows"), Reference(value, magnitude), value.bfloat16(), torch.bfloat16)
    rounding, excess = value.clone(), value.clone()
    rounding[2] = 0.9 * roundoff(torch.bfloat16) * 100
    excess[2] = 1.5 * roundoff(torch.bfloat16) * 100
    assert judged(rule, rounding).bad == 0
    assert judged(rule, excess).bad == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_that_cancel_in_part_may_be_made_in_another_order(dtype: torch.dtype) -> None:
    """A row of one number, a sum of 64 products, is off by what its terms are rounded by, however small it is itself."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for _ in range(300):
        a, b = (torch.randn(4, 1, 64, generator=generator, dtype=torch.float64).to(dtype).double() for _ in range(2))
        terms = a * b
        exact = torch.tensor([[math.fsum(row[0])] for row in terms.tolist()], dtype=torch.float64)
        narrow = (a.to(dtype) * b.to(dtype))[:, 0]
        in_order = torch.stack(narrow.unbind(1)).cumsum(0)[-1][:, None]
        reference = Reference(exact, terms.abs().sum(-1))
        rule = yardstick("delta", Rule("rows", 3.0), reference, narrow.sum(-1, keepdim=True), dtype)
        assert judged(rule, in_order).ratio <= 1
        worst = max(worst, float(((in_order - exact).abs() / (rule.budget * rule.scale[:, None])).max()))
        wrong = exact.clone()
        wrong[2] += 2 * rule.threshold[2]
        assert judged(rule, wrong).bad == 1
    assert worst > 1  # without regard to the terms some of these would be called wrong


def test_inputs_on_which_the_ideal_kernel_is_far_off_are_a_fault_of_the_gate(attention: Attention) -> None:
    """Nothing is judged with a yardstick that is itself wrong."""
    with pytest.raises(GateFault, match="even the ideal kernel is off"):
        yardstick("out", Rule("rows"), Reference(attention.out), attention.ideal_out * 1.05, torch.bfloat16)


@pytest.mark.parametrize("kind", ["rows", "log"])
def test_an_oracle_that_is_not_a_number_is_a_fault_of_the_gate(kind: str) -> None:
    """An oracle's NaN condemns nobody."""
    value = torch.tensor([[1.0, math.nan]])
    with pytest.raises(GateFault, match="oracle"):
        yardstick("out", Rule(kind), Reference(value), value, torch.float32)  # type: ignore[arg-type]


def test_an_oracle_of_another_shape_than_the_ideal_is_a_fault_of_the_gate() -> None:
    """Broadcasting never hides a mismatch."""
    with pytest.raises(GateFault, match="shape"):
        yardstick("out", Rule("rows"), Reference(torch.ones(2, 3)), torch.ones(1, 3), torch.float32)


def test_an_output_without_rows_is_right(attention: Attention) -> None:
    """An empty output cannot be wrong."""
    empty = torch.ones(0, 8)
    assert judged(yardstick("out", Rule("rows"), Reference(empty), empty, torch.float32), empty).bad == 0
