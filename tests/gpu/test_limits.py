"""The largest calls: more than 2^31 elements in a tensor, and 2^20 positions, judged where the offsets are largest."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from flashbias import flash_bias_func
from tests.flashbias.cases import NAMES, Call, assert_within_gate
from tests.flashbias.drawn import default_configs

CUDA = torch.device("cuda")
POSITIONS = 1 << 20
RANK = 8


@pytest.fixture(autouse=True)
def defaults() -> Iterator[None]:
    """Runs every call with its default configs, and gives the memory back."""
    with default_configs():
        yield
    torch.cuda.empty_cache()


def normal(*shape: int, size: float = 1.0, seed: int = 0) -> Tensor:
    """Returns a bf16 leaf, made without a wider copy."""
    generator = torch.Generator(CUDA).manual_seed(seed)
    values = torch.empty(shape, dtype=torch.bfloat16, device=CUDA)
    return values.normal_(0.0, size, generator=generator).requires_grad_()


def make(batch: int, seqlen: int, nheads: int, headdim: int) -> list[Tensor]:
    """Returns q, k, v, q_bias, k_bias of self-attention."""
    sizes = ((headdim, 0.5), (headdim, 1.0), (headdim, 1.0), (RANK, 0.3), (RANK, 0.6))
    return [normal(batch, seqlen, nheads, width, size=size, seed=seed) for seed, (width, size) in enumerate(sizes)]


def judge(given: list[Tensor], part: tuple[slice, slice, slice], window: tuple[int, int] = (-1, -1)) -> None:
    """Runs a causal call whose upstream gradient is zero but in ``part`` (batches, rows, keys), which sees nothing else.

    There O, LSE and all gradients are held to the gate's budget; the gradients of the first batch's first rows and keys
    outside are zero.
    """
    batches, rows, keys = part
    out, lse = flash_bias_func(*given, causal=True, window_size=window, return_lse=True)  # type: ignore[arg-type]
    dout = torch.zeros_like(out)
    upstream = normal(*dout[batches, rows].shape, seed=9).detach()
    dout[batches, rows] = upstream
    gradients = torch.autograd.grad(out, given, dout)
    cuts = [(batches, rows if name in ("q", "q_bias") else keys) for name in NAMES]
    inputs = [tensor.detach()[cut] for tensor, cut in zip(given, cuts, strict=True)]
    results = {name: tensor[cut] for name, tensor, cut in zip(NAMES, gradients, cuts, strict=True)}
    results |= {"out": out[batches, rows], "lse": lse[batches, :, rows]}
    call = Call(*inputs, causal="bottom_right", scale=given[0].shape[3] ** -0.5, window=window)
    assert_within_gate(call, results, upstream, torch.zeros_like(results["lse"]))
    for gradient, (chosen, inside) in zip(gradients, cuts, strict=True):
        outside = gradient[0] if chosen.start else gradient[0, : inside.start]
        assert not outside.any()


def test_more_than_two_to_the_31_elements_in_batches() -> None:
    """The last batches are right."""
    given = make((1 << 15) + 3, 64, 16, 64)
    assert given[0].numel() > 1 << 31
    judge(given, (slice(-3, None), slice(0, None), slice(0, None)))


def test_more_than_two_to_the_31_elements_in_positions() -> None:
    """The last positions of 2^20 in a window are right."""
    given = make(1, POSITIONS, 16, 128)
    assert given[0].numel() >= 1 << 31
    judge(given, (slice(0, None), slice(-1024, None), slice(-2048, None)), (255, 0))


def test_a_million_positions() -> None:
    """Of 2^20 causal positions the last rows, which see every key, are right, and the gradients of all keys through them."""
    judge(make(1, POSITIONS, 1, 64), (slice(0, None), slice(-64, None), slice(0, None)))
