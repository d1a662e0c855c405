"""The public operator for packed sequences of different lengths."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from flashbias import validation
from flashbias.precision import Precision, chosen
from flashbias.varlen import checks, ops
from flashbias.varlen.band import Causal, sequence_band
from flashbias.varlen.sequences import Sequences


@overload
def flash_bias_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    causal: Causal = False,
    softmax_scale: float | None = None,
    *,
    window_size: tuple[int, int] = (-1, -1),
    return_lse: Literal[False] = False,
    deterministic: bool | None = None,
    dropout_p: float = 0.0,
    precision: Precision | None = None,
) -> Tensor: ...


@overload
def flash_bias_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    causal: Causal = False,
    softmax_scale: float | None = None,
    *,
    window_size: tuple[int, int] = (-1, -1),
    return_lse: Literal[True],
    deterministic: bool | None = None,
    dropout_p: float = 0.0,
    precision: Precision | None = None,
) -> tuple[Tensor, Tensor]: ...


def flash_bias_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    causal: Causal = False,
    softmax_scale: float | None = None,
    *,
    window_size: tuple[int, int] = (-1, -1),
    return_lse: bool = False,
    deterministic: bool | None = None,
    dropout_p: float = 0.0,
    precision: Precision | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Returns what ``flash_bias_func`` does, for B sequences of different lengths without padding.

    Their tokens follow one another: rows ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1]`` of q are the queries of
    sequence b, which see the keys of sequence b alone. Either may be empty. Tq and Tk are the tokens of all sequences;
    H, Hkv, D, Dv and R are those of ``flash_bias_func``.

    Args:
        q: (Tq, H, D), float16, bfloat16 or float32; on a CPU also float64. Any strides.
        k: (Tk, Hkv, D), dtype and device of q. Query head h reads key head h // (H // Hkv).
        v: (Tk, Hkv, Dv), as k.
        cu_seqlens_q: (B + 1,) int32 on q's device, as in the package flash-attn: starts at 0, never falls, ends at Tq.
            On a CPU that is checked. On a GPU it is not, because the host would have to wait for it: rows that belong to
            no sequence, or lie past the first ``max_seqlen_q`` of one, then have undefined results and gradients, and
            numbers beyond Tq are read and written there.
        cu_seqlens_k: (B + 1,) int32, the same for keys, ending at Tk.
        max_seqlen_q: an int, the length of the longest sequence of q. More is right too, and slower.
        max_seqlen_k: an int, that of the longest sequence of keys; keys past it are not seen.
        q_bias: the bias's left factor, in one of two layouts: (Tq, H or 1, R), a row for each token, or
            (max_seqlen_q, H or 1, R), a row for each position, which every sequence reads from its start. They are told
            apart by their rows, so several sequences whose ``max_seqlen_q`` is Tq are refused.
        k_bias: (Tk or max_seqlen_k, H or Hkv or 1, R), its right factor, in a layout of its own. Both or none; dtypes
            and ranks are those of ``flash_bias_func``.
        causal: "top_left": query i of a sequence sees its keys j <= i. "bottom_right": the last query of each sequence
            sees its last key. True: as "top_left", accepted where lengths of queries and keys are plainly the same: both
            ``cu_seqlens`` are one tensor, or Tq is Tk and ``max_seqlen_q`` is ``max_seqlen_k``.
        softmax_scale: factor of q kᵀ; 1/sqrt(D) by default.
        window_size: (left, right) as in ``flash_bias_func``, in each sequence: query i stands at key
            p = i + keys - queries (p = i with a top-left ``causal``) and sees keys p - left to p + right.
        return_lse: whether to return the log-sum-exp of the scores too.
        deterministic: gradients are always bitwise repeatable; True, False and None are accepted and mean the same.
        dropout_p: must be 0; there is no attention dropout.
        precision: how float32 q, k and v on a GPU are multiplied, as in ``flash_bias_func``.

    There is no mask: leave tokens that take no part out of the sequences, or pad the batch and use ``flash_bias_func``.

    Returns:
        (Tq, H, Dv) in q's dtype. A query without any key gives 0. With ``return_lse``, also (H, Tq) in fp32 (fp64 for
        fp64 inputs), in nats, bias included, -inf for a query without any key. Both are differentiable once, with
        respect to any subset of q, k, v, q_bias and k_bias; a gradient has its input's own shape and dtype, that of a
        factor with a row for each position is summed over the sequences. Where kernels run, nothing waits for
        the GPU, so that a call can be captured in a CUDA graph once its kernels were proven by the same call before.
        Without kernels (nothing proven here) the host reads where sequences end.

    Raises:
        ArgumentError: an argument has a wrong type, shape, dtype, device or value (it is a ValueError).
        UnsupportedError: a sensible call that this version cannot compute (it is a NotImplementedError).

    """
    checks.check_inputs(q, k, v)
    checks.check_sequences(q, k, cu_seqlens_q, cu_seqlens_k)
    count = cu_seqlens_q.shape[0] - 1
    longest_q = checks.max_seqlen("max_seqlen_q", max_seqlen_q, count, q.shape[0])
    longest_k = checks.max_seqlen("max_seqlen_k", max_seqlen_k, count, k.shape[0])
    checks.check_factors(q, k, q_bias, k_bias, (longest_q, longest_k), count)
    validation.check_switches(return_lse, deterministic, dropout_p)
    equal = longest_q == longest_k and q.shape[0] == k.shape[0]
    aligned = checks.causal(causal, cu_seqlens_q, cu_seqlens_k, equal)
    band, shifted = sequence_band(aligned, validation.window(window_size), longest_q, longest_k)
    packed = Sequences(cu_seqlens_q, cu_seqlens_k, longest_q, longest_k, shifted)
    scale = validation.scale(softmax_scale, q.unsqueeze(0))
    out, lse = ops.attention(q, k, v, q_bias, k_bias, packed, band, scale, chosen(precision, q))
    return (out, lse) if return_lse else out
