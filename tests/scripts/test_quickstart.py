"""The quickstart keeps its promises here, without a GPU, in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def quickstart(cache_dir: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs what scripts/quickstart runs after its set-up, from a plain Python.

    With TRITON_INTERPRET it need not find out that there is no GPU, and start itself again.
    """
    command = [sys.executable, "-P", "-m", "flashbias.cli.quickstart", "--cache-dir", str(cache_dir)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "", **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Runs the quickstart once on an empty database; returns its folder and what was printed."""
    folder = tmp_path_factory.mktemp("quickstart")
    return folder, quickstart(folder)


def test_it_shows_the_whole_way(first: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    """Device, problem, database, what was tried, what was chosen and the errors are all printed, and all is well."""
    folder, done = first
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    for label in ("device", "problem", "database", "tuning", "tried", "chosen", "errors", "again", "done"):
        assert any(line.startswith(label) for line in lines), label
    assert str(folder / "flashbias.db") in done.stdout
    assert "swept in" in done.stdout
    for kernel in ("forward", "backward_dkdv", "backward_dq"):
        assert any(line.startswith("chosen") and kernel in line and "winner" in line for line in lines), kernel


def test_its_second_process_sweeps_nothing(first: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    """The new process runs the winners and leaves the database as it was, byte for byte."""
    _, done = first
    assert "forward and backward done" in done.stdout
    assert "ran: winner" in done.stdout
    assert "it swept nothing: flashbias.db is unchanged, byte for byte" in done.stdout


def test_it_does_not_pass_interpreter_timings_off_as_speeds(
    first: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    """Without a GPU it says plainly whose timings those are."""
    assert "its timings are not speeds" in first[1].stdout


def test_run_again_it_tunes_nothing(first: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    """A second quickstart on the same database finds everything there and says so."""
    done = quickstart(first[0], TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "found in the database" in done.stdout


def test_results_that_cannot_be_kept_are_a_failure(tmp_path: Path) -> None:
    """Where no database can be opened, it still computes, and says what does not hold."""
    blocker = tmp_path / "file"
    blocker.touch()
    done = quickstart(blocker / "below", FLASHBIAS_BUDGET_SECONDS="4", TRITON_INTERPRET="1")
    assert done.returncode == 1
    assert "FAILED    this does not hold: a second process finds the results (they are in memory only)" in done.stdout


def test_a_wrong_setting_is_one_line(tmp_path: Path) -> None:
    """A mode that does not exist ends it with the right ones listed, without a traceback."""
    done = quickstart(tmp_path, FLASHBIAS_MODE="fast", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "expected one of tune, read" in done.stderr
    assert "Traceback" not in done.stderr
