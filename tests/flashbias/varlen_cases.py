"""Calls on packed sequences of all kinds, the same attention one sequence after another, and the gate's judgement of both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from autotune.gate.accuracy import yardstick
from autotune.spec import Reference, Rule
from flashbias import flash_bias_varlen_func, reference
from flashbias.kernels.precisions import floor_of, rounding_of
from flashbias.varlen.band import Causal
from tests.flashbias.cases import NAMES, Call, naive

# No queries, no keys, one of either, more queries than keys and fewer.
LENGTHS = (5, 0, 7, 1, 3), (9, 4, 0, 1, 2)
_SIDES = {"q": "q", "k": "k", "v": "k", "q_bias": "q", "k_bias": "k"}


@dataclass(frozen=True)
class Packed:
    """The arguments of one call: tensors (T, H, D), lengths of sequences, and how the band is aligned in each."""

    q: Tensor
    k: Tensor
    v: Tensor
    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    causal: Causal = False
    scale: float = 0.3
    window: tuple[int, int] = (-1, -1)

    def inputs(self) -> dict[str, Tensor]:
        """The inputs that have a gradient, by name."""
        return {name: tensor for name in NAMES if (tensor := getattr(self, name)) is not None}

    def wanting(self, names: Iterable[str] = NAMES) -> Packed:
        """Returns the call with the named inputs as leaves that want a gradient."""
        return replace(self, **{n: t.detach().clone().requires_grad_() for n, t in self.inputs().items() if n in names})

    def lengths(self, name: str) -> tuple[int, ...]:
        """Returns the lengths of the sequences whose rows the named input has."""
        return self.lengths_q if _SIDES[name] == "q" else self.lengths_k

    def positional(self, name: str) -> bool:
        """Whether the named input has a row for each position instead of one for each token."""
        return bool(getattr(self, name).shape[0] != sum(self.lengths(name)))

    def bounds(self, name: str) -> Tensor:
        """Returns ``cu_seqlens`` of the named input."""
        lengths = torch.tensor([0, *self.lengths(name)], device=self.q.device)
        return lengths.cumsum(0).to(torch.int32)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The positional arguments of the operator."""
        sequences = (self.bounds("q"), self.bounds("k"), max(self.lengths_q), max(self.lengths_k))
        return (self.q, self.k, self.v, *sequences, self.q_bias, self.k_bias, self.causal, self.scale)

    def calls(self) -> Iterator[Call]:
        """Yields the dense call of each sequence, of one batch."""
        for index in range(len(self.lengths_q)):
            rows = {}
            for name, tensor in self.inputs().items():
                lengths = self.lengths(name)
                first = 0 if self.positional(name) else sum(lengths[:index])
                rows[name] = tensor[None, first : first + lengths[index]]
            causal = "bottom_right" if self.causal == "bottom_right" else bool(self.causal)
            yield Call(**rows, causal=causal, scale=self.scale, window=self.window)

    def joined(self, name: str, parts: list[Tensor]) -> Tensor:
        """Returns what belongs to the call of the sequences' results, (1, S, ...), or gradients of the named input."""
        if name == "lse":
            return torch.cat(parts, 2)[0]
        if name == "out" or not self.positional(name):
            return torch.cat(parts, 1)[0]
        total = parts[0].new_zeros(getattr(self, name).shape, dtype=torch.float64)
        for part in parts:
            total[: part.shape[1]] += part[0]
        return total.to(parts[0].dtype)


def packed(
    lengths: tuple[tuple[int, ...], tuple[int, ...]] = LENGTHS,
    heads: int = 4,
    kv_heads: int = 2,
    rank: int = 3,
    positional: str = "k",
    factor_heads: tuple[int, int] = (4, 2),
    dtype: torch.dtype = torch.float64,
    factor_dtype: torch.dtype | None = None,
    dims: tuple[int, int] = (8, 5),
    device: str = "cpu",
    **how: Any,
) -> Packed:
    """Returns random, well-conditioned inputs; ``positional`` names the sides whose factor has rows of positions."""
    random = torch.Generator(device).manual_seed(sum(lengths[0]) + rank)

    def normal(*shape: int, size: float = 1.0, kind: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=random, dtype=torch.float32, device=device) * size).to(kind)

    rows, keys = map(sum, lengths)
    q, k, v = normal(rows, heads, dims[0], size=0.5), normal(keys, kv_heads, dims[0]), normal(keys, kv_heads, dims[1])
    factors: dict[str, Tensor] = {}
    if rank:
        for side, each, own, size in zip("qk", lengths, factor_heads, (0.5, 1.0), strict=True):
            count = max(each) if side in positional else sum(each)
            kind = factor_dtype or dtype
            factors[f"{side}_bias"] = normal(count, own, rank, size=size * rank**-0.25, kind=kind)
    return Packed(q, k, v, *lengths, **factors, **{"scale": dims[0] ** -0.5} | how)


