"""The compile matrix without compiling: its rows, the order of a sample, its file, its tables and its exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from flashbias.bench import compiling, machine_code, matrix, matrix_tables
from flashbias.bench.matrix import ARCHITECTURES, PROBLEMS, Row
from flashbias.cli import matrix as command
from flashbias.kernels import space, space_memory
from flashbias.kernels.problem import problem

ROOT = Path(__file__).resolve().parents[2]
HEAD = {"triton": "3.6.0"}
NAMES = ["D64", "D128 1 query", "D64 fp32 ieee"]


# Shared memory of what Triton 3.6 compiled, and whether the GPU has so much.
MEASURED = [
    ("sm_80", "D128", "forward", (128, 128, 4, 3), 176128, False),
    ("sm_80", "D128 1 query", "forward", (16, 32, 4, 2), 23040, True),
    ("sm_89", "D64 mask gradient", "backward_dkdv", (128, 128, 8, 3), 243712, False),
    ("sm_86", "D64 R16", "backward_dq", (128, 128, 8, 3), 110592, False),
    ("sm_90", "D96", "backward_dq", (64, 128, 4, 3), 243712, False),
    ("sm_90", "D64 GQA", "backward_dq", (128, 128, 8, 3), 147456, True),
    ("sm_100", "D64 GQA", "backward_dkdv", (128, 64, 8, 3), 185344, True),
    ("sm_100", "D256", "forward", (128, 128, 8, 2), 340992, False),
    ("sm_120", "D64 unaligned", "forward", (128, 128, 8, 3), 36864, True),
    ("sm_90", "D256 fp32 tf32", "forward", (16, 32, 4, 1), 53248, True),
    ("sm_86", "D64 fp32 tf32", "backward_dq", (32, 64, 4, 3), 73728, True),
    ("sm_100", "D64 fp32 tf32", "backward_dkdv", (64, 32, 8, 3), 58368, True),
]


def row(config: str = "forward", **changes: object) -> Row:
    """Returns a row of Hopper's."""
    return replace(Row("sm_90", "D64", config, space.config("pointers", 64, 64, 4, 2)), **changes)  # type: ignore[arg-type]


def some_rows() -> Iterator[Row]:
    """Yields the rows of three problems on two architectures."""
    for arch in ("sm_80", "sm_90"):
        for name in NAMES:
            yield from matrix.rows(arch, name)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_problem_has_candidates_left_on_every_architecture(arch: str) -> None:
    """Each kernel's default is a row that no rule prunes, and it is not the only one."""
    for name in PROBLEMS:
        by_kernel: dict[str, list[Row]] = {}
        for each in matrix.rows(arch, name):
            by_kernel.setdefault(each.kernel, []).append(each)
        for rows in by_kernel.values():
            assert not rows[0].reason
            assert sum(not each.reason for each in rows) >= 3
            assert len({each.key for each in rows}) == len(rows)


def test_configs_of_one_binary_are_one_row() -> None:
    """Only how often the GPU is filled tells waves apart, and no compiler is asked about that."""
    rows = [each for each in matrix.rows("sm_90", "D128 1 query") if "WAVES" in each.config.params]
    tiles = [(each.kernel, each.config.variant, *list(each.config.params.items())[:4]) for each in rows]
    assert len(set(tiles)) == len(tiles) > 10


def test_rows_that_a_rule_prunes_say_which() -> None:
    """Nothing before Hopper has descriptors, and the rules of two rows are one if only their numbers differ."""
    pruned, left = matrix.split(some_rows())
    assert {each.rule for each in pruned if each.config.variant == "descriptors"} >= {
        "descriptors need compute capability #"
    }
    assert all(each.config.variant.endswith("pointers") for each in left if each.arch == "sm_80")
    reasons = ("3072 bytes, the device has 99", "5 bytes, the device has 99")
    assert len({row(reason=reason).rule for reason in reasons}) == 1


def test_any_beginning_of_the_order_is_a_fair_sample() -> None:
    """Architectures take turns, and no kernel has its second turn before all have had one; a seed means one order."""
    _, left = matrix.split(some_rows())
    order = matrix.fair(left, 3)
    assert sorted(each.key for each in order) == sorted(each.key for each in left)
    assert [each.arch for each in order[:4]] == ["sm_80", "sm_90"] * 2
    kernels = len({each.key[:3] for each in left})
    assert set(Counter(each.key[:3] for each in order[:kernels]).values()) == {1}
    assert [each.key for each in order] == [each.key for each in matrix.fair(left, 3)]
    assert [each.key for each in order] != [each.key for each in matrix.fair(left, 4)]


@pytest.mark.parametrize(("arch", "name", "kernel", "tile", "shared", "fits"), MEASURED)
def test_the_rule_on_shared_memory_knows_no_more_than_what_was_compiled(
    arch: str, name: str, kernel: str, tile: tuple[int, int, int, int], shared: int, fits: bool
) -> None:
    """It never claims more than the compiler needed, and forbids what needs more than the GPU has."""
    device = matrix.device(arch)
    found, config = problem(PROBLEMS[name], device), space.config("pointers", *tile)
    dims = (space.padded(int(found.fields["head_dim"])), space.padded(int(found.fields["value_dim"])))
    assert space_memory.least_bytes(kernel, config, found, dims, device.capability) <= shared
    reason = space.rejects(kernel, config, found, device)
    assert ("bytes of shared memory" in str(reason)) == (not fits) == (shared > device.shared_memory)


