"""What kernels that split keys need on the device: a split's share of the tiles, and the kernels that merge the splits.

A kernel that splits runs on a grid of (tiles, splits) and stores what each split found into fp32 scratch, (splits,
rows, width), where a row is one query of one (batch, head). The combining kernels are programs of one row each.
"""

import triton
import triton.language as tl

from flashbias.kernels.primitives import LN2, LOG2E, narrow
from flashbias.kernels.recentring import SUM_COLUMNS, recentred


@triton.jit
def split_tiles(begin, full_first, full_last, end, BLOCK: tl.constexpr):
    """Returns the part of what ``band_tiles`` found that this program's split walks, in the same four words.

    Each split gets whole tiles, as many as any other or one more; with more splits than tiles the last get none.
    """
    split, splits = tl.program_id(1), tl.num_programs(1)
    tiles = tl.cdiv(tl.maximum(end - begin, 0), BLOCK)
    share, more = tiles // splits, tiles % splits
    first = begin + (split * share + tl.minimum(split, more)) * BLOCK
    last = first + (share + tl.where(split < more, 1, 0)) * BLOCK
    full_first = tl.minimum(tl.maximum(full_first, first), last)
    full_last = tl.minimum(tl.maximum(full_last, first), last)
    return first, full_first, full_last, tl.minimum(last, end)


