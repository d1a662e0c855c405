"""``prewarm --compile-only``: real compiles into Triton's cache, for a GPU that need not be here."""

from __future__ import annotations

from pathlib import Path

import pytest

from autotune.remake import gpu
from cache_db import open_layers
from cache_db.models import Config, Environment, Problem, Winner
from flashbias.cli import precompile, prewarm
from flashbias.errors import ArgumentError
from flashbias.kernels.problem import Shape, problem
from flashbias.kernels.spec import ATTENTION

pytestmark = pytest.mark.compile_only
SHAPE = Shape(batch=1, nheads=2, seqlen_q=100, seqlen_k=100, headdim=16)
FLAGS = ("--batch", "1", "--nheads", "2", "--seqlen-q", "100", "--headdim", "16", "--grads", "none")
H200 = gpu("NVIDIA H200", "9.0", 132)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Triton's cache, with nothing in it."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    return tmp_path / "triton"


def store(folder: Path, found: Problem, config: Config) -> Winner:
    """Stores ``config`` as the winner of the forward."""
    row = Winner(
        problem=found,
        kernel="forward",
        config=config,
        level=2,
        ms=1.0,
        tried=1,
        total=1,
        complete=True,
        binary="b" * 64,
        environment=Environment(driver="580.1", ptxas="12.8", torch="2.11.0"),
        created_at=2000.0,
    )
    return open_layers(folder).put_winner(row)


def cubins(cache: Path) -> list[Path]:
    """Returns the machine code in Triton's cache."""
    return sorted(cache.rglob("*.cubin"))


def test_stored_winners_are_compiled_for_their_gpu_once(
    tmp_path: Path, empty_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of today's winners of the target's capability, nothing else; the next run finds them, and so would a launch."""
    found = problem(SHAPE, H200)
    default = ATTENTION.default("forward", found, H200)
    store(tmp_path, found, default)
    ampere = gpu("NVIDIA A100", "8.0", 108)
    for other in (problem(SHAPE, ampere), found.model_copy(update={"triton_version": "0.1"})):
        store(tmp_path, other, default)
    for _ in range(2):
        assert prewarm.main(["--compile-only", "--target", "sm_90", "--cache-dir", str(tmp_path)]) == 0
        assert "1 of 1 configs are in Triton's cache" in capsys.readouterr().out
        assert len(cubins(empty_cache)) == 1
    assert precompile.compile_here(found, {"forward": default}, H200) == ""
    assert len(cubins(empty_cache)) == 1


def test_shapes_without_a_winner_are_compiled_with_the_default(
    tmp_path: Path, empty_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Named shapes need no database: the ladder's last rung is what a GPU without rows would run."""
    arguments = ["--compile-only", "--target", "sm_80", "--cache-dir", str(tmp_path), *FLAGS]
    assert prewarm.main(arguments) == 0
    assert "[1/1] forward triton/" in capsys.readouterr().out
    assert len(cubins(empty_cache)) == 1


def test_shapes_choose_among_the_winners(tmp_path: Path) -> None:
    """Of two stored problems the named one is compiled, with its winner's config."""
    wide = problem(SHAPE.model_copy(update={"headdim": 64}), H200)
    row = store(tmp_path, problem(SHAPE, H200), ATTENTION.candidates("forward", problem(SHAPE, H200), H200)[1])
    other = store(tmp_path, wide, ATTENTION.default("forward", wide, H200))
    assert precompile.items([row, other], [SHAPE], None) == [(row.problem, "forward", row.config)]


def test_config_that_the_rules_refuse_is_told_and_fails_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row is data: what today's rules do not allow is not even compiled."""
    found = problem(SHAPE, H200)
    default = ATTENTION.default("forward", found, H200)
    store(tmp_path, found, default.model_copy(update={"params": {**default.params, "BLOCK_M": 3}}))
    assert prewarm.main(["--compile-only", "--cache-dir", str(tmp_path)]) == 1
    output = capsys.readouterr().out
    assert "FAILED: the rules refuse forward" in output
    assert "0 of 1 configs" in output


def test_nothing_to_compile_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An empty database ends with exit code 2 and what to do."""
    assert prewarm.main(["--compile-only", "--cache-dir", str(tmp_path)]) == 2
    assert "name shapes and a --target" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["hopper", "sm", "90", "sm_9x"])
def test_target_is_an_architecture(text: str) -> None:
    """Anything else is refused with an example."""
    with pytest.raises(ArgumentError, match="expected an architecture as sm_90"):
        precompile.capability(text)
    assert precompile.capability("sm_120") == "12.0"
