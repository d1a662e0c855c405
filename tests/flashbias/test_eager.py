"""The fallback without kernels: fp32 arithmetic in any float dtype, results in the inputs' own."""

from __future__ import annotations

import inspect
import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flashbias import eager, launcher, reference
from tests.flashbias.cases import CALLS, Call, alibi, differentiate, gradient_like, make, naive, relative_error

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def run(call: Call, dout: Tensor, grads: reference.Wanted = reference.ALL) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Returns eager's (out, lse, wanted gradients by name)."""
    out, lse = eager.forward(*call.arguments, grads)
    tensors, (causal, scale) = call.arguments[:6], call.arguments[6:]
    gradients = eager.backward(dout, *tensors, out, lse, causal, scale, grads)
    names = ("q", "k", "v", "q_bias", "k_bias")
    return out, lse, {name: g for name, g in zip(names, gradients, strict=True) if g is not None}


def exact(call: Call) -> Call:
    """Returns the same numbers in fp64."""
    return replace(call, **{name: tensor.double() for name, tensor in call.factors()})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_eager_is_right_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    """O and gradients come in the inputs' dtypes and shapes, off by no more than their rounding; LSE is fp32."""
    call = replace(CALLS[name], **{name: tensor.to(dtype) for name, tensor in CALLS[name].factors()})
    dout = gradient_like(naive(call)[0]).to(dtype)
    out, lse, gradients = run(call, dout)
    expected_out, expected_lse = naive(exact(call))
    expected = differentiate(exact(call), dout.double())
    tolerance = max(torch.finfo(dtype).eps, 1e-6 if dtype != torch.float64 else 1e-12)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-6)
    assert relative_error(out, expected_out) < tolerance
    assert gradients.keys() == expected.keys()
    scale = max(float(gradient.norm()) for gradient in expected.values())
    for key, gradient in gradients.items():
        assert gradient.dtype == dtype
        assert gradient.shape == expected[key].shape
        assert float((gradient.double() - expected[key]).norm()) < tolerance * scale


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_alibi_gradients_are_accurate(dtype: torch.dtype) -> None:
    """The gradient of ALiBi's fp32 factors is exact to 1e-4, although O was rounded to 16 bits."""
    call = alibi(dtype=dtype)
    dout = gradient_like(call.v)
    *_, gradients = run(call, dout)
    expected = differentiate(exact(call), dout.double())
    assert relative_error(gradients["q_bias"][..., 0], expected["q_bias"][..., 0]) < 1e-4
    assert relative_error(gradients["k_bias"], expected["k_bias"]) < 1e-4


@pytest.mark.parametrize("grads", list(itertools.product([False, True], repeat=5)), ids=str)
def test_only_wanted_gradients_are_returned(grads: reference.Wanted) -> None:
    """Any subset can be asked for; the others are None and the wanted ones unchanged."""
    call = make(broadcast=(1, 3, 2, 1), causal=True, dtype=torch.bfloat16)
    dout = gradient_like(naive(call)[0])
    full = run(call, dout)[2]
    some = run(call, dout, grads)[2]
    assert list(some) == list(itertools.compress(full, grads))
    assert all(torch.equal(gradient, full[name]) for name, gradient in some.items())


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_launcher_and_eager_are_interchangeable(name: str) -> None:
    """The launcher takes what eager does, so that it can fall back to it as it stands; only a plan may be left out."""
    ours, theirs = (inspect.signature(getattr(module, name)).parameters for module in (eager, launcher))
    assert list(theirs)[: len(ours)] == list(ours)
    assert all(theirs[extra].default is None for extra in list(theirs)[len(ours) :])
