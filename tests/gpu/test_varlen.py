"""Packed sequences at real sizes on a GPU: default configs judged by the gate's own rule, and the gate's own proof."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from autotune.device import DeviceInfo, describe
from autotune.gate.accuracy import yardstick
from autotune.sandbox import Sandbox
from autotune.spec import Reference, Rule, Tensors
from cache_db.models import Verdict
from flashbias import factors, flash_bias_func, flash_bias_varlen_func, plans, reference
from flashbias.band import Band, band
from flashbias.kernels import sequences, space
from flashbias.kernels.arguments import compile_kernel
from flashbias.kernels.problem import GRADIENTS, Shape, problem
from flashbias.kernels.spec import ATTENTION

CUDA = torch.device("cuda")
NAMES = GRADIENTS[:5]
CROSS = (700, 0, 64, 1, 333), (901, 70, 0, 129, 65)
SELF = (511, 1, 0, 129, 1024), (511, 1, 0, 129, 1024)


@pytest.fixture
def defaults(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs every call with its default configs: what is tested here are the kernels, not the tuner."""

    def make(shape: Shape, seen: Band, device: DeviceInfo, _: Any) -> plans.Plan:
        found = problem(shape, device, seen)
        configs = {kernel: space.default(kernel, found, device) for kernel in ATTENTION.kernels(found)}
        binaries = {kernel: compile_kernel(kernel, each, found, device).load() for kernel, each in configs.items()}
        return plans.Plan(binaries, found.layout == "aligned")

    monkeypatch.setattr(plans, "_make_plan", make)
    plans.forget()
    yield
    plans.forget()


def tensors(
    lengths: tuple[tuple[int, ...], tuple[int, ...]],
    layout: str = "",
    nheads: int = 4,
    headdim: int = 64,
    *,
    nheads_kv: int | None = None,
    factor_heads: tuple[int, int] | None = None,
    rank: int = 8,
    dtype: torch.dtype = torch.bfloat16,
    factor_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Returns leaves that want gradients, well-conditioned as the gate's inputs are; ``layout`` names positional sides."""
    generator = torch.Generator(CUDA).manual_seed(11)

    def normal(*shape: int, size: float = 1.0, kind: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=generator, device=CUDA) * size).to(kind).requires_grad_()

    rows, keys = map(sum, lengths)
    kv, heads, kind = nheads_kv or nheads, factor_heads or (nheads, nheads), factor_dtype or dtype
    return {
        "q": normal(rows, nheads, headdim, size=0.5),
        "k": normal(keys, kv, headdim),
        "v": normal(keys, kv, headdim),
        "q_bias": normal(max(lengths[0]) if "q" in layout else rows, heads[0], rank, size=0.5 * rank**-0.25, kind=kind),
        "k_bias": normal(max(lengths[1]) if "k" in layout else keys, heads[1], rank, size=rank**-0.25, kind=kind),
    }


def packed(lengths: tuple[tuple[int, ...], tuple[int, ...]]) -> dict[str, Any]:
    """Returns the arguments that say where sequences begin and how long they are."""
    bounds = [torch.tensor([0, *each], device=CUDA).cumsum(0).int() for each in lengths]
    longest = [max(each) for each in lengths]
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    return dict(zip(names, (*bounds, *longest), strict=True))


def run(given: dict[str, Tensor], lengths: Any, upstream: tuple[Tensor, Tensor] | None = None, **how: Any) -> Tensors:
    """Returns O, LSE and all gradients by the reference's names; ``upstream`` are the gradients of O and LSE."""
    found = flash_bias_varlen_func(**given, **packed(lengths), return_lse=True, **how)
    gradients = torch.autograd.grad(found, list(given.values()), upstream or [torch.ones_like(each) for each in found])
    return {"out": found[0], "lse": found[1]} | {f"d{name}": each for name, each in zip(given, gradients, strict=True)}


