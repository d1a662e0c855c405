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

from flashbias import flash_bias_func, ops
from flashbias.errors import UnsupportedError
from flashbias.settings import settings
from tests.flashbias.cases import NAMES, Call, differentiate, gradient_like, make, naive

# Factors shared differently, a mask with dead rows, causal: every path of the backward at once.
CALL = make(broadcast=(1, 3, 2, 1), mask="dead", causal=True)
SUBSETS = [subset for size in range(1, 6) for subset in itertools.combinations(NAMES, size)]


def leaves(call: Call = CALL, names: tuple[str, ...] = NAMES) -> Call:
    """Returns ``call`` with the named inputs as leaves that require grad."""
    return replace(call, **{name: t.clone().requires_grad_() for name, t in call.factors() if name in names})


def wanting(call: Call) -> dict[str, Tensor]:
    """Returns the inputs that require grad."""
    return {name: tensor for name, tensor in call.factors() if tensor.requires_grad}


def upstream(call: Call) -> Tensor:
    """Returns a random upstream gradient of the call's result."""
    return gradient_like(naive(call)[0].detach())


def attend(*arguments: Any) -> Tensor:
    """Returns the attention of the reference's arguments."""
    return ops.attention(*arguments)


def assert_gradients(out: Tensor, call: Call, dout: Tensor) -> None:
    """Asserts that backward through ``out`` gives the naive gradients."""
    expected = differentiate(call, dout)
    found = torch.autograd.grad(out, list(wanting(call).values()), dout)
    for (name, leaf), gradient in zip(wanting(call).items(), found, strict=True):
        assert gradient.shape == leaf.shape
        torch.testing.assert_close(gradient, expected[name])


