"""The public call in fp64 on whatever hypothesis draws, against autograd of a dense softmax."""

from __future__ import annotations

import math
from dataclasses import replace

import hypothesis
import torch
from hypothesis import strategies as st

from tests.flashbias.cases import SIX, Call, assert_solved, make, normal, solve, upstream_of


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """Draws a small fp64 call: sizes, groups, shared factors, bands, masks, and inputs as large as softmax overflows at."""
    batch, kv_heads, group = draw(st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3)))
    rows, keys = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    heads = kv_heads * group
    shares = (st.sampled_from(each) for each in ((1, batch), (1, heads), (1, batch), (1, kv_heads, heads)))
    call = make(
        batch,
        heads,
        rows,
        keys,
        rank=draw(st.integers(0, 3)),
        broadcast=draw(st.tuples(*shares)),
        kv_heads=kv_heads,
        causal=draw(st.sampled_from([False, True, "bottom_right"])),
        window=draw(st.tuples(st.integers(-1, 5), st.integers(-1, 5))),
    )
    shape = tuple(draw(st.sampled_from([1, size])) for size in (batch, heads, rows, keys))[draw(st.integers(0, 4)) :]
    values = normal(*shape, seed=draw(st.integers(0, 99)))
    mask = draw(st.sampled_from([None, values > -0.5, values, values.masked_fill(values > 0.5, -math.inf)]))
    large = draw(st.sampled_from([1.0, 1.0, 15.0, 1500.0]))
    return replace(call, q=call.q * large, mask=mask, scale=draw(st.sampled_from([0.3, 0.0, -0.2])))


quickly = hypothesis.settings(max_examples=120, deadline=None, derandomize=True)


@quickly
@hypothesis.given(calls(), st.sets(st.sampled_from(SIX)))
def test_any_call_and_any_subset_of_gradients_is_autograds(call: Call, names: set[str]) -> None:
    """Sizes, groups, bands, masks, magnitudes and wanted gradients in any mixture."""
    assert_solved(call, names, 1e-8)


@quickly
@hypothesis.given(calls(), st.sampled_from([-3.0, 0.5, 1000.0]))
def test_rows_of_ds_sum_to_dlse(call: Call, constant: float) -> None:
    """The gradient of a column beside a constant one is dLSE times it, summed over what shares the column."""
    batch, rows, heads, _ = call.q.shape
    q_bias = normal(batch, rows, 1, 1)
    call = replace(call, q_bias=q_bias, k_bias=torch.full((1, call.k.shape[1], heads, 1), constant).double())
    dout, dlse = upstream_of(call)
    found = solve(call, (dout, dlse), ("q_bias",))
    alive = dlse.masked_fill(found["lse"] == -math.inf, 0.0)
    expected = constant * alive.sum(1)[:, :, None, None]
    torch.testing.assert_close(found["q_bias"], expected, rtol=1e-9, atol=1e-9 * abs(constant))
