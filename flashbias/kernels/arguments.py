"""From tensors to a kernel's run-time arguments: sizes, strides, grids.

Shared by the hot path (``flashbias.launcher``) and the gate (``flashbias.kernels.spec``), so what is proven is
what is launched.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
import triton
from torch import Tensor

from autotune.device import DeviceInfo
from cache_db.models import Config, Problem
from flashbias.band import Band
from flashbias.kernels import factors, splitting
from flashbias.kernels.backward_dkdv import backward_dkdv
from flashbias.kernels.backward_dq import backward_dq
from flashbias.kernels.backward_mask import backward_mask
from flashbias.kernels.binding import Binary, compile_binary, launch_binary
from flashbias.kernels.forward import forward
from flashbias.kernels.problem import wanted
from flashbias.kernels.space import DESCRIPTORS, padded

_MASK_CODES: Final = {"none": 0, "bool": 1}
_ADDITIVE: Final = 2
_OF_SEQUENCES: Final = ("cu_seqlens_q_ptr", "cu_seqlens_k_ptr", "sequence_facts")
_NO_STRIDES: Final = (0, 0, 0, 0)
FUNCTIONS: Final[Mapping[str, Any]] = {
    "forward": forward,
    "backward_dq": backward_dq,
    "backward_dkdv": backward_dkdv,
    "backward_mask": backward_mask,
}


@dataclass(frozen=True)
class Sizes:
    """The run-time sizes of one call. ``columns`` are those of the factors that kernels store gradients of.

    Of packed sequences (``packed``) ``batch`` is their number, ``seqlen_q`` and ``seqlen_k`` are the largest lengths
    and ``rows_q`` is the sum of those of q; ``shifted`` says that the band is aligned bottom-right in each, and
    ``positional`` names the factors that every sequence reads from their start.
    """

    batch: int
    nheads: int
    nheads_kv: int
    seqlen_q: int
    seqlen_k: int
    columns: int
    band: Band
    packed: bool = False
    rows_q: int = 0
    shifted: bool = False
    positional: tuple[str, ...] = ()


@functools.cache
def _settle_cache_keys() -> None:
    """Has Triton hash every kernel, in one order.

    The key under which Triton 3.6 keeps a binary on disk depends on which other kernels the process hashed before
    (functions they share hand on different sets of globals), so without this a binary that one process compiled is
    compiled again in the next: 1 to 2 s for each backward config.
    """
    if not triton.knobs.runtime.interpret:
        for function in (*FUNCTIONS.values(), *factors.FUNCTIONS, *splitting.FUNCTIONS.values()):
            _ = function.cache_key


def compile_kernel(kernel: str, config: Config, problem: Problem, device: DeviceInfo) -> Binary:
    """Compiles ``kernel`` in ``config`` for ``problem``; raises what Triton raises."""
    fields, params, gradients = problem.fields, config.params, wanted(problem)
    function = FUNCTIONS[kernel]
    split = splitting.split_of(kernel, config, problem)
    _settle_cache_keys()
    mask = str(fields["mask"])
    constants: dict[str, Any] = {
        "HEAD_DIM": fields["head_dim"],
        "VALUE_DIM": fields["value_dim"],
        "RANK": fields["rank_dim"],
        "HIGH": fields["causal"],
        "LOW": bool(fields["window"]),
        "VARLEN": fields["varlen"],
        "GQA": int(fields["gqa_group"]) > 1,
        "MASK": _MASK_CODES.get(mask, _ADDITIVE),
        "PRECISION": fields["precision"],
        "MASK_ROWS": fields["mask_dims"] == "matrix",
        "WANT_DQ": "q" in gradients,
        "WANT_DK": "k" in gradients,
        "WANT_DV": "v" in gradients,
        "WANT_DQ_BIAS": "q_bias" in gradients,
        "WANT_DK_BIAS": "k_bias" in gradients,
        "ONES_COLUMN": fields["ones_column"],
        "DESCRIPTORS": splitting.VARIANTS.get(config.variant, config.variant) == DESCRIPTORS,
        "SPLIT": split is not None,
        **({} if split else splitting.unsplit(function)),
        "BLOCK_M": params["BLOCK_M"],
        "BLOCK_N": params["BLOCK_N"],
        "BLOCK_D": padded(int(fields["head_dim"])),
        "BLOCK_DV": padded(int(fields["value_dim"])),
    }
    if not fields["varlen"]:  # absent arguments, so that their binaries are those of kernels that know no sequences
        constants |= dict.fromkeys(_OF_SEQUENCES)
    binary = compile_binary(
        function,
        dtypes={"": str(fields["dtype"]), "mask_ptr": mask, "dmask_ptr": mask}
        | dict.fromkeys(_OF_SEQUENCES[:2], "int32"),
        aligned=problem.layout == "aligned",
        constants={name: constants[name] for name in function.arg_names if name in constants},
        options={name: int(params[name]) for name in ("num_warps", "num_stages")},
        capability=device.capability,
    )
    if split is None:
        return binary
    combine = splitting.compile_combine(
        kernel,
        str(fields["dtype"]),
        binary.constants,
        aligned=problem.layout == "aligned",
        capability=device.capability,
    )
    return replace(binary, split=split, combine=combine, binary=splitting.joined(binary, combine))


def launch_kernel(kernel: str, binary: Binary, tensors: Mapping[str, Tensor], sizes: Sizes, scale: float) -> None:
    """Enqueues ``kernel`` on the current stream.

    ``tensors`` maps a kernel's pointer names (without ``_ptr``) to tensors: (B, S, H, D) in any strides with a
    unit last one; ``mask`` is (B, H, Sq, Sk), ``dmask`` has the mask's own dims; row values are contiguous
    (B, H, Sq). Absent ones are never read. Packed sequences are one batch of all their rows, with ``cu_seqlens_q``
    and ``cu_seqlens_k`` int32.
    """
    group = sizes.nheads // sizes.nheads_kv
    splits, tensors = splitting.with_room(binary.split, tensors, sizes.batch * sizes.nheads)
    arguments: dict[str, Any] = {
        "batches": sizes.batch,
        "nheads": sizes.nheads,
        "group": group,
        "factor_group": _factor_group(tensors, sizes, group),
        "seqlen_q": sizes.seqlen_q,
        "seqlen_k": sizes.seqlen_k,
        "low": sizes.band.low or 0,
        "high": sizes.band.high or 0,
        "sequence_facts": (sizes.rows_q, int(sizes.shifted)),
        "has_dlse": int("dlse" in tensors),
        "rank": sizes.columns,
        "factor_columns": tensors["q_factor"].shape[3] if "q_factor" in tensors else 0,
        "splits": splits,
        "scale": scale,
    }
    if "dmask" in tensors:
        arguments["mask_batches"], arguments["mask_nheads"] = tensors["dmask"].shape[:2]
    for name in binary.arguments if binary.combine is None else (*binary.arguments, *binary.combine.arguments):
        if name.endswith("_ptr"):
            arguments[name] = tensors.get(name[:-4], tensors["q"])
        elif name.endswith("_strides"):
            arguments[name] = _strides_of(name[:-8], tensors)
            if sizes.packed:
                arguments[name] = _sequence_strides(name[:-8], arguments[name], sizes)
    launch_binary(binary, _programs(kernel, binary, tensors, sizes), arguments, splits)
    if binary.combine is not None:
        launch_binary(binary.combine, sizes.batch * sizes.nheads * sizes.seqlen_q, arguments)


def _factor_group(tensors: Mapping[str, Tensor], sizes: Sizes, group: int) -> int:
    """Returns how many neighbouring query heads read one head of k_factor."""
    return group if "k_factor" in tensors and 1 < tensors["k_factor"].shape[2] == sizes.nheads_kv else 1


def _programs(kernel: str, binary: Binary, tensors: Mapping[str, Tensor], sizes: Sizes) -> int:
    """Returns the number of programs: one for each tile of queries, of keys, or of the mask."""
    block_m, block_n = int(binary.constants["BLOCK_M"]), int(binary.constants["BLOCK_N"])
    tiles_q, tiles_k = -(-sizes.seqlen_q // block_m), -(-sizes.seqlen_k // block_n)
    if kernel == "backward_dkdv":
        return tiles_k * sizes.batch * sizes.nheads_kv
    if kernel == "backward_mask":
        batch, nheads, *_ = tensors["dmask"].shape
        return batch * nheads * (tiles_q if binary.constants["MASK_ROWS"] else 1) * tiles_k
    return tiles_q * sizes.batch * sizes.nheads


def _strides_of(name: str, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Returns the strides a kernel takes of a tensor: all four of a mask, else (batch, seqlen, head)."""
    tensor = tensors.get(name)
    if name in ("mask", "dmask"):
        return _NO_STRIDES if tensor is None else tensor.stride()
    return _NO_STRIDES[:3] if tensor is None else _strides(tensor)


