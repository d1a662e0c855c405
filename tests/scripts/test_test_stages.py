"""scripts/test itself: an honest exit status, and nothing skipped in silence."""

from __future__ import annotations

import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import LONGEST

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = {"Python": "3.11.7", "torch": "2.13.0+cpu", "Triton": "3.6.0", "NumPy": "2.3.5", "GPU": "none"}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """Loads scripts/test, which has no suffix, as a module."""
    loader = SourceFileLoader("scripts_test", str(ROOT / "scripts" / "test"))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def stage(script: ModuleType, name: str, **changed: str) -> object:
    """Returns the stage ``name`` for an environment like this one but for ``changed``."""
    stages = script._stages(Path(sys.executable), {**VERSIONS, **changed}, "")
    return next(each for each in stages if each.name == name)


def test_a_failing_command_fails_its_stage(script: ModuleType) -> None:
    """One command that fails is enough, wherever it stands, and the ones after it still run."""
    fail, work = (sys.executable, "-c", "raise SystemExit(3)"), (sys.executable, "-c", "")
    for commands in ((fail, work), (work, fail)):
        line, failed = script._run(script.Stage("x", commands, {}))
        assert failed
        assert "FAILED" in line
    line, failed = script._run(script.Stage("x", (work,), {}))
    assert not failed
    assert "passed" in line


def test_a_skipped_stage_says_why(script: ModuleType) -> None:
    """Without a GPU its stage does not run and the summary names the reason."""
    line, failed = script._run(stage(script, "gpu"))
    assert not failed
    assert "skipped: torch sees no CUDA device" in line
    assert stage(script, "gpu", GPU="NVIDIA H200").missing == ""


@pytest.mark.parametrize(
    ("triton", "numpy", "runs"),
    [("3.6.0", "2.3.5", True), ("3.6.0", "2.5.2", False), ("3.9.0", "2.5.2", True)],
)
def test_the_interpreter_runs_where_it_works(script: ModuleType, triton: str, numpy: str, runs: bool) -> None:
    """Triton 3.6's interpreter breaks with NumPy 2.4 and newer: its stage is skipped there by name, not red."""
    assert (stage(script, "interpreter", Triton=triton, NumPy=numpy).missing == "") is runs


def test_each_test_belongs_to_one_stage(script: ModuleType) -> None:
    """The three pytest stages select disjoint markers that together leave nothing out."""
    selected = [stage(script, name).commands[0][-1] for name in ("interpreter", "compile", "gpu")]
    assert selected == ["not compile_only and not gpu", "compile_only", "gpu"]


@pytest.mark.parametrize(("cores", "processes"), [(1, 1), (2, 3), (8, 12), (64, 12)])
def test_waiting_tests_leave_no_core_idle(script: ModuleType, cores: int, processes: int) -> None:
    """More processes than cores run the tests, up to a number whose memory a machine has."""
    assert script._spread(cores)[:2] == ("--numprocesses", str(processes))


def test_the_files_that_begin_are_there() -> None:
    """A file that was renamed would begin where its name puts it."""
    assert all((ROOT / "tests" / name).is_file() for name in LONGEST)


def test_ci_runs_the_command_of_the_readme() -> None:
    """CI has no test command of its own."""
    assert "scripts/test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
