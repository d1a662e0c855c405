"""The packing kernel: copies both factors, in any layout, into whole aligned 16-byte rows that the others read."""

import triton
import triton.language as tl

from flashbias.kernels.primitives import narrow


@triton.jit
def pack_rows(
    source,
    packed,
    strides,
    start,
    rows,
    nheads,
    seqlen,
    rank,
    ONES: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Packs rows ``start`` … of a (B, S, H, R) factor into a contiguous (B, S, H, COLUMNS) one: zeros after column R.

    ``ONES`` writes 1 into the first column after the factor's own.
    """
    offsets_row = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)
    offsets_column = tl.arange(0, BLOCK_COLUMNS)
    head = offsets_row % nheads
    position = offsets_row // nheads % seqlen
    batch = offsets_row // nheads // seqlen
    inside = (offsets_row < rows)[:, None]
    pointers = source + (batch * strides[0] + position * strides[1] + head * strides[2])[:, None]
    pointers += offsets_column[None, :] * strides[3]
    values = tl.load(pointers, mask=inside & (offsets_column < rank)[None, :], other=0.0).to(tl.float32)
    if ONES:
        values = tl.where((offsets_column == rank)[None, :], 1.0, values)
    pointers = packed + offsets_row[:, None] * COLUMNS + offsets_column[None, :]
    tl.store(pointers, narrow(values, packed.dtype.element_ty), mask=inside & (offsets_column < COLUMNS)[None, :])


@triton.jit
def pack(
    q_bias_ptr,
    k_bias_ptr,
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
    ONES_COLUMN: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Packs BLOCK_ROWS rows: the first programs those of q_bias, the others those of k_bias."""
    tiles_q = tl.cdiv(q_rows, BLOCK_ROWS)
    tile = tl.program_id(0)
    if tile < tiles_q:
        pack_rows(
            q_bias_ptr,
            q_factor_ptr,
            q_bias_strides,
            tile.to(tl.int64) * BLOCK_ROWS,
            q_rows,
            q_nheads,
            seqlen_q,
            rank,
            False,
            COLUMNS,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
        )
    else:
        pack_rows(
            k_bias_ptr,
            k_factor_ptr,
            k_bias_strides,
            (tile - tiles_q).to(tl.int64) * BLOCK_ROWS,
            k_rows,
            k_nheads,
            seqlen_k,
            rank,
            ONES_COLUMN,
            COLUMNS,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
        )
