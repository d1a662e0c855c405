"""The answers that attention's kernels are judged by: the oracle's and the ideal kernel's, of one case's inputs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TypedDict

import torch
from torch import Tensor

from autotune.spec import Reference, Tensors
from cache_db.models import Problem
from flashbias import reference
from flashbias.band import Band
from flashbias.kernels import cases, ragged, sequences
from flashbias.kernels.arguments import Sizes
from flashbias.kernels.precisions import rounding_of
from flashbias.kernels.problem import GRADIENTS, wanted

_Call = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Band, float]


class _How(TypedDict):
    """How the reference computes gradients here."""

    compute_dtype: torch.dtype
    wanted: reference.Wanted
    dlse: Tensor | None


def softmax_scale(problem: Problem) -> float:
    """Returns the scale that timing and proofs use; kernels take any at run time."""
    return 1.0 / math.sqrt(float(problem.fields["head_dim"]))


def oracle(problem: Problem, inputs: Tensors) -> dict[str, Reference]:
    """Returns every output in fp64, and the same sums over absolute values."""
    if "cu_seqlens_q" in inputs:
        parts = (oracle(problem, part) for part in sequences.split(inputs))
        return sequences.joined_references(parts, inputs)
    call, dout, dlse = _call(problem, inputs), inputs["dout"], inputs.get("dlse")
    out, lse = reference.forward(*call, compute_dtype=torch.float64)
    how: _How = {"compute_dtype": torch.float64, "wanted": _flags(problem), "dlse": dlse}
    gradients = reference.backward(dout, *call, out, lse, **how)
    sizes = reference.magnitudes(dout, *call, out, lse, **how)
    found = {
        "out": Reference(out, sizes[0]),
        "lse": Reference(lse),
        "delta": Reference(_delta(out, dout, lse, dlse), _delta(out.abs(), dout.abs(), lse, _negated(dlse))),
    }
    for name, value, size in zip(gradients._fields, gradients, sizes[1:], strict=True):
        if value is not None:
            found[name] = Reference(value, size)
    return found


def ideal(problem: Problem, inputs: Tensors) -> Tensors:
    """Returns every output as the ideal kernel gives it: products' operands rounded once, outputs rounded once."""
    if "cu_seqlens_q" in inputs:
        return sequences.joined((ideal(problem, part) for part in sequences.split(inputs)), inputs)
    call, dout, dlse = _call(problem, inputs), inputs["dout"], inputs.get("dlse")
    dtype = rounding_of(str(problem.fields["dtype"]), str(problem.fields["precision"]))
    out, lse = reference.forward(*call, compute_dtype=torch.float32, round_to=dtype)
    how: _How = {"compute_dtype": torch.float32, "wanted": _flags(problem), "dlse": dlse}
    gradients = reference.backward(dout, *call, out, lse, round_to=dtype, recentre=True, **how)
    found = {"out": out, "lse": lse, "delta": _delta(out.float(), dout.float(), lse, dlse)}
    found.update({name: value for name, value in gradients._asdict().items() if value is not None})
    if "dmask" in found:
        found["dmask"] = found["dmask"].to(inputs["mask"].dtype)
    return found


def sizes_of(problem: Problem, inputs: Tensors) -> Sizes:
    """Returns the sizes of a case's inputs."""
    batch, seqlen_q, nheads, _ = inputs["q"].shape
    columns = inputs["q_bias"].shape[3] if "q_bias" in inputs else 0
    nheads_kv, seqlen_k = inputs["k"].shape[2], inputs["k"].shape[1]
    if "cu_seqlens_q" in inputs:
        batch, (longest_q, longest_k, _) = inputs["cu_seqlens_q"].shape[0] - 1, inputs["longest"].shape
        sides = [side for side in "qk" if columns and inputs[f"{side}_bias"].shape[1] != inputs[side].shape[1]]
        band, shifted = ragged.band_of(problem, inputs)
        sizes = Sizes(batch, nheads, nheads_kv, longest_q, longest_k, columns, band)
        positional = tuple(f"{side}_factor" for side in sides)
        return replace(sizes, packed=True, rows_q=seqlen_q, shifted=shifted, positional=positional)
    if "longest" in inputs:
        return Sizes(batch, nheads, nheads_kv, seqlen_q, seqlen_k, columns, ragged.band_of_part(problem, inputs))
    band = cases.band_of(problem, seqlen_q, seqlen_k)
    return Sizes(batch, nheads, nheads_kv, seqlen_q, seqlen_k, columns, band)


def _flags(problem: Problem) -> reference.Wanted:
    """Returns the wanted gradients in the order of the reference."""
    q, k, v, q_bias, k_bias, mask = (name in wanted(problem) for name in GRADIENTS)
    return q, k, v, q_bias, k_bias, mask


def _delta(out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None) -> Tensor:
    """Returns rowsum(O ∘ dO) - dLSE as (B, H, Sq); a row without a key has no dLSE."""
    delta = (out * dout).sum(-1).transpose(1, 2)
    return delta if dlse is None else delta - torch.where(lse == -torch.inf, 0.0, dlse.to(delta.dtype))


def _negated(dlse: Tensor | None) -> Tensor | None:
    """Returns -|dLSE|, which ``_delta`` takes from a sum of absolute values."""
    return None if dlse is None else -dlse.abs()


def _call(problem: Problem, inputs: Tensors) -> _Call:
    """Returns the reference's arguments, factors expanded so that their gradients are those of every (batch, head)."""
    sizes = sizes_of(problem, inputs)
    group = sizes.nheads // sizes.nheads_kv
    both: list[Tensor | None] = [None, None]
    for index, name in enumerate(("q_bias", "k_bias")):
        if name in inputs:
            factor = inputs[name]
            if 1 < factor.shape[2] < sizes.nheads:
                factor = factor.repeat_interleave(group, dim=2)
            both[index] = factor.expand(sizes.batch, factor.shape[1], sizes.nheads, factor.shape[3])
    scale = softmax_scale(problem)
    return inputs["q"], inputs["k"], inputs["v"], both[0], both[1], inputs.get("mask"), sizes.band, scale
