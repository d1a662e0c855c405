"""The packing kernel: copies both factors, in any layout and precision, into whole aligned rows that the others read."""

import triton
import triton.language as tl

from flashbias.kernels.primitives import narrow


@triton.jit
def part(values, INDEX: tl.constexpr, dtype: tl.constexpr):
    """Returns part INDEX of fp32 ``values`` split into numbers of ``dtype``: what the parts before it left."""
    found = narrow(values, dtype)
    for _ in tl.static_range(INDEX):
        values -= found.to(tl.float32)
        found = narrow(values, dtype)
    return found


@triton.jit
def factor_rows(
    source,
    strides,
    start,
    rows,
    nheads,
    seqlen,
    columns,
    inside_columns,
    BLOCK_ROWS: tl.constexpr,
):
    """Returns rows ``start`` … of a (B, S, H, R) factor in fp32 and which of them exist, as (values, inside).

    ``columns`` says which column each column of the tile is, 0 where it is not in ``inside_columns``.
    """
    offsets_row = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)
    head = offsets_row % nheads
    position = offsets_row // nheads % seqlen
    batch = offsets_row // nheads // seqlen
    inside = (offsets_row < rows)[:, None]
    pointers = source + (batch * strides[0] + position * strides[1] + head * strides[2])[:, None]
    pointers += columns[None, :] * strides[3]
    return tl.load(pointers, mask=inside & inside_columns[None, :], other=0.0).to(tl.float32), inside


@triton.jit
def peak_rows(
    source, peaks_ptr, strides, start, rows, nheads, seqlen, rank, BLOCK_ROWS: tl.constexpr, BLOCK_RANK: tl.constexpr
):
    """Raises the largest magnitude of each column, kept as the bits of an fp32 number, to that of these rows.

    Bits of positive numbers sort as the numbers do, and a maximum is the same in any order: atomics stay repeatable.
    """
    columns = tl.arange(0, BLOCK_RANK)
    values, _ = factor_rows(source, strides, start, rows, nheads, seqlen, columns, columns < rank, BLOCK_ROWS)
    bits = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    tl.atomic_max(peaks_ptr + columns, tl.max(bits, 0), mask=columns < rank, sem="relaxed")


@triton.jit
def find_peaks(
    q_bias_ptr,
    k_bias_ptr,
    peaks_ptr,
    q_bias_strides,
    k_bias_strides,
    q_rows,
    k_rows,
    q_nheads,
    k_nheads,
    seqlen_q,
    seqlen_k,
    rank,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """Finds the largest magnitude of each column of q_bias (first row of the zeroed ``peaks``) and k_bias (second row)."""
    tiles_q = tl.cdiv(q_rows, BLOCK_ROWS)
    tile = tl.program_id(0)
    start = tl.where(tile < tiles_q, tile, tile - tiles_q).to(tl.int64) * BLOCK_ROWS
    if tile < tiles_q:
        peak_rows(
            q_bias_ptr, peaks_ptr, q_bias_strides, start, q_rows, q_nheads, seqlen_q, rank, BLOCK_ROWS, BLOCK_RANK
        )
    else:
        peak_rows(
            k_bias_ptr,
            peaks_ptr + rank,
            k_bias_strides,
            start,
            k_rows,
            k_nheads,
            seqlen_k,
            rank,
            BLOCK_ROWS,
            BLOCK_RANK,
        )


@triton.jit
def balance(peaks_ptr, column, rank):
    """Returns half the distance of both factors' largest exponents, per column: q_bias · 2^b, k_bias · 2^-b are even."""
    q_peak = tl.load(peaks_ptr + column)
    k_peak = tl.load(peaks_ptr + rank + column)
    half = ((k_peak >> 23) - (q_peak >> 23)) >> 1
    return tl.where((q_peak > 0) & (k_peak > 0), tl.minimum(tl.maximum(half, -126), 126), 0)


@triton.jit
def pack_rows(
    source,
    packed,
    peaks_ptr,
    strides,
    start,
    rows,
    nheads,
    seqlen,
    rank,
    factor_columns,
    BLOCKS: tl.constexpr,
    PARTS: tl.constexpr,
    BALANCED: tl.constexpr,
    SIGN: tl.constexpr,
    ONES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Packs rows ``start`` … of a (B, S, H, R) factor into a contiguous (B, S, H, factor_columns) one.

    Each of BLOCKS blocks of R columns holds one part of the factor, block b the one in bits 2b and 2b + 1 of PARTS;
    times 2^(SIGN · balance) where it is ``BALANCED``. After them comes a column of ones if ``ONES``, then zeros.
    """
    offsets_column = tl.arange(0, BLOCK_COLUMNS)
    block = offsets_column // rank
    column = offsets_column % rank
    values, inside = factor_rows(source, strides, start, rows, nheads, seqlen, column, block < BLOCKS, BLOCK_ROWS)
    if BALANCED:
        exponent = 127 + SIGN * balance(peaks_ptr, column, rank)
        values *= (exponent << 23).to(tl.float32, bitcast=True)[None, :]
    dtype: tl.constexpr = packed.dtype.element_ty
    chosen = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for index in tl.static_range(BLOCKS):
        values_part = part(values, (PARTS >> (2 * index)) & 3, dtype).to(tl.float32)
        chosen = tl.where((block == index)[None, :], values_part, chosen)
    if ONES:
        chosen = tl.where((offsets_column == BLOCKS * rank)[None, :], 1.0, chosen)
    offsets_row = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)
    pointers = packed + offsets_row[:, None] * factor_columns + offsets_column[None, :]
    tl.store(pointers, narrow(chosen, dtype), mask=inside & (offsets_column < factor_columns)[None, :])


@triton.jit
def pack(
    q_bias_ptr,
    k_bias_ptr,
    peaks_ptr,
    q_factor_ptr,
    k_factor_ptr,
    q_bias_strides,
    k_bias_strides,
    q_rows,
    k_rows,
    q_nheads,
    k_nheads,
    seqlen_q,
    seqlen_k,
    rank,
    factor_columns,
    BLOCKS: tl.constexpr,
    Q_PARTS: tl.constexpr,
    K_PARTS: tl.constexpr,
    BALANCED: tl.constexpr,
    ONES_COLUMN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Packs BLOCK_ROWS rows: the first programs those of q_bias, the others those of k_bias."""
    tiles_q = tl.cdiv(q_rows, BLOCK_ROWS)
    tile = tl.program_id(0)
    start = tl.where(tile < tiles_q, tile, tile - tiles_q).to(tl.int64) * BLOCK_ROWS
    if tile < tiles_q:
        pack_rows(
            q_bias_ptr,
            q_factor_ptr,
            peaks_ptr,
            q_bias_strides,
            start,
            q_rows,
            q_nheads,
            seqlen_q,
            rank,
            factor_columns,
            BLOCKS,
            Q_PARTS,
            BALANCED,
            1,
            False,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
        )
    else:
        pack_rows(
            k_bias_ptr,
            k_factor_ptr,
            peaks_ptr,
            k_bias_strides,
            start,
            k_rows,
            k_nheads,
            seqlen_k,
            rank,
            factor_columns,
            BLOCKS,
            K_PARTS,
            BALANCED,
            -1,
            ONES_COLUMN,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
        )
