"""How products of fp32 tiles are rounded in Triton's interpreter, which would multiply in fp32 whatever it is told.

tf32 has 11 significant bits. Triton 3.6 rounds operands that were computed (``cvt.rna.tf32``), but has Hopper's tensor
core read loaded ones as they are, and that cuts their other bits off. Here all are cut off: what is right so is right
on the GPU.
"""

import triton
import triton.language as tl


@triton.jit
def cut(x):
    """Returns fp32 ``x`` without the bits that tf32 does not have."""
    return (x.to(tl.int32, bitcast=True) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def nearest(x):
    """Returns fp32 ``x`` rounded to tf32, ties away from zero."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def emulated_dot(a, b, acc, PRECISION: tl.constexpr):
    """Returns a @ b + acc of fp32 tiles: cut off to tf32, as two rounded tf32 parts each (tf32x3), or as they are."""
    if PRECISION == "tf32":
        return tl.dot(cut(a), cut(b), acc, input_precision="ieee")
    elif PRECISION == "tf32x3":
        a_high, b_high = nearest(a), nearest(b)
        small = tl.dot(nearest(a - a_high), b_high, tl.zeros_like(acc), input_precision="ieee")
        small = tl.dot(a_high, nearest(b - b_high), small, input_precision="ieee")
        return tl.dot(a_high, b_high, small, input_precision="ieee") + acc
    else:
        return tl.dot(a, b, acc, input_precision="ieee")
