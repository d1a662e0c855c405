"""Processes that take times on one GPU wait for each other, and for nobody else."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from autotune.turns import place, turn

HOLDER = """
import sys, time
from autotune.turns import turn
with turn(sys.argv[1]) as mine:
    print(mine, flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keeps the locks of the tests away from those of real sweeps."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    yield
    monkeypatch.setattr("tempfile.tempdir", None)


def holder(gpu: str, seconds: float) -> subprocess.Popen[str]:
    """Returns a process that has the turn, for ``seconds``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, gpu, str(seconds)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    return process


def test_a_second_process_waits_and_says_that_it_does() -> None:
    """The turn comes when its holder is done; ``notice`` is heard meanwhile."""
    heard: list[None] = []
    started = time.monotonic()
    with holder("GPU-1", 1.0), turn("GPU-1", lambda: heard.append(None)) as mine:
        assert mine
        assert time.monotonic() - started >= 0.9
    assert len(heard) >= 5


def test_a_killed_holder_gives_the_turn_back() -> None:
    """The operating system frees it."""
    with holder("GPU-1", 60.0) as process:
        process.kill()
        process.wait()
        with turn("GPU-1", seconds=0.0) as mine:
            assert mine


def test_who_cannot_have_it_in_time_measures_without() -> None:
    """A wait ends; a turn on another GPU, or on none, never waits."""
    with holder("GPU-1", 60.0) as process:
        with turn("GPU-1", seconds=0.2) as mine, turn("GPU-2", seconds=0.0) as others, turn("", seconds=0.0) as none:
            assert (mine, others, none) == (False, True, False)
        process.kill()


def test_a_link_in_the_file_s_place_is_not_followed(tmp_path: Path) -> None:
    """In a folder that all may write to, somebody else may have laid a link there: then there is no turn, and no harm."""
    target = tmp_path / "precious"
    place("GPU-1").symlink_to(target)
    with turn("GPU-1", seconds=0.0) as mine:
        assert not mine
    assert not target.exists()
