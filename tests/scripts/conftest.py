"""A small tuned database, and the command ``flashbias`` on a copy of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import autotune
from autotune import Settings, resolve
from flashbias.cli.main import main
from tests.scripts.command_cases import DEVICE, GOOD, IMPORTING, PROBLEM, Run


@pytest.fixture
def fresh_process() -> Iterator[None]:
    """Makes a test start like a new process."""
    autotune.forget()
    yield
    autotune.forget()


@pytest.fixture(scope="session")
def tuned_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database in which ``PROBLEM`` has been tuned: one safe config, one wrong."""
    folder = tmp_path_factory.mktemp("tuned")
    assert resolve(PROBLEM, DEVICE, Settings(cache_dir=folder)).choices["forward"].config == GOOD
    return folder / "flashbias.db"


@pytest.fixture
def folder(tmp_path: Path, tuned_file: Path, fresh_process: None) -> Path:
    """A folder with a copy of that database."""
    shutil.copy(tuned_file, tmp_path)
    return tmp_path


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command on the folder's database, trusting its spec; returns exit code, stdout and stderr."""

    def run(*arguments: str, cache: Path = folder, trust: bool = True) -> tuple[int, str, str]:
        trusted = ["--spec", PROBLEM.spec] if trust and arguments[0] in IMPORTING else []
        try:
            code = main([*arguments, *trusted, "--cache-dir", str(cache)])
        except SystemExit as error:
            code = int(str(error.code))
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run
