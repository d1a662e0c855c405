"""The fallback without kernels: fp32 arithmetic in any float dtype, results in the inputs' own."""

from __future__ import annotations

import inspect
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flashbias import eager, launcher, reference
from flashbias.band import Band
from tests.flashbias.cases import (
    CALLS,
    NAMES,
    WIDER_CALLS,
    Call,
    alibi,
    differentiate,
    exact,
    gradient_like,
    make,
    naive,
    relative_error,
)

ALL_CALLS = CALLS | WIDER_CALLS

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def run(
    call: Call, dout: Tensor, grads: reference.Wanted = reference.ALL, dlse: Tensor | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Returns eager's (out, lse, wanted gradients by name)."""
    out, lse = eager.forward(*call.banded, grads)
    tensors, (band, scale) = call.banded[:6], call.banded[6:]
    gradients = eager.backward(dout, *tensors, out, lse, band, scale, grads, dlse)
    return out, lse, {name: g for name, g in zip((*NAMES, "mask"), gradients, strict=True) if g is not None}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ALL_CALLS)
def test_eager_is_right_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    """O and gradients come in the inputs' dtypes and shapes, off by no more than their rounding; LSE is fp32."""
    call = replace(ALL_CALLS[name], **{name: tensor.to(dtype) for name, tensor in ALL_CALLS[name].factors()})
    expected_out, expected_lse = naive(exact(call))
    dout, dlse = gradient_like(expected_out).to(dtype), gradient_like(expected_lse, seed=2)
    out, lse, gradients = run(call, dout, dlse=dlse)
    expected = differentiate(exact(call), dout.double(), dlse)
    tolerance = max(torch.finfo(dtype).eps, 1e-6 if dtype != torch.float64 else 1e-12)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-6)
    assert relative_error(out, expected_out) < tolerance
    assert gradients.keys() == expected.keys()
    scale = max(float(gradient.norm()) for gradient in expected.values())
    for key, gradient in gradients.items():
        assert gradient.dtype == getattr(call, key).dtype
        assert gradient.shape == expected[key].shape
        own = max(tolerance, torch.finfo(gradient.dtype).eps)
        assert float((gradient.double() - expected[key]).norm()) < own * scale


@pytest.mark.parametrize("through_lse", [False, True], ids=["O", "O and LSE"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_alibi_gradients_are_accurate(dtype: torch.dtype, through_lse: bool) -> None:
    """The gradient of ALiBi's fp32 factors is exact to 1e-4, although O was rounded to 16 bits."""
    call = alibi(dtype=dtype)
    dout = gradient_like(call.v)
    dlse = gradient_like(naive(exact(call))[1], seed=2) if through_lse else None
    *_, gradients = run(call, dout, dlse=dlse)
    expected = differentiate(exact(call), dout.double(), dlse)
    assert gradients["q_bias"].dtype == gradients["k_bias"].dtype == torch.float32
    assert relative_error(gradients["q_bias"][..., 0], expected["q_bias"][..., 0]) < 1e-4
    assert relative_error(gradients["k_bias"], expected["k_bias"]) < 1e-4


@pytest.mark.parametrize("grads", list(itertools.product([False, True], repeat=6)), ids=str)
def test_only_wanted_gradients_are_returned(grads: reference.Wanted) -> None:
    """Any subset can be asked for; the others are None and the wanted ones unchanged."""
    call = make(broadcast=(1, 3, 2, 1), mask="additive", causal=True, dtype=torch.bfloat16)
    dout = gradient_like(naive(call)[0])
    full = run(call, dout)[2]
    some = run(call, dout, grads)[2]
    assert list(some) == list(itertools.compress(full, grads))
    assert all(torch.equal(gradient, full[name]) for name, gradient in some.items())


class _Attention(torch.autograd.Function):
    """Eager's forward and backward as autograd sees them: six inputs, O and LSE."""

    @staticmethod
    def forward(ctx: Any, band: Band, scale: float, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = eager.forward(*inputs, band, scale, reference.ALL)
        ctx.save_for_backward(*inputs, out, lse)
        ctx.options = (band, scale)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *eager.backward(dout, *ctx.saved_tensors, *ctx.options, reference.ALL, dlse))


@pytest.mark.parametrize(
    "call",
    [
        make(1, 2, 4, 3, 2, (1, 1, 1, 2), "additive", "bottom_right"),
        make(1, 4, 3, 4, 2, (1, 4, 1, 2), "additive", kv_heads=2, window=(1, 1)),
    ],
    ids=["bottom right with dead rows", "grouped window"],
)
def test_gradcheck_through_out_and_lse(call: Call) -> None:
    """All six gradients, that of an additive mask included, agree with finite differences of O and LSE in fp64."""

    def attend(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = _Attention.apply(call.band, call.scale, *inputs)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)  # a difference of infinities is no number

    assert torch.autograd.gradcheck(attend, [tensor.clone().requires_grad_() for tensor in call.arguments[:6]])


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_launcher_and_eager_are_interchangeable(name: str) -> None:
    """The launcher takes what eager does, so that it can fall back to it as it stands; only a plan may be left out."""
    ours, theirs = (inspect.signature(getattr(module, name)).parameters for module in (eager, launcher))
    assert list(theirs)[: len(ours)] == list(ours)
    assert all(theirs[extra].default in (None, "default") for extra in list(theirs)[len(ours) :])
