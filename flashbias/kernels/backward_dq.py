"""The first backward pass: delta, dQ and dQ_bias, walking the keys of one query tile.

There are two passes and no atomics in either, so gradients are bitwise repeatable.

dQ_bias is recentred. Rows of dS sum to zero, so dQ_bias_i = Σ_j dS_ij k_bias_j = Σ_j dS_ij (k_bias_j - c_i) for any c_i.
The rounding of dS and of delta spoils the first form where k_bias is large next to its spread within the row, as
ALiBi's key positions are; with c_i = Σ_j P_ij k_bias_j the second does not notice. Both sums over P and dS rounded,
Σ P and Σ dS, are needed for it: a column of ones in the packed k_factor gives them in the same products.
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
    program_tile,
    scores,
    store_factor_gradient,
    store_tile,
    tile_source,
)

# A product of fewer columns does not exist.
SUM_COLUMNS = tl.constexpr(16)


@triton.jit
def accumulate_dq(
    gradients,
    q,
    q_factor,
    dout,
    lse,
    delta,
    k_source,
    v_source,
    k_factor_source,
    mask_base,
    k_strides,
    v_strides,
    k_factor_strides,
    mask_strides,
    offsets_q,
    first,
    last,
    seqlen_q,
    seqlen_k,
    factor_columns,
    scale,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    RANK: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    WANT_DQ: tl.constexpr,
    WANT_DQ_BIAS: tl.constexpr,
    ONES_COLUMN: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Adds the share of key tiles ``first`` … ``last`` to gradients = (dQ, dS k_factor, P k_factor, Σ dS, Σ P)."""
    dq, ds_factor, p_factor, ds_sum, p_sum = gradients
    for start in tl.range(first, last, BLOCK_N):
        # k: (BLOCK_N, BLOCK_D), v: (BLOCK_N, BLOCK_DV), k_factor: (BLOCK_N, RANK)
        k = load_tile(
            k_source, start, k_strides[1], seqlen_k, HEAD_DIM, BLOCK_N, BLOCK_D, DESCRIPTORS, HEAD_DIM == BLOCK_D, EDGE
        )
        k_factor = k
        if RANK > 0:
            k_factor = load_tile(
                k_factor_source,
                start,
                k_factor_strides[1],
                seqlen_k,
                factor_columns,
                BLOCK_N,
                RANK,
                DESCRIPTORS,
                False,
                EDGE,
            )
        s = scores(q, k, q_factor, k_factor, scale, RANK)
        offsets_k = start + tl.arange(0, BLOCK_N)
        s = masked(
            s,
            offsets_q[:, None],
            offsets_k[None, :],
            mask_base,
            mask_strides,
            seqlen_q,
            seqlen_k,
            MASK,
            CAUSAL,
            EDGE,
        )
        p = exp_difference(s, lse[:, None], MASK)
        v = load_tile(
            v_source,
            start,
            v_strides[1],
            seqlen_k,
            VALUE_DIM,
            BLOCK_N,
            BLOCK_DV,
            DESCRIPTORS,
            VALUE_DIM == BLOCK_DV,
            EDGE,
        )
        dp = dot(dout, tl.trans(v), tl.zeros([dout.shape[0], BLOCK_N], tl.float32))
        ds = narrow(p * (dp - delta[:, None]), k.dtype)
        if WANT_DQ:
            dq = dot(ds, k, dq)
        if WANT_DQ_BIAS:
            p = narrow(p, k_factor.dtype)
            ds_factor = dot(ds, k_factor, ds_factor)
            p_factor = dot(p, k_factor, p_factor)
            if not ONES_COLUMN:
                ones = narrow(tl.full([BLOCK_N, SUM_COLUMNS], 1.0, tl.float32), k_factor.dtype)
                ds_sum = dot(ds, ones, ds_sum)
                p_sum = dot(p, ones, p_sum)
    return dq, ds_factor, p_factor, ds_sum, p_sum


@triton.jit
def recentred(ds_factor, p_factor, ds_sum, p_sum, rank, ONES_COLUMN: tl.constexpr):
    """Returns Σ_j dS_ij (k_factor_j - c_i) where c_i = Σ_j P_ij k_factor_j / Σ_j P_ij; 0 in a row without a key.

    The sums over P and dS are in column ``rank`` of the products, or in every column of ``ds_sum`` and ``p_sum``.
    """
    if ONES_COLUMN:
        ones = (tl.arange(0, ds_factor.shape[1]) == rank)[None, :]
        ds_sum = tl.where(ones, ds_factor, 0.0)
        p_sum = tl.where(ones, p_factor, 0.0)
    else:
        first = (tl.arange(0, SUM_COLUMNS) == 0)[None, :]
        ds_sum = tl.where(first, ds_sum, 0.0)
        p_sum = tl.where(first, p_sum, 0.0)
    total = tl.sum(p_sum, 1)
    share = tl.sum(ds_sum, 1) / tl.where(total > 0.0, total, 1.0)
    return ds_factor - share[:, None] * p_factor


