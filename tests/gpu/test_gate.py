"""The gate and its children on a real GPU: planted faults in a foreign kernel, sticky errors, timing."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from autotune.device import describe
from autotune.sandbox import Limits, Sandbox
from cache_db.models import Verdict
from tests.autotune.softmax_spec import softmax_config, softmax_problem

SEED = 5


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    """One sandbox on the first GPU for all tests here."""
    device = describe(0)
    with Sandbox(softmax_problem(device, columns=1000, dtype="bfloat16"), device, Limits(trial_seconds=15)) as sandbox:
        yield sandbox


GOOD = softmax_config(1024)
THROUGH = {"forward": GOOD}


def test_the_binary_that_is_proven_is_the_binary_that_was_compiled(sandbox: Sandbox) -> None:
    """The compiler's forks and the runner agree on the machine code by its hash."""
    items = [("forward", GOOD), ("backward", GOOD)]
    binaries = {kernel: outcome.binary for kernel, _, outcome in sandbox.compile(items)}
    forward, backward = sandbox.prove("forward", GOOD, {}, 2, SEED), sandbox.prove("backward", GOOD, THROUGH, 2, SEED)
    assert (forward.verdict, forward.reason) == (Verdict.SAFE, "")
    assert (backward.verdict, backward.reason) == (Verdict.SAFE, "")
    assert binaries == {"forward": forward.binary, "backward": backward.binary}
    assert forward.figures["repeats"] == 300


@pytest.mark.parametrize(
    ("fault", "verdict"),
    [
        ("zeroed_row", Verdict.WRONG),
        ("foreign_row", Verdict.WRONG),
        ("lse_off", Verdict.WRONG),
        ("unwritten_tail", Verdict.WRONG),
        ("overflows", Verdict.WRONG),
        ("reads_scratch", Verdict.WRONG),
        ("past_end", Verdict.OUT_OF_BOUNDS),
        ("modifies_input", Verdict.OUT_OF_BOUNDS),
        ("racy", Verdict.RACY),
        ("races_late", Verdict.RACY),
        ("illegal_access", Verdict.CRASHED),
        ("aborts_at_launch", Verdict.CRASHED),
        ("hangs_at_launch", Verdict.TIMEOUT),
    ],
)
def test_every_planted_fault_has_its_own_verdict_and_the_next_config_is_judged(
    sandbox: Sandbox, fault: str, verdict: Verdict
) -> None:
    """Whatever a candidate does to the GPU, its verdict is right and a good config passes afterwards."""
    outcome = sandbox.prove("forward", softmax_config(1024, fault), {}, 2, SEED)
    assert (outcome.verdict, outcome.level) == (verdict, 0), outcome.reason
    assert sandbox.prove("forward", GOOD, {}, 1, SEED).safe


def test_timing_leaves_out_what_crashes_and_agrees_with_itself(sandbox: Sandbox) -> None:
    """An illegal access during a measurement costs only its own config; two measurements agree within 20 %."""
    configs = [GOOD, softmax_config(1024, "illegal_access"), softmax_config(2048)]
    first = sandbox.measure("forward", configs, {}, 20)
    assert first.keys() == {configs[0].hash, configs[2].hash}
    second = sandbox.measure("forward", configs[:1], {}, 20)
    once, again = float(first[GOOD.hash]["ms"]), float(second[GOOD.hash]["ms"])
    # 131 MB are moved: no GPU does that in 10 us, and none that Triton supports needs a millisecond.
    assert 0.01 < once < 1
    assert again == pytest.approx(once, rel=0.2)


def test_clock_and_temperature_are_noted(sandbox: Sandbox) -> None:
    """A long measurement says how fast the multiprocessors ran and how warm the GPU was."""
    figures = sandbox.measure("forward", [GOOD, softmax_config(2048)], {}, 30)
    for each in figures.values():
        assert 300 < float(each["sm_mhz"]) < 3000
        assert 10 < float(each["temperature_c"]) < 110
        assert int(each["samples"]) + int(each["throttled"]) == 30
    assert min(float(each["paired"]) for each in figures.values()) <= 1


def test_a_warm_proof_takes_less_than_a_second(sandbox: Sandbox) -> None:
    """With inputs and answers at hand a candidate costs the gate little."""
    assert sandbox.prove("forward", GOOD, {}, 2, SEED).safe
    started = time.monotonic()
    assert sandbox.prove("forward", GOOD, {}, 2, SEED).safe
    assert time.monotonic() - started < 1
