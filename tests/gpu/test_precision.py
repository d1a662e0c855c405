"""fp32 inputs at real sizes on a GPU, in each precision, judged by the gate's own rule: default configs, then a sweep."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flashbias import factors, flash_bias_func, launcher, plans, precision, reference
from flashbias.band import Band
from flashbias.precision import PRECISIONS
from flashbias.settings import settings
from tests.flashbias.cases import Call, assert_within_gate, relative_error
from tests.gpu.test_features import defaults, tensors

__all__ = ["defaults"]
CUDA = torch.device("cuda")
WHOLE = plans._make_plan  # as it is outside of the fixture ``defaults``
# Errors of whole tensors: operands of 11 bits, of 22 bits, and what sums in fp32 leave.
LIMITS = {"tf32": 2e-3, "tf32x3": 5e-6, "ieee": 3e-6}


@pytest.fixture(autouse=True)
def torchs_setting() -> Iterator[None]:
    """Gives PyTorch's own setting back."""
    yield
    torch.set_float32_matmul_precision("highest")


def judge(given: dict[str, Tensor | None], arithmetic: str, *, with_lse: bool = False, **switches: Any) -> None:
    """Runs the call forward and backward and holds O, LSE and every gradient to the gate's budget."""
    out, lse = flash_bias_func(**given, return_lse=True, precision=arithmetic, **switches)
    generator = torch.Generator(CUDA).manual_seed(5)
    dout = torch.randn(out.shape, generator=generator, device=CUDA)
    dlse = torch.randn(lse.shape, generator=generator, device=CUDA) if with_lse else None
    torch.autograd.backward([out, *([lse] if with_lse else [])], [dout, *([dlse] if dlse is not None else [])])
    leaves = {name: tensor for name, tensor in given.items() if tensor is not None}
    found = {name: tensor.grad for name, tensor in leaves.items() if tensor.grad is not None}
    assert found.keys() == leaves.keys()
    call = Call(
        **{name: tensor.detach() for name, tensor in leaves.items()},  # type: ignore[arg-type]
        causal=switches.get("causal", False),
        scale=leaves["q"].shape[3] ** -0.5,
        window=switches.get("window_size", (-1, -1)),
    )
    upstream = torch.zeros_like(lse) if dlse is None else dlse
    assert_within_gate(call, {"out": out, "lse": lse, **found}, dout, upstream, arithmetic)


def float_tensors(*sizes: int, **how: Any) -> dict[str, Tensor | None]:
    """Returns fp32 leaves."""
    return tensors(*sizes, dtype=torch.float32, **how)


@pytest.mark.parametrize("arithmetic", PRECISIONS)
@pytest.mark.parametrize("causal", [False, True, "bottom_right"])
def test_ragged_lengths(causal: Any, arithmetic: str) -> None:
    """Lengths that end within a tile, more keys than queries, grouped heads, dLSE."""
    judge(float_tensors(2, 777, 901, 4, nheads_kv=2), arithmetic, causal=causal, with_lse=True)


@pytest.mark.parametrize("arithmetic", PRECISIONS)
@pytest.mark.parametrize(
    ("headdim", "value_dim", "rank"), [(8, 8, 1), (40, 24, 12), (96, 96, 16), (128, 128, 8), (256, 256, 200)]
)
def test_head_dims_and_ranks(headdim: int, value_dim: int, rank: int, arithmetic: str) -> None:
    """Head dims to 256, ranks to 256 without parts."""
    judge(float_tensors(1, 515, 700, 2, headdim, value_dim=value_dim, rank=rank), arithmetic, causal=True)


@pytest.mark.parametrize("arithmetic", PRECISIONS)
def test_windows_and_mask_gradients(arithmetic: str) -> None:
    """A window with an additive bf16 mask that learns, a mask over keys, rows that start off 16 bytes."""
    judge(
        float_tensors(2, 700, 513, 4, mask=(1, 4, 700, 513), mask_dtype=torch.bfloat16),
        arithmetic,
        window_size=(200, 50),
    )
    judge(float_tensors(2, 777, 513, 4, 20, mask=(2, 1, 1, 513), rank=3), arithmetic, causal=True, with_lse=True)


