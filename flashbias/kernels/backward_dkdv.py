"""The second backward pass: dK, dV and dK_bias, walking the queries of one key tile.

It computes scores transposed, Sᵀ = K Qᵀ, so that Pᵀ and dSᵀ enter their products as they are: Triton 3.4–3.7.0
miscompiles the transpose of a computed tile on Hopper.

Where several query heads share a key head, one program walks the queries of all of them: no atomics, no copies of K and V.
"""

import triton
import triton.language as tl

from flashbias.kernels.backward_dkdv_tiles import accumulate_dkdv
from flashbias.kernels.primitives import (
    band_tiles,
    load_tile,
    program_tile,
    store_factor_gradient,
    store_tile,
    tile_source,
)
from flashbias.kernels.varlen import sequence


@triton.jit
def backward_dkdv(
    q_ptr,
    k_ptr,
    v_ptr,
    q_factor_ptr,
    k_factor_ptr,
    mask_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    lse_ptr,
    dout_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    dk_bias_ptr,
    q_strides,
    k_strides,
    v_strides,
    q_factor_strides,
    k_factor_strides,
    mask_strides,
    dout_strides,
    dk_strides,
    dv_strides,
    dk_bias_strides,
    nheads,
    group,
    factor_group,
    seqlen_q,
    seqlen_k,
    low,
    high,
    sequence_facts,
    factor_columns,
    rank,
    scale,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    RANK: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    VARLEN: tl.constexpr,
    GQA: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    WANT_DK: tl.constexpr,
    WANT_DV: tl.constexpr,
    WANT_DK_BIAS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Computes BLOCK_N rows of dK, dV and dK_bias of one (batch, key head), heavy key tiles first.

    ``nheads`` counts query heads, ``group`` of them share a key head; dK_bias is that of every query head.
    """
    tile, batch, kv_head = program_tile(tl.cdiv(seqlen_k, BLOCK_N), nheads // group, LOW and not HIGH)
    first_q, first_k, seqlen_q, seqlen_k, low, high = sequence(
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, batch, sequence_facts, seqlen_q, seqlen_k, low, high, VARLEN
    )
    start_k = tile * BLOCK_N
    if VARLEN and start_k >= seqlen_k:
        return
    offsets_k = start_k + tl.arange(0, BLOCK_N)

    # k: (BLOCK_N, BLOCK_D), v: (BLOCK_N, BLOCK_DV), both resident
    k_base = k_ptr + first_k * k_strides[0] + kv_head * k_strides[2]
    v_base = v_ptr + first_k * v_strides[0] + kv_head * v_strides[2]
    k = load_tile(k_base, start_k, k_strides[1], seqlen_k, HEAD_DIM, BLOCK_N, BLOCK_D, False, HEAD_DIM == BLOCK_D, True)
    v = load_tile(
        v_base, start_k, v_strides[1], seqlen_k, VALUE_DIM, BLOCK_N, BLOCK_DV, False, VALUE_DIM == BLOCK_DV, True
    )
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)

    # A key sees queries as a query sees keys, with the bounds exchanged. Rows past the last query need no mask.
    length = tl.cdiv(seqlen_q, BLOCK_M) * BLOCK_M
    begin, full_first, full_last, end = band_tiles(start_k, length, high, low, HIGH, LOW, BLOCK_N, BLOCK_M)
    width = full_last - full_first
    for member in tl.range(0, group if GQA else 1):
        head = kv_head * group + member
        row_base = head * sequence_facts[0] + first_q if VARLEN else (batch * nheads + head) * seqlen_q
        q_base = q_ptr + first_q * q_strides[0] + head * q_strides[2]
        dout_base = dout_ptr + first_q * dout_strides[0] + head * dout_strides[2]
        mask_base = mask_ptr + batch * mask_strides[0] + head * mask_strides[1]
        q_source = tile_source(q_base, q_strides[1], seqlen_q, HEAD_DIM, BLOCK_M, BLOCK_D, DESCRIPTORS)
        dout_source = tile_source(dout_base, dout_strides[1], seqlen_q, VALUE_DIM, BLOCK_M, BLOCK_DV, DESCRIPTORS)
        # k_factor: (BLOCK_N, RANK)
        k_factor = k
        q_factor_source = q_source
        dk_factor = tl.zeros([BLOCK_N, RANK if RANK > 0 else 1], tl.float32)
        if RANK > 0:
            q_factor_base = q_factor_ptr + first_q * q_factor_strides[0] + head * q_factor_strides[2]
            k_factor_base = k_factor_ptr + first_k * k_factor_strides[0] + head // factor_group * k_factor_strides[2]
            q_factor_source = tile_source(
                q_factor_base, q_factor_strides[1], seqlen_q, factor_columns, BLOCK_M, RANK, DESCRIPTORS
            )
            k_factor = load_tile(
                k_factor_base, start_k, k_factor_strides[1], seqlen_k, factor_columns, BLOCK_N, RANK, False, False, True
            )
        for EDGE in tl.static_range(2):
            # With one bound the edge loop is the part before the full tiles or the part after them.
            edge_first = begin if HIGH else full_last
            edge_last = (end - width if HIGH else end) if LOW else full_first
            first = edge_first if EDGE else full_first
            last = edge_last if EDGE else full_last
            if LOW or HIGH or not EDGE:
                dk, dv, dk_factor = accumulate_dkdv(
                    (dk, dv, dk_factor),
                    k,
                    v,
                    k_factor,
                    q_source,
                    dout_source,
                    q_factor_source,
                    lse_ptr + row_base,
                    delta_ptr + row_base,
                    mask_base,
                    q_strides,
                    dout_strides,
                    q_factor_strides,
                    mask_strides,
                    offsets_k,
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
                    WANT_DK,
                    WANT_DV,
                    WANT_DK_BIAS,
                    DESCRIPTORS,
                    BLOCK_M,
                    BLOCK_D,
                    BLOCK_DV,
                    EDGE,
                )
        if WANT_DK_BIAS:
            dk_bias_base = dk_bias_ptr + first_k * dk_bias_strides[0] + head * dk_bias_strides[2]
            store_factor_gradient(dk_bias_base, dk_factor, start_k, dk_bias_strides[1], seqlen_k, rank, BLOCK_N, RANK)

    if WANT_DK:
        dk_base = dk_ptr + first_k * dk_strides[0] + kv_head * dk_strides[2]
        store_tile(dk_base, dk * scale, start_k, dk_strides[1], seqlen_k, HEAD_DIM, BLOCK_N, BLOCK_D)
    if WANT_DV:
        dv_base = dv_ptr + first_k * dv_strides[0] + kv_head * dv_strides[2]
        store_tile(dv_base, dv, start_k, dv_strides[1], seqlen_k, VALUE_DIM, BLOCK_N, BLOCK_DV)
