"""The public call from end to end, in fp32 and fp64 and through the kernels, against autograd of a dense softmax."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from autotune.device import interpreting
from flashbias import flash_bias_func
from flashbias.settings import settings
from tests.flashbias.cases import (
    CALLS,
    SIX,
    WIDER_CALLS,
    Call,
    assert_solved,
    assert_within_gate,
    attend,
    differentiate,
    exact,
    make,
    naive,
    normal,
    solve,
    upstream_of,
)

GROUPED = {
    f"k_bias with {heads} of 6 heads": make(heads=6, kv_heads=2, broadcast=(2, 6, 1, heads)) for heads in (1, 2, 6)
}
EVERY_CALL = CALLS | WIDER_CALLS | GROUPED
MASK_SHAPES = [(1, 3, 13, 17), (2, 1, 1, 17), (13, 17), (3, 1, 17), (2, 3, 13, 1), (1,), ()]
needs_kernels = pytest.mark.skipif(
    not interpreting(), reason="runs kernels in Triton's interpreter (TRITON_INTERPRET=1)"
)


class TestInWideFloats:
    """On a CPU in fp32 and fp64, by ``eager``."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("name", EVERY_CALL)
    def test_results_and_all_gradients_are_autograds(self, name: str, dtype: torch.dtype) -> None:
        """Groups, bands, masks and dead rows: O, LSE and the gradients through both are those of a dense softmax."""
        call = replace(EVERY_CALL[name], **{key: each.to(dtype) for key, each in EVERY_CALL[name].factors()})
        assert_solved(call, tolerance=1e-4 if dtype == torch.float32 else 1e-10)

    @pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
    def test_gradient_of_a_mask_is_summed_over_what_it_is_broadcast_in(self, shape: tuple[int, ...]) -> None:
        """A mask of fewer dims, or with dims of size 1, gets a gradient of its own shape."""
        assert_solved(replace(make(causal="bottom_right"), mask=normal(*shape)), ("q", "mask"))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
    def test_gradient_of_a_mask_has_its_own_dtype(self, dtype: torch.dtype) -> None:
        """A narrower mask beside fp64 inputs gets the gradient rounded once, to its dtype."""
        assert_solved(replace(make(), mask=normal(13, 17).to(dtype)), ("mask",))

    @pytest.mark.parametrize(("shape", "full"), [((17,), (13, 17)), ((3, 1, 1), (2, 3, 13, 17)), ((1, 1), (13, 17))])
    def test_gradient_of_an_expanded_mask_needs_no_more_memory_than_the_mask(
        self, shape: tuple[int, ...], full: tuple[int, ...]
    ) -> None:
        """Expanded by the caller, a mask gets the gradient it gets broadcast here, and none of the copies is stored."""
        call = make()
        upstream = upstream_of(call)
        seen: list[int] = []
        leaf = normal(*shape).requires_grad_()
        expanded = leaf.expand(full)
        expanded.register_hook(lambda gradient: seen.append(gradient.untyped_storage().nbytes()))
        (found,) = torch.autograd.grad(attend(replace(call, mask=expanded)), leaf, upstream)
        expected = differentiate(replace(call, mask=leaf.detach().expand(full)), *upstream)["mask"].sum_to_size(shape)
        torch.testing.assert_close(found, expected)
        assert seen == [8 * leaf.numel()]

    @pytest.mark.parametrize("empty", ["rows", "keys", "batch"])
    def test_gradient_of_an_expanded_mask_over_nothing_is_zero(self, empty: str) -> None:
        """Without rows, keys or batches an expanded mask has a gradient all the same."""
        sizes = {"batch": 2, "rows": 5, "keys": 7} | {empty: 0}
        call = make(heads=3, **sizes)
        leaf = torch.zeros((), dtype=torch.float64, requires_grad=True)
        out, _ = attend(replace(call, mask=leaf.expand(sizes["batch"], 3, sizes["rows"], sizes["keys"])))
        assert torch.autograd.grad(out.sum(), leaf)[0] == 0

    def test_factors_may_be_wider_or_narrower_than_fp64(self) -> None:
        """fp32 factors beside fp64 inputs and fp64 factors beside fp32 inputs keep their own dtype's gradient."""
        for inputs, factors in ((torch.float64, torch.float32), (torch.float32, torch.float64)):
            dtypes = [inputs] * 3 + [factors] * 2
            call = make(broadcast=(1, 3, 2, 1), causal=True)
            call = replace(call, **{n: t.to(d) for (n, t), d in zip(call.factors(), dtypes, strict=True)})
            assert_solved(call, tolerance=1e-4)

    def test_heads_and_ranks_up_to_256(self) -> None:
        """Head dims and ranks end at 256."""
        q, k, v, q_bias, k_bias = (normal(1, size, 1, 256, seed=size) for size in (3, 4, 5, 6, 7))
        assert_solved(Call(q, k[:, :3], v[:, :3], q_bias[:, :3], k_bias[:, :3], scale=0.05))

    @pytest.mark.parametrize("deterministic", [True, False])
    def test_deterministic_changes_nothing(self, deterministic: bool) -> None:
        """Gradients are repeatable to the bit whatever is asked for."""
        call = make(broadcast=(1, 1, 1, 1), dtype=torch.float32)
        leaf = call.q.clone().requires_grad_()
        outs = [flash_bias_func(leaf, *call.arguments[1:], deterministic=each) for each in (None, deterministic)]
        gradients = [torch.autograd.grad(out.sum(), leaf)[0] for out in outs]
        assert torch.equal(*gradients)

    @pytest.mark.parametrize("window", [[2, 1], (np.int64(2), np.int32(1))], ids=str)
    def test_windows_are_two_numbers(self, window: Any) -> None:
        """A list and NumPy's integers serve as well as a tuple of ints."""
        call = make()
        expected = flash_bias_func(*call.arguments, window_size=(2, 1))
        assert torch.equal(flash_bias_func(*call.arguments, window_size=window), expected)

    @pytest.mark.parametrize("causal", [False, True, "bottom_right"])
    @pytest.mark.parametrize("size", [17, 2**31 - 1, 2**31, sys.maxsize, 10**30])
    def test_a_window_wider_than_all_keys_is_none(self, size: int, causal: Any) -> None:
        """However large a side is, beyond the keys it limits nothing."""
        call = make(causal=causal)
        expected = flash_bias_func(*call.arguments)
        assert torch.equal(flash_bias_func(*call.arguments, window_size=(size, size)), expected)


