"""Attention with a low-rank bias in plain PyTorch, a chunk of query rows and heads at a time.

One algorithm with three uses, told apart by two parameters:

========  =============  ===========  ==============================================================
use       compute_dtype  round_to     meaning
========  =============  ===========  ==============================================================
oracle    float64        None         what is true
ideal     float32        q's dtype    the best a 16-bit kernel can do: the yardstick of the gate
ideal     float32        "tf32", ...  the same of fp32 inputs on tensor cores
eager     float32        None         what runs where no kernel may
========  =============  ===========  ==============================================================

The formulas are those of FlashAttention (arXiv 2205.14135, appendix B) with the factored bias of
FlashBias (arXiv 2505.12044); LSE has a gradient too, because dLSE/dS = P::

    S = scale q k' + q_bias k_bias' + mask      P = exp(S - LSE)        O = P V
    dV = P' dO    dP = dO V'    dS = P (dP - delta + dLSE)    delta_i = sum_d dO_id O_id
    dQ = scale dS K    dK = scale dS' Q    dQ_bias = dS K_bias    dK_bias = dS' Q_bias    dmask = dS

Tensors are laid out (B, S, H, D), LSE and dLSE (B, H, Sq). k and v may have fewer heads, Hkv, a divisor of H: query
head h reads head h // (H / Hkv) (grouped queries, arXiv 2305.13245). Factors may have batch or head size 1, and
k_bias may have Hkv heads too, one for each group. ``mask`` (bool, True takes part; or additive, of any float dtype)
broadcasts to (B, H, Sq, Sk), aligned right. Every gradient has its input's own shape: it is summed over what
the input was shared by, heads of a group included; a bool mask has none.

``band`` says which keys a row sees by position (:mod:`flashbias.band`); a chunk leaves out the keys that none of its
rows sees. A row without any key gives 0, LSE -inf and no gradient, whatever its dLSE.

With ``round_to="tf32"`` or "tf32x3" every operand of a product that is no factor is rounded as
:mod:`flashbias.rounding` says; with a dtype, which the inputs have already, P and dS are.

Inputs of different dtypes may meet, such as fp32 factors beside bf16 q: all are read in the compute dtype, and only P,
dS and results are ever rounded to another.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flashbias.band import Band
from flashbias.chunks import Call, Gradients, Wanted, add, plain_arithmetic
from flashbias.rounding import Rounding, product, rounded

__all__ = ["ALL", "Gradients", "Magnitudes", "Wanted", "backward", "forward", "magnitudes"]

ALL: Wanted = (True, True, True, True, True, True)


class Magnitudes(NamedTuple):
    """The sums that make O and each gradient, over absolute values: the scale of rounding in rows that cancel."""

    out: Tensor
    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    dq_bias: Tensor | None
    dk_bias: Tensor | None
    dmask: Tensor | None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    mask: Tensor | None,
    band: Band,
    scale: float,
    *,
    compute_dtype: torch.dtype,
    round_to: Rounding = None,
) -> tuple[Tensor, Tensor]:
    """Returns ``(out, lse)``: (B, Sq, H, Dv) and (B, H, Sq), LSE in nats and ``compute_dtype``.

    ``out`` is in ``compute_dtype``; with ``round_to``, P is rounded to it before it meets V (unnormalised, as
    kernels do) and ``out`` is rounded once, to v's dtype.
    """
    call = Call(q, k, v, q_bias, k_bias, mask, band, scale, compute_dtype, round_to)
    out = call.zeros((*q.shape[:3], v.shape[3]))
    lse = call.zeros((q.shape[0], q.shape[2], q.shape[1])).fill_(-torch.inf)
    with plain_arithmetic(q.device):
        for chunk in call.chunks():
            scores = call.scores(chunk)
            peak = scores.amax(-1, keepdim=True)
            peak.masked_fill_(peak == -torch.inf, 0.0)
            weights = scores.sub_(peak).exp_()
            total = weights.sum(-1, keepdim=True)
            value = product(weights, call.keys(v, chunk), round_to)
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
    band: Band,
    scale: float,
    out: Tensor | None,
    lse: Tensor,
    *,
    compute_dtype: torch.dtype,
    round_to: Rounding = None,
    wanted: Wanted = ALL,
    recentre: bool = False,
    dlse: Tensor | None = None,
) -> Gradients:
    """Returns the wanted gradients, through the given ``out`` and ``lse``.

    ``dlse`` is the upstream gradient of LSE, (B, H, Sq); None is zero. Gradients are in ``compute_dtype``; with
    ``round_to``, P and dS are rounded to it where they feed a matrix product and each gradient is rounded once,
    to its input's dtype. dmask feeds none: it sums dS as it is, and is None unless the mask is additive.

    ``out=None`` takes delta from P and dP themselves, so rows of dS sum to dLSE in ``compute_dtype`` even where
    the forward's result was rounded. ``recentre`` measures k_bias from its P-weighted mean c in each row before it
    meets the rounded dS: dQ_bias_i = sum_j dS_ij (K_bias_j - c_i) + dLSE_i c_i. That is equal in exact arithmetic,
    because rows of dS sum to dLSE, and far more accurate for factors that are large next to their spread, such as
    ALiBi's key positions.
    """
    call = Call(q, k, v, q_bias, k_bias, mask, band, scale, compute_dtype, round_to)
    sums = call.sums(wanted)
    only_dv = sums.dq is sums.dk is sums.dq_bias is sums.dk_bias is sums.dmask is None
    with plain_arithmetic(q.device):
        for chunk in call.chunks():
            dout_rows = call.rows(dout, chunk)
            weights = call.weights(chunk, lse)
            if sums.dv is not None:
                add(chunk.of_keys(sums.dv), product(weights.mT, dout_rows, round_to))
            if only_dv:
                continue
            dscores = product(dout_rows, call.keys(v, chunk).mT, round_to)
            products = weights * dscores if out is None else dout_rows * call.rows(out, chunk)
            row_sum = 0.0 if dlse is None else call.dlse(chunk, dlse, lse)
            dscores.sub_(products.sum(-1, keepdim=True).sub_(row_sum)).mul_(weights)
            if sums.dmask is not None:
                add(chunk.of_scores(sums.dmask), dscores)
            dscores = rounded(dscores, round_to)
            call.add_products(sums, chunk, dscores)
            if recentre and sums.dq_bias is not None and k_bias is not None:
                total = weights.sum(-1, keepdim=True)
                # P sums to 1, unless a mask pushed a whole row down to where LSE cannot tell log n from 0.
                excess = dscores.sum(-1, keepdim=True).div_(total.masked_fill_(total == 0.0, 1.0)).sub_(row_sum)
                add(chunk.of_rows(sums.dq_bias), (weights @ call.keys(k_bias, chunk)).mul_(excess), -1.0)
    return sums if round_to is None else call.like_inputs(sums)


def magnitudes(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    mask: Tensor | None,
    band: Band,
    scale: float,
    out: Tensor,
    lse: Tensor,
    *,
    compute_dtype: torch.dtype,
    wanted: Wanted = ALL,
    dlse: Tensor | None = None,
) -> Magnitudes:
    """Returns P|V| and, where wanted, |scale| D|K|, |scale| D'|Q|, P'|dO|, D|K_bias|, D'|Q_bias| and D.

    D = P (|dP| + sum_d |dO_d O_d| + |dLSE|) bounds |dS|: dS is itself a difference, and delta carries the rounding
    of O, so a row whose dS is zero (one key only) still has a scale of rounding. Shapes are those of O and the
    inputs: each is summed as its gradient is.
    """
    call = Call(q, k, v, q_bias, k_bias, mask, band, scale, compute_dtype)
    size = call.absolute()
    sums = size.sums(wanted)
    total = call.zeros(out.shape)
    with plain_arithmetic(q.device):
        for chunk in call.chunks():
            dout_rows = call.rows(dout, chunk)
            weights = call.weights(chunk, lse)
            add(chunk.of_rows(total), weights @ size.keys(size.v, chunk))
            if sums.dv is not None:
                add(chunk.of_keys(sums.dv), weights.mT @ dout_rows.abs())
            delta = (dout_rows * call.rows(out, chunk)).abs_().sum(-1, keepdim=True)
            if dlse is not None:
                delta += call.dlse(chunk, dlse, lse).abs()
            bound = (dout_rows @ call.keys(v, chunk).mT).abs_().add_(delta).mul_(weights)
            if sums.dmask is not None:
                add(chunk.of_scores(sums.dmask), bound)
            size.add_products(sums, chunk, bound)
    return Magnitudes(total, *sums)
