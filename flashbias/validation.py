"""The checks of the operator's arguments: every error says what was expected, what came and what to do."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from flashbias.errors import ArgumentError, UnsupportedError
from flashbias.kernels.factors import part_pairs
from flashbias.kernels.problem import MAX_HEAD_DIM, MAX_RANK

HALF_DTYPES = (torch.float16, torch.bfloat16)
_DTYPES = (*HALF_DTYPES, torch.float32, torch.float64)
_LARGEST = {dtype: torch.finfo(dtype).max for dtype in (torch.float32, torch.float64)}
# Tuples, not unions: torch.compile traces these checks and knows no union with a class of NumPy's.
_NUMPY_NUMBERS = (np.integer, np.floating)
_NUMBERS = (int, float)
_INTEGERS = (int, np.integer)
_WIDEST = 1 << 30  # no tensor has as many keys, and kernels count in 32 bits
_PAIRS = (tuple, list)
_LONGEST_SHOWN = 200  # bits: Python refuses to print integers of more than 4300 digits


def check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises unless q, k and v fit together and have kernels or a fallback."""
    _check_layout("q", q, "(B, Sq, H, D)")
    _check_dtype(q)
    for name, tensor, layout in (("k", k, "(B, Sk, Hkv, D)"), ("v", v, "(B, Sk, Hkv, Dv)")):
        _check_layout(name, tensor, layout)
        _check_like_q(name, tensor, q)
        _check_size(name, tensor, 0, q.shape[0], "batch", "q")
    _check_heads(q, k)
    _check_size("v", v, 2, k.shape[2], "heads", "k")
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
        raise ArgumentError.explain("q", expected="dtype float16, bfloat16 or float32", got=_dtype(q.dtype), cure=cure)
    if q.device.type == "cuda" and q.dtype == torch.float64:
        raise UnsupportedError.explain(
            "q",
            expected="dtype float16, bfloat16 or float32 on a GPU",
            got=_dtype(q.dtype),
            cure="Cast q, k, v and the factors (.float()), or run on the CPU.",
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


def _check_heads(q: Tensor, k: Tensor) -> None:
    heads, given = q.shape[2], k.shape[2]
    if heads == given or (given > 0 and heads % given == 0):
        return
    raise ArgumentError.explain(
        "k",
        expected=f"{heads} heads (dim 2) as in q, or a divisor of that",
        got=f"{given} in {_sizes(k)}",
        cure="The layout is (B, S, H, D); transpose(1, 2) turns (B, H, S, D) into it.",
    )


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


def check_factors(q: Tensor, k: Tensor, q_bias: Tensor | None, k_bias: Tensor | None) -> None:
    """Raises unless both factors are there and fit q and k, or neither is."""
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
        _check_device(name, tensor, q)
        _check_size(name, tensor, 1, length, "length", owner)
        for dim, meaning in ((0, "batch"), (2, "heads")):
            shared = dim == 2 and name == "k_bias" and tensor.shape[2] == k.shape[2]
            if tensor.shape[dim] != 1 and not shared:
                _check_size(name, tensor, dim, q.shape[dim], f"{meaning} 1 or", "q")
    if q_bias.dtype != k_bias.dtype:
        expected, got = f"{_dtype(q_bias.dtype)} as q_bias", _dtype(k_bias.dtype)
        raise ArgumentError.explain("k_bias", expected=expected, got=got, cure="Cast the narrower of the two.")
    _check_size("k_bias", k_bias, 3, q_bias.shape[3], "rank", "q_bias")
    _check_rank(q, q_bias)


def _check_factor_dtype(name: str, factor: Tensor, q: Tensor) -> None:
    if factor.dtype not in (q.dtype, torch.float32, torch.float64):
        raise ArgumentError.explain(
            name,
            expected=f"{_dtype(q.dtype)} as q, float32 or float64",
            got=_dtype(factor.dtype),
            cure=f"Cast it: {name}.float() keeps every bit.",
        )


def _check_rank(q: Tensor, q_bias: Tensor, *, masked: bool = True) -> None:
    """Raises unless there are kernels for this rank; ``masked`` says that a mask could hold what is beyond it."""
    rank = q_bias.shape[3]
    split = q_bias.dtype != q.dtype and q.dtype in HALF_DTYPES
    limit = MAX_RANK // len(part_pairs(_dtype(q.dtype))) if split else MAX_RANK
    if rank < 1:
        cure = "Pass None for both factors to have no bias."
        raise ArgumentError.explain("q_bias", expected=f"a rank (dim 3) from 1 to {limit}", got="0", cure=cure)
    if rank > limit:
        beside = f" for {_dtype(q_bias.dtype)} factors beside {_dtype(q.dtype)}" if split else ""
        cure = "Cast the factors to q's dtype" if split else "Truncate the factors (SVD)"
        if masked:
            what = "the columns that need it least" if split else "the dense bias"
            cure = f"{cure}, or pass {what} as an additive mask"
        raise UnsupportedError.explain(
            "q_bias", expected=f"a rank of at most {limit}{beside}", got=str(rank), cure=f"{cure}."
        )


def checked_mask(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
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
    if mask.is_leaf and mask.requires_grad and 0 in mask.stride():
        mask = mask.contiguous()  # whoever makes copies a leaf asks for the gradient of each
    return mask[(None,) * (4 - mask.dim())]


def scale(softmax_scale: object, q: Tensor) -> float:
    """Returns the scale as a Python float that the arithmetic of ``q``'s dtype can hold."""
    if softmax_scale is None:
        return 1.0 / math.sqrt(q.shape[3])
    scale = float(softmax_scale) if isinstance(softmax_scale, _NUMPY_NUMBERS) else softmax_scale
    # Compared, not math.isfinite: in a dynamic graph the scale is a symbol.
    if not isinstance(scale, _NUMBERS) or isinstance(scale, bool) or abs(scale) == math.inf or scale != scale:  # noqa: PLR0124
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


def causal(causal: object) -> bool | Literal["bottom_right"]:
    """Returns the valid value of ``causal``; raises ArgumentError."""
    if isinstance(causal, str) and causal == "bottom_right":
        return "bottom_right"
    if not isinstance(causal, bool | np.bool_):
        raise ArgumentError.explain("causal", expected='True, False or "bottom_right"', got=_shown(causal))
    return bool(causal)


def window(window: object) -> tuple[int, int]:
    """Returns the valid (left, right) of ``window_size``; raises ArgumentError."""
    if isinstance(window, _PAIRS) and len(window) == 2:
        left, right = window
        if all(isinstance(side, _INTEGERS) and not isinstance(side, bool) and side >= -1 for side in window):
            return min(int(left), _WIDEST), min(int(right), _WIDEST)
    cure = "(-1, -1) is no window; one of 1024 keys, a query's own the last, is (1023, 0)."
    raise ArgumentError.explain(
        "window_size", expected="(left, right), each a number of keys or -1 for no limit", got=_shown(window), cure=cure
    )


def check_switches(return_lse: object, deterministic: object, dropout_p: object) -> None:
    """Raises for a ``return_lse`` or ``deterministic`` that is no switch and for any dropout."""
    if not isinstance(return_lse, bool | np.bool_):
        raise ArgumentError.explain("return_lse", expected="True or False", got=_shown(return_lse))
    if deterministic is not None and not isinstance(deterministic, bool | np.bool_):
        raise ArgumentError.explain("deterministic", expected="True, False or None", got=_shown(deterministic))
    if not isinstance(dropout_p, _NUMBERS) or dropout_p != 0:
        raise UnsupportedError.explain(
            "dropout_p",
            expected="0: attention dropout is not supported",
            got=_shown(dropout_p),
            cure="Apply dropout to the output, or use torch.nn.functional.scaled_dot_product_attention for this layer.",
        )
