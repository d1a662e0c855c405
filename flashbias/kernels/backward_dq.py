"""The first backward pass: delta, dQ and dQ_bias, walking the keys of one query tile. No atomics: bitwise repeatable."""

import triton
import triton.language as tl

from flashbias.kernels.backward_dq_tiles import accumulate_dq
from flashbias.kernels.combining import split_tiles, store_sums
from flashbias.kernels.emulation import cut
from flashbias.kernels.primitives import (
    band_tiles,
    blind_rows_high,
    load_row_values,
    load_tile,
    program_tile,
    store_factor_gradient,
    store_tile,
    tile_source,
)
from flashbias.kernels.recentring import SUM_COLUMNS, recentred
from flashbias.kernels.varlen import sequence


@triton.jit
def backward_dq(
    q_ptr,
    k_ptr,
    v_ptr,
    q_factor_ptr,
    k_factor_ptr,
    mask_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    out_ptr,
    lse_ptr,
    dout_ptr,
    dlse_ptr,
    delta_ptr,
    partial_dq_ptr,
    partial_ds_factor_ptr,
    partial_p_factor_ptr,
    partial_ds_sum_ptr,
    partial_p_sum_ptr,
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
    group,
    factor_group,
    seqlen_q,
    seqlen_k,
    low,
    high,
    sequence_facts,
    has_dlse,
    factor_columns,
    rank,
    scale,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    RANK: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    VARLEN: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    WANT_DQ: tl.constexpr,
    WANT_DQ_BIAS: tl.constexpr,
    ONES_COLUMN: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Computes BLOCK_M rows of delta = rowsum(O ∘ dO) - dLSE, dQ and dQ_bias of one (batch, head).

    ``SPLIT``: delta, and one split's share of the sums that the others are made from.
    """
    tile, batch, head = program_tile(tl.cdiv(seqlen_q, BLOCK_M), nheads, HIGH and not LOW)
    first_q, first_k, seqlen_q, seqlen_k, low, high = sequence(
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, batch, sequence_facts, seqlen_q, seqlen_k, low, high, VARLEN
    )
    kv_head = head // group
    start_q = tile * BLOCK_M
    if VARLEN and start_q >= seqlen_q:
        return
    offsets_q = start_q + tl.arange(0, BLOCK_M)
    row_base = head * sequence_facts[0] + first_q if VARLEN else (batch * nheads + head) * seqlen_q

    # out, dout: (BLOCK_M, BLOCK_DV)
    out_base = out_ptr + first_q * out_strides[0] + head * out_strides[2]
    dout_base = dout_ptr + first_q * dout_strides[0] + head * dout_strides[2]
    out = load_tile(
        out_base, start_q, out_strides[1], seqlen_q, VALUE_DIM, BLOCK_M, BLOCK_DV, False, VALUE_DIM == BLOCK_DV, True
    )
    dout = load_tile(
        dout_base, start_q, dout_strides[1], seqlen_q, VALUE_DIM, BLOCK_M, BLOCK_DV, False, VALUE_DIM == BLOCK_DV, True
    )
    if PRECISION == "tf32":
        # The tensor core would cut dO off in dP alone: where few keys are seen dP and delta cancel, and must agree.
        dout = cut(dout)
    # dLSE is no gradient of O: it joins through dS = P (dP - rowsum(O ∘ dO) + dLSE). Rows without a key have none.
    lse = load_row_values(lse_ptr + row_base, start_q, seqlen_q, -float("inf"), BLOCK_M)
    given = (offsets_q < seqlen_q * has_dlse) & (lse != -float("inf"))
    dlse = tl.load(dlse_ptr + row_base + offsets_q, mask=given, other=0.0).to(tl.float32)
    lse = blind_rows_high(lse)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1) - dlse
    written = offsets_q < seqlen_q
    if SPLIT:  # each split needs delta, the first one stores it
        written &= tl.program_id(1) == 0
    tl.store(delta_ptr + row_base + offsets_q, delta, mask=written)

    if WANT_DQ or WANT_DQ_BIAS:
        q_base = q_ptr + first_q * q_strides[0] + head * q_strides[2]
        k_base = k_ptr + first_k * k_strides[0] + kv_head * k_strides[2]
        v_base = v_ptr + first_k * v_strides[0] + kv_head * v_strides[2]
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
            q_factor_base = q_factor_ptr + first_q * q_factor_strides[0] + head * q_factor_strides[2]
            k_factor_base = k_factor_ptr + first_k * k_factor_strides[0] + head // factor_group * k_factor_strides[2]
            k_factor_source = tile_source(
                k_factor_base, k_factor_strides[1], seqlen_k, factor_columns, BLOCK_N, RANK, DESCRIPTORS
            )
            q_factor = load_tile(
                q_factor_base, start_q, q_factor_strides[1], seqlen_q, factor_columns, BLOCK_M, RANK, False, False, True
            )
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        begin, full_first, full_last, end = band_tiles(start_q, seqlen_k, low, high, LOW, HIGH, BLOCK_M, BLOCK_N)
        if SPLIT:
            begin, full_first, full_last, end = split_tiles(begin, full_first, full_last, end, BLOCK_N)
        width = full_last - full_first
        for EDGE in tl.static_range(2):
            edge_first, edge_last = (begin, end - width) if LOW else (full_last, end)
            first = edge_first if EDGE else full_first
            last = edge_last if EDGE else full_last
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
                full_first,
                width,
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
                WANT_DQ,
                WANT_DQ_BIAS,
                ONES_COLUMN,
                DESCRIPTORS,
                BLOCK_N,
                BLOCK_D,
                BLOCK_DV,
                EDGE,
            )
        if SPLIT:
            store_sums(
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
                start_q,
                seqlen_q,
                HEAD_DIM,
                RANK,
                WANT_DQ,
                WANT_DQ_BIAS,
                ONES_COLUMN,
                BLOCK_M,
                BLOCK_D,
            )
        if WANT_DQ and not SPLIT:
            dq_base = dq_ptr + first_q * dq_strides[0] + head * dq_strides[2]
            store_tile(dq_base, dq * scale, start_q, dq_strides[1], seqlen_q, HEAD_DIM, BLOCK_M, BLOCK_D)
        if WANT_DQ_BIAS and not SPLIT:
            dq_bias_base = dq_bias_ptr + first_q * dq_bias_strides[0] + head * dq_bias_strides[2]
            dq_factor = recentred(ds_factor, p_factor, ds_sum, p_sum, dlse, rank, ONES_COLUMN)
            store_factor_gradient(dq_bias_base, dq_factor, start_q, dq_bias_strides[1], seqlen_q, rank, BLOCK_M, RANK)
