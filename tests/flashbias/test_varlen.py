"""Packed sequences through the public call on a CPU, against autograd of a dense softmax of each sequence."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from flashbias import ArgumentError, UnsupportedError, flash_bias_func, flash_bias_varlen_func
from flashbias.varlen import ops
from tests.flashbias.cases import NAMES
from tests.flashbias.varlen_cases import Packed, assert_solved, attend, dense, packed, solve, upstream_of

SUBSETS = [subset for size in range(1, 6) for subset in itertools.combinations(NAMES, size)]
SAME = (4, 0, 9, 1), (4, 0, 9, 1)
WINDOWS = [(-1, -1), (2, 1), (-1, 0), (3, -1)]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("causal", [False, "top_left", "bottom_right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_results_and_all_gradients_are_those_of_each_sequence(dtype: torch.dtype, causal: Any, window: Any) -> None:
    """O, LSE and the gradients through both, with empty sequences and bands aligned in each sequence."""
    assert_solved(packed(dtype=dtype, causal=causal, window=window), tolerance=1e-4 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("positional", ["", "q", "k", "qk"])
@pytest.mark.parametrize("factor_heads", [(4, 4), (1, 2), (4, 1), (1, 1)], ids=str)
def test_factors_of_both_layouts_and_any_sharing(positional: str, factor_heads: tuple[int, int]) -> None:
    """Rows of tokens or of positions on each side, heads shared or not: gradients have the factor's own shape."""
    assert_solved(packed(positional=positional, factor_heads=factor_heads, causal="bottom_right"))


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_every_subset_of_gradients(names: tuple[str, ...]) -> None:
    """Whichever inputs want a gradient get it, and the others get none."""
    assert_solved(packed(positional="q", causal="top_left"), names)


@pytest.mark.parametrize(
    "changes",
    [
        {"rank": 0},
        {"lengths": SAME, "causal": True, "positional": "qk"},
        {"lengths": ((6,), (8,)), "positional": ""},
        {"lengths": ((1, 1, 1), (5, 2, 9))},
        {"lengths": ((0, 0), (3, 2)), "positional": ""},
        {"lengths": ((3, 2), (0, 0)), "positional": ""},
        {"heads": 3, "kv_heads": 3, "factor_heads": (3, 1), "window": (0, 0), "causal": "bottom_right"},
        {"dtype": torch.float32, "factor_dtype": torch.float64},
        {"dtype": torch.bfloat16, "rank": 0},
        {"dtype": torch.float16, "factor_dtype": torch.float32, "positional": "qk"},
    ],
    ids=str,
)
def test_every_kind_of_call(changes: dict[str, Any]) -> None:
    """No bias, single sequences, decoding, only empty sequences on one side, factors of another dtype, 16-bit inputs."""
    tolerances = {torch.float16: 1e-2, torch.bfloat16: 5e-2, torch.float32: 1e-4}
    assert_solved(packed(**changes), tolerance=tolerances.get(changes.get("dtype", torch.float64), 1e-9))


def test_gradcheck() -> None:
    """All five gradients agree with finite differences of O and LSE in fp64."""
    call = packed(((2, 0, 3), (3, 2, 1)), rank=2, dims=(3, 2), causal="bottom_right", window=(2, 0)).wanting()

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attend(replace(call, **dict(zip(NAMES, tensors, strict=True))))
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    assert torch.autograd.gradcheck(function, tuple(call.inputs().values()))


def test_queries_without_keys_give_zero_and_pass_nothing_on() -> None:
    """O is 0 and LSE -inf where a sequence has no keys, and whatever comes back there moves no gradient."""
    call = packed(dtype=torch.float32)
    out, lse = attend(call)
    first, last = 5, 12  # the seven queries of the third sequence
    assert not out[first:last].any()
    assert bool((lse[:, first:last] == -math.inf).all())
    assert lse.dtype == torch.float32
    dout, dlse = upstream_of(call)
    found = solve(call, (dout, dlse.masked_fill(lse == -math.inf, math.inf)))
    expected = solve(call, (dout, dlse))
    assert all(torch.equal(found[name], expected[name]) for name in NAMES)
    assert not found["q"][first:last].any()


