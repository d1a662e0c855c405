"""Calls that a foreign winner does not suit, or that it refuses: they run all the same, and are told as they run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import autotune
from autotune.device import describe, interpreting
from flashbias import explain, flash_bias_func, plans
from flashbias.band import Band
from flashbias.band import band as band_of
from flashbias.implementations import sdpa
from flashbias.kernels.spec import ATTENTION
from flashbias.settings import settings
from tests.flashbias.test_implementations import SHAPE, TRAINED
from tests.flashbias.test_implementations_run import assert_right, make, store_trial, stored

pytestmark = pytest.mark.skipif(not interpreting(), reason="runs kernels in the interpreter (TRITON_INTERPRET=1)")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Makes each test start like a new process, and leaves nothing decided behind."""
    autotune.forget()
    plans.forget()
    yield
    autotune.forget()
    plans.forget()


@pytest.mark.parametrize("refused", ["forward", "backward"])
def test_a_call_that_a_backend_refuses_runs_eager(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, refused: str
) -> None:
    """A proof is of some lengths: what raises at another (cuDNN without a plan for it) costs speed, and is told once."""

    def refuse(*_given: Any, **_more: Any) -> Any:
        raise RuntimeError(f"no plan for this {refused}")

    shape = TRAINED.model_copy(update={"seqlen_q": 20, "seqlen_k": 27})
    stored(tmp_path, shape, forward="sdpa", backward="sdpa")
    monkeypatch.setattr(sdpa.OnCpu, refused, refuse)
    tensors = make(shape)
    with settings(mode="assert", cache_dir=tmp_path), caplog.at_level("WARNING", "flashbias.launcher"):
        for _ in range(2):
            for tensor in tensors:
                tensor.grad = None
            out = flash_bias_func(*tensors)
            dout = torch.randn_like(out)
            out.backward(dout)
    assert [record.getMessage().count(f"no plan for this {refused}") for record in caplog.records] == [1]
    assert_right(tensors, out, [tensor.grad for tensor in tensors], dout, Band(None, None))


def test_a_call_that_does_not_suit_runs_and_is_told_as_it_runs(tmp_path: Path) -> None:
    """Where nothing of ours is proven, "assert" runs what is; where it is, ``explain`` names what the call takes."""
    shape = SHAPE.model_copy(update={"causal": True, "seqlen_q": 20, "seqlen_k": 27})
    found = stored(tmp_path, shape, forward="sdpa")
    tensors, seen = make(shape), band_of("bottom_right", (-1, -1), 20, 27)
    for ran in ("sdpa", "triton"):
        with settings(mode="assert", cache_dir=tmp_path):
            for _ in range(2):  # before it is decided, and after
                told = explain(*tensors, causal="bottom_right").to_json()["kernels"]
                assert [each["config"]["implementation"] for each in told] == [ran]
                out = flash_bias_func(*tensors, causal="bottom_right")
            assert_right(tensors, out, [None] * 5, torch.zeros_like(out), seen)
        (plan,) = plans._latest.values()
        assert bool(plan.foreign) == (ran == "sdpa")
        store_trial(tmp_path, found, ATTENTION.default("forward", found, describe(-1)))
        autotune.forget()
        plans.forget()
