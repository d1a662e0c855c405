"""The launcher: from the public call to launched kernels, once decided with nothing but a dictionary in between."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import autotune
from autotune.device import interpreting
from cache_db.store import Store
from flashbias import flash_bias_func, launcher, plans, reference
from flashbias.band import EVERYTHING
from flashbias.settings import settings

pytestmark = pytest.mark.skipif(not interpreting(), reason="runs kernels in Triton's interpreter (TRITON_INTERPRET=1)")


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    """Makes each test start like a new process, and leaves nothing decided behind."""
    _forget()
    yield
    _forget()


def _forget() -> None:
    autotune.forget()
    plans.forget()


def make(heads: int = 2, factor_heads: int = 2, headdim: int = 16) -> list[Tensor]:
    """Returns q, k, v, q_bias, k_bias that want gradients."""
    generator = torch.Generator().manual_seed(3)

    def normal(rows: int, nheads: int, columns: int) -> Tensor:
        return (torch.randn(1, rows, nheads, columns, generator=generator) * 0.5).half().requires_grad_()

    sizes = (
        (20, heads, headdim),
        (27, heads, headdim),
        (27, heads, headdim),
        (20, factor_heads, 3),
        (27, factor_heads, 3),
    )
    return [normal(*size) for size in sizes]


def assert_right(tensors: list[Tensor], out: Tensor, dout: Tensor) -> None:
    """Compares O and the gradients of ``tensors`` with the fp64 reference."""
    inputs = [tensor.detach() for tensor in tensors]
    call = (*inputs, None, EVERYTHING, inputs[0].shape[3] ** -0.5)
    truth, lse = reference.forward(*call, compute_dtype=torch.float64)
    gradients = reference.backward(dout, *call, truth, lse, compute_dtype=torch.float64)
    for value, right in zip([out, *(tensor.grad for tensor in tensors)], [truth, *gradients[:5]], strict=True):
        assert value.shape == right.shape
        torch.testing.assert_close(value.double(), right, rtol=2e-2, atol=2e-3)


def test_call_is_right_and_its_repetition_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second call of a launch key launches without the tuner; a new key asks it."""
    with settings(mode="read"):
        tensors = make()
        flash_bias_func(*tensors)

        def refuse(*_: Any) -> None:
            raise AssertionError("the tuner was asked")

        monkeypatch.setattr(autotune, "resolve", refuse)
        out = flash_bias_func(*tensors)
        dout = torch.randn_like(out)
        out.backward(dout)
        assert plans._latest[next(iter(plans._latest))].binaries.keys() == {
            "forward",
            "backward_dq",
            "backward_dkdv",
        }
        assert_right(tensors, out, dout)
        with pytest.raises(AssertionError, match="asked"):
            flash_bias_func(*make(headdim=32))


def test_backward_in_another_thread_runs_what_the_forward_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd's threads do not see the caller's settings; the forward's plan is used, and gradients of shared factors are summed."""
    tensors = make(factor_heads=1)
    with settings(mode="read"):
        out = flash_bias_func(*tensors)
    monkeypatch.setattr(autotune, "resolve", lambda *_: pytest.fail("the tuner was asked"))
    dout = torch.randn_like(out)
    thread = threading.Thread(target=out.backward, args=(dout,))
    thread.start()
    thread.join()
    assert_right(tensors, out, dout)


def test_garbage_instead_of_a_database_does_not_stop_a_call(tmp_path: Path) -> None:
    """The damaged file is moved aside, never deleted, and the call runs a kernel all the same."""
    (tmp_path / "flashbias.db").write_bytes(b"this is no database" * 1000)
    tensors = make()
    with settings(mode="read", cache_dir=tmp_path):
        out = flash_bias_func(*tensors)
    dout = torch.randn_like(out)
    out.backward(dout)
    assert_right(tensors, out, dout)
    assert [path.read_bytes()[:7] for path in tmp_path.glob("flashbias.db.damaged-*")] == [b"this is"]
    assert Store.open(tmp_path / "flashbias.db").counts()["verifications"] == 3


def test_assert_mode_refuses_an_unknown_problem_and_says_what_differs() -> None:
    """CacheMiss comes out of the public call; nothing is tuned behind the user's back."""
    with settings(mode="assert"), pytest.raises(autotune.CacheMiss, match="head_dim"):
        flash_bias_func(*make(headdim=24))


def test_what_has_no_kernel_runs_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 tensors on a CPU and empty ones never reach the tuner."""
    monkeypatch.setattr(autotune, "resolve", lambda *_: pytest.fail("the tuner was asked"))
    assert flash_bias_func(*(tensor.detach().float() for tensor in make())).dtype == torch.float32
    q, k, v, q_bias, k_bias = (tensor.detach() for tensor in make())
    assert flash_bias_func(q[:, :0], k, v, q_bias[:, :0], k_bias).shape == (1, 0, 2, 16)
    assert (flash_bias_func(q, k[:, :0], v[:, :0], q_bias, k_bias[:, :0]) == 0).all()


def test_saved_tensors_that_come_back_in_other_memory_run_the_forwards_binaries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Offloading hooks may return an unaligned tensor aligned or the other way round; backward decides nothing anew."""
    tensors = make()
    with settings(mode="read"), torch.autograd.graph.saved_tensors_hooks(_misaligned, lambda tensor: tensor):
        out = flash_bias_func(*tensors)
    monkeypatch.setattr(autotune, "resolve", lambda *_: pytest.fail("the tuner was asked"))
    dout = torch.randn_like(out)
    out.backward(dout)
    assert_right(tensors, out, dout)


def _misaligned(tensor: Tensor) -> Tensor:
    room = torch.empty((*tensor.shape[:-1], tensor.shape[-1] + 3), dtype=tensor.dtype)
    return room[..., 1:-2].copy_(tensor.detach())


def test_a_kernel_that_cannot_be_compiled_here_runs_eager(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk or a missing compiler in the calling process costs speed and a warning, not the call."""

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    tensors = make()
    monkeypatch.setattr(launcher.arguments, "compile_kernel", fail)
    with settings(mode="read"):
        out = flash_bias_func(*tensors)
    dout = torch.randn_like(out)
    out.backward(dout)
    assert_right(tensors, out, dout)
    assert "No space left" in caplog.text