def test_equal_lengths_are_a_batch() -> None:
    """Two sequences of the same lengths give what flash_bias_func gives for a batch of two."""
    call = packed(((6, 6), (9, 9)), positional="qk", factor_heads=(4, 4), causal="bottom_right", window=(3, 0))
    assert call.q_bias is not None
    assert call.k_bias is not None
    batch = [tensor.unflatten(0, (2, -1)) for tensor in (call.q, call.k, call.v)]
    out, lse = flash_bias_func(
        *batch, call.q_bias[None], call.k_bias[None], None, call.causal, call.scale, window_size=(3, 0), return_lse=True
    )
    found, found_lse = attend(call)
    torch.testing.assert_close(found, out.flatten(0, 1))
    torch.testing.assert_close(found_lse, lse.transpose(0, 1).flatten(1))


@pytest.mark.parametrize("which", [0, 1], ids=["O", "LSE"])
def test_one_result_is_enough(which: int) -> None:
    """A loss of O alone or of LSE alone gives the same as with zeros for the other's upstream gradient."""
    call = packed(causal="top_left").wanting()
    upstreams = [torch.zeros_like(each) for each in upstream_of(call)]
    upstreams[which] = upstream_of(call)[which]
    found = torch.autograd.grad(attend(call)[which], list(call.inputs().values()), upstreams[which])
    expected = dense(call, (upstreams[0], upstreams[1]))
    for name, gradient in zip(call.inputs(), found, strict=True):
        torch.testing.assert_close(gradient, expected[name])


def test_switches_change_nothing() -> None:
    """Without return_lse comes O alone; deterministic, a larger max_seqlen and other strides give the same numbers."""
    call = packed(positional="")
    expected, _ = attend(call)
    arguments = list(call.arguments)
    assert torch.equal(flash_bias_varlen_func(*arguments, deterministic=True), expected)
    arguments[5:7] = 17, np.int64(12)
    arguments[0] = call.q.transpose(0, 2).contiguous().transpose(0, 2)
    torch.testing.assert_close(flash_bias_varlen_func(*arguments), expected)
    with torch.no_grad():
        assert attend(call.wanting())[0].grad_fn is None


