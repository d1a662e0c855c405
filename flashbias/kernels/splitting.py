"""Split keys: a few queries over many keys are shared out among several programs, which a second kernel combines.

One program for each query tile of each (batch, head) leaves most of a GPU idle when there are few queries. A *split*
config walks the keys of such a tile in several programs; each writes what it found, unnormalised and in fp32, into
scratch, and :mod:`flashbias.kernels.combining` merges the splits of each row in their order. How many splits there
are follows from sizes and config alone, so results stay bitwise repeatable, and scratch holds about WAVES rows of
results for each multiprocessor and row of a tile, however long the keys are.

The idea of splitting keys is that of Flash-Decoding (Dao, Haziza, Massa, Sizov, 2023).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from cache_db.models import Config, Problem
from flashbias.kernels.binding import Binary, compile_binary
from flashbias.kernels.combining import combine_dq, combine_forward
from flashbias.kernels.problem import FEW_QUERIES, wanted

VARIANTS: Final[Mapping[str, str]] = {"split_pointers": "pointers", "split_descriptors": "descriptors"}
WAVES: Final = (1, 2, 4)
# Combining walks the splits of a row one after another: more would cost there what they save in the first kernel.
MAX_SPLITS: Final = 256
# fp32 numbers, and splits, that a combining program holds of one scratch tensor at a time.
_VALUES: Final = 4096
_MOST_ROWS: Final = 64
FUNCTIONS: Final[Mapping[str, Any]] = {"forward": combine_forward, "backward_dq": combine_dq}


@dataclass(frozen=True)
class Split:
    """How a kernel's keys are split: about ``programs`` programs in all, and what each finds for a row.

    ``widths`` maps a scratch tensor's name to how many fp32 numbers it holds for each row of each split.
    """

    programs: int
    block_m: int
    block_n: int
    widths: Mapping[str, int]

    def count(self, pairs: int, seqlen_q: int, seqlen_k: int) -> int:
        """Returns the number of splits for ``pairs`` (batch, head)s: at most one for each tile of keys."""
        tiles = -(-seqlen_q // self.block_m) * pairs
        return max(1, min(-(-self.programs // tiles), -(-seqlen_k // self.block_n), MAX_SPLITS))

    def shapes(self, pairs: int, seqlen_q: int, seqlen_k: int) -> dict[str, tuple[int, int, int]]:
        """Returns the (splits, rows, width) of each scratch tensor; a row is one query of one (batch, head)."""
        splits = self.count(pairs, seqlen_q, seqlen_k)
        return {name: (splits, pairs * seqlen_q, width) for name, width in self.widths.items()}


def split_of(kernel: str, config: Config, problem: Problem) -> Split | None:
    """Returns how ``config`` splits the keys of ``kernel``, None where it does not."""
    if config.variant not in VARIANTS:
        return None
    fields, gradients, params = problem.fields, wanted(problem), config.params
    rank = int(fields["rank_dim"])
    if kernel == "forward":
        widths = {"partial_out": int(fields["value_dim"]), "partial_max": 1, "partial_sum": 1}
    else:
        widths = {"partial_dq": int(fields["head_dim"])} if "q" in gradients else {}
        if "q_bias" in gradients:
            widths |= {"partial_ds_factor": rank, "partial_p_factor": rank}
            if not fields["ones_column"]:
                widths |= {"partial_ds_sum": 1, "partial_p_sum": 1}
    programs = int(params["WAVES"]) * problem.sm_count
    return Split(programs, int(params["BLOCK_M"]), int(params["BLOCK_N"]), widths)


def reason_against(kernel: str, problem: Problem) -> str | None:
    """Returns why the keys of ``kernel`` may not be split here, or None."""
    if kernel not in FUNCTIONS:
        return "this kernel's programs share out the keys already"
    if int(problem.fields["seqlen_q"]) > FEW_QUERIES:
        return f"more than {FEW_QUERIES} queries: their tiles alone are enough programs"
    if problem.fields["varlen"]:
        return "keys of variable length are not split"
    if kernel == "backward_dq" and not wanted(problem) & {"q", "q_bias"}:
        return "without a gradient of the queries' side there is nothing to split"
    return None


def unsplit(function: Any) -> dict[str, Any]:
    """Returns the compile-time values of ``function`` that leave splitting, and what only it needs, out of the binary."""
    return {name: None for name in function.arg_names if name.startswith("partial_")}


def compile_combine(
    kernel: str, dtype: str, constants: Mapping[str, Any], *, aligned: bool, capability: tuple[int, int]
) -> Binary:
    """Compiles what combines the splits of ``kernel``, whose compile-time values are ``constants``; once a process.

    Raises what Triton raises.
    """
    function = FUNCTIONS[kernel]
    known = {name: constants[name] for name in function.arg_names if name in constants}
    width = int(max(known.get("BLOCK_DV", 1), known.get("BLOCK_D", 1), known.get("RANK", 1)))
    known["BLOCK_SPLITS"] = min(_VALUES // width, _MOST_ROWS)
    return _compiled(kernel, dtype, tuple(known.items()), aligned, capability)


def with_room(split: Split | None, tensors: Mapping[str, Tensor], pairs: int) -> tuple[int, Mapping[str, Tensor]]:
    """Returns the number of splits of a launch for ``pairs`` (batch, head)s, and ``tensors`` with the scratch it needs.

    Scratch that is among ``tensors`` is used, other is allocated.
    """
    if split is None:
        return 1, tensors
    q = tensors["q"]
    shapes = split.shapes(pairs, q.shape[1], tensors["k"].shape[1])
    room = {
        name: torch.empty(shape, dtype=torch.float32, device=q.device)
        for name, shape in shapes.items()
        if name not in tensors
    }
    return next(iter(shapes.values()))[0], {**tensors, **room}


def joined(binary: Binary, combine: Binary) -> str:
    """Returns the name of both machine codes: what was proven was proven with what combined it."""
    names = binary.binary + combine.binary
    return hashlib.sha256(names.encode()).hexdigest() if names else ""


@functools.cache
def _compiled(
    kernel: str, dtype: str, constants: tuple[tuple[str, Any], ...], aligned: bool, capability: tuple[int, int]
) -> Binary:
    return compile_binary(
        FUNCTIONS[kernel],
        dtypes={"": dtype},
        aligned=aligned,
        constants=dict(constants),
        options={"num_warps": 4, "num_stages": 1},
        capability=capability,
    )


# What, beside the kernels, decides how keys are split and combined: part of the source hash.
HOST_FUNCTIONS: Final[tuple[Any, ...]] = (Split, split_of, unsplit, compile_combine, with_room, _compiled)
CONSTANTS: Final[Mapping[str, object]] = {
    "split variants": VARIANTS,
    "most splits": MAX_SPLITS,
    "combined values": _VALUES,
    "combined rows": _MOST_ROWS,
}
