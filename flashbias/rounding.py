"""Matrix products of rounded operands, as kernels of each precision multiply them: what the gate's ideal is made of.

tf32 has fp32's range and 11 significant bits. Two such numbers hold 22 of fp32's 24 bits, and of the four products of
two such sums "tf32x3" leaves out the smallest, below 2^-22 of the whole.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

# A dtype, the arithmetic of tensor cores on fp32 operands, or None: nothing is rounded.
Rounding = torch.dtype | Literal["tf32", "tf32x3"] | None

_TF32_HALF = 0x1000
_TF32_MASK = -0x2000


def tf32(tensor: Tensor) -> Tensor:
    """Returns fp32 ``tensor`` rounded to the nearest tf32 numbers, ties away from zero."""
    return ((tensor.contiguous().view(torch.int32) + _TF32_HALF) & _TF32_MASK).view(torch.float32)


def rounded(tensor: Tensor, rounding: Rounding) -> Tensor:
    """Returns ``tensor`` as a product's operand under ``rounding`` holds it, kept in its own dtype."""
    if rounding is None:
        return tensor
    if isinstance(rounding, torch.dtype):
        return tensor.to(rounding).to(tensor.dtype)
    high = tf32(tensor)
    return high if rounding == "tf32" else high + tf32(tensor - high)


def product(a: Tensor, b: Tensor, rounding: Rounding) -> Tensor:
    """Returns a @ b of operands rounded as ``rounding`` says."""
    if rounding != "tf32x3":
        return rounded(a, rounding) @ rounded(b, rounding)
    a_high, b_high = tf32(a), tf32(b)
    small = tf32(a - a_high) @ b_high + a_high @ tf32(b - b_high)
    return a_high @ b_high + small
