"""fp32 inputs: what ``precision`` means, where it is refused, and that the gate tells one from another."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from autotune.device import describe, interpreting
from autotune.gate.accuracy import yardstick
from autotune.spec import Tensors
from cache_db.models import Problem
from flashbias import ArgumentError, factors, flash_bias_func, launcher, plans, precision
from flashbias.kernels import emulation, primitives, space
from flashbias.kernels.problem import GRADIENTS, Shape, problem
from flashbias.kernels.spec import ATTENTION
from flashbias.precision import PRECISIONS, torchs_own
from flashbias.rounding import product, rounded, tf32
from flashbias.settings import settings
from tests.flashbias import cases
from tests.flashbias.cases import Call, assert_within_gate, make, normal, solve, upstream_of
from tests.flashbias.score_kernel import ulps
from tests.flashbias.test_kernels import run, sized

needs_kernels = pytest.mark.skipif(
    not interpreting(), reason="runs kernels in Triton's interpreter (TRITON_INTERPRET=1)"
)
BASE = Shape(batch=1, nheads=2, seqlen_q=64, seqlen_k=64, headdim=16, rank=8, grads=GRADIENTS, dtype="float32")
MATMUL = torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def torchs_setting() -> Iterator[None]:
    """Gives PyTorch's own setting back."""
    yield
    torch.set_float32_matmul_precision("highest")


class TestSetting:
    """None follows PyTorch's own matrix products, however they were set."""

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            (lambda: None, "ieee"),
            (lambda: torch.set_float32_matmul_precision("high"), "tf32"),
            (lambda: torch.set_float32_matmul_precision("medium"), "tf32"),
            (lambda: setattr(MATMUL, "allow_tf32", True), "tf32"),
            (lambda: setattr(MATMUL, "fp32_precision", "tf32"), "tf32"),
            (lambda: setattr(MATMUL, "fp32_precision", "ieee"), "ieee"),
        ],
        ids=["untouched", "high", "medium", "allow_tf32", "new tf32", "new ieee"],
    )
    def test_it_is_read_without_a_warning(self, change: Any, expected: str) -> None:
        """The old and the new interface, mixed in one process: reading neither raises nor warns."""
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            change()
            assert torchs_own() == expected

    def test_versions_without_the_new_one_are_asked_for_the_old_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """PyTorch before 2.9 knows ``allow_tf32`` alone."""

        class Old:
            allow_tf32 = True

        monkeypatch.setattr(torch.backends.cuda, "matmul", Old())
        assert torchs_own() == "tf32"
        Old.allow_tf32 = False
        assert torchs_own() == "ieee"

    def test_a_call_on_a_gpu_takes_it_and_one_on_a_cpu_does_not(self) -> None:
        """Whoever sets PyTorch to tf32 means GPUs."""
        torch.set_float32_matmul_precision("high")
        with FakeTensorMode():
            q = torch.empty(1, 2, 1, 8, device="cuda")
            assert precision.chosen(None, q) == "tf32"
            assert precision.chosen("ieee", q) == "ieee"
            assert precision.chosen(None, q.half()) == "default"
        assert precision.chosen(None, torch.empty(1, 2, 1, 8)) == "default"

    def test_compiled_code_follows_it(self) -> None:
        """torch.compile reads the setting where it traces, without a graph break, and traces anew when it changes."""
        torch._dynamo.reset()
        traced = torch.compile(lambda x: x + (1 if torchs_own() == "tf32" else 0), backend="eager", fullgraph=True)
        assert traced(torch.zeros(1)) == 0
        torch.set_float32_matmul_precision("high")
        assert traced(torch.zeros(1)) == 1


class TestArgument:
    """What is taken and what is refused."""

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
    def test_other_dtypes_have_none(self, dtype: torch.dtype) -> None:
        """Only fp32 products can be rounded in several ways; the message says what to do."""
        call = make(dtype=dtype, rank=0)
        name = str(dtype).removeprefix("torch.")
        with pytest.raises(
            ArgumentError, match=rf"precision: expected None beside {name}.*got 'tf32'.*cast q, k and v"
        ):
            flash_bias_func(call.q, call.k, call.v, precision="tf32")

    @pytest.mark.parametrize("given", ["TF32", "high", 32, True, torch.float32], ids=str)
    def test_unknown_ones_are_refused(self, given: Any) -> None:
        """The message lists the right ones."""
        call = make(dtype=torch.float32, rank=0)
        with pytest.raises(ArgumentError, match="precision: expected None or one of ieee, tf32x3, tf32, got"):
            flash_bias_func(call.q, call.k, call.v, precision=given)

    @pytest.mark.skipif(interpreting(), reason="the interpreter runs kernels on the CPU")
    @pytest.mark.parametrize("given", PRECISIONS)
    def test_a_cpu_computes_in_fp32_whatever_it_says(self, given: Any) -> None:
        """The same bits as without it."""
        call = make(dtype=torch.float32)
        assert torch.equal(flash_bias_func(*call.arguments, precision=given), flash_bias_func(*call.arguments))

    def test_shapes_have_one_beside_float32_only(self) -> None:
        """A shapes file says float32 and means "ieee", or names another."""
        assert BASE.arithmetic == "ieee"
        assert problem(BASE.model_copy(update={"precision": "tf32"}), describe(-1)).fields["precision"] == "tf32"
        half = Shape(batch=1, nheads=1, seqlen_q=8, seqlen_k=8, headdim=16)
        assert problem(half, describe(-1)).fields["precision"] == "default"
        with pytest.raises(ValueError, match="precision is that of float32 shapes"):
            Shape(**half.model_dump() | {"precision": "tf32"})

    def test_fp32_factors_are_whole(self) -> None:
        """Nothing is split beside fp32 inputs, so ranks reach 256."""
        shape = Shape(**BASE.model_dump() | {"rank": 256, "factor_dtype": "float32"})
        assert (shape.packing.blocks, shape.packing.used) == (1, 256)
        assert problem(shape, describe(-1)).fields["factor_parts"] == 1


