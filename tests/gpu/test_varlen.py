"""Packed sequences at real sizes on a GPU, judged by the gate's own rule: default configs, then a sweep."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from flashbias import flash_bias_varlen_func, plans
from flashbias.precision import PRECISIONS
from flashbias.settings import settings
from tests.flashbias.cases import NAMES
from tests.flashbias.varlen_cases import Packed, assert_within_gate, attend, packed, solve, upstream_of
from tests.gpu.test_features import defaults

__all__ = ["defaults"]
CROSS = (777, 0, 130, 1, 64), (901, 333, 0, 1, 65)
WHOLE = plans._make_plan  # as it is outside of the fixture ``defaults``
SELF = (1025, 1, 0, 512, 77), (1025, 1, 0, 512, 77)


def call_of(lengths: Any = CROSS, dtype: torch.dtype = torch.bfloat16, **how: Any) -> Packed:
    """Returns a call on the GPU."""
    sizes: dict[str, Any] = {"rank": 8, "dims": (64, 64)} | how
    return packed(lengths, dtype=dtype, device="cuda", **sizes)


def judge(call: Packed, precision: str | None = None) -> None:
    """Runs the call forward and backward and holds O, LSE and every gradient to the gate's budget."""
    upstream = upstream_of(call)
    found = solve(call, upstream, precision=precision)
    for name, tensor in call.inputs().items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype)
    assert_within_gate(call, found, upstream, precision or "default")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, "top_left", "bottom_right"])
@pytest.mark.parametrize("positional", ["", "q", "k", "qk"])
def test_lengths_that_differ(positional: str, causal: Any, dtype: torch.dtype) -> None:
    """Empty sequences, single tokens, ends within a tile; factors of both layouts, grouped heads."""
    judge(call_of(dtype=dtype, causal=causal, positional=positional))


@pytest.mark.parametrize("window", [(100, 0), (0, 0), (700, 37), (-1, 64), (513, -1)])
@pytest.mark.parametrize("causal", [False, "top_left", "bottom_right"])
def test_windows(causal: Any, window: tuple[int, int]) -> None:
    """Any window, aligned in each sequence."""
    judge(call_of(causal=causal, window=window))


@pytest.mark.parametrize(
    "how",
    [
        {"rank": 0},
        {"dims": (128, 128), "causal": True},
        {"dims": (40, 24), "rank": 12},
        {"dims": (20, 20), "rank": 5},
        {"dims": (256, 64), "rank": 100},
        {"heads": 3, "kv_heads": 3, "factor_heads": (3, 1), "positional": "qk"},
        {"heads": 8, "kv_heads": 1, "factor_heads": (1, 8)},
        {"factor_dtype": torch.float32, "rank": 2, "positional": "qk"},
        {"factor_dtype": torch.float32, "rank": 8, "factor_heads": (1, 1)},
    ],
    ids=str,
)
def test_head_dims_ranks_and_factors(how: dict[str, Any]) -> None:
    """Odd and wide head dims, no bias, shared heads, exact factors."""
    judge(call_of(SELF, **how))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_fp32(precision: str) -> None:
    """fp32 inputs have kernels in each precision."""
    judge(call_of(dtype=torch.float32, causal="bottom_right"), precision)


@pytest.mark.parametrize("names", [("q",), ("v",), ("q_bias",), ("k_bias",), ("k", "q_bias")], ids="+".join)
def test_single_gradients(names: tuple[str, ...]) -> None:
    """Whatever is wanted alone is as right as all together."""
    call = call_of(causal="bottom_right", positional="qk")
    upstream = upstream_of(call)
    assert_within_gate(call, solve(call, upstream, names), upstream)


def test_many_short_sequences() -> None:
    """Hundreds of sequences of 0 to 99 tokens and others of 64 to 163 keys, whose gradients by position are sums."""
    lengths = tuple((37 * index) % 100 for index in range(400)), tuple(64 + (41 * index) % 100 for index in range(400))
    judge(call_of(lengths, positional="qk", heads=2, kv_heads=2, factor_heads=(2, 2)))


def test_decoding() -> None:
    """One query in each sequence, as with a cache."""
    judge(call_of(((1,) * 16, tuple(range(1, 3200, 200))), causal="bottom_right"))


