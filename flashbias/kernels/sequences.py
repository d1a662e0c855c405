"""Packed sequences on the host: gradients summed over them, and their dense counterparts for the reference.

A packed tensor is (1, T, H, D), the rows of all sequences one after another; rows ``cu_seqlens[b]`` to
``cu_seqlens[b + 1]`` are sequence b. A *positional* factor is (1, longest, H, R), read from its start by every sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from autotune.device import describe
from autotune.spec import Reference, Tensors
from flashbias.kernels.binding import Binary, compile_binary, launch_binary
from flashbias.kernels.varlen import sum_positions

_BLOCKS: Final = {"BLOCK_ROWS": 16, "BLOCK_COLUMNS": 64}


@functools.cache
def binary(device_index: int) -> Binary:
    """Returns the kernel that sums over sequences, for one device; it is not tuned. Raises what Triton raises."""
    return compile_binary(
        sum_positions,
        dtypes={"": "float32", "cu_seqlens_ptr": "int32"},
        aligned=False,
        constants=_BLOCKS,
        options={"num_warps": 4, "num_stages": 1},
        capability=describe(device_index).capability,
    ).load()


def summed(gradient: Tensor, cu_seqlens: Tensor, positions: int) -> Tensor:
    """Returns the (1, positions, H, C) sum over sequences of a contiguous fp32 (1, T, H, C) gradient.

    Sequences are added in their order, so the sum is bitwise repeatable; the host does not wait for the device.
    """
    _, _, nheads, width = gradient.shape
    total = gradient.new_empty((1, positions, nheads, width))
    columns = nheads * width
    arguments = {
        "cu_seqlens_ptr": cu_seqlens,
        "packed_ptr": gradient,
        "total_ptr": total,
        "batches": cu_seqlens.shape[0] - 1,
        "positions": positions,
        "columns": columns,
    }
    programs = -(-positions // _BLOCKS["BLOCK_ROWS"]) * -(-columns // _BLOCKS["BLOCK_COLUMNS"])
    launch_binary(binary(gradient.get_device()), programs, arguments)
    return total


def split(inputs: Mapping[str, Tensor]) -> Iterator[Tensors]:
    """Yields the dense inputs of each sequence; waits for the device. What is not of sequences is handed on."""
    bounds = {side: inputs[f"cu_seqlens_{side}"].tolist() for side in "qk"}
    sides = {"q": "q", "dout": "q", "q_bias": "q", "k": "k", "v": "k", "k_bias": "k"}
    for index in range(len(bounds["q"]) - 1):
        ranges = {side: slice(*bounds[side][index : index + 2]) for side in "qk"}
        found = {"longest": inputs["longest"]}
        for name, side in sides.items():
            if name in inputs:
                rows = ranges[side]
                if inputs[name].shape[1] != inputs[side].shape[1]:  # positional
                    rows = slice(rows.stop - rows.start)
                found[name] = inputs[name][:, rows]
        if "dlse" in inputs:
            found["dlse"] = inputs["dlse"][:, :, ranges["q"]]
        yield found


def joined(parts: Iterable[Mapping[str, Tensor]], inputs: Mapping[str, Tensor]) -> Tensors:
    """Returns the packed outputs made of those of each sequence; gradients of positional factors are sums over them."""
    outputs: dict[str, list[Tensor]] = {}
    for part in parts:
        for name, value in part.items():
            outputs.setdefault(name, []).append(value)
    return {name: _joined(name, values, inputs) for name, values in outputs.items()}


def joined_references(parts: Iterable[Mapping[str, Reference]], inputs: Mapping[str, Tensor]) -> dict[str, Reference]:
    """Returns what :func:`joined` does, of values and of magnitudes."""
    kept = list(parts)
    values = joined(({name: each.value for name, each in part.items()} for part in kept), inputs)
    sizes = joined(
        ({name: each.magnitude for name, each in part.items() if each.magnitude is not None} for part in kept), inputs
    )
    return {name: Reference(value, sizes.get(name)) for name, value in values.items()}


def _joined(name: str, values: list[Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
    if name in ("lse", "delta"):
        return torch.cat(values, 2)
    factor = inputs.get(name.removeprefix("d")) if name in ("dq_bias", "dk_bias") else None
    if factor is None or factor.shape[1] == inputs[name[1]].shape[1]:
        return torch.cat(values, 1)
    # Added up in fp64 and rounded once: a sum in 16 bits would be far worse than what kernels do.
    total = values[0].new_zeros((1, factor.shape[1], *values[0].shape[2:]), dtype=torch.float64)
    for value in values:
        total[:, : value.shape[1]] += value
    return total.to(values[0].dtype)


# What decides what is summed: part of the source hash.
FUNCTIONS: Final[tuple[Any, ...]] = (sum_positions,)
HOST_FUNCTIONS: Final[tuple[Any, ...]] = (binary, summed)
CONSTANTS: Final[Mapping[str, object]] = {"summed blocks": _BLOCKS}
