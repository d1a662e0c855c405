"""The accuracy rule: every row of every output against an fp64 oracle, measured with an ideal kernel's yardstick.

The *ideal* kernel computes in fp32 and rounds only where any low-precision kernel must. A row may be off by a small
multiple of what the ideal's worst row is off by, relative to the row's own norm, so that one wrong row cannot hide
among thousands of right ones, as it does in a whole-tensor norm. Thresholds are computed once per reference answer;
judging a candidate is then one norm per row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from autotune.errors import AutotuneError
from autotune.spec import Floor, Reference, Rule

# A row's error is taken relative to at least this part of the output's root-mean-square row norm.
FLOOR: Final = 0.1
# On inputs where even the ideal kernel is further off than this as a whole, no verdict means anything. Its worst row
# may be off by WORST_ROW times as much: of thousands of rows a few always cancel, and for narrow outputs (a factor of
# rank 8) the ideal bf16 kernel's worst row alone is off by 1e-2 to 6e-2 on the best-conditioned inputs.
WORST_ROW: Final = 10.0
CEILINGS: Final = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5, torch.float64: 1e-12}
LARGEST: Final = 1e30
# What kernels that sum in fp32 are off by, in whatever order they do, as a part of the same sum over absolute values.
# It counts for rows that cancel so far that this is more than their budget: for 16-bit inputs to a ten-thousandth.
SUMMED: Final = 2.0**-22


class GateFault(AutotuneError):
    """The gate cannot judge: the spec's inputs, oracle or ideal are unusable. Says nothing about a candidate."""


@dataclass(frozen=True)
class Finding:
    """How one output compares: the worst row's ``error`` and its share of the budget (``ratio`` > 1 is wrong).

    ``row`` is that row's index among all rows, ``rows`` how many there are, ``bad`` how many are over their budget.
    """

    error: float
    ratio: float
    budget: float
    row: int
    bad: int
    rows: int


