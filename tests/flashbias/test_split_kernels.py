"""Split keys, run by Triton's interpreter and judged by the gate's own rule: every output, kind of input and variant."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from autotune.device import DeviceInfo, describe, interpreting
from autotune.spec import Case, Tensors
from cache_db.models import Config, Problem
from flashbias.band import Band
from flashbias.kernels import cases, space, splitting
from flashbias.kernels.problem import GRADIENTS, Shape, problem
from flashbias.kernels.spec import ATTENTION
from tests.flashbias.test_kernels import judge, sized, unwritten

pytestmark = pytest.mark.skipif(not interpreting(), reason="runs kernels in Triton's interpreter (TRITON_INTERPRET=1)")
CPU = torch.device("cpu")
# The passes that split no keys are tested elsewhere; interpreted they would take most of the time.
SPLIT_GRADIENTS = ("q", "q_bias")
BASE = Shape(batch=1, nheads=2, seqlen_q=16, seqlen_k=128, headdim=16, rank=8, grads=SPLIT_GRADIENTS)


def device() -> DeviceInfo:
    """Returns the interpreter as a device of 8 multiprocessors, whatever machine it runs on."""
    return replace(describe(-1), sm_count=8)


def config_of(kernel: str, variant: str, waves: int = 1) -> Config:
    """Returns a split config where the kernel has one, else that of one program for all keys."""
    if kernel in splitting.FUNCTIONS:
        return space.split_config(variant, 16, 16, 4, 1, waves)
    return space.config(splitting.VARIANTS[variant], 16, 16, 4, 1)


def run(found: Problem, case: Case, variant: str = space.SPLIT_POINTERS, waves: int = 1) -> tuple[Tensors, Tensors]:
    """Runs all kernels of the problem on NaN-filled buffers, keys split where they can be; returns (inputs, outputs)."""
    inputs = ATTENTION.inputs(found, case, 1, CPU)
    outputs: Tensors = {}
    for kernel in ATTENTION.kernels(found):
        config = config_of(kernel, variant, waves)
        if space.rejects(kernel, config, found, device()):
            config = space.config(space.POINTERS, 16, 16, 4, 1)
        made, scratch = (
            {name: unwritten(spec.shape, spec.dtype) for name, spec in buffers.items()}
            for buffers in (ATTENTION.outputs(kernel, found, case), ATTENTION.scratch(kernel, found, config, case))
        )
        binary = ATTENTION.compile(kernel, config, found, device())
        ATTENTION.launch(kernel, binary, found, {**inputs, **outputs}, made, scratch)
        outputs |= made
    return inputs, outputs


def one_head(found: Problem, seqlen_q: int, seqlen_k: int) -> Case:
    """Returns a case of one head of k and v, whose LSE has a gradient."""
    return cases._case("ragged", found, 1, int(found.fields["gqa_group"]), seqlen_q, seqlen_k, dlse=True)


def splits_of(found: Problem, case: Case, waves: int = 1) -> int:
    """Returns the number of splits that ``run`` gives the forward of a case."""
    config = config_of("forward", space.SPLIT_POINTERS, waves)
    return ATTENTION.scratch("forward", found, config, case)["partial_max"].shape[0]


@pytest.mark.parametrize("variant", splitting.VARIANTS)
@pytest.mark.parametrize(
    ("lengths", "causal", "dtype"),
    [
        ((1, 75), False, "bfloat16"),
        ((7, 93), True, "float16"),
        ((17, 50), True, "bfloat16"),
        ((20, 11), True, "float16"),
        ((5, 1), False, "float16"),
    ],
    ids=str,
)
def test_ragged_lengths_are_right(variant: str, causal: bool, dtype: str, lengths: tuple[int, int]) -> None:
    """Any number of queries and keys gives right O, LSE and gradients, fully written, whatever the split."""
    found = problem(BASE.model_copy(update={"causal": causal, "dtype": dtype}), device())
    judge(found, *run(found, sized(found, *lengths), variant))


@pytest.mark.parametrize(
    "changes",
    [
        {"mask": "bool"},
        {"mask": "float32", "grads": GRADIENTS},
        {"mask": "bfloat16", "rank": 0, "dtype": "bfloat16"},
        {"headdim": 40, "value_dim": 24},
        {"headdim": 20, "dtype": "bfloat16"},
        {"rank": 16},
        {"rank": 40, "dtype": "bfloat16"},
        {"layout": "strided"},
        {"nheads": 4, "nheads_kv": 2, "factor_dtype": "float32", "mask": "bool"},
        {"window": (9, 0), "causal": "bottom_right"},
        {"factor_dtype": "float32", "rank": 3, "dtype": "bfloat16"},
        {"grads": ("q",)},
        {"grads": ("q_bias",)},
        {"grads": ("q_bias",), "rank": 16},
        {"grads": ("v",)},
        {"grads": ()},
    ],
    ids=str,
)
def test_every_kind_of_problem_is_right(changes: dict[str, Any]) -> None:
    """Masks, odd head dims, full ranks, unaligned tensors, shared key heads, windows, exact factors, single gradients."""
    found = problem(Shape(**(BASE.model_dump() | changes)), device())
    judge(found, *run(found, one_head(found, 9, 77)))


@pytest.mark.parametrize(("low", "high"), [(3, 0), (-4, 70), (None, -5), (None, 70), (-70, 80)])
def test_any_band_of_diagonals_is_right(low: int | None, high: int, monkeypatch: Any) -> None:
    """Every tile that is seen belongs to one split; splits that see no key change nothing."""
    shape = Shape(**(BASE.model_dump() | {"causal": True, "window": (-1 if low is None else 8, 0)}))
    found = problem(shape, device())
    monkeypatch.setattr(cases, "band_of", lambda *_: Band(low, high))
    judge(found, *run(found, one_head(found, 18, 83), waves=2))


@pytest.mark.parametrize("changes", [{"logit": 200.0}, {"bias": -60.0}, {"shared": True}, {"positions": True}], ids=str)
def test_extreme_scores_and_shared_factors_are_right(changes: dict[str, Any]) -> None:
    """Logits hundreds above and below zero, shared factors and factors far from zero are merged as one split would be."""
    found = problem(BASE, device())
    judge(found, *run(found, sized(found, 12, 93, **changes)))


def test_sums_of_very_low_rows_are_merged_by_their_maxima() -> None:
    """A row of scores near -1e9 has an LSE without digits for its sum: a split of 3 keys still weighs less than others."""
    shape = BASE.model_copy(update={"mask": "float32", "grads": ("q",), "rank": 0})
    found = problem(shape, device())
    case = sized(found, 8, 64)
    inputs = ATTENTION.inputs(found, case, 1, CPU)
    inputs["mask"] = torch.full_like(inputs["mask"], -1e9)
    inputs["mask"][..., 3:16] = -torch.inf
    made = {name: unwritten(spec.shape, spec.dtype) for name, spec in ATTENTION.outputs("forward", found, case).items()}
    config = config_of("forward", space.SPLIT_POINTERS)
    assert splits_of(found, case) == 4
    scratch = {
        name: unwritten(spec.shape, spec.dtype)
        for name, spec in ATTENTION.scratch("forward", found, config, case).items()
    }
    ATTENTION.launch("forward", ATTENTION.compile("forward", config, found, device()), found, inputs, made, scratch)
    # In fp32 all scores of such a row are equal, so O is the plain mean of the values that take part.
    seen = [*range(3), *range(16, 64)]
    mean = inputs["v"].double()[:, seen].mean(1, keepdim=True)
    torch.testing.assert_close(made["out"].double(), mean.expand_as(made["out"]), rtol=2e-3, atol=2e-3)


def test_a_row_without_a_key_gives_zero_and_minus_infinity() -> None:
    """Rows that are masked in all splits have O = 0, LSE = -inf and no gradient, bitwise."""
    found = problem(BASE.model_copy(update={"mask": "bool"}), device())
    case = sized(found, 15, 70)
    assert splits_of(found, case) == 4
    _, outputs = run(found, case)
    assert (outputs["out"][:, ::7] == 0).all()
    assert (outputs["lse"][:, :, ::7] == -torch.inf).all()
    assert (outputs["dq"][:, ::7] == 0).all()
    assert (outputs["dq_bias"][:, ::7] == 0).all()