def attend(call: Packed, **switches: Any) -> tuple[Tensor, Tensor]:
    """Returns the operator's O and LSE."""
    return flash_bias_varlen_func(*call.arguments, window_size=call.window, return_lse=True, **switches)


def solve(
    call: Packed, upstream: tuple[Tensor, Tensor], names: Iterable[str] = NAMES, **switches: Any
) -> dict[str, Tensor]:
    """Returns the operator's "out" and "lse", and the gradient through both of each of ``names`` that is there."""
    call = call.wanting(names)
    results = attend(call, **switches)
    leaves = {name: tensor for name, tensor in call.inputs().items() if tensor.requires_grad}
    found = torch.autograd.grad(results, list(leaves.values()), upstream) if leaves else ()
    return dict(zip(("out", "lse", *leaves), (*(each.detach() for each in results), *found), strict=True))


def upstream_of(call: Packed) -> tuple[Tensor, Tensor]:
    """Returns random upstream gradients of O and LSE, in their dtypes.

    That of LSE stays away from zero: it alone is what dS of a query with one key is, and less would leave noise.
    """
    random = torch.Generator(call.q.device).manual_seed(5)
    wide = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    rows, heads, _ = call.q.shape
    shapes = ((rows, heads, call.v.shape[2]), (heads, rows))
    dout, dlse = (torch.randn(shape, generator=random, device=call.q.device) for shape in shapes)
    return dout.to(call.q.dtype), (dlse + dlse.sign() / 2).to(wide)


def dense(call: Packed, upstream: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Returns what :func:`solve` does by autograd of a dense softmax of each sequence, in fp64."""
    wide = replace(call, **{name: tensor.double() for name, tensor in call.inputs().items()}).wanting()
    results = list(zip(*map(naive, wide.calls()), strict=True))
    out, lse = (call.joined(name, list(parts)) for name, parts in zip(("out", "lse"), results, strict=True))
    leaves = wide.inputs()
    found = torch.autograd.grad((out, lse), list(leaves.values()), [each.double() for each in upstream])
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(leaves, found, strict=True))}


def assert_solved(call: Packed, names: Iterable[str] = NAMES, tolerance: float = 1e-10) -> None:
    """Asserts that the operator gives what a dense softmax does, in the inputs' own shapes and dtypes."""
    upstream = upstream_of(call)
    expected = dense(call, upstream)
    for name, value in solve(call, upstream, names).items():
        given = getattr(call, name, None)
        assert given is None or (value.dtype, value.shape) == (given.dtype, given.shape)
        allowed = max(tolerance, torch.finfo(value.dtype).eps)
        torch.testing.assert_close(value.double(), expected[name], rtol=allowed, atol=allowed)


def assert_within_gate(
    call: Packed, found: dict[str, Tensor], upstream: tuple[Tensor, Tensor], precision: str = "default"
) -> None:
    """Judges results ("out", "lse") and gradients (by input) of the whole call by the gate's own rule, row by row."""
    kind = str(call.q.dtype).removeprefix("torch.")
    dtype, floor = rounding_of(kind, precision), floor_of(kind, precision, call.q.shape[2])
    parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for one, dout, dlse in zip(
        call.calls(), upstream[0].split(call.lengths_q), upstream[1].split(call.lengths_q, 1), strict=True
    ):
        how: dict[str, Any] = {"dlse": dlse[None]}
        truth, truth_lse = reference.forward(*one.banded, compute_dtype=torch.float64)
        exact = (dout[None], *one.banded, truth, truth_lse)
        right = reference.backward(*exact, compute_dtype=torch.float64, **how)
        sizes = reference.magnitudes(*exact, compute_dtype=torch.float64, **how)
        how |= {"compute_dtype": torch.float32, "round_to": dtype}
        ideal, ideal_lse = reference.forward(*one.banded, compute_dtype=torch.float32, round_to=dtype)
        best = reference.backward(dout[None], *one.banded, ideal, ideal_lse, recentre=True, **how)
        parts.setdefault("out", []).append((truth, sizes[0], ideal))
        parts.setdefault("lse", []).append((truth_lse, truth_lse, ideal_lse))
        for name, *each in zip(NAMES, right, sizes[1:], best, strict=False):
            if name in found:
                parts.setdefault(name, []).append((each[0], each[1], each[2]))
    for name, value in found.items():
        truths, sizes_of_all, ideals = (call.joined(name, list(each)) for each in zip(*parts[name], strict=True))
        right_one = Reference(truths) if name == "lse" else Reference(truths, sizes_of_all)
        rule = Rule("log") if name == "lse" else Rule("rows", 2.0 if name == "out" else 3.0)
        stick = yardstick(name, rule, right_one, ideals.to(value.dtype), floor)
        finding = stick.finding(stick.judge(value.detach()).tolist())
        assert finding.ratio <= 1, f"{name}: {finding}"
