"""Real kernels with planted faults through the whole gate, each in a child: every fault has its own verdict."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from autotune.device import describe
from autotune.errors import NoRoom
from autotune.gate.proof import prove
from autotune.gate.races import REPEATS
from autotune.gate.rig import Rig
from autotune.sandbox import GateFault, Limits, Sandbox
from autotune.spec import Case, Tensors
from cache_db.models import Problem, Verdict
from tests.autotune.softmax_spec import SoftmaxSpec, softmax_config, softmax_problem

SEED = 3
THROUGH = {"forward": softmax_config()}


class DrawnSpec(SoftmaxSpec):
    """The softmax, with the names of the cases that inputs were drawn for, in order."""

    def __init__(self) -> None:
        self.drawn: list[str] = []

    def inputs(self, problem: Problem, case: Case, seed: int, device: torch.device) -> Tensors:
        """Returns the softmax's."""
        self.drawn.append(case.name)
        return super().inputs(problem, case, seed, device)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    """One sandbox for all tests here, so that a fault that leaked would spoil the next verdict."""
    with Sandbox(softmax_problem(), describe(-1), Limits(trial_seconds=60)) as sandbox:
        yield sandbox


def test_a_good_forward_is_safe_at_level_2_with_figures_for_every_output(sandbox: Sandbox) -> None:
    """A right kernel passes, and its outcome tells by how much."""
    outcome = sandbox.prove("forward", softmax_config(), {}, 2, SEED)
    assert (outcome.verdict, outcome.level, outcome.reason) == (Verdict.SAFE, 2, "")
    assert outcome.seed == SEED
    assert outcome.figures["repeats"] == 2
    for output in ("y", "lse"):
        assert 0 <= float(outcome.figures[f"{output}_ratio"]) <= 1
        assert float(outcome.figures[f"{output}_error"]) < 1e-5
    assert outcome.figures["worst_case"] in {"ragged", "large", "dead row"}


def test_a_good_backward_is_safe_through_the_forward_it_will_run_with(sandbox: Sandbox) -> None:
    """A dependent kernel is judged on what its forward really produced."""
    assert sandbox.prove("backward", softmax_config(64), THROUGH, 2, SEED).safe


def test_a_good_backward_is_wrong_through_a_wrong_forward(sandbox: Sandbox) -> None:
    """Gradients are judged end to end: a right backward on a wrong y has a wrong dx."""
    through = {"forward": softmax_config(fault="zeroed_row")}
    outcome = sandbox.prove("backward", softmax_config(), through, 2, SEED)
    assert outcome.verdict is Verdict.WRONG
    assert "'dx'" in outcome.reason


@pytest.mark.parametrize(
    ("fault", "verdict", "reason"),
    [
        ("zeroed_row", Verdict.WRONG, "'y' is off by 1 in row 3"),
        ("foreign_row", Verdict.WRONG, "'y' is off by"),
        ("lse_off", Verdict.WRONG, "'lse' is off by"),
        ("unwritten_tail", Verdict.WRONG, "never wrote 7 of 133 elements of 'y'"),
        ("overflows", Verdict.WRONG, "are NaN on case 'large'"),
        ("reads_scratch", Verdict.WRONG, "are NaN on case 'ragged'"),
        ("past_end", Verdict.OUT_OF_BOUNDS, "past the end of 'y'"),
        ("modifies_input", Verdict.OUT_OF_BOUNDS, "modified 'x'"),
        ("racy", Verdict.RACY, "'y' differs from run to run"),
        ("races_late", Verdict.RACY, "repeats differ on case 'race'"),
        ("raises_at_compile", Verdict.COMPILE_ERROR, "ValueError: planted"),
        ("raises_at_launch", Verdict.CRASHED, "RuntimeError: planted"),
        ("out_of_resources", Verdict.OUT_OF_RESOURCES, "shared memory"),
        ("out_of_memory", Verdict.KILLED, "OutOfMemoryError"),
        ("aborts_at_launch", Verdict.CRASHED, "SIGABRT"),
        ("illegal_access", Verdict.CRASHED, "SIGSEGV"),
        ("killed_at_launch", Verdict.KILLED, "killed from outside"),
    ],
)
def test_every_planted_fault_has_its_own_verdict(sandbox: Sandbox, fault: str, verdict: Verdict, reason: str) -> None:
    """A faulty forward ends as what it is, with a reason a person can act on and no level."""
    outcome = sandbox.prove("forward", softmax_config(fault=fault), {}, 2, SEED)
    assert outcome.verdict is verdict
    assert reason in outcome.reason
    assert outcome.level == 0


