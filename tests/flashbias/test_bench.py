"""The benchmark's providers compute one and the same function; one that does not, or cannot, says so and is not ranked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from flashbias.bench import compare as comparison
from flashbias.bench import memory, times
from flashbias.bench.campaign import title
from flashbias.bench.inputs import Inputs, scores
from flashbias.bench.providers import Provider, catalogue
from flashbias.bench.providers.ours import ours
from flashbias.bench.providers.sdpa import concat
from flashbias.bench.results import Result, best_peer
from flashbias.errors import ArgumentError
from flashbias.kernels.problem import GRADIENTS, Shape
from tests.flashbias.drawn import default_configs

CPU = torch.device("cpu")
SHAPE = Shape(batch=1, nheads=2, seqlen_q=24, seqlen_k=24, headdim=16, rank=3, causal=True, grads=GRADIENTS)
# What a CPU can run forward and backward, and forward alone.
BOTH = ("ours", "sdpa-concat", "sdpa-concat-flash", "sdpa-dense", "sdpa-dense-math", "vanilla")
FORWARD = ("flex-concat", "flex-score-mod")


@pytest.fixture(autouse=True)
def untuned() -> Iterator[None]:
    """Has our kernels run their default configs: what is compared here is not speed."""
    with default_configs():
        yield


def compared(
    shape: Shape = SHAPE, names: tuple[str, ...] = (), rounds: int = 1, planted: Provider | None = None
) -> Result:
    """Returns the result of the providers ``names`` of the catalogue and the planted one."""
    providers = dict(catalogue(names=names)) if names else {}
    if planted is not None:
        providers["planted"] = planted
    return comparison.compare(shape, providers, rounds, CPU)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"nheads_kv": 1}, "B1 H2/1 S24x24 D16 R3 causal float16"),
        ({"causal": "bottom_right", "seqlen_q": 9}, "B1 H2 S9x24 D16 R3 bottom_right float16"),
        ({"causal": False, "factor_dtype": "float32", "value_dim": 8}, "B1 H2 S24x24 D16/8 R3 float16 factors float32"),
        ({"causal": False, "seqlen_q": 7, "dtype": "float32"}, "B1 H2 S7x24 D16 R3 float32 ieee"),
        ({"dtype": "bfloat16", "nheads": 1}, "B1 H1 S24x24 D16 R3 causal bfloat16"),
    ],
)
def test_every_kind_of_problem_is_the_same_for_us_and_the_peers(changes: dict[str, object], name: str) -> None:
    """Grouped heads, the other causal corner, fp32 and exact factors: who can run here agrees with the oracle."""
    shape = SHAPE.model_copy(update=changes)
    found = compared(shape, (*BOTH, *FORWARD, "sdpa-no-bias"), 0)
    assert title(shape) == name
    for row in found.rows:
        assert (row.missing, row.right_forward) == ("", True), row
        assert row.right_backward is (None if row.provider in FORWARD else True), row
        assert row.forward is row.backward is None
        biased = set() if row.floor else {"dq_bias", "dk_bias"}
        assert set(row.errors) == {"out"} | (set() if row.provider in FORWARD else {"dq", "dk", "dv"} | biased)
    assert found.judged == "all heads"


def test_ours_by_default_and_without_a_bias_are_right_too() -> None:
    """The floor is judged by what it computes, the oracle without the bias, and is a peer of nobody."""
    found = compared(SHAPE.model_copy(update={"nheads": 1}), ("ours-default", "ours-no-bias"), 0)
    default, floor = found.rows
    assert (default.right_backward, floor.right_backward) == (True, True)
    assert (default.floor, floor.floor) == (False, True)
    assert set(floor.errors) == {"out", "dq", "dk", "dv"}
    assert best_peer(found, "forward") is None


def test_torch_compile_computes_the_same_function() -> None:
    """What is compiled is the formula, and its backward can run again and again on one graph."""
    (row,) = compared(names=("compile",)).rows
    assert row.right_forward
    assert row.right_backward
    assert row.backward is not None


def test_a_window_is_missing_from_those_that_have_none() -> None:
    """A row says so; those who take any mask do without, and only the scores in the band count as work."""
    shape = SHAPE.model_copy(update={"window": (3, 0)})
    found = compared(shape, ("sdpa-concat", "sdpa-no-bias", "sdpa-dense", "flex-concat", "vanilla"))
    rows = {row.provider: row for row in found.rows}
    assert {name for name, row in rows.items() if row.missing == "SDPA has no window"} == {
        "sdpa-concat",
        "sdpa-no-bias",
    }
    assert all(row.right_forward for row in rows.values() if not row.missing)
    assert scores(shape) == 1 + 2 + 3 + 21 * 4


def test_who_is_not_here_says_why() -> None:
    """Each provider that this machine cannot run is a row with a reason, and everything else goes on."""
    found = compared(
        names=("upstream", "upstream-dense", "flash4-concat", "xformers-concat", "sdpa-dense-flash", "vanilla")
    )
    reasons = {row.provider: row.missing for row in found.rows}
    assert reasons["upstream"] == reasons["upstream-dense"] == "needs --upstream FOLDER"
    assert reasons["flash4-concat"] == reasons["xformers-concat"] == "needs a CUDA device"
    assert reasons["sdpa-dense-flash"] == "SDPA's flash backend takes no mask"
    assert reasons["vanilla"] == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine where these backends cannot run")
def test_what_a_peer_raises_is_its_row() -> None:
    """A backend that is there and refuses these inputs is told by its own words."""
    (row,) = compared(names=("sdpa-concat-cudnn",)).rows
    assert row.missing.startswith("RuntimeError: ")
    assert row.forward is row.backward is None


def test_an_error_without_words_is_told_by_the_line_that_raised_it() -> None:
    """A bare assertion of a peer's is a reason too."""

    def narrow(inputs: Inputs) -> torch.Tensor:
        assert inputs.q.shape[3] == 5
        return inputs.q

    (row,) = compared(planted=Provider(narrow)).rows
    assert row.missing.startswith("AssertionError: assert ")


