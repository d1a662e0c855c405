"""Attention calls of all kinds, and an independent softmax to compare with."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from autotune.gate.accuracy import yardstick
from autotune.spec import Reference, Rule
from flashbias import flash_bias_func, reference
from flashbias.band import Band, band
from flashbias.kernels.precisions import floor_of, rounding_of

NAMES = ("q", "k", "v", "q_bias", "k_bias")
SIX = (*NAMES, "mask")


@dataclass(frozen=True)
class Call:
    """The arguments of one attention call, in the reference's order."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    mask: Tensor | None = None
    causal: bool | Literal["bottom_right"] = False
    scale: float = 0.3
    window: tuple[int, int] = (-1, -1)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The positional arguments of the operator."""
        return (self.q, self.k, self.v, self.q_bias, self.k_bias, self.mask, self.causal, self.scale)

    @property
    def band(self) -> Band:
        """The diagonals seen."""
        return band(self.causal, self.window, self.q.shape[1], self.k.shape[1])

    @property
    def banded(self) -> tuple[Any, ...]:
        """The positional arguments of ``reference.forward``."""
        return (*self.arguments[:6], self.band, self.scale)

    def factors(self) -> list[tuple[str, Tensor]]:
        """The differentiable inputs that are there, by name, without the mask."""
        return [(name, tensor) for name in NAMES if (tensor := getattr(self, name)) is not None]

    def additive(self) -> Tensor | None:
        """The mask if it has a gradient."""
        return self.mask if self.mask is not None and self.mask.is_floating_point() else None

    def inputs(self) -> dict[str, Tensor]:
        """The inputs that have a gradient, by name."""
        additive = self.additive()
        return dict(self.factors()) | ({} if additive is None else {"mask": additive})


def normal(*shape: int, seed: int = 3) -> Tensor:
    """Returns fp64 normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def per_head(tensor: Tensor, like: Tensor) -> Tensor:
    """Returns ``tensor`` with batch and heads of ``like``, each head repeated for its group."""
    batch, _, heads, _ = like.shape
    return tensor.expand(batch, -1, -1, -1).repeat_interleave(heads // tensor.shape[2], dim=2)


def all_scores(call: Call) -> Tensor:
    """Returns the scores of every row and key, seen or not, with the additive mask."""
    scores = call.scale * torch.einsum("bihd,bjhd->bhij", call.q, per_head(call.k, call.q))
    if call.q_bias is not None and call.k_bias is not None:
        q_bias, k_bias = (per_head(factor, call.q) for factor in (call.q_bias, call.k_bias))
        scores = scores + torch.einsum("bihr,bjhr->bhij", q_bias, k_bias)
    additive = call.additive()
    return scores if additive is None else scores + additive.to(scores.dtype)


def visible(call: Call) -> Tensor:
    """Returns which scores causal, window and a bool mask let take part, in the words of the operator's interface."""
    rows, keys = call.q.shape[1], call.k.shape[1]
    position = torch.arange(rows)[:, None] + (0 if call.causal is True else keys - rows)
    distance = torch.arange(keys) - position
    left, right = call.window
    allowed = torch.ones(rows, keys, dtype=torch.bool)
    if call.causal:
        allowed &= distance <= 0
    if left >= 0:
        allowed &= distance >= -left
    if right >= 0:
        allowed &= distance <= right
    return allowed if call.mask is None or call.additive() is not None else allowed & call.mask


def naive(call: Call) -> tuple[Tensor, Tensor]:
    """Returns (out, lse) by einsum and softmax over the whole score tensor, differentiable by autograd."""
    scores = all_scores(call).masked_fill(~visible(call), -math.inf)
    alive = (scores > -math.inf).any(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(~alive, 0.0), -1) * alive
    lse = scores.masked_fill(~alive, 0.0).logsumexp(-1).masked_fill(~alive.squeeze(-1), -math.inf)
    return torch.einsum("bhij,bjhd->bihd", weights, per_head(call.v, call.q)), lse


def make(
    batch: int = 2,
    heads: int = 3,
    rows: int = 13,
    keys: int = 17,
    rank: int = 3,
    broadcast: tuple[int, int, int, int] | None = None,
    mask: str = "none",
    causal: bool | Literal["bottom_right"] = False,
    dtype: torch.dtype = torch.float64,
    kv_heads: int | None = None,
    window: tuple[int, int] = (-1, -1),
) -> Call:
    """Returns random inputs. ``broadcast`` is (q_bias batch, q_bias heads, k_bias batch, k_bias heads)."""
    random = torch.Generator().manual_seed(batch * heads * rows + keys + rank)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    kv_heads = kv_heads or heads
    q, k, v = normal(batch, rows, heads, 8), normal(batch, keys, kv_heads, 8), normal(batch, keys, kv_heads, 5)
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
        masks[mask] = chosen
    if mask == "additive dead":
        chosen = normal(rows, keys).masked_fill(normal(rows, keys) > 0, -math.inf)
        chosen[rows - 1] = -math.inf
        masks[mask] = chosen
    return Call(q, k, v, q_bias, k_bias, masks[mask], causal, window=window)


def differentiate(call: Call, dout: Tensor, dlse: Tensor | None = None) -> dict[str, Tensor]:
    """Returns the naive gradients by name, through O and LSE; that of an additive mask in fp64."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in call.factors()}
    additive = call.additive()
    if additive is not None:
        leaves["mask"] = additive.detach().double().clone().requires_grad_()
    results = naive(replace(call, **leaves))
    upstream = (dout, torch.zeros_like(results[1]) if dlse is None else dlse)
    return dict(zip(leaves, torch.autograd.grad(results, list(leaves.values()), upstream), strict=True))


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

# Heads that share keys, windows, bounds that are not top-left, and masks whose gradient is summed or expanded.
WIDER_CALLS = {
    "grouped": make(heads=4, kv_heads=2),
    "one head of keys": make(heads=3, kv_heads=1, broadcast=(1, 3, 2, 3), mask="additive"),
    "grouped, k_bias by group": make(heads=6, kv_heads=2, broadcast=(2, 6, 1, 2), causal=True),
    "grouped, k_bias shared by all": make(heads=6, kv_heads=3, broadcast=(1, 1, 2, 1), mask="dead"),
    "window": make(window=(3, 2)),
    "window to the right": make(rows=17, keys=13, window=(-1, 1)),
    "causal window": make(causal=True, window=(4, 0), mask="additive dead"),
    "bottom right": make(causal="bottom_right", mask="keys"),
    "bottom right, more rows than keys": make(rows=19, keys=7, causal="bottom_right"),
    "bottom right window, more rows than keys": make(rows=19, keys=7, causal="bottom_right", window=(2, 5)),
    "grouped window": make(heads=4, kv_heads=2, broadcast=(1, 4, 2, 2), mask="float16 rows", window=(0, 3)),
    "additive mask of one dim": replace(make(), mask=torch.linspace(-1.0, 1.0, 17, dtype=torch.float64)),
    "additive mask with stride 0": replace(make(), mask=torch.linspace(-1.0, 1.0, 13)[:, None].expand(2, 3, 13, 17)),
}


def gradient_like(out: Tensor, seed: int = 1) -> Tensor:
    """Returns a random upstream gradient for ``out``."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(out.shape, generator=random, dtype=torch.float64).to(out.dtype)


def exact(call: Call) -> Call:
    """Returns the same numbers in fp64."""
    mask = call.mask if call.additive() is None or call.mask is None else call.mask.double()
    return replace(call, **{name: tensor.double() for name, tensor in call.factors()}, mask=mask)


def attend(call: Call) -> tuple[Tensor, Tensor]:
    """Returns the operator's O and LSE."""
    return flash_bias_func(*call.arguments, window_size=call.window, return_lse=True)


def solve(call: Call, upstream: tuple[Tensor, Tensor], names: Iterable[str] = SIX) -> dict[str, Tensor]:
    """Returns the operator's "out" and "lse", and the gradient through both of each of ``names`` that can have one."""
    leaves = {name: each.detach().clone().requires_grad_() for name, each in call.inputs().items() if name in names}
    results = attend(replace(call, **leaves))
    found = torch.autograd.grad(results, list(leaves.values()), upstream) if leaves else ()
    return dict(zip(("out", "lse", *leaves), (*(each.detach() for each in results), *found), strict=True))


def upstream_of(call: Call) -> tuple[Tensor, Tensor]:
    """Returns random upstream gradients of O and LSE, in their dtypes."""
    out, lse = naive(exact(call))
    wide = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    return gradient_like(out).to(call.q.dtype), gradient_like(lse, seed=2).to(wide)


def assert_solved(call: Call, names: Iterable[str] = SIX, tolerance: float = 1e-10) -> None:
    """Asserts that the operator gives what a dense softmax in fp64 does, in the inputs' own shapes and dtypes.

    What comes in a narrower dtype than ``tolerance`` means may be off by a rounding to it.
    """
    dense, (dout, dlse) = exact(call), upstream_of(call)
    expected = dict(zip(("out", "lse"), naive(dense), strict=True)) | differentiate(dense, dout.double(), dlse.double())
    for name, value in solve(call, (dout, dlse), names).items():
        given = getattr(call, name, None)
        assert given is None or (value.dtype, value.shape) == (given.dtype, given.shape)
        allowed = max(tolerance, torch.finfo(value.dtype).eps)
        torch.testing.assert_close(value.double(), expected[name], rtol=allowed, atol=allowed)


def assert_within_gate(
    call: Call, found: dict[str, Tensor], dout: Tensor, dlse: Tensor, precision: str = "default"
) -> None:
    """Judges results ("out", "lse") and gradients (by input) by the gate's own rule, row by row.

    ``dout`` and ``dlse`` are the upstream gradients of O and LSE; ``precision`` is that of fp32 inputs.
    """
    name = str(call.q.dtype).removeprefix("torch.")
    dtype, floor = rounding_of(name, precision), floor_of(name, precision, call.q.shape[3])
    truth, truth_lse = reference.forward(*call.banded, compute_dtype=torch.float64)
    right = reference.backward(dout, *call.banded, truth, truth_lse, compute_dtype=torch.float64, dlse=dlse)
    sizes = reference.magnitudes(dout, *call.banded, truth, truth_lse, compute_dtype=torch.float64, dlse=dlse)
    ideal, ideal_lse = reference.forward(*call.banded, compute_dtype=torch.float32, round_to=dtype)
    best = reference.backward(
        dout, *call.banded, ideal, ideal_lse, compute_dtype=torch.float32, round_to=dtype, recentre=True, dlse=dlse
    )
    sticks = {
        "out": (Rule("rows", 2.0), Reference(truth, sizes.out), ideal),
        "lse": (Rule("log"), Reference(truth_lse), ideal_lse),
    }
    for name, value, size, yard in zip((*NAMES, "mask"), right, sizes[1:], best, strict=True):
        if value is not None and yard is not None and name in found:
            sticks[name] = (Rule("rows", 3.0), Reference(value, size), yard.to(found[name].dtype))
    for name, value in found.items():
        stick = yardstick(name, *sticks[name], floor)
        finding = stick.finding(stick.judge(value.detach()).tolist())
        assert finding.ratio <= 1, f"{name}: {finding}"


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
