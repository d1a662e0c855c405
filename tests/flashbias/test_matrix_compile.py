"""The compile matrix, compiling: a sample over all architectures, known winners, and what a row tells."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from flashbias.bench import compiling, matrix
from flashbias.bench.matrix import ARCHITECTURES
from flashbias.kernels import space, space_memory
from flashbias.kernels.arguments import compile_kernel
from flashbias.kernels.problem import GRADIENTS, Shape, problem

pytestmark = pytest.mark.compile_only

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "compile_matrix.py"
HOPPER = matrix.device("sm_90")
SMALL = Shape(batch=1, nheads=50, seqlen_q=1024, seqlen_k=1024, headdim=32, rank=2, causal=True, grads=GRADIENTS[:5])
LONG = Shape(batch=2, nheads=4, seqlen_q=16384, seqlen_k=16384, headdim=32, rank=8, grads=GRADIENTS[:5])
WIDE = Shape(
    batch=2, nheads=16, seqlen_q=8192, seqlen_k=8192, headdim=64, rank=8, causal=True, dtype="bfloat16",
    grads=GRADIENTS[:5],
)  # fmt: skip
# What an H200 chose: docs/benchmarks/README.md.
WINNERS = [
    (SMALL, "forward", "pointers", (64, 64, 4, 2)),
    (SMALL, "backward_dq", "pointers", (64, 64, 4, 3)),
    (SMALL, "backward_dkdv", "pointers", (128, 64, 4, 3)),
    (LONG, "forward", "descriptors", (128, 128, 4, 3)),
    (LONG, "backward_dq", "descriptors", (64, 128, 4, 3)),
    (LONG, "backward_dkdv", "descriptors", (128, 64, 4, 2)),
    (WIDE, "forward", "descriptors", (64, 64, 4, 3)),
    (WIDE, "backward_dq", "descriptors", (64, 64, 4, 3)),
    (WIDE, "backward_dkdv", "pointers", (128, 64, 4, 2)),
]


def least_bytes(row: matrix.Row) -> int:
    """Returns what the rule says that the candidate needs."""
    device = matrix.device(row.arch)
    found = problem(matrix.PROBLEMS[row.problem], device)
    dims = (space.padded(int(found.fields["head_dim"])), space.padded(int(found.fields["value_dim"])))
    return space_memory.least_bytes(row.kernel, row.config, found, dims, device.capability)


@pytest.mark.timeout(900)
def test_sixty_candidates_over_all_architectures_compile_or_are_pruned(tmp_path: Path) -> None:
    """A sample that is the same everywhere finds none that neither compiles nor has a rule against it, and is kept."""
    output = tmp_path / "rows.jsonl"
    command = [sys.executable, str(SCRIPT), "--arch", *ARCHITECTURES[:6], "--sample", "60", "--output", str(output)]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    _, *lines = output.read_text(encoding="utf-8").splitlines()
    rows = [matrix.Row.from_json(json.loads(line)) for line in lines]
    made = [row for row in rows if row.status != "pruned"]
    assert len(made) == 60
    assert {row.arch for row in made} == set(ARCHITECTURES[:6])
    for row in made:
        assert least_bytes(row) <= int(row.figures["shared"]), f"the rule on shared memory is no lower bound: {row}"
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (again.returncode, again.stderr) == (0, ""), "nothing was left to compile"
    assert again.stdout == done.stdout
    assert [path.name for path in tmp_path.iterdir()] == [output.name], "what compilers leave is gone"


@pytest.mark.parametrize(("shape", "kernel", "variant", "tile"), WINNERS)
def test_known_winners_are_candidates_that_compile(
    shape: Shape, kernel: str, variant: str, tile: tuple[int, int, int, int]
) -> None:
    """No rule takes away what was the fastest of a whole sweep, and it still has Hopper's tensor cores and copies."""
    found, config = problem(shape, HOPPER), space.config(variant, *tile)
    assert config in space.candidates(found, HOPPER)
    assert space.rejects(kernel, config, found, HOPPER) is None
    binary = compile_kernel(kernel, config, found, HOPPER)
    figures = compiling.made(binary.assembly, int(binary.stats["shared"]))
    assert figures["tensor_cores"] == "wgmma"
    assert figures["bulk_copies"] == (variant == "descriptors")
    assert int(figures["shared"]) <= HOPPER.shared_memory
    assert 64 < int(figures["registers"]) <= 255
    assert int(figures["registers"]) == 255 or not figures["spills"], "ptxas spills when registers have run out"
    assert int(figures["spills"]) < 200


def test_what_fails_is_a_row_of_its_own_and_the_others_are_compiled() -> None:
    """A tile that is no power of two has the compiler's own words, an endless one its time limit, and the good one is made."""
    good = matrix.Row("sm_90", "D64", "forward", space.config("pointers", 64, 64, 4, 2))
    bad = replace(good, config=space.config("pointers", 48, 64, 4, 2))
    amd = replace(good, arch=matrix.AMD)
    rows = {row.key: row for row in compiling.compiled([bad, good, amd], 2, 120)}
    assert (rows[good.key].status, rows[amd.key].status) == ("compiled", "compiled")
    assert rows[amd.key].figures["tensor_cores"] == "mfma"
    assert rows[bad.key].status == "failed"
    assert "power of 2" in rows[bad.key].reason
    assert rows[bad.key].final
    (late,) = compiling.compiled([good], 1, 0.01)
    assert (late.status, late.final) == ("failed", False)
    assert "still compiling" in late.reason
    assert list(compiling.compiled([good], 1, 60, seconds=0.0)) == []
