"""The configurations worth trying for each kernel, and the rules that forbid one, each with its reason."""

from __future__ import annotations

from itertools import product
from typing import Final

from autotune.device import DeviceInfo
from cache_db.models import Config, Problem, Scalar
from flashbias.kernels import space_fp32, space_memory, splitting
from flashbias.kernels.problem import FEW_QUERIES, wanted

IMPLEMENTATION: Final = "triton"
KERNELS: Final = ("forward", "backward_dq", "backward_dkdv", "backward_mask")
POINTERS: Final = "pointers"
DESCRIPTORS: Final = "descriptors"
SPLIT_POINTERS, SPLIT_DESCRIPTORS = splitting.VARIANTS

_VARIANTS: Final = (POINTERS, DESCRIPTORS, SPLIT_POINTERS, SPLIT_DESCRIPTORS)
_BLOCKS: Final = (16, 32, 64, 128)
_WARPS: Final = (2, 4, 8)
_STAGES: Final = (1, 2, 3, 4)
_PARAMS: Final = {"BLOCK_M": _BLOCKS, "BLOCK_N": _BLOCKS, "num_warps": _WARPS, "num_stages": _STAGES}
# fp32 values per thread in accumulators and score tiles: past this, ptxas spilled in every config compiled for
# sm_90 at headdim 32, 64 and 128, and none of them came within 20 % of the fastest.
_MAX_VALUES_PER_THREAD: Final = 288
_NARROW_RANK: Final = 16
# (BLOCK_M, BLOCK_N, num_warps, num_stages) for each bucket of few queries: of configs with whole keys, and with split.
# wgmma multiplies 64 rows at least, from shared memory: with a few keys' loads to hide behind, empty rows cost nothing.
_FEW_TILES: Final = {
    16: (
        ((16, 32, 4, 2), (16, 64, 4, 2), (16, 64, 4, 3), (16, 128, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3)),
        (
            (16, 32, 4, 3),
            (16, 64, 4, 3),
            (16, 64, 4, 4),
            (16, 128, 4, 3),
            (64, 64, 4, 3),
            (64, 128, 4, 2),
            (64, 128, 8, 2),
        ),
    ),
    64: (
        ((16, 32, 4, 2), (16, 64, 4, 3), (64, 32, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2)),
        ((16, 64, 4, 3), (16, 128, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (64, 128, 8, 2)),
    ),
}


def config(variant: str, block_m: int, block_n: int, num_warps: int, num_stages: int) -> Config:
    """Returns one Triton config; BLOCK_M counts queries and BLOCK_N keys, in every kernel."""
    params: dict[str, Scalar] = {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }
    return Config(implementation=IMPLEMENTATION, variant=variant, params=params)


def split_config(variant: str, block_m: int, block_n: int, num_warps: int, num_stages: int, waves: int) -> Config:
    """Returns one config of a split variant, with about ``waves`` programs for each multiprocessor."""
    plain = config(variant, block_m, block_n, num_warps, num_stages)
    return plain.model_copy(update={"params": {**plain.params, "WAVES": waves}})


def padded(dim: int) -> int:
    """Returns the power of two (at least 16, the tensor core's step) that a head dim is computed with."""
    return max(16, 1 << (dim - 1).bit_length())


def candidates(problem: Problem, device: DeviceInfo) -> list[Config]:
    """Returns every config worth trying for any kernel, before ``rejects`` is asked."""
    few, dim = int(problem.fields["seqlen_q"]) <= FEW_QUERIES, _widest(problem)
    if device.interpreted:
        second = split_config(SPLIT_DESCRIPTORS, 16, 32, 4, 1, 4) if few else config(DESCRIPTORS, 32, 32, 4, 1)
        return [config(POINTERS, 32, 32, 4, 1), second, config(DESCRIPTORS if few else POINTERS, 16, 32, 4, 1)]
    if problem.fields["dtype"] == "float32":
        tiles = space_fp32.tiles(str(problem.fields["precision"]), dim)
        return [config(variant, *tile) for tile, variant in product(tiles, (DESCRIPTORS, POINTERS))]
    if few:
        return _few_queries(16 if int(problem.fields["seqlen_q"]) <= 16 else FEW_QUERIES)
    blocks = [(128, 128), (128, 64), (64, 128), (64, 64)]
    if problem.fields["occupancy"] == "<1" or dim > 64:
        blocks += [(64, 32), (32, 64)]
    if dim > 128:
        blocks += [(32, 32), (64, 16), (16, 64)]
    found = [
        config(variant, block_m, block_n, num_warps, num_stages)
        for (block_m, block_n), variant, num_warps, num_stages in product(
            blocks, (DESCRIPTORS, POINTERS), (4, 8), (3, 2)
        )
        # 8 warps split a tile of 64 rows into halves that wgmma cannot use; they never won there, unless a head is so
        # wide that 4 warps have no registers for it.
        if num_warps == 4 or block_m * block_n >= 128 * 64 or (dim > 128 and block_m * block_n >= 64 * 32)
    ]
    # Large tiles of few warps take longest to compile: first in line, they do not keep one core busy at the end.
    return sorted(found, key=lambda each: -_scores_per_warp(each))


def _few_queries(bucket: int) -> list[Config]:
    """Returns the configs for so few queries: small tiles of them, keys in one piece or split."""
    whole, shared = _FEW_TILES[bucket]
    found = [config(variant, *tile) for tile, variant in product(whole, (DESCRIPTORS, POINTERS))]
    # The number of splits is none of the compiler's business: all waves of one tile are one binary, compiled once if
    # they do not stand side by side in the queue.
    for waves in splitting.WAVES:
        found += [split_config(variant, *tile, waves) for tile, variant in product(shared, splitting.VARIANTS)]
    return found


def default(kernel: str, problem: Problem, device: DeviceInfo) -> Config:
    """Returns the conservative config: pointers, small tiles, 4 warps; right wherever it compiles."""
    if device.interpreted:
        return config(POINTERS, 32, 32, 4, 1)
    dim = _widest(problem)
    if problem.fields["dtype"] == "float32":
        return config(POINTERS, *space_fp32.default_tile(kernel, str(problem.fields["precision"]), dim))
    if dim > 128:
        return config(POINTERS, 32, 32, 4, 1)
    block_m = 16 if int(problem.fields["seqlen_q"]) <= FEW_QUERIES else 64
    wide = dim > 64 or int(problem.fields["rank_dim"]) > 32
    return config(POINTERS, block_m, 32 if wide else 64, 4, 2 if kernel == "forward" else 1)


def rejects(kernel: str, candidate: Config, problem: Problem, device: DeviceInfo) -> str | None:
    """Returns the reason why ``candidate`` may not run ``kernel`` of ``problem`` here, or None."""
    if kernel not in KERNELS:
        return f"unknown kernel {kernel!r}"
    if candidate.implementation != IMPLEMENTATION or candidate.variant not in _VARIANTS:
        return f"unknown implementation {candidate.implementation}/{candidate.variant}"
    split = candidate.variant in splitting.VARIANTS
    params = {**_PARAMS, "WAVES": splitting.WAVES} if split else _PARAMS
    for name, allowed in params.items():
        value = candidate.params.get(name)
        if type(value) is not int or value not in allowed:
            return f"{name} must be one of {allowed}"
    if len(candidate.params) != len(params):
        return f"params must be exactly {', '.join(params)}"
    reason = splitting.reason_against(kernel, problem) if split else None
    if candidate.variant in (DESCRIPTORS, SPLIT_DESCRIPTORS):
        reason = reason or _descriptor_reason(kernel, problem, device)
    if reason:
        return reason
    if device.interpreted:
        return None
    values = _values_per_thread(kernel, candidate, problem)
    if problem.fields["dtype"] == "float32":
        block_m = int(candidate.params["BLOCK_M"])
        reason = space_fp32.reason(kernel, str(problem.fields["precision"]), block_m, values)
        if reason:
            return reason
    if values > _MAX_VALUES_PER_THREAD:
        return f"{values} fp32 values per thread would spill (limit {_MAX_VALUES_PER_THREAD})"
    dims = padded(int(problem.fields["head_dim"])), padded(int(problem.fields["value_dim"]))
    needed = space_memory.least_bytes(kernel, candidate, problem, dims, device.capability)
    if needed > device.shared_memory:
        return f"needs at least {needed} bytes of shared memory, the device has {device.shared_memory}"
    return space_memory.tensor_memory_reason(kernel, candidate, problem, device.capability)


def _widest(problem: Problem) -> int:
    """Returns the widest padded dim of a head, a value or a factor."""
    return max(padded(int(problem.fields[name])) for name in ("head_dim", "value_dim", "rank_dim"))


def _descriptor_reason(kernel: str, problem: Problem, device: DeviceInfo) -> str | None:
    if kernel == "backward_mask":
        return "this kernel has no descriptors"
    if problem.layout != "aligned":
        return "descriptors need 16-byte aligned pointers and strides"
    if not device.interpreted and device.capability < (9, 0):
        return "descriptors need compute capability 9.0"
    return None


def _scores_per_warp(candidate: Config) -> int:
    return int(candidate.params["BLOCK_M"]) * int(candidate.params["BLOCK_N"]) // int(candidate.params["num_warps"])


def _values_per_thread(kernel: str, candidate: Config, problem: Problem) -> int:
    block_m, block_n = int(candidate.params["BLOCK_M"]), int(candidate.params["BLOCK_N"])
    dim, value_dim = padded(int(problem.fields["head_dim"])), padded(int(problem.fields["value_dim"]))
    # Up to 16 columns a factor's products hide in the margin of the limit, which was found with them.
    rank = int(problem.fields["rank_dim"]) if int(problem.fields["rank_dim"]) > _NARROW_RANK else 0
    gradients = wanted(problem)
    if kernel == "forward":
        values = block_m * (block_n + value_dim)
    elif kernel == "backward_dq":
        values = block_m * (2 * block_n + dim + (2 * rank if "q_bias" in gradients else 0))
    elif kernel == "backward_mask":
        values = block_m * 3 * block_n
    else:
        values = block_n * (2 * block_m + dim + value_dim + (rank if "k_bias" in gradients else 0))
    values //= 32 * int(candidate.params["num_warps"])
    if kernel == "backward_dq" and block_m == 16 and int(problem.fields["seqlen_q"]) <= FEW_QUERIES:
        # Each warp holds all of k and v, two numbers in one register: ptxas spilled 500 to 1,700 bytes from 512 on.
        values = max(values, block_n * (dim + value_dim) // 64)
    return values
