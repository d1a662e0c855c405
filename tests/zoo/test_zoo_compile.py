"""The zoo's bad kernels compile for a Hopper, those that shall, and the others fail as they shall, in real compilers."""

from __future__ import annotations

from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from autotune.device import DeviceInfo
from autotune.sandbox import Limits, Sandbox
from cache_db.models import Environment
from tests.zoo import bad_kernels
from tests.zoo.faults import ZOO
from tests.zoo.keeper import home
from tests.zoo.zoo_spec import SPEC, bearer, planted, slow

pytestmark = pytest.mark.compile_only

HOPPER = DeviceInfo(
    index=0,
    name="target",
    uuid="GPU-00000000-0000-0000-0000-000000000000",
    capability=(9, 0),
    sm_count=132,
    shared_memory=232448,
    mig_profile="",
    triton_version=triton.__version__,
    environment=Environment(driver="", ptxas="", torch=""),
)
UNCOMPILABLE = {bad_kernels.not_a_tile, bad_kernels.not_an_operand}
POINTERS = {"flag_ptr": "*i32", ("flip_rarely", "x_ptr"): "*fp32"}


def signature(function: Any) -> dict[str, Any]:
    """Returns Triton's signature of a bad kernel as the zoo launches it on bf16 outputs."""
    kinds: dict[str, Any] = {}
    for name in function.arg_names:
        if name.endswith("_ptr"):
            kinds[name] = POINTERS.get((function.__name__, name), POINTERS.get(name, "*bf16"))
        elif name.endswith("_strides"):
            kinds[name] = ("i64",) * 4
        else:
            kinds[name] = "fp32" if name in ("factor", "scale") else "constexpr" if name.isupper() else "i32"
    return kinds


@pytest.mark.parametrize(
    "function", [each for each in bad_kernels.SPOILERS if each not in UNCOMPILABLE], ids=lambda each: each.__name__
)
def test_a_bad_kernel_compiles(function: Any) -> None:
    """What it does wrong shows when it runs, not before."""
    kinds = signature(function)
    blocks = {name: 128 for name, kind in kinds.items() if kind == "constexpr"}
    compiled = triton.compile(ASTSource(function, kinds, blocks), target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"]


def test_the_race_is_drawn_from_the_clocks_and_the_loop_reads_its_flag_again() -> None:
    """Neither is taken out of its kernel by an optimiser."""
    texts = {}
    for function in (bad_kernels.flip_rarely, bad_kernels.wait_forever):
        source = ASTSource(function, signature(function), {})
        texts[function.__name__] = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    assert "%clock64" in texts["flip_rarely"]
    assert "%globaltimer" in texts["flip_rarely"]
    assert "ld.volatile.global" in texts["wait_forever"]


def test_faults_of_compile_time_end_the_compile_and_nothing_else() -> None:
    """A source that Triton refuses, LLVM's abort, a good config: each has its outcome, in children that compile for a GPU."""
    problem = home(HOPPER)
    faults = ("compile_error", "compiler_abort")
    items = [*(planted(bearer(fault, HOPPER), fault) for fault in faults), slow(HOPPER)]
    with Sandbox(problem, HOPPER, Limits(workers=2)) as sandbox:
        outcomes = {
            config: outcome for _, config, outcome in sandbox.compile([("forward", config) for config in items])
        }
    for config, fault in zip(items, faults, strict=False):
        assert outcomes[config].verdict is ZOO[fault].verdict, outcomes[config].reason
        assert ZOO[fault].reason in outcomes[config].reason
    assert outcomes[items[-1]].safe


def test_the_tile_that_does_not_fit_passes_the_zoos_rules_and_compiles() -> None:
    """Only loading it tells that it needs more shared memory than the device has."""
    problem, config = home(HOPPER), planted(bearer("shared_memory", HOPPER), "shared_memory")
    assert SPEC.rejects("forward", config, problem, HOPPER) is None
    assert int(SPEC.compile("forward", config, problem, HOPPER).stats["shared"]) > HOPPER.shared_memory
