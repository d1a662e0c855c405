"""The few device functions the attention kernels are written in: tiles, scores, masks, the softmax step.

Capitals are compile-time values, words are run-time values. A *source* is what a tile is loaded from: a
tensor descriptor or a base pointer, decided at compile time by ``DESCRIPTORS``. A *row* is one position of
one (batch, head); row offsets are int64 because a tensor may hold more than 2**31 elements.
"""

import triton
import triton.language as tl

from flashbias.kernels.emulation import emulated_dot

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FP32_MAX = tl.constexpr(3.4028234663852886e38)
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

MASK_NONE = tl.constexpr(0)
MASK_BOOL = tl.constexpr(1)
MASK_ADDITIVE = tl.constexpr(2)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Returns a @ b + acc in fp32, fp32 operands multiplied as ``PRECISION`` says ("default" for 16-bit ones).

    The interpreter multiplies bf16 bit patterns as integers (Triton 3.6 and 3.9), so operands are widened
    there; the products of 16-bit values are exact in fp32 either way. Nor does it know tf32, which is emulated.
    """
    if INTERPRETED:
        return emulated_dot(a.to(tl.float32), b.to(tl.float32), acc, PRECISION)
    if PRECISION == "default":
        return tl.dot(a, b, acc)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def factor_dot(a, b, acc, PRECISION: tl.constexpr):
    """Returns a @ b + acc in fp32 where one of them is a factor of the bias, which tf32 would round.

    ALiBi at 65,536 positions is off by 8,900 fp32 ulp of the largest bias in tf32, by 2.1 in tf32x3 and 0.8 in fp32
    (50 slopes, operands rounded to nearest); fp32 multiply-adds would need the scores in another layout.
    """
    return dot(a, b, acc, "tf32x3" if PRECISION == "tf32" else PRECISION)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Returns fp32 ``x`` rounded to nearest even in ``dtype``; the interpreter would cut bf16 off instead."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def program_tile(num_tiles, nheads, REVERSED: tl.constexpr):
    """Returns (tile, batch, head) of this program: tiles of one head are neighbours, so they share its K and V in L2.

    ``REVERSED`` hands out the last tiles first: under a causal mask these are the heavy ones.
    """
    program = tl.program_id(0)
    tile = program % num_tiles
    if REVERSED:
        tile = num_tiles - 1 - tile
    batch_head = (program // num_tiles).to(tl.int64)
    return tile, batch_head // nheads, batch_head % nheads


@triton.jit
def band_tiles(
    start, length, low, high, LOW: tl.constexpr, HIGH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Returns (begin, full_first, full_last, end): which positions t rows start … start+ROWS see, in tiles of BLOCK.

    A row r sees -low <= t - r <= high, as far as ``LOW`` and ``HIGH`` say that there is a bound, and t < length.
    Tiles in full_first … full_last are seen by every row and lie within ``length``; those in begin … full_first and
    full_last … end are not, or not surely.
    """
    begin = 0
    full_first = 0
    if LOW:
        begin = tl.maximum(start - low, 0) // BLOCK * BLOCK
        full_first = tl.cdiv(tl.maximum(start + ROWS - 1 - low, 0), BLOCK) * BLOCK
    end = length
    full_last = length // BLOCK * BLOCK
    if HIGH:
        end = tl.minimum(length, start + ROWS + high)
        full_last = tl.minimum(full_last, tl.maximum(start + high + 1, 0) // BLOCK * BLOCK)
    full_last = tl.maximum(full_last, begin)
    return begin, tl.minimum(full_first, full_last), full_last, end


@triton.jit
def skipping(start, hole, width, HOLE: tl.constexpr):
    """Returns ``start``, moved past ``width`` positions from ``hole`` on: an edge loop walks both sides of the full tiles."""
    if HOLE:
        start += tl.where(start < hole, 0, width)
    return start


@triton.jit
def tile_source(
    base,
    stride,
    rows,
    columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Returns what tiles of the (rows, columns) matrix at ``base`` are loaded from."""
    if DESCRIPTORS:
        return tl.make_tensor_descriptor(base, [rows, columns], [stride, 1], [BLOCK_ROWS, BLOCK_COLUMNS])
    else:
        return base


@triton.jit
def load_tile(
    source,
    start,
    stride,
    rows,
    columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    FULL: tl.constexpr,
    CLIP: tl.constexpr,
):
    """Returns rows start … start+BLOCK_ROWS as a (BLOCK_ROWS, BLOCK_COLUMNS) tile, 0 beyond ``columns``.

    Rows past the end are 0 too. A caller that knows there are none says ``CLIP=False``, one whose columns fill
    the tile says ``FULL=True``: both save a mask.
    """
    if DESCRIPTORS:
        return source.load([start, 0])
    else:
        offsets_row = start + tl.arange(0, BLOCK_ROWS)
        offsets_column = tl.arange(0, BLOCK_COLUMNS)
        pointers = source + offsets_row.to(tl.int64)[:, None] * stride + offsets_column[None, :]
        if FULL and CLIP:
            return tl.load(pointers, mask=(offsets_row < rows)[:, None], other=0.0)
        elif FULL:
            return tl.load(pointers)
        elif CLIP:
            inside = (offsets_row < rows)[:, None] & (offsets_column < columns)[None, :]
            return tl.load(pointers, mask=inside, other=0.0)
        else:
            return tl.load(pointers, mask=(offsets_column < columns)[None, :], other=0.0)


@triton.jit
def store_tile(
    base,
    tile,
    start,
    stride,
    rows,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Stores the part of ``tile`` that lies inside the (rows, COLUMNS) matrix at ``base``."""
    offsets_row = start + tl.arange(0, BLOCK_ROWS)
    offsets_column = tl.arange(0, BLOCK_COLUMNS)
    pointers = base + offsets_row.to(tl.int64)[:, None] * stride + offsets_column[None, :]
    inside = (offsets_row < rows)[:, None] & (offsets_column < COLUMNS)[None, :]
    tl.store(pointers, narrow(tile, base.dtype.element_ty), mask=inside)


@triton.jit
def store_factor_gradient(base, tile, start, stride, rows, rank, BLOCK_ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Stores the first ``rank`` columns of a packed (BLOCK_ROWS, WIDTH) factor gradient."""
    offsets_row = start + tl.arange(0, BLOCK_ROWS)
    offsets_rank = tl.arange(0, WIDTH)
    pointers = base + offsets_row.to(tl.int64)[:, None] * stride + offsets_rank[None, :]
    tl.store(pointers, tile, mask=(offsets_row < rows)[:, None] & (offsets_rank < rank)[None, :])


@triton.jit
def load_row_values(base, start, rows, OTHER: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Returns one fp32 value for each of rows start … start+BLOCK_ROWS, ``OTHER`` past the end."""
    offsets_row = start + tl.arange(0, BLOCK_ROWS)
    return tl.load(base + offsets_row, mask=offsets_row < rows, other=OTHER)


@triton.jit
def scores(a, b, a_factor, b_factor, scale, RANK: tl.constexpr, PRECISION: tl.constexpr):
    """Returns a bᵀ · scale + a_factor b_factorᵀ in fp32, in nats.

    The rank step comes after the head-dim step: with exact factors it is then right to 1.2 fp32 ulp of the
    largest bias, in the other order to 8–13 (H200, seqlen 65,536). The scale is applied in fp32 between the
    two, because folding it into 16-bit factors rounds them or, in fp16, overflows; folding it exactly, as
    several parts, won 5 % at headdim 32 and lost at 64 (H200, seqlen 16,384 and 8,192).
    """
    s = dot(a, tl.trans(b), tl.zeros([a.shape[0], b.shape[0]], tl.float32), PRECISION) * scale
    if RANK > 0:
        s = factor_dot(a_factor, tl.trans(b_factor), s, PRECISION)
    return s


@triton.jit
def finite(values):
    """Returns fp64 mask values within fp32's range, -inf kept: only -inf excludes a key, however low a number is."""
    if values.dtype == tl.float64:
        clamped = tl.minimum(tl.maximum(values, -FP32_MAX), FP32_MAX)
        values = tl.where(values == -float("inf"), values, clamped)
    return values


@triton.jit
def masked(
    s,
    rows,
    columns,
    mask_base,
    mask_strides,
    seqlen_q,
    seqlen_k,
    low,
    high,
    MASK: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Returns scores with the mask applied and excluded positions at -inf; ``rows`` and ``columns`` broadcast.

    ``EDGE`` marks tiles that reach past the last key or over an edge of the band -low <= column - row <= high.
    """
    if MASK != MASK_NONE:
        pointers = mask_base + rows.to(tl.int64) * mask_strides[2] + columns.to(tl.int64) * mask_strides[3]
        inside = (rows < seqlen_q) & (columns < seqlen_k)
        values = tl.load(pointers, mask=inside, other=0)
        if MASK == MASK_BOOL:
            s = tl.where(values != 0, s, -float("inf"))
        else:
            s += finite(values).to(tl.float32)
    if EDGE:
        visible = columns < seqlen_k
        if HIGH:
            visible = visible & (columns - rows <= high)
        if LOW:
            visible = visible & (rows - columns <= low)
        s = tl.where(visible, s, -float("inf"))
    return s


@triton.jit
def exp_difference(a, b, MASK: tl.constexpr):
    """Returns exp(a - b) of scores ``a`` and a row value ``b`` that broadcasts to them.

    a·log2(e) - b·log2(e) is one multiply-add, and right to a few fp32 ulp of b. An additive mask may push a whole
    row down to -1e9, where an ulp of b·log2(e) is 128, or to -3e38, where it overflows: there the difference is
    taken first.
    """
    if MASK == MASK_ADDITIVE:
        return tl.exp2((a - b) * LOG2E)
    else:
        return tl.exp2(tl.fma(a, LOG2E, -(b * LOG2E)))


@triton.jit
def softmax_step(s, row_max, row_sum, MASK: tl.constexpr):
    """Returns (p, correction, new maximum, new sum) of the online softmax, in nats.

    A row that has seen no key gives p = 0.
    """
    new_max = tl.maximum(row_max, tl.max(s, 1))
    anchor = tl.where(new_max == -float("inf"), 0.0, new_max)
    p = exp_difference(s, anchor[:, None], MASK)
    # Exactly 1 while the maximum stands: a factor of 1 + 1e-7 for each tile would add up.
    correction = tl.exp2((row_max - anchor) * LOG2E)
    return p, correction, new_max, row_sum * correction + tl.sum(p, 1)


@triton.jit
def blind_rows_high(lse):
    """Returns LSE with -inf (no key) turned into +inf, so that exp(score - LSE) is 0 there."""
    return tl.where(lse == -float("inf"), float("inf"), lse)