def answers(part: Tensors, seen: Band, dtype: torch.dtype) -> tuple[dict[str, Reference], Tensors]:
    """Returns the fp64 answers of one sequence, and those of the ideal 16-bit kernel."""
    call = (*(part[name] for name in NAMES), None, seen, part["q"].shape[3] ** -0.5)
    dout, dlse = part["dout"], part["dlse"]
    out, lse = reference.forward(*call, compute_dtype=torch.float64)
    right = reference.backward(dout, *call, out, lse, compute_dtype=torch.float64, dlse=dlse)
    sizes = reference.magnitudes(dout, *call, out, lse, compute_dtype=torch.float64, dlse=dlse)
    best, best_lse = reference.forward(*call, compute_dtype=torch.float32, round_to=dtype)
    yards = reference.backward(
        dout, *call, best, best_lse, compute_dtype=torch.float32, round_to=dtype, recentre=True, dlse=dlse
    )
    true = {"out": Reference(out, sizes.out), "lse": Reference(lse)}
    ideal = {"out": best, "lse": best_lse}
    for name, value, size, yard in zip(right._fields, right, sizes[1:], yards, strict=True):
        if value is not None and yard is not None:
            true[name], ideal[name] = Reference(value, size), yard
    return true, ideal


def judge(given: dict[str, Tensor], lengths: Any, **how: Any) -> None:
    """Runs the call forward and backward and holds O, LSE and every gradient to the gate's budget."""
    generator = torch.Generator(CUDA).manual_seed(5)
    rows, nheads = given["q"].shape[:2]
    dout = torch.randn(rows, nheads, given["v"].shape[2], generator=generator, device=CUDA).to(given["q"].dtype)
    dlse = torch.randn(nheads, rows, generator=generator, device=CUDA)
    found = run(given, lengths, (dout, dlse), **how)
    inputs = {name: each.detach()[None] for name, each in (given | {"dout": dout, "dlse": dlse}).items()}
    inputs |= {f"cu_seqlens_{side}": packed(lengths)[f"cu_seqlens_{side}"] for side in "qk"}
    causal = how.get("causal", False)
    true, ideal = [], []
    for part in sequences.split(inputs | {"longest": dout}):
        seen = band(
            True if causal == "top_left" else causal,
            how.get("window_size", (-1, -1)),
            part["q"].shape[1],
            part["k"].shape[1],
        )
        for answer, group in zip(answers(part, seen, dout.dtype), (true, ideal), strict=True):
            group.append(answer)
    right, best = sequences.joined_references(true, inputs), sequences.joined(ideal, inputs)
    for name, value in found.items():
        rule = Rule("log") if name == "lse" else Rule("rows", 2.0 if name == "out" else 3.0)
        stick = yardstick(name, rule, right[name], best[name], dout.dtype)
        finding = stick.finding(stick.judge(value.detach()[None]).tolist())
        assert finding.ratio <= 1, f"{name}: {finding}"


