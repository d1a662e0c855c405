"""The zoo in Triton's interpreter: every bad kernel that it can express ends as its own verdict, and the caller lives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import autotune
from autotune import Settings, resolve
from autotune.device import describe
from autotune.gate.proof import prove
from autotune.gate.rig import Rig, allocate
from autotune.spec import Tensors
from cache_db import open_layers
from cache_db.models import Problem, Verdict
from flashbias.kernels.spec import ATTENTION
from tests.autotune.softmax_spec import Ready, SoftmaxSpec, softmax_config, softmax_problem
from tests.zoo.faults import ZOO, Buffers, spoil
from tests.zoo.keeper import KERNELS, Cages, behind, cages, home
from tests.zoo.zoo_spec import SPEC, bearer, healthy, planted, slow

DEVICE = describe(-1)
HANGING = "endless_loop"
EXPRESSIBLE = [fault for fault, exhibit in ZOO.items() if exhibit.interpreted and fault != HANGING]


@pytest.fixture(scope="module")
def zoo() -> Iterator[Cages]:
    """One pair of sandboxes for all tests here, so that a fault that leaked would spoil the next verdict."""
    with cages(DEVICE, trial_seconds=60) as found:
        yield found


@pytest.fixture
def fresh_process() -> Iterator[None]:
    """Makes a test start like a new process."""
    autotune.forget()
    yield
    autotune.forget()


@pytest.mark.parametrize("fault", EXPRESSIBLE)
def test_every_fault_ends_as_its_own_verdict(zoo: Cages, fault: str) -> None:
    """A bad kernel's verdict is the one its fault deserves, with a reason that names it, and no level."""
    outcome = zoo.show(fault)
    assert (outcome.verdict, outcome.level) == (ZOO[fault].verdict, 0), outcome.reason
    assert ZOO[fault].reason in outcome.reason


def test_a_kernel_that_never_ends_is_timed_out() -> None:
    """The child is killed when the time of one trial is over."""
    with cages(DEVICE, trial_seconds=3) as short:
        outcome = short.show(HANGING)
    assert outcome.verdict is Verdict.TIMEOUT
    assert outcome.seconds >= 3


@pytest.mark.parametrize("fault", [fault for fault, exhibit in ZOO.items() if not exhibit.interpreted])
def test_what_only_a_gpu_can_show(fault: str) -> None:
    """The interpreter runs programs one after another and has no shared memory: tests/gpu shows these."""
    pytest.skip(f"{fault}: {ZOO[fault].sentence}, which the interpreter cannot express")


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_good_config_is_safe_after_all_of_them(zoo: Cages, kernel: str) -> None:
    """What a bad candidate did never becomes the next one's verdict."""
    outcome = zoo.show_good(kernel, level=2)
    assert (outcome.verdict, outcome.level, outcome.reason) == (Verdict.SAFE, 2, "")


def test_the_unaligned_fault_is_accepted_where_everything_is_aligned(zoo: Cages) -> None:
    """What is proven is a problem of one layout, not a config."""
    config = planted(bearer("unaligned", DEVICE), "unaligned")
    assert zoo.sandboxes["aligned"].prove("forward", config, {}, 2, 3).safe


def launched(problem: Problem, case_name: str, seqlen: int = 0) -> tuple[Tensors, Tensors]:
    """Returns the inputs of a case of the forward and what a good config makes of them, at another length if given."""
    case = next(case for case in SPEC.cases(problem, DEVICE) if case.name == case_name)
    if seqlen:
        case = type(case)(case.name, {**case.sizes, "seqlen_q": seqlen, "seqlen_k": seqlen})
    config = slow(DEVICE)
    inputs = SPEC.inputs(problem, case, 0, DEVICE.torch_device)
    outputs, scratch = (
        allocate(specs, DEVICE.torch_device)
        for specs in (SPEC.outputs("forward", problem, case), SPEC.scratch("forward", problem, config, case))
    )
    SPEC.launch("forward", SPEC.compile("forward", config, problem, DEVICE), problem, inputs, outputs, scratch)
    return inputs, outputs


