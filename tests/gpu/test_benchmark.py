"""The benchmark on a GPU: who is installed is timed and judged, forward and backward."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flashbias.bench.campaign import measure
from flashbias.bench.compare import compare
from flashbias.bench.inputs import make
from flashbias.bench.providers import Provider, catalogue
from flashbias.bench.providers import ours as own
from flashbias.bench.results import Book, best_peer
from flashbias.kernels.problem import GRADIENTS, Shape
from flashbias.settings import settings

pytestmark = pytest.mark.timeout(900)
ROOT = Path(__file__).resolve().parents[2]
SHAPE = Shape(
    batch=1,
    nheads=2,
    seqlen_q=256,
    seqlen_k=256,
    headdim=64,
    rank=8,
    dtype="bfloat16",
    causal=True,
    grads=GRADIENTS[:5],
)
# What torch itself brings: these run on any GPU that kernels are compiled for.
ALWAYS = (
    "ours",
    "ours-default",
    "ours-no-bias",
    "sdpa-concat",
    "sdpa-concat-flash",
    "sdpa-concat-efficient",
    "vanilla",
)


@pytest.fixture(autouse=True)
def short_sweeps(tmp_path: Path) -> Iterator[None]:
    """Tunes for a moment only: speed is not judged here."""
    with settings(cache_dir=tmp_path, budget_seconds=10):
        yield


def test_everyone_who_is_here_is_timed_and_judged(tmp_path: Path) -> None:
    """Each provider has figures, or a reason; what torch brings is right; ours says which configs ran."""
    told: list[str] = []
    (found,) = measure([SHAPE], (), None, Book(tmp_path / "results.json"), 3, torch.device("cuda", 0), told.append)
    for row in found.rows:
        assert bool(row.missing) != (row.forward is not None), row
        assert row.missing or row.missing_backward or row.backward is not None, row
    for name in ALWAYS:
        row = found.row(name)
        assert row is not None
        assert (row.missing, row.missing_backward, row.right_forward, row.right_backward) == ("", "", True, True), row
        assert row.forward is not None
        assert row.forward.sm_mhz
        assert row.forward.over_ours
    ours, default = found.row("ours"), found.row("ours-default")
    assert ours is not None
    assert default is not None
    assert set(ours.configs) == {"forward", "backward_dq", "backward_dkdv"} == set(default.configs)
    assert all("default" in each for each in default.configs.values())
    assert best_peer(found, "forward") is not None
    assert best_peer(found, "backward") is not None
    assert found.environment["gpu"] == torch.cuda.get_device_name(0)
    assert list(Book(tmp_path / "results.json")) == [found]


@pytest.mark.parametrize("name", ["compile", "flex-concat", "flex-score-mod"])
def test_what_is_compiled_is_right_and_its_backward_repeats(name: str) -> None:
    """torch.compile and FlexAttention forward and backward, on one graph again and again, at one length after another."""
    for length in (128, 136, 256):
        shape = SHAPE.model_copy(update={"seqlen_q": length, "seqlen_k": length})
        (row,) = compare(shape, catalogue(names=(name,)), 3, torch.device("cuda", 0)).rows
        assert row.right_forward, row
        if name != "flex-score-mod":  # FlexAttention may refuse gradients of what a score_mod reads
            assert row.right_backward, row
        assert row.missing_backward or row.backward is not None, row


def test_defaults_run_without_a_look_at_the_database(tmp_path: Path) -> None:
    """Nothing is written to the user's folder, and tuned calls are decided apart."""
    folder = tmp_path / "user"
    inputs = make(SHAPE, 0, torch.device("cuda", 0))
    with settings(cache_dir=folder):
        out = own.by_default(inputs)
    assert out.shape == inputs.q.shape
    assert not folder.exists()


def test_memory_that_a_provider_cannot_have_is_a_reason() -> None:
    """Running out where the estimate was too low is a row too, and the next provider runs."""

    def greedy(inputs: object) -> torch.Tensor:
        return torch.empty(1 << 50, dtype=torch.uint8, device="cuda")

    providers = {
        "greedy": Provider(greedy),
        "matrices": Provider(greedy, matrices=1e9),
        **catalogue(names=("sdpa-concat",)),
    }
    greedy_row, matrices, peer = compare(SHAPE, providers, 1, torch.device("cuda", 0)).rows
    assert greedy_row.missing.startswith("OutOfMemoryError: ")
    assert matrices.missing.startswith("needs about ")
    assert peer.right_backward


def test_the_command_measures_and_goes_on(tmp_path: Path) -> None:
    """A process of its own writes table, JSON and CSV; a second one measures nothing."""
    figures, table = tmp_path / "results.json", tmp_path / "results.csv"
    flags = [
        "--nheads",
        "2",
        "--seqlen-q",
        "128",
        "--headdim",
        "32",
        "--providers",
        "ours,sdpa-concat",
        "--rounds",
        "3",
    ]
    command = [sys.executable, "scripts/benchmark.py", *flags, "--json", str(figures), "--csv", str(table)]
    variables = {**os.environ, "FLASHBIAS_BUDGET_SECONDS": "10", "FLASHBIAS_CACHE_DIR": str(tmp_path)}
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "ours is " in done.stdout
    assert "measured 20" in done.stderr
    assert len(json.loads(figures.read_text())["results"]) == 1
    assert len(table.read_text().splitlines()) == 3
