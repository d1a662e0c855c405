"""The kernels compile for every supported architecture, without a GPU, and use what the architecture offers."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from autotune.device import DeviceInfo
from cache_db.models import Config, Environment
from flashbias.kernels import space
from flashbias.kernels.arguments import compile_kernel
from flashbias.kernels.binding import machine_code
from flashbias.kernels.problem import GRADIENTS, Shape, problem
from tests.flashbias.score_kernel import TILE, write_scores

pytestmark = pytest.mark.compile_only

HOPPER = DeviceInfo(
    index=0,
    name="target",
    uuid="",
    capability=(9, 0),
    sm_count=132,
    shared_memory=232448,
    mig_profile="",
    triton_version="",
    environment=Environment(driver="", ptxas="", torch=""),
)
SHAPE = Shape(batch=1, nheads=4, seqlen_q=512, seqlen_k=512, headdim=64, rank=8, causal=True, grads=GRADIENTS)


def shared_memory(capability: tuple[int, int]) -> int:
    """Returns the opt-in shared memory of a block on the architecture, in bytes."""
    return {(8, 0): 166912, (9, 0): 232448, (10, 0): 232448}.get(capability, 101376)


@pytest.mark.parametrize("kernel", space.KERNELS)
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_the_default_config_compiles_and_fits_on_every_architecture(kernel: str, capability: tuple[int, int]) -> None:
    """The ladder's last Triton rung exists from Ampere to Blackwell."""
    device = replace(HOPPER, capability=capability, shared_memory=shared_memory(capability))
    found = problem(SHAPE, device)
    binary = compile_kernel(kernel, space.default(kernel, found, device), found, device)
    assert len(binary.binary) == 64
    assert int(binary.stats["shared"]) <= device.shared_memory


@pytest.mark.parametrize("kernel", space.KERNELS)
@pytest.mark.parametrize(
    "changes",
    [
        {"mask": "float32", "headdim": 128, "rank": 128},
        {"headdim": 40, "value_dim": 24, "dtype": "bfloat16", "layout": "strided"},
        {"headdim": 20, "grads": ("k_bias",)},
        {"nheads_kv": 2, "window": (100, 0), "factor_dtype": "float32", "mask": "bfloat16", "mask_dims": "keys"},
        {"headdim": 256, "rank": 200, "window": (64, -1), "grads": ("q_bias",)},
    ],
    ids=str,
)
def test_every_kind_of_problem_compiles(kernel: str, changes: dict[str, object]) -> None:
    """Wide ranks and heads, odd head dims, unaligned layouts, windows and single gradients have their kernels.

    More kinds are in the sample of the compile matrix (test_matrix_compile.py).
    """
    found = problem(SHAPE.model_copy(update=changes), HOPPER)
    assert compile_kernel(kernel, space.default(kernel, found, HOPPER), found, HOPPER).binary


def test_the_kernel_that_only_writes_scores_compiles() -> None:
    """The bias's exactness is measured on GPUs through it, which the interpreter alone would not keep compiling."""
    sizes = {"rows": "i32", "columns": "i32", "factor_columns": "i32"}
    constants = {"WIDTH": 16, "BLOCK": TILE}
    pointers = {"q_factor_ptr": "*fp16", "k_factor_ptr": "*fp16", "scores_ptr": "*fp32"}
    source = ASTSource(write_scores, {**pointers, **sizes, **dict.fromkeys(constants, "constexpr")}, constants)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


def test_a_binary_compiled_by_one_process_is_found_by_another_whatever_it_compiled_before(tmp_path: Path) -> None:
    """Candidates compiled in forks are loaded from Triton's disk cache by the process that runs them."""
    script = (
        "import sys\n"
        "from tests.flashbias.test_compile import HOPPER, SHAPE, space, compile_kernel, problem\n"
        "found = problem(SHAPE, HOPPER)\n"
        "for kernel in sys.argv[1:]:\n"
        "    compile_kernel(kernel, space.default(kernel, found, HOPPER), found, HOPPER)\n"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(root)}
    for kernels in (["forward", "backward_dq"], ["backward_dq"], ["backward_dq", "forward"]):
        subprocess.run([sys.executable, "-c", script, *kernels], env=environment, check=True, timeout=120)
    assert len(list(tmp_path.rglob("*.cubin"))) == 2


def test_the_layout_class_decides_the_binary_and_nothing_else_does() -> None:
    """Aligned and strided problems launch different code; the same problem always launches the same."""
    config: Config = space.config(space.POINTERS, 64, 64, 4, 2)
    aligned = problem(SHAPE, HOPPER)
    strided = problem(SHAPE.model_copy(update={"layout": "strided"}), HOPPER)
    first, again = (compile_kernel("forward", config, aligned, HOPPER).binary for _ in range(2))
    assert first == again
    assert compile_kernel("forward", config, strided, HOPPER).binary != first


def test_a_binarys_name_ignores_file_names_and_line_numbers_but_not_code() -> None:
    """The same source installed elsewhere, or with another comment, is the same proven binary."""
    found = problem(SHAPE, HOPPER)
    cubin = compile_kernel("forward", space.default("forward", found, HOPPER), found, HOPPER).compiled.asm["cubin"]
    assert b"primitives.py" in cubin
    assert machine_code(cubin.replace(b"primitives.py", b"elsewhere0.py")) == machine_code(cubin)
    code = cubin.index(b"\0", len(cubin) // 3) + 64
    changed = [cubin[:at] + bytes([cubin[at] ^ 1]) + cubin[at + 1 :] for at in range(code, len(cubin), len(cubin) // 7)]
    assert any(machine_code(each) != machine_code(cubin) for each in changed)
