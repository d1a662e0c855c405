"""Attention over parts of the keys, put together: as good as attention over all of them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from autotune.device import interpreting
from flashbias.errors import ArgumentError
from flashbias.merge import merge_attention
from flashbias.settings import settings
from tests.flashbias.cases import Call, assert_within_gate, attend, differentiate, make, naive, upstream_of

# Rows that see no key of a part, rows that see none at all, parts that no row sees; heads and factors shared.
WHOLE = {
    "additive mask with dead rows": make(keys=24, mask="additive dead"),
    "grouped": make(heads=4, kv_heads=2, keys=24, broadcast=(1, 4, 2, 2), mask="additive"),
    "causal by a mask": replace(
        make(heads=2, rows=20, keys=24, rank=0),
        mask=torch.full((20, 24), -math.inf, dtype=torch.float64).triu(-3),
    ),
}


def leaves_of(call: Call) -> dict[str, Tensor]:
    """Returns copies of the inputs that want gradients, by name."""
    return {name: tensor.clone().requires_grad_() for name, tensor in call.inputs().items()}


def in_parts(call: Call, *bounds: int) -> tuple[Tensor, Tensor]:
    """Returns what merging gives of the keys cut at ``bounds``."""
    parts = []
    for first, last in zip((0, *bounds), (*bounds, call.k.shape[1]), strict=True):
        keys: dict[str, Any] = {name: getattr(call, name) for name in ("k", "v", "k_bias")}
        keys = {name: None if tensor is None else tensor[:, first:last] for name, tensor in keys.items()}
        mask = None if call.mask is None else call.mask[..., first:last]
        parts.append(attend(replace(call, **keys, mask=mask)))
    outs, lses = zip(*parts, strict=True)
    return merge_attention(outs, lses)


@pytest.mark.parametrize("bounds", [(7, 15), (1, 23), (0, 8), (24,), ()], ids=str)
@pytest.mark.parametrize("name", WHOLE)
def test_parts_give_the_whole_and_its_gradients(name: str, bounds: tuple[int, ...]) -> None:
    """O, LSE and all gradients through both are those of all keys at once, wherever they are cut; a part may be empty."""
    leaves = leaves_of(WHOLE[name])
    results = in_parts(replace(WHOLE[name], **leaves), *bounds)
    expected = naive(WHOLE[name])
    for found, right in zip(results, expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-12)
    upstream = upstream_of(WHOLE[name])
    gradients = torch.autograd.grad(results, list(leaves.values()), upstream)
    right_gradients = differentiate(WHOLE[name], *upstream)
    for key, gradient in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(gradient, right_gradients[key], rtol=1e-10, atol=1e-11)


@pytest.mark.skipif(not interpreting(), reason="runs kernels in Triton's interpreter (TRITON_INTERPRET=1)")
def test_parts_in_half_precision_pass_the_gate() -> None:
    """Three kernel calls and their merging are as exact as the gate asks of one call over all keys."""
    call = make(1, 2, 20, 42, 2, dtype=torch.float16)
    call = replace(call, q=call.q * 0.5)
    leaves = leaves_of(call)
    dout, dlse = upstream_of(call)
    with settings(mode="read"):
        out, lse = in_parts(replace(call, **leaves), 13, 30)
        gradients = torch.autograd.grad((out, lse), list(leaves.values()), (dout, dlse))
    assert (out.dtype, lse.dtype) == (torch.float16, torch.float32)
    assert_within_gate(call, {"out": out, "lse": lse, **dict(zip(leaves, gradients, strict=True))}, dout, dlse)


def test_rows_without_any_key_give_zero_and_no_gradient() -> None:
    """A row that no part has a key for is 0 and -inf, never NaN, and takes no gradient, whatever arrives for it."""
    outs = [torch.zeros(1, 2, 1, 3, requires_grad=True) for _ in range(2)]
    lses = [torch.tensor([[[-math.inf, value]]], requires_grad=True) for value in (0.5, -math.inf)]
    out, lse = merge_attention(outs, lses)
    assert torch.equal(lse, lses[0])
    assert not out.any()
    gradients = torch.autograd.grad((out, lse), (*outs, *lses), (torch.ones_like(out), torch.ones_like(lse)))
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert [float(each[0, 0, 0]) for each in gradients[2:]] == [0.0, 0.0]


def test_one_part_is_itself() -> None:
    """Merging a single result changes nothing but the last bit."""
    call = make(mask="additive dead")
    out, lse = attend(call)
    torch.testing.assert_close(merge_attention([out], [lse]), (out, lse), rtol=1e-15, atol=0.0)


def test_large_lses_neither_overflow_nor_vanish() -> None:
    """Parts far apart weigh 1 and 0, parts equally far from zero the same."""
    outs = [torch.full((1, 3, 1, 1), value) for value in (1.0, 3.0)]
    low, high = (torch.tensor([[values]]) for values in ([-3e4, 1e4, 2e38], [-3e4, -1e4, 2e38]))
    out, lse = merge_attention(outs, [low, high])
    torch.testing.assert_close(out.flatten(), torch.tensor([2.0, 1.0, 2.0]))
    torch.testing.assert_close(lse.flatten(), torch.tensor([-3e4 + math.log(2), 1e4, 2e38]))


part = torch.zeros(2, 5, 3, 4)
values = torch.zeros(2, 3, 5)


@pytest.mark.parametrize(
    ("outs", "lses", "message"),
    [
        ([], [], r"outs and lses: expected as many tensors of each, at least one, got 0 and 0"),
        ([part, part], [values], r"expected as many tensors of each.*got 2 and 1"),
        (
            [part, part[:, 1:]],
            [values, values[..., 1:]],
            r"part 1: expected out of shape \(2, 5, 3, 4\).*\(2, 4, 3, 4\)",
        ),
        ([part, part], [values, values.mT], r"part 1: expected .*lse of shape \(B, H, Sq\).*\(2, 5, 3\)"),
        ([part[0]], [values[0]], r"part 0: expected .*\(5, 3, 4\) and \(3, 5\)"),
    ],
)
def test_what_does_not_fit_is_refused(outs: list[Tensor], lses: list[Tensor], message: str) -> None:
    """Missing parts and wrong shapes are named."""
    with pytest.raises(ArgumentError, match=message):
        merge_attention(outs, lses)


def test_stacked_parts_are_parts() -> None:
    """Tensors with a leading dim of parts are taken as sequences of them."""
    outs, lses = torch.randn(3, 2, 5, 4, 8), torch.randn(3, 2, 4, 5)
    stacked, listed = merge_attention(outs, lses), merge_attention(list(outs), list(lses))
    assert torch.equal(stacked[0], listed[0])
    assert torch.equal(stacked[1], listed[1])
