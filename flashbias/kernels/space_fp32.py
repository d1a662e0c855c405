"""The configurations of fp32 inputs: tiles take twice the room, and "ieee" has no tensor core.

Measured by compiling for sm_90 (Triton 3.6, rank 8, causal): "tf32" and "tf32x3" have wgmma where the tile's first
dim (queries, in backward_dkdv keys) is 64 or more; with 64 x 32 or narrower nothing spills at headdim 64, from 128 on
the backward always does. "ieee" is multiply-adds on registers, whose operands are as long as the inner dim: tiles of
32 x 32 are the largest that do not spill at headdim 64, and each backward config takes 2 to 8 s to compile.
"""

from __future__ import annotations

from itertools import product
from typing import Final

# (BLOCK_M, BLOCK_N, num_warps, num_stages)
Tile = tuple[int, int, int, int]

# fp32 values per thread in accumulators and score tiles past which every config spilled more than 1 KB.
MAX_VALUES_PER_THREAD: Final = 160
_IEEE: Final[tuple[Tile, ...]] = (
    (32, 32, 4, 2),
    (32, 32, 8, 2),
    (32, 32, 8, 1),
    (16, 64, 4, 2),
    (64, 16, 4, 2),
    (64, 32, 8, 2),
    (16, 32, 4, 1),
    (32, 16, 4, 1),
)
_IEEE_WIDE: Final[tuple[Tile, ...]] = ((32, 32, 8, 1), (16, 32, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1), (16, 16, 4, 1))
# "ieee": the products of backward_dkdv run over BLOCK_M, in registers.
_IEEE_MAX_INNER: Final = 32


def tiles(precision: str, dim: int) -> list[Tile]:
    """Returns the tiles worth trying for heads of ``dim`` (padded) in this precision."""
    if precision == "ieee":
        return list(_IEEE if dim <= 64 else _IEEE_WIDE)
    if dim > 128:
        return [(*blocks, warps, 1) for blocks, warps in product(((64, 16), (32, 16), (16, 32), (16, 16)), (4, 8))]
    stages = (2, 1) if dim > 64 else (3, 2)
    found = [(*blocks, 4, each) for blocks, each in product(((64, 64), (64, 32), (32, 64), (64, 16), (16, 64)), stages)]
    found += [(*blocks, 8, stages[0]) for blocks in ((128, 64), (64, 128), (128, 32), (32, 128), (64, 64), (64, 32))]
    return [*found, (32, 32, 4, 1), (16, 32, 8, 1)]


def default_tile(kernel: str, precision: str, dim: int) -> Tile:
    """Returns the conservative tile: it compiles for every architecture, for any head dim."""
    if precision == "ieee":
        return (32, 16, 4, 1) if dim <= 64 else (16, 16, 8, 1)
    if dim > 128:
        return 16, 16, 8, 1
    short, warps = (16, 8) if dim > 64 else (16, 4)
    long = 32 if dim > 64 else 64
    return (short, long, warps, 1) if kernel == "backward_dkdv" else (long, short, warps, 1)


def reason(kernel: str, precision: str, block_m: int, values: int) -> str | None:
    """Returns why a config with ``values`` fp32 values per thread cannot be fast, or None."""
    if precision == "ieee" and kernel == "backward_dkdv" and block_m > _IEEE_MAX_INNER:
        return f"BLOCK_M {block_m} would spill without tensor cores (limit {_IEEE_MAX_INNER})"
    if values > MAX_VALUES_PER_THREAD:
        return f"{values} fp32 values per thread would spill (limit {MAX_VALUES_PER_THREAD})"
    return None