class TestRounding:
    """What the ideal kernel multiplies."""

    def test_tf32_keeps_eleven_bits_and_two_parts_twenty_two(self) -> None:
        """Nearest numbers, ties away from zero; infinities stay."""
        given = torch.tensor([1.0, 1 + 2.0**-10, 1 + 2.0**-11, 1 + 2.0**-12, -1 - 2.0**-11, torch.inf, 0.0])
        expected = torch.tensor([1.0, 1 + 2.0**-10, 1 + 2.0**-10, 1.0, -1 - 2.0**-10, torch.inf, 0.0])
        assert torch.equal(tf32(given), expected)
        values = normal(1000).float()
        off = ((rounded(values, "tf32x3") - values) / values).abs().max()
        assert 2.0**-25 < float(off) <= 2.0**-22
        assert 2.0**-13 < float(((tf32(values) - values) / values).abs().max()) <= 2.0**-11

    def test_alibi_is_right_to_four_ulp_in_two_parts_and_lost_in_one(self) -> None:
        """Why the bias's product is never tf32: 50 slopes times 65,536 positions."""
        position, rows = torch.arange(65536.0), slice(65536 - 16, 65536)
        k_bias = torch.stack([position, torch.ones_like(position)], -1)
        worst = dict.fromkeys(PRECISIONS, 0.0)
        for slope in factors.alibi_slopes(50):
            q_bias = torch.stack([slope.expand(16), -slope * position[rows]], -1)
            exact = q_bias.double() @ k_bias.double().T
            for name, rounding in (("ieee", None), ("tf32x3", "tf32x3"), ("tf32", "tf32")):
                worst[name] = max(worst[name], ulps(product(q_bias, k_bias.mT, rounding), exact))  # type: ignore[arg-type]
        assert worst["ieee"] <= 1
        assert worst["tf32x3"] <= 4
        assert worst["tf32"] > 1000


def worst_ratio(found: Problem, inputs: Tensors, outputs: Tensors) -> float:
    """Returns the largest share of its budget that any output uses; more than 1 is wrong."""
    oracle, ideal = ATTENTION.oracle(found, inputs), ATTENTION.ideal(found, inputs)
    floor = ATTENTION.floor_dtype(found)
    sticks = {name: yardstick(name, ATTENTION.rule(name), oracle[name], ideal[name], floor) for name in outputs}
    return max(stick.finding(stick.judge(outputs[name]).tolist()).ratio for name, stick in sticks.items())


