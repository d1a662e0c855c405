"""How a call is cut into chunks: every visible score once, few others, in bounded memory; any combination of features."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flashbias import chunks, reference
from flashbias.band import CAUSAL, EVERYTHING, Band
from tests.flashbias.cases import CALLS, WIDER_CALLS, Call, differentiate, gradient_like, make, naive

BANDS = [EVERYTHING, CAUSAL, Band(4, 0), Band(-3, 5), Band(None, -9), Band(6, None), Band(9, -9), Band(2, -5)]


def call_of(q: Tensor, k: Tensor, band: Band) -> chunks.Call:
    """Returns a call of which only sizes matter."""
    return chunks.Call(q, k, k, None, None, None, band, 1.0, torch.float32)


class TestCutting:
    """Chunks are made for what is seen."""

    def test_chunks_cover_every_score_once(self) -> None:
        """However many heads and batches, chunks tile the scores and a batched product stays within the grid."""
        q = torch.zeros(1).expand(5, 2, 40_000, 1)
        seen = torch.zeros(5, 40_000, 2, dtype=torch.int8)
        for chunk in call_of(q, q, EVERYTHING).chunks():
            part = seen[chunk.batch, chunk.heads, chunk.rows]
            assert part.shape[0] * part.shape[1] <= 65_535
            part += 1
        assert bool((seen == 1).all())

    @pytest.mark.parametrize("band", BANDS, ids=str)
    @pytest.mark.parametrize("limit", [4, 200, 1 << 20])
    def test_keys_are_cut_to_what_rows_see(self, limit: int, band: Band, monkeypatch: pytest.MonkeyPatch) -> None:
        """A chunk begins at the first key that its rows see and ends at the last one; without any there is no chunk."""
        monkeypatch.setattr(chunks, "CPU_CHUNK_BYTES", limit)
        low, high = band
        seen = torch.zeros(11, 15, dtype=torch.bool)
        for i, j in itertools.product(range(11), range(15)):
            seen[i, j] = (low is None or j - i >= -low) and (high is None or j - i <= high)
        for chunk in call_of(torch.zeros(1, 11, 1, 1), torch.zeros(1, 15, 1, 1), band).chunks():
            # Rows of an empty band look from behind their first key to before it: nothing to be tight about.
            if band != Band(2, -5):
                columns = seen[chunk.rows].any(0).nonzero()
                assert (chunk.keys.start, chunk.keys.stop) == (int(columns.min()), int(columns.max()) + 1)
            seen[chunk.rows, chunk.keys] = False
        assert not seen.any()

    def test_a_window_costs_its_width(self) -> None:
        """With a window of 100 keys in 60,000, fewer than three times the visible scores are computed."""
        q = torch.zeros(1).expand(1, 60_000, 8, 1)
        sizes = [
            (chunk.heads.stop - chunk.heads.start)
            * (chunk.rows.stop - chunk.rows.start)
            * (chunk.keys.stop - chunk.keys.start)
            for chunk in call_of(q, q, Band(99, 0)).chunks()
        ]
        assert 8 * 60_000 * 100 < sum(sizes) < 3 * 8 * 60_000 * 100
        assert len(sizes) < 500

    @pytest.mark.parametrize("limit", range(1, 40))
    def test_heads_of_a_chunk_never_split_two_groups(self, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """A chunk's query heads are whole groups or part of one, and every head is in one chunk."""
        monkeypatch.setattr(chunks, "CPU_CHUNK_BYTES", 4 * limit)
        seen = []
        for chunk in call_of(torch.zeros(1, 1, 24, 1), torch.zeros(1, 1, 4, 1), EVERYTHING).chunks():
            first, last = chunk.heads.start, chunk.heads.stop
            assert last - first <= limit
            assert first // 6 == (last - 1) // 6 or first % 6 == last % 6 == 0
            seen += range(first, last)
        assert seen == list(range(24))


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """Draws sizes, groups, how factors and mask are shared, and what is seen."""
    batch, kv_heads, group = (draw(st.integers(1, 3)) for _ in range(3))
    heads, rows, keys = kv_heads * group, draw(st.integers(1, 9)), draw(st.integers(1, 9))
    shared = (
        draw(st.sampled_from([1, batch])),
        draw(st.sampled_from([1, heads])),
        draw(st.sampled_from([1, batch])),
        draw(st.sampled_from([1, kv_heads, heads])),
    )
    causal: bool | Literal["bottom_right"] = draw(st.sampled_from([False, True, "bottom_right"]))
    window = (draw(st.integers(-1, 5)), draw(st.integers(-1, 5)))
    rank = draw(st.integers(0, 2))
    call = make(batch, heads, rows, keys, rank, shared, causal=causal, kv_heads=kv_heads, window=window)
    kind = draw(st.sampled_from(["none", "bool", "additive", "additive with holes"]))
    if kind == "none":
        return call
    full = (batch, heads, rows, keys)[draw(st.integers(0, 4)) :]
    shape = tuple(draw(st.sampled_from([1, size])) for size in full)
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(len(full)), dtype=torch.float64)
    if kind == "bool":
        return replace(call, mask=mask > -0.5)
    return replace(call, mask=mask if kind == "additive" else mask.masked_fill(mask < -0.5, -torch.inf))