@pytest.mark.parametrize("arithmetic", PRECISIONS)
@pytest.mark.parametrize("seqlen", [4096, 65536])
def test_alibi_is_as_exact_as_the_precision(seqlen: int, arithmetic: Any) -> None:
    """O, LSE and gradients of ALiBi against fp64: positions keep their bits, whatever the precision of q kᵀ.

    The bias of the last rows is known to an ulp of its largest number, slope times length.
    """
    given = float_tensors(1, seqlen, seqlen, 3, rank=0)
    slopes = (2.0 ** torch.tensor([-1.3, -4.0, -8.0], device=CUDA)).requires_grad_()
    q_bias, k_bias = factors.alibi(3, seqlen, slopes=slopes, device=CUDA)
    given.update(q_bias=q_bias, k_bias=k_bias)
    out, lse = flash_bias_func(**given, causal=True, return_lse=True, precision=arithmetic)  # type: ignore[arg-type]
    dout = torch.randn(out.shape, generator=torch.Generator(CUDA).manual_seed(5), device=CUDA)
    out.backward(dout)

    inputs = [None if tensor is None else tensor.detach() for tensor in given.values()]
    call = (*inputs, Band(None, 0), 64**-0.5)
    truth, truth_lse = reference.forward(*call, compute_dtype=torch.float64)  # type: ignore[arg-type]
    exact = reference.backward(dout, *call, truth, truth_lse, compute_dtype=torch.float64)  # type: ignore[arg-type]
    ulp = 2.0**-23 * seqlen * 0.41
    assert float((lse.detach() - truth_lse).abs().max()) <= (8e-3 if arithmetic == "tf32" else 0.0) + 8 * ulp
    limit = max(LIMITS[arithmetic], 8 * ulp)
    assert relative_error(out.detach(), truth) <= limit
    assert exact.dq_bias is not None
    assert slopes.grad is not None
    assert relative_error(slopes.grad, exact.dq_bias.sum((0, 1, 3))) <= 10 * limit
    for name in ("q", "k", "v"):
        tensor = given[name]
        assert tensor is not None
        assert relative_error(tensor.grad, getattr(exact, f"d{name}")) <= 2 * limit


@pytest.mark.parametrize(("setting", "expected"), [("highest", "ieee"), ("high", "tf32")])
def test_none_follows_torch_and_the_backward_the_forward(
    setting: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The setting is read once, at the call: changed before the backward it changes nothing."""
    seen = []
    launch = launcher.arguments.launch_kernel

    def watched(kernel: str, binary: Any, *rest: Any) -> None:
        seen.append(binary.constants["PRECISION"])
        launch(kernel, binary, *rest)

    monkeypatch.setattr(launcher.arguments, "launch_kernel", watched)
    given = float_tensors(1, 300, 300, 2)
    torch.set_float32_matmul_precision(setting)
    out = flash_bias_func(**given)  # type: ignore[arg-type]
    torch.set_float32_matmul_precision("high" if setting == "highest" else "highest")
    out.sum().backward()
    assert seen == [expected] * 3


def test_eager_never_rounds_to_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no kernel may run, the result is no worse than "ieee", whatever PyTorch's products are set to."""
    monkeypatch.setattr(plans, "_make_plan", lambda *_: plans.EAGER)
    plans.forget()
    torch.set_float32_matmul_precision("high")
    assert precision.torchs_own() == "tf32"
    given = float_tensors(1, 300, 300, 2)
    out, lse = flash_bias_func(**given, return_lse=True)  # type: ignore[arg-type]
    assert lse.dtype == torch.float32
    inputs = [None if tensor is None else tensor.detach() for tensor in given.values()]
    truth, _ = reference.forward(*inputs, Band(None, None), 64**-0.5, compute_dtype=torch.float64)  # type: ignore[arg-type]
    assert relative_error(out.detach(), truth) < 1e-6


@pytest.mark.parametrize("arithmetic", PRECISIONS)
@pytest.mark.parametrize("headdim", [64, 128])
def test_a_sweep_finds_proven_configs(
    headdim: int, arithmetic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate accepts candidates of every kernel on the real device: first use tunes, and no call falls to eager."""
    monkeypatch.setattr(plans, "_make_plan", WHOLE)
    plans.forget()
    with settings(mode="tune", cache_dir=tmp_path, budget_seconds=120):
        judge(float_tensors(1, 1024, 1024, 8, headdim), arithmetic, causal=True)
        assert all(plan.binaries for plan in plans._plans.values())
        assert len(plans._plans) == 1
    plans.forget()
