"""The public call on packed sequences, against the dense call on each sequence alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from autotune.device import DeviceInfo, interpreting
from flashbias import ArgumentError, UnsupportedError, flash_bias_func, flash_bias_varlen_func, plans
from flashbias.band import Band
from flashbias.kernels import space
from flashbias.kernels.arguments import compile_kernel
from flashbias.kernels.problem import Shape, problem
from flashbias.kernels.spec import ATTENTION
from flashbias.varlen import ops
from flashbias.varlen.sequences import Sequences
from tests.flashbias.cases import NAMES, gradient_like, normal

# No queries, no keys, one key, more queries than keys and fewer.
LENGTHS = (5, 0, 7, 3, 2), (4, 3, 0, 1, 6)
EQUAL = (5, 0, 7, 1), (5, 0, 7, 1)
LAYOUTS = ["", "q", "k", "qk"]
SUBSETS = [subset for size in range(1, 6) for subset in itertools.combinations(NAMES, size)]


@dataclass(frozen=True)
class Ragged:
    """One call on packed sequences."""

    tensors: dict[str, Tensor]
    lengths: tuple[tuple[int, ...], tuple[int, ...]]
    switches: dict[str, Any]

    def bounds(self, side: int) -> Tensor:
        """Returns ``cu_seqlens`` of q (0) or k (1)."""
        return torch.tensor([0, *self.lengths[side]]).cumsum(0).int()

    @property
    def arguments(self) -> dict[str, Any]:
        """All arguments of the call by name."""
        bounds = {"cu_seqlens_q": self.bounds(0), "cu_seqlens_k": self.bounds(1)}
        longest = {"max_seqlen_q": max(self.lengths[0]), "max_seqlen_k": max(self.lengths[1])}
        return self.tensors | bounds | longest | self.switches

    def leaves(self, names: Iterable[str] = NAMES) -> Ragged:
        """Returns the call with the named tensors as leaves that want gradients."""
        wanted = {name: each.clone().requires_grad_() for name, each in self.tensors.items() if name in names}
        return replace(self, tensors=self.tensors | wanted)

    def wanting(self) -> dict[str, Tensor]:
        """Returns the tensors that want gradients."""
        return {name: each for name, each in self.tensors.items() if each.requires_grad}


def made(
    layout: str = "",
    lengths: tuple[tuple[int, ...], tuple[int, ...]] = LENGTHS,
    heads: tuple[int, int, int, int] = (4, 2, 4, 2),
    dtype: torch.dtype = torch.float64,
    factor_dtype: torch.dtype | None = None,
    **switches: Any,
) -> Ragged:
    """Returns a call; ``layout`` names the sides whose factor is positional, ``heads`` are those of q, k, both factors."""
    rows, keys = map(sum, lengths)
    kind = factor_dtype or dtype
    tensors = {
        "q": normal(rows, heads[0], 8, seed=1).to(dtype),
        "k": normal(keys, heads[1], 8, seed=2).to(dtype),
        "v": normal(keys, heads[1], 5, seed=3).to(dtype),
        "q_bias": normal(max(lengths[0]) if "q" in layout else rows, heads[2], 3, seed=4).to(kind),
        "k_bias": normal(max(lengths[1]) if "k" in layout else keys, heads[3], 3, seed=5).to(kind),
    }
    return Ragged(tensors, lengths, switches)


def one_by_one(call: Ragged) -> tuple[Tensor, Tensor]:
    """Returns O and LSE of the dense call on each sequence, in fp64 and differentiable."""
    outs, lses = [], []
    causal = call.switches.get("causal", False)
    switches = call.switches | {"causal": True if causal == "top_left" else causal}
    for index in range(len(call.lengths[0])):
        parts = {}
        for name, tensor in call.tensors.items():
            side = 0 if name.startswith("q") else 1
            first, length = sum(call.lengths[side][:index]), call.lengths[side][index]
            if tensor.shape[0] != sum(call.lengths[side]):
                first = 0  # a row for each position
            parts[name] = tensor[None, first : first + length].double()
        out, lse = flash_bias_func(**parts, **switches, return_lse=True)
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, 1)


def attend(call: Ragged) -> tuple[Tensor, Tensor]:
    """Returns O and LSE of the call."""
    return flash_bias_varlen_func(**call.arguments, return_lse=True)


def assert_right(call: Ragged, tolerance: float = 1e-12, run: Callable[[Ragged], Any] = attend) -> None:
    """Asserts that O, LSE and the wanted gradients through both are those of the sequences alone."""
    found, expected = run(call), one_by_one(call)
    upstream = [gradient_like(each, seed).double() for seed, each in enumerate(expected)]
    narrow = [given.to(each.dtype) for given, each in zip(upstream, found, strict=True)]
    leaves = list(call.wanting().values())
    gradients = torch.autograd.grad(found, leaves, narrow) if leaves else ()
    truths = torch.autograd.grad(expected, leaves, [each.double() for each in narrow]) if leaves else ()
    for value, right in zip((*found, *gradients), (*expected, *truths), strict=True):
        assert value.shape == right.shape
        torch.testing.assert_close(value.double(), right.double(), rtol=tolerance, atol=tolerance)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert gradient.dtype == leaf.dtype


class TestByEager:
    """On a CPU in fp32 and fp64."""

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("causal", [False, "top_left", "bottom_right"])
    @pytest.mark.parametrize("window", [(-1, -1), (2, 1), (0, -1), (-1, 0)])
    def test_each_sequence_is_as_if_alone(self, layout: str, causal: Any, window: tuple[int, int]) -> None:
        """Bands are aligned in each sequence, factors are read from its rows or from their start."""
        assert_right(made(layout, causal=causal, window_size=window, softmax_scale=0.4).leaves())

    @pytest.mark.parametrize("names", SUBSETS, ids="+".join)
    def test_every_subset_of_gradients(self, names: tuple[str, ...]) -> None:
        """Whichever inputs want gradients get theirs, and no others."""
        assert_right(made("k", causal="bottom_right").leaves(names))

    @pytest.mark.parametrize("heads", [(4, 2, 1, 1), (6, 3, 6, 6), (3, 1, 3, 3), (2, 2, 1, 2)], ids=str)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_heads_are_shared_as_in_dense_calls(self, heads: tuple[int, int, int, int], layout: str) -> None:
        """Grouped queries, and factors of one head, of each key head or of each query head."""
        assert_right(made(layout, heads=heads).leaves())

    @pytest.mark.parametrize("dtypes", [(torch.float32, None), (torch.float32, torch.float64)], ids=str)
    def test_other_dtypes(self, dtypes: tuple[torch.dtype, torch.dtype | None]) -> None:
        """fp32 inputs, and factors wider than them, keep their own dtype's gradients."""
        assert_right(made("q", dtype=dtypes[0], factor_dtype=dtypes[1]).leaves(), tolerance=1e-4)

    def test_causal_true_is_top_left_where_lengths_are_the_same(self) -> None:
        """One tensor for both sides, or equal totals and largest lengths, need no choice."""
        call = made("qk", EQUAL, causal=True).leaves()
        assert_right(call)
        both = call.bounds(0)
        shared = call.arguments | {"cu_seqlens_q": both, "cu_seqlens_k": both, "max_seqlen_k": 12}
        shared |= {"k_bias": None, "q_bias": None}
        plain = call.arguments | {"k_bias": None, "q_bias": None}
        assert torch.equal(flash_bias_varlen_func(**shared), flash_bias_varlen_func(**plain))

    def test_one_sequence_that_has_all_tokens_is_never_ambiguous(self) -> None:
        """A row for each token and a row for each position are the same there."""
        assert_right(made(lengths=((9,), (11,)), causal="bottom_right").leaves())

    @pytest.mark.parametrize("lengths", [((0, 0), (4, 1)), ((3, 2), (0, 0)), ((), ())], ids=str)
    def test_without_queries_keys_or_sequences(self, lengths: Any) -> None:
        """O is 0 and LSE -inf where there is no key, and every gradient is zero and has its input's shape."""
        call = made(lengths=lengths) if lengths[0] else made(lengths=((0,), (0,)))
        tensors = {name: each for name, each in call.leaves().tensors.items() if "bias" not in name}
        bounds = {"cu_seqlens_q": call.bounds(0), "cu_seqlens_k": call.bounds(1)}
        if not lengths[0]:
            bounds = {name: each[:1] for name, each in bounds.items()}
        out, lse = flash_bias_varlen_func(**tensors, **bounds, max_seqlen_q=4, max_seqlen_k=4, return_lse=True)
        assert out.shape == (tensors["q"].shape[0], 4, 5)
        assert bool((out == 0).all())
        assert bool((lse == -math.inf).all())
        for leaf, gradient in zip(
            tensors.values(), torch.autograd.grad(out.sum(), list(tensors.values())), strict=True
        ):
            assert torch.equal(gradient, torch.zeros_like(leaf))

    @pytest.mark.parametrize("which", [0, 1], ids=["O", "LSE"])
    def test_one_result_is_enough(self, which: int) -> None:
        """A loss of O alone or of LSE alone gives the gradients that it gives each sequence."""
        call = made("k").leaves()
        seen = [each[which] for each in (attend(call), one_by_one(call))]
        alive = seen[1].isfinite()
        found, expected = (
            torch.autograd.grad(each[alive].square().sum(), list(call.wanting().values()), allow_unused=True)
            for each in seen
        )
        for name, value, right in zip(call.wanting(), found, expected, strict=True):
            torch.testing.assert_close(value, torch.zeros_like(call.tensors[name]) if right is None else right)

    def test_gradcheck(self) -> None:
        """All five gradients agree with finite differences."""
        call = made("k", ((2, 1), (3, 2)), (2, 1, 2, 1), causal="bottom_right").leaves()
        rest = {name: each for name, each in call.arguments.items() if name not in NAMES}

        def run(*tensors: Tensor) -> Any:
            return flash_bias_varlen_func(**dict(zip(NAMES, tensors, strict=True)), **rest, return_lse=True)  # type: ignore[arg-type]

        assert torch.autograd.gradcheck(run, tuple(call.tensors[name] for name in NAMES))

    def test_double_backward_is_refused_by_name(self) -> None:
        """The gradient itself is available with create_graph=True; its derivative is refused with a way round."""
        call = made().leaves()
        (gradient,) = torch.autograd.grad(attend(call)[0].sum(), call.tensors["q"], create_graph=True)
        with pytest.raises(UnsupportedError, match=r"double backward of flash_bias_varlen_func.*scaled_dot_product"):
            gradient.sum().backward()


