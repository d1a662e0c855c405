"""The op boundary: autograd in every subset, and the registered ops under every tracer."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from flashbias import flash_bias_func, launcher, ops
from flashbias.band import CAUSAL, EVERYTHING, Band
from flashbias.errors import UnsupportedError
from flashbias.settings import settings
from tests.flashbias.cases import SIX, Call, differentiate, gradient_like, make, naive, upstream_of

# Grouped heads, factors shared differently, an additive mask with dead rows, a causal window: every path at once.
CALL = make(heads=4, kv_heads=2, broadcast=(1, 4, 2, 2), mask="additive dead", causal=True, window=(9, 0))
assert CALL.mask is not None
CALL = replace(CALL, mask=CALL.mask[None, None])  # the operator hands masks on with four dims
SUBSETS = [subset for size in range(1, 7) for subset in itertools.combinations(SIX, size)]
Pair = tuple[Tensor, Tensor]


def leaves(call: Call = CALL, names: tuple[str, ...] = SIX) -> Call:
    """Returns ``call`` with the named inputs as leaves that require grad."""
    return replace(call, **{name: t.clone().requires_grad_() for name, t in call.inputs().items() if name in names})


def wanting(call: Call) -> dict[str, Tensor]:
    """Returns the inputs that require grad."""
    return {name: tensor for name, tensor in call.inputs().items() if tensor.requires_grad}


def flags(call: Call) -> list[bool]:
    """Returns which of the six inputs require grad, as the registered ops are told."""
    return [name in wanting(call) for name in SIX]


def attend(*arguments: Any) -> Pair:
    """Returns O and LSE of the reference's arguments."""
    return ops.attention(*arguments)


def assert_gradients(results: Pair, call: Call, upstream: Pair) -> None:
    """Asserts that backward through O and LSE gives the naive gradients."""
    expected = differentiate(call, *upstream)
    found = torch.autograd.grad(results, list(wanting(call).values()), upstream)
    for (name, leaf), gradient in zip(wanting(call).items(), found, strict=True):
        assert gradient.shape == leaf.shape
        torch.testing.assert_close(gradient, expected[name])