def tiny(dtype: torch.dtype, factors: torch.dtype | None = None, **options: Any) -> Call:
    """Returns a call that kernels take: well-conditioned 16-bit inputs."""
    call = make(dtype=dtype, **options)
    both = {name: (getattr(call, name).double() * 0.7).to(factors or dtype) for name in ("q_bias", "k_bias")}
    return replace(call, q=call.q * 0.5, **both)


def grouped(rows: int, keys: int, k_heads: int) -> Call:
    """Returns a bottom-right call of 4 heads and 2 key heads, k_bias with ``k_heads``, the mask over keys."""
    sizes = {"batch": 1, "heads": 4, "kv_heads": 2, "rows": rows, "keys": keys}
    call = tiny(torch.float16, broadcast=(1, 4, 1, k_heads), causal="bottom_right", **sizes)
    return replace(call, mask=normal(1, 1, 1, keys).float())


def windowed(rows: int, keys: int, *mask: int) -> Call:
    """Returns a call with a window to both sides and fp32 factors beside bf16."""
    sizes = {"heads": 2, "rows": rows, "keys": keys}
    call = tiny(torch.bfloat16, torch.float32, broadcast=(1, 2, 2, 1), window=(7, 4), **sizes)
    return replace(call, mask=normal(*mask).bfloat16())


# Proving a problem's configs takes seconds, a call of a proven one little: calls of one function share a problem.
THROUGH_KERNELS = {
    "k_bias by key head, fewer rows than keys": grouped(19, 30, 2),
    "k_bias by query head, rows without a key": grouped(37, 20, 4),
    "one k_bias": grouped(20, 20, 1),
    "fp32 factors, window, mask for each head": windowed(21, 26, 1, 2, 21, 26),
    "fp32 factors, window, more rows than keys, one mask": windowed(30, 18, 30, 18),
    "fp32 factors beside fp16, causal window, mask of heads and keys": replace(
        tiny(torch.float16, torch.float32, batch=1, heads=2, rows=23, keys=23, causal=True, window=(9, 0)),
        mask=normal(2, 1, 23).half(),
    ),
}


