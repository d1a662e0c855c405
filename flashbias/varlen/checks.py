"""The checks of packed arguments: every error says what was expected, what came and what to do.

They look at no value in memory, so a GPU is never waited for.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from flashbias.errors import ArgumentError, UnsupportedError
from flashbias.kernels.problem import MAX_HEAD_DIM
from flashbias.validation import (
    _INTEGERS,
    _check_dense,
    _check_device,
    _check_dtype,
    _check_factor_dtype,
    _check_like_q,
    _check_rank,
    _dtype,
    _shown,
    _sizes,
)

_LONGEST = (1 << 31) - 1  # cu_seqlens counts in 32 bits


def check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises unless packed q, k and v fit together and have kernels or a fallback."""
    _check_layout("q", q, "(Tq, H, D)")
    _check_dtype(q)
    for name, tensor, layout in (("k", k, "(Tk, Hkv, D)"), ("v", v, "(Tk, Hkv, Dv)")):
        _check_layout(name, tensor, layout)
        _check_like_q(name, tensor, q)
    heads, given = q.shape[1], k.shape[1]
    if heads != given and (given == 0 or heads % given):
        raise ArgumentError.explain(
            "k",
            expected=f"{heads} heads (dim 1) as in q, or a divisor of that",
            got=f"{given} in {_sizes(k)}",
            cure="The layout is (tokens, heads, head dim).",
        )
    _check_size("v", v, 1, given, "heads", "k")
    _check_size("k", k, 2, q.shape[2], "head dim", "q")
    _check_size("v", v, 0, k.shape[0], "tokens", "k")
    for name, tensor in (("q", q), ("v", v)):
        _check_head_dim(name, tensor)


def _check_layout(name: str, tensor: object, layout: str) -> None:
    if not isinstance(tensor, Tensor):
        raise ArgumentError.explain(name, expected=f"a tensor {layout}", got=_shown(tensor))
    if tensor.dim() != 3:
        cure = "Sequences follow one another without a batch dim; flash_bias_func takes (B, S, H, D)."
        raise ArgumentError.explain(name, expected=f"3 dims {layout}", got=_sizes(tensor), cure=cure)
    _check_dense(name, tensor)


def _check_size(name: str, tensor: Tensor, dim: int, size: int, meaning: str, owner: str) -> None:
    if tensor.shape[dim] != size:
        expected = f"{meaning} (dim {dim}) {size} as in {owner}"
        raise ArgumentError.explain(name, expected=expected, got=f"{tensor.shape[dim]} in {_sizes(tensor)}")


def _check_head_dim(name: str, tensor: Tensor) -> None:
    if tensor.shape[2] < 1:
        raise ArgumentError.explain(name, expected=f"a head dim (dim 2) from 1 to {MAX_HEAD_DIM}", got=_sizes(tensor))
    if tensor.shape[2] > MAX_HEAD_DIM:
        expected, got = f"a head dim (dim 2) of at most {MAX_HEAD_DIM}", f"{tensor.shape[2]} in {_sizes(tensor)}"
        raise UnsupportedError.explain(name, expected=expected, got=got, cure="Use more, narrower heads.")