@dataclass(frozen=True)
class Yardstick:
    """The trusted value of one output and how far each of its rows may be from it.

    ``scale`` turns a row's absolute error into the figure that is reported, ``threshold`` bounds the absolute error.
    """

    rule: Rule
    value: torch.Tensor
    scale: torch.Tensor
    threshold: torch.Tensor
    budget: float

    def judge(self, output: torch.Tensor) -> torch.Tensor:
        """Returns [worst error, worst ratio, its row, rows over budget] on the output's device, without a sync."""
        error, ratio = self.errors(output)
        if not ratio.numel():
            return ratio.new_zeros(4)
        worst = ratio.argmax()
        return torch.stack([error[worst], ratio[worst], worst.double(), (ratio > 1).sum().double()])

    def errors(self, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns each row's error and its share of that row's budget, on the output's device, without a sync."""
        off = self._distance(output)
        exact = off == 0
        ratio = torch.where(exact, 0.0, off / self.threshold).nan_to_num(LARGEST, LARGEST)
        error = torch.where(exact, 0.0, off / self.scale).nan_to_num(LARGEST, LARGEST)
        return error, ratio

    def finding(self, judged: list[float]) -> Finding:
        """Turns what ``judge`` returned, read from the device, into a finding."""
        error, ratio, row, bad = judged
        return Finding(min(error, LARGEST), min(ratio, LARGEST), self.budget, int(row), int(bad), self.scale.numel())

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Returns what must not change between two judgements."""
        return (self.value, self.scale, self.threshold)

    def _distance(self, output: torch.Tensor) -> torch.Tensor:
        if self.rule.kind == "rows":
            return row_norms(output.double() - self.value)
        # Equal infinities are no distance apart; subtracting them would give NaN, which counts as infinitely far.
        wide = output.double().reshape(-1)
        return torch.where(wide == self.value, 0.0, (wide - self.value).abs()).nan_to_num(float("inf"), float("inf"))


def yardstick(
    name: str, rule: Rule, reference: Reference, ideal: torch.Tensor, floor_dtype: torch.dtype | Floor
) -> Yardstick:
    """Builds the yardstick of output ``name`` from the oracle's ``reference`` and the ``ideal`` kernel's output.

    Raises GateFault when the oracle is not finite (-inf is allowed in a ``log`` output) or the ideal is too far off.
    """
    if tuple(reference.value.shape) != tuple(ideal.shape):
        raise GateFault(f"{name}: oracle has shape {tuple(reference.value.shape)}, ideal {tuple(ideal.shape)}")
    build = _rows if rule.kind == "rows" else _log
    floor = floor_dtype
    if isinstance(floor, torch.dtype):
        floor = Floor(roundoff(floor), CEILINGS[floor], roundoff(floor) / 8)
    result, whole, worst = build(rule, reference, ideal.double(), floor)
    ceiling = max(floor.ceiling, CEILINGS.get(ideal.dtype, 0.0))
    for what, error, limit in (("as a whole", whole, ceiling), ("in its worst row", worst, WORST_ROW * ceiling)):
        if not error <= limit:
            raise GateFault(
                f"{name}: even the ideal kernel is off by {error:.3g} {what} (at most {limit:g} can be judged)"
            )
    return result


def roundoff(dtype: torch.dtype) -> float:
    """Returns the unit roundoff u of ``dtype``: half the distance from 1 to the next larger number."""
    return torch.finfo(dtype).eps / 2


def row_norms(values: torch.Tensor) -> torch.Tensor:
    """Returns the 2-norm of each last-dim row as one flat tensor."""
    norms: torch.Tensor = torch.linalg.vector_norm(values, dim=-1)
    return norms.reshape(-1)


def _rows(rule: Rule, reference: Reference, ideal: torch.Tensor, floor: Floor) -> tuple[Yardstick, float, float]:
    """Returns the yardstick and the ideal's relative error: of the whole output, and of its worst row."""
    value, unit = reference.value.double(), floor.roundoff
    if not bool(torch.isfinite(value).all()):
        raise GateFault("the oracle's answer is not finite")
    norms = row_norms(value)
    scale = torch.maximum(norms, FLOOR * norms.square().mean().sqrt()) if norms.numel() else norms
    absolute = torch.zeros_like(norms)
    cancels = norms < 0
    if reference.magnitude is not None:
        absolute = row_norms(reference.magnitude.double())
        cancels = norms <= unit * absolute
    off = row_norms(ideal - value)
    relative = torch.where((off == 0) | cancels, 0.0, off / scale).nan_to_num(float("inf"), float("inf"))
    ideal_error = float(relative.max()) if relative.numel() else 0.0
    size = float(torch.linalg.vector_norm(torch.where(cancels, 0.0, norms)))
    distance = float(torch.linalg.vector_norm(torch.where(cancels, 0.0, off)))
    whole = distance / size if size else distance
    budget = rule.factor * ideal_error + unit
    summed = min(SUMMED, 4 * unit) * absolute  # the latter for what sums in fp64
    threshold = torch.maximum(budget * scale, torch.where(cancels, unit * absolute, summed))
    if reference.magnitude is not None:  # nothing was added up, so nothing but zero is right
        threshold = torch.where(absolute == 0, 0.0, threshold)
    return Yardstick(rule, value, scale, threshold, budget), whole, ideal_error


def _log(rule: Rule, reference: Reference, ideal: torch.Tensor, floor: Floor) -> tuple[Yardstick, float, float]:
    value, ideal = reference.value.double().reshape(-1), ideal.reshape(-1)
    if bool((value.isnan() | (value == float("inf"))).any()):
        raise GateFault("the oracle's answer is NaN or +inf")
    off = torch.where(ideal == value, 0.0, (ideal - value).abs()).nan_to_num(float("inf"), float("inf"))
    ideal_error = float(off.max()) if off.numel() else 0.0
    ulps = floor.log_ulps * torch.finfo(torch.float32).eps * value.abs()
    threshold = torch.clamp(rule.factor * ideal_error + ulps, min=floor.nats)
    threshold = torch.where(value.isinf(), 0.0, threshold)
    return Yardstick(rule, value, torch.ones_like(value), threshold, floor.nats), ideal_error, ideal_error
