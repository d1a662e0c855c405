"""What one query tile gathers from key tiles for dQ and dQ_bias."""

import triton
import triton.language as tl

from flashbias.kernels.primitives import (
    dot,
    exp_difference,
    factor_dot,
    load_tile,
    masked,
    narrow,
    scores,
    skipping,
)
from flashbias.kernels.recentring import SUM_COLUMNS


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
    for step in tl.range(first, last, BLOCK_N):
        start = skipping(step, hole, hole_width, LOW and EDGE)
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
        dp = dot(dout, tl.trans(v), tl.zeros([dout.shape[0], BLOCK_N], tl.float32), PRECISION)
        ds = narrow(p * (dp - delta[:, None]), k.dtype)
        if WANT_DQ:
            dq = dot(ds, k, dq, PRECISION)
        if WANT_DQ_BIAS:
            p = narrow(p, k_factor.dtype)
            ds_factor = factor_dot(ds, k_factor, ds_factor, PRECISION)
            p_factor = factor_dot(p, k_factor, p_factor, PRECISION)
            if not ONES_COLUMN:
                ones = narrow(tl.full([BLOCK_N, SUM_COLUMNS], 1.0, tl.float32), k_factor.dtype)
                ds_sum = factor_dot(ds, ones, ds_sum, PRECISION)
                p_sum = factor_dot(p, ones, p_sum, PRECISION)
    return dq, ds_factor, p_factor, ds_sum, p_sum