def check_sequences(q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> None:
    """Raises unless both are int32 vectors of one length on q's device; their values are not looked at."""
    for name, tensor in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if not isinstance(tensor, Tensor):
            raise ArgumentError.explain(name, expected="an int32 tensor (B + 1,)", got=_shown(tensor))
        if tensor.dim() != 1 or tensor.shape[0] < 1:
            cure = "It is the cumulative sum of the lengths with a 0 in front."
            raise ArgumentError.explain(name, expected="one dim, (B + 1,)", got=_sizes(tensor), cure=cure)
        if tensor.dtype != torch.int32:
            cure = f"Cast it: {name}.int()."
            raise ArgumentError.explain(name, expected="dtype int32", got=_dtype(tensor.dtype), cure=cure)
        _check_dense(name, tensor)
        _check_device(name, tensor, q)
    _check_size("cu_seqlens_k", cu_seqlens_k, 0, cu_seqlens_q.shape[0], "number of sequences + 1", "cu_seqlens_q")
    if max(q.shape[0], k.shape[0]) > _LONGEST:
        got = f"{max(q.shape[0], k.shape[0])} tokens"
        raise UnsupportedError.explain(
            "q and k", expected=f"at most {_LONGEST} tokens", got=got, cure="Split the batch."
        )


def max_seqlen(name: str, value: object, sequences: int, rows: int) -> int:
    """Returns the valid largest length as an int: ``sequences`` of it hold ``rows``."""
    valid = not isinstance(value, bool) and isinstance(value, _INTEGERS)
    if not valid or value < 0:  # type: ignore[operator]
        cure = "Take it from the lengths on the host: reading it from a GPU tensor would wait for the GPU."
        raise ArgumentError.explain(name, expected="a length, a Python int", got=_shown(value), cure=cure)
    length = int(value)  # type: ignore[call-overload]
    if length > _LONGEST:
        raise ArgumentError.explain(name, expected=f"at most {_LONGEST}", got=_shown(value))
    if length * sequences < rows:
        expected = f"at least {rows} tokens over {sequences} sequences"
        cure = "It is the length of the longest sequence."
        raise ArgumentError.explain(name, expected=expected, got=str(length), cure=cure)
    return int(length)


def check_factors(
    q: Tensor, k: Tensor, q_bias: Tensor | None, k_bias: Tensor | None, longest: tuple[int, int], sequences: int
) -> None:
    """Raises unless both factors are there and fit q and k or the ``longest`` sequences, or neither is."""
    if q_bias is None and k_bias is None:
        return
    if q_bias is None or k_bias is None:
        given, missing = ("q_bias", "k_bias") if k_bias is None else ("k_bias", "q_bias")
        raise ArgumentError.explain(
            "q_bias and k_bias",
            expected="both or none",
            got=f"{given} without {missing}",
            cure="The bias is q_bias k_biasᵀ: pass both factors.",
        )
    for name, tensor, owner, length in (("q_bias", q_bias, q, longest[0]), ("k_bias", k_bias, k, longest[1])):
        side = name[0]
        _check_layout(name, tensor, f"(T{side} or max_seqlen_{side}, H or 1, R)")
        _check_factor_dtype(name, tensor, q)
        _check_device(name, tensor, q)
        _check_rows(name, tensor, owner.shape[0], length, sequences)
        heads = {1, q.shape[1], owner.shape[1]}
        if tensor.shape[1] not in heads:
            expected = f"{' or '.join(map(str, sorted(heads)))} heads (dim 1)"
            raise ArgumentError.explain(name, expected=expected, got=f"{tensor.shape[1]} in {_sizes(tensor)}")
    if q_bias.dtype != k_bias.dtype:
        expected, got = f"{_dtype(q_bias.dtype)} as q_bias", _dtype(k_bias.dtype)
        raise ArgumentError.explain("k_bias", expected=expected, got=got, cure="Cast the narrower of the two.")
    _check_size("k_bias", k_bias, 2, q_bias.shape[2], "rank", "q_bias")
    if q_bias.shape[2] < 1:
        cure = "Pass None for both factors to have no bias."
        raise ArgumentError.explain("q_bias", expected="a rank (dim 2) of at least 1", got="0", cure=cure)
    _check_rank(q, q_bias.unsqueeze(0), masked=False)


def _check_rows(name: str, factor: Tensor, tokens: int, longest: int, sequences: int) -> None:
    """Raises unless the factor has a row for each token or for each position, and it is clear which."""
    side, rows = name[0], factor.shape[0]
    if rows not in (tokens, longest):
        raise ArgumentError.explain(
            name,
            expected=f"{tokens} rows (dim 0), one for each token of {side}, or max_seqlen_{side} = {longest}, "
            "one for each position",
            got=f"{rows} in {_sizes(factor)}",
        )
    if tokens == longest and sequences > 1 and tokens > 0:
        raise ArgumentError.explain(
            name,
            expected=f"max_seqlen_{side} below the {tokens} tokens of {side}, to tell rows of tokens from rows of positions",
            got=f"max_seqlen_{side} = {longest} for {sequences} sequences",
            cure=f"Pass the length of the longest sequence as max_seqlen_{side}, and leave empty sequences out if "
            "one has all tokens.",
        )


def causal(
    causal: object, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, equal: bool
) -> Literal[False, "top_left", "bottom_right"]:
    """Returns the valid value of ``causal``: True means "top_left", and only where each length of q is that of k.

    That is so if both ``cu_seqlens`` are one tensor, or ``equal`` says that totals and largest lengths are.
    """
    if isinstance(causal, str) and causal in ("top_left", "bottom_right"):
        return "bottom_right" if causal == "bottom_right" else "top_left"
    if not isinstance(causal, bool | np.bool_):
        expected = 'True, False, "top_left" or "bottom_right"'
        raise ArgumentError.explain("causal", expected=expected, got=_shown(causal))
    if not causal:
        return False
    if cu_seqlens_q is not cu_seqlens_k and not equal:
        raise ArgumentError.explain(
            "causal",
            expected='"top_left" or "bottom_right" where q and k differ in length',
            got="True",
            cure='"bottom_right" lets the last query of each sequence see its last key, as with a cache; "top_left" lets '
            "the first query see the first key alone.",
        )
    return "top_left"
