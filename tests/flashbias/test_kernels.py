"""The kernels, run by Triton's interpreter and judged by the gate's own rule: every output, kind of input and variant."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, combinations
from typing import Any

import pytest
import torch

from autotune.device import describe, interpreting
from autotune.gate.accuracy import yardstick
from autotune.spec import Case, Tensors
from cache_db.models import Problem
from flashbias.kernels import arguments, cases, space
from flashbias.kernels.problem import GRADIENTS, Shape, problem
from flashbias.kernels.spec import ATTENTION

pytestmark = pytest.mark.skipif(not interpreting(), reason="runs kernels in Triton's interpreter (TRITON_INTERPRET=1)")
CPU = torch.device("cpu")
BASE = Shape(batch=1, nheads=2, seqlen_q=64, seqlen_k=64, headdim=16, rank=8, grads=GRADIENTS)
TILES = {space.POINTERS: (16, 32), space.DESCRIPTORS: (32, 16)}


def run(found: Problem, case: Case, variant: str, **replaced: torch.Tensor) -> tuple[Tensors, Tensors]:
    """Runs all kernels of the problem on NaN-filled buffers; returns (inputs, outputs)."""
    inputs = ATTENTION.inputs(found, case, 1, CPU) | replaced
    outputs: Tensors = {}
    for kernel in ATTENTION.kernels(found):
        config = space.config(variant, *TILES[variant], 4, 1)
        made, scratch = (
            {name: torch.full(spec.shape, torch.nan, dtype=spec.dtype) for name, spec in buffers.items()}
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
    """Returns a case of these lengths."""
    return cases._case("ragged", found, 1, 2, seqlen_q, seqlen_k, **changes)


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
    ],
    ids=str,
)
def test_every_kind_of_problem_is_right(changes: dict[str, Any]) -> None:
    """Masks with dead rows, odd and unequal head dims, no bias, wide ranks and unaligned tensors are right."""
    found = problem(BASE.model_copy(update=changes), describe(-1))
    judge(found, *run(found, sized(found, 37, 45), space.POINTERS))


@pytest.mark.parametrize("changes", [{"logit": 200.0}, {"bias": -60.0}, {"shared": True}], ids=str)
@pytest.mark.parametrize("variant", TILES)
def test_extreme_scores_and_shared_factors_are_right(changes: dict[str, Any], variant: str) -> None:
    """Logits hundreds above and below zero and factors shared by heads and batches change nothing."""
    found = problem(BASE, describe(-1))
    judge(found, *run(found, sized(found, 40, 33, **changes), variant))


@pytest.mark.parametrize(
    "grads", [*chain.from_iterable(combinations(GRADIENTS, size) for size in (0, 1, 2, 4))], ids="-".join
)
def test_every_subset_of_gradients_is_right_and_nothing_else_is_computed(grads: tuple[str, ...]) -> None:
    """Only the wanted gradients have buffers, and each of them is right."""
    found = problem(BASE.model_copy(update={"grads": grads}), describe(-1))
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


def room(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Returns memory nobody has written."""
    assert name in ("q_factor", "k_factor")
    return torch.full(shape, torch.nan, dtype=torch.float16)


@pytest.mark.parametrize("rank", [1, 5, 8, 12, 16, 128])
def test_factors_are_copied_only_when_their_rows_are_not_whole_16_byte_steps(rank: int) -> None:
    """Ranks that are multiples of 8 are read in place; others are padded with zeros to the next one."""
    q_bias, k_bias = torch.randn(1, 7, 2, rank).half(), torch.randn(1, 9, 1, rank).half()
    found = arguments.factors(q_bias, k_bias, False, room)
    for name, factor in (("q_factor", q_bias), ("k_factor", k_bias)):
        assert (found[name] is factor) == (rank % 8 == 0)
        assert torch.equal(found[name][..., :rank], factor)
        assert (found[name][..., rank:] == 0).all()
        assert found[name].shape[3] % 8 == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 7, 8, 12, 60])
def test_a_column_of_ones_is_packed_behind_k_bias_and_zeros_behind_q_bias(rank: int, dtype: torch.dtype) -> None:
    """Any strides, batches and heads are packed, more rows than one program copies."""
    q_bias = torch.randn(3, 2, rank, 300).to(dtype).permute(0, 3, 1, 2)
    k_bias = torch.randn(1, 9, 4, rank).to(dtype)[:, :, ::2]
    found = arguments.factors(q_bias, k_bias, True, lambda name, shape: room(name, shape).to(dtype))
    assert torch.equal(found["q_factor"][..., :rank], q_bias)
    assert torch.equal(found["k_factor"][..., :rank], k_bias)
    assert (found["k_factor"][..., rank] == 1).all()
    assert (found["q_factor"][..., rank:] == 0).all()
    assert (found["k_factor"][..., rank + 1 :] == 0).all()


def test_one_unaligned_factor_has_both_copied_to_one_width() -> None:
    """Kernels read as many columns from k_bias as from q_bias."""
    shifted = torch.randn(1, 7, 2, 9).half()[..., 1:]
    found = arguments.factors(shifted, torch.randn(1, 7, 2, 8).half(), False, room)
    assert found["q_factor"].shape[3] == found["k_factor"].shape[3] == 8
    assert all(arguments.is_aligned(factor) for factor in found.values())


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
