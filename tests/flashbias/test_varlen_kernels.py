"""The kernels on packed sequences, run by Triton's interpreter and judged by the gate's own rule."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from autotune.device import describe, interpreting
from autotune.spec import Case
from cache_db.models import Problem
from flashbias import plans
from flashbias.kernels import ragged, sequences, space
from flashbias.kernels.problem import GRADIENTS, Shape, problem
from flashbias.kernels.varlen import sequence
from flashbias.precision import PRECISIONS
from flashbias.settings import settings
from tests.flashbias.drawn import default_configs
from tests.flashbias.test_kernels import judge, run
from tests.flashbias.varlen_cases import assert_within_gate, attend, packed, solve, upstream_of

pytestmark = pytest.mark.skipif(not interpreting(), reason="runs kernels in Triton's interpreter (TRITON_INTERPRET=1)")
BASE = Shape(batch=2, nheads=1, seqlen_q=64, seqlen_k=64, headdim=16, rank=8, varlen=True, grads=GRADIENTS)
# No queries, no keys, one of either, tiles across their ends; an odd total of keys is aligned bottom-right.
CROSS = (19, 0, 7, 1), (20, 3, 0, 18)
SELF = (19, 1, 0), (19, 1, 0)
KERNELS = {"forward", "backward_dq", "backward_dkdv"}


def made(found: Problem, lengths: tuple[tuple[int, ...], tuple[int, ...]], positional: str = "", **how: Any) -> Case:
    """Returns a case of these lengths with one head of k and v."""
    return ragged._case("ragged", found, int(found.fields["gqa_group"]), *lengths, positional, **how)


@pytest.mark.parametrize(
    ("lengths", "causal", "positional", "variant"),
    [
        (CROSS, True, "k", space.POINTERS),
        (CROSS, True, "q", space.DESCRIPTORS),
        (CROSS, False, "qk", space.DESCRIPTORS),
        (SELF, True, "", space.DESCRIPTORS),
        (((0, 4), (7, 36)), True, "qk", space.POINTERS),
        (((0,), (5,)), False, "", space.POINTERS),
    ],
    ids=str,
)
def test_sequences_of_any_lengths_are_right(lengths: Any, causal: bool, positional: str, variant: str) -> None:
    """Outputs of packed sequences, fully written, are those of each alone, with factors of both layouts."""
    found = problem(BASE.model_copy(update={"causal": causal, "dtype": "bfloat16"}), describe(-1))
    judge(found, *run(found, made(found, lengths, positional, dlse=True), variant))


@pytest.mark.parametrize(
    ("changes", "positional"),
    [
        ({"nheads": 4, "nheads_kv": 2, "window": (5, 3)}, "k"),
        ({"window": (4, -1), "causal": True}, "q"),
        ({"window": (-1, 2), "rank": 0, "headdim": 20}, ""),
        ({"factor_dtype": "float32", "rank": 2, "causal": True}, "qk"),
        ({"rank": 16, "layout": "strided"}, "k"),
        ({"grads": ("k_bias",)}, "k"),
        ({"dtype": "float32", "precision": "ieee", "causal": True}, "k"),
        ({"dtype": "float32", "precision": "tf32x3", "factor_dtype": "float32"}, "qk"),
        ({"grads": ()}, "q"),
    ],
    ids=str,
)
def test_every_kind_of_problem_is_right(changes: dict[str, Any], positional: str) -> None:
    """Shared key heads, windows, no bias, odd head dims, exact factors, unaligned tensors, single gradients."""
    found = problem(Shape(**(BASE.model_dump() | changes)), describe(-1))
    judge(found, *run(found, made(found, CROSS, positional), space.POINTERS))


@triton.jit
def faulty(  # noqa: ANN201
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    batch,
    sequence_facts,
    seqlen_q,
    seqlen_k,
    low,
    high,
    VARLEN: tl.constexpr,
    FAULT: tl.constexpr,
):
    """Finds a sequence as ``sequence`` does, but for one fault."""
    first_q, first_k, length_q, length_k, moved_low, moved_high = sequence(
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, batch, sequence_facts, seqlen_q, seqlen_k, low, high, VARLEN
    )
    if FAULT == "a neighbour's key where there is none":
        moved_low, moved_high = moved_low + (length_k == 0), moved_high + (length_k == 0)
        length_k = tl.maximum(length_k, 1)
    if FAULT == "keys start a row early":
        first_k = tl.maximum(first_k - 1, 0)
    if FAULT == "the band is not moved":
        moved_low, moved_high = low, high
    return first_q, first_k, length_q, length_k, moved_low, moved_high


@pytest.mark.parametrize(
    "fault", ["a neighbour's key where there is none", "keys start a row early", "the band is not moved"]
)
def test_the_proofs_cases_show_a_wrong_sequence(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that reads a neighbour's keys, starts at the wrong row or misplaces the band fails on the first case."""
    found = problem(BASE.model_copy(update={"causal": True, "grads": ()}), describe(-1))
    case, *_ = ragged.proof(found, describe(-1))
    judge(found, *run(found, case, space.POINTERS))
    module = importlib.import_module("flashbias.kernels.forward")
    monkeypatch.setattr(module, "sequence", functools.partial(faulty, FAULT=fault))
    with pytest.raises(AssertionError, match="out"):
        judge(found, *run(found, case, space.POINTERS))


