"""The forward kernel: one pass over the keys with an online softmax, O and LSE out."""

import triton
import triton.language as tl

from flashbias.kernels.combining import split_tiles, store_partial
from flashbias.kernels.primitives import (
    LN2,
    band_tiles,
    dot,
    load_tile,
    masked,
    narrow,
    program_tile,
    scores,
    skipping,
    softmax_step,
    store_tile,
    tile_source,
)
from flashbias.kernels.varlen import sequence


@triton.jit
def attend(
    state,
    q,
    q_factor,
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
    hole,
    hole_width,
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
    DESCRIPTORS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Folds key tiles ``first`` … ``last``, the hole skipped, into state = (O accumulator, row maximum, row sum)."""
    acc, row_max, row_sum = state
    for step in tl.range(first, last, BLOCK_N):
        start = skipping(step, hole, hole_width, LOW and EDGE)
        # k: (BLOCK_N, BLOCK_D), k_factor: (BLOCK_N, RANK)
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
        s = scores(q, k, q_factor, k_factor, scale, RANK, PRECISION)
        offsets_k = start + tl.arange(0, BLOCK_N)
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
            EDGE,
        )
        p, correction, row_max, row_sum = softmax_step(s, row_max, row_sum, MASK)
        # v: (BLOCK_N, BLOCK_DV)
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
        acc = dot(narrow(p, v.dtype), v, acc * correction[:, None], PRECISION)
    return acc, row_max, row_sum


@triton.jit
def forward(
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
    partial_out_ptr,
    partial_max_ptr,
    partial_sum_ptr,
    q_strides,
    k_strides,
    v_strides,
    q_factor_strides,
    k_factor_strides,
    mask_strides,
    out_strides,
    nheads,
    group,
    factor_group,
    seqlen_q,
    seqlen_k,
    low,
    high,
    sequence_facts,
    factor_columns,
    scale,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    RANK: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    VARLEN: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Computes BLOCK_M rows of O and LSE of one (batch, head); ``SPLIT``: one split's share of what they are made from."""
    tile, batch, head = program_tile(tl.cdiv(seqlen_q, BLOCK_M), nheads, HIGH and not LOW)
    first_q, first_k, seqlen_q, seqlen_k, low, high = sequence(
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, batch, sequence_facts, seqlen_q, seqlen_k, low, high, VARLEN
    )
    kv_head = head // group
    start_q = tile * BLOCK_M
    if VARLEN and start_q >= seqlen_q:
        return
    offsets_q = start_q + tl.arange(0, BLOCK_M)

    q_base = q_ptr + first_q * q_strides[0] + head * q_strides[2]
    k_base = k_ptr + first_k * k_strides[0] + kv_head * k_strides[2]
    v_base = v_ptr + first_k * v_strides[0] + kv_head * v_strides[2]
    mask_base = mask_ptr + batch * mask_strides[0] + head * mask_strides[1]
    k_source = tile_source(k_base, k_strides[1], seqlen_k, HEAD_DIM, BLOCK_N, BLOCK_D, DESCRIPTORS)
    v_source = tile_source(v_base, v_strides[1], seqlen_k, VALUE_DIM, BLOCK_N, BLOCK_DV, DESCRIPTORS)

    # q: (BLOCK_M, BLOCK_D), q_factor: (BLOCK_M, RANK), both resident
    q = load_tile(q_base, start_q, q_strides[1], seqlen_q, HEAD_DIM, BLOCK_M, BLOCK_D, False, HEAD_DIM == BLOCK_D, True)
    q_factor = q
    k_factor_source = k_source
    if RANK > 0:
        q_factor_base = q_factor_ptr + first_q * q_factor_strides[0] + head * q_factor_strides[2]
        k_factor_base = k_factor_ptr + first_k * k_factor_strides[0] + head // factor_group * k_factor_strides[2]
        k_factor_source = tile_source(
            k_factor_base, k_factor_strides[1], seqlen_k, factor_columns, BLOCK_N, RANK, DESCRIPTORS
        )
        q_factor = load_tile(
            q_factor_base, start_q, q_factor_strides[1], seqlen_q, factor_columns, BLOCK_M, RANK, False, False, True
        )

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    row_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    begin, full_first, full_last, end = band_tiles(start_q, seqlen_k, low, high, LOW, HIGH, BLOCK_M, BLOCK_N)
    if SPLIT:
        begin, full_first, full_last, end = split_tiles(begin, full_first, full_last, end, BLOCK_N)
    width = full_last - full_first
    for EDGE in tl.static_range(2):
        # Without a lower bound begin is full_first, and the edge loop starts at full_last.
        edge_first, edge_last = (begin, end - width) if LOW else (full_last, end)
        first = edge_first if EDGE else full_first
        last = edge_last if EDGE else full_last
        acc, row_max, row_sum = attend(
            (acc, row_max, row_sum),
            q,
            q_factor,
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
            DESCRIPTORS,
            BLOCK_N,
            BLOCK_D,
            BLOCK_DV,
            EDGE,
        )

    if SPLIT:
        store_partial(partial_out_ptr, acc, start_q, seqlen_q, VALUE_DIM, BLOCK_M, BLOCK_DV)
        store_partial(partial_max_ptr, row_max[:, None], start_q, seqlen_q, 1, BLOCK_M, 1)
        store_partial(partial_sum_ptr, row_sum[:, None], start_q, seqlen_q, 1, BLOCK_M, 1)
    else:
        # A row that saw no key has row_sum 0: O is 0 there and LSE -inf.
        divisor = tl.where(row_sum == 0.0, 1.0, row_sum)
        out_base = out_ptr + first_q * out_strides[0] + head * out_strides[2]
        store_tile(out_base, acc / divisor[:, None], start_q, out_strides[1], seqlen_q, VALUE_DIM, BLOCK_M, BLOCK_DV)
        row_base = head * sequence_facts[0] + first_q if VARLEN else (batch * nheads + head) * seqlen_q
        tl.store(lse_ptr + row_base + offsets_q, row_max + tl.log2(divisor) * LN2, mask=offsets_q < seqlen_q)