class TestTracing:
    """Where PyTorch traces, the call is one registered op."""

    @pytest.mark.parametrize("names", [(), ("q",), ("v", "k_bias"), NAMES], ids=str)
    def test_compiled_whole(self, names: tuple[str, ...]) -> None:
        """torch.compile takes forward and backward in one graph each, and the gradients are right."""
        torch._dynamo.reset()
        function = torch.compile(attend, fullgraph=True, backend="aot_eager")
        call = packed(causal="bottom_right", window=(3, 0)).wanting(names)
        upstream = upstream_of(call)
        results, expected = function(call), dense(call, upstream)
        leaves = {name: tensor for name, tensor in call.inputs().items() if tensor.requires_grad}
        found = torch.autograd.grad(results, list(leaves.values()), upstream) if leaves else ()
        for name, value in zip(("out", "lse", *leaves), (*results, *found), strict=True):
            torch.testing.assert_close(value, expected[name])

    def test_compiled_for_any_length(self) -> None:
        """With dynamic shapes one graph serves other lengths, other sums of them and other largest lengths."""
        torch._dynamo.reset()
        calls = [
            packed(lengths, positional="k", causal="bottom_right")
            for lengths in (((6, 0, 10, 2, 1, 1), (9, 5, 0, 3, 1, 4)), ((8, 3, 2), (11, 3, 5)), ((4, 6), (12, 1)))
        ]
        counter = CompileCounterWithBackend("aot_eager")
        function = torch.compile(flash_bias_varlen_func, fullgraph=True, dynamic=True, backend=counter)
        counts = []
        for call in calls:
            leaf = call.wanting(("q", "k_bias"))
            found, expected = (each(*leaf.arguments) for each in (function, flash_bias_varlen_func))
            torch.testing.assert_close(found, expected)
            gradients = [torch.autograd.grad(each.sum(), [leaf.q, leaf.k_bias]) for each in (found, expected)]
            torch.testing.assert_close(*gradients)
            counts.append(counter.frame_count)
        assert counts[0] > 0
        assert len(set(counts)) == 1

    def test_ops_are_registered_right(self) -> None:
        """PyTorch's own checks of schema, fakes and autograd pass for both ops."""
        call = packed(causal="bottom_right").wanting()
        bounds = (call.bounds("q"), call.bounds("k"))
        rest = (max(call.lengths_q), max(call.lengths_k), True, None, 0, 0.3)
        tensors = tuple(call.inputs().values())
        torch.library.opcheck(ops.varlen_forward, (*tensors, *bounds, *rest, [True] * 5))
        out, lse = ops.varlen_forward(*tensors, *bounds, *rest, [True] * 5)
        plain = tuple(tensor.detach() for tensor in tensors)
        for grads in ([True] * 5, [False, True, False, True, False]):
            arguments = (torch.ones_like(out), *plain, *bounds, out.detach(), lse.detach(), *rest, grads, None)
            torch.library.opcheck(ops.varlen_backward, arguments)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
    def test_fake_results_are_like_real_ones(self, dtype: torch.dtype) -> None:
        """A fake tensor's results have the shapes, strides and dtypes of real ones."""
        call = packed(dtype=dtype)
        real = attend(call)
        with FakeTensorMode() as mode:
            fake = replace(call, **{name: mode.from_tensor(tensor) for name, tensor in call.inputs().items()})
            found = attend(fake)
        for one, other in zip(found, real, strict=True):
            assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)

    @pytest.mark.parametrize("traced", [False, True])
    def test_double_backward_is_refused_by_name(self, traced: bool) -> None:
        """The gradient itself is available with create_graph=True; its derivative is refused with a way round."""
        call = packed().wanting()
        arguments = (*call.inputs().values(), call.bounds("q"), call.bounds("k"))
        rest = (max(call.lengths_q), max(call.lengths_k), False, None, None, 0.3)
        out, _ = ops.varlen_forward(*arguments, *rest, [True] * 5) if traced else attend(call)
        (gradient,) = torch.autograd.grad(out.sum(), call.q, create_graph=True)
        with pytest.raises(UnsupportedError, match=r"double backward of flash_bias_varlen_func.*scaled_dot_product"):
            gradient.sum().backward()

    def test_func_transforms_are_refused_by_name(self) -> None:
        """torch.func sees no kernel, and says so."""
        call = packed()
        with pytest.raises(UnsupportedError, match=r"torch\.func"):
            torch.func.grad(lambda q: attend(replace(call, q=q))[0].sum())(call.q)


def arguments(**changes: Any) -> dict[str, Any]:
    """Returns named arguments of a valid call of three sequences, some exchanged."""
    call: Packed = packed(((5, 0, 7), (9, 4, 2)), dtype=torch.float32, positional="k")
    given: dict[str, Any] = {
        **call.inputs(),
        "cu_seqlens_q": call.bounds("q"),
        "cu_seqlens_k": call.bounds("k"),
        "max_seqlen_q": 7,
        "max_seqlen_k": 9,
    }
    return given | changes