def compiled(function: Callable[..., Pair], **options: Any) -> Callable[..., Pair]:
    """Returns ``function`` traced whole, forward and backward, without a code generator."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


class TestAutograd:
    """Plain calls."""

    @pytest.mark.parametrize("names", SUBSETS, ids="+".join)
    def test_every_subset_of_gradients(self, names: tuple[str, ...]) -> None:
        """Whichever inputs require grad get theirs, in their own shape, and the others get none."""
        call = leaves(names=names)
        assert_gradients(attend(*call.banded), call, upstream_of(call))

    def test_gradcheck(self) -> None:
        """All six gradients agree with finite differences of O and LSE in fp64."""
        call = leaves(make(1, 2, 3, 4, 2, (1, 1, 1, 2), "additive", "bottom_right", kv_heads=1, window=(2, 0)))
        rest = call.banded[6:]
        assert torch.autograd.gradcheck(lambda *tensors: attend(*tensors, *rest), call.banded[:6])

    @pytest.mark.parametrize("which", [0, 1], ids=["O", "LSE"])
    def test_one_result_is_enough(self, which: int) -> None:
        """A loss of O alone or of LSE alone gives the same as with zeros for the other's upstream gradient."""
        call = leaves()
        upstreams = [torch.zeros_like(each) for each in upstream_of(call)]
        upstreams[which] = upstream_of(call)[which]
        expected = differentiate(call, *upstreams)
        found = torch.autograd.grad(attend(*call.banded)[which], list(wanting(call).values()), upstreams[which])
        for name, gradient in zip(wanting(call), found, strict=True):
            torch.testing.assert_close(gradient, expected[name])

    @pytest.mark.parametrize("kind", ["expanded", "transposed", "sliced"])
    def test_any_strides_of_the_upstream_gradient(self, kind: str) -> None:
        """An upstream gradient may be expanded, transposed or a slice."""
        call = leaves()
        dout, dlse = upstream_of(call)
        strange = {
            "expanded": dout[:1, :1].expand(dout.shape),
            "transposed": dout.transpose(1, 3).contiguous().transpose(1, 3),
            "sliced": torch.cat([dout, dout], -1)[..., 1 : 1 + dout.shape[3]],
        }[kind]
        strange_lse = {
            "expanded": dlse[:1, :1].expand(dlse.shape),
            "transposed": dlse.mT.contiguous().mT,
            "sliced": torch.cat([dlse, dlse], -1)[..., 1 : 1 + dlse.shape[2]],
        }[kind]
        assert_gradients(attend(*call.banded), call, (strange, strange_lse))

    def test_nothing_is_recorded_without_need(self) -> None:
        """Under no_grad, and where nothing requires grad, the result has no history."""
        call = leaves()
        with torch.no_grad():
            assert [each.grad_fn for each in attend(*call.banded)] == [None, None]
        assert [each.grad_fn for each in attend(*CALL.banded)] == [None, None]

    def test_backward_from_another_thread(self) -> None:
        """Backward may run in a thread that never saw the forward."""
        call = leaves()
        results, upstreams = attend(*call.banded), upstream_of(call)
        thread = threading.Thread(target=torch.autograd.backward, args=(results, upstreams))
        thread.start()
        thread.join()
        for name, expected in differentiate(call, *upstreams).items():
            torch.testing.assert_close(getattr(call, name).grad, expected)

    def test_changed_input_is_noticed(self) -> None:
        """An input changed in place between forward and backward raises instead of giving wrong gradients."""
        call = leaves()
        changed = call.k.detach().clone()
        out, _ = attend(call.q, changed, *call.banded[2:])
        changed.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()

    @pytest.mark.parametrize("first", ["q", "k_bias", "mask"])
    def test_double_backward_is_refused_by_name(self, first: str) -> None:
        """The gradient itself is available with create_graph=True; its derivative is refused with a way round."""
        call = leaves()
        out, _ = attend(*call.banded)
        (gradient,) = torch.autograd.grad(out.sum(), getattr(call, first), create_graph=True)
        torch.testing.assert_close(gradient, differentiate(call, torch.ones_like(out))[first])
        with pytest.raises(UnsupportedError, match=r"double backward of flash_bias_func.*scaled_dot_product_attention"):
            gradient.sum().backward()


