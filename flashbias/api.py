"""The public operator: checks every argument, then hands valid ones to :mod:`flashbias.ops`."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from flashbias import ops, validation
from flashbias.band import band
from flashbias.precision import Precision, chosen


@overload
def flash_bias_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool | Literal["bottom_right"] = False,
    softmax_scale: float | None = None,
    *,
    window_size: tuple[int, int] = (-1, -1),
    return_lse: Literal[False] = False,
    deterministic: bool | None = None,
    dropout_p: float = 0.0,
    precision: Precision | None = None,
) -> Tensor: ...


@overload
def flash_bias_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool | Literal["bottom_right"] = False,
    softmax_scale: float | None = None,
    *,
    window_size: tuple[int, int] = (-1, -1),
    return_lse: Literal[True],
    deterministic: bool | None = None,
    dropout_p: float = 0.0,
    precision: Precision | None = None,
) -> tuple[Tensor, Tensor]: ...


def flash_bias_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool | Literal["bottom_right"] = False,
    softmax_scale: float | None = None,
    *,
    window_size: tuple[int, int] = (-1, -1),
    return_lse: bool = False,
    deterministic: bool | None = None,
    dropout_p: float = 0.0,
    precision: Precision | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Returns softmax(q kᵀ · softmax_scale + q_bias k_biasᵀ + mask) v, never forming the scores or the bias.

    The method is FlashBias (arXiv 2505.12044).

    With B batches, H heads, Hkv key heads that divide H, Sq queries, Sk keys, head dim D (1 to 256) and rank R
    (1 to 256):

    Args:
        q: (B, Sq, H, D), float16, bfloat16 or float32; on a CPU also float64. Any strides.
        k: (B, Sk, Hkv, D), dtype and device of q. Query head h reads key head h // (H // Hkv).
        v: (B, Sk, Hkv, Dv), as k; Dv from 1 to 256.
        q_bias: (B or 1, Sq, H or 1, R), the bias's left factor; size 1 means shared by all batches or heads.
        k_bias: (B or 1, Sk, H or Hkv or 1, R), its right factor, shared independently of the left one. Both or none,
            in q's dtype or, to keep large positions and distances exact beside 16-bit inputs, in float32 or float64
            (then R at most 42 beside bfloat16, 64 beside float16, where also the largest |q_bias| times the largest
            |k_bias| of a column must stay below 2^31). Beside float32 inputs on a GPU float64 factors are computed in
            float32. Factors are finite: what takes no part is said by ``mask``.
            ``softmax_scale`` does not multiply the bias.
        mask: broadcastable to (B, H, Sq, Sk), aligned right. bool: True takes part, as in PyTorch's
            scaled_dot_product_attention. float16 to float64: added to the scores, and may want a gradient, which
            is summed over the dims that were broadcast (of a tensor the caller expanded, each copy gets a share of
            the sum). -inf excludes a key; a row whose every number is below about -1e6 has a right result, but too
            large gradients, because fp32 cannot tell its LSE from its maximum: use -inf or a boolean mask.
        causal: True: query i sees keys j <= i (aligned top-left). "bottom_right": the last query sees the last key,
            j <= i + Sk - Sq, as a prefill with a cache wants it.
        softmax_scale: factor of q kᵀ; 1/sqrt(D) by default. It must fit the arithmetic: fp64 for fp64, else fp32.
        window_size: (left, right) as in the package flash-attn: query i, standing at key p = i + Sk - Sq (p = i with
            ``causal=True``), sees keys p - left to p + right; -1 is no limit. Keys outside cost no time.
        return_lse: whether to return the log-sum-exp of the scores too.
        deterministic: gradients are always bitwise repeatable; True, False and None are accepted and mean the same.
        dropout_p: must be 0; there is no attention dropout.
        precision: how float32 q, k and v on a GPU are multiplied, forward and backward. "ieee": in full fp32, without
            tensor cores. "tf32": on tensor cores, rounded to 11 significant bits. "tf32x3": on tensor cores, as the sum of
            two such numbers, three products for one: right to about 2^-21. None: "tf32" if PyTorch's own
            products are set to it at this call (torch.backends.cuda.matmul, torch.set_float32_matmul_precision),
            else "ieee". The bias is never rounded to tf32. A CPU always computes in fp32; beside other dtypes
            only None is taken.

    Returns:
        (B, Sq, H, Dv) in q's dtype. A query without any key gives 0. With ``return_lse``, also (B, H, Sq) in fp32
        (fp64 for fp64 inputs), in nats, bias and mask included, -inf for a query without any key. Both are
        differentiable once, with respect to any subset of q, k, v, q_bias, k_bias and an additive mask; a gradient
        has its input's own shape and dtype, summed over the dims in which it is shared.

    Raises:
        ArgumentError: an argument has a wrong type, shape, dtype, device or value (it is a ValueError).
        UnsupportedError: a sensible call that this version cannot compute (it is a NotImplementedError).

    """
    validation.check_inputs(q, k, v)
    validation.check_factors(q, k, q_bias, k_bias)
    if mask is not None:
        mask = validation.checked_mask(mask, q, k)
    validation.check_switches(return_lse, deterministic, dropout_p)
    seen = band(validation.causal(causal), validation.window(window_size), q.shape[1], k.shape[1])
    arithmetic = chosen(precision, q)
    out, lse = ops.attention(q, k, v, q_bias, k_bias, mask, seen, validation.scale(softmax_scale, q), arithmetic)
    return (out, lse) if return_lse else out
