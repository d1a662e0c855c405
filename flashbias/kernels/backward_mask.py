"""The gradient of an additive mask, summed over the dims the mask was broadcast in: a pass of its own.

A program owns one tile of the mask's own shape and walks everything that was broadcast into it, so there are no
atomics and no tensor of all scores, unless the mask itself is one. A mask without keys needs no kernel: a row of dS
sums to dLSE.
"""

import triton
import triton.language as tl

from flashbias.kernels.primitives import (
    blind_rows_high,
    dot,
    exp_difference,
    load_row_values,
    load_tile,
    masked,
    narrow,
    scores,
)


@triton.jit
def score_gradient(
    batch,
    head,
    start_q,
    start_k,
    q_ptr,
    k_ptr,
    v_ptr,
    q_factor_ptr,
    k_factor_ptr,
    mask_ptr,
    lse_ptr,
    dout_ptr,
    delta_ptr,
    q_strides,
    k_strides,
    v_strides,
    q_factor_strides,
    k_factor_strides,
    mask_strides,
    dout_strides,
    nheads,
    group,
    factor_group,
    seqlen_q,
    seqlen_k,
    low,
    high,
    factor_columns,
    scale,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    RANK: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Returns dS of one (BLOCK_M, BLOCK_N) tile of scores in fp32, 0 outside the matrix."""
    kv_head = head // group
    offsets_q = start_q + tl.arange(0, BLOCK_M)
    offsets_k = start_k + tl.arange(0, BLOCK_N)
    q_base = q_ptr + batch * q_strides[0] + head * q_strides[2]
    k_base = k_ptr + batch * k_strides[0] + kv_head * k_strides[2]
    v_base = v_ptr + batch * v_strides[0] + kv_head * v_strides[2]
    dout_base = dout_ptr + batch * dout_strides[0] + head * dout_strides[2]
    mask_base = mask_ptr + batch * mask_strides[0] + head * mask_strides[1]
    row_base = (batch * nheads + head) * seqlen_q
    FULL: tl.constexpr = HEAD_DIM == BLOCK_D
    FULL_VALUE: tl.constexpr = VALUE_DIM == BLOCK_DV
    q = load_tile(q_base, start_q, q_strides[1], seqlen_q, HEAD_DIM, BLOCK_M, BLOCK_D, False, FULL, True)
    k = load_tile(k_base, start_k, k_strides[1], seqlen_k, HEAD_DIM, BLOCK_N, BLOCK_D, False, FULL, True)
    q_factor = q
    k_factor = k
    if RANK > 0:
        q_factor_base = q_factor_ptr + batch * q_factor_strides[0] + head * q_factor_strides[2]
        k_factor_base = k_factor_ptr + batch * k_factor_strides[0] + head // factor_group * k_factor_strides[2]
        q_factor = load_tile(
            q_factor_base, start_q, q_factor_strides[1], seqlen_q, factor_columns, BLOCK_M, RANK, False, False, True
        )
        k_factor = load_tile(
            k_factor_base, start_k, k_factor_strides[1], seqlen_k, factor_columns, BLOCK_N, RANK, False, False, True
        )
    s = scores(q, k, q_factor, k_factor, scale, RANK, PRECISION)
    s = masked(
        s,
        offsets_q[:, None],
        offsets_k[None, :],
        mask_base,
        mask_strides,
        seqlen_q,
        seqlen_k,
        low,
        high,
        MASK,
        LOW,
        HIGH,
        True,
    )
    lse = blind_rows_high(load_row_values(lse_ptr + row_base, start_q, seqlen_q, -float("inf"), BLOCK_M))
    p = exp_difference(s, lse[:, None], MASK)
    v = load_tile(v_base, start_k, v_strides[1], seqlen_k, VALUE_DIM, BLOCK_N, BLOCK_DV, False, FULL_VALUE, True)
    dout = load_tile(
        dout_base, start_q, dout_strides[1], seqlen_q, VALUE_DIM, BLOCK_M, BLOCK_DV, False, FULL_VALUE, True
    )
    dp = dot(dout, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
    delta = load_row_values(delta_ptr + row_base, start_q, seqlen_q, 0.0, BLOCK_M)
    return p * (dp - delta[:, None])


@triton.jit
def backward_mask(
    q_ptr,
    k_ptr,
    v_ptr,
    q_factor_ptr,
    k_factor_ptr,
    mask_ptr,
    lse_ptr,
    dout_ptr,
    delta_ptr,
    dmask_ptr,
    q_strides,
    k_strides,
    v_strides,
    q_factor_strides,
    k_factor_strides,
    mask_strides,
    dout_strides,
    dmask_strides,
    batches,
    nheads,
    group,
    factor_group,
    seqlen_q,
    seqlen_k,
    mask_batches,
    mask_nheads,
    low,
    high,
    factor_columns,
    scale,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    RANK: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Computes one tile of the gradient of a mask that has keys and, if ``MASK_ROWS`` says so, queries."""
    tiles_q = tl.cdiv(seqlen_q, BLOCK_M) if MASK_ROWS else 1
    tiles_k = tl.cdiv(seqlen_k, BLOCK_N)
    program = tl.program_id(0)
    tile_k = program % tiles_k
    tile_q = program // tiles_k % tiles_q
    mask_head = program // tiles_k // tiles_q % mask_nheads
    mask_batch = program // tiles_k // tiles_q // mask_nheads
    first_q = tile_q * BLOCK_M if MASK_ROWS else 0
    last_q = tl.minimum(seqlen_q, first_q + BLOCK_M) if MASK_ROWS else seqlen_q
    start_k = tile_k * BLOCK_N
    first_batch = tl.where(mask_batches > 1, mask_batch, 0)
    last_batch = tl.where(mask_batches > 1, mask_batch + 1, batches)
    first_head = tl.where(mask_nheads > 1, mask_head, 0)
    last_head = tl.where(mask_nheads > 1, mask_head + 1, nheads)

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for batch in tl.range(first_batch, last_batch):
        for head in tl.range(first_head, last_head):
            for start_q in tl.range(first_q, last_q, BLOCK_M):
                # Distances key - query in this tile run from nearest to farthest.
                nearest = start_k - (start_q + BLOCK_M - 1)
                farthest = start_k + BLOCK_N - 1 - start_q
                seen = True
                if HIGH:
                    seen = seen & (nearest <= high)
                if LOW:
                    seen = seen & (farthest >= -low)
                if seen:
                    acc += score_gradient(
                        tl.cast(batch, tl.int64),
                        tl.cast(head, tl.int64),
                        start_q,
                        start_k,
                        q_ptr,
                        k_ptr,
                        v_ptr,
                        q_factor_ptr,
                        k_factor_ptr,
                        mask_ptr,
                        lse_ptr,
                        dout_ptr,
                        delta_ptr,
                        q_strides,
                        k_strides,
                        v_strides,
                        q_factor_strides,
                        k_factor_strides,
                        mask_strides,
                        dout_strides,
                        nheads,
                        group,
                        factor_group,
                        seqlen_q,
                        seqlen_k,
                        low,
                        high,
                        factor_columns,
                        scale,
                        HEAD_DIM,
                        VALUE_DIM,
                        RANK,
                        LOW,
                        HIGH,
                        MASK,
                        PRECISION,
                        BLOCK_M,
                        BLOCK_N,
                        BLOCK_D,
                        BLOCK_DV,
                    )

    if not MASK_ROWS:
        acc = tl.sum(acc, 0)[None, :]
    rows = (first_q + tl.arange(0, BLOCK_M if MASK_ROWS else 1)).to(tl.int64)
    columns = (start_k + tl.arange(0, BLOCK_N)).to(tl.int64)
    base = dmask_ptr + mask_batch.to(tl.int64) * dmask_strides[0] + mask_head.to(tl.int64) * dmask_strides[1]
    pointers = base + rows[:, None] * dmask_strides[2] + columns[None, :] * dmask_strides[3]
    inside = (rows < seqlen_q)[:, None] & (columns < seqlen_k)[None, :]
    tl.store(pointers, narrow(acc, dmask_ptr.dtype.element_ty), mask=inside)
