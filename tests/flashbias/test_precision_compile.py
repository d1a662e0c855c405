"""The kernels of fp32 inputs compile for GPUs that are not here, and use what their precision is for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flashbias.kernels import space
from flashbias.kernels.arguments import compile_kernel
from flashbias.kernels.binding import attributes_of
from flashbias.kernels.forward import forward
from flashbias.kernels.problem import problem
from flashbias.kernels.spec import ATTENTION
from flashbias.precision import PRECISIONS
from tests.flashbias.test_compile import HOPPER, SHAPE, shared_memory

pytestmark = pytest.mark.compile_only
FLOATS = SHAPE.model_copy(update={"dtype": "float32", "headdim": 32, "mask": "float32"})


@pytest.mark.parametrize("arithmetic", PRECISIONS)
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_default_configs_compile_and_fit(capability: tuple[int, int], arithmetic: str) -> None:
    """The ladder's last Triton rung exists in every precision, for each kernel."""
    device = replace(HOPPER, capability=capability, shared_memory=shared_memory(capability))
    found = problem(FLOATS.model_copy(update={"precision": arithmetic}), device)
    for kernel in ATTENTION.kernels(found):
        binary = compile_kernel(kernel, space.default(kernel, found, device), found, device)
        assert int(binary.stats["shared"]) <= device.shared_memory


def test_tf32_uses_tensor_cores_and_ieee_does_not() -> None:
    """Three products for one in tf32x3; none in full precision; the bias is split even in tf32."""
    counts = {}
    for arithmetic in PRECISIONS:
        found = problem(FLOATS.model_copy(update={"precision": arithmetic, "mask": "none"}), HOPPER)
        binary = compile_kernel("forward", space.config(space.POINTERS, 64, 32, 4, 2), found, HOPPER)
        counts[arithmetic] = binary.compiled.asm["ptx"].count("wgmma.mma_async")
    assert counts["ieee"] == 0
    assert 0 < counts["tf32"] < counts["tf32x3"]


@pytest.mark.parametrize("headdim", [16, 64, 128, 256])
@pytest.mark.parametrize("arithmetic", PRECISIONS)
def test_every_kernel_has_candidates_and_an_allowed_default(arithmetic: str, headdim: int) -> None:
    """Lists that a sweep of a minute can compile, never empty, with a default that no rule forbids."""
    found = problem(FLOATS.model_copy(update={"precision": arithmetic, "headdim": headdim, "rank": headdim}), HOPPER)
    for kernel in ATTENTION.kernels(found):
        allowed = [c for c in space.candidates(found, HOPPER) if not space.rejects(kernel, c, found, HOPPER)]
        assert 4 <= len(allowed) <= 40
        assert len(set(allowed)) == len(allowed)
        assert space.rejects(kernel, space.default(kernel, found, HOPPER), found, HOPPER) is None


def test_strides_of_fp32_are_promised_in_steps_of_four() -> None:
    """16 bytes are four numbers: a promise of eight would be false."""
    index = forward.arg_names.index("q_strides")
    assert attributes_of(forward, True, 4)[index, 0] == [["tt.divisibility", 4]]
    found = problem(FLOATS.model_copy(update={"mask": "none"}), HOPPER)
    binary = compile_kernel("forward", space.default("forward", found, HOPPER), found, HOPPER)
    assert "tt.divisibility = 4 : i32" in binary.compiled.asm["ttir"]
