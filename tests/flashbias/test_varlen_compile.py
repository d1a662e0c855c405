"""Kernels of packed sequences compile without a GPU, and dense ones know nothing of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flashbias.kernels import space
from flashbias.kernels.arguments import compile_kernel
from flashbias.kernels.problem import problem
from tests.flashbias.test_compile import HOPPER, SHAPE, shared_memory

pytestmark = pytest.mark.compile_only

RAGGED = SHAPE.model_copy(update={"varlen": True, "grads": SHAPE.grads[:5]})
KERNELS = ["forward", "backward_dq", "backward_dkdv"]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_the_default_config_compiles_and_fits(kernel: str, capability: tuple[int, int]) -> None:
    """Grouped heads, a window and exact factors, on Ampere and Hopper."""
    device = replace(HOPPER, capability=capability, shared_memory=shared_memory(capability))
    changes = {"nheads_kv": 2, "window": (100, 0), "factor_dtype": "float32", "rank": 2}
    found = problem(RAGGED.model_copy(update=changes), device)
    binary = compile_kernel(kernel, space.default(kernel, found, device), found, device)
    assert len(binary.binary) == 64
    assert int(binary.stats["shared"]) <= device.shared_memory


@pytest.mark.parametrize("kernel", KERNELS)
def test_hopper_binaries_use_tensor_cores_and_bulk_copies(kernel: str) -> None:
    """Programs that leave early keep the compiler from nothing."""
    binary = compile_kernel(kernel, space.config(space.DESCRIPTORS, 64, 64, 4, 2), problem(RAGGED, HOPPER), HOPPER)
    assert "wgmma.mma_async" in binary.compiled.asm["ptx"]
    assert "cp.async.bulk.tensor" in binary.compiled.asm["ptx"]


@pytest.mark.parametrize("kernel", KERNELS)
def test_dense_kernels_take_no_argument_of_sequences(kernel: str) -> None:
    """What a dense problem does not have is absent from its binary."""
    dense, packed = (
        compile_kernel(kernel, space.default(kernel, found, HOPPER), found, HOPPER)
        for found in (problem(SHAPE, HOPPER), problem(RAGGED, HOPPER))
    )
    own = {"cu_seqlens_q_ptr", "cu_seqlens_k_ptr", "sequence_facts"}
    assert not own & set(dense.arguments)
    assert own <= set(packed.arguments)
    assert dense.binary != packed.binary