@triton.jit
def store_partial(base, tile, start, seqlen_q, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Stores WIDTH columns of this program's (BLOCK_M, BLOCK_COLUMNS) tile at its (split, row), 0 rows past the end.

    ``base`` is (splits, rows, WIDTH); the first dim of the grid walks the query tiles of one (batch, head) after
    another.
    """
    tiles = tl.cdiv(seqlen_q, BLOCK_M)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    rows = (tl.num_programs(0) // tiles).to(tl.int64) * seqlen_q
    offsets_row = start + tl.arange(0, BLOCK_M)
    offsets_column = tl.arange(0, BLOCK_COLUMNS)
    place = tl.program_id(1) * rows + pair * seqlen_q + offsets_row
    inside = (offsets_row < seqlen_q)[:, None] & (offsets_column < WIDTH)[None, :]
    tl.store(base + place[:, None] * WIDTH + offsets_column[None, :], tile, mask=inside)


@triton.jit
def store_sums(
    dq,
    ds_factor,
    p_factor,
    ds_sum,
    p_sum,
    partial_dq_ptr,
    partial_ds_factor_ptr,
    partial_p_factor_ptr,
    partial_ds_sum_ptr,
    partial_p_sum_ptr,
    start,
    seqlen_q,
    HEAD_DIM: tl.constexpr,
    RANK: tl.constexpr,
    WANT_DQ: tl.constexpr,
    WANT_DQ_BIAS: tl.constexpr,
    ONES_COLUMN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Stores this split's sums over its keys, from which dQ and dQ_bias are made; every column of a sum is the same."""
    if WANT_DQ:
        store_partial(partial_dq_ptr, dq, start, seqlen_q, HEAD_DIM, BLOCK_M, BLOCK_D)
    if WANT_DQ_BIAS:
        store_partial(partial_ds_factor_ptr, ds_factor, start, seqlen_q, RANK, BLOCK_M, RANK)
        store_partial(partial_p_factor_ptr, p_factor, start, seqlen_q, RANK, BLOCK_M, RANK)
        if not ONES_COLUMN:
            store_partial(partial_ds_sum_ptr, ds_sum, start, seqlen_q, 1, BLOCK_M, ds_sum.shape[1])
            store_partial(partial_p_sum_ptr, p_sum, start, seqlen_q, 1, BLOCK_M, p_sum.shape[1])


@triton.jit
def split_rows(base, row, first, splits, rows, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Returns what splits first … first+BLOCK found for ``row``, as a (BLOCK, BLOCK_WIDTH) tile, 0 beyond."""
    offsets_split = first + tl.arange(0, BLOCK)
    offsets_column = tl.arange(0, BLOCK_WIDTH)
    pointers = base + (offsets_split.to(tl.int64) * rows + row)[:, None] * WIDTH + offsets_column[None, :]
    inside = (offsets_split < splits)[:, None] & (offsets_column < WIDTH)[None, :]
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def combine_forward(
    partial_out_ptr,
    partial_max_ptr,
    partial_sum_ptr,
    out_ptr,
    lse_ptr,
    out_strides,
    nheads,
    seqlen_q,
    splits,
    VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """Computes one row of O and LSE.

    Sums are merged by row maxima, not by LSE: next to the -1e9 of an additive mask an LSE has no digits left for them.
    """
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    acc = tl.zeros([BLOCK_DV], tl.float32)
    row_max = -float("inf")
    row_sum = 0.0
    for first in tl.range(0, splits, BLOCK_SPLITS):
        offsets = first + tl.arange(0, BLOCK_SPLITS)
        place = offsets.to(tl.int64) * rows + row
        part_max = tl.load(partial_max_ptr + place, mask=offsets < splits, other=-float("inf"))
        part_sum = tl.load(partial_sum_ptr + place, mask=offsets < splits, other=0.0)
        part_acc = split_rows(partial_out_ptr, row, first, splits, rows, VALUE_DIM, BLOCK_DV, BLOCK_SPLITS)
        new_max = tl.maximum(row_max, tl.max(part_max, 0))
        anchor = tl.where(new_max == -float("inf"), 0.0, new_max)
        share = tl.exp2((part_max - anchor) * LOG2E)
        correction = tl.exp2((row_max - anchor) * LOG2E)
        acc = acc * correction + tl.sum(part_acc * share[:, None], 0)
        row_sum = row_sum * correction + tl.sum(part_sum * share, 0)
        row_max = new_max

    # A row that saw no key in any split has row_sum 0: O is 0 there and LSE -inf.
    divisor = tl.where(row_sum == 0.0, 1.0, row_sum)
    pair, position = row // seqlen_q, row % seqlen_q
    offsets_column = tl.arange(0, BLOCK_DV)
    out_base = out_ptr + pair // nheads * out_strides[0] + position * out_strides[1] + pair % nheads * out_strides[2]
    out = narrow(acc / divisor, out_ptr.dtype.element_ty)
    tl.store(out_base + offsets_column, out, mask=offsets_column < VALUE_DIM)
    tl.store(lse_ptr + row, row_max + tl.log2(divisor) * LN2)


@triton.jit
def total(base, row, splits, rows, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Returns the sum over all splits of what they found for ``row``, as a (1, BLOCK_WIDTH) tile."""
    found = tl.zeros([BLOCK_WIDTH], tl.float32)
    for first in tl.range(0, splits, BLOCK):
        found += tl.sum(split_rows(base, row, first, splits, rows, WIDTH, BLOCK_WIDTH, BLOCK), 0)
    return found[None, :]


@triton.jit
def combine_dq(
    partial_dq_ptr,
    partial_ds_factor_ptr,
    partial_p_factor_ptr,
    partial_ds_sum_ptr,
    partial_p_sum_ptr,
    lse_ptr,
    dlse_ptr,
    dq_ptr,
    dq_bias_ptr,
    dq_strides,
    dq_bias_strides,
    nheads,
    seqlen_q,
    has_dlse,
    rank,
    splits,
    scale,
    HEAD_DIM: tl.constexpr,
    RANK: tl.constexpr,
    WANT_DQ: tl.constexpr,
    WANT_DQ_BIAS: tl.constexpr,
    ONES_COLUMN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """Computes one row of dQ and dQ_bias; only the sums over all keys can be recentred."""
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    pair, position = row // seqlen_q, row % seqlen_q
    batch, head = pair // nheads, pair % nheads
    if WANT_DQ:
        dq = total(partial_dq_ptr, row, splits, rows, HEAD_DIM, BLOCK_D, BLOCK_SPLITS) * scale
        dq_base = dq_ptr + batch * dq_strides[0] + position * dq_strides[1] + head * dq_strides[2]
        offsets_column = tl.arange(0, BLOCK_D)[None, :]
        tl.store(dq_base + offsets_column, narrow(dq, dq_ptr.dtype.element_ty), mask=offsets_column < HEAD_DIM)
    if WANT_DQ_BIAS:
        ds_factor = total(partial_ds_factor_ptr, row, splits, rows, RANK, RANK, BLOCK_SPLITS)
        p_factor = total(partial_p_factor_ptr, row, splits, rows, RANK, RANK, BLOCK_SPLITS)
        ds_sum = tl.zeros([1, SUM_COLUMNS], tl.float32)
        p_sum = ds_sum
        if not ONES_COLUMN:
            ds_sum += total(partial_ds_sum_ptr, row, splits, rows, 1, 1, BLOCK_SPLITS)
            p_sum += total(partial_p_sum_ptr, row, splits, rows, 1, 1, BLOCK_SPLITS)
        one = tl.arange(0, 1)
        lse = tl.load(lse_ptr + row + one)
        given = (has_dlse != 0) & (lse != -float("inf"))
        dlse = tl.load(dlse_ptr + row + one, mask=given, other=0.0).to(tl.float32)
        dq_factor = recentred(ds_factor, p_factor, ds_sum, p_sum, dlse, rank, ONES_COLUMN)
        base = dq_bias_ptr + batch * dq_bias_strides[0] + position * dq_bias_strides[1] + head * dq_bias_strides[2]
        offsets_rank = tl.arange(0, RANK)[None, :]
        tl.store(base + offsets_rank, dq_factor, mask=offsets_rank < rank)
