"""Attention without a kernel: chunked PyTorch, for CPU tensors and as the last rung of the ladder.

The arithmetic is that of :mod:`flashbias.reference` in fp32 (fp64 for fp64 inputs); results are rounded once,
to the inputs' dtypes. Any float dtype, any head dim and any device that PyTorch has; memory beyond inputs and
outputs is a few chunks of scores and the gradients' sums. Grouped queries, bands, the gradients of LSE
and of an additive mask, and factors of another dtype than q's come with the reference. The signatures are those of :mod:`flashbias.launcher`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashbias import reference
from flashbias.band import Band
from flashbias.precision import torchs_own
from flashbias.reference import Gradients, Wanted


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which inputs of ``dtype`` are computed, and that of their LSE."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _arithmetic(q: Tensor) -> torch.dtype:
    """Returns the dtype to compute in: fp64 where PyTorch would round fp32 products to tf32, which spoils a bias."""
    if q.dtype == torch.float32 and q.device.type == "cuda" and torchs_own() == "tf32":
        return torch.float64
    return compute_dtype(q.dtype)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    mask: Tensor | None,
    band: Band,
    scale: float,
    grads: Wanted,
) -> tuple[Tensor, Tensor]:
    """Returns ``out`` (B, Sq, H, Dv) in v's dtype and ``lse`` (B, H, Sq) in the compute dtype, natural log."""
    del grads  # what the backward will want changes nothing here
    dtype = _arithmetic(q)
    out, lse = reference.forward(q, k, v, q_bias, k_bias, mask, band, scale, compute_dtype=dtype)
    return out.to(v.dtype), lse.to(compute_dtype(q.dtype))


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    band: Band,
    scale: float,
    grads: Wanted,
    dlse: Tensor | None = None,
) -> Gradients:
    """Returns (dq, dk, dv, dq_bias, dk_bias, dmask), each in its input's shape and dtype, None where ``grads`` is False.

    ``dlse`` is the upstream gradient of ``lse``, (B, H, Sq); None is zero. A bool mask has no gradient.

    Delta is taken from P and dP, never from ``out``, whose rounding would keep rows of dS from summing to dLSE
    and spoil the gradients of factors that are large next to their spread (ALiBi's key positions).
    """
    del out
    inputs = (q, k, v, q_bias, k_bias, mask)
    dtype = _arithmetic(q)
    gradients = reference.backward(
        dout, q, k, v, q_bias, k_bias, mask, band, scale, None, lse, compute_dtype=dtype, wanted=grads, dlse=dlse
    )
    pairs = zip(gradients, inputs, strict=True)
    return Gradients(*(None if grad is None or tensor is None else grad.to(tensor.dtype) for grad, tensor in pairs))
