"""The zoo on a real GPU: every bad kernel ends as its own verdict, at real sizes, and the calling process lives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import autotune
from autotune import Settings, resolve
from autotune.device import describe
from autotune.sandbox import GateFault, Limits, Outcome, Sandbox
from autotune.search import WINNER_REPEATS
from cache_db import open_layers
from cache_db.models import Trial, Verdict
from tests.zoo.faults import ZOO
from tests.zoo.keeper import KERNELS, Cages, cages, home
from tests.zoo.zoo_spec import bearer, planted, slow

pytestmark = pytest.mark.timeout(400)

TRIAL_SECONDS = 10
SCREENS, FOUND_AT_LEAST = 100, 99
RACER = "rare_race"


@pytest.fixture(scope="module")
def zoo() -> Iterator[Cages]:
    """One pair of sandboxes on the first GPU for all tests here, so that a fault that leaked would spoil the next verdict."""
    with cages(describe(0), TRIAL_SECONDS) as found:
        yield found


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    """Makes each test start like a new process, and ends it only if this process's own context still works."""
    autotune.forget()
    yield
    autotune.forget()
    assert float(torch.ones(1000, device="cuda").sum()) == 1000


@pytest.mark.parametrize("fault", ZOO)
def test_every_fault_ends_as_its_own_verdict_and_a_good_config_is_judged_next(zoo: Cages, fault: str) -> None:
    """Whatever a bad kernel does to the GPU or to its child, its verdict is right and a good config passes afterwards."""
    outcome = zoo.show(fault)
    assert (outcome.verdict, outcome.level) == (ZOO[fault].verdict, 0), outcome.reason
    assert ZOO[fault].reason in outcome.reason
    good = zoo.show_good(layout=ZOO[fault].layout)
    assert (good.verdict, good.level, good.reason) == (Verdict.SAFE, 1, "")


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_good_config_of_every_kernel_is_safe_after_all_of_them(zoo: Cages, kernel: str) -> None:
    """Nothing of what the bad ones did is left."""
    outcome = zoo.show_good(kernel, level=2)
    assert (outcome.verdict, outcome.level, outcome.reason) == (Verdict.SAFE, 2, "")


def test_the_unaligned_fault_is_accepted_where_everything_is_aligned(zoo: Cages) -> None:
    """What is proven is a problem of one layout, not a config."""
    config = planted(bearer("unaligned", zoo.device), "unaligned")
    outcome = zoo.sandboxes["aligned"].prove("forward", config, {}, 2, 3)
    assert outcome.safe, outcome.reason


def test_a_candidate_that_took_all_memory_leaves_it_to_the_caller(zoo: Cages) -> None:
    """With its verdict out, what an allocation bomb held is free again."""
    assert zoo.show("allocation_bomb").verdict is Verdict.KILLED
    free, total = torch.cuda.mem_get_info()
    assert free > total / 2


def screened(sandbox: Sandbox, seed: int) -> Outcome | None:
    """Returns what a winner's screen makes of the racer on inputs of ``seed``, None where those prove nothing."""
    try:
        return sandbox.prove("forward", planted(bearer(RACER, describe(0)), RACER), {}, 2, seed, WINNER_REPEATS)
    except GateFault:
        return None


def test_a_racer_of_one_in_a_thousand_is_found_by_99_of_100_winners_screens() -> None:
    """Ten thousand repeats miss such a race less than once in ten thousand times."""
    device = describe(0)
    with Sandbox(home(device, grads=()), device, Limits(trial_seconds=TRIAL_SECONDS)) as sandbox:
        outcomes: list[Outcome] = []
        for seed in range(2 * SCREENS):
            outcome = screened(sandbox, seed)
            outcomes += [outcome] if outcome is not None else []
            if len(outcomes) == SCREENS:
                break
    assert len(outcomes) == SCREENS
    others = [outcome.reason for outcome in outcomes if outcome.verdict is not Verdict.RACY]
    assert len(others) <= SCREENS - FOUND_AT_LEAST, others


def stored(folder: Path, faults: str) -> dict[str, Trial]:
    """Returns the forward's trials of a sweep in ``folder``, by fault ("" for the good config)."""
    trials = open_layers(folder).trials(home(describe(0), grads=(), faults=faults), "forward")
    return {str(trial.config.params.get("fault", "")): trial for trial in trials}


@pytest.mark.parametrize("sweep", range(3))
def test_a_racer_loses_a_whole_sweep_to_a_slower_config(tmp_path: Path, sweep: int) -> None:
    """It is faster than the only good config, survives the short screen as often as not, and never wins."""
    device = describe(0)
    found = resolve(home(device, grads=(), faults=RACER), device, Settings(cache_dir=tmp_path))
    assert found.choices["forward"].config == slow(device)
    trials = stored(tmp_path, RACER)
    assert trials[RACER].verdict is Verdict.RACY, trials[RACER].reason
    assert float(trials[RACER].figures["ms"]) < float(trials[""].figures["ms"])


def test_a_whole_sweep_chooses_the_one_good_config_among_bad_ones(tmp_path: Path) -> None:
    """Five bad kernels of different kinds, one of which takes its compiler along, are stored as what they are."""
    faults = ("compiler_abort", "scaled_lse", "shared_memory", "writes_past_end", RACER)
    device, listed = describe(0), " ".join(faults)
    found = resolve(home(device, grads=(), faults=listed), device, Settings(cache_dir=tmp_path, budget_seconds=120))
    assert found.choices["forward"].config == slow(device)
    trials = stored(tmp_path, listed)
    assert {fault: trials[fault].verdict for fault in faults} == {fault: ZOO[fault].verdict for fault in faults}
    assert int(trials[""].figures["repeats"]) >= WINNER_REPEATS
