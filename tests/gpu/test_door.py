"""The researcher's door on a GPU: what every launched trial tells of its kernel, and one config alone under a profiler."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import autotune
from autotune import Settings, resolve
from autotune.device import describe
from cache_db import open_layers
from cache_db.models import Problem, Trial, Verdict
from flashbias.cli.main import main
from flashbias.kernels.problem import Shape, problem
from flashbias.kernels.spec import AttentionSpec
from tests.autotune.planted_spec import planted_problem
from tests.autotune.softmax_spec import softmax_config

pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).resolve().parents[2]
# Without factors and gradients a launch of the forward is one kernel, or two where it splits keys.
SHAPE = Shape(batch=2, nheads=16, seqlen_q=1024, seqlen_k=1024, headdim=64, dtype="bfloat16")
LAUNCHED = ("registers", "spills", "shared", "num_warps", "occupancy", "compile_seconds", "ms", "p20", "p80", "samples")
OURS = partial(Settings, implementations=("triton",))  # what others wrote has no registers to tell of
Command = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A database in which one forward has been tuned on the first GPU."""
    folder = tmp_path_factory.mktemp("door")
    autotune.forget()
    assert resolve(tuned(), describe(0), OURS(cache_dir=folder)).choices["forward"].rung == "winner"
    yield folder
    autotune.forget()


