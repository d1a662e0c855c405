"""From tensors to a kernel's run-time arguments: alignment, packing of factors, strides, grids.

Shared by the hot path (``flashbias.launcher``) and the gate (``flashbias.kernels.spec``), so what is proven is
what is launched.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
from torch import Tensor

from autotune.device import DeviceInfo, describe
from cache_db.models import Config, Problem
from flashbias.kernels.backward_dkdv import backward_dkdv
from flashbias.kernels.backward_dq import backward_dq
from flashbias.kernels.binding import Binary, compile_binary, launch_binary
from flashbias.kernels.forward import forward
from flashbias.kernels.packing import pack
from flashbias.kernels.problem import wanted
from flashbias.kernels.space import DESCRIPTORS, padded

_ALIGNMENT: Final = 16
_PACKED_VALUES: Final = 4096
_MASK_CODES: Final = {"none": 0, "bool": 1}
_ADDITIVE: Final = 2
# A kernel walks rows of queries, or, for dK and dV, rows of keys.
_TILED: Final = {"forward": "BLOCK_M", "backward_dq": "BLOCK_M", "backward_dkdv": "BLOCK_N"}
FUNCTIONS: Final[Mapping[str, Any]] = {"forward": forward, "backward_dq": backward_dq, "backward_dkdv": backward_dkdv}


@dataclass(frozen=True)
class Sizes:
    """The run-time sizes of one call; ``rank`` is the factors' own, before packing."""

    batch: int
    nheads: int
    seqlen_q: int
    seqlen_k: int
    rank: int


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


def factors(
    q_bias: Tensor, k_bias: Tensor, ones_column: bool, room: Callable[[str, tuple[int, ...]], Tensor]
) -> dict[str, Tensor]:
    """Returns both factors as kernels read them: themselves, or copies in what ``room(name, shape)`` gives.

    Kernels read the same number of columns from both, so both are copied if either must be. ``ones_column`` asks
    for copies in which the first column after k_bias's own is 1 (and that of q_bias 0).
    """
    named = {"q_factor": q_bias, "k_factor": k_bias}
    if not ones_column and not any(map(needs_packing, named.values())):
        return named
    columns = packed_columns(q_bias.shape[3], ones_column)
    packed = {name: room(name, (*factor.shape[:3], columns)) for name, factor in named.items()}
    _pack(q_bias, k_bias, packed, columns, ones_column)
    return packed