@needs_kernels
class TestThroughKernels:
    """In fp16 and bf16, by the kernels, judged by the gate's own rule."""

    @pytest.mark.parametrize("name", THROUGH_KERNELS)
    def test_results_and_all_six_gradients_pass_the_gate(self, name: str) -> None:
        """O, LSE and six gradients through both are right, in shape and dtype of their inputs, dead rows' dLSE ignored."""
        call = THROUGH_KERNELS[name]
        dout, dlse = upstream_of(call)
        poisoned = dlse.masked_fill(naive(exact(call))[1] == -math.inf, math.inf)
        with settings(mode="read"):
            found = solve(call, (dout, poisoned))
        for key in SIX:
            assert (found[key].dtype, found[key].shape) == (getattr(call, key).dtype, getattr(call, key).shape)
        assert found["lse"].dtype == torch.float32
        assert_within_gate(call, found, dout, dlse)

    def test_scores_far_beyond_what_exp_can_hold(self) -> None:
        """Logits to ±60, as q times 5 and k times 3 give: softmax puts nearly all weight on one key, and all stays right."""
        call = tiny(torch.float16, rows=40, keys=47, causal=True)
        call = replace(call, q=call.q * 10, k=call.k * 3)
        upstream = upstream_of(call)
        with settings(mode="read"):
            assert_within_gate(call, solve(call, upstream), *upstream)

    def test_inference_and_lse_alone(self) -> None:
        """Without gradients the results are the same to the bit, and a loss of LSE alone has its gradients."""
        call = THROUGH_KERNELS["k_bias by query head, rows without a key"]
        _, dlse = upstream_of(call)
        leaves = {name: getattr(call, name).clone().requires_grad_() for name in SIX}
        with settings(mode="read"):
            out, lse = attend(replace(call, **leaves))
            gradients = torch.autograd.grad(lse, list(leaves.values()), dlse)
            with torch.no_grad():
                inferred = attend(call)
        assert torch.equal(inferred[0], out)
        assert torch.equal(inferred[1], lse)
        found = dict(zip(leaves, gradients, strict=True))
        assert not found.pop("v").any()
        assert_within_gate(call, found, torch.zeros_like(out), dlse)

    @pytest.mark.parametrize("how", ["plain", "compiled"])
    def test_masks_expanded_by_the_caller(self, how: str) -> None:
        """They get the gradient that they get broadcast here, plainly and in a graph."""
        call = THROUGH_KERNELS["k_bias by key head, fewer rows than keys"]
        upstream = upstream_of(call)
        leaves = [getattr(call, name).clone().requires_grad_() for name in SIX]

        def expanding(*leaves: Tensor) -> tuple[Tensor, Tensor]:
            given = dict(zip(SIX, leaves, strict=True))
            return attend(replace(call, **given | {"mask": given["mask"].expand(1, 4, 19, 30)}))

        torch._dynamo.reset()
        run = expanding if how == "plain" else torch.compile(expanding, backend="aot_eager")
        with settings(mode="read"):
            found = torch.autograd.grad(run(*leaves), leaves, upstream)
            expected = solve(call, upstream)
        for name, gradient in zip(SIX, found, strict=True):
            torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(
        "name", ["k_bias by query head, rows without a key", "fp32 factors, window, mask for each head"]
    )
    def test_a_constant_column_of_k_bias_gets_the_sum_of_dlse(self, name: str) -> None:
        """Rows of dS sum to dLSE, so dq_bias of a column of ones is dLSE, however dS was rounded: 0 without it."""
        call = THROUGH_KERNELS[name]
        assert call.k_bias is not None
        call = replace(call, k_bias=torch.cat([call.k_bias[..., :2], torch.ones_like(call.k_bias[..., :1])], -1))
        dout, dlse = upstream_of(call)
        with settings(mode="read"):
            found = solve(call, (dout, dlse))
            without = solve(call, (dout, torch.zeros_like(dlse)))["q_bias"]
        alive = dlse.masked_fill(found["lse"] == -math.inf, 0.0).transpose(1, 2)
        off = found["q_bias"][..., 2].float() - alive.sum(0, keepdim=True)
        eps = max(torch.finfo(found["q_bias"].dtype).eps, 2e-6)
        assert bool((off.abs() <= eps * alive.abs().sum(0)).all())
        assert float(without[..., 2].abs().max()) < 1e-6 < float(without[..., :2].abs().max())
