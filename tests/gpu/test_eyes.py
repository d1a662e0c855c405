"""The command line's eyes on a real GPU: doctor and env see it, and explain says before a call what it then does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import autotune
from autotune.device import describe
from flashbias import explain, flash_bias_func, plans
from flashbias.cli import prewarm
from flashbias.cli.main import main
from flashbias.settings import settings
from tests.gpu.test_operator import TUNED, make
from tests.scripts.command_cases import python

pytestmark = pytest.mark.timeout(600)

FLAGS = ["--nheads", "4", "--seqlen-q", "700", "--headdim", "64", "--rank", "8", "--grads", "none"]


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    """Makes each test start, and leave, like a new process."""
    autotune.forget()
    plans.forget()
    yield
    autotune.forget()
    plans.forget()


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    """Runs the command; returns its exit code and its JSON."""
    code = main([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_doctor_sees_the_gpu_and_makes_no_context(tmp_path: Path) -> None:
    """Model, mode, memory, clocks, driver and assembler are known; asking for them takes nothing of the GPU."""
    code = (
        "import sys, torch; from autotune import driver; from flashbias.cli.main import main\n"
        "code = main(['doctor', '--json', '--cache-dir', sys.argv[1]]); known = driver.started()\n"
        "assert known is not None and known.has_context(0) is False; sys.exit(code)"
    )
    done = python("-c", code, str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    checks = {each["name"]: each for each in json.loads(done.stdout)["checks"]}
    assert torch.cuda.get_device_name(0) in checks["gpu 0"]["told"]
    assert {checks[name]["state"] for name in ("torch", "driver", "gpu 0", "ptxas 0", "triton", "c compiler")} == {"ok"}
    assert checks["mode 0"]["told"] in {"Default", "Exclusive_Process"}
    if describe(0).uuid.startswith("GPU-"):
        assert "GiB free" in checks["memory 0"]["told"]
    assert list(tmp_path.iterdir()) == []


def test_env_tells_of_every_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Name, capability and driver are among the facts."""
    code, found = printed(capsys, "env", "--cache-dir", str(tmp_path))
    assert (code, found["gpus"], found["gpu.0"]) == (0, torch.cuda.device_count(), describe(0).name)
    assert (found["driver"], found["gpu.0.ptxas"]) == (
        describe(0).environment.driver,
        describe(0).environment.ptxas,
    )


def test_explain_foresees_a_prewarmed_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A miss is told with exit code 1, then the winner with 0; the command launches nothing and writes nothing."""
    code, found = printed(capsys, "explain", *FLAGS, "--cache-dir", str(tmp_path))
    assert (code, found["rows"][0]["doing"]) == (1, "tune")
    assert list(tmp_path.iterdir()) == []
    assert prewarm.main([*FLAGS, "--cache-dir", str(tmp_path), "--budget", "20"]) == 0
    capsys.readouterr()
    autotune.forget()
    before = (tmp_path / "flashbias.db").read_bytes()
    code, found = printed(capsys, "explain", *FLAGS, "--cache-dir", str(tmp_path))
    (row,) = found["rows"]
    assert (code, row["rung"], row["doing"]) == (0, "winner", "nothing")
    assert row["kernels"][0]["margins"]["out"]["budget_part"] <= 1
    assert row["kernels"][0]["tuned"]["gpu_uuid"] == describe(0).uuid
    assert (tmp_path / "flashbias.db").read_bytes() == before


def test_explain_of_tensors_is_what_their_call_runs(tmp_path: Path) -> None:
    """What is foreseen for every kernel of forward and backward is what the plan then holds, and is told as decided."""
    inputs = make(**TUNED)
    with settings(cache_dir=tmp_path, budget_seconds=20):
        assert explain(*inputs[:5], causal=True).rung == "none"
        out = flash_bias_func(*inputs[:5], causal=True)
        out.backward(inputs[5])
        autotune.forget()
        plans.forget()
        found = explain(*inputs[:5], causal=True)
        assert (found.rung, found.proven) == ("winner", True)
        flash_bias_func(*inputs[:5], causal=True)
        (plan,) = plans._plans.values()
        told = {each["kernel"]: each["binary"] for each in found.to_json()["kernels"]}
        assert {name: binary.binary for name, binary in plan.binaries.items()} == told
        assert "this process has decided so" in str(explain(*inputs[:5], causal=True))