@settings(max_examples=150, deadline=None)
@given(calls(), st.sampled_from([8, 250, 1 << 20]), st.booleans(), st.booleans(), st.booleans())
def test_any_combination_is_autograd(
    call: Call, limit: int, given_out: bool, recentre: bool, through_lse: bool
) -> None:
    """Groups, bands, masks and shared factors in any combination, cut anywhere: O, LSE and six gradients are right."""
    expected_out, expected_lse = naive(call)
    dout = gradient_like(expected_out)
    dlse = gradient_like(expected_lse, seed=2) if through_lse else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CPU_CHUNK_BYTES", limit)
        out, lse = reference.forward(*call.banded, compute_dtype=torch.float64)
        gradients = reference.backward(
            dout,
            *call.banded,
            out if given_out else None,
            lse,
            compute_dtype=torch.float64,
            recentre=recentre,
            dlse=dlse,
        )
    torch.testing.assert_close((out, lse), (expected_out, expected_lse), rtol=1e-10, atol=1e-10)
    found = {name.removeprefix("d"): value for name, value in gradients._asdict().items() if value is not None}
    expected = differentiate(call, dout, dlse)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-10)


class LargestTensor(TorchDispatchMode):
    """Remembers the bytes of the largest tensor any operation returned."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [t.numel() * t.element_size() for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.bytes = max(self.bytes, *sizes, 0)
        return result


def everything(call: Call) -> None:
    """Runs all three passes in fp64, through LSE too."""
    out, lse = reference.forward(*call.banded, compute_dtype=torch.float64)
    reference.backward(out, *call.banded, out, lse, compute_dtype=torch.float64, recentre=True, dlse=lse)
    reference.magnitudes(out, *call.banded, out, lse, compute_dtype=torch.float64, dlse=lse)


class TestCost:
    """The reference is usable at real sizes: bounded memory and no look at values from the host."""

    @pytest.mark.parametrize("kv_heads", [4, 2, 1])
    @pytest.mark.parametrize("mask", ["none", "keys", "expanded", "float16 rows"])
    def test_no_tensor_exceeds_a_chunk(self, mask: str, kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """No intermediate is larger than a chunk, although the scores of one head are twice that."""
        monkeypatch.setattr(chunks, "CPU_CHUNK_BYTES", 128 << 10)
        sizes = {"batch": 2, "heads": 4, "rows": 180, "keys": 190, "kv_heads": kv_heads}
        call = make(**sizes, broadcast=(1, 4, 2, 1), mask=mask, causal=True)
        with LargestTensor() as largest:
            everything(call)
        assert 64 << 10 < largest.bytes <= 128 << 10

    def test_keys_are_repeated_for_a_chunk_at_most(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """With 32 query heads on 2 heads of keys and few rows, no intermediate is as large as all keys repeated."""
        monkeypatch.setattr(chunks, "CPU_CHUNK_BYTES", 128 << 10)
        call = make(batch=1, heads=32, rows=3, keys=800, kv_heads=2, rank=0)
        with LargestTensor() as largest:
            everything(call)
        assert 32 * 800 * 8 * 8 > 12 * largest.bytes > 0

    @pytest.mark.parametrize("call", [CALLS["dead rows"], *WIDER_CALLS.values()], ids=["dead rows", *WIDER_CALLS])
    def test_nothing_depends_on_values(self, call: Call) -> None:
        """All passes run on tensors without values, so a GPU is never waited for."""
        with FakeTensorMode() as mode:
            fake = {name: mode.from_tensor(tensor) for name, tensor in call.factors()}
            everything(replace(call, **fake, mask=None if call.mask is None else mode.from_tensor(call.mask)))
