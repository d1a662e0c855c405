"""What the kernels do for packed sequences of different lengths, and the sum of gradients over sequences."""

import triton
import triton.language as tl


@triton.jit
def sequence(
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    batch,
    sequence_facts,
    seqlen_q,
    seqlen_k,
    low,
    high,
    VARLEN: tl.constexpr,
):
    """Returns (first query, first key, queries, keys, low, high) of sequence ``batch``.

    The first rows are what batch strides count: of packed tensors (``VARLEN``) these are row strides, 0 for a factor
    that every sequence reads from its start. ``sequence_facts`` is (rows of q in all, whether the band is aligned
    bottom-right). Lengths end at ``seqlen_q`` and ``seqlen_k``, the largest ones, which those factors end at.
    """
    if not VARLEN:
        return batch, batch, seqlen_q, seqlen_k, low, high
    else:
        first_q = tl.load(cu_seqlens_q_ptr + batch)
        first_k = tl.load(cu_seqlens_k_ptr + batch)
        length_q = tl.minimum(tl.load(cu_seqlens_q_ptr + batch + 1) - first_q, seqlen_q)
        length_k = tl.minimum(tl.load(cu_seqlens_k_ptr + batch + 1) - first_k, seqlen_k)
        shift = (length_k - length_q) * sequence_facts[1]
        return first_q.to(tl.int64), first_k.to(tl.int64), length_q, length_k, low - shift, high + shift


@triton.jit
def sum_positions(
    cu_seqlens_ptr,
    packed_ptr,
    total_ptr,
    batches,
    positions,
    columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Computes BLOCK_ROWS x BLOCK_COLUMNS numbers of ``total`` (positions, columns), summed over sequences in their order.

    ``packed`` (rows of all sequences, columns) and ``total`` are contiguous fp32.
    """
    column_tiles = tl.cdiv(columns, BLOCK_COLUMNS)
    program = tl.program_id(0)
    offsets_position = program // column_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    offsets_column = program % column_tiles * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (offsets_position < positions)[:, None] & (offsets_column < columns)[None, :]
    acc = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for batch in tl.range(0, batches):
        first = tl.load(cu_seqlens_ptr + batch)
        length = tl.load(cu_seqlens_ptr + batch + 1) - first
        rows = first.to(tl.int64) + offsets_position
        pointers = packed_ptr + rows[:, None] * columns + offsets_column[None, :]
        acc += tl.load(pointers, mask=inside & (offsets_position < length)[:, None], other=0.0)
    pointers = total_ptr + offsets_position.to(tl.int64)[:, None] * columns + offsets_column[None, :]
    tl.store(pointers, acc, mask=inside)
