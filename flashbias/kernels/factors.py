"""Factors as kernels read them: in place, or packed into aligned 16-bit rows by one launch; and their gradients back.

Factors of q's own dtype are packed column by column. fp32 and fp64 factors are *split*: each number is a sum of
16-bit parts, x = x_0 + x_1 + x_2, and a product of two sums is a sum of products, so the packed q_factor and k_factor
hold one block of columns for each pair of parts that matters. Three bf16 parts hold all 24 bits of an fp32 number; of
their nine pairs the three smallest are below its rounding. Two fp16 parts hold 22 bits, if the numbers are in fp16's
range: q_bias is multiplied by a power of two and k_bias divided by it, so that both are equally large.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from autotune.device import describe
from flashbias.kernels.binding import Binary, compile_binary, launch_binary
from flashbias.kernels.packing import find_peaks, pack

Room = Callable[[str, tuple[int, ...], torch.dtype], Tensor]

_ALIGNMENT: Final = 16
_PACKED_VALUES: Final = 4096


def part_pairs(dtype: str) -> tuple[tuple[int, int], ...]:
    """Returns the (q part, k part) of each block of packed columns for factors split into numbers of ``dtype``."""
    if dtype == "float16":
        return (0, 0), (0, 1), (1, 0), (1, 1)
    return (0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (1, 1)


def packed_rank(rank: int) -> int:
    """Returns the width that ``rank`` columns are computed with: 0, 16, 32, 64, 128 or 256."""
    return 0 if rank == 0 else max(16, 1 << (rank - 1).bit_length())


@dataclass(frozen=True)
class Packing:
    """How both factors of a call are packed: blocks of ``rank`` columns, then the column of ones if there is one."""

    dtype: str
    rank: int
    split: bool
    ones_column: bool = False

    @property
    def blocks(self) -> int:
        """Returns how many blocks of ``rank`` columns there are."""
        return len(part_pairs(self.dtype)) if self.split else 1

    @property
    def balanced(self) -> bool:
        """Returns whether numbers are scaled by powers of two first: bf16 has fp32's own range."""
        return self.split and self.dtype == "float16"

    @property
    def used(self) -> int:
        """Returns how many columns hold numbers of the factors."""
        return self.blocks * self.rank

    @functools.cached_property
    def kind(self) -> Packing:
        """Returns this packing with its computed width (16, 32, …) for a rank: what decides the kernels that pack."""
        return replace(self, rank=packed_rank(self.used))

    @property
    def columns(self) -> int:
        """Returns the packed columns, whole 16-byte steps of 8."""
        return -(-(self.used + self.ones_column) // 8) * 8


@dataclass(frozen=True)
class Factors:
    """Factors ready for kernels: (B or 1, S, H or 1, columns) 16-bit tensors, and how they were packed.

    ``peaks`` (2, R) holds the bits of the largest magnitude of each column of q_bias and k_bias, where numbers were
    balanced by them.
    """

    q_factor: Tensor
    k_factor: Tensor
    packing: Packing
    peaks: Tensor | None = None

    def gradient(self, side: str, packed: Tensor) -> Tensor:
        """Returns the fp32 gradient (B, S, H, R) of q_bias (``side`` "q") or k_bias from that of the packed columns.

        A part's gradient is that of its factor, so of q_bias it is the sum over k's parts beside q's first part.
        """
        if not self.packing.split:
            return packed
        own = 0 if side == "q" else 1
        blocks = packed.unflatten(3, (self.packing.blocks, self.packing.rank))
        chosen = [index for index, pair in enumerate(part_pairs(self.packing.dtype)) if pair[own] == 0]
        # Not one gather: a list of indices would be copied to the device, and a capture of the stream forbids that.
        total: Tensor = blocks.select(3, chosen[0])
        for index in chosen[1:]:
            total = total + blocks.select(3, index)
        if self.peaks is None:
            return total
        return total * _power(self.peaks, 1 if side == "q" else -1)


def _power(peaks: Tensor, sign: int) -> Tensor:
    """Returns 2^(sign · balance) for each column, as the packing kernel's ``balance`` finds it."""
    exponents = peaks >> 23
    shift = torch.where((peaks > 0).all(0), ((exponents[1] - exponents[0]) >> 1).clamp(-126, 126), 0)
    return ((127 + sign * shift) << 23).view(torch.float32)


def is_aligned(tensor: Tensor) -> bool:
    """Returns whether a (B, S, H, D) tensor has a 16-byte pointer, unit last stride and 16-byte steps elsewhere."""
    if tensor.data_ptr() % _ALIGNMENT:
        return False
    step = _ALIGNMENT // tensor.element_size()
    batch, seqlen, nheads, last = tensor.stride()
    sizes = tensor.shape
    return (
        last == 1
        and (sizes[0] == 1 or batch % step == 0)
        and (sizes[1] == 1 or (seqlen % step == 0 and seqlen > 0))
        and (sizes[2] == 1 or nheads % step == 0)
    )


def needs_packing(factor: Tensor) -> bool:
    """Returns whether kernels need a copy of the (B, S, H, R) factor: its rows are not whole, aligned 16-byte steps."""
    return factor.shape[3] % 8 != 0 or not is_aligned(factor)


def prepare(q_bias: Tensor, k_bias: Tensor, packing: Packing, room: Room) -> Factors:
    """Returns the factors as kernels read them: themselves, or copies in what ``room(name, shape, dtype)`` gives.

    Kernels read the same number of columns from both, so both are copied if either must be.
    """
    if not (packing.split or packing.ones_column or needs_packing(q_bias) or needs_packing(k_bias)):
        return Factors(q_bias, k_bias, packing)
    dtype: torch.dtype = getattr(torch, packing.dtype)
    q_factor, k_factor = (
        room(name, (*factor.shape[:3], packing.columns), dtype)
        for name, factor in (("q_factor", q_bias), ("k_factor", k_bias))
    )
    factors = Factors(q_factor, k_factor, packing)
    if packing.balanced:
        factors = replace(factors, peaks=room("peaks", (2, packing.rank), torch.int32).zero_())
    _pack(q_bias, k_bias, factors)
    return factors


def _pack(q_bias: Tensor, k_bias: Tensor, factors: Factors) -> None:
    """Fills ``factors``: one launch, and one before it for numbers that have to be balanced."""
    dtypes = tuple(str(factor.dtype).removeprefix("torch.") for factor in (q_bias, k_bias))
    rows = [math.prod(factor.shape[:3]) for factor in (q_bias, k_bias)]
    arguments = {
        "q_bias_ptr": q_bias,
        "k_bias_ptr": k_bias,
        "peaks_ptr": factors.q_factor if factors.peaks is None else factors.peaks,
        "q_factor_ptr": factors.q_factor,
        "k_factor_ptr": factors.k_factor,
        "q_bias_strides": q_bias.stride(),
        "k_bias_strides": k_bias.stride(),
        "q_rows": rows[0],
        "k_rows": rows[1],
        "q_nheads": q_bias.shape[2],
        "k_nheads": k_bias.shape[2],
        "seqlen_q": q_bias.shape[1],
        "seqlen_k": k_bias.shape[1],
        "rank": factors.packing.rank,
        "factor_columns": factors.packing.columns,
    }
    for binary in binaries(q_bias.get_device(), factors.packing.kind, *dtypes):
        block = binary.constants["BLOCK_ROWS"]
        launch_binary(binary, sum(-(-count // block) for count in rows), arguments)


@functools.cache
def binaries(device_index: int, kind: Packing, q_dtype: str, k_dtype: str) -> tuple[Binary, ...]:
    """Returns the kernels that pack, for one device. Raises what Triton raises.

    They are not tuned. They follow from the problem alone (``kind`` has its full width for a rank), so the gate runs
    these very binaries with every kernel that it proves.
    """
    pairs = part_pairs(kind.dtype) if kind.split else ((0, 0),)
    width = kind.rank
    block_rows = _PACKED_VALUES // width
    packed = {
        "BLOCKS": len(pairs),
        "Q_PARTS": sum(pair[0] << 2 * block for block, pair in enumerate(pairs)),
        "K_PARTS": sum(pair[1] << 2 * block for block, pair in enumerate(pairs)),
        "BALANCED": kind.balanced,
        "ONES_COLUMN": kind.ones_column,
        "BLOCK_ROWS": block_rows,
        "BLOCK_COLUMNS": width,
    }
    peaks = {"BLOCK_ROWS": block_rows, "BLOCK_RANK": width}
    kernels: list[tuple[Any, dict[str, Any]]] = [(pack, packed)]
    if kind.balanced:
        kernels.insert(0, (find_peaks, peaks))
    return tuple(
        compile_binary(
            function,
            dtypes={"": kind.dtype, "q_bias_ptr": q_dtype, "k_bias_ptr": k_dtype, "peaks_ptr": "int32"},
            aligned=False,
            constants=constants,
            options={"num_warps": 4, "num_stages": 1},
            capability=describe(device_index).capability,
        ).load()
        for function, constants in kernels
    )


# What, beside the kernels, decides what the packed factors hold: part of the source hash.
FUNCTIONS: Final[tuple[Any, ...]] = (pack, find_peaks)
HOST_FUNCTIONS: Final[tuple[Any, ...]] = (
    part_pairs,
    Packing,
    Factors,
    _power,
    is_aligned,
    needs_packing,
    prepare,
    packed_rank,
    _pack,
    binaries,
)
CONSTANTS: Final[Mapping[str, object]] = {"alignment": _ALIGNMENT, "packed values": _PACKED_VALUES}