class Recorder(TorchDispatchMode):
    """Notes the names of the ops it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class TestTracing:
    """Calls that something else must see as one op."""

    def test_ops_are_registered_right(self) -> None:
        """Both ops pass PyTorch's own checks: schema, fake implementation, autograd, dynamic shapes."""
        call = leaves()
        tensors, options = call.banded[:6], (*call.band, call.scale)
        torch.library.opcheck(ops.attention_forward, (*tensors, *options, flags(call)))
        tensors = CALL.banded[:6]
        out, lse = ops.attention_forward(*tensors, *options, [True] * 6)
        dout, dlse = gradient_like(out), gradient_like(lse, seed=2)
        for grads, through_lse in (([True] * 6, dlse), ([False, True, False, True, False, False], None)):
            arguments = (dout, *tensors, out, lse, *options, grads, through_lse)
            torch.library.opcheck(ops.attention_backward, arguments)

    @pytest.mark.parametrize("names", [SIX, ("q",), ("k", "v"), ("q_bias", "mask"), ()], ids="+".join)
    def test_compiled_whole(self, names: tuple[str, ...]) -> None:
        """torch.compile takes the call without a graph break, with the right results and gradients."""
        call = leaves(names=names)
        results = compiled(attend)(*call.banded)
        torch.testing.assert_close(results, naive(call))
        if names:
            assert_gradients(results, call, upstream_of(call))

    @pytest.mark.parametrize(
        "how", [{"causal": True}, {"causal": "bottom_right", "window_size": (5, -1)}, {"window_size": (6, 2)}], ids=str
    )
    def test_compiled_for_any_length(self, how: dict[str, Any]) -> None:
        """The dynamic graph of the first public call serves other batch sizes and lengths, whose diagonals move."""
        counter = CompileCounterWithBackend("aot_eager")
        torch._dynamo.reset()
        traced = torch.compile(flash_bias_func, fullgraph=True, backend=counter, dynamic=True)
        counts = []
        for sizes in ((2, 3, 13, 17), (3, 3, 11, 19), (4, 3, 8, 30)):
            call = make(*sizes, mask="bool", causal=how.get("causal", False), window=how.get("window_size", (-1, -1)))
            call = leaves(call)
            results = traced(*call.banded[:6], softmax_scale=call.scale, return_lse=True, **how)
            torch.testing.assert_close(results, naive(call))
            assert_gradients(results, call, upstream_of(call))
            counts.append(counter.frame_count)
        assert counts[0] > 0
        assert len(set(counts)) == 1

    def test_expanded_masks_keep_their_gradient_in_a_graph(self) -> None:
        """What was expanded inside a compiled function gets the sum over its copies, as outside of it."""
        call = leaves(names=("q",))
        row = torch.randn(17, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()

        def attend_expanded(row: Tensor) -> Pair:
            return attend(*call.banded[:5], row.expand(2, 4, 13, 17), *call.banded[6:])

        found = torch.autograd.grad(compiled(attend_expanded)(row), row, upstream_of(call))
        expected = differentiate(replace(call, mask=row.detach()), *upstream_of(call))["mask"]
        torch.testing.assert_close(found[0], expected)

    def test_exported_as_one_op(self) -> None:
        """torch.export keeps the call as flashbias::attention_forward."""

        class Layer(torch.nn.Module):
            def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Pair:
                return attend(q, k, v, None, None, None, CAUSAL, 0.3)

        program = torch.export.export(Layer(), (CALL.q, CALL.k, CALL.v))
        targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert targets[0] == "flashbias.attention_forward.default"
        expected = attend(CALL.q, CALL.k, CALL.v, None, None, None, CAUSAL, 0.3)
        for found, right in zip(program.module()(CALL.q, CALL.k, CALL.v), expected, strict=True):
            assert torch.equal(found, right)

    def test_traced_by_make_fx(self) -> None:
        """A tracer that runs on real tensors records the op, not what the launcher did."""
        rest = (None, None, None, Band(3, 1), 0.3)
        graph = make_fx(lambda q, k, v: attend(q, k, v, *rest)[0])(CALL.q, CALL.k, CALL.v)
        assert "flashbias.attention_forward" in graph.code
        assert torch.equal(graph(CALL.q, CALL.k, CALL.v), attend(CALL.q, CALL.k, CALL.v, *rest)[0])

    def test_dispatch_modes_see_one_op(self) -> None:
        """Under a dispatch mode (flop counters, profilers) forward and backward are one op each."""
        call = leaves()
        with Recorder() as recorder:
            attend(*call.banded)[0].sum().backward()
        seen = [name for name in recorder.names if name.startswith("flashbias")]
        assert seen == ["flashbias.attention_forward.default", "flashbias.attention_backward.default"]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
    def test_fake_results_are_like_real_ones(self, dtype: torch.dtype) -> None:
        """Shape, stride and dtype of O, LSE and gradients are known without running anything."""
        call = replace(CALL, **{name: tensor.to(dtype) for name, tensor in CALL.factors()})
        grads = [True, True, False, True, True, True]

        def shapes(tensors: Any) -> list[Any]:
            out, lse = ops.attention_forward(*tensors, 3, 0, 0.3, grads)
            found = ops.attention_backward(out, *tensors, out, lse, 3, 0, 0.3, grads, lse)
            return [(t.shape, t.stride(), t.dtype) for t in (out, lse, *found)]

        with settings(mode="read"):  # float16 may meet kernels here, and need not tune them
            real = shapes(call.banded[:6])
        with FakeTensorMode() as mode:
            fake = shapes([mode.from_tensor(t) for t in call.banded[:6]])
        assert fake == real

    def test_meta_tensors(self) -> None:
        """On the meta device the call gives meta tensors of the right shape."""
        q, k, v = (tensor.to("meta") for tensor in (CALL.q, CALL.k, CALL.v))
        out, lse = attend(q, k, v, None, None, None, EVERYTHING, 0.3)
        assert out.is_meta
        assert lse.is_meta
        assert out.shape == (2, 13, 4, 5)
        assert lse.shape == (2, 4, 13)

    def test_double_backward_of_the_op_is_refused_by_name(self) -> None:
        """The registered op refuses its second derivative as the plain call does."""
        call = leaves()
        out, _ = ops.attention_forward(*call.banded[:6], *call.band, call.scale, [True] * 6)
        (gradient,) = torch.autograd.grad(out.sum(), call.q, create_graph=True)
        with pytest.raises(UnsupportedError, match="double backward of flash_bias_func"):
            gradient.sum().backward()


def _tangent(q: Tensor, k: Tensor, v: Tensor) -> None:
    with torch.autograd.forward_ad.dual_level():
        flash_bias_func(torch.autograd.forward_ad.make_dual(q, torch.ones_like(q)), k, v)


def _grad(q: Tensor, k: Tensor, v: Tensor) -> None:
    torch.func.grad(lambda each: flash_bias_func(each, k, v).sum())(q)


def _vmap(q: Tensor, k: Tensor, v: Tensor) -> None:
    torch.func.vmap(lambda each: flash_bias_func(each, k, v))(q[None])


@pytest.mark.parametrize("transform", [_tangent, _grad, _vmap])
def test_forward_mode_and_func_transforms_are_refused_by_name(
    transform: Callable[[Tensor, Tensor, Tensor], None],
) -> None:
    """A kernel cannot see tangents or functorch's levels: the call says so instead of dropping them."""
    q, k, v = (torch.randn(1, 5, 2, 8) for _ in range(3))
    with pytest.raises(UnsupportedError, match=r"forward-mode|torch\.func"):
        transform(q, k, v)


def test_a_share_of_a_gradient_too_small_for_fp16_is_not_lost() -> None:
    """4,096 copies of an expanded mask would get 2e-8 each, which fp16 does not have: the first gets all."""
    total = torch.full((1, 1, 1, 3), 1e-4, dtype=torch.float16)
    whole = launcher.expanded(total, torch.Size((1, 1, 4096, 3)))
    assert whole is not None
    assert torch.equal(whole.sum(2, keepdim=True), total)
    shares = launcher.expanded(total.bfloat16(), torch.Size((1, 1, 4096, 3)))
    assert shares is not None
    assert shares.untyped_storage().nbytes() == total.nbytes
    torch.testing.assert_close(shares.float().sum(2, keepdim=True), total.float(), rtol=4e-3, atol=0)


def test_a_leaf_of_copies_gets_the_gradient_of_each() -> None:
    """An expanded tensor that is itself the leaf has a gradient of its full shape, not one of shares."""
    call = make(1, 2, 5, 7)
    mask = torch.randn(7, dtype=torch.float64).expand(1, 1, 5, 7).requires_grad_()
    out = flash_bias_func(call.q, call.k, call.v, mask=mask)
    (found,) = torch.autograd.grad(out.square().sum(), mask)
    own = mask.detach().clone().requires_grad_()
    out = flash_bias_func(call.q, call.k, call.v, mask=own)
    (expected,) = torch.autograd.grad(out.square().sum(), own)
    torch.testing.assert_close(found, expected)


def test_a_very_low_number_in_a_wide_mask_excludes_no_key() -> None:
    """fp64's lowest number has no fp32 counterpart but -inf, which would kill the row: it counts as fp32's lowest."""
    q, k, v = (torch.randn(1, 6, 2, 8) for _ in range(3))
    mask = torch.zeros(6, 6, dtype=torch.float64)
    mask[3] = torch.finfo(torch.float64).min
    out = flash_bias_func(q, k, v, mask=mask)
    torch.testing.assert_close(out[:, 3], v.mean(1))


def test_numbers_that_memory_holds_negated_are_read_with_their_sign() -> None:
    """The imaginary part of a conjugate is a view with its negative bit set, which a kernel would not see."""
    plain = [torch.randn(1, 5, 2, 8).half() for _ in range(3)]
    views = [torch.imag(torch.complex(torch.zeros(1, 5, 2, 8), -tensor.float()).conj()) for tensor in plain]
    assert all(view.is_neg() for view in views)
    with settings(mode="read"):
        expected = flash_bias_func(*plain)
        assert torch.equal(flash_bias_func(*(torch._neg_view(-tensor) for tensor in plain)), expected)
    wide = [tensor.float() for tensor in plain]
    torch.testing.assert_close(flash_bias_func(*views), flash_bias_func(*wide))
