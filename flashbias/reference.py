"""Attention with a low-rank bias in plain PyTorch, a chunk of query rows and heads at a time.

One algorithm with three uses, told apart by two parameters:

========  =============  ===========  ==============================================================
use       compute_dtype  round_to     meaning
========  =============  ===========  ==============================================================
oracle    float64        None         what is true
ideal     float32        q's dtype    the best a 16-bit kernel can do: the yardstick of the gate
eager     float32        None         what runs where no kernel may
========  =============  ===========  ==============================================================

The formulas are those of FlashAttention (arXiv 2205.14135, appendix B) with the factored bias of
FlashBias (arXiv 2505.12044)::

    S = scale q k' + q_bias k_bias' + mask      P = exp(S - LSE)        O = P V
    dV = P' dO    dP = dO V'    dS = P (dP - delta)    delta_i = sum_d dO_id O_id
    dQ = scale dS K    dK = scale dS' Q    dQ_bias = dS K_bias    dK_bias = dS' Q_bias

Tensors are laid out (B, S, H, D), LSE (B, H, Sq). Factors may have batch or head size 1; their gradients
have their own shape. ``mask`` (bool, True takes part; or additive) broadcasts to (B, H, Sq, Sk), aligned
right. ``causal`` is aligned top-left: row i sees keys j <= i. A row without any key gives 0, LSE -inf and
no gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flashbias.chunks import Call, Gradients, Wanted, add, plain_arithmetic, rounded

__all__ = ["ALL", "Gradients", "Magnitudes", "Wanted", "backward", "forward", "magnitudes"]

ALL: Wanted = (True, True, True, True, True)


class Magnitudes(NamedTuple):
    """The sums that make O and each gradient, over absolute values: the scale of rounding in rows that cancel."""

    out: Tensor
    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    dq_bias: Tensor | None
    dk_bias: Tensor | None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    *,
    compute_dtype: torch.dtype,
    round_to: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns ``(out, lse)``: (B, Sq, H, Dv) and (B, H, Sq), LSE in nats and ``compute_dtype``.

    ``out`` is in ``compute_dtype``; with ``round_to``, P is rounded to it before it meets V (unnormalised, as
    kernels do) and ``out`` is rounded once, to v's dtype.
    """
    call = Call(q, k, v, q_bias, k_bias, mask, causal, scale, compute_dtype)
    out = call.zeros((*q.shape[:3], v.shape[3]))
    lse = call.zeros((q.shape[0], q.shape[2], q.shape[1])).fill_(-torch.inf)
    with plain_arithmetic(q.device):
        for chunk in call.chunks():
            scores = call.scores(chunk)
            peak = scores.amax(-1, keepdim=True)
            peak.masked_fill_(peak == -torch.inf, 0.0)
            weights = scores.sub_(peak).exp_()
            total = weights.sum(-1, keepdim=True)
            value = rounded(weights, round_to) @ call.keys(v, chunk)
            chunk.of_rows(out).copy_(value.div_(total.masked_fill(total == 0.0, 1.0)))
            lse[chunk.batch, chunk.heads, chunk.rows] = (peak + total.log()).squeeze(-1)
    return (out if round_to is None else out.to(v.dtype)), lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    out: Tensor | None,
    lse: Tensor,
    *,
    compute_dtype: torch.dtype,
    round_to: torch.dtype | None = None,
    wanted: Wanted = ALL,
    recentre: bool = False,
) -> Gradients:
    """Returns the wanted gradients, through the given ``out`` and ``lse``.

    Gradients are in ``compute_dtype``; with ``round_to``, P and dS are rounded to it where they feed a matrix
    product and each gradient is rounded once, to its input's dtype.

    ``out=None`` takes delta from P and dP themselves, so rows of dS sum to zero in ``compute_dtype`` even where
    the forward's result was rounded. ``recentre`` measures k_bias from its P-weighted mean in each row before it
    meets the rounded dS: equal in exact arithmetic, because rows of dS sum to zero, and far more accurate for
    factors that are large next to their spread, such as ALiBi's key positions.
    """
    call = Call(q, k, v, q_bias, k_bias, mask, causal, scale, compute_dtype)
    sums = call.sums(wanted)
    only_dv = sums.dq is sums.dk is sums.dq_bias is sums.dk_bias is None
    with plain_arithmetic(q.device):
        for chunk in call.chunks():
            dout_rows = call.rows(dout, chunk)
            weights = call.weights(chunk, lse)
            if sums.dv is not None:
                add(chunk.of_keys(sums.dv), rounded(weights, round_to).mT @ dout_rows)
            if only_dv:
                continue
            dscores = dout_rows @ call.keys(v, chunk).mT
            products = weights * dscores if out is None else dout_rows * call.rows(out, chunk)
            dscores = rounded(dscores.sub_(products.sum(-1, keepdim=True)).mul_(weights), round_to)
            call.add_products(sums, chunk, dscores)
            if recentre and sums.dq_bias is not None and k_bias is not None:
                total = weights.sum(-1, keepdim=True)
                centre = (weights @ call.keys(k_bias, chunk)).div_(total.masked_fill_(total == 0.0, 1.0))
                add(chunk.of_rows(sums.dq_bias), centre.mul_(dscores.sum(-1, keepdim=True)), -1.0)
    return sums if round_to is None else call.like_inputs(sums)


def magnitudes(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    out: Tensor,
    lse: Tensor,
    *,
    compute_dtype: torch.dtype,
) -> Magnitudes:
    """Returns P|V|, |scale| D|K|, |scale| D'|Q|, P'|dO|, D|K_bias| and D'|Q_bias|.

    D = P (|dP| + sum_d |dO_d O_d|) bounds |dS|: dS is itself a difference, and delta carries the rounding of O,
    so a row whose dS is zero (one key only) still has a scale of rounding. Shapes are those of O and the inputs.
    """
    call = Call(q, k, v, q_bias, k_bias, mask, causal, scale, compute_dtype)
    size = call.absolute()
    sums = size.sums(ALL)
    total = call.zeros(out.shape)
    with plain_arithmetic(q.device):
        for chunk in call.chunks():
            dout_rows = call.rows(dout, chunk)
            weights = call.weights(chunk, lse)
            add(chunk.of_rows(total), weights @ size.keys(size.v, chunk))
            if sums.dv is not None:
                add(chunk.of_keys(sums.dv), weights.mT @ dout_rows.abs())
            delta = (dout_rows * call.rows(out, chunk)).abs_().sum(-1, keepdim=True)
            bound = (dout_rows @ call.keys(v, chunk).mT).abs_().add_(delta).mul_(weights)
            size.add_products(sums, chunk, bound)
    return Magnitudes(total, *sums)
