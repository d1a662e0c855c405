"""Candidates and the rules that forbid one, and the fields that make two calls the same problem."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.device import DeviceInfo, describe
from cache_db.models import Config, Environment, Problem, Scalar
from flashbias.kernels import cases, space, splitting
from flashbias.kernels.problem import GRADIENTS, Shape, bucket, occupancy, packed_rank, problem
from flashbias.kernels.spec import ATTENTION

H200 = DeviceInfo(
    index=0,
    name="NVIDIA H200",
    uuid="GPU-0",
    capability=(9, 0),
    sm_count=132,
    shared_memory=232448,
    mig_profile="",
    triton_version="3.6.0",
    environment=Environment(driver="580", ptxas="12.8", torch="2.11"),
)
A100 = replace(H200, name="NVIDIA A100", capability=(8, 0), sm_count=108, shared_memory=166912)
BASE = Shape(batch=2, nheads=16, seqlen_q=8192, seqlen_k=8192, headdim=64, rank=8, dtype="bfloat16", grads=GRADIENTS)


@pytest.mark.parametrize("headdim", [16, 32, 64, 128])
@pytest.mark.parametrize("device", [H200, A100], ids=["H200", "A100"])
def test_every_kernel_has_candidates_and_a_default_that_no_rule_forbids(headdim: int, device: DeviceInfo) -> None:
    """A problem is never left without something to try, and the ladder's default is always allowed."""
    found = problem(BASE.model_copy(update={"headdim": headdim}), device)
    for kernel in ATTENTION.kernels(found):
        allowed = [c for c in space.candidates(found, device) if not space.rejects(kernel, c, found, device)]
        assert len(allowed) >= 6
        assert len(set(allowed)) == len(allowed)
        assert space.rejects(kernel, space.default(kernel, found, device), found, device) is None


def test_descriptors_are_refused_with_the_reason_where_they_cannot_work() -> None:
    """Before Hopper and for unaligned tensors the rule names what is missing."""
    candidate = space.config(space.DESCRIPTORS, 64, 64, 4, 2)
    assert "9.0" in str(space.rejects("forward", candidate, problem(BASE, A100), A100))
    strided = problem(BASE.model_copy(update={"layout": "strided"}), H200)
    assert "aligned" in str(space.rejects("forward", candidate, strided, H200))


