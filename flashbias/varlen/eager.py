"""Packed sequences without a kernel: the chunked reference, one sequence after another.

The host reads where sequences end, so a GPU is waited for; nothing of this may be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flashbias import reference
from flashbias.band import Band
from flashbias.eager import _arithmetic, compute_dtype
from flashbias.errors import UnsupportedError
from flashbias.varlen.band import of_sequence
from flashbias.varlen.sequences import Sequences

Five = tuple[bool, bool, bool, bool, bool]
Found = tuple[Tensor | None, ...]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    sequences: Sequences,
    band: Band,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Returns ``out`` (Tq, H, Dv) in v's dtype and ``lse`` (H, Tq) in the compute dtype."""
    dtype = _arithmetic(q)
    out = v.new_zeros((*q.shape[:2], v.shape[2]))
    lse = q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=compute_dtype(q.dtype))
    for rows, keys in _ranges(q, k, sequences):
        one_q, one_k, one_v = q[None, rows], k[None, keys], v[None, keys]
        factors = _part(q_bias, rows, q.shape[0]), _part(k_bias, keys, k.shape[0])
        seen = of_sequence(band, sequences.shifted, one_q.shape[1], one_k.shape[1])
        found = reference.forward(one_q, one_k, one_v, *factors, None, seen, scale, compute_dtype=dtype)
        out[rows], lse[:, rows] = found[0][0].to(v.dtype), found[1][0].to(lse.dtype)
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    sequences: Sequences,
    lse: Tensor,
    band: Band,
    scale: float,
    grads: Five,
    dlse: Tensor | None = None,
) -> Found:
    """Returns (dq, dk, dv, dq_bias, dk_bias) in the inputs' own shapes and dtypes, None where not in ``grads``.

    ``dlse`` (H, Tq) is the upstream gradient of LSE.
    """
    dtype = _arithmetic(q)
    inputs = (q, k, v, q_bias, k_bias)
    totals = [
        torch.zeros_like(tensor, dtype=dtype) if want and tensor is not None else None
        for tensor, want in zip(inputs, grads, strict=True)
    ]
    for rows, keys in _ranges(q, k, sequences):
        one_q, one_k, one_v = q[None, rows], k[None, keys], v[None, keys]
        seen = of_sequence(band, sequences.shifted, one_q.shape[1], one_k.shape[1])
        found = reference.backward(
            dout[None, rows],
            one_q,
            one_k,
            one_v,
            _part(q_bias, rows, q.shape[0]),
            _part(k_bias, keys, k.shape[0]),
            None,
            seen,
            scale,
            None,
            lse[None, :, rows],
            compute_dtype=dtype,
            wanted=(*grads, False),
            dlse=None if dlse is None else dlse[None, :, rows],
        )
        for total, gradient, own, given in zip(
            totals, found, (rows, keys, keys, rows, keys), (q, k, k, q, k), strict=False
        ):
            share = _part(total, own, given.shape[0])
            if share is not None and gradient is not None:
                share += gradient
    pairs = zip(inputs, totals, strict=True)
    return tuple(None if tensor is None or total is None else total.to(tensor.dtype) for tensor, total in pairs)


def _ranges(q: Tensor, k: Tensor, sequences: Sequences) -> Iterator[tuple[slice, slice]]:
    """Yields the rows of q and of k of each sequence that has both; waits for the device if there is any."""
    if q.numel() == 0 or k.numel() == 0:
        return
    if q.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise UnsupportedError.explain(
            "flash_bias_varlen_func under CUDA graph capture",
            expected="kernels that were proven before",
            got="none for this call, and without one the host must read cu_seqlens",
            cure="Make the same call once before the capture; FLASHBIAS_LOG=debug says why there is no kernel.",
        )
    bounds = [tensor.tolist() for tensor in (sequences.cu_seqlens_q, sequences.cu_seqlens_k)]
    for first_q, last_q, first_k, last_k in zip(
        bounds[0][:-1], bounds[0][1:], bounds[1][:-1], bounds[1][1:], strict=True
    ):
        if first_q < last_q and first_k < last_k:
            yield slice(first_q, last_q), slice(first_k, last_k)


def _part(tensor: Tensor | None, own: slice, total: int) -> Tensor | None:
    """Returns the (1, S, H, D) view of a sequence's rows: its ``own`` of ``total`` packed ones, or the first of positions."""
    if tensor is None:
        return None
    return tensor[None, own if tensor.shape[0] == total else slice(own.stop - own.start)]
