"""Attention over parts of the keys, put together: what ring and context parallelism need."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flashbias.errors import ArgumentError


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns (out, lse) of attention over all keys from the results over disjoint parts of them.

    With LSE_i the log-sum-exp of part i, softmax over all keys weighs part i with exp(LSE_i - LSE)
    (FlashAttention, arXiv 2205.14135, section 3.1). Differentiable in every argument; computed in the LSEs' dtype.

    Args:
        outs: one (B, Sq, H, Dv) tensor for each part, as ``flash_bias_func(..., return_lse=True)`` gives it.
        lses: the (B, H, Sq) LSE of each part, in nats; -inf for rows that saw no key of it.

    Returns:
        O (B, Sq, H, Dv) in the dtype of ``outs`` and LSE (B, H, Sq); rows without any key are 0 and -inf.

    Raises:
        ArgumentError: there is no part, not one LSE for each, or shapes do not fit.

    """
    outs, lses = list(outs), list(lses)  # stacked tensors are sequences of parts too
    if not outs or len(outs) != len(lses) or not all(isinstance(part, Tensor) for part in (*outs, *lses)):
        raise ArgumentError.explain(
            "outs and lses", expected="as many tensors of each, at least one", got=f"{len(outs)} and {len(lses)}"
        )
    for number, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        batch, rows, heads = out.shape[:3] if out.dim() == 4 else (-1, -1, -1)
        if out.shape != outs[0].shape or lse.shape != (batch, heads, rows):
            raise ArgumentError.explain(
                f"part {number}",
                expected=f"out of shape {tuple(outs[0].shape)} and lse of shape (B, H, Sq) to it",
                got=f"{tuple(out.shape)} and {tuple(lse.shape)}",
            )
    stacked = torch.stack(list(lses))
    peak = stacked.detach().amax(0)
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    weights = (stacked - peak).exp()
    total = weights.sum(0)
    seen = total > 0
    divisor = total.masked_fill(~seen, 1.0)
    shares = (weights / divisor).transpose(2, 3).unsqueeze(-1)
    merged = shares[0] * outs[0].to(shares.dtype)
    for share, out in zip(shares[1:], outs[1:], strict=True):
        merged = merged + share * out.to(share.dtype)
    lse = torch.where(seen, peak + divisor.log(), -torch.inf)
    return merged.to(outs[0].dtype), lse
