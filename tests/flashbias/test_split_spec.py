"""What the tuner is told about split keys: which configs there are, how many splits, and a gate that notices their faults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from autotune.device import DeviceInfo, describe, interpreting
from autotune.gate import Rig, prove
from cache_db.models import Problem, Verdict
from flashbias import flash_bias_func, plans
from flashbias.kernels import arguments, cases, space, splitting
from flashbias.kernels.problem import FEW_QUERIES, Shape, problem, query_bucket
from flashbias.kernels.spec import ATTENTION
from tests.flashbias.test_space import A100, H200

DECODE = Shape(
    batch=8, nheads=32, nheads_kv=8, seqlen_q=1, seqlen_k=65536, headdim=128, rank=8, dtype="bfloat16", causal=True
)
TRAINED = DECODE.model_copy(update={"seqlen_q": 40, "nheads_kv": 32, "grads": ("q", "k", "v", "q_bias", "k_bias")})
interpreter_only = pytest.mark.skipif(not interpreting(), reason="runs kernels in Triton's interpreter")


def test_few_queries_have_buckets_of_their_own() -> None:
    """Up to 16 and up to 64 queries are problems apart; keys and longer queries keep their buckets."""
    assert [query_bucket(n) for n in (1, 16, 17, 64, 65, 128, 129)] == [16, 16, 64, 64, 128, 128, 256]
    hashes = {problem(DECODE.model_copy(update={"seqlen_q": n}), H200).hash for n in (1, 16, 17, 64, 65, 128)}
    assert len(hashes) == 3
    assert problem(DECODE.model_copy(update={"seqlen_k": 3, "causal": False}), H200).fields["seqlen_k"] == 128


@pytest.mark.parametrize("shape", [DECODE, TRAINED], ids=["decode", "trained"])
@pytest.mark.parametrize("device", [H200, A100], ids=["H200", "A100"])
@pytest.mark.parametrize("headdim", [32, 128, 256])
def test_few_queries_have_candidates_with_and_without_splits(shape: Shape, device: DeviceInfo, headdim: int) -> None:
    """Each kernel has a list that a sweep can finish; only kernels that walk the keys are offered splits."""
    found = problem(shape.model_copy(update={"headdim": headdim, "value_dim": headdim}), device)
    for kernel in ATTENTION.kernels(found):
        listed = space.candidates(found, device)
        allowed = [each for each in listed if space.rejects(kernel, each, found, device) is None]
        split = [each for each in allowed if each.variant in splitting.VARIANTS]
        assert len(set(listed)) == len(listed)
        assert 3 <= len(allowed) <= 60
        assert len(allowed) > len(split)
        assert bool(split) == (kernel in splitting.FUNCTIONS)
        assert space.rejects(kernel, space.default(kernel, found, device), found, device) is None


def test_splits_are_refused_with_the_reason_where_they_cannot_work() -> None:
    """Many queries, kernels that are parallel over keys, nothing to sum and a foreign row each have their sentence."""
    found = problem(TRAINED, H200)
    good = space.split_config(space.SPLIT_POINTERS, 64, 64, 4, 2, 2)
    assert space.rejects("forward", good, found, H200) is None
    assert "already" in str(space.rejects("backward_dkdv", good, found, H200))
    many = problem(TRAINED.model_copy(update={"seqlen_q": FEW_QUERIES + 1}), H200)
    assert "more than 64 queries" in str(space.rejects("forward", good, many, H200))
    keys_only = problem(TRAINED.model_copy(update={"grads": ("v",)}), H200)
    assert "nothing to split" in str(space.rejects("backward_dq", good, keys_only, H200))
    assert "9.0" in str(space.rejects("forward", space.split_config("split_descriptors", 64, 64, 4, 2, 2), found, A100))
    for params in ({"WAVES": 3}, {"WAVES": 2.0}, {"WAVES": True}):
        row = good.model_copy(update={"params": {**good.params, **params}})
        assert "WAVES" in str(space.rejects("forward", row, found, H200))
    lacking = good.model_copy(update={"params": {n: v for n, v in good.params.items() if n != "WAVES"}})
    assert "WAVES" in str(space.rejects("forward", lacking, found, H200))
    plain = space.config(space.POINTERS, 64, 64, 4, 2)
    odd = plain.model_copy(update={"params": {**plain.params, "WAVES": 1}})
    assert "exactly" in str(space.rejects("forward", odd, found, H200))


@pytest.mark.parametrize(
    ("pairs", "seqlen_q", "seqlen_k", "splits"),
    [
        (100, 1, 65536, 2),
        (8, 1, 65536, 17),
        (8, 1, 1000, 16),
        (1, 1, 65536, 256),
        (1, 1, 64, 1),
        (300, 1, 65536, 1),
        (8, 33, 65536, 6),
    ],
)
def test_the_number_of_splits_follows_from_sizes(pairs: int, seqlen_q: int, seqlen_k: int, splits: int) -> None:
    """About WAVES programs for each multiprocessor, no split without a tile, one where there are heads enough."""
    config = space.split_config(space.SPLIT_POINTERS, 16, 64, 4, 3, 1 if pairs > 1 else 4)
    split = splitting.split_of("forward", config, problem(DECODE, H200))
    assert split is not None
    assert split.count(pairs, seqlen_q, seqlen_k) == splits
    assert split.shapes(pairs, seqlen_q, seqlen_k)["partial_out"] == (splits, pairs * seqlen_q, 128)


@pytest.mark.parametrize("shape", [DECODE, TRAINED], ids=["decode", "trained"])
@pytest.mark.parametrize("waves", splitting.WAVES)
def test_the_proof_runs_several_splits_on_few_queries(shape: Shape, waves: int) -> None:
    """Cases have at most 64 queries; most have many splits, one has a single one, the race case is over one wave."""
    found = problem(shape, H200)
    for config in space.candidates(found, H200):
        split = splitting.split_of("forward", config, found)
        if split is None or config.params["WAVES"] != waves:
            continue

        def sizes(case: Any) -> tuple[int, int, int]:
            return case.sizes["batch"] * case.sizes["nheads"], case.sizes["seqlen_q"], case.sizes["seqlen_k"]

        counts = [split.count(*sizes(case)) for case in ATTENTION.cases(found, H200)]
        assert all(case.sizes["seqlen_q"] <= FEW_QUERIES for case in ATTENTION.cases(found, H200))
        assert sum(count >= 3 for count in counts) >= 5
        assert counts[0] >= 3
        assert min(counts) == 1
        pairs, rows, keys = sizes(ATTENTION.race_case(found, H200))
        assert -(-rows // split.block_m) * pairs * split.count(pairs, rows, keys) > H200.sm_count


def few() -> tuple[Problem, DeviceInfo]:
    """Returns an interpreted problem of few queries, and a device of so few multiprocessors that its quick proof has 3 splits."""
    device = replace(describe(-1), sm_count=6)
    shape = Shape(batch=1, nheads=2, seqlen_q=9, seqlen_k=131, headdim=16, rank=3, grads=("q", "q_bias"))
    return problem(shape, device), device


SPLIT = space.split_config(space.SPLIT_POINTERS, 16, 32, 4, 1, 1)


@interpreter_only
def test_the_gate_proves_a_split_config() -> None:
    """Forward and backward pass, one through the other."""
    found, device = few()
    rig = Rig(ATTENTION, found, device)
    for kernel in ATTENTION.kernels(found):
        proof = prove(rig, kernel, SPLIT, {"forward": SPLIT}, level=1, seed=3)
        assert (proof.verdict, proof.reason) == (Verdict.SAFE, "")


Change = Callable[[str, dict[str, Any], int], int]


def a_split_is_not_combined(name: str, given: dict[str, Any], splits: int) -> int:
    """Leaves the last split out of the sums."""
    if name.startswith("combine"):
        given["splits"] -= 1
    return splits


def a_split_is_not_run(name: str, given: dict[str, Any], splits: int) -> int:
    """Launches one split less than are combined."""
    return splits if name.startswith("combine") else splits - 1


def a_split_is_run_twice(name: str, given: dict[str, Any], splits: int) -> int:
    """Combines the second split in the place of the first."""
    if name.startswith("combine"):
        for partial in (value for key, value in given.items() if key.startswith("partial_")):
            if partial.dtype == torch.float32:
                partial[0] = partial[1]
    return splits


def sums_are_rounded(name: str, given: dict[str, Any], splits: int) -> int:
    """Combines what was rounded to bf16."""
    if name.startswith("combine"):
        for partial in (value for key, value in given.items() if key.startswith("partial_")):
            if partial.dtype == torch.float32:
                partial.copy_(partial.bfloat16())
    return splits


@interpreter_only
@pytest.mark.parametrize(
    ("kernel", "fault"),
    [
        ("forward", a_split_is_not_combined),
        ("forward", a_split_is_not_run),
        ("forward", a_split_is_run_twice),
        ("forward", sums_are_rounded),
        ("backward_dq", a_split_is_not_combined),
        ("backward_dq", sums_are_rounded),
    ],
)
def test_the_gate_refuses_a_wrong_split(kernel: str, fault: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost, doubled, missing and rounded splits are all wrong in the quick proof."""
    launch_binary = arguments.launch_binary

    def launch(binary: Any, programs: int, given: Mapping[str, Any], splits: int = 1) -> None:
        given = dict(given)
        if binary.function.__name__ in (kernel, splitting.FUNCTIONS[kernel].__name__) and given["splits"] > 1:
            splits = fault(binary.function.__name__, given, splits)
        launch_binary(binary, programs, given, splits)

    monkeypatch.setattr(arguments, "launch_binary", launch)
    found, device = few()
    whole = space.config(space.POINTERS, 16, 32, 4, 1)
    proof = prove(Rig(ATTENTION, found, device), kernel, SPLIT, {"forward": whole}, level=1, seed=3)
    assert proof.verdict is Verdict.WRONG


