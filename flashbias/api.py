"""The public operator: checks every argument, then hands valid ones to :mod:`flashbias.ops`."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from flashbias import ops
from flashbias.errors import ArgumentError, UnsupportedError

MAX_HEAD_DIM = 128
MAX_RANK = 128
_KERNEL_DTYPES = (torch.float16, torch.bfloat16)
_DTYPES = (*_KERNEL_DTYPES, torch.float32, torch.float64)
_LARGEST = {dtype: torch.finfo(dtype).max for dtype in (torch.float32, torch.float64)}
_LONGEST_SHOWN = 200  # bits: Python refuses to print integers of more than 4300 digits


def flash_bias_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
) -> Tensor:
    """Returns softmax(q kᵀ · softmax_scale + q_bias k_biasᵀ + mask) v, never forming the scores or the bias.

    The method is FlashBias (arXiv 2505.12044).

    With B batches, H heads, Sq queries, Sk keys, head dim D (1 to 128) and rank R (1 to 128):

    Args:
        q: (B, Sq, H, D), float16 or bfloat16; on a CPU also float32 and float64. Any strides.
        k: (B, Sk, H, D), dtype and device of q, as everything below but ``mask``'s dtype.
        v: (B, Sk, H, Dv), Dv from 1 to 128.
        q_bias: (B or 1, Sq, H or 1, R), the bias's left factor; size 1 means shared by all batches or heads.
        k_bias: (B or 1, Sk, H or 1, R), its right factor, shared independently of the left one. Both or none.
            ``softmax_scale`` does not multiply the bias.
        mask: broadcastable to (B, H, Sq, Sk), aligned right. bool: True takes part, as in PyTorch's
            scaled_dot_product_attention. float16 to float64: added to the scores. It gets no gradient.
        causal: whether query i sees keys j <= i only (aligned top-left, also where Sq and Sk differ).
        softmax_scale: factor of q kᵀ; 1/sqrt(D) by default. It must fit the arithmetic: fp64 for fp64, else fp32.

    Returns:
        (B, Sq, H, Dv) in q's dtype. A query without any key gives 0. The result is differentiable once, with
        respect to any subset of q, k, v, q_bias and k_bias; a gradient has its input's own shape and dtype,
        summed over the dims in which a factor is shared.

    Raises:
        ArgumentError: an argument has a wrong type, shape, dtype, device or value (it is a ValueError).
        UnsupportedError: a sensible call that this version cannot compute (it is a NotImplementedError).

    """
    _check_inputs(q, k, v)
    _check_factors(q, k, q_bias, k_bias)
    if mask is not None:
        mask = _checked_mask(mask, q, k)
    if not isinstance(causal, bool | np.bool_):
        raise ArgumentError.explain("causal", expected="True or False", got=_shown(causal))
    return ops.attention(q, k, v, q_bias, k_bias, mask, bool(causal), _scale(softmax_scale, q))


def _check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    _check_layout("q", q, "(B, Sq, H, D)")
    _check_dtype(q)
    for name, tensor, layout in (("k", k, "(B, Sk, H, D)"), ("v", v, "(B, Sk, H, Dv)")):
        _check_layout(name, tensor, layout)
        _check_like_q(name, tensor, q)
        _check_size(name, tensor, 0, q.shape[0], "batch", "q")
        _check_heads(name, tensor, q)
    _check_head_dim("q", q)
    _check_size("k", k, 3, q.shape[3], "head dim", "q")
    _check_size("v", v, 1, k.shape[1], "length", "k")
    _check_head_dim("v", v)


def _check_layout(name: str, tensor: object, layout: str) -> None:
    if not isinstance(tensor, Tensor):
        raise ArgumentError.explain(name, expected=f"a tensor {layout}", got=_shown(tensor))
    if tensor.dim() != 4:
        cure = "A single head or batch needs its dim too: unsqueeze it."
        raise ArgumentError.explain(name, expected=f"4 dims {layout}", got=_sizes(tensor), cure=cure)
    _check_dense(name, tensor)


def _check_dense(name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_nested:
        got = "a nested tensor" if tensor.is_nested else str(tensor.layout)
        raise ArgumentError.explain(name, expected="a dense tensor (torch.strided)", got=got, cure="Pad it, and mask.")


def _check_dtype(q: Tensor) -> None:
    if q.dtype not in _DTYPES:
        cure = "Cast q, k, v and the factors."
        raise ArgumentError.explain("q", expected="dtype float16 or bfloat16", got=_dtype(q.dtype), cure=cure)
    if q.device.type == "cuda" and q.dtype not in _KERNEL_DTYPES:
        raise UnsupportedError.explain(
            "q",
            expected="dtype float16 or bfloat16 on a GPU",
            got=_dtype(q.dtype),
            cure="Cast q, k, v and the factors (.to(torch.bfloat16)), or run on the CPU.",
        )


def _check_like_q(name: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.dtype != q.dtype:
        cure = f"Cast it: {name}.to(q.dtype)."
        expected, got = f"{_dtype(q.dtype)} as q", _dtype(tensor.dtype)
        raise ArgumentError.explain(name, expected=expected, got=got, cure=cure)
    _check_device(name, tensor, q)


def _check_device(name: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.device != q.device:
        cure = f"Move it: {name}.to(q.device)."
        raise ArgumentError.explain(name, expected=f"{q.device} as q", got=str(tensor.device), cure=cure)


def _check_size(name: str, tensor: Tensor, dim: int, size: int, meaning: str, owner: str) -> None:
    if tensor.shape[dim] != size:
        expected = f"{meaning} (dim {dim}) {size} as in {owner}"
        raise ArgumentError.explain(name, expected=expected, got=f"{tensor.shape[dim]} in {_sizes(tensor)}")


def _check_heads(name: str, tensor: Tensor, q: Tensor) -> None:
    heads, given = q.shape[2], tensor.shape[2]
    if heads == given:
        return
    expected, got = f"{heads} heads (dim 2) as in q", f"{given} in {_sizes(tensor)}"
    if given > 0 and heads % given == 0:
        cure = (
            "Grouped-query attention is not supported yet; repeat the heads: "
            f"{name}.repeat_interleave({heads // given}, dim=2)."
        )
        raise UnsupportedError.explain(name, expected=expected, got=got, cure=cure)
    cure = "The layout is (B, S, H, D); transpose(1, 2) turns (B, H, S, D) into it."
    raise ArgumentError.explain(name, expected=expected, got=got, cure=cure)


def _check_head_dim(name: str, tensor: Tensor) -> None:
    size = tensor.shape[3]
    if size < 1:
        raise ArgumentError.explain(name, expected=f"a head dim (dim 3) from 1 to {MAX_HEAD_DIM}", got=_sizes(tensor))
    if size > MAX_HEAD_DIM:
        raise UnsupportedError.explain(
            name,
            expected=f"a head dim (dim 3) of at most {MAX_HEAD_DIM}",
            got=f"{size} in {_sizes(tensor)}",
            cure="Use more, narrower heads.",
        )


def _check_factors(q: Tensor, k: Tensor, q_bias: Tensor | None, k_bias: Tensor | None) -> None:
    if q_bias is None and k_bias is None:
        return
    if q_bias is None or k_bias is None:
        given, missing = ("q_bias", "k_bias") if k_bias is None else ("k_bias", "q_bias")
        cure = "The bias is q_bias k_biasᵀ: pass both factors, or a dense bias as mask."
        raise ArgumentError.explain(
            "q_bias and k_bias", expected="both or none", got=f"{given} without {missing}", cure=cure
        )
    for name, tensor, length, letter, owner in (
        ("q_bias", q_bias, q.shape[1], "q", "q"),
        ("k_bias", k_bias, k.shape[1], "k", "k"),
    ):
        _check_layout(name, tensor, f"(B or 1, S{letter}, H or 1, R)")
        _check_factor_dtype(name, tensor, q)
        _check_like_q(name, tensor, q)
        _check_size(name, tensor, 1, length, "length", owner)
        for dim, meaning in ((0, "batch"), (2, "heads")):
            if tensor.shape[dim] != 1:
                _check_size(name, tensor, dim, q.shape[dim], f"{meaning} 1 or", "q")
    _check_size("k_bias", k_bias, 3, q_bias.shape[3], "rank", "q_bias")
    _check_rank(q_bias)


def _check_factor_dtype(name: str, factor: Tensor, q: Tensor) -> None:
    if factor.dtype != q.dtype and factor.dtype in _DTYPES:
        raise UnsupportedError.explain(
            name,
            expected=f"{_dtype(q.dtype)} as q",
            got=_dtype(factor.dtype),
            cure=f"Factors of another precision are not supported yet: cast it, {name}.to(q.dtype), and keep its "
            "values small, since 16 bits hold few digits of a large position or distance.",
        )


def _check_rank(q_bias: Tensor) -> None:
    rank = q_bias.shape[3]
    if rank < 1:
        cure = "Pass None for both factors to have no bias."
        raise ArgumentError.explain("q_bias", expected=f"a rank (dim 3) from 1 to {MAX_RANK}", got="0", cure=cure)
    if rank > MAX_RANK:
        cure = "Truncate the factors (SVD), or pass the dense bias as an additive mask."
        raise UnsupportedError.explain("q_bias", expected=f"a rank of at most {MAX_RANK}", got=str(rank), cure=cure)


def _checked_mask(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Returns a valid mask with four dims, broadcast ones of size 1: hooks that copy saved tensors copy no more than it."""
    shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    if not isinstance(mask, Tensor):
        raise ArgumentError.explain("mask", expected=f"a tensor broadcastable to {shape}", got=_shown(mask))
    _check_dense("mask", mask)
    if mask.dtype != torch.bool and mask.dtype not in _DTYPES:
        cure = "A 0/1 mask becomes bool by mask.bool(); True takes part."
        expected = "dtype bool (True takes part) or float (added to the scores)"
        raise ArgumentError.explain("mask", expected=expected, got=_dtype(mask.dtype), cure=cure)
    _check_device("mask", mask, q)
    if mask.requires_grad and torch.is_grad_enabled():
        raise UnsupportedError.explain(
            "mask",
            expected="a mask without gradient",
            got="one with requires_grad=True",
            cure="Pass mask.detach(), and put the learned part of the bias into q_bias and k_bias.",
        )
    fits = mask.dim() <= 4 and all(
        size in (1, full) for size, full in zip(reversed(mask.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ArgumentError.explain(
            "mask",
            expected=f"a shape broadcastable to (B, H, Sq, Sk) = {shape}, aligned right",
            got=_sizes(mask),
            cure="A padding mask (B, Sk) is passed as mask[:, None, None, :].",
        )
    return mask[(None,) * (4 - mask.dim())]


def _scale(softmax_scale: object, q: Tensor) -> float:
    """Returns the scale as a Python float that the arithmetic of ``q``'s dtype can hold."""
    if softmax_scale is None:
        return 1.0 / math.sqrt(q.shape[3])
    scale = float(softmax_scale) if isinstance(softmax_scale, np.integer | np.floating) else softmax_scale
    finite = isinstance(scale, int) or (isinstance(scale, float) and math.isfinite(scale))
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not finite:
        raise ArgumentError.explain("softmax_scale", expected="a finite number or None", got=_shown(softmax_scale))
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if abs(scale) > _LARGEST[dtype]:
        expected = f"at most {_LARGEST[dtype]:.2g} in magnitude, to fit {_dtype(dtype)}"
        raise ArgumentError.explain("softmax_scale", expected=expected, got=_shown(softmax_scale))
    return float(scale)


def _shown(value: object) -> str:
    if isinstance(value, int) and value.bit_length() > _LONGEST_SHOWN:
        return f"an integer of {value.bit_length()} bits"
    kinds = (int, float, str, np.generic)
    return f"{value!r:.60} ({type(value).__name__})" if isinstance(value, kinds) else type(value).__name__


def _sizes(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
