"""Attention calls of all kinds, and an independent softmax to compare with."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

NAMES = ("q", "k", "v", "q_bias", "k_bias")


@dataclass(frozen=True)
class Call:
    """The arguments of one attention call, in the reference's order."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    mask: Tensor | None = None
    causal: bool = False
    scale: float = 0.3

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The positional arguments of ``reference.forward``."""
        return (self.q, self.k, self.v, self.q_bias, self.k_bias, self.mask, self.causal, self.scale)

    def factors(self) -> list[tuple[str, Tensor]]:
        """The differentiable inputs that are there, by name."""
        return [(name, tensor) for name in NAMES if (tensor := getattr(self, name)) is not None]


def naive(call: Call) -> tuple[Tensor, Tensor]:
    """Returns (out, lse) by einsum and softmax over the whole score tensor, differentiable by autograd."""
    scores = call.scale * torch.einsum("bihd,bjhd->bhij", call.q, call.k)
    if call.q_bias is not None and call.k_bias is not None:
        batch, heads = scores.shape[:2]
        q_bias, k_bias = (t.expand(batch, -1, heads, -1) for t in (call.q_bias, call.k_bias))
        scores = scores + torch.einsum("bihr,bjhr->bhij", q_bias, k_bias)
    allowed = torch.ones_like(scores, dtype=torch.bool)
    if call.mask is not None:
        if call.mask.dtype == torch.bool:
            allowed = allowed & call.mask
        else:
            scores = scores + call.mask.to(scores.dtype)
    if call.causal:
        allowed = allowed.tril()
    scores = scores.masked_fill(~allowed, -math.inf)
    alive = (scores > -math.inf).any(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(~alive, 0.0), -1) * alive
    lse = scores.masked_fill(~alive, 0.0).logsumexp(-1).masked_fill(~alive.squeeze(-1), -math.inf)
    return torch.einsum("bhij,bjhd->bihd", weights, call.v), lse


def make(
    batch: int = 2,
    heads: int = 3,
    rows: int = 13,
    keys: int = 17,
    rank: int = 3,
    broadcast: tuple[int, int, int, int] | None = None,
    mask: str = "none",
    causal: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Call:
    """Returns random inputs. ``broadcast`` is (q_bias batch, q_bias heads, k_bias batch, k_bias heads)."""
    random = torch.Generator().manual_seed(batch * heads * rows + keys + rank)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    q, k, v = normal(batch, rows, heads, 8), normal(batch, keys, heads, 8), normal(batch, keys, heads, 5)
    q_bias = k_bias = None
    if rank:
        sizes = broadcast or (batch, heads, batch, heads)
        q_bias, k_bias = normal(sizes[0], rows, sizes[1], rank), normal(sizes[2], keys, sizes[3], rank)
    masks: dict[str, Tensor | None] = {
        "none": None,
        "bool": normal(batch, heads, rows, keys) > 0.3,
        "keys": normal(batch, 1, 1, keys) > 0,
        "vector": normal(keys) > 0,
        "expanded": (normal(batch, 1, 1, keys) > 0).expand(batch, heads, rows, keys),
        "additive": normal(1, heads, rows, keys),
        "float16 rows": normal(rows, 1).half(),
    }
    if mask == "dead":
        chosen = normal(batch, 1, rows, keys) > 0
        chosen[:, :, [0, rows // 2]] = False
        return Call(q, k, v, q_bias, k_bias, chosen, causal)
    if mask == "additive dead":
        chosen = normal(rows, keys).masked_fill(normal(rows, keys) > 0, -math.inf)
        chosen[rows - 1] = -math.inf
        return Call(q, k, v, q_bias, k_bias, chosen, causal)
    return Call(q, k, v, q_bias, k_bias, masks[mask], causal)


def differentiate(call: Call, dout: Tensor) -> dict[str, Tensor]:
    """Returns the naive gradients by name."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in call.factors()}
    out, _ = naive(replace(call, **leaves))
    return dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), dout), strict=True))


CALLS = {
    "plain": make(rank=0),
    "bias": make(),
    "causal": make(causal=True),
    "causal, more rows than keys": make(rows=19, keys=7, causal=True),
    "one key": make(keys=1),
    "one row": make(rows=1),
    "rank one, one head": make(heads=1, rank=1),
    "bool mask": make(mask="bool"),
    "mask over keys": make(mask="keys", causal=True),
    "mask of one dim": make(mask="vector"),
    "mask with stride 0": make(mask="expanded"),
    "additive mask": make(mask="additive"),
    "float16 additive mask over rows": make(mask="float16 rows"),
    "dead rows": make(mask="dead", causal=True),
    "additive mask with dead rows": make(mask="additive dead"),
    "factors shared by batch": make(broadcast=(1, 3, 1, 3)),
    "factors shared by heads": make(broadcast=(2, 1, 2, 1)),
    "factors shared differently": make(broadcast=(1, 3, 2, 1), causal=True),
    "factors shared by all": make(broadcast=(1, 1, 1, 1), mask="keys"),
}


def gradient_like(out: Tensor, seed: int = 1) -> Tensor:
    """Returns a random upstream gradient for ``out``."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(out.shape, generator=random, dtype=torch.float64).to(out.dtype)


def relative_error(actual: Tensor | None, expected: Tensor) -> float:
    """Returns the norm of the difference over the norm of what was expected."""
    assert actual is not None
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def alibi(length: int = 512, heads: int = 4, dtype: torch.dtype = torch.bfloat16) -> Call:
    """Returns a causal ALiBi call of rank 2: key positions are large next to the spread of any row's softmax."""
    random = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(1, length, heads, 16, generator=random).to(dtype) for _ in range(3))
    slopes = 2.0 ** -torch.arange(1, heads + 1)
    position = torch.arange(length, dtype=torch.float32)
    q_bias = torch.stack([slopes.expand(length, heads), -slopes * position[:, None]], -1)[None]
    k_bias = torch.stack([position, torch.ones(length)], -1)[None, :, None]
    return Call(q, k, v, q_bias, k_bias, None, True, 0.25)
