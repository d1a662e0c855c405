"""Biases that are learned as a table over relative positions: Swin's and T5's, dense and as factors."""

from __future__ import annotations

import bisect

import torch
from torch import Tensor

from flashbias.errors import ArgumentError
from flashbias.factors import checks
from flashbias.factors.dense import from_dense


def swin_table(table: Tensor, window: int | tuple[int, int]) -> Tensor:
    """Returns the dense bias (H, h w, h w) of a Swin-style table over relative positions in a window.

    Tokens are numbered row by row. Query (y, x) and key (y', x') take the table's row
    (y − y' + h − 1) (2w − 1) + x − x' + w − 1: the layout of Swin (arXiv 2103.14030) and, after its small network has
    been evaluated on its grid of log-spaced coordinates (16 · sigmoid included), of Swin V2 (arXiv 2111.09883).
    Give it to ``from_dense``. Gradients reach the table.

    Args:
        table: ((2h − 1) (2w − 1), H).
        window: the window's height and width (h, w), or one number for a square.

    Raises:
        ArgumentError: the window is no positive size or the table does not belong to it.

    """
    sides = window if isinstance(window, tuple) and len(window) == 2 else (window, window)
    height, width = (checks.count("window", side) for side in sides)
    table = checks.floats("table", table, "((2h - 1) (2w - 1), H)", (2,))
    if table.shape[0] != (2 * height - 1) * (2 * width - 1):
        expected = f"{(2 * height - 1) * (2 * width - 1)} rows for a window of {height} x {width}"
        raise ArgumentError.explain("table", expected=expected, got=f"shape {tuple(table.shape)}")
    rows, columns = (torch.arange(size, device=table.device) for size in (height, width))
    down = rows[:, None, None, None] - rows[:, None] + height - 1
    right = columns[:, None, None] - columns + width - 1
    index = (down * (2 * width - 1) + right).reshape(height * width, -1)
    return table[index].permute(2, 0, 1)


def t5_table(
    table: Tensor,
    seqlen_q: int,
    seqlen_k: int | None = None,
    *,
    bidirectional: bool = True,
    max_distance: int = 128,
    query_offset: int = 0,
) -> Tensor:
    """Returns T5's dense bias (H, Sq, Sk): table[bucket(j − i)] (arXiv 1910.10683). Gradients reach the table.

    With n the distance into one direction and N the buckets for that direction, bucket n serves each n < N // 2, the
    others are spaced evenly in log n up to ``max_distance``, and the last serves all beyond. ``bidirectional`` gives
    keys before the query the first half of the table, keys after it the second; else those after it count as n = 0.
    Bounds between buckets are computed in integers, so no rounding of a logarithm moves one.

    Args:
        table: (buckets, H), the embedding's weight.
        seqlen_q: number of queries Sq.
        seqlen_k: number of keys Sk; Sq by default.
        bidirectional: True for encoders, False for causal decoders.
        max_distance: distance from which on all keys share a bucket.
        query_offset: the position of the first query among the keys, Sk − Sq when new tokens meet a cache.

    Raises:
        ArgumentError: an argument has a wrong type, shape or value, or there are too few buckets.

    """
    table = checks.floats("table", table, "(buckets, H)", (2,))
    seqlen_q = checks.count("seqlen_q", seqlen_q)
    seqlen_k = seqlen_q if seqlen_k is None else checks.count("seqlen_k", seqlen_k)
    offset, max_distance = checks.count("query_offset", query_offset, 0), checks.count("max_distance", max_distance)
    buckets = len(table) // 2 if bidirectional else len(table)
    if buckets < 2 or (bidirectional and len(table) % 2):
        expected = "an even number of buckets (dim 0), at least 4" if bidirectional else "at least 2 buckets (dim 0)"
        raise ArgumentError.explain("table", expected=expected, got=f"shape {tuple(table.shape)}")
    bounds = torch.tensor(_bounds(buckets, max_distance), device=table.device)
    reach = torch.arange(-(seqlen_q - 1) - offset, seqlen_k - offset, device=table.device)  # every j - i, in order
    before = torch.bucketize(-reach, bounds, right=True)
    after = torch.bucketize(reach, bounds, right=True) + buckets
    of_reach = table[torch.where(reach > 0, after, before) if bidirectional else before]
    rows, keys = torch.arange(seqlen_q, device=table.device), torch.arange(seqlen_k, device=table.device)
    return of_reach.mT[:, keys - rows[:, None] + seqlen_q - 1]


def t5_relative(
    table: Tensor,
    seqlen_q: int,
    seqlen_k: int | None = None,
    *,
    bidirectional: bool = True,
    max_distance: int = 128,
    query_offset: int = 0,
    rank: int | None = None,
    energy: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns T5's relative bias as factors: ``from_dense`` of ``t5_table``, which see for arguments and gradients.

    A bias of steps along diagonals has full rank, so this is an approximation, exact only from rank min(Sq, Sk) on.
    How good depends on the table: ``approximation(t5_table(...), q_bias, k_bias)`` tells.

    Returns:
        q_bias (1, Sq, H, R) and k_bias (1, Sk, H, R), in fp64 if the table is, else fp32.

    Raises:
        ArgumentError: as ``t5_table`` and ``from_dense``.

    """
    dense = t5_table(
        table,
        seqlen_q,
        seqlen_k,
        bidirectional=bidirectional,
        max_distance=max_distance,
        query_offset=query_offset,
    )
    return from_dense(dense, rank=rank, energy=energy)


def _bounds(buckets: int, max_distance: int) -> list[int]:
    """Returns the first distance of each bucket but the first: 1, 2, .. and from buckets // 2 on evenly in the logarithm.

    Distance n has reached the k-th logarithmic bucket if (n / e)^m >= (max_distance / e)^k, with e = buckets // 2 and
    m = buckets - e.
    """
    exact = buckets // 2
    if max_distance <= exact:
        raise ArgumentError.explain(
            "max_distance",
            expected=f"more than {exact}, the distances with a bucket of their own",
            got=str(max_distance),
        )
    steps, distances = buckets - exact, range(exact, max_distance + 1)

    def first(k: int) -> int:
        needed = max_distance**k * exact ** (steps - k)
        return distances[bisect.bisect_left(distances, True, key=lambda n: n**steps >= needed)]

    return [*range(1, exact + 1), *(first(k) for k in range(1, steps))]