@pytest.mark.parametrize(("fault", "case", "seqlen"), [("ragged_lengths", "ragged", 64), ("large_logits", "ragged", 0)])
def test_a_hidden_fault_changes_no_bit_where_it_hides(fault: str, case: str, seqlen: int) -> None:
    """Whole tiles and small logits show nothing of kernels that are wrong elsewhere: only the right case finds them."""
    inputs, outputs = launched(home(DEVICE), case, seqlen)
    before = {name: tensor.clone() for name, tensor in outputs.items()}
    spoil(fault, Buffers(inputs, outputs, 0.25))
    assert all(torch.equal(tensor, before[name]) for name, tensor in outputs.items())


def test_a_fault_is_no_part_of_attention() -> None:
    """Attention itself refuses a config that names a fault, and the zoo one whose fault sits in another kernel."""
    problem, config = home(DEVICE), planted(slow(DEVICE), "zeroed_row")
    assert ATTENTION.rejects("forward", config, problem, DEVICE) is not None
    assert SPEC.rejects("forward", config, problem, DEVICE) is None
    assert SPEC.rejects("backward_dq", config, problem, DEVICE) is not None
    assert SPEC.rejects("forward", planted(slow(DEVICE), "unheard_of"), problem, DEVICE) is not None
    assert healthy(config) == slow(DEVICE)


@pytest.mark.usefixtures("fresh_process")
def test_a_whole_sweep_chooses_the_one_good_config_among_bad_ones(tmp_path: Path) -> None:
    """A kernel that takes its process along and one that is subtly wrong are stored as such; the slow good one wins."""
    faults = ("illegal_access", "scaled_lse")
    problem = home(DEVICE, grads=(), faults=" ".join(faults))
    found = resolve(problem, DEVICE, Settings(cache_dir=tmp_path, finish=True))
    assert found.choices["forward"].config == slow(DEVICE)
    assert found.choices["forward"].rung == "winner"
    stored = {trial.config: trial.verdict for trial in open_layers(tmp_path).trials(problem, "forward")}
    for fault in faults:
        assert stored[planted(bearer(fault, DEVICE), fault)] is ZOO[fault].verdict
    assert not behind("forward", problem, DEVICE)


def test_the_page_on_proofs_lists_the_whole_zoo() -> None:
    """What a reader is promised is caught is what is planted, with the verdict it must end in, and nothing else."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "proof.md").read_text(encoding="utf-8")
    lines = page.partition("## The zoo")[2].partition("All but the race")[0].splitlines()
    listed = [line.rpartition("|")[0].rpartition("|")[0] for line in lines if line.startswith("|")][2:]
    assert listed == [f"| {each.kernel} | {each.sentence} | `{each.verdict}` " for each in ZOO.values()]


class StruckOnce(SoftmaxSpec):
    """A softmax whose launch number ``struck`` gives another bit than all others."""

    def __init__(self, struck: int) -> None:
        self._struck = struck
        self._launches = 0

    def launch(
        self, kernel: str, compiled: Ready, problem: Problem, inputs: Tensors, outputs: Tensors, scratch: Tensors
    ) -> None:
        """Runs the softmax, and changes one element by half a part in a million where it is its time."""
        super().launch(kernel, compiled, problem, inputs, outputs, scratch)
        if self._launches == self._struck:
            outputs["y"][0, 0] *= 1 + 2**-21
        self._launches += 1


@pytest.mark.parametrize("struck", [0, 1])
def test_a_race_is_one_in_whichever_of_both_runs_it_strikes(struck: int) -> None:
    """A rare race that meets the run on the other filling is no read of uninitialised memory."""
    rig = Rig(StruckOnce(struck), softmax_problem(), DEVICE)
    proof = prove(rig, "forward", softmax_config(), {}, level=1, seed=3)
    assert proof.verdict is Verdict.RACY, proof.reason
