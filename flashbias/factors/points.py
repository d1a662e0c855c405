"""Factors of biases between points in space (FlashBias, arXiv 2505.12044: the exact decomposition)."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor

from flashbias.errors import ArgumentError
from flashbias.factors import checks

_LAYOUT = "(S, d), (B or 1, S, d) or (B or 1, S, H or 1, d)"


def squared_distance(x: Tensor, y: Tensor, *, weight: float | Tensor = -1.0) -> tuple[Tensor, Tensor]:
    """Returns weight · ‖x_i − y_j‖² as factors of rank d + 2, exactly: ‖x‖² · 1 + 1 · ‖y‖² − 2 x·y.

    Far from the origin those three terms are large and nearly cancel, so points are measured from the
    midpoint of the means of x and y first (in each batch and head that both have, else over all): distances do not
    change. What is left is rounding: with r the largest distance of a point from that midpoint, fp32 factors give the bias to within
    (d + 8) · 2⁻²² · abs(weight) · r². Distances far below r lose digits accordingly, as in any such product.

    Args:
        x: the queries' points, (Sq, d), (B or 1, Sq, d) or (B or 1, Sq, H or 1, d), of any float dtype.
        y: the keys' points, likewise with Sk, on the same device.
        weight: a number or a tensor () or (H,), one for each head; negative to prefer what is near.

    Returns:
        q_bias (B or 1, Sq, H or 1, d + 2), which holds the weight, and k_bias (B or 1, Sk, H or 1, d + 2), in fp64
        if x or y is, else fp32. Differentiable with respect to x, y and weight.

    Raises:
        ArgumentError: points or weight have a wrong type, shape or device.

    """
    x, y = _points("x", x), _points("y", y)
    if x.shape[3] != y.shape[3]:
        got = f"{x.shape[3]} in x, {y.shape[3]} in y"
        raise ArgumentError.explain("x and y", expected="points of the same dimension (last dim)", got=got)
    checks.same_device("y", y, "x", x)
    for dim, meaning in ((0, "batches"), (2, "heads")):
        if x.shape[dim] != y.shape[dim] and 1 not in {x.shape[dim], y.shape[dim]}:
            got = f"{x.shape[dim]} and {y.shape[dim]}"
            raise ArgumentError.explain("x and y", expected=f"the same number of {meaning}, or 1", got=got)
    dtype = checks.working_dtype(x, y)
    x, y = x.to(dtype), y.to(dtype)
    centre = _centre(x.detach(), y.detach())
    x, y = x - centre, y - centre
    squares_x, squares_y = x.square().sum(-1, keepdim=True), y.square().sum(-1, keepdim=True)
    q_bias = torch.cat([squares_x, torch.ones_like(squares_x), -2.0 * x], -1) * _weight(weight, x, y)
    return q_bias, torch.cat([torch.ones_like(squares_y), squares_y, y], -1)


def _points(name: str, points: object) -> Tensor:
    """Returns valid points as (B or 1, S, H or 1, d)."""
    points = checks.floats(name, points, _LAYOUT, (2, 3, 4))
    if points.dim() == 2:
        return points[None, :, None]
    return points[:, :, None] if points.dim() == 3 else points


def _centre(x: Tensor, y: Tensor) -> Tensor:
    """Returns the midpoint of the means of x and y, one for each batch and head where both x and y have them.

    It is a constant to autograd: the bias does not depend on it.
    """
    dims = [1, *(dim for dim in (0, 2) if x.shape[dim] != y.shape[dim])]
    return (x.mean(dims, keepdim=True) + y.mean(dims, keepdim=True)) / 2


def _weight(weight: object, x: Tensor, y: Tensor) -> Tensor | float:
    """Returns the weight as a factor of (B, S, H, R): a number, or a tensor () or (H, 1)."""
    if isinstance(weight, bool) or not isinstance(weight, Real | Tensor):
        raise ArgumentError.explain("weight", expected="a number or a tensor", got=type(weight).__name__)
    if not isinstance(weight, Tensor):
        return float(weight)
    weight = checks.floats("weight", weight, "() or (H,)", (0, 1))
    checks.same_device("weight", weight, "x", x)
    heads = max(x.shape[2], y.shape[2])
    if weight.dim() == 1 and 1 not in {heads, len(weight)} and len(weight) != heads:
        raise ArgumentError.explain("weight", expected=f"{heads} heads as the points", got=str(len(weight)))
    return weight.to(x.dtype)[..., None] if weight.dim() else weight.to(x.dtype)