def compiled(function: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    """Returns ``function`` traced whole, forward and backward, without a code generator."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


class TestAutograd:
    """Plain calls."""

    @pytest.mark.parametrize("names", SUBSETS, ids="+".join)
    def test_every_subset_of_gradients(self, names: tuple[str, ...]) -> None:
        """Whichever inputs require grad get theirs, in their own shape, and the others get none."""
        call = leaves(names=names)
        assert_gradients(attend(*call.arguments), call, upstream(call))

    def test_gradcheck(self) -> None:
        """All five gradients agree with finite differences in fp64."""
        call = leaves(make(1, 2, 4, 5, 2, (1, 1, 1, 2), "dead", True))
        rest = call.arguments[5:]
        assert torch.autograd.gradcheck(lambda *tensors: attend(*tensors, *rest), call.arguments[:5])

    @pytest.mark.parametrize("kind", ["expanded", "transposed", "sliced"])
    def test_any_strides_of_the_upstream_gradient(self, kind: str) -> None:
        """An upstream gradient may be expanded, transposed or a slice."""
        call = leaves()
        dout = upstream(call)
        strange = {
            "expanded": dout[:1, :1].expand(dout.shape),
            "transposed": dout.transpose(1, 3).contiguous().transpose(1, 3),
            "sliced": torch.cat([dout, dout], -1)[..., 1 : 1 + dout.shape[3]],
        }[kind]
        assert_gradients(attend(*call.arguments), call, strange)

    def test_nothing_is_recorded_without_need(self) -> None:
        """Under no_grad, and where nothing requires grad, the result has no history."""
        call = leaves()
        with torch.no_grad():
            assert attend(*call.arguments).grad_fn is None
        assert attend(*CALL.arguments).grad_fn is None

    def test_backward_from_another_thread(self) -> None:
        """Backward may run in a thread that never saw the forward."""
        call = leaves()
        out = attend(*call.arguments)
        dout = gradient_like(out)
        thread = threading.Thread(target=out.backward, args=(dout,))
        thread.start()
        thread.join()
        for name, expected in differentiate(call, dout).items():
            torch.testing.assert_close(getattr(call, name).grad, expected)

    def test_changed_input_is_noticed(self) -> None:
        """An input changed in place between forward and backward raises instead of giving wrong gradients."""
        call = leaves()
        changed = call.k.detach().clone()
        out = attend(call.q, changed, *call.arguments[2:])
        changed.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()

    @pytest.mark.parametrize("first", ["q", "k_bias"])
    def test_double_backward_is_refused_by_name(self, first: str) -> None:
        """The gradient itself is available with create_graph=True; its derivative is refused with a way round."""
        call = leaves()
        out = attend(*call.arguments)
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
        forward = (*call.arguments, [True] * 5)
        torch.library.opcheck(ops.attention_forward, forward)
        out, lse = ops.attention_forward(*CALL.arguments, [True] * 5)
        tensors, options = CALL.arguments[:6], CALL.arguments[6:]
        for grads in ([True] * 5, [False, True, False, True, False]):
            torch.library.opcheck(ops.attention_backward, (gradient_like(out), *tensors, out, lse, *options, grads))

    @pytest.mark.parametrize("names", [NAMES, ("q",), ("k", "v"), ("q_bias", "k_bias"), ()], ids="+".join)
    def test_compiled_whole(self, names: tuple[str, ...]) -> None:
        """torch.compile takes the call without a graph break, with the right result and gradients."""
        call = leaves(names=names)
        out = compiled(attend)(*call.arguments)
        torch.testing.assert_close(out, naive(call)[0])
        if names:
            assert_gradients(out, call, upstream(call))

    def test_compiled_for_any_length(self) -> None:
        """The dynamic graph of the first call serves other batch sizes and lengths."""
        counter = CompileCounterWithBackend("aot_eager")
        torch._dynamo.reset()
        traced = torch.compile(attend, fullgraph=True, backend=counter, dynamic=True)
        counts = []
        for sizes in ((2, 3, 13, 17), (3, 3, 21, 9), (4, 3, 8, 30)):
            call = leaves(make(*sizes, mask="bool", causal=True))
            out = traced(*call.arguments)
            torch.testing.assert_close(out, naive(call)[0])
            assert_gradients(out, call, gradient_like(out))
            counts.append(counter.frame_count)
        assert counts[0] > 0
        assert len(set(counts)) == 1

    def test_exported_as_one_op(self) -> None:
        """torch.export keeps the call as flashbias::attention_forward."""

        class Layer(torch.nn.Module):
            def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return attend(q, k, v, None, None, None, True, 0.3)

        program = torch.export.export(Layer(), (CALL.q, CALL.k, CALL.v))
        targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert targets[0] == "flashbias.attention_forward.default"
        expected = attend(CALL.q, CALL.k, CALL.v, None, None, None, True, 0.3)
        assert torch.equal(program.module()(CALL.q, CALL.k, CALL.v), expected)

    def test_traced_by_make_fx(self) -> None:
        """A tracer that runs on real tensors records the op, not what the launcher did."""
        graph = make_fx(lambda q, k, v: attend(q, k, v, None, None, None, False, 0.3))(CALL.q, CALL.k, CALL.v)
        assert "flashbias.attention_forward" in graph.code
        assert torch.equal(graph(CALL.q, CALL.k, CALL.v), attend(CALL.q, CALL.k, CALL.v, None, None, None, False, 0.3))

    def test_dispatch_modes_see_one_op(self) -> None:
        """Under a dispatch mode (flop counters, profilers) forward and backward are one op each."""
        call = leaves()
        with Recorder() as recorder:
            attend(*call.arguments).sum().backward()
        seen = [name for name in recorder.names if name.startswith("flashbias")]
        assert seen == ["flashbias.attention_forward.default", "flashbias.attention_backward.default"]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
    def test_fake_results_are_like_real_ones(self, dtype: torch.dtype) -> None:
        """Shape, stride and dtype of O, LSE and gradients are known without running anything."""
        call = replace(CALL, **{name: tensor.to(dtype) for name, tensor in CALL.factors()})
        grads = [True, True, False, True, True]

        def shapes(tensors: Any, mask: Tensor) -> list[Any]:
            out, lse = ops.attention_forward(*tensors, mask, True, 0.3, grads)
            found = ops.attention_backward(out, *tensors, mask, out, lse, True, 0.3, grads)
            return [(t.shape, t.stride(), t.dtype) for t in (out, lse, *found)]

        with settings(mode="read"):  # float16 may meet kernels here, and need not tune them
            real = shapes(call.arguments[:5], call.mask)
        with FakeTensorMode() as mode:
            fake = shapes([mode.from_tensor(t) for t in call.arguments[:5]], mode.from_tensor(call.mask))
        assert fake == real

    def test_meta_tensors(self) -> None:
        """On the meta device the call gives a meta tensor of the right shape."""
        q, k, v = (tensor.to("meta") for tensor in (CALL.q, CALL.k, CALL.v))
        out = attend(q, k, v, None, None, None, False, 0.3)
        assert out.is_meta
        assert out.shape == (2, 13, 3, 5)

    def test_double_backward_of_the_op_is_refused_by_name(self) -> None:
        """The registered op refuses its second derivative as the plain call does."""
        call = leaves()
        out, _ = ops.attention_forward(*call.arguments, [True] * 5)
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