def test_a_backward_that_modifies_the_forwards_output_is_out_of_bounds(sandbox: Sandbox) -> None:
    """What an earlier kernel produced is an input like any other."""
    outcome = sandbox.prove("backward", softmax_config(fault="modifies_input"), THROUGH, 2, SEED)
    assert outcome.verdict is Verdict.OUT_OF_BOUNDS
    assert "modified 'y'" in outcome.reason


def test_a_good_config_is_still_safe_after_all_the_faults(sandbox: Sandbox) -> None:
    """A candidate's fault never becomes the next one's verdict."""
    sandbox.prove("forward", softmax_config(fault="past_end"), {}, 2, SEED)
    sandbox.prove("forward", softmax_config(fault="modifies_input"), {}, 2, SEED)
    assert sandbox.prove("forward", softmax_config(), {}, 2, SEED).safe


def test_level_1_runs_the_first_case_only(sandbox: Sandbox) -> None:
    """The quick level passes what only a later case shows."""
    overflowing = softmax_config(fault="overflows")
    outcome = sandbox.prove("forward", overflowing, {}, 1, SEED)
    assert (outcome.verdict, outcome.level) == (Verdict.SAFE, 1)


def test_the_number_of_race_repeats_can_be_asked_for(sandbox: Sandbox) -> None:
    """A winner's long screen runs as many repeats as it is told and says so."""
    outcome = sandbox.prove("forward", softmax_config(), {}, 2, SEED, repeats=7)
    assert outcome.figures["repeats"] == 7


def test_a_winners_screen_finds_what_races_only_at_the_size_that_is_timed(sandbox: Sandbox) -> None:
    """More repeats than a survivor's mean the representative case too; a survivor's proof stays short."""
    racer = softmax_config(fault="races_at_scale")
    assert sandbox.prove("forward", racer, {}, 2, SEED).safe
    outcome = sandbox.prove("forward", racer, {}, 2, SEED, repeats=REPEATS[2] + 1)
    assert outcome.verdict is Verdict.RACY
    assert "case 'representative'" in outcome.reason


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_a_racer_is_not_screened_again_at_the_size_that_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first screen's verdict is out: no inputs are drawn for the second, which a good one goes through."""
    monkeypatch.setitem(REPEATS, 2, 3)
    last = {}
    for fault in ("", "races_late"):
        spec = DrawnSpec()
        rig = Rig(spec, softmax_problem(), describe(-1))
        proof = prove(rig, "forward", softmax_config(fault=fault), {}, level=2, seed=SEED, repeats=4)
        last[proof.verdict] = spec.drawn[-1]
    assert last == {Verdict.SAFE: "representative", Verdict.RACY: "race"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_low_precision_kernels_are_safe_on_their_own_budget(dtype: str) -> None:
    """The yardstick follows the problem's dtype."""
    with Sandbox(softmax_problem(dtype=dtype), describe(-1), Limits(trial_seconds=60)) as sandbox:
        assert sandbox.prove("forward", softmax_config(), {}, 1, SEED).safe
        faulty = sandbox.prove("forward", softmax_config(fault="lse_off"), {}, 1, SEED)
    assert faulty.verdict is Verdict.WRONG


def test_a_dependent_kernel_without_its_forwards_config_is_a_fault_of_the_gate(sandbox: Sandbox) -> None:
    """Nothing is judged through a forward nobody chose."""
    with pytest.raises(GateFault, match="no config of forward was given"):
        sandbox.prove("backward", softmax_config(), {}, 2, SEED)


def test_a_forward_that_does_not_run_is_not_its_backwards_fault(sandbox: Sandbox) -> None:
    """Nothing is stored of a kernel that could not be judged, because what it depends on raises or finds no memory."""
    with pytest.raises(GateFault, match=r"forward does not run as .*planted: this config does not launch"):
        sandbox.prove("backward", softmax_config(), {"forward": softmax_config(fault="raises_at_launch")}, 2, SEED)
    with pytest.raises(NoRoom, match="no room for case 'ragged'"):
        sandbox.prove("backward", softmax_config(), {"forward": softmax_config(fault="out_of_memory")}, 2, SEED)
    assert sandbox.prove("backward", softmax_config(), THROUGH, 1, SEED).safe


def test_an_oracle_that_fails_is_a_fault_of_the_gate_and_the_sandbox_lives(sandbox: Sandbox) -> None:
    """The candidate is not blamed for the spec, and the next one is judged."""
    with pytest.raises(GateFault, match="planted: no oracle for this seed"):
        sandbox.prove("forward", softmax_config(), {}, 2, 666)
    assert sandbox.prove("forward", softmax_config(), {}, 1, SEED).safe