@pytest.mark.usefixtures("defaults")
class TestWithDefaults:
    """The kernels, not tuned."""

    @pytest.mark.parametrize("layout", ["", "q", "k", "qk"])
    @pytest.mark.parametrize("causal", [False, "top_left", "bottom_right"])
    def test_sequences_of_any_lengths(self, layout: str, causal: Any) -> None:
        """Empty ones, single tokens, more queries than keys and fewer, factors of both layouts on each side."""
        judge(tensors(CROSS, layout), CROSS, causal=causal)

    @pytest.mark.parametrize("window", [(100, 0), (0, 0), (700, 37), (-1, 64), (128, -1)])
    def test_windows(self, window: tuple[int, int]) -> None:
        """Windows are aligned in each sequence, with grouped queries and k_bias by group."""
        judge(tensors(CROSS, "k", 6, nheads_kv=2, factor_heads=(1, 2)), CROSS, window_size=window)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("headdim", [20, 32, 128])
    def test_head_dims(self, headdim: int, dtype: torch.dtype) -> None:
        """Narrow, wide and unaligned heads."""
        judge(tensors(SELF, "q", headdim=headdim, dtype=dtype), SELF)

    def test_many_short_sequences(self) -> None:
        """Three hundred sequences of less than a tile, whose factors' gradients are summed."""
        lengths = tuple(1 + (37 * index) % 61 for index in range(300))
        judge(tensors((lengths, lengths), "qk"), (lengths, lengths), causal="top_left")

    def test_one_long_sequence_among_short_ones(self) -> None:
        """Most programs belong to no row and leave."""
        lengths = (5000, *[3] * 100)
        judge(tensors((lengths, lengths), "k", 2), (lengths, lengths), causal="bottom_right")

    def test_exact_factors(self) -> None:
        """ALiBi by position in fp32: one table serves sequences of all lengths."""
        given = tensors(SELF, dtype=torch.bfloat16)
        length = max(SELF[0])
        q_bias, k_bias = factors.alibi(given["q"].shape[1], length, device=CUDA)
        given |= {"q_bias": q_bias[0].detach().requires_grad_(), "k_bias": k_bias[0].detach().requires_grad_()}
        judge(given, SELF, causal="top_left")

    def test_one_sequence_is_the_dense_call(self) -> None:
        """Packed alone, a sequence gives what the dense call gives, within a rounding."""
        lengths = ((1000,), (1000,))
        given = {name: each.detach() for name, each in tensors(lengths).items()}
        found = flash_bias_varlen_func(**given, **packed(lengths), causal=True)
        expected = flash_bias_func(**{name: each[None] for name, each in given.items()}, causal=True)[0]
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)

    def test_gradients_repeat_bitwise(self) -> None:
        """Sums over sequences use no atomics."""
        given = tensors(CROSS, "qk")
        first = run(given, CROSS)
        for _ in range(5):
            assert all(torch.equal(each, first[name]) for name, each in run(given, CROSS).items())

    def test_nothing_waits_for_the_gpu(self) -> None:
        """A warm call, forward and backward, makes no synchronising call."""
        given, where = tensors(CROSS, "qk"), packed(CROSS)
        run(given, CROSS, causal="bottom_right", window_size=(50, 0))
        torch.cuda.set_sync_debug_mode("error")
        try:
            out = flash_bias_varlen_func(**given, **where, causal="bottom_right", window_size=(50, 0))
            out.backward(torch.ones_like(out))
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_a_captured_call_follows_new_lengths(self) -> None:
        """A CUDA graph of forward and backward, replayed on other numbers and other lengths, is a fresh call on them."""
        given, where = tensors(CROSS, "k"), packed(CROSS)
        leaves = list(given.values())

        def step() -> list[Tensor]:
            out = flash_bias_varlen_func(**given, **where, causal="bottom_right")
            return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            for leaf in leaves:
                leaf.mul_(0.5)
        for name, lengths in zip(
            ("cu_seqlens_q", "cu_seqlens_k"), ((1, 0, 97, 700, 300), (129, 65, 70, 901, 0)), strict=True
        ):
            where[name].copy_(torch.tensor([0, *lengths]).cumsum(0).int())
        graph.replay()
        for found, expected in zip(captured, step(), strict=True):
            assert torch.equal(found, expected)

    def test_compiled(self) -> None:
        """torch.compile's own code generator takes the call whole."""
        given, where = tensors(CROSS, "k"), packed(CROSS)
        compiled = torch.compile(flash_bias_varlen_func, fullgraph=True)
        out = compiled(**given, **where, causal="bottom_right")
        expected = flash_bias_varlen_func(**given, **where, causal="bottom_right")
        assert torch.equal(out, expected)
        found, right = (torch.autograd.grad(each.sum(), list(given.values())) for each in (out, expected))
        assert all(torch.equal(*pair) for pair in zip(found, right, strict=True))


@pytest.mark.parametrize("variant", [space.POINTERS, space.DESCRIPTORS])
@pytest.mark.parametrize(
    "changes",
    [
        {"causal": True},
        {"causal": False, "nheads_kv": 4, "window": (200, 0)},
        {"causal": True, "factor_dtype": "float32", "rank": 2},
    ],
    ids=str,
)
def test_the_gate_accepts_right_configs(variant: str, changes: dict[str, Any]) -> None:
    """Every case, the poisoned and guarded buffers and the race screen pass for all kernels of packed sequences."""
    device = describe(0)
    if variant == space.DESCRIPTORS and device.capability < (9, 0):
        pytest.skip("descriptors need compute capability 9.0")
    base = {"batch": 4, "nheads": 8, "seqlen_q": 2048, "seqlen_k": 2048, "headdim": 64, "rank": 8}
    shape = Shape(**(base | {"dtype": "bfloat16", "varlen": True, "grads": NAMES} | changes))  # type: ignore[arg-type]
    found = problem(shape, device)
    config = space.config(variant, 64, 64, 4, 2)
    with Sandbox(found, device) as sandbox:
        for kernel in ATTENTION.kernels(found):
            through = dict.fromkeys(("forward", "backward_dq"), config)
            outcome = sandbox.prove(kernel, config, through if kernel != "forward" else {}, 2, 5)
            assert outcome.verdict is Verdict.SAFE, f"{kernel}: {outcome.reason}"