@pytest.mark.parametrize(
    "params",
    [
        {"BLOCK_M": 48, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
        {"BLOCK_M": 64.0, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
        {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": True},
        {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4},
        {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2, "maxnreg": 64},
    ],
)
def test_a_foreign_row_of_the_database_is_refused(params: dict[str, float]) -> None:
    """A stored config with unknown, missing or impossible parameters has a reason against it."""
    config = Config(implementation="triton", variant="pointers", params=dict(params))
    assert space.rejects("forward", config, problem(BASE, H200), H200)
    other = Config(implementation="cuda", variant="pointers", params={})
    assert "unknown" in str(space.rejects("forward", other, problem(BASE, H200), H200))


HANDMADE: dict[str, Config] = {
    name: space.config("pointers", 64, 64, 4, 2).model_copy(update=change)
    for name, change in {
        "unknown variant": {"variant": "warp_specialised"},
        "no variant": {"variant": ""},
        "unknown implementation": {"implementation": "cute"},
        "no params": {"params": {}},
        "no power of two": {"params": {"BLOCK_M": 96, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}},
        "three warps": {"params": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 3, "num_stages": 2}},
        "no stages": {"params": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 0}},
        "negative": {"params": {"BLOCK_M": -64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}},
        "huge": {"params": {"BLOCK_M": 2**4000, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}},
        "infinitely many": {"params": {"BLOCK_M": 1e308, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}},
        "text": {"params": {"BLOCK_M": "64", "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}},
        "misspelt": {"params": {"BLOCK_M": 64, "BLOCK_n": 64, "num_warps": 4, "num_stages": 2}},
        "split without waves": {"variant": "split_pointers"},
        "waves without split": {"params": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2, "WAVES": 1}},
    }.items()
}


@pytest.mark.parametrize("name", HANDMADE)
@pytest.mark.parametrize("device", [H200, A100, describe(-1)], ids=["H200", "A100", "interpreter"])
def test_handmade_config_that_no_kernel_can_run_has_a_reason_for_every_kernel(name: str, device: DeviceInfo) -> None:
    """What a space or a pin may ask for is refused in words, before anything is compiled."""
    for shape in (BASE, BASE.model_copy(update={"seqlen_q": 1}), BASE.model_copy(update={"dtype": "float32"})):
        found = problem(shape, device)
        for kernel in ("forward", "backward_dq", "backward_dkdv", "backward_mask"):
            assert space.rejects(kernel, HANDMADE[name], found, device)


NAMES = st.sampled_from(["BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "WAVES"]) | st.text(max_size=8)
VALUES = (
    st.sampled_from([1, 2, 3, 4, 8, 16, 32, 64, 128, 256])
    | st.integers()
    | st.booleans()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=4)
)


@given(
    variant=st.sampled_from([*splitting.VARIANTS, *splitting.VARIANTS.values()]) | st.text(max_size=8),
    params=st.dictionaries(NAMES, VALUES, max_size=6)
    | st.fixed_dictionaries(
        {"BLOCK_M": VALUES, "BLOCK_N": VALUES, "num_warps": VALUES, "num_stages": VALUES}, optional={"WAVES": VALUES}
    ),
    kernel=st.sampled_from(space.KERNELS) | st.text(max_size=8),
)
def test_rules_decide_on_any_config_at_all(variant: str, params: dict[str, Scalar], kernel: str) -> None:
    """Whatever a config holds there is a reason or there is none, never an exception; what passes is of the tables."""
    config = Config(implementation="triton", variant=variant, params=params)
    reason = space.rejects(kernel, config, problem(BASE, H200), H200)
    whole = params.keys() == {"BLOCK_M", "BLOCK_N", "num_warps", "num_stages"}
    assert reason or (whole and all(type(value) is int and 0 < value <= 128 for value in params.values()))


def test_tiles_that_cannot_fit_are_refused_with_figures() -> None:
    """Register and shared-memory rules say how much is needed and how much there is."""
    wide = problem(BASE.model_copy(update={"headdim": 128}), H200)
    assert "fp32 values" in str(space.rejects("forward", space.config("pointers", 128, 128, 2, 2), wide, H200))
    small = replace(H200, shared_memory=49152)
    assert "shared memory" in str(space.rejects("forward", space.config("pointers", 64, 128, 4, 4), wide, small))


def test_ranks_of_one_packed_width_and_lengths_of_one_bucket_are_one_problem() -> None:
    """R = 2, 5 and 15 and seqlens 4097 … 8192 share a tuning result; R = 17 or another dtype does not.

    R = 16 leaves no spare column for the sums that recentre dq_bias; without that gradient it needs none.
    """
    base = problem(BASE, H200)
    for same in ({"rank": 2}, {"rank": 15}, {"seqlen_q": 4097}, {"nheads": 17}):
        assert problem(BASE.model_copy(update=same), H200) == base
    others: tuple[dict[str, object], ...]
    others = (
        {"rank": 17},
        {"rank": 16},
        {"dtype": "float16"},
        {"causal": True},
        {"grads": ()},
        {"seqlen_k": 4096},
        {"mask": "bool"},
    )
    assert len({problem(BASE.model_copy(update=other), H200).hash for other in others} | {base.hash}) == 8
    kinds = (
        {"nheads_kv": 4},
        {"window": (255, 0)},
        {"window": (2047, 0)},
        {"factor_dtype": "float32"},
        {"mask": "float32"},
        {"mask": "float32", "mask_dims": "keys"},
    )
    assert len({problem(BASE.model_copy(update=kind), H200).hash for kind in kinds} | {base.hash}) == 7
    forward, full = ({"rank": rank, "grads": ()} for rank in (2, 16))
    assert problem(BASE.model_copy(update=forward), H200) == problem(BASE.model_copy(update=full), H200)


def test_a_head_dim_that_cannot_be_aligned_is_a_strided_problem() -> None:
    """Rows of 20 halves are 40 bytes: no claim of 16-byte steps may be made for them."""
    assert problem(BASE.model_copy(update={"headdim": 20}), H200).layout == "strided"
    assert problem(BASE.model_copy(update={"headdim": 40}), H200).layout == "aligned"


def test_sizes_become_classes() -> None:
    """Buckets, packed widths and occupancy classes have the documented borders."""
    assert [bucket(n) for n in (1, 128, 129, 2048)] == [128, 128, 256, 2048]
    assert [packed_rank(n) for n in (0, 1, 16, 17, 96, 128)] == [0, 16, 16, 32, 128, 128]
    assert [occupancy(b, 1, 128, 132) for b in (131, 132, 528, 529)] == ["<1", "1-4", "1-4", ">4"]


@pytest.mark.parametrize(
    ("grads", "kernels"),
    [
        ((), ("forward",)),
        (("q",), ("forward", "backward_dq")),
        (("v",), ("forward", "backward_dq", "backward_dkdv")),
        (GRADIENTS, ("forward", "backward_dq", "backward_dkdv")),
    ],
)
def test_only_the_kernels_that_the_gradients_need_are_tuned(grads: tuple[str, ...], kernels: tuple[str, ...]) -> None:
    """Inference tunes one kernel; a query-side gradient two."""
    assert ATTENTION.kernels(problem(BASE.model_copy(update={"grads": grads}), describe(-1))) == kernels


def test_a_long_masked_problem_is_timed_with_a_mask_that_fits_in_memory() -> None:
    """The representative mask is a matrix for each head only while that is affordable, else one for all, else one row."""
    found = problem(BASE.model_copy(update={"mask": "float32", "grads": ()}), H200)
    keys = problem(BASE.model_copy(update={"mask": "float32", "mask_dims": "keys"}), H200)

    def shape(found: Problem, nheads: int, seqlen: int) -> tuple[int, ...]:
        return cases.mask_shape(found, cases._case("representative", found, 1, nheads, seqlen, seqlen))

    assert shape(found, 4, 4096) == (1, 4, 4096, 4096)
    assert shape(found, 16, 16384) == (1, 1, 16384, 16384)
    assert shape(found, 1, 131072) == (1, 1, 1, 131072)
    assert shape(keys, 16, 131072) == (1, 16, 1, 131072)