@needs_kernels
class TestKernels:
    """In the interpreter, which rounds as ``emulation`` says, judged by the gate's rule."""

    @pytest.mark.parametrize("arithmetic", PRECISIONS)
    @pytest.mark.parametrize(
        "changes",
        [
            {"causal": True, "mask": "bfloat16"},
            {"headdim": 40, "value_dim": 24, "rank": 16, "window": (7, 4), "nheads_kv": 1},
            {"rank": 150, "headdim": 136, "value_dim": 20, "mask": "bool"},
            {"rank": 3, "layout": "strided", "mask": "float32", "mask_dims": "keys", "window": (9, 0)},
            {"rank": 0, "grads": ("k", "v")},
        ],
        ids=str,
    )
    def test_every_kind_of_problem_is_right(self, changes: dict[str, Any], arithmetic: str) -> None:
        """Masks and their gradients, groups, windows, wide ranks and heads, unaligned tensors, dLSE, in every precision."""
        found = problem(Shape(**(BASE.model_dump() | {"precision": arithmetic} | changes)), describe(-1))
        variant = space.DESCRIPTORS if "value_dim" in changes and found.layout == "aligned" else space.POINTERS
        assert worst_ratio(found, *run(found, sized(found, 37, 45, dlse=True), variant)) <= 1

    @pytest.mark.parametrize("arithmetic", PRECISIONS)
    @pytest.mark.parametrize("changes", [{"logit": 200.0}, {"bias": -60.0}, {"positions": True}], ids=str)
    def test_extreme_scores_are_right(self, changes: dict[str, Any], arithmetic: str) -> None:
        """Large logits, a large bias and key positions are inputs that the gate can judge in every precision."""
        found = problem(BASE.model_copy(update={"precision": arithmetic, "causal": True}), describe(-1))
        assert worst_ratio(found, *run(found, sized(found, 40, 44, **changes), space.POINTERS)) <= 1

    @pytest.mark.parametrize("claimed", ["ieee", "tf32x3"])
    def test_a_coarser_precision_than_claimed_is_wrong(self, claimed: str) -> None:
        """A kernel that rounds to tf32 where its problem says more is hundreds of times over the budget."""
        found, coarse = (
            problem(BASE.model_copy(update={"precision": each}), describe(-1)) for each in (claimed, "tf32")
        )
        inputs, outputs = run(coarse, sized(coarse, 37, 45), space.POINTERS)
        assert worst_ratio(found, inputs, outputs) > 100

    def test_a_bias_rounded_to_tf32_is_wrong(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The fault that would lose ALiBi: the gate's cases of a large bias see it."""
        found = problem(BASE.model_copy(update={"precision": "tf32", "grads": ()}), describe(-1))
        case = sized(found, 40, 44, bias=-60.0)
        assert worst_ratio(found, *run(found, case, space.POINTERS)) <= 1

        def coarse(a: Any, b: Any, acc: Any, PRECISION: str) -> Any:
            return primitives.tl.dot(emulation.cut.fn(a), emulation.cut.fn(b), acc, input_precision="ieee")

        monkeypatch.setattr(primitives, "factor_dot", coarse)
        assert worst_ratio(found, *run(found, case, space.POINTERS)) > 1

    @pytest.mark.parametrize("arithmetic", PRECISIONS)
    def test_alibi_keeps_its_bits_in_scores(self, arithmetic: str) -> None:
        """LSE of a causal ALiBi row at positions that tf32 cannot hold is that of fp32."""
        found = problem(BASE.model_copy(update={"precision": arithmetic, "grads": ()}), describe(-1))
        case = sized(found, 40, 40)
        inputs = ATTENTION.inputs(found, case, 1, torch.device("cpu"))
        position = torch.arange(40.0) + 65000
        q_bias, k_bias = torch.zeros_like(inputs["q_bias"]), torch.zeros_like(inputs["k_bias"])
        q_bias[..., 0], q_bias[..., 1] = 0.7, -0.7 * position[:, None]
        k_bias[..., 0], k_bias[..., 1] = position[:, None], 1.0
        inputs, outputs = run(found, case, space.POINTERS, q_bias=q_bias, k_bias=k_bias)
        exact = ATTENTION.oracle(found, inputs)["lse"].value
        assert float((outputs["lse"] - exact).abs().max()) <= 4 * 2.0**-8  # 4 ulp of 0.7 * 65,000

    def test_the_public_call_proves_its_configs_and_is_right(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """O, LSE and six gradients of one call, forward and backward in one precision; fp64 factors are cast."""
        call = make(rows=21, keys=26, heads=4, kv_heads=2, causal="bottom_right", dtype=torch.float32)
        wide = {name: getattr(call, name).double() for name in ("q_bias", "k_bias")}
        call = Call(
            call.q * 0.5, call.k, call.v, **wide, mask=normal(1, 4, 21, 26).float(), causal="bottom_right", scale=0.3
        )
        dout, dlse = upstream_of(call)
        arithmetic: Any = "tf32"
        seen: list[tuple[str, str]] = []
        launch = launcher.arguments.launch_kernel

        def watched(kernel: str, binary: Any, *rest: Any) -> None:
            seen.append((kernel, binary.constants["PRECISION"]))
            launch(kernel, binary, *rest)

        monkeypatch.setattr(launcher.arguments, "launch_kernel", watched)

        def attended(call: Call) -> tuple[Tensor, Tensor]:
            return flash_bias_func(*call.arguments, window_size=call.window, return_lse=True, precision=arithmetic)

        monkeypatch.setattr(cases, "attend", attended)
        with settings(mode="read"):
            found = solve(call, (dout, dlse))
        assert seen == [(kernel, arithmetic) for kernel in space.KERNELS]
        assert found["q_bias"].dtype == torch.float64
        assert_within_gate(call, found, dout, dlse, arithmetic)

    def test_a_compiled_graph_carries_it_to_the_backward(self) -> None:
        """The ops take it as an argument, and the graph's backward finds the forward's plan by it."""
        call = make(rows=9, keys=12, heads=2, dtype=torch.float32)
        leaves = [tensor.clone().requires_grad_() for tensor in (call.q, call.k, call.v)]

        def attend(*inputs: Tensor) -> Tensor:
            return flash_bias_func(*inputs, softmax_scale=0.3, precision="tf32")

        torch._dynamo.reset()
        with settings(mode="read"):
            plans.forget()
            traced = torch.compile(attend, backend="aot_eager", fullgraph=True)(*leaves)
            found = torch.autograd.grad(traced.sum(), leaves)
            assert any("tf32" in key and plan.binaries for key, plan in plans._latest.items())
            expected = torch.autograd.grad(attend(*leaves).sum(), leaves)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
