"""Factors of a dense bias by singular value decomposition, and how far factors are from a dense bias."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from flashbias.errors import ArgumentError
from flashbias.factors import checks

_LAYOUT = "(Sq, Sk), (H, Sq, Sk) or (B, H, Sq, Sk)"


class Approximation(NamedTuple):
    """How far factors are from a dense bias: fp64, one figure for each head, the worst of its batches."""

    energy: Tensor
    """(H,) the share of the bias's sum of squares that is kept, 1 − relative_error²; 1 is all of it."""
    relative_error: Tensor
    """(H,) the norm of the difference over that of the bias (Frobenius); 0 where both are 0."""
    max_error: Tensor
    """(H,) the largest absolute difference, in the bias's own units: nats of a score."""


def from_dense(bias: Tensor, *, rank: int | None = None, energy: float | None = None) -> tuple[Tensor, Tensor]:
    """Returns the best factors of a given rank, or the fewest columns that keep a given share of the bias.

    A truncated singular value decomposition of each head, in fp64: no factors of that rank have a smaller sum of
    squared errors (Eckart and Young, Psychometrika 1, 1936). Singular values are split evenly between both sides.
    All heads get the same rank: with ``energy`` that of the most demanding one, which gains the others accuracy.
    ``approximation`` gives the errors. Meant to be done once: the time grows with Sq · Sk · min(Sq, Sk).

    Gradients reach ``bias`` through k_bias, the directions of q_bias held fixed: the gradient of the projection
    onto them, which is exact where the rank is full. None passes through the decomposition itself.

    Args:
        bias: (Sq, Sk), (H, Sq, Sk) or (B, H, Sq, Sk), any float dtype, finite.
        rank: number of columns R; what exceeds min(Sq, Sk) or the bias's own rank is filled with zeros.
        energy: share of each head's sum of squares to keep, in (0, 1]; 1 keeps all to within rounding.

    Returns:
        q_bias (B or 1, Sq, H or 1, R) and k_bias (B or 1, Sk, H or 1, R), in fp64 if the bias is, else fp32.

    Raises:
        ArgumentError: not exactly one of ``rank`` and ``energy`` is given, or one has a wrong type, shape or value.

    """
    bias = _heads(bias)
    if (rank is None) == (energy is None):
        got = "none" if rank is None else "both"
        raise ArgumentError.explain("rank and energy", expected="exactly one of them", got=got)
    if rank is not None:
        rank = checks.count("rank", rank)
    if energy is not None and not (isinstance(energy, int | float) and 0.0 < energy <= 1.0):
        raise ArgumentError.explain("energy", expected="a number above 0, at most 1", got=repr(energy)[:60])
    cure = "Exclude keys by the operator's mask, and give the bias any finite value there."
    checks.finite("bias", bias, cure)
    matrices = bias.flatten(0, 1)
    directions = [_directions(matrix.detach(), rank) for matrix in matrices]
    if energy is not None:
        rank = max(1, *(_needed(values, float(energy)) for _, values in directions))
    assert rank is not None
    pairs = [_split(matrix, *found, rank) for matrix, found in zip(matrices, directions, strict=True)]
    dtype = checks.working_dtype(bias)
    q_bias, k_bias = (
        torch.stack(side).to(dtype).unflatten(0, bias.shape[:2]).transpose(1, 2) for side in zip(*pairs, strict=True)
    )
    return q_bias.contiguous(), k_bias.contiguous()


def approximation(bias: Tensor, q_bias: Tensor, k_bias: Tensor) -> Approximation:
    """Returns how far q_bias k_biasᵀ is from ``bias``, head by head, computed in fp64.

    Args:
        bias: (Sq, Sk), (H, Sq, Sk) or (B, H, Sq, Sk), finite.
        q_bias: (B or 1, Sq, H or 1, R).
        k_bias: (B or 1, Sk, H or 1, R).

    Raises:
        ArgumentError: a tensor has a wrong type or shape, or the bias is not finite.

    """
    bias = _heads(bias)
    checks.finite("bias", bias)
    batch, heads, rows, keys = bias.shape
    sides = []
    for name, factor, length in (("q_bias", q_bias, rows), ("k_bias", k_bias, keys)):
        factor = checks.floats(name, factor, "(B or 1, S, H or 1, R)", (4,))  # noqa: PLW2901 # the same, but checked
        fits = factor.shape[0] in {1, batch} and factor.shape[1] == length and factor.shape[2] in {1, heads}
        if not fits or factor.shape[3] != q_bias.shape[3]:
            expected = f"({batch} or 1, {length}, {heads} or 1, R) for the bias, one R for both factors"
            raise ArgumentError.explain(name, expected=expected, got=f"shape {tuple(factor.shape)}")
        sides.append(factor.detach().expand(batch, length, heads, -1).transpose(1, 2))
    figures = bias.new_empty((3, batch, heads), dtype=torch.float64)
    for place in itertools.product(range(batch), range(heads)):
        matrix, left, right = (tensor[place].detach().double() for tensor in (bias, *sides))
        difference = matrix - left @ right.mT
        norms = [torch.linalg.matrix_norm(tensor) for tensor in (difference, matrix)]
        figures[(slice(None), *place)] = torch.stack([*norms, difference.abs().amax()])
    relative = torch.where(figures[0] == 0.0, 0.0, figures[0] / figures[1]).amax(0)
    return Approximation(1.0 - relative.square(), relative, figures[2].amax(0))


def _heads(bias: object) -> Tensor:
    """Returns a valid bias as (B or 1, H or 1, Sq, Sk)."""
    bias = checks.floats("bias", bias, _LAYOUT, (2, 3, 4))
    return bias[(None,) * (4 - bias.dim())]


def _directions(matrix: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
    """Returns left singular vectors (Sq, n) and singular values (n,) in fp64, rounding noise among them set to 0."""
    left, values, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
    noise = values[:1] * max(matrix.shape) * torch.finfo(torch.float64).eps
    return left[:, :rank], values.masked_fill(values <= noise, 0.0)[:rank]


def _needed(values: Tensor, energy: float) -> int:
    """Returns how many of the singular values, largest first, hold ``energy`` of their sum of squares."""
    tails = values.square().flip(0).cumsum(0).flip(0)  # what is lost without the values from here on
    return int((tails > (1.0 - energy) * tails[0]).sum())


def _split(matrix: Tensor, left: Tensor, values: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Returns both sides, (Sq, rank) and (Sk, rank), padded with zeros; the right one follows ``matrix``'s gradient."""
    roots = values[:rank].sqrt()
    inverse = torch.where(roots > 0.0, 1.0 / roots, 0.0)
    pad = (0, rank - len(roots))
    right = matrix.double().mT @ (left[:, :rank] * inverse)
    return torch.nn.functional.pad(left[:, :rank] * roots, pad), torch.nn.functional.pad(right, pad)
