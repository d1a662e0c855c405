"""Figures of a kernel: what is known when it is compiled, what a launch adds, and silence about the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

import autotune
from autotune import Settings, resolve
from autotune.device import describe, interpreting
from autotune.occupancy import figures
from autotune.sandbox import Sandbox
from cache_db import open_layers
from cache_db.models import Verdict
from flashbias.kernels import space
from flashbias.kernels.arguments import compile_kernel
from flashbias.kernels.problem import problem
from tests.autotune.counting_spec import counting_problem
from tests.autotune.softmax_spec import softmax_config, softmax_kernel
from tests.flashbias.test_compile import HOPPER, SHAPE


@pytest.mark.compile_only
def test_compiled_kernel_that_is_not_loaded_has_shared_memory_and_warps_alone() -> None:
    """Registers and occupancy are not guessed before the machine code is on a device."""
    found = problem(SHAPE, HOPPER)
    binary = compile_kernel("forward", space.config(space.POINTERS, 64, 64, 4, 2), found, HOPPER)
    assert figures(binary.compiled) == {"shared": binary.compiled.metadata.shared, "num_warps": 4}
    assert binary.stats == figures(binary.compiled)


def test_what_is_no_compiled_kernel_has_no_figures() -> None:
    """Interpreted functions and nothing at all are no fault."""
    assert figures(None) == figures(softmax_kernel) == {}
    found = problem(SHAPE, describe(-1))
    binary = compile_kernel("forward", space.config(space.POINTERS, 64, 64, 4, 2), found, describe(-1))
    assert (binary.stats, binary.assembly) == ({}, {})


@pytest.mark.skipif(not interpreting(), reason="runs kernels in the interpreter (TRITON_INTERPRET=1)")
def test_what_a_kernel_tells_only_after_its_launch_is_stored_with_every_trial(tmp_path: Path) -> None:
    """Measuring alone tells it, and so do safe, wrong and failed proofs: the figures are read after the launches."""
    found = counting_problem("32 64:zeroed_row 128:raises_at_launch")
    with Sandbox(found, describe(-1)) as sandbox:
        timed = sandbox.measure("forward", [softmax_config(32)], {}, 2)
    assert timed[softmax_config(32).hash]["launches"] == 3
    autotune.forget()
    resolve(found, describe(-1), Settings(cache_dir=tmp_path))
    autotune.forget()
    rows = {row.verdict: row for row in open_layers(tmp_path).trials(found, "forward")}
    assert rows.keys() == {Verdict.SAFE, Verdict.WRONG, Verdict.CRASHED}
    assert all(int(row.figures["launches"]) >= 1 for row in rows.values()), rows
