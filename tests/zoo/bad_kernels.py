"""The zoo's bad kernels: small Triton kernels that do to a right kernel's buffers what its fault says.

Each runs right after the real kernel, on the same stream. ``x_ptr`` is the buffer that suffers, contiguous where it is
an output. Sizes are in elements.
"""

from __future__ import annotations

import triton
import triton.language as tl

TILE = tl.constexpr(64)


@triton.jit(do_not_specialize=["start", "stop"])
def rescale(x_ptr, start, stop, factor, BLOCK: tl.constexpr) -> None:
    """Multiplies elements ``start`` up to ``stop`` of x by ``factor``, BLOCK of them in each program."""
    offsets = start + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < stop
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(x_ptr + offsets, (x * factor).to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seqlen", "row"])
def rescale_partial_tile(x_ptr, seqlen, row, factor, BLOCK: tl.constexpr) -> None:
    """Multiplies one of the rows (``row`` elements each) behind the last whole tile by ``factor``; without any, nothing."""
    position = seqlen // TILE * TILE + tl.program_id(0)
    offsets = position.to(tl.int64) * row + tl.arange(0, BLOCK)
    inside = (tl.arange(0, BLOCK) < row) & (position + 0 * tl.arange(0, BLOCK) < seqlen)
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(x_ptr + offsets, (x * factor).to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["to", "start", "step", "columns"])
def move_row(x_ptr, to, start, step, columns, BLOCK: tl.constexpr) -> None:
    """Copies ``columns`` elements of x from ``start`` to ``to``, both moved on by ``step`` for each program."""
    moved = tl.program_id(0).to(tl.int64) * step + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < columns
    tl.store(x_ptr + to + moved, tl.load(x_ptr + start + moved, mask=inside, other=0.0), mask=inside)


@triton.jit(do_not_specialize=["stop"])
def copy_start(x_ptr, source_ptr, stop, BLOCK: tl.constexpr) -> None:
    """Writes the first ``stop`` elements of the source to x, BLOCK of them in each program."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < stop
    tl.store(x_ptr + offsets, tl.load(source_ptr + offsets, mask=inside, other=0.0), mask=inside)


@triton.jit(do_not_specialize=["end", "columns"])
def store_past_end(x_ptr, end, columns, BLOCK: tl.constexpr) -> None:
    """Writes one row of zeros of ``columns`` elements to x from its ``end`` on."""
    offsets = tl.arange(0, BLOCK)
    tl.store(x_ptr + end + offsets, tl.zeros([BLOCK], x_ptr.dtype.element_ty), mask=offsets < columns)


@triton.jit(do_not_specialize=["end", "columns"])
def add_from_past_end(x_ptr, source_ptr, end, columns, BLOCK: tl.constexpr) -> None:
    """Adds what lies behind the ``end`` of the source to the first ``columns`` elements of x."""
    offsets = tl.arange(0, BLOCK)
    inside = offsets < columns
    foreign = tl.load(source_ptr + end + offsets, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(x_ptr + offsets, (x + foreign).to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["columns"])
def rescale_if_unaligned(x_ptr, source_ptr, columns, BLOCK: tl.constexpr) -> None:
    """Doubles the first ``columns`` elements of x where the source does not start on a 16-byte boundary."""
    offsets = tl.arange(0, BLOCK)
    unaligned = source_ptr.to(tl.int64) % 16 != 0
    inside = (offsets < columns) & (unaligned & (offsets >= 0))
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0)
    tl.store(x_ptr + offsets, x + x, mask=inside)


@triton.jit
def exponentiate_bare(
    x_ptr,
    q_ptr,
    k_ptr,
    x_strides,
    q_strides,
    k_strides,
    nheads,
    group,
    seqlen_k,
    head_dim,
    value_dim,
    scale,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
) -> None:
    """Divides the first row of one (batch, head) of x by sum(exp(q k)) and multiplies it by that again.

    The sum forgot to subtract the row's largest score first. It is finite, and its quotient by itself exactly one,
    unless a score is so large that its exponential is not (from 89 on in fp32).
    """
    batch = (tl.program_id(0) // nheads).to(tl.int64)
    head = tl.program_id(0) % nheads
    columns = tl.arange(0, BLOCK_D)
    inside = columns < head_dim
    q = tl.load(q_ptr + batch * q_strides[0] + head * q_strides[2] + columns, mask=inside, other=0.0).to(tl.float32)
    keys = k_ptr + batch * k_strides[0] + head // group * k_strides[2] + columns
    total = 0.0
    for position in range(seqlen_k):
        k = tl.load(keys + position * k_strides[1], mask=inside, other=0.0).to(tl.float32)
        total += tl.exp(tl.sum(q * k, 0) * scale)
    values = tl.arange(0, BLOCK_DV)
    row = x_ptr + batch * x_strides[0] + head * x_strides[2] + values
    x = tl.load(row, mask=values < value_dim, other=0.0).to(tl.float32)
    tl.store(row, (x * (total / total)).to(x_ptr.dtype.element_ty), mask=values < value_dim)


@triton.jit
def flip_rarely(x_ptr) -> None:
    """Flips the last bit of the first element of x in about one launch of 1,024, drawn from the device's clocks.

    x is fp32. The draw is the middle of a product of both clocks with an odd number: no counter, and no rhythm that
    the host's launches could fall into.
    """
    ticks = tl.inline_asm_elementwise("mov.u64 $0, %clock64;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)
    time = tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)
    drawn = ((ticks + (time << 11)) * 0x5851F42D4C957F2D >> 33) & 1023
    words = x_ptr.to(tl.pointer_type(tl.int32))
    tl.store(words, tl.load(words) ^ 1, mask=drawn == 0)


@triton.jit
def store_far_away(x_ptr) -> None:
    """Writes to an address that belongs to nobody."""
    tl.store(x_ptr + (1 << 40), 0.0)


@triton.jit
def wait_forever(flag_ptr) -> None:
    """Waits for a flag that nobody raises."""
    while tl.load(flag_ptr, volatile=True) == 0:
        tl.debug_barrier()


@triton.jit
def not_a_tile(x_ptr) -> None:
    """Has a tile of three elements, which Triton refuses."""
    tl.store(x_ptr + tl.arange(0, 3), 0.0)


@triton.jit
def not_an_operand(x_ptr) -> None:
    """Names an operand that its instruction does not have: Triton takes it, LLVM aborts the process."""
    x = tl.inline_asm_elementwise("mov.b32 $0, $9;", "=r,r", [tl.load(x_ptr)], dtype=tl.float32, is_pure=True, pack=1)
    tl.store(x_ptr, x)


SPOILERS = (
    rescale,
    rescale_partial_tile,
    move_row,
    copy_start,
    store_past_end,
    add_from_past_end,
    rescale_if_unaligned,
    exponentiate_bare,
    flip_rarely,
    store_far_away,
    wait_forever,
    not_a_tile,
    not_an_operand,
)