def test_the_proofs_cases_show_a_sequence_left_out_of_a_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of a positional factor is judged after it was summed."""
    found = problem(BASE.model_copy(update={"grads": ("k_bias",)}), describe(-1))
    _, case, _ = ragged.proof(found, describe(-1))
    whole = sequences.summed
    monkeypatch.setattr(sequences, "summed", lambda given, cu_seqlens, rows: whole(given, cu_seqlens[:-1], rows))
    with pytest.raises(AssertionError, match="dk_bias"):
        judge(found, *run(found, case, space.POINTERS))


@pytest.mark.parametrize("columns", [3, 64, 70])
def test_gradients_are_summed_over_sequences_by_position(columns: int) -> None:
    """Any number of columns and positions, sequences longer than the positions cut off, empty ones skipped."""
    lengths, positions = [5, 0, 40, 17], 37
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    gradient = torch.randn(1, sum(lengths), 2, columns)
    expected = torch.zeros(1, positions, 2, columns)
    for part in gradient.split(lengths, dim=1):
        expected[:, : part.shape[1]] += part[:, :positions]
    torch.testing.assert_close(sequences.summed(gradient, cu_seqlens, positions), expected)


THROUGH_THE_CALL = {
    "grouped, k_bias by group, positions of keys": {"causal": "bottom_right"},
    "bfloat16, one head of factors, positions": {
        "dtype": torch.bfloat16,
        "positional": "qk",
        "factor_heads": (1, 1),
        "causal": "top_left",
    },
    "window, factors in fp32, tokens": {"factor_dtype": torch.float32, "rank": 2, "positional": "", "window": (4, 1)},
    "no bias, one sequence, odd dims": {"rank": 0, "lengths": ((21,), (34,)), "dims": (20, 12)},
    "no queries at all in a sequence": {"lengths": ((0, 18, 1), (7, 20, 3)), "positional": "k"},
}


@pytest.mark.parametrize("name", THROUGH_THE_CALL)
def test_the_public_call_runs_kernels(name: str) -> None:
    """O, LSE and five gradients of default configs are right in shape and dtype of their inputs."""
    how: dict[str, Any] = {"dtype": torch.float16, "dims": (16, 16), "lengths": CROSS} | THROUGH_THE_CALL[name]
    call = packed(**how)
    upstream = upstream_of(call)
    with default_configs():
        found = solve(call, upstream)
        assert [set(plan.binaries) for plan in plans._plans.values()] == [KERNELS]
        inference = solve(call, upstream, ())
    for key, tensor in call.inputs().items():
        assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape)
    assert_within_gate(call, found, upstream)
    assert torch.equal(inference["out"], found["out"])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_fp32_has_kernels_in_each_precision(precision: Any) -> None:
    """A named precision has the interpreter run kernels for fp32 inputs too."""
    call = packed(CROSS, dtype=torch.float32, dims=(16, 16), causal="bottom_right")
    upstream = upstream_of(call)
    with default_configs():
        found = solve(call, upstream, precision=precision)
        assert [set(plan.binaries) for plan in plans._plans.values()] == [KERNELS]
    assert_within_gate(call, found, upstream, precision)


def test_a_compiled_graph_runs_kernels() -> None:
    """The registered ops run kernels, and the backward finds those of its forward."""
    torch._dynamo.reset()
    call = packed(CROSS, dtype=torch.float16, dims=(16, 16), causal="bottom_right").wanting()
    upstream, leaves = upstream_of(call), list(call.inputs().values())
    function = torch.compile(attend, fullgraph=True, backend="aot_eager")
    with default_configs():
        results = function(call)
        found = (*results, *torch.autograd.grad(results, leaves, upstream))
        expected = solve(call, upstream)
    for name, one in zip(("out", "lse", *call.inputs()), found, strict=True):
        assert torch.equal(one, expected[name]), name


def test_a_sweep_through_the_public_call_finds_proven_kernels(tmp_path: Path) -> None:
    """First use tunes packed sequences as it does dense ones: a config is accepted, stored and run."""
    call = packed(((18, 0, 5), (7, 3, 20)), dtype=torch.float16, dims=(16, 16), rank=0, heads=1, kv_heads=1)
    plans.forget()
    with settings(mode="tune", cache_dir=tmp_path):
        found = solve(call, upstream_of(call), ())
        assert [set(plan.binaries) for plan in plans._plans.values()] == [{"forward"}]
    plans.forget()
    with settings(mode="assert", cache_dir=tmp_path):
        again = solve(call, upstream_of(call), ())
    plans.forget()
    assert all(torch.equal(found[name], again[name]) for name in found)
    assert_within_gate(call, found, upstream_of(call))
