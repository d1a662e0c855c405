"""Calls of the kernels as hypothesis draws them: sizes, layouts in memory, dtypes, groups, bands, masks, subsets of gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor

from autotune.device import DeviceInfo
from cache_db.models import Config, Problem
from flashbias import plans
from flashbias.band import Band
from flashbias.kernels import space
from flashbias.kernels.arguments import compile_kernel
from flashbias.kernels.problem import Shape, problem
from flashbias.kernels.spec import ATTENTION
from tests.flashbias.cases import SIX, Call, assert_within_gate, solve

LAYOUTS = ("contiguous", "heads first", "unaligned", "gaps between rows", "columns first", "one batch for all")


@contextmanager
def default_configs(choose: Callable[[str, Problem, DeviceInfo], Config] = space.default) -> Iterator[None]:
    """Runs every call with the configs that ``choose`` gives, compiled but not proven: the kernels are tested, not the tuner."""

    def make(shape: Shape, seen: Band, device: DeviceInfo, _: Any) -> plans.Plan:
        found = problem(shape, device, seen)
        binaries = {}
        for kernel in ATTENTION.kernels(found):
            config = choose(kernel, found, device)
            binaries[kernel] = compile_kernel(kernel, config, found, device).load()
        return plans.Plan(binaries, found.layout == "aligned")

    plans.forget()
    with mock.patch.object(plans, "_make_plan", make):
        yield
    plans.forget()


@dataclass(frozen=True)
class Drawn:
    """A call, the inputs that want a gradient, and the upstream gradients of O and LSE."""

    call: Call
    wanted: frozenset[str]
    dout: Tensor
    dlse: Tensor

    def check(self) -> None:
        """Solves the call with default configs and judges every result by the gate's rule."""
        found = solve(self.call, (self.dout, self.dlse), self.wanted)
        assert_within_gate(self.call, found, self.dout, self.dlse)


def laid_out(values: Tensor, layout: str) -> Tensor:
    """Returns a (B, S, H, D) tensor's numbers (for "one batch for all" only the first batch's) in other memory."""
    if layout == "heads first":
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "unaligned":
        room = values.new_empty((*values.shape[:3], values.shape[3] + 3))
        return room[..., 1:-2].copy_(values)
    if layout == "gaps between rows":
        room = values.new_empty((values.shape[0], 2 * values.shape[1], *values.shape[2:]))
        return room[:, ::2].copy_(values)
    if layout == "columns first":
        return values.transpose(1, 3).contiguous().transpose(1, 3)
    return values[:1].expand(values.shape) if layout == "one batch for all" else values


@st.composite
def drawn_calls(draw: st.DrawFn, longest: int, device: torch.device) -> Drawn:
    """Draws a well-conditioned 16-bit call of at most ``longest`` rows and keys."""
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16]))
    batch, kv_heads, group = draw(st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 2)))
    rows, keys = draw(st.tuples(st.integers(1, longest), st.integers(1, longest)))
    heads, rank = kv_heads * group, draw(st.sampled_from([0, 3, 8]))
    head_dim, value_dim = draw(st.tuples(st.sampled_from([16, 40]), st.sampled_from([16, 24])))
    generator = torch.Generator(device).manual_seed(draw(st.integers(0, 99)))

    def normal(*shape: int, size: float = 1.0, kind: torch.dtype = dtype) -> Tensor:
        values = (torch.randn(shape, generator=generator, device=device) * size).to(kind)
        return laid_out(values, draw(st.sampled_from(LAYOUTS)))

    q, k = normal(batch, rows, heads, head_dim, size=0.5), normal(batch, keys, kv_heads, head_dim)
    call = Call(q, k, normal(batch, keys, kv_heads, value_dim), scale=head_dim**-0.5)
    if rank:
        kind, own = (
            draw(st.sampled_from([dtype, torch.float32])),
            (st.sampled_from([1, batch]), st.sampled_from([1, heads])),
        )
        q_shape, k_shape = draw(st.tuples(*own)), draw(st.tuples(own[0], st.sampled_from([1, kv_heads, heads])))
        q_bias = normal(q_shape[0], rows, q_shape[1], rank, size=0.4, kind=kind)
        k_bias = normal(k_shape[0], keys, k_shape[1], rank, size=0.6, kind=kind)
        call = replace(call, q_bias=q_bias, k_bias=k_bias)
    kind = draw(st.sampled_from(["none", "bool", "float32", "bfloat16"]))
    if kind != "none":
        shape = tuple(draw(st.sampled_from([1, size])) for size in (batch, heads, rows, keys))
        values = torch.randn(shape, generator=generator, device=device) * 0.5
        mask = (
            values > -0.4 if kind == "bool" else values.masked_fill(values < -0.5, -torch.inf).to(getattr(torch, kind))
        )
        call = replace(call, mask=mask)
    window = draw(st.sampled_from([(-1, -1), (longest // 4, 3), (-1, 2), (5, -1)]))
    call = replace(call, causal=draw(st.sampled_from([False, True, "bottom_right"])), window=window)
    wanted = frozenset(draw(st.sets(st.sampled_from(SIX))))
    dout = normal(batch, rows, heads, value_dim)
    dlse = torch.randn((batch, heads, rows), generator=generator, device=device)
    return Drawn(call, wanted, dout, dlse)
