"""Kernels that split keys compile without a GPU, and leave no trace in the binaries of those that do not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from flashbias.kernels import space
from flashbias.kernels.arguments import compile_kernel
from flashbias.kernels.problem import GRADIENTS, Shape, problem
from tests.flashbias.test_compile import HOPPER, shared_memory

pytestmark = pytest.mark.compile_only

DECODE = Shape(
    batch=1,
    nheads=8,
    nheads_kv=2,
    seqlen_q=1,
    seqlen_k=8192,
    headdim=128,
    rank=8,
    causal="bottom_right",
    dtype="bfloat16",
    grads=GRADIENTS,
)


@pytest.mark.parametrize("kernel", ["forward", "backward_dq"])
@pytest.mark.parametrize(
    ("capability", "variant"),
    [
        ((8, 0), "split_pointers"),
        ((9, 0), "split_descriptors"),
    ],
)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mask": "float32", "rank": 16, "headdim": 64, "factor_dtype": "float32"},
        {"headdim": 40, "layout": "strided"},
    ],
    ids=str,
)
def test_split_kernels_compile(kernel: str, capability: tuple[int, int], variant: str, changes: dict[str, Any]) -> None:
    """On Ampere and Hopper, with masks, exact factors and unaligned tensors; what combines them is part of the name."""
    device = replace(HOPPER, capability=capability, shared_memory=shared_memory(capability))
    found = problem(DECODE.model_copy(update=changes), device)
    config = space.split_config(variant, 16, 32, 4, 2, 2)
    if variant == space.SPLIT_DESCRIPTORS and found.layout != "aligned":
        assert space.rejects(kernel, config, found, device)
        return
    assert space.rejects(kernel, config, found, device) is None
    binary = compile_kernel(kernel, config, found, device)
    assert binary.combine is not None
    assert len(binary.binary) == len(binary.combine.binary) == 64
    assert binary.binary != binary.combine.binary
    assert int(binary.stats["shared"]) <= device.shared_memory
    assert ("cp.async.bulk.tensor" in binary.compiled.asm["ptx"]) == (variant == space.SPLIT_DESCRIPTORS)


@pytest.mark.parametrize("kernel", ["forward", "backward_dq"])
def test_waves_share_a_binary_and_whole_keys_know_nothing_of_splits(kernel: str) -> None:
    """How many splits there are is decided at launch; unsplit kernels take no scratch at all."""
    found = problem(DECODE, HOPPER)
    one, four = (
        compile_kernel(kernel, space.split_config(space.SPLIT_POINTERS, 16, 32, 4, 2, waves), found, HOPPER)
        for waves in (1, 4)
    )
    assert one.binary == four.binary
    assert one.split is not None
    assert four.split is not None
    assert four.split.programs == 4 * one.split.programs == 4 * HOPPER.sm_count
    whole = compile_kernel(kernel, space.config(space.POINTERS, 16, 32, 4, 2), found, HOPPER)
    assert (whole.split, whole.combine) == (None, None)
    assert not any(name.startswith("partial_") for name in whole.arguments)
    assert {"partial_out_ptr", "partial_dq_ptr"} & set(one.arguments)


@pytest.mark.parametrize("kernel", space.KERNELS)
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_the_default_config_for_few_queries_compiles(kernel: str, capability: tuple[int, int]) -> None:
    """The ladder's last Triton rung has 16 rows here."""
    device = replace(HOPPER, capability=capability, shared_memory=shared_memory(capability))
    found = problem(DECODE, device)
    config = space.default(kernel, found, device)
    assert config.params["BLOCK_M"] == 16
    assert int(compile_kernel(kernel, config, found, device).stats["shared"]) <= device.shared_memory