zeros = torch.zeros
ints = torch.tensor
WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "not a tensor": ({"q": [1.0]}, ["q", "a tensor (Tq, H, D)", "list"]),
    "four dims": ({"q": zeros(1, 12, 4, 8)}, ["q", "3 dims (Tq, H, D)", "(1, 12, 4, 8)", "flash_bias_func"]),
    "integer q": ({"q": zeros(12, 4, 8).int()}, ["q", "float16, bfloat16 or float32", "int32"]),
    "mixed dtypes": ({"k": zeros(15, 2, 8).half()}, ["k", "float32 as q", "float16", "k.to(q.dtype)"]),
    "device": ({"v": zeros(15, 2, 5, device="meta")}, ["v", "cpu as q", "meta"]),
    "heads of k": ({"k": zeros(15, 3, 8)}, ["k", "4 heads (dim 1) as in q, or a divisor", "3 in shape (15, 3, 8)"]),
    "heads of v": ({"v": zeros(15, 4, 5)}, ["v", "heads (dim 1) 2 as in k", "4 in shape"]),
    "head dim of k": ({"k": zeros(15, 2, 7)}, ["k", "head dim (dim 2) 8 as in q", "7 in shape"]),
    "no head dim": ({"v": zeros(15, 2, 0)}, ["v", "from 1 to 256", "(15, 2, 0)"]),
    "tokens of v": ({"v": zeros(14, 2, 5)}, ["v", "tokens (dim 0) 15 as in k", "14 in shape"]),
    "lengths as a list": ({"cu_seqlens_q": [0, 5, 12]}, ["cu_seqlens_q", "an int32 tensor (B + 1,)", "list"]),
    "lengths in int64": ({"cu_seqlens_k": ints([0, 9, 13, 15])}, ["cu_seqlens_k", "int32", "int64", ".int()"]),
    "lengths of two dims": ({"cu_seqlens_q": zeros(1, 4).int()}, ["cu_seqlens_q", "one dim, (B + 1,)", "(1, 4)"]),
    "lengths elsewhere": ({"cu_seqlens_q": zeros(4, device="meta").int()}, ["cu_seqlens_q", "cpu as q", "meta"]),
    "no bounds": ({"cu_seqlens_q": zeros(0).int()}, ["cu_seqlens_q", "one dim", "(0,)"]),
    "another number of sequences": (
        {"cu_seqlens_k": ints([0, 9, 15]).int()},
        ["cu_seqlens_k", "4 as in cu_seqlens_q", "3 in shape"],
    ),
    "bounds from one": ({"cu_seqlens_q": ints([1, 5, 5, 12]).int()}, ["cu_seqlens_q", "start at 0", "1 … 12"]),
    "bounds to less": ({"cu_seqlens_q": ints([0, 5, 5, 11]).int()}, ["cu_seqlens_q", "end at 12", "0 … 11"]),
    "bounds to more": ({"cu_seqlens_k": ints([0, 9, 13, 16]).int()}, ["cu_seqlens_k", "end at 15", "0 … 16"]),
    "bounds that fall": ({"cu_seqlens_q": ints([0, 7, 5, 12]).int()}, ["cu_seqlens_q", "never fall", "7, 5 at 1"]),
    "largest length as a tensor": ({"max_seqlen_q": ints(7)}, ["max_seqlen_q", "a Python int", "Tensor", "wait"]),
    "largest length as a bool": ({"max_seqlen_k": True}, ["max_seqlen_k", "a Python int", "True (bool)"]),
    "negative largest length": ({"max_seqlen_k": -1}, ["max_seqlen_k", "a Python int", "-1"]),
    "largest length too small to hold all": ({"max_seqlen_q": 3}, ["max_seqlen_q", "at least 12 tokens over 3", "3"]),
    "largest length below the longest": ({"max_seqlen_q": 6}, ["max_seqlen_q", "at least 7", "6"]),
    "q_bias alone": ({"k_bias": None}, ["both or none", "q_bias without k_bias"]),
    "k_bias alone": ({"q_bias": None}, ["both or none", "k_bias without q_bias"]),
    "rows of q_bias": ({"q_bias": zeros(9, 4, 3)}, ["q_bias", "12 rows (dim 0)", "max_seqlen_q = 7", "9 in shape"]),
    "dims of q_bias": ({"q_bias": zeros(1, 12, 4, 3)}, ["q_bias", "3 dims", "(1, 12, 4, 3)"]),
    "heads of k_bias": ({"k_bias": zeros(9, 3, 3)}, ["k_bias", "1 or 2 or 4 heads (dim 1)", "3 in shape"]),
    "heads of q_bias": ({"q_bias": zeros(12, 2, 3)}, ["q_bias", "1 or 4 heads (dim 1)", "2 in shape"]),
    "rank of k_bias": ({"k_bias": zeros(9, 2, 2)}, ["k_bias", "rank (dim 2) 3 as in q_bias", "2 in shape"]),
    "no rank": ({"q_bias": zeros(12, 4, 0), "k_bias": zeros(9, 2, 0)}, ["q_bias", "at least 1", "None"]),
    "factors of two dtypes": ({"k_bias": zeros(9, 2, 3).double()}, ["k_bias", "float32 as q_bias", "float64"]),
    "narrower factor": ({"q_bias": zeros(12, 4, 3).half()}, ["q_bias", "float32", "float16"]),
    "rows of tokens or of positions": (
        {"max_seqlen_q": 12},
        ["q_bias", "max_seqlen_q below the 12 tokens", "max_seqlen_q = 12 for 3", "longest"],
    ),
    "causal of unequal lengths": ({"causal": True}, ["causal", '"top_left" or "bottom_right"', "True", "cache"]),
    "causal misspelt": ({"causal": "top-left"}, ["causal", '"top_left"', "'top-left' (str)"]),
    "causal by number": ({"causal": 1}, ["causal", "True, False", "1 (int)"]),
    "window by one number": ({"window_size": 4}, ["window_size", "(left, right)", "4 (int)"]),
    "scale": ({"softmax_scale": math.nan}, ["softmax_scale", "finite", "nan"]),
    "precision by a wrong name": ({"precision": "tf33"}, ["precision", "ieee, tf32x3, tf32", "'tf33'"]),
}
UNSUPPORTED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "dropout": ({"dropout_p": 0.1}, ["dropout_p", "0.1"]),
    "wide heads": ({"v": zeros(15, 2, 257)}, ["v", "at most 256", "257"]),
    "wide ranks": ({"q_bias": zeros(12, 4, 257), "k_bias": zeros(9, 2, 257)}, ["q_bias", "at most 256", "257"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_say_what_to_do(name: str) -> None:
    """Each mistake is an ArgumentError that names the argument, what was expected, what came and often the cure."""
    changes, words = WRONG[name]
    with pytest.raises(ArgumentError) as caught:
        flash_bias_varlen_func(**arguments(**changes))
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_cannot_be_computed_is_refused_by_name(name: str) -> None:
    """A sensible call beyond this version is an UnsupportedError."""
    changes, words = UNSUPPORTED[name]
    with pytest.raises(UnsupportedError) as caught:
        flash_bias_varlen_func(**arguments(**changes))
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_mask_is_no_parameter() -> None:
    """Padding is left out of the sequences instead."""
    with pytest.raises(TypeError, match="mask"):
        flash_bias_varlen_func(**arguments(), mask=zeros(1).bool())  # type: ignore[call-overload]


def test_causal_true_is_plain_where_lengths_are_the_same() -> None:
    """One tensor of bounds, or the same total and largest length, make True mean "top_left"."""
    call = packed(SAME, positional="")
    bounds = call.bounds("q")
    expected = flash_bias_varlen_func(call.q, call.k, call.v, bounds, bounds.clone(), 9, 9, causal="top_left")
    for other, largest in ((bounds, 11), (bounds.clone(), 9)):
        found = flash_bias_varlen_func(call.q, call.k, call.v, bounds, other, 9, largest, causal=True)
        torch.testing.assert_close(found, expected)