def test_an_unknown_provider_is_refused_with_the_right_names() -> None:
    """A misspelled name does not vanish from the table."""
    with pytest.raises(ArgumentError, match=r"sdpa-concat-cudnn.*got 'sdpa-cudn'"):
        catalogue(names=("ours", "sdpa-cudn"))


def off(inputs: Inputs) -> torch.Tensor:
    """Returns O, every number 2 % too large."""
    return concat(inputs) * 1.02


def off_backward(inputs: Inputs) -> torch.Tensor:
    """Returns O as it is, whose gradients are 2 % too large."""
    out = concat(inputs)
    return out * 1.02 - 0.02 * out.detach()


def with_nan(inputs: Inputs) -> torch.Tensor:
    """Returns O with one number that is none."""
    out = concat(inputs)
    return out.masked_fill(torch.arange(out.numel()).view(out.shape) == 5, torch.nan)


def cut(inputs: Inputs) -> torch.Tensor:
    """Returns O without its last row."""
    return concat(inputs)[:, :-1]


@pytest.mark.parametrize("wrong", [off, with_nan, cut])
def test_a_wrong_peer_is_marked_and_not_ranked(wrong: Callable[[Inputs], torch.Tensor]) -> None:
    """However fast it is, a provider of other numbers is neither the best forward nor the best backward."""
    found = compared(planted=Provider(wrong), names=("sdpa-concat",))
    row = found.row("planted")
    assert row is not None
    assert row.right_forward is False
    assert not row.ranked("forward")
    assert not row.ranked("backward")
    best = best_peer(found, "forward"), best_peer(found, "backward")
    assert [each and each.provider for each in best] == ["sdpa-concat"] * 2


def test_a_wrong_backward_leaves_a_right_forward_ranked() -> None:
    """A peer whose gradients are wrong competes forward only."""
    found = compared(planted=Provider(off_backward))
    (row,) = found.rows
    assert (row.right_forward, row.right_backward) == (True, False)
    assert best_peer(found, "forward") is row
    assert best_peer(found, "backward") is None


def test_a_forward_that_is_wrong_without_gradients_only_is_wrong() -> None:
    """Inference may run other code than training, and it is what the forward's time is taken of."""

    def off_without_gradients(inputs: Inputs) -> torch.Tensor:
        return concat(inputs) if torch.is_grad_enabled() else off(inputs)

    (row,) = compared(planted=Provider(off_without_gradients)).rows
    assert (row.right_forward, row.right_backward) == (False, True)
    assert row.errors["out"] == pytest.approx(0.02, rel=0.1)