@pytest.fixture
def command(folder: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command on that database; returns exit code and stdout."""

    def command(*arguments: str) -> tuple[int, str]:
        code = main([*arguments, "--cache-dir", str(folder)])
        return code, capsys.readouterr().out

    return command


def tuned() -> Problem:
    """Returns the problem that the database is about."""
    return problem(SHAPE, describe(0))


def winner(folder: Path) -> Trial:
    """Returns the trial that won."""
    store = open_layers(folder)
    won = store.winners(tuned())["forward"]
    (found,) = (row for row in store.trials(tuned(), "forward") if row.config == won.config)
    return found


def names(trial: Trial) -> list[str]:
    """Returns the flags that name ``trial``."""
    return ["--key", trial.problem.key(trial.kernel), "--config", trial.config.hash]


def most_warps(registers: int, num_warps: int, shared: int) -> int:
    """Returns how many warps of such blocks one multiprocessor of compute capability 9.0 holds.

    By CUDA's occupancy rules: 65,536 registers in four parts, given to warps by 256; 233,472 bytes of shared memory, of
    which each block takes 1,024 more than it asks for, in steps of 128; 64 warps and 32 blocks.
    """
    by_warp = -(-32 * registers // 256) * 256
    by_registers = 4 * (65536 // 4 // by_warp) // num_warps
    by_shared = 233472 // (-(-(shared + 1024) // 128) * 128)
    return num_warps * min(by_registers, by_shared, 64 // num_warps, 32)


def test_every_trial_that_was_launched_has_its_figures(folder: Path, command: Command) -> None:
    """Proven, refused or only timed: registers, spills, shared memory, warps, occupancy and times are all there."""
    code, output = command("trials", "--format", "csv")
    assert code == 0
    rows = [row for row in csv.DictReader(io.StringIO(output, newline="")) if row["ms"]]
    assert len(rows) > 4
    for row in rows:
        assert all(row[name] for name in LAUNCHED), row
        assert 0 < float(row["occupancy"]) <= 1
        assert 16 <= int(row["registers"]) <= 255
        assert float(row["p20"]) <= float(row["p50"]) <= float(row["p80"])
    assert [row["config_hash"] for row in rows if row["winner"] == "true"] == [winner(folder).config.hash]


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
    reason="the rules that the expected numbers follow are those of compute capability 9.0",
)
def test_occupancy_is_what_registers_and_shared_memory_say(folder: Path, command: Command) -> None:
    """The driver's answer is that of CUDA's published rules, for every config of the sweep."""
    rows = [json.loads(line)["figures"] for line in command("trials", "--format", "jsonl")[1].splitlines()]
    launched = [row for row in rows if "ms" in row]
    assert len({row["occupancy"] for row in launched}) > 1
    for row in launched:
        assert row["occupancy"] == most_warps(row["registers"], row["num_warps"], row["shared"]) / 64, row


def test_refused_and_timed_trials_of_a_foreign_kernel_have_their_times(tmp_path: Path) -> None:
    """A wrong config was launched and timed too: its trial tells the kernel's figures beside the reason."""
    device = describe(0)
    found = planted_problem("32:zeroed_row 64", "32", device=device)
    resolve(found, device, Settings(cache_dir=tmp_path))
    rows = {row.config: row for row in open_layers(tmp_path).trials(found, "forward")}
    wrong = rows[softmax_config(32, "zeroed_row")]
    assert wrong.verdict is Verdict.WRONG
    assert {"shared", "ms", "p20", "p80", "samples", "compile_seconds"} <= wrong.figures.keys()


def test_saved_machine_code_is_what_was_proven_even_without_a_gpu(folder: Path, tmp_path: Path) -> None:
    """A process that sees no GPU makes the very binary that the sweep judged here."""
    row = winner(folder)
    command = [sys.executable, "-m", "flashbias", "ptx", *names(row), "--cache-dir", str(folder)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [*command, "--output", str(tmp_path)], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert f"binary    {row.binary[:12]}, that of the trial" in done.stdout
    assert {path.suffix for path in tmp_path.glob("forward-*")} >= {
        ".ttir",
        ".ttgir",
        ".llir",
        ".ptx",
        ".cubin",
        ".json",
    }


def test_profiler_is_on_for_exactly_the_launches_asked_for(
    folder: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warming up and timing come before the profiler's start; between start and stop there are N launches."""
    events: list[str] = []

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            events.append(name)
            return function(*arguments)

        return run

    monkeypatch.setattr(torch.cuda.profiler, "start", noted("start", torch.cuda.profiler.start))
    monkeypatch.setattr(torch.cuda.profiler, "stop", noted("stop", torch.cuda.profiler.stop))
    monkeypatch.setattr(AttentionSpec, "launch", noted("launch", AttentionSpec.launch))
    code, output = command("run", *names(winner(folder)), "--iterations", "7")
    assert code == 0
    first, last = events.index("start"), events.index("stop")
    assert events[first + 1 : last] == ["launch"] * 7
    assert set(events[:first]) == {"launch"}  # once to warm up, once into the graph that is timed
    assert events[last + 1 :] == []
    told = re.search(r"of (\d+) launches, with a cold L2", output)
    dropped = re.search(r"^throttled +(\d+)$", output, re.MULTILINE)
    assert told is not None
    assert dropped is not None
    assert int(told.group(1)) + int(dropped.group(1)) == 7


def test_time_and_figures_of_a_run_are_those_of_the_sweep(folder: Path, command: Command) -> None:
    """The same binary at the same size takes the same time within 20 %, and has the same registers."""
    row = winner(folder)
    code, output = command("run", *names(row), "--iterations", "50")
    assert code == 0
    told = re.search(r"^time +(\S+) ms", output, re.MULTILINE)
    assert told is not None
    assert float(told[1]) == pytest.approx(float(row.figures["ms"]), rel=0.2)
    for name in ("registers", "spills", "shared", "num_warps"):
        assert re.search(rf"^{name} +{row.figures[name]}$", output, re.MULTILINE), output


@pytest.mark.skipif(shutil.which("ncu") is None, reason="ncu is not installed")
def test_ncu_sees_the_launches_and_nothing_else(folder: Path) -> None:
    """The command line of docs/research.md profiles N kernels, all of them this one."""
    row = winner(folder)
    flashbias = [sys.executable, "-m", "flashbias", "run", *names(row), "--iterations", "3", "--cache-dir", str(folder)]
    metrics = ["--metrics", "launch__registers_per_thread"]
    done = subprocess.run(
        ["ncu", "--profile-from-start", "off", *metrics, *flashbias],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if "ERR_NVGPUCTRPERM" in done.stdout + done.stderr:
        pytest.skip("this user may not read the GPU's performance counters")
    assert done.returncode == 0, done.stdout + done.stderr
    seen = re.findall(r'==PROF== Profiling "([^"]*)"', done.stdout + done.stderr)
    assert len(seen) == 3 * (1 + row.config.variant.startswith("split"))
    assert set(seen) <= {"forward", "combine_forward"}
    assert f"{row.figures['registers']}" in re.findall(r"launch__registers_per_thread +\S+ +(\d+)", done.stdout)
