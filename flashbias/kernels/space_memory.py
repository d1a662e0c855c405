"""The least shared and tensor memory a config can do with, from what was compiled for every architecture (docs/compile-matrix.md).

A program keeps one tile for good, that of its queries (in backward_dkdv of its keys), and streams tiles of the other
side past it through as many buffers as its stages make, one more where wgmma or tcgen05 still reads the last one. What
the compiler needs for changes of layout comes on top and is not known here: the figure is a lower bound, so that no
rule forbids what would fit.
"""

from __future__ import annotations

from typing import Final

from cache_db.models import Config, Problem
from flashbias.kernels.problem import wanted

# First capability that has asynchronous products of whole warp groups, and the first that no longer has.
_WARP_GROUPS: Final = (9, 0)
_NO_WARP_GROUPS: Final = (12, 0)
_GROUP_ROWS: Final = 64
# Masks whose tiles are copied asynchronously, and the bytes of a number: copies move 4 bytes at least.
_COPIED_MASKS: Final = {"float32": 4}
# The architecture with tensor memory, and the gradients of a kernel that together were seen to need 576 to 656 columns.
_TENSOR_MEMORY: Final = 10
_SIDES: Final = {"backward_dq": frozenset({"q", "q_bias"}), "backward_dkdv": frozenset({"k", "v", "k_bias"})}


def least_bytes(
    kernel: str, candidate: Config, problem: Problem, dims: tuple[int, int], capability: tuple[int, int]
) -> int:
    """Returns the least shared memory of a block in bytes; ``dims`` are the padded ones of a head and of a value."""
    fields, params, gradients = problem.fields, candidate.params, wanted(problem)
    stages, rank = int(params["num_stages"]), int(fields["rank_dim"])
    kept, streamed = int(params["BLOCK_M"]), int(params["BLOCK_N"])
    if kernel == "backward_dkdv":
        kept, streamed = streamed, kept
    elif kernel == "backward_dq" and not gradients & {"q", "q_bias"}:
        return 0  # delta alone has no tiles of keys
    asynchronous = problem.layout == "aligned" and stages > 1
    if fields["dtype"] == "float32":
        # Some loops were seen to stream one side only, and what is kept to stay in registers.
        return 4 * streamed * max(dims) * (stages - 1) if asynchronous else 0
    only_v = kernel == "backward_dkdv" and not gradients & {"k", "k_bias"}
    columns = dims[0] + rank + (0 if kernel == "forward" or only_v else dims[1])
    if not asynchronous:
        # Each tile goes through the same place; in backward_mask through none where products take it from registers.
        return 0 if kernel == "backward_mask" else 2 * (kept * columns + streamed * max(dims))
    groups = _WARP_GROUPS <= capability < _NO_WARP_GROUPS and kept >= _GROUP_ROWS
    buffers = 2 * streamed * (sum(dims) + rank) * (stages if groups else stages - 1)
    mask = 0 if kernel == "backward_mask" else _COPIED_MASKS.get(str(fields["mask"]), 0)
    return 2 * kept * columns + buffers + mask * kept * streamed * (stages - 1)


def tensor_memory_reason(kernel: str, candidate: Config, problem: Problem, capability: tuple[int, int]) -> str | None:
    """Returns why the accumulators of ``candidate`` have no room in the tensor memory of sm_100, or None.

    Triton 3.6 makes of such a config a binary without any product, and refuses to load it.
    """
    if capability[0] != _TENSOR_MEMORY or problem.fields["dtype"] == "float32" or not problem.fields["rank_dim"]:
        return None
    every = _SIDES.get(kernel)
    large = int(candidate.params["BLOCK_M"]) * int(candidate.params["BLOCK_N"]) >= 128 * 128
    if every is None or not large or not every <= wanted(problem):
        return None
    return "tiles of 128 x 128 and factors need more than the 512 columns of tensor memory"