def test_strided_inputs_and_upstream_gradients() -> None:
    """q, k and v cut from one tensor, with rows that are not whole 16-byte steps apart, and a transposed dO."""
    call = call_of(SELF, heads=4, kv_heads=4, dims=(20, 20), causal=True, factor_heads=(4, 4))
    together = torch.stack([call.q, call.k, call.v], 2)
    parts = together.detach().requires_grad_()
    q, k, v = parts.unbind(2)
    arguments = (q, k, v, *call.arguments[3:])
    out, lse = flash_bias_varlen_func(*arguments, return_lse=True)
    dout, dlse = upstream_of(call)
    strange = dout.transpose(0, 2).contiguous().transpose(0, 2)
    (gradient,) = torch.autograd.grad((out, lse), parts, (strange, dlse))
    found = {"out": out, "lse": lse, **dict(zip(NAMES, gradient.unbind(2), strict=False))}
    assert_within_gate(call, found, (dout, dlse))


def test_results_repeat_to_the_bit() -> None:
    """Forward and backward give the same bits every time."""
    call = call_of(causal="bottom_right", positional="qk")
    upstream = upstream_of(call)
    first = solve(call, upstream)
    for _ in range(5):
        again = solve(call, upstream)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_host_never_waits_and_a_graph_captures_the_call() -> None:
    """Forward and backward ask nothing of the GPU, and a replay follows inputs and lengths that changed in place."""
    call = call_of(SELF, causal=True, positional="k").wanting()
    arguments, upstream = list(call.arguments), upstream_of(call)
    arguments[4] = arguments[3]
    leaves = list(call.inputs().values())

    def step() -> tuple[torch.Tensor, ...]:
        out, lse = flash_bias_varlen_func(*arguments, return_lse=True)
        return (out.detach(), lse.detach(), *torch.autograd.grad((out, lse), leaves, upstream))

    step()
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings(action="ignore"):  # that the mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    arguments[3].copy_(torch.tensor([0, 1000, 1001, 1001, 1538, 1615], dtype=torch.int32))
    with torch.no_grad():
        call.q.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    for name, found, expected in zip(("out", "lse", *NAMES), captured, step(), strict=True):
        assert torch.equal(found, expected), name


def test_compiled_with_inductor() -> None:
    """torch.compile gives the same numbers forward and backward."""
    call = call_of(causal="bottom_right").wanting()
    upstream, leaves = upstream_of(call), list(call.inputs().values())
    expected = (*attend(call), *torch.autograd.grad(attend(call), leaves, upstream))
    results = torch.compile(attend, fullgraph=True)(call)
    found = (*results, *torch.autograd.grad(results, leaves, upstream))
    for name, one, other in zip(("out", "lse", *NAMES), found, expected, strict=True):
        assert torch.equal(one, other), name


def test_neighbours_are_never_touched() -> None:
    """What another sequence holds, NaN included, changes no bit of one sequence's results and gradients."""
    call = call_of(((200, 77, 300), (150, 90, 310)), causal="bottom_right", positional="", factor_heads=(4, 4))
    upstream = upstream_of(call)
    expected = solve(call, upstream)
    rows, keys = slice(200, 277), slice(150, 240)
    poisoned = {name: tensor.clone() for name, tensor in call.inputs().items()}
    for name, tensor in poisoned.items():
        own = rows if name in ("q", "q_bias") else keys
        tensor[: own.start], tensor[own.stop :] = torch.nan, torch.nan
    found = solve(Packed(**{**call.__dict__, **poisoned}), upstream)
    for name in ("out", "q", "q_bias", "k", "v", "k_bias"):
        own = rows if name in ("out", "q", "q_bias") else keys
        assert torch.equal(found[name][own], expected[name][own]), name
    assert torch.equal(found["lse"][:, rows], expected["lse"][:, rows])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_sweep_finds_proven_configs(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate accepts candidates of all three kernels on the real device, and the call that made it sweep is right."""
    monkeypatch.setattr(plans, "_make_plan", WHOLE)
    plans.forget()
    with settings(mode="tune", cache_dir=tmp_path, budget_seconds=120):
        judge(call_of(dtype=dtype, causal="bottom_right", positional="k"))
        binaries = [set(plan.binaries) for plan in plans._plans.values()]
    plans.forget()
    assert binaries == [{"forward", "backward_dq", "backward_dkdv"}]
