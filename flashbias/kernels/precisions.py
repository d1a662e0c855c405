"""What each precision of fp32 inputs means to the gate: how the ideal kernel rounds, and what no kernel does better."""

from __future__ import annotations

from typing import Final, Literal, cast

import torch

from autotune.spec import Floor
from flashbias.rounding import Rounding

# "ieee": the GPU's exp2 is right to 2^-22.5, and sums of products to a few units of 2^-24.
# "tf32x3": operands of 22 bits and three products of four leave up to 3 units of 2^-22; see also _CUT_PER_STEP.
# "tf32": operands of 11 bits, of which Hopper's tensor core cuts off what it reads from shared memory, unrounded.
_ROUNDOFF: Final = {"ieee": 2.0**-22, "tf32x3": 3 * 2.0**-22, "tf32": 2.0**-10}
# Scores of 200 are summed with errors of 3e-5 in any fp32 arithmetic, and so are the probabilities that come of them.
_CEILING: Final = {"ieee": 1e-4, "tf32x3": 1e-4, "tf32": 5e-3}
# LSE moves with the scores of its row, which are of size 0.5 to 3 in the gate, and these by the roundoff of both operands.
# 16-bit inputs are exact, and held to an eighth of their roundoff.
_NATS_PER_ROUNDOFF: Final = 2.0
# The tensor core cuts sums off too: 8.3 fp32 ulp of the largest score after four steps of 16 (H200, head dim 64). tf32
# has steps of 8.
_ULPS_PER_STEP: Final = 2.0
_STEP: Final = 8
# What that is of a row: each of tf32x3's three products cuts its sum off at every step, by 2^-24 of it on average. With
# 2^-20 in all, one row in 5,600 of a dQ was 1.06 times over its budget (H200, head dim 64).
_CUT_PER_STEP: Final = 3 * 2.0**-24


def floor_of(dtype: str, precision: str, head_dim: int) -> torch.dtype | Floor:
    """Returns what the budgets of a problem start from: a 16-bit dtype, or the floor of fp32 inputs' precision."""
    if precision == "default":
        return cast(torch.dtype, getattr(torch, dtype))
    unit = _ROUNDOFF[precision]
    steps = 0 if precision == "ieee" else -(-head_dim // _STEP)
    cut = steps * _CUT_PER_STEP if precision == "tf32x3" else 0.0
    return Floor(unit + cut, _CEILING[precision], _NATS_PER_ROUNDOFF * unit, 4.0 + _ULPS_PER_STEP * steps)


def rounding_of(dtype: str, precision: str) -> Rounding:
    """Returns how the ideal kernel for inputs of ``dtype`` rounds the operands of its products."""
    if precision == "default":
        return cast(torch.dtype, getattr(torch, dtype))
    return None if precision == "ieee" else cast(Literal["tf32", "tf32x3"], precision)
