"""The benchmark's providers compute one and the same function, and a provider that does not is marked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from flashbias.bench import compare as comparison
from flashbias.bench.providers import PROVIDERS, Inputs, make, ours
from flashbias.cli import benchmark
from flashbias.kernels.problem import GRADIENTS, Shape
from tests.flashbias.drawn import default_configs

CPU = torch.device("cpu")
SHAPE = Shape(batch=1, nheads=2, seqlen_q=24, seqlen_k=24, headdim=16, rank=3, causal=True, grads=GRADIENTS)


@pytest.fixture(autouse=True)
def untuned() -> Iterator[None]:
    """Has our kernels run their default configs: what is compared here is not speed."""
    with default_configs():
        yield


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


def test_masks_are_not_compared(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A flag that every provider would ignore is refused."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert benchmark.main(["--mask", "bool"]) == 2
    assert "masks are not compared yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"nheads_kv": 1}, "B1 H2/1 S24x24 D16 R3 causal float16"),
        ({"causal": "bottom_right", "seqlen_q": 9}, "B1 H2 S9x24 D16 R3 bottom_right float16"),
        ({"causal": False, "factor_dtype": "float32"}, "B1 H2 S24x24 D16 R3 float16 factors float32"),
        ({"causal": False, "seqlen_q": 7, "dtype": "float32"}, "B1 H2 S7x24 D16 R3 float32 ieee"),
    ],
)
def test_every_kind_of_problem_is_the_same_for_us_and_the_peer(changes: dict[str, object], name: str) -> None:
    """Grouped heads, the other causal corner, fp32 and exact factors: providers agree with the oracle."""
    shape = SHAPE.model_copy(update=changes)
    rows = {row.provider: row for row in comparison.compare(shape, 1, CPU)}
    assert benchmark.title(shape) == name
    assert rows["flashbias"].right
    assert rows["SDPA concat math"].right


def test_without_gradients_there_is_no_backward() -> None:
    """A shape of inference is timed and checked forward only, in the table too."""
    rows = comparison.compare(SHAPE.model_copy(update={"grads": ()}), 1, CPU)
    assert {(row.backward_ms, *row.errors) for row in rows if not row.missing} == {(None, "out")}


def test_nothing_is_called_first_while_the_turn_on_the_gpu_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first call may tune in a child, which waits for that turn: with gradients or without, it comes before."""
    held, calls = [False], []

    @contextmanager
    def turn(_gpu: str) -> Iterator[bool]:
        held[0] = True
        yield True

    def provider(inputs: Inputs) -> torch.Tensor:
        calls.append((torch.is_grad_enabled(), held[0]))
        return ours(inputs)

    monkeypatch.setattr(comparison, "turn", turn)
    monkeypatch.setattr(comparison, "PROVIDERS", {"ours": provider})
    comparison.compare(SHAPE, 1, CPU)
    before = {with_gradients for with_gradients, during in calls if not during}
    assert before == {True, False} == {with_gradients for with_gradients, during in calls if during}


def test_a_window_is_missing_from_peers() -> None:
    """SDPA has no window: it is a row that says so, and ours counts the scores in the band only."""
    shape = SHAPE.model_copy(update={"window": (3, 0), "grads": ()})
    ours, *peers = comparison.compare(shape, 1, CPU)
    assert ours.right
    assert {row.missing for row in peers} == {"SDPA has no window"}
    assert comparison.scores(shape) == 1 + 2 + 3 + 21 * 4


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
