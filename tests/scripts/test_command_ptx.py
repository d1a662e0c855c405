"""``flashbias ptx``: a stored trial's kernel, compiled again for a GPU that need not be here."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import triton

from autotune.device import DeviceInfo, ptxas_version
from autotune.remake import target
from cache_db import open_layers
from cache_db.models import Config, Environment, Problem, Trial, Verdict, Verification
from flashbias.cli.main import main
from flashbias.kernels import space
from flashbias.kernels.arguments import compile_kernel
from flashbias.kernels.problem import problem
from tests.autotune.softmax_spec import softmax_config, softmax_problem
from tests.flashbias.test_compile import HOPPER, SHAPE, shared_memory
from tests.flashbias.test_split_compile import DECODE
from tests.scripts.command_cases import GOOD, KEY, Run

DEVICE = replace(HOPPER, name="NVIDIA H200", triton_version=triton.__version__)
ENVIRONMENT = Environment(driver="580.1", ptxas=ptxas_version(90), torch="2.0")
STAGES = {"ttir", "ttgir", "llir", "ptx", "cubin"}
Ptx = Callable[..., tuple[int, str, str]]


def stored(found: Problem, config: Config, **changes: Any) -> Trial:
    """Returns a safe forward trial of ``config``, as an H200 would have stored it."""
    row = Trial(
        problem=found,
        kernel="forward",
        config=config,
        verdict=Verdict.SAFE,
        level=2,
        figures={"ms": 0.5, "registers": 168},
        environment=ENVIRONMENT,
        gpu_uuid="GPU-1",
        host="node-7",
        created_at=1.0,
        seconds=1.0,
    )
    return row.model_copy(update=changes)


@pytest.fixture
def ptx(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Ptx:
    """Stores a trial, runs the command on it with the folder ``out``; returns exit code, stdout and stderr."""

    def ptx(row: Trial, *more: str) -> tuple[int, str, str]:
        open_layers(tmp_path).add_trial(row)
        names = ["--key", row.problem.key(row.kernel), "--config", row.config.hash, "--spec", row.problem.spec, *more]
        code = main(["ptx", *names, "--output", str(tmp_path / "out"), "--cache-dir", str(tmp_path)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return ptx


@pytest.mark.compile_only
def test_every_stage_of_the_binary_that_was_judged_is_saved(ptx: Ptx, tmp_path: Path) -> None:
    """Triton's IR, LLVM's, PTX and machine code, and a JSON that says that they are the trial's."""
    found = problem(SHAPE, DEVICE)
    config = space.default("forward", found, DEVICE)
    binary = compile_kernel("forward", config, found, DEVICE)
    code, output, errors = ptx(stored(found, config, binary=binary.binary))
    assert (code, errors) == (0, "")
    stem = f"forward-{config.hash[:12]}"
    files = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert {f"{stem}.{stage}" for stage in (*STAGES, "json")} <= files.keys()
    assert all(str(path) in output for path in files.values())
    assert f"binary    {binary.binary[:12]}, that of the trial" in output
    assert ".target sm_90a" in files[f"{stem}.ptx"].read_text(encoding="utf-8")
    assert files[f"{stem}.cubin"].read_bytes() == binary.compiled.asm["cubin"]
    told = json.loads(files[f"{stem}.json"].read_text(encoding="utf-8"))
    assert (told["same_binary"], told["binary"], told["binary_here"]) == (True, binary.binary, binary.binary)
    assert told["config"] == config.model_dump()
    assert told["problem"] == {"hash": found.hash, **found.model_dump()}
    assert told["figures"] == {"ms": 0.5, "registers": 168, **binary.stats}
    assert {"shared", "num_warps"} <= told["figures"].keys()


@pytest.mark.compile_only
def test_another_binary_than_the_trials_ends_with_1(ptx: Ptx, tmp_path: Path) -> None:
    """It is saved all the same, and told with both assemblers; a trial that stored no binary has none to differ from."""
    found = problem(SHAPE, DEVICE)
    config = space.default("forward", found, DEVICE)
    row = stored(found, config, binary="f" * 64)
    old = ENVIRONMENT.model_copy(update={"ptxas": "1.0"})
    code, output, _ = ptx(row.model_copy(update={"environment": old}))
    assert code == 1
    assert "ANOTHER than the trial's ffffffffffff" in output
    assert f"assembler {ENVIRONMENT.ptxas} here, 1.0 then" in output
    assert list((tmp_path / "out").glob("*.ptx"))
    code, output, _ = ptx(row.model_copy(update={"binary": ""}))
    assert code == 0
    assert "the trial stored none" in output


@pytest.mark.compile_only
def test_split_kernels_are_saved_with_what_combines_them(ptx: Ptx, tmp_path: Path) -> None:
    """Both binaries are part of the name, so both are there."""
    found = problem(DECODE, DEVICE)
    config = space.split_config(space.SPLIT_POINTERS, 16, 32, 4, 2, 2)
    assert ptx(stored(found, config, binary=compile_kernel("forward", config, found, DEVICE).binary))[0] == 0
    stem = f"forward-{config.hash[:12]}"
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {f"{stem}.{part}{stage}" for part in ("", "combine.") for stage in STAGES} <= names