def test_a_backward_that_fails_leaves_the_forward() -> None:
    """A peer without a backward for these inputs is timed and judged forward, and says why."""
    found = compared(planted=Provider(lambda inputs: concat(inputs).detach()))
    (row,) = found.rows
    assert row.missing_backward.startswith("RuntimeError: ")
    assert (row.right_forward, row.right_backward, row.backward) == (True, None, None)
    assert row.forward is not None


def test_without_gradients_there_is_no_backward() -> None:
    """A shape of inference is timed and checked forward only."""
    found = compared(SHAPE.model_copy(update={"grads": ()}), ("sdpa-concat", "vanilla"))
    assert {(row.backward, *row.errors) for row in found.rows} == {(None, "out")}


def test_a_provider_that_needs_more_memory_than_there_is_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is estimated before it runs, and the row has both numbers."""
    ran = []

    def large(inputs: Inputs) -> torch.Tensor:
        ran.append(True)
        return concat(inputs)

    monkeypatch.setattr(memory, "free", lambda _: 3 * memory.GIBIBYTE)
    matrix_bytes = 2 * 24 * 24 * 2
    (row,) = compared(planted=Provider(large, matrices=4.5 * memory.GIBIBYTE / matrix_bytes)).rows
    assert row.missing == "needs about 4.5 GiB, 3.0 GiB are free"
    assert not ran


def test_nothing_is_called_first_while_the_turn_on_the_gpu_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first call may tune in a child, which waits for that turn: with gradients or without, it comes before."""
    held, calls = [False], []

    @contextmanager
    def turn(_gpu: str) -> Iterator[bool]:
        held[0] = True
        yield True

    def provider(inputs: Inputs) -> torch.Tensor:
        calls.append((torch.is_grad_enabled(), held[0]))
        return ours(inputs)

    monkeypatch.setattr(comparison, "turn", turn)
    compared(SHAPE.model_copy(update={"nheads": 1}), planted=Provider(provider))
    before = {with_gradients for with_gradients, during in calls if not during}
    assert before == {True, False} == {with_gradients for with_gradients, during in calls if during}


def test_times_are_told_as_multiples_of_ours_and_in_useful_work() -> None:
    """Ours is 1 by definition; TFLOP/s count half of a causal square, 2.5 times that backward."""
    found = compared(SHAPE.model_copy(update={"nheads": 1}), ("ours", "sdpa-concat"))
    mine, peer = (row.forward for row in found.rows)
    assert mine is not None
    assert peer is not None
    assert (mine.over_ours, mine.samples) == (1.0, 1)
    assert peer.over_ours == pytest.approx(peer.ms / mine.ms)
    useful = 4 * 24 * 24 * 16 / 2
    assert mine.tflops == pytest.approx(useful / mine.ms / 1e9)
    backward = found.rows[0].backward
    assert backward is not None
    assert backward.tflops == pytest.approx(2.5 * useful / backward.ms / 1e9)


def test_graphs_that_do_not_fit_in_memory_together_are_timed_in_turn_each_beside_ours() -> None:
    """Every group is led by ours and fits, but for one that would fit in none: it may try alone."""
    held = {"ours": 1, "a": 2, "b": 3, "c": 4, "d": 40}
    assert times.groups(held, 7) == [["ours", "a", "b"], ["ours", "c"], ["ours", "d"]]
    assert times.groups({"ours": 1}, 7) == [["ours"]]
    assert times.groups({"b": 3, "a": 2}, 4) == [["a"], ["b"]]


def test_a_group_that_runs_out_of_memory_is_taken_apart() -> None:
    """Whoever fits beside ours is timed, whoever does not has no figures, and ours has some in any case."""
    alive: list[str] = []

    def build(name: str) -> times.Launch:
        alive.append(name)
        if name == "huge" or len(alive) > 2:
            alive.clear()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return lambda: alive.clear() if name == alive[-1] else None

    found = times.in_groups([["ours", "a", "b"], ["ours", "huge"]], build, 1, CPU, 1.0)
    assert sorted(found) == ["a", "b", "ours"]
    assert times.in_groups([["huge"]], build, 1, CPU, 1.0) == {}
