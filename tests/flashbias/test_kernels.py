"""The kernels, run by Triton's interpreter and judged by the gate's own rule: every output, kind of input and variant."""

from __future__ import annotations

import functools
from dataclasses import replace
from itertools import chain, combinations
from typing import Any

import pytest
import torch

from autotune.device import describe, interpreting
from autotune.gate.accuracy import yardstick
from autotune.spec import Case, Tensors
from cache_db.models import Problem
from flashbias.band import Band
from flashbias.kernels import cases, factors, space
from flashbias.kernels.factors import Packing
from flashbias.kernels.problem import GRADIENTS, Shape, problem
from flashbias.kernels.spec import ATTENTION

pytestmark = pytest.mark.skipif(not interpreting(), reason="runs kernels in Triton's interpreter (TRITON_INTERPRET=1)")
CPU = torch.device("cpu")
BASE = Shape(batch=1, nheads=2, seqlen_q=64, seqlen_k=64, headdim=16, rank=8, grads=GRADIENTS)
TILES = {space.POINTERS: (16, 32), space.DESCRIPTORS: (32, 16)}


def unwritten(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Returns memory nobody has written: NaN, or -1 where that does not exist."""
    return torch.full(shape, torch.nan if dtype.is_floating_point else -1, dtype=dtype)


def run(found: Problem, case: Case, variant: str, **replaced: torch.Tensor) -> tuple[Tensors, Tensors]:
    """Runs all kernels of the problem on NaN-filled buffers; returns (inputs, outputs)."""
    inputs = ATTENTION.inputs(found, case, 1, CPU) | replaced
    outputs: Tensors = {}
    for kernel in ATTENTION.kernels(found):
        config = space.config(variant, *TILES[variant], 4, 1)
        made, scratch = (
            {name: unwritten(spec.shape, spec.dtype) for name, spec in buffers.items()}
            for buffers in (
                ATTENTION.outputs(kernel, found, case),
                ATTENTION.scratch(kernel, found, config, case),
            )
        )
        binary = ATTENTION.compile(kernel, config, found, describe(-1))
        ATTENTION.launch(kernel, binary, found, {**inputs, **outputs}, made, scratch)
        outputs |= made
    return inputs, outputs


def judge(found: Problem, inputs: Tensors, outputs: Tensors) -> None:
    """Asserts that every output is within the gate's budget."""
    oracle, ideal = ATTENTION.oracle(found, inputs), ATTENTION.ideal(found, inputs)
    for name, value in outputs.items():
        stick = yardstick(name, ATTENTION.rule(name), oracle[name], ideal[name], ATTENTION.floor_dtype(found))
        finding = stick.finding(stick.judge(value).tolist())
        assert finding.ratio <= 1, f"{name}: {finding}"


def sized(found: Problem, seqlen_q: int, seqlen_k: int, **changes: Any) -> Case:
    """Returns a case of these lengths, with two heads of k and v."""
    group = int(found.fields["gqa_group"])
    return cases._case("ragged", found, 1, 2 * group, seqlen_q, seqlen_k, **changes)


@pytest.mark.parametrize("variant", TILES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("lengths", [(37, 51), (51, 37), (1, 40), (33, 1), (32, 32)], ids=str)
def test_ragged_lengths_are_right(variant: str, causal: bool, dtype: str, lengths: tuple[int, int]) -> None:
    """Self- and cross-attention of any length give right O, LSE and gradients, fully written."""
    found = problem(BASE.model_copy(update={"causal": causal, "dtype": dtype}), describe(-1))
    judge(found, *run(found, sized(found, *lengths), variant))


@pytest.mark.parametrize(
    "changes",
    [
        {"mask": "bool"},
        {"mask": "float32", "causal": True},
        {"mask": "bfloat16", "rank": 0},
        {"mask": "float16"},
        {"mask": "float64"},
        {"headdim": 40, "value_dim": 24},
        {"headdim": 20, "dtype": "bfloat16"},
        {"rank": 0, "causal": True},
        {"rank": 40},
        {"layout": "strided"},
        {"nheads": 6, "nheads_kv": 2, "causal": True},
        {"nheads": 8, "nheads_kv": 2, "factor_dtype": "float32", "mask": "bool"},
        {"window": (7, -1)},
        {"window": (9, 0), "causal": True},
        {"window": (5, 6), "nheads": 4, "nheads_kv": 2},
        {"window": (-1, 4)},
        {"factor_dtype": "float32", "rank": 2},
        {"factor_dtype": "float32", "rank": 3, "dtype": "bfloat16", "causal": True},
        {"mask": "float32", "mask_dims": "keys"},
        {"mask": "bfloat16", "mask_dims": "keys", "causal": True, "nheads_kv": 1},
        {"headdim": 136, "value_dim": 200, "rank": 150},
    ],
    ids=str,
)
def test_every_kind_of_problem_is_right(changes: dict[str, Any]) -> None:
    """Masks, odd and unequal head dims, no bias, wide ranks, unaligned tensors, shared key heads, windows, exact factors."""
    found = problem(Shape(**(BASE.model_dump() | changes)), describe(-1))
    judge(found, *run(found, sized(found, 37, 45), space.POINTERS))


@pytest.mark.parametrize("variant", TILES)
@pytest.mark.parametrize(("low", "high"), [(3, 0), (40, 5), (0, 0), (-4, 20), (None, -30), (20, -8), (None, 70)])
def test_any_band_of_diagonals_is_right(low: int | None, high: int, variant: str, monkeypatch: Any) -> None:
    """Bounds above, below, negative (rows without a key) and beyond the matrix: every tile is found, none twice."""
    shape = Shape(**(BASE.model_dump() | {"causal": True, "window": (-1 if low is None else 8, 0)}))
    found = problem(shape, describe(-1))
    monkeypatch.setattr(cases, "band_of", lambda *_: Band(low, high))
    judge(found, *run(found, sized(found, 75, 83, dlse=True), variant))


@pytest.mark.parametrize(
    "changes", [{}, {"causal": True, "rank": 0}, {"mask": "float32", "dtype": "bfloat16"}], ids=str
)
def test_lse_passes_its_gradient_on(changes: dict[str, Any]) -> None:
    """A gradient of LSE joins those of O in every output, and rows without a key pass none."""
    found = problem(Shape(**(BASE.model_dump() | changes)), describe(-1))
    inputs, outputs = run(found, sized(found, 37, 45, dlse=True), space.POINTERS)
    assert "dlse" in inputs
    judge(found, inputs, outputs)


@pytest.mark.parametrize("changes", [{"logit": 200.0}, {"bias": -60.0}, {"shared": True}], ids=str)
@pytest.mark.parametrize("variant", TILES)
def test_extreme_scores_and_shared_factors_are_right(changes: dict[str, Any], variant: str) -> None:
    """Logits hundreds above and below zero and factors shared by heads and batches change nothing."""
    found = problem(BASE, describe(-1))
    judge(found, *run(found, sized(found, 40, 33, **changes), variant))


@pytest.mark.parametrize(
    "grads",
    [*chain.from_iterable(combinations(GRADIENTS[:5], size) for size in (0, 1, 2, 4)), ("mask",), ("k", "mask")],
    ids="-".join,
)
def test_every_subset_of_gradients_is_right_and_nothing_else_is_computed(grads: tuple[str, ...]) -> None:
    """Only the wanted gradients have buffers, and each of them is right."""
    mask = "float32" if "mask" in grads else "none"
    found = problem(BASE.model_copy(update={"grads": grads, "mask": mask}), describe(-1))
    inputs, outputs = run(found, sized(found, 33, 20), space.POINTERS)
    assert {name for name in outputs if name.startswith("d") and name != "delta"} == {f"d{name}" for name in grads}
    judge(found, inputs, outputs)


def test_a_row_without_a_key_gives_zero_and_minus_infinity() -> None:
    """Fully masked rows have O = 0, LSE = -inf and no gradient, bitwise."""
    found = problem(BASE.model_copy(update={"mask": "bool"}), describe(-1))
    _, outputs = run(found, sized(found, 15, 20), space.POINTERS)
    assert (outputs["out"][:, ::7] == 0).all()
    assert (outputs["lse"][:, :, ::7] == -torch.inf).all()
    assert (outputs["dq"][:, ::7] == 0).all()


def room(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Returns memory for packed factors."""
    assert name in ("q_factor", "k_factor", "peaks")
    return unwritten(shape, dtype)


@pytest.mark.parametrize("rank", [1, 5, 8, 12, 16, 128])
def test_factors_are_copied_only_when_their_rows_are_not_whole_16_byte_steps(rank: int) -> None:
    """Ranks that are multiples of 8 are read in place; others are padded with zeros to the next one."""
    q_bias, k_bias = torch.randn(1, 7, 2, rank).half(), torch.randn(1, 9, 1, rank).half()
    found = factors.prepare(q_bias, k_bias, Packing("float16", rank, False), room)
    for packed, factor in ((found.q_factor, q_bias), (found.k_factor, k_bias)):
        assert (packed is factor) == (rank % 8 == 0)
        assert torch.equal(packed[..., :rank], factor)
        assert (packed[..., rank:] == 0).all()
        assert packed.shape[3] % 8 == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("rank", [1, 7, 8, 12, 60])
def test_a_column_of_ones_is_packed_behind_k_bias_and_zeros_behind_q_bias(rank: int, dtype: str) -> None:
    """Any strides, batches and heads are packed, more rows than one program copies."""
    q_bias = torch.randn(3, 2, rank, 300).to(getattr(torch, dtype)).permute(0, 3, 1, 2)
    k_bias = torch.randn(1, 9, 4, rank).to(getattr(torch, dtype))[:, :, ::2]
    found = factors.prepare(q_bias, k_bias, Packing(dtype, rank, False, True), room)
    assert torch.equal(found.q_factor[..., :rank], q_bias)
    assert torch.equal(found.k_factor[..., :rank], k_bias)
    assert (found.k_factor[..., rank] == 1).all()
    assert (found.q_factor[..., rank:] == 0).all()
    assert (found.k_factor[..., rank + 1 :] == 0).all()


def test_one_unaligned_factor_has_both_copied_to_one_width() -> None:
    """Kernels read as many columns from k_bias as from q_bias."""
    shifted = torch.randn(1, 7, 2, 9).half()[..., 1:]
    found = factors.prepare(shifted, torch.randn(1, 7, 2, 8).half(), Packing("float16", 8, False), room)
    assert found.q_factor.shape[3] == found.k_factor.shape[3] == 8
    assert all(factors.is_aligned(factor) for factor in (found.q_factor, found.k_factor))


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize(("dtype", "ulps"), [("float16", 4), ("bfloat16", 2)])
def test_the_parts_of_exact_factors_give_their_products_to_fp32s_own_precision(
    dtype: str, ulps: int, kind: torch.dtype
) -> None:
    """Sums over the packed columns are within a few fp32 ulp of the largest product, whatever the columns' sizes."""
    generator = torch.Generator().manual_seed(3)
    sizes = torch.tensor([1e-3, 1.0, 3e4])
    q_bias = (torch.randn(2, 50, 3, 3, generator=generator, dtype=torch.float64) * sizes).to(kind)
    k_bias = (torch.randn(1, 70, 1, 3, generator=generator, dtype=torch.float64) * sizes.flip(0) * 7).to(kind)
    q_bias[0, 0] = 0.0
    found = factors.prepare(q_bias, k_bias, Packing(dtype, 3, True, True), room)
    product = torch.einsum("bqhr,ckgr->bhqk", found.q_factor.double(), found.k_factor.double())
    exact = torch.einsum("bqhr,ckgr->bhqk", q_bias.float().double(), k_bias.float().double())
    terms = torch.einsum("bqhr,ckgr->bhqk", q_bias.double().abs(), k_bias.double().abs())
    assert ((product - exact).abs() <= ulps * 2.0**-24 * terms.amax(-1, keepdim=True)).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gradients_of_parts_are_gathered_into_those_of_the_factors(dtype: str) -> None:
    """DS times the packed columns, gathered, is dS times the factors."""
    q_bias, k_bias = torch.randn(1, 20, 2, 3) * 100, torch.randn(1, 30, 2, 3) / 100
    found = factors.prepare(q_bias, k_bias, Packing(dtype, 3, True, True), room)
    dscores = torch.randn(1, 2, 20, 30)
    used = found.packing.used
    dq_packed = torch.einsum("bhqk,bkhc->bqhc", dscores, found.k_factor.float())[..., :used]
    dk_packed = torch.einsum("bhqk,bqhc->bkhc", dscores, found.q_factor.float())[..., :used]
    close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-3)
    close(found.gradient("q", dq_packed) * 1e4, torch.einsum("bhqk,bkhr->bqhr", dscores, k_bias) * 1e4)
    close(found.gradient("k", dk_packed), torch.einsum("bhqk,bqhr->bkhr", dscores, q_bias))


@pytest.mark.parametrize("seed", [2**63 - 1, -(2**63), 10**13])
def test_any_seed_of_64_bits_draws_inputs(seed: int) -> None:
    """What ``flashbias verify --seed`` accepts can be drawn, the same numbers each time."""
    found = problem(BASE, describe(-1))
    first, again = (ATTENTION.inputs(found, sized(found, 5, 7), seed, CPU) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("rank", [2, 16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_alibi_has_accurate_gradients(dtype: torch.dtype, rank: int) -> None:
    """Key positions are large next to their spread in a row: dq_bias is recentred and within the gate's ceiling."""
    changes = {"causal": True, "rank": rank, "dtype": str(dtype).removeprefix("torch.")}
    found = problem(BASE.model_copy(update=changes), describe(-1))
    case = sized(found, 72, 72)
    case = replace(case, sizes={**case.sizes, "rank": rank})
    position, slopes = torch.arange(72.0), torch.tensor([0.25, 0.0625])
    q_bias, k_bias = torch.zeros(1, 72, 2, rank), torch.zeros(1, 72, 2, rank)
    q_bias[..., 0], q_bias[..., 1] = slopes, -slopes * position[:, None]
    k_bias[..., 0], k_bias[..., 1] = position[:, None], 1.0
    inputs, outputs = run(found, case, space.POINTERS, q_bias=q_bias.to(dtype), k_bias=k_bias.to(dtype))
    judge(found, inputs, outputs)
    truth = ATTENTION.oracle(found, inputs)["dq_bias"].value[..., 0]
    off = (outputs["dq_bias"][..., 0] - truth).norm() / truth.norm()
    assert off <= (2e-3 if dtype == torch.float16 else 1e-2)