def _strides(tensor: Tensor) -> tuple[int, int, int]:
    """Returns (batch, seqlen, head) strides: 0 where a dim of size 1 is shared, whole 16-byte steps for one row."""
    batch, seqlen, nheads, _ = tensor.stride()
    sizes = tensor.shape
    return (
        0 if sizes[0] == 1 else batch,
        -(-sizes[3] // 8) * 8 if sizes[1] == 1 else seqlen,
        0 if sizes[2] == 1 else nheads,
    )


def _sequence_strides(name: str, strides: tuple[int, ...], sizes: Sizes) -> tuple[int, ...]:
    """Returns strides whose first one moves by rows: a sequence starts at its first row, or where all of them do."""
    return (0 if name in sizes.positional else strides[1], *strides[1:])


def as_bytes(mask: Tensor, sizes: Sizes) -> Tensor:
    """Returns the mask expanded to (B, H, Sq, Sk) without a copy, bool as bytes."""
    expanded = mask.expand(sizes.batch, sizes.nheads, sizes.seqlen_q, sizes.seqlen_k)
    return expanded.view(torch.uint8) if mask.dtype == torch.bool else expanded


# What, beside the kernels, decides what a launch computes: part of the source hash.
HOST_FUNCTIONS: Final[tuple[Any, ...]] = (
    *factors.HOST_FUNCTIONS,
    *splitting.HOST_FUNCTIONS,
    compile_kernel,
    launch_kernel,
    _factor_group,
    _programs,
    _strides_of,
    _strides,
    _sequence_strides,
    as_bytes,
)
CONSTANTS: Final[Mapping[str, object]] = {
    "mask codes": _MASK_CODES,
    "additive": _ADDITIVE,
    "of sequences": _OF_SEQUENCES,
    **splitting.CONSTANTS,
}