@triton.jit
def backward_dq(
    q_ptr,
    k_ptr,
    v_ptr,
    q_factor_ptr,
    k_factor_ptr,
    mask_ptr,
    out_ptr,
    lse_ptr,
    dout_ptr,
    delta_ptr,
    dq_ptr,
    dq_bias_ptr,
    q_strides,
    k_strides,
    v_strides,
    q_factor_strides,
    k_factor_strides,
    mask_strides,
    out_strides,
    dout_strides,
    dq_strides,
    dq_bias_strides,
    nheads,
    seqlen_q,
    seqlen_k,
    factor_columns,
    rank,
    scale,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    RANK: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    WANT_DQ: tl.constexpr,
    WANT_DQ_BIAS: tl.constexpr,
    ONES_COLUMN: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Computes BLOCK_M rows of delta = rowsum(O ∘ dO), dQ and dQ_bias of one (batch, head)."""
    tile, batch, head = program_tile(tl.cdiv(seqlen_q, BLOCK_M), nheads, CAUSAL)
    start_q = tile * BLOCK_M
    offsets_q = start_q + tl.arange(0, BLOCK_M)
    row_base = (batch * nheads + head) * seqlen_q

    # out, dout: (BLOCK_M, BLOCK_DV)
    out_base = out_ptr + batch * out_strides[0] + head * out_strides[2]
    dout_base = dout_ptr + batch * dout_strides[0] + head * dout_strides[2]
    out = load_tile(
        out_base, start_q, out_strides[1], seqlen_q, VALUE_DIM, BLOCK_M, BLOCK_DV, False, VALUE_DIM == BLOCK_DV, True
    )
    dout = load_tile(
        dout_base, start_q, dout_strides[1], seqlen_q, VALUE_DIM, BLOCK_M, BLOCK_DV, False, VALUE_DIM == BLOCK_DV, True
    )
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    tl.store(delta_ptr + row_base + offsets_q, delta, mask=offsets_q < seqlen_q)

    if WANT_DQ or WANT_DQ_BIAS:
        q_base = q_ptr + batch * q_strides[0] + head * q_strides[2]
        k_base = k_ptr + batch * k_strides[0] + head * k_strides[2]
        v_base = v_ptr + batch * v_strides[0] + head * v_strides[2]
        mask_base = mask_ptr + batch * mask_strides[0] + head * mask_strides[1]
        k_source = tile_source(k_base, k_strides[1], seqlen_k, HEAD_DIM, BLOCK_N, BLOCK_D, DESCRIPTORS)
        v_source = tile_source(v_base, v_strides[1], seqlen_k, VALUE_DIM, BLOCK_N, BLOCK_DV, DESCRIPTORS)
        # q: (BLOCK_M, BLOCK_D), q_factor: (BLOCK_M, RANK)
        q = load_tile(
            q_base, start_q, q_strides[1], seqlen_q, HEAD_DIM, BLOCK_M, BLOCK_D, False, HEAD_DIM == BLOCK_D, True
        )
        q_factor = q
        k_factor_source = k_source
        ds_factor = tl.zeros([BLOCK_M, RANK if RANK > 0 else 1], tl.float32)
        p_factor = ds_factor
        ds_sum = tl.zeros([BLOCK_M, SUM_COLUMNS], tl.float32)
        p_sum = ds_sum
        if RANK > 0:
            q_factor_base = q_factor_ptr + batch * q_factor_strides[0] + head * q_factor_strides[2]
            k_factor_base = k_factor_ptr + batch * k_factor_strides[0] + head * k_factor_strides[2]
            k_factor_source = tile_source(
                k_factor_base, k_factor_strides[1], seqlen_k, factor_columns, BLOCK_N, RANK, DESCRIPTORS
            )
            q_factor = load_tile(
                q_factor_base, start_q, q_factor_strides[1], seqlen_q, factor_columns, BLOCK_M, RANK, False, False, True
            )
        lse = blind_rows_high(load_row_values(lse_ptr + row_base, start_q, seqlen_q, -float("inf"), BLOCK_M))

        end = seqlen_k
        edge = seqlen_k // BLOCK_N * BLOCK_N
        if CAUSAL:
            end = tl.minimum(seqlen_k, start_q + BLOCK_M)
            edge = tl.minimum(edge, start_q // BLOCK_N * BLOCK_N)
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for EDGE in tl.static_range(2):
            first = edge if EDGE else 0
            last = end if EDGE else edge
            dq, ds_factor, p_factor, ds_sum, p_sum = accumulate_dq(
                (dq, ds_factor, p_factor, ds_sum, p_sum),
                q,
                q_factor,
                dout,
                lse,
                delta,
                k_source,
                v_source,
                k_factor_source,
                mask_base,
                k_strides,
                v_strides,
                k_factor_strides,
                mask_strides,
                offsets_q,
                first,
                last,
                seqlen_q,
                seqlen_k,
                factor_columns,
                scale,
                HEAD_DIM,
                VALUE_DIM,
                RANK,
                CAUSAL,
                MASK,
                WANT_DQ,
                WANT_DQ_BIAS,
                ONES_COLUMN,
                DESCRIPTORS,
                BLOCK_N,
                BLOCK_D,
                BLOCK_DV,
                EDGE,
            )
        if WANT_DQ:
            dq_base = dq_ptr + batch * dq_strides[0] + head * dq_strides[2]
            store_tile(dq_base, dq * scale, start_q, dq_strides[1], seqlen_q, HEAD_DIM, BLOCK_M, BLOCK_D)
        if WANT_DQ_BIAS:
            dq_bias_base = dq_bias_ptr + batch * dq_bias_strides[0] + head * dq_bias_strides[2]
            dq_factor = recentred(ds_factor, p_factor, ds_sum, p_sum, rank, ONES_COLUMN)
            store_factor_gradient(dq_bias_base, dq_factor, start_q, dq_bias_strides[1], seqlen_q, rank, BLOCK_M, RANK)
