"""Factors of biases that are linear in the positions: ALiBi (arXiv 2108.12409)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flashbias.errors import ArgumentError
from flashbias.factors import checks


def alibi_slopes(
    nheads: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Tensor:
    """Returns ALiBi's slopes (nheads,), steepest first, all positive.

    They are 2^(-8 i / n) for i = 1 .. n where n is a power of two. Any other number of heads takes the slopes of
    the next lower power of two and then every other one of those of twice as many (arXiv 2108.12409, section 3,
    and its authors' code). Computed in fp64, rounded once.

    Raises:
        ArgumentError: ``nheads`` is no positive integer.

    """
    nheads = checks.count("nheads", nheads)
    power = 1 << (nheads.bit_length() - 1)
    exponents = [-8 * i / power for i in range(1, power + 1)]
    exponents += [-8 * (2 * i + 1) / (2 * power) for i in range(nheads - power)]
    return torch.tensor([2.0**exponent for exponent in exponents], dtype=dtype, device=device)


def alibi(
    nheads: int,
    seqlen_q: int,
    seqlen_k: int | None = None,
    *,
    slopes: Tensor | Sequence[float] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns ALiBi's bias slope_h · (j − i) as factors of rank 1, up to a constant in each row.

    The bias falls with the distance of keys before the query: for causal attention (ALiBi as published). Softmax
    ignores what all keys of a row share, so −slope_h · i is dropped, and with it every question of how queries and
    keys are aligned. Positions are measured from the middle key, which halves the largest one: the product is
    slope_h · (j − seqlen_k // 2). Outputs and gradients are those of the full bias; a log-sum-exp is not, it lacks
    the dropped constant slope_h · (seqlen_k // 2 − i).

    Args:
        nheads: number of heads H.
        seqlen_q: number of queries Sq.
        seqlen_k: number of keys Sk; Sq by default.
        slopes: (H,) slopes, ``alibi_slopes(nheads)`` by default. Gradients reach a tensor that requires them.
        dtype: of both factors. Positions are exact in float32 to 33,554,432 keys, in float16 to 4,096 and in
            bfloat16 to 512; slopes are rounded once, which scales a head's bias as a whole.
        device: of both factors; that of ``slopes`` by default.

    Returns:
        q_bias (1, Sq, H, 1), a view of the slopes, and k_bias (1, Sk, 1, 1), the positions.

    Raises:
        ArgumentError: a size is no positive integer, ``slopes`` is not (H,) or ``dtype`` cannot hold the positions.

    """
    nheads, seqlen_q = checks.count("nheads", nheads), checks.count("seqlen_q", seqlen_q)
    seqlen_k = seqlen_q if seqlen_k is None else checks.count("seqlen_k", seqlen_k)
    centre = seqlen_k // 2
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or centre > torch.finfo(dtype).max:
        expected = f"a float dtype that holds positions to {centre}"
        raise ArgumentError.explain("dtype", expected=expected, got=str(dtype), cure="Take torch.float32.")
    if slopes is None:
        slopes = alibi_slopes(nheads, dtype=dtype, device=device)
    elif not isinstance(slopes, Tensor):
        slopes = torch.tensor(slopes, dtype=dtype, device=device)
    if slopes.shape != (nheads,):
        expected, got = f"one for each head, shape ({nheads},)", f"shape {tuple(slopes.shape)}"
        raise ArgumentError.explain("slopes", expected=expected, got=got)
    slopes = slopes.to(dtype=dtype, device=device)
    positions = torch.arange(seqlen_k, device=slopes.device) - centre
    return slopes.expand(1, seqlen_q, nheads)[..., None], positions.to(dtype)[None, :, None, None]
