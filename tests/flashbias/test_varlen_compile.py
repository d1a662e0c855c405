"""The kernels of packed sequences compile for GPUs that are not here; those of dense problems know nothing of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flashbias.kernels import sequences, space
from flashbias.kernels.arguments import compile_kernel
from flashbias.kernels.binding import compile_binary
from flashbias.kernels.problem import problem
from flashbias.kernels.spec import ATTENTION
from flashbias.kernels.varlen import sum_positions
from tests.flashbias.test_compile import HOPPER, SHAPE, shared_memory

pytestmark = pytest.mark.compile_only
PACKED = SHAPE.model_copy(update={"varlen": True, "grads": SHAPE.grads[:5]})


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_default_configs_compile_and_fit(capability: tuple[int, int]) -> None:
    """The ladder's last Triton rung exists for each kernel, and so does the sum over sequences."""
    device = replace(HOPPER, capability=capability, shared_memory=shared_memory(capability))
    found = problem(PACKED, device)
    assert "backward_mask" not in ATTENTION.kernels(found)
    for kernel in ATTENTION.kernels(found):
        binary = compile_kernel(kernel, space.default(kernel, found, device), found, device)
        assert int(binary.stats["shared"]) <= device.shared_memory
        assert "cu_seqlens_q_ptr" in binary.arguments
    dtypes = {"": "float32", "cu_seqlens_ptr": "int32"}
    options = {"num_warps": 4, "num_stages": 1}
    blocks = sequences.CONSTANTS["summed blocks"]
    summing = compile_binary(
        sum_positions, dtypes=dtypes, aligned=False, constants=blocks, options=options, capability=capability
    )
    assert len(summing.binary) == 64


@pytest.mark.parametrize("kernel", ["forward", "backward_dq", "backward_dkdv"])
def test_sequences_keep_bulk_copies_and_tensor_cores(kernel: str) -> None:
    """Descriptors made at a sequence's start are still TMA, and products wgmma, without spills."""
    found = problem(PACKED.model_copy(update={"nheads_kv": 2, "dtype": "bfloat16"}), HOPPER)
    binary = compile_kernel(kernel, space.config(space.DESCRIPTORS, 64, 64, 4, 2), found, HOPPER)
    assert "wgmma.mma_async" in binary.compiled.asm["ptx"]
    assert "cp.async.bulk.tensor" in binary.compiled.asm["ptx"]


def test_dense_kernels_have_no_trace_of_sequences() -> None:
    """Without ``varlen`` the arguments are absent from the code, so that nothing is passed or loaded for them."""
    found = problem(SHAPE, HOPPER)
    binary = compile_kernel("forward", space.default("forward", found, HOPPER), found, HOPPER)
    assert not {"cu_seqlens_q_ptr", "cu_seqlens_k_ptr", "sequence_facts"} & set(binary.arguments)