@interpreter_only
def test_the_gate_notices_a_split_too_many_for_its_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch is guarded: a launch of more splits than were declared writes past its end."""
    found, device = few()
    declared = splitting.Split.shapes
    monkeypatch.setattr(
        splitting.Split,
        "shapes",
        lambda *sizes: {name: (count - 1, *rest) for name, (count, *rest) in declared(*sizes).items()},
    )
    with_room = splitting.with_room
    monkeypatch.setattr(splitting, "with_room", lambda *given: (with_room(*given)[0] + 1, with_room(*given)[1]))
    proof = prove(Rig(ATTENTION, found, device), "forward", SPLIT, {}, level=1, seed=3)
    assert proof.verdict is Verdict.OUT_OF_BOUNDS


@interpreter_only
def test_the_operator_runs_a_split_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher allocates the scratch itself, and its results are those of the gate's launch, bit for bit."""
    found, device = few()
    binaries = {kernel: ATTENTION.compile(kernel, SPLIT, found, device) for kernel in ATTENTION.kernels(found)}
    monkeypatch.setattr(plans, "_make_plan", lambda *_: plans.Plan(binaries, True))
    plans.forget()
    case = cases.proof(found, device)[0]
    inputs = ATTENTION.inputs(found, case, 1, torch.device("cpu"))
    leaves = {name: inputs[name].clone().requires_grad_("q" in name) for name in ("q", "k", "v", "q_bias", "k_bias")}
    out, lse = flash_bias_func(**leaves, return_lse=True)
    gradients = torch.autograd.grad(out, [leaves["q"], leaves["q_bias"]], inputs["dout"])
    plans.forget()
    outputs: dict[str, torch.Tensor] = {}
    for kernel, binary in binaries.items():
        made = {
            name: torch.full(spec.shape, torch.nan, dtype=spec.dtype)
            for name, spec in ATTENTION.outputs(kernel, found, case).items()
        }
        scratch = {
            name: torch.full(spec.shape, torch.nan, dtype=spec.dtype)
            for name, spec in ATTENTION.scratch(kernel, found, SPLIT, case).items()
        }
        ATTENTION.launch(kernel, binary, found, {**inputs, **outputs}, made, scratch)
        outputs |= made
    assert torch.equal(out, outputs["out"])
    assert torch.equal(lse, outputs["lse"])
    assert torch.equal(gradients[0], outputs["dq"])
    assert torch.equal(gradients[1], outputs["dq_bias"].half())
