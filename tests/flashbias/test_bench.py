"""The benchmark's providers compute one and the same function, and a provider that does not is marked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flashbias.bench import compare as comparison
from flashbias.bench.providers import PROVIDERS, make
from flashbias.cli import benchmark
from flashbias.kernels.problem import GRADIENTS, Shape

CPU = torch.device("cpu")
SHAPE = Shape(batch=1, nheads=2, seqlen_q=24, seqlen_k=24, headdim=16, rank=3, causal=True, grads=GRADIENTS)


def test_concatenated_sdpa_is_the_same_function_as_ours() -> None:
    """The peer that we are measured against solves the same problem, padding of odd ranks included."""
    inputs = make(SHAPE, 0, CPU)
    ours, peer = PROVIDERS["flashbias"](inputs), comparison.PROVIDERS["SDPA concat math"](inputs)
    torch.testing.assert_close(ours, peer, rtol=1e-2, atol=5e-3)


def test_packed_sequences_are_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command refuses them: every provider would time dense calls in their name."""
    (tmp_path / "shapes.json").write_text(f"[{SHAPE.model_copy(update={'varlen': True}).model_dump_json()}]")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert benchmark.main([str(tmp_path / "shapes.json")]) == 2
    assert "varlen: packed sequences cannot be compared" in capsys.readouterr().err


def test_rows_say_who_is_right_who_is_missing_and_who_computes_something_else() -> None:
    """Ours and SDPA concat are right on every gradient; no bias is another function; a missing backend says why."""
    rows = {row.provider: row for row in comparison.compare(SHAPE, 1, CPU)}
    assert rows["flashbias"].right
    assert set(rows["flashbias"].errors) == {"out", "dq", "dk", "dv", "dq_bias", "dk_bias"}
    assert rows["SDPA concat math"].right
    assert rows["SDPA without bias"].right is False
    assert rows["SDPA concat cuDNN"].missing
    assert rows["flashbias"].forward_ms is not None
    assert rows["flashbias"].backward_ms is not None
    assert rows["flashbias"].forward_tflops == pytest.approx(
        4 * 2 * 24 * 24 * 16 / 2 / rows["flashbias"].forward_ms / 1e9
    )