def packed_columns(rank: int, ones_column: bool) -> int:
    """Returns the columns of a packed factor, whole 16-byte steps of 8."""
    return -(-(rank + ones_column) // 8) * 8


def _pack(q_bias: Tensor, k_bias: Tensor, packed: Mapping[str, Tensor], columns: int, ones_column: bool) -> None:
    """Copies both factors into ``packed``, in one launch."""
    binary = _packing_binary(q_bias.get_device(), str(q_bias.dtype).removeprefix("torch."), columns, ones_column)
    rows = [math.prod(factor.shape[:3]) for factor in (q_bias, k_bias)]
    arguments = {
        "q_bias_ptr": q_bias,
        "k_bias_ptr": k_bias,
        "q_factor_ptr": packed["q_factor"],
        "k_factor_ptr": packed["k_factor"],
        "q_bias_strides": q_bias.stride(),
        "k_bias_strides": k_bias.stride(),
        "q_rows": rows[0],
        "k_rows": rows[1],
        "q_nheads": q_bias.shape[2],
        "k_nheads": k_bias.shape[2],
        "seqlen_q": q_bias.shape[1],
        "seqlen_k": k_bias.shape[1],
        "rank": q_bias.shape[3],
    }
    block = binary.constants["BLOCK_ROWS"]
    launch_binary(binary, sum(-(-count // block) for count in rows), arguments)


@functools.cache
def _packing_binary(device_index: int, dtype: str, columns: int, ones_column: bool) -> Binary:
    """Returns the packing kernel for one device; it is not tuned, and the gate runs it with every kernel it proves."""
    block_columns = 1 << (columns - 1).bit_length()
    constants = {
        "ONES_COLUMN": ones_column,
        "COLUMNS": columns,
        "BLOCK_ROWS": max(1, _PACKED_VALUES // block_columns),
        "BLOCK_COLUMNS": block_columns,
    }
    return compile_binary(
        pack,
        dtype=dtype,
        mask="none",
        aligned=False,
        constants=constants,
        options={"num_warps": 4, "num_stages": 1},
        capability=describe(device_index).capability,
    ).load()


@functools.cache
def _settle_cache_keys() -> None:
    """Has Triton hash every kernel, in one order.

    The key under which Triton 3.6 keeps a binary on disk depends on which other kernels the process hashed before
    (functions they share hand on different sets of globals), so without this a binary that one process compiled is
    compiled again in the next: 1 to 2 s for each backward config.
    """
    if not triton.knobs.runtime.interpret:
        for function in (*FUNCTIONS.values(), pack):
            _ = function.cache_key


def compile_kernel(kernel: str, config: Config, problem: Problem, device: DeviceInfo) -> Binary:
    """Compiles ``kernel`` in ``config`` for ``problem``; raises what Triton raises."""
    fields, params, gradients = problem.fields, config.params, wanted(problem)
    function = FUNCTIONS[kernel]
    _settle_cache_keys()
    mask = str(fields["mask"])
    constants = {
        "HEAD_DIM": fields["head_dim"],
        "VALUE_DIM": fields["value_dim"],
        "RANK": fields["rank_dim"],
        "CAUSAL": fields["causal"],
        "MASK": _MASK_CODES.get(mask, _ADDITIVE),
        "WANT_DQ": "q" in gradients,
        "WANT_DK": "k" in gradients,
        "WANT_DV": "v" in gradients,
        "WANT_DQ_BIAS": "q_bias" in gradients,
        "WANT_DK_BIAS": "k_bias" in gradients,
        "ONES_COLUMN": fields["ones_column"],
        "DESCRIPTORS": config.variant == DESCRIPTORS,
        "BLOCK_M": params["BLOCK_M"],
        "BLOCK_N": params["BLOCK_N"],
        "BLOCK_D": padded(int(fields["head_dim"])),
        "BLOCK_DV": padded(int(fields["value_dim"])),
    }
    return compile_binary(
        function,
        dtype=str(fields["dtype"]),
        mask=mask,
        aligned=problem.layout == "aligned",
        constants={name: constants[name] for name in function.arg_names if name in constants},
        options={name: int(params[name]) for name in ("num_warps", "num_stages")},
        capability=device.capability,
    )


def launch_kernel(kernel: str, binary: Binary, tensors: Mapping[str, Tensor], sizes: Sizes, scale: float) -> None:
    """Enqueues ``kernel`` on the current stream.

    ``tensors`` maps a kernel's pointer names (without ``_ptr``) to tensors: (B, S, H, D) in any strides with a
    unit last one; ``mask`` is (B, H, Sq, Sk); row values are contiguous (B, H, Sq). Absent ones are never read.
    """
    arguments: dict[str, Any] = {
        "nheads": sizes.nheads,
        "seqlen_q": sizes.seqlen_q,
        "seqlen_k": sizes.seqlen_k,
        "rank": sizes.rank,
        "factor_columns": tensors["q_factor"].shape[3] if "q_factor" in tensors else 0,
        "scale": scale,
    }
    for name in binary.arguments:
        if name.endswith("_ptr"):
            arguments[name] = tensors.get(name[:-4], tensors["q"])
        elif name.endswith("_strides"):
            tensor = tensors.get(name[:-8])
            if name == "mask_strides":
                arguments[name] = (0, 0, 0, 0) if tensor is None else tensor.stride()
            else:
                arguments[name] = (0, 0, 0) if tensor is None else _strides(tensor)
    rows = sizes.seqlen_k if kernel == "backward_dkdv" else sizes.seqlen_q
    tiles = -(-rows // binary.constants[_TILED[kernel]])
    launch_binary(binary, tiles * sizes.batch * sizes.nheads, arguments)


def _strides(tensor: Tensor) -> tuple[int, int, int]:
    """Returns (batch, seqlen, head) strides: 0 where a dim of size 1 is shared, whole 16-byte steps for one row."""
    batch, seqlen, nheads, _ = tensor.stride()
    sizes = tensor.shape
    return (
        0 if sizes[0] == 1 else batch,
        -(-sizes[3] // 8) * 8 if sizes[1] == 1 else seqlen,
        0 if sizes[2] == 1 else nheads,
    )


def as_bytes(mask: Tensor, sizes: Sizes) -> Tensor:
    """Returns the mask expanded to (B, H, Sq, Sk) without a copy, bool as bytes."""
    expanded = mask.expand(sizes.batch, sizes.nheads, sizes.seqlen_q, sizes.seqlen_k)
    return expanded.view(torch.uint8) if mask.dtype == torch.bool else expanded


# What, beside the kernels, decides what a launch computes: part of the source hash.
HOST_FUNCTIONS: Final[tuple[Any, ...]] = (
    is_aligned,
    needs_packing,
    factors,
    packed_columns,
    _pack,
    _packing_binary,
    compile_kernel,
    launch_kernel,
    _strides,
    as_bytes,
)