def test_unaligned_tensors_are_not_charged_for_buffers_they_do_not_have() -> None:
    """Nothing is copied asynchronously there: stages cost no shared memory, and the tile fits a small GPU."""
    device = matrix.device("sm_86")
    config = space.config("pointers", 64, 128, 8, 3)
    assert "shared memory" in str(space.rejects("forward", config, problem(PROBLEMS["D128"], device), device))
    unaligned = problem(PROBLEMS["D128"].model_copy(update={"layout": "strided"}), device)
    assert space.rejects("forward", config, unaligned, device) is None


@pytest.mark.parametrize("kernel", ["backward_dq", "backward_dkdv"])
def test_a_backward_that_overflows_tensor_memory_is_refused_on_blackwell_alone(kernel: str) -> None:
    """128 x 128 tiles with factors need 576 columns and more of 512; without a bias, in smaller tiles or on Hopper they run."""
    blackwell, hopper = matrix.device("sm_100"), matrix.device("sm_90")
    config = space.config("pointers", 128, 128, 8, 2)
    found = problem(PROBLEMS["D64"], blackwell)
    assert "tensor memory" in str(space.rejects(kernel, config, found, blackwell))
    assert space.rejects(kernel, config, problem(PROBLEMS["D64 no bias"], blackwell), blackwell) is None
    assert space.rejects(kernel, space.config("pointers", 64, 128, 8, 2), found, blackwell) is None
    assert space.rejects(kernel, config, problem(PROBLEMS["D64"], hopper), hopper) is None
    large = matrix.judged(matrix.Row("sm_100", "D64", kernel, config), "", {"shared": 1, "tensor_memory": 608})
    assert (large.status, "608 columns" in large.reason) == ("too_large", True)


def test_a_kernel_that_no_block_can_hold_is_no_success() -> None:
    """What needs more shared memory than the GPU has is told apart; a fault is what does not compile, but for AMD."""
    fits = matrix.judged(row(), "", {"shared": 232448})
    large = matrix.judged(row(), "", {"shared": 232449})
    failed = matrix.judged(row(), "crashed: SIGABRT", {}, final=False)
    assert [each.status for each in (fits, large, failed)] == ["compiled", "too_large", "failed"]
    assert [each.fault for each in (fits, large, failed)] == [False, False, True]
    assert "232449 bytes of shared memory, the device has 232448" in large.reason
    assert not replace(failed, arch="gfx942").fault


def test_a_file_gives_back_what_was_written_but_what_is_worth_another_try(tmp_path: Path) -> None:
    """Rows come back equal; the half line of a killed run and a compiler that crashed do not; another compiler's file is refused."""
    path = tmp_path / "rows.jsonl"
    good = row(status="compiled", figures={"shared": 1, "tensor_cores": "mma"})
    pruned, crashed = row("backward_dq", reason="a rule"), row("backward_dkdv", status="failed", final=False)
    command._write(path, HEAD, [good, pruned, crashed])
    path.write_text(path.read_text() + json.dumps(good.to_json())[:40])
    assert command._read(path, HEAD) == {good.key: good, pruned.key: pruned}
    assert command._read(tmp_path / "none.jsonl", HEAD) == {}
    with pytest.raises(ValueError, match="another triton"):
        command._read(path, {"triton": "3.7.0"})
    path.write_text("no matrix")
    with pytest.raises(ValueError, match="no compile matrix"):
        command._read(path, HEAD)


def test_tables_count_every_row_once() -> None:
    """A problem's cell tells compiled, pruned, and neither; rules and faults are told by name."""
    large = matrix.judged(row("backward_dq"), "", {"shared": 300000, "seconds": 2.0})
    rows = [matrix.judged(row(), "", {"shared": 1, "tensor_cores": "wgmma", "seconds": 1.0}), large]
    rows += [row("backward_dkdv", reason="needs 5 | 6"), matrix.judged(row("backward_mask"), "crashed: SIGABRT", {})]
    left = [replace(row(), problem="D96")]
    text = "\n".join(matrix_tables.summary(rows, left))
    assert "| D64 | 1 / 1 / 2 of 4 |" in text
    assert "| D96 | 0 / 0 / 0 of 1 |" in text
    assert "| needs # / # | 1 |" in text
    assert "| … with wgmma | 1 |" in text
    assert "| not compiled yet | 1 |" in text
    (fault,) = matrix_tables.faults(rows)
    assert "backward_mask" in fault
    assert "SIGABRT" in fault


def test_assembly_states_its_figures() -> None:
    """AMD's assembly says what it takes; what does not say so has no figures; the newest tensor core is named."""
    text = ".vgpr_count:     236\n.vgpr_spill_count: 3\nv_mfma_f32_32x32x8_bf16_1k"
    expected = {"shared": 7, "registers": 236, "spills": 3, "tensor_cores": "mfma", "bulk_copies": False}
    assert compiling.made({"amdgcn": text}, 7) == expected
    assert machine_code.of_amdgcn("s_endpgm") == {}
    ptx = "mma.sync.aligned wgmma.mma_async.sync cp.async.bulk.tensor.2d"
    assert compiling.made({"ptx": ptx}, 0) == {"shared": 0, "tensor_cores": "wgmma", "bulk_copies": True}


def test_an_interpreting_process_says_that_it_cannot_compile(tmp_path: Path) -> None:
    """Wrong usage ends with status 2, one line and no file."""
    script, output = ROOT / "scripts" / "compile_matrix.py", tmp_path / "rows.jsonl"
    done = subprocess.run(
        [sys.executable, str(script), "--output", str(output)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr
    assert not output.exists()
