"""Pins and spaces on a real GPU: what is pinned is launched, outlasts a retune and can be taken back; own configs are judged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import autotune
from autotune.device import describe
from autotune.tuner import Resolution
from cache_db import open_layers
from cache_db.models import FINAL, Problem, Verdict
from flashbias import flash_bias_func, plans
from flashbias.cli import prewarm
from flashbias.cli.main import main
from flashbias.kernels import space
from flashbias.kernels.problem import GRADIENTS, Shape, problem
from flashbias.settings import current, settings
from tests.gpu.test_operator import TUNED, assert_right, make

pytestmark = pytest.mark.timeout(600)

INFERENCE = ["--nheads", "4", "--seqlen-q", "700", "--headdim", "64", "--rank", "8", "--grads", "none"]
# Four stages are within the rules and not among the library's own; 48 queries are not within them.
EXTRA = space.config(space.POINTERS, 64, 64, 4, 4)
OWN = [("forward", EXTRA), ("forward", space.config(space.POINTERS, 48, 64, 4, 2)), ("backward_dq", EXTRA)]


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    """Makes each test start, and leave, like a new process."""
    forget()
    yield
    forget()


def forget() -> None:
    """Has the next call decide anew, as a new process would."""
    autotune.forget()
    plans.forget()


def tuned_problem() -> Problem:
    """Returns the problem of ``TUNED`` with all gradients."""
    return problem(Shape(**TUNED, dtype="bfloat16", grads=GRADIENTS), describe(0))


def called() -> Resolution:
    """Calls the operator and its backward as a new process would, judges the results, and returns what it decided."""
    forget()
    tensors = make(**TUNED)
    out = flash_bias_func(*tensors[:5], causal=True)
    out.backward(tensors[5])
    assert_right(tensors, out, causal=True)
    found = autotune.resolve(tuned_problem(), describe(0), current())
    (plan,) = plans._plans.values()
    assert {name: binary.binary for name, binary in plan.binaries.items()} == {
        name: choice.binary for name, choice in found.choices.items()
    }
    return found


def test_pinned_forward_runs_outlasts_a_retune_and_gives_way_to_the_winner(tmp_path: Path) -> None:
    """The default, proven and pinned, is what is launched, the backward behind it; unpinned, the first winner is back."""
    found = tuned_problem()
    with settings(cache_dir=tmp_path, implementations=("triton",)):
        winner = called().choices["forward"].config
    pinned = space.default("forward", found, describe(0))
    if pinned == winner:
        pinned = space.config(space.POINTERS, 64, 32, 4, 1)
    params = "{" + ", ".join(f'"{name}": {value}' for name, value in pinned.params.items()) + "}"
    spelled = ["--params", params, "--variant", pinned.variant, "--cache-dir", str(tmp_path)]
    assert main(["pin", "--key", found.key("forward"), *spelled]) == 0
    proof = open_layers(tmp_path).verifications(found, "forward")[-1]
    assert (proof.config, proof.verdict, proof.level, len(proof.binary)) == (pinned, Verdict.SAFE, 2, 64)
    with settings(cache_dir=tmp_path, implementations=("triton",)):
        first = called()
    with settings(cache_dir=tmp_path, mode="retune", budget_seconds=30, implementations=("triton",)):
        retuned = called()
    assert retuned.choices["backward_dq"].rung == "winner"
    for resolution in (first, retuned):
        forward = resolution.choices["forward"]
        assert (forward.rung, forward.config, forward.level) == ("pinned", pinned, 2)
    assert open_layers(tmp_path).winners(found)["forward"].config == winner
    assert main(["unpin", "--key", found.key("forward"), "--cache-dir", str(tmp_path)]) == 0
    with settings(cache_dir=tmp_path, implementations=("triton",)):
        last = called().choices["forward"]
    assert (last.rung, last.config) == ("winner", winner)


def test_config_that_the_device_cannot_run_is_not_pinned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What spills, or needs more shared memory than there is, is refused by the rules; nothing is pinned."""
    assert prewarm.main([*INFERENCE, "--cache-dir", str(tmp_path), "--budget", "60"]) in (
        prewarm.DONE,
        prewarm.UNFINISHED,
    )
    found = inference()
    spelled = ["--params", '{"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 2, "num_stages": 4}', "--variant", "pointers"]
    assert main(["pin", "--key", found.key("forward"), *spelled, "--cache-dir", str(tmp_path)]) == 1
    assert "nothing is pinned" in capsys.readouterr().err
    assert open_layers(tmp_path).pins(found) == {}


def test_config_of_ones_own_is_tried_and_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prewarming an already tuned problem with a space tries what that adds, and says what the rules refuse."""
    assert prewarm.main([*INFERENCE, "--cache-dir", str(tmp_path)]) == prewarm.DONE
    before = open_layers(tmp_path).winners(inference())["forward"]
    forget()
    own = f"{__name__}:OWN"
    assert prewarm.main([*INFERENCE, "--cache-dir", str(tmp_path), "--space", own]) == prewarm.DONE
    assert f"{own}: 1 configs for forward, 1 refused by the rules, the first: " in capsys.readouterr().out
    (trial,) = (row for row in open_layers(tmp_path).trials(inference(), "forward") if row.config == EXTRA)
    assert trial.verdict in FINAL
    after = open_layers(tmp_path).winners(inference())["forward"]
    assert (after.total, after.complete) == (before.total + 1, True)


def inference() -> Problem:
    """Returns the problem of the flags ``INFERENCE``."""
    return problem(Shape(batch=1, nheads=4, seqlen_q=700, seqlen_k=700, headdim=64, rank=8), describe(0))