@pytest.mark.compile_only
def test_kernel_of_ones_own_is_saved_too(ptx: Ptx, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worked example shows its assembly, and its module says nothing of sources: it is compiled as it is."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "docs" / "examples"))
    import torch
    from layer_norm import LAYER_NORM, problem_of

    found = problem_of(torch.empty(1, 100), DEVICE)
    config = LAYER_NORM.default("forward", found, DEVICE)
    compiled = LAYER_NORM.compile("forward", config, found, DEVICE)
    assert compiled.stats == {"shared": compiled.run.kernel.metadata.shared, "num_warps": 8}
    assert ptx(stored(found, config, binary=compiled.binary))[0] == 0
    assert {path.suffix.removeprefix(".") for path in (tmp_path / "out").iterdir()} >= {*STAGES, "json"}


@pytest.mark.compile_only
@pytest.mark.parametrize(
    ("column", "value", "expected"),
    [
        ("triton_version", "0.0", "another triton version: '0.0'"),
        ("source_hash", "f" * 64, "another source: ffffffffffff"),
        ("gpu_name", "triton-interpreter", "it is of Triton's interpreter"),
        ("spec", "no_such_module:SPEC", "cannot be imported"),
    ],
)
def test_trial_that_would_be_another_kernel_today_is_not_compiled(
    ptx: Ptx, tmp_path: Path, column: str, value: str, expected: str
) -> None:
    """Another Triton or source makes another binary: the command says so and writes nothing."""
    found = problem(SHAPE, DEVICE)
    row = stored(found, space.default("forward", found, DEVICE))
    code, output, errors = ptx(row.model_copy(update={"problem": found.model_copy(update={column: value})}))
    assert (code, output) == (2, "")
    assert expected in errors
    assert not (tmp_path / "out").exists()


@pytest.mark.compile_only
@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (lambda: stored(softmax_problem(DEVICE), softmax_config(32)), "shows no assembly"),
        (lambda: stored(softmax_problem(DEVICE), softmax_config(32, "raises_at_compile")), "ValueError: planted"),
        (lambda: stored(softmax_problem(DEVICE), softmax_config(2)), "block 2 does not hold a row"),
        (lambda: stored(softmax_problem(DEVICE), softmax_config(32), kernel="../../sideways"), "no such kernel"),
        (lambda: stored(softmax_problem(replace(DEVICE, capability=(0, 0))), GOOD), "is no GPU that Triton compiles"),
        (lambda: stored(softmax_problem(replace(DEVICE, capability=(3, 5))), GOOD), "3.5: expected 7.0 or later"),
    ],
)
def test_what_cannot_be_made_is_a_message(ptx: Ptx, tmp_path: Path, row: Callable[[], Trial], expected: str) -> None:
    """A spec that shows no assembly, a config that does not compile or that the rules refuse: exit code 1, no file."""
    code, output, errors = ptx(row())
    assert (code, output) == (1, "")
    assert expected in errors
    assert not (tmp_path / "out").exists()


@pytest.mark.compile_only
@pytest.mark.parametrize("verdict", [Verdict.CRASHED, Verdict.TIMEOUT, Verdict.KILLED])
def test_config_that_ended_a_process_is_compiled_only_when_told_to(ptx: Ptx, tmp_path: Path, verdict: Verdict) -> None:
    """Compiling happens in this process: what a trial or a later proof did not survive is refused with the flag."""
    config = softmax_config(32, "raises_at_compile")
    row = stored(softmax_problem(DEVICE), config, verdict=verdict, reason="SIGABRT")
    code, output, errors = ptx(row)
    assert (code, output) == (1, "")
    assert f"is stored as {verdict} (SIGABRT): compiling it may crash or hang this process" in errors
    assert "--unsafe" in errors
    assert "ValueError: planted" in ptx(row, "--unsafe")[2]
    proof = Verification.of(row).model_copy(update={"verdict": Verdict.SAFE, "created_at": row.created_at + 1})
    open_layers(tmp_path).add_verification(proof)
    assert "ValueError: planted" in ptx(row)[2]
    open_layers(tmp_path).add_verification(Verification.of(row).model_copy(update={"created_at": row.created_at + 2}))
    assert "--unsafe" in ptx(row)[2]


@pytest.mark.compile_only
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (12, 0)])
def test_device_is_rebuilt_from_the_problem(capability: tuple[int, int]) -> None:
    """All that compiling and the rules look at is as it was where the trial was made."""
    there: DeviceInfo = replace(DEVICE, capability=capability, shared_memory=shared_memory(capability))
    found = target(problem(SHAPE, there))
    assert replace(there, index=-1, environment=found.environment) == found
    assert found.environment.ptxas


def test_interpreters_trials_have_no_machine_code(run: Run) -> None:
    """The interpreter compiles nothing, and the message says so."""
    code, output, errors = run("ptx", "--key", KEY, "--config", GOOD.hash)
    assert (code, output) == (2, "")
    assert "which compiles nothing" in errors


def test_gpu_trials_cannot_be_compiled_under_the_interpreter(ptx: Ptx) -> None:
    """With TRITON_INTERPRET set there is no compiler, and the message says so."""
    code, output, errors = ptx(stored(softmax_problem(DEVICE), softmax_config(32)))
    assert (code, output) == (2, "")
    assert "TRITON_INTERPRET is set" in errors