@pytest.mark.skipif(not interpreting(), reason="runs kernels in Triton's interpreter (TRITON_INTERPRET=1)")
class TestThroughKernels:
    """Through the launcher, with the default configs of each kernel."""

    @pytest.fixture(autouse=True)
    def defaults(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Tunes nothing: what is tested is what stands between the call and the kernels."""

        def make(shape: Shape, seen: Band, device: DeviceInfo, _: Any) -> plans.Plan:
            found = problem(shape, device, seen)
            configs = {kernel: space.default(kernel, found, device) for kernel in ATTENTION.kernels(found)}
            binaries = {kernel: compile_kernel(kernel, each, found, device) for kernel, each in configs.items()}
            return plans.Plan(binaries, found.layout == "aligned")

        monkeypatch.setattr(plans, "_make_plan", make)
        plans.forget()
        yield
        plans.forget()

    @pytest.mark.parametrize(
        ("layout", "changes"),
        [
            ("k", {"causal": "bottom_right", "window_size": (3, -1)}),
            ("q", {"factor_dtype": torch.float32, "heads": (2, 1, 1, 2)}),
            ("qk", {"heads": (2, 1, 2, 1)}),
        ],
        ids=str,
    )
    def test_what_the_launcher_gives_is_right(self, layout: str, changes: dict[str, Any]) -> None:
        """Packing, sums over sequences and over heads, dtypes and shapes of all gradients, and LSE's own gradient."""
        assert_right(made(layout, dtype=torch.float16, **changes).leaves(), tolerance=2e-2)

    def test_rows_of_any_strides(self) -> None:
        """Inputs may be slices and expanded: they are read as they lie, or copied."""
        call = made("k", heads=(2, 2, 2, 1), dtype=torch.float16)
        wide = {name: torch.cat([each, each], -1)[..., 1 : 1 + each.shape[-1]] for name, each in call.tensors.items()}
        wide["k"] = call.tensors["k"][:1].expand_as(call.tensors["k"])
        assert_right(replace(call, tensors=wide).leaves(()), tolerance=2e-2)

    def test_a_length_may_be_less_than_the_largest(self) -> None:
        """A larger ``max_seqlen`` than needed changes nothing but speed."""
        call = made(heads=(1, 1, 1, 1), dtype=torch.float16)
        more = call.arguments | {"max_seqlen_q": 70, "max_seqlen_k": 9}
        torch.testing.assert_close(flash_bias_varlen_func(**more), attend(call)[0], rtol=1e-3, atol=1e-3)


class TestTracing:
    """Calls that something else must see as one op."""

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_compiled_whole(self, layout: str) -> None:
        """torch.compile takes the call without a graph break, with the right results and gradients."""
        torch._dynamo.reset()
        traced = torch.compile(flash_bias_varlen_func, fullgraph=True, backend="aot_eager")
        call = made(layout, causal="bottom_right").leaves()
        assert_right(call, run=lambda each: traced(**each.arguments, return_lse=True))

    def test_compiled_for_any_number_of_tokens(self) -> None:
        """The dynamic graph of the first call serves other totals, numbers of sequences and lengths."""
        counter = CompileCounterWithBackend("aot_eager")
        torch._dynamo.reset()
        traced = torch.compile(flash_bias_varlen_func, fullgraph=True, backend=counter, dynamic=True)
        counts = []
        for lengths in (LENGTHS, ((6, 2, 9), (4, 8, 7)), ((3, 3, 2, 8, 4, 2), (5, 2, 3, 7, 9, 2))):
            call = made(lengths=lengths, causal="bottom_right").leaves()
            assert_right(call, run=lambda each: traced(**each.arguments, return_lse=True))
            counts.append(counter.frame_count)
        assert counts[0] > 0
        assert len(set(counts)) == 1

    def test_ops_are_registered_right(self) -> None:
        """Both ops pass PyTorch's own checks: schema, fake implementation, autograd, dynamic shapes."""
        call = made("k").leaves()
        tensors, packed = self._arguments(call)
        torch.library.opcheck(ops.varlen_forward, (*tensors, *packed, 3, 0, 0.3, [True] * 5))
        tensors, _ = self._arguments(made("k"))
        out, lse = ops.varlen_forward(*tensors, *packed, 3, 0, 0.3, [True] * 5)
        for grads, dlse in (([True] * 5, gradient_like(lse)), ([False, True, False, True, False], None)):
            arguments = (gradient_like(out), *tensors, *packed[:2], out, lse, *packed[2:], 3, 0, 0.3, grads, dlse)
            torch.library.opcheck(ops.varlen_backward, arguments)

    def test_fake_results_are_like_real_ones(self) -> None:
        """Shape, stride and dtype of results and gradients are known without running anything."""
        tensors, packed = self._arguments(made("q", dtype=torch.float32))

        def shapes(*given: Any) -> list[Any]:
            rest = (*packed[2:], None, 0, 0.3, [True, False, True, True, True])
            out, lse = ops.varlen_forward(*given, *rest)
            found = ops.varlen_backward(out, *given, out, lse, *rest, lse)
            return [(each.shape, each.stride(), each.dtype) for each in (out, lse, *found)]

        real = shapes(*tensors, *packed[:2])
        with FakeTensorMode() as mode:
            assert shapes(*[mode.from_tensor(each) for each in (*tensors, *packed[:2])]) == real

    @staticmethod
    def _arguments(call: Ragged) -> tuple[list[Tensor], Sequences]:
        lengths = map(max, call.lengths)
        packed = Sequences(call.bounds(0), call.bounds(1), *lengths, shifted=True)
        return [call.tensors[name] for name in NAMES], packed


BAD_BOUNDS = {
    "not from 0": [1, 5, 12, 15, 17],
    "not to the end": [0, 5, 12, 15, 16],
    "falling": [0, 12, 5, 15, 17],
}


class TestWrongArguments:
    """Each says what was expected and what came."""

    @pytest.mark.parametrize("values", BAD_BOUNDS.values(), ids=BAD_BOUNDS)
    def test_values_of_cu_seqlens(self, values: list[int]) -> None:
        """On a CPU the bounds themselves are checked."""
        call = made(lengths=((5, 7, 3, 2), (5, 7, 3, 2)))
        wrong = call.arguments | {"cu_seqlens_k": torch.tensor(values, dtype=torch.int32)}
        with pytest.raises(ArgumentError, match="cu_seqlens_k: expected numbers that start at 0"):
            flash_bias_varlen_func(**wrong)

    def test_a_sequence_longer_than_the_largest(self) -> None:
        """A ``max_seqlen`` that one sequence exceeds is refused where that can be seen."""
        with pytest.raises(ArgumentError, match="max_seqlen_q: expected at least 7"):
            flash_bias_varlen_func(**(made().arguments | {"max_seqlen_q": 6}))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"q": torch.zeros(1, 17, 4, 8)}, r"q: expected 3 dims \(Tq, H, D\)"),
            ({"q": 3}, "q: expected a tensor"),
            ({"k": normal(14, 3, 8)}, "k: expected 4 heads"),
            ({"k": normal(14, 2, 9)}, "k: expected head dim"),
            ({"k": normal(14, 2, 8).float()}, "k: expected float64 as q"),
            ({"v": normal(13, 2, 5)}, "v: expected tokens"),
            ({"v": normal(14, 2, 0)}, "v: expected a head dim"),
            ({"cu_seqlens_q": [0, 17]}, "cu_seqlens_q: expected an int32 tensor"),
            ({"cu_seqlens_q": torch.tensor([0, 5, 5, 12, 15, 17])}, "cu_seqlens_q: expected dtype int32"),
            ({"cu_seqlens_q": torch.zeros(2, 3, dtype=torch.int32)}, "cu_seqlens_q: expected one dim"),
            ({"cu_seqlens_k": torch.tensor([0, 14], dtype=torch.int32)}, "cu_seqlens_k: expected number of sequences"),
            ({"max_seqlen_q": 2}, "max_seqlen_q: expected at least 17 tokens over 5 sequences"),
            ({"max_seqlen_q": torch.tensor(7)}, "max_seqlen_q: expected a length, a Python int"),
            ({"max_seqlen_k": True}, "max_seqlen_k: expected a length"),
            ({"max_seqlen_k": -1}, "max_seqlen_k: expected a length"),
            ({"k_bias": None}, "q_bias and k_bias: expected both or none"),
            ({"q_bias": normal(16, 4, 3)}, "q_bias: expected 17 rows .* or max_seqlen_q = 7"),
            ({"q_bias": normal(17, 3, 3)}, "q_bias: expected 1 or 4 heads"),
            ({"q_bias": normal(17, 4, 3).half()}, "q_bias: expected float64 as q"),
            ({"q_bias": normal(17, 4, 3).float()}, "k_bias: expected float32 as q_bias"),
            ({"k_bias": normal(14, 2, 4)}, "k_bias: expected rank"),
            ({"max_seqlen_q": 17}, "q_bias: expected max_seqlen_q below the 17 tokens"),
            ({"causal": True}, 'causal: expected "top_left" or "bottom_right" where q and k differ'),
            ({"causal": "bottom"}, "causal: expected True, False"),
            ({"window_size": 3}, "window_size: expected"),
            ({"softmax_scale": math.nan}, "softmax_scale: expected a finite number"),
            ({"return_lse": 1}, "return_lse: expected True or False"),
        ],
        ids=str,
    )
    def test_each_is_an_error_that_says_so(self, change: dict[str, Any], message: str) -> None:
        """Shapes, dtypes, layouts that cannot be told apart, and switches."""
        with pytest.raises(ArgumentError, match=message):
            flash_bias_varlen_func(**(made().arguments | change))

    def test_what_is_not_supported_is_named(self) -> None:
        """Dropout, head dims and ranks beyond the largest."""
        changes: list[tuple[dict[str, Any], str]] = [
            ({"dropout_p": 0.1}, "dropout_p: expected 0"),
            ({"v": normal(14, 2, 257)}, "v: expected a head dim .* of at most 256"),
            ({"q_bias": normal(17, 1, 257), "k_bias": normal(14, 1, 257)}, "a rank of at most 256"),
        ]
        for change, message in changes:
            with pytest.raises(UnsupportedError, match=message):
                flash_bias_varlen_func(**(made().arguments | change))
