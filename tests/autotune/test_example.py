"""The worked example of a foreign kernel is tuned and gated by autotune alone, and a fault planted in it is found."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from autotune.device import describe, interpreting
from autotune.sandbox import Sandbox
from cache_db.models import Verdict
from cache_db.store import Store

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs" / "examples"
needs_kernels = pytest.mark.skipif(not interpreting(), reason="runs kernels in the interpreter (TRITON_INTERPRET=1)")


def run(folder: Path) -> str:
    """Returns what the example prints; fails if it imported flashbias."""
    code = "import runpy, sys; runpy.run_path(sys.argv[0], run_name='__main__'); assert 'flashbias' not in sys.modules"
    script = f"import sys; sys.argv[:] = sys.argv[1:]; sys.path.insert(0, {str(EXAMPLES)!r}); {code}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script, str(EXAMPLES / "layer_norm.py"), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_kernels
def test_the_example_tunes_itself_and_remembers(tmp_path: Path) -> None:
    """Both kernels get a winner of level 2; a second process stores nothing new and says the same."""
    first = run(tmp_path)
    assert first.count("(winner, level 2)") == 2
    store = Store.open(tmp_path / "flashbias.db")
    counts = store.counts()
    assert run(tmp_path) == first
    assert store.counts() == counts


@needs_kernels
def test_a_fault_planted_in_the_example_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient without its last term, and a mean over the padded width: neither gets past the gate."""
    source = (EXAMPLES / "layer_norm.py").read_text(encoding="utf-8")
    faulty = source.replace("- z * (tl.sum(g * z, 1) / columns)[:, None]", "").replace(
        "mean = tl.sum(x, 1) / columns", "mean = tl.sum(x, 1) / WIDTH"
    )
    assert faulty.count("columns)[:, None]") == source.count("columns)[:, None]") - 1
    (tmp_path / "faulty_norm.py").write_text(faulty.replace("layer_norm:", "faulty_norm:"), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    import torch
    from faulty_norm import LAYER_NORM, problem_of

    problem = problem_of(torch.empty(1, 100), describe(-1))
    config = LAYER_NORM.default("forward", problem, describe(-1))
    with Sandbox(problem, describe(-1)) as sandbox:
        for kernel, through in (("forward", {}), ("backward", {"forward": config})):
            outcome = sandbox.prove(kernel, config, through, 2, 0)
            assert outcome.verdict is Verdict.WRONG, (kernel, outcome)
