"""What one key tile gathers from query tiles for dK, dV and dK_bias."""

import triton
import triton.language as tl

from flashbias.kernels.primitives import (
    blind_rows_high,
    dot,
    exp_difference,
    factor_dot,
    load_row_values,
    load_tile,
    masked,
    narrow,
    scores,
    skipping,
)


@triton.jit
def accumulate_dkdv(
    gradients,
    k,
    v,
    k_factor,
    q_source,
    dout_source,
    q_factor_source,
    lse_base,
    delta_base,
    mask_base,
    q_strides,
    dout_strides,
    q_factor_strides,
    mask_strides,
    offsets_k,
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
    WANT_DK: tl.constexpr,
    WANT_DV: tl.constexpr,
    WANT_DK_BIAS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Adds the share of query tiles ``first`` … ``last`` to gradients = (dK, dV, dK_bias)."""
    dk, dv, dk_factor = gradients
    for step in tl.range(first, last, BLOCK_M):
        start = skipping(step, hole, hole_width, LOW and HIGH and EDGE)
        # q: (BLOCK_M, BLOCK_D), q_factor: (BLOCK_M, RANK); rows past the end are 0 and their p is 0 (LSE +inf)
        q = load_tile(
            q_source, start, q_strides[1], seqlen_q, HEAD_DIM, BLOCK_M, BLOCK_D, DESCRIPTORS, HEAD_DIM == BLOCK_D, True
        )
        q_factor = q
        if RANK > 0:
            q_factor = load_tile(
                q_factor_source,
                start,
                q_factor_strides[1],
                seqlen_q,
                factor_columns,
                BLOCK_M,
                RANK,
                DESCRIPTORS,
                False,
                True,
            )
        s = scores(k, q, k_factor, q_factor, scale, RANK, PRECISION)
        offsets_q = start + tl.arange(0, BLOCK_M)
        s = masked(
            s,
            offsets_q[None, :],
            offsets_k[:, None],
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
        lse = blind_rows_high(load_row_values(lse_base, start, seqlen_q, -float("inf"), BLOCK_M))
        p = exp_difference(s, lse[None, :], MASK)
        # dout: (BLOCK_M, BLOCK_DV)
        dout = load_tile(
            dout_source,
            start,
            dout_strides[1],
            seqlen_q,
            VALUE_DIM,
            BLOCK_M,
            BLOCK_DV,
            DESCRIPTORS,
            VALUE_DIM == BLOCK_DV,
            True,
        )
        if WANT_DV:
            dv = dot(narrow(p, dout.dtype), dout, dv, PRECISION)
        if WANT_DK or WANT_DK_BIAS:
            delta = load_row_values(delta_base, start, seqlen_q, 0.0, BLOCK_M)
            dp = dot(v, tl.trans(dout), tl.zeros([v.shape[0], BLOCK_M], tl.float32), PRECISION)
            ds = narrow(p * (dp - delta[None, :]), q.dtype)
            if WANT_DK:
                dk = dot(ds, q, dk, PRECISION)
            if WANT_DK_BIAS:
                dk_factor = factor_dot(ds, q_factor, dk_factor, PRECISION)
    return dk, dv, dk_factor
