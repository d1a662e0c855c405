"""The set-up behind scripts/quickstart and scripts/test: real environments, real refusals, no downloads."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import _machine
import _setup
from _machine import Machine

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("quickstart", "test")


def command(name: str, *arguments: object, path: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs one of the two commands as a user would."""
    environment = {**os.environ, "PATH": path} if path else None
    line = [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)]
    return subprocess.run(line, env=environment, capture_output=True, text=True, check=False)


def options(venv: Path, wheels: Path | None = None) -> _setup.Options:
    """Returns the options a command line would give."""
    return _setup.Options(venv, wheels)


def pins(machine: Machine, wheels: Path | None = None) -> dict[str, str]:
    """Returns the effective pins by name."""
    text = _setup._constraints(machine, options(Path("unused"), wheels))
    return {line.replace("<", "=").partition("=")[0].lower(): line for line in text.splitlines() if line}


@pytest.mark.parametrize("name", COMMANDS)
def test_an_old_python_is_told_which_one_to_use(name: str) -> None:
    """Python 3.10 gets one sentence with the cure, not a syntax error or a traceback."""
    path = ROOT / "scripts" / name
    code = f"import runpy, sys; sys.version_info = (3, 10, 0); runpy.run_path({str(path)!r}, run_name='__main__')"
    environment = {**os.environ, "PYTHONPATH": str(path.parent)}
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Python 3.11 or newer, this is 3.10" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", [*COMMANDS, "_setup.py"])
def test_an_old_python_can_read_as_far_as_that_sentence(name: str) -> None:
    """The commands parse under the grammar of Python 3.7."""
    ast.parse((ROOT / "scripts" / name).read_text(encoding="utf-8"), feature_version=(3, 7))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_foreign_environment_is_left_alone(name: str, tmp_path: Path) -> None:
    """A folder the set-up did not make is refused, with the way out, and keeps its contents."""
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "mine").write_text("precious", encoding="utf-8")
    done = command(name, "--venv", tmp_path / "venv")
    assert done.returncode == 1
    assert "was not made by this command" in done.stderr
    assert "--venv DIR" in done.stderr
    assert [path.name for path in (tmp_path / "venv").iterdir()] == ["mine"]


def test_every_fault_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU machine a missing compiler and a foreign folder are both in the one message."""
    (tmp_path / "mine").touch()
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as refusal:
        _setup._check(Machine(gpu=True, borrowed={}), options(tmp_path), known=False)
    assert "no C compiler found" in str(refusal.value)
    assert "was not made by this command" in str(refusal.value)


def test_a_missing_compiler_does_not_stop_a_machine_without_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The interpreter needs no C compiler, so its absence is a note there."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    _setup._check(Machine(gpu=False, borrowed={}), options(tmp_path / "venv"), known=True)
    assert "note: no C compiler found" in capsys.readouterr().out


def test_a_compiler_that_cannot_build_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that is there and fails is named, with what it needs."""
    monkeypatch.setenv("CC", "false")
    assert "the C compiler false cannot compile against Python.h" in str(_machine.compiler_fault())


def test_a_full_disk_is_said_before_anything_is_fetched(tmp_path: Path) -> None:
    """The space needed is compared with the space there is."""
    assert any("are needed" in fault for fault in _machine.faults(tmp_path / "venv", gigabytes=1e9))
    assert not any("are needed" in fault for fault in _machine.faults(tmp_path / "venv", gigabytes=0.0))


def test_a_wheels_folder_without_wheels_is_refused(tmp_path: Path) -> None:
    """--wheels with a wrong folder fails before an environment is made."""
    done = command("quickstart", "--venv", tmp_path / "venv", "--wheels", tmp_path)
    assert done.returncode == 1
    assert "expected a folder with .whl files" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_pins_hold_where_torch_has_no_gpu() -> None:
    """Without a GPU the constraints file is taken as it is."""
    assert pins(Machine(gpu=False, borrowed={}))["torch"] == "torch==2.13.0"


def test_a_gpu_gets_the_pair_the_gate_was_measured_with() -> None:
    """Where torch must be fetched for a GPU, torch 2.11 and Triton 3.6 belong together; setuptools is torch's choice."""
    found = pins(Machine(gpu=True, borrowed={}))
    assert (found["torch"], found["triton"]) == ("torch==2.11.0", "triton==3.6.0")
    assert "setuptools" not in found


def test_borrowed_packages_keep_their_versions() -> None:
    """What the running Python brings is not replaced, but for NumPy, which the interpreter needs older."""
    found = pins(Machine(gpu=True, borrowed={"torch": "2.11.0", "triton": "3.6.0", "numpy": "2.5.2", "pytest": "9.0"}))
    assert not {"torch", "triton", "pytest"} & set(found)
    assert found["numpy"] == "numpy<2.4"
    assert "pydantic" in found


def test_offline_the_wheels_are_the_choice(tmp_path: Path) -> None:
    """With --wheels no exact pin applies, and NumPy's only if the folder can satisfy it."""
    borrowed = Machine(gpu=True, borrowed={"torch": "2.11.0", "numpy": "2.5.2"})
    assert pins(borrowed, tmp_path) == {}
    (tmp_path / "numpy-2.3.5-cp312.whl").touch()
    assert pins(borrowed, tmp_path) == {"numpy": "numpy<2.4"}


def test_a_borrowed_environment_installs_offline_and_sees_this_one(tmp_path: Path) -> None:
    """The way of the GPU host: a new environment over a Python that is a venv itself, with no index and no wheels needed."""
    chosen = options(tmp_path / "venv", tmp_path)
    machine = Machine(gpu=True, borrowed={"torch": metadata.version("torch")})
    _setup._create(chosen, machine, _setup.Stamp("base", "", (), borrowed=True))
    _setup._install((), machine, chosen)
    code = "import flashbias, torch; print(flashbias.__file__); print(torch.__file__)"
    ask = [chosen.python, "-P", "-c", code]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    printed = subprocess.run(ask, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    import torch

    assert printed.splitlines() == [str(ROOT / "flashbias" / "__init__.py"), torch.__file__]


def test_an_interrupted_environment_is_replaced(tmp_path: Path) -> None:
    """What a killed set-up leaves is known as its own: it is made anew, not refused."""
    chosen = options(tmp_path / "venv")
    chosen.venv.mkdir()
    _setup.Stamp("base", "", (), borrowed=False).write(chosen.venv)
    (chosen.venv / "half-written").touch()
    machine = Machine(gpu=False, borrowed={})
    _setup._check(machine, chosen, known=_setup.Stamp.read(chosen.venv) is not None)
    _setup._create(chosen, machine, _setup.Stamp("base", "", (), borrowed=False))
    assert chosen.python.exists()
    assert not (chosen.venv / "half-written").exists()


def test_a_second_setup_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An environment that fits is recognised by its stamp: neither venv nor pip run, they would fail here."""
    chosen = options(tmp_path / "venv", tmp_path)
    monkeypatch.setattr(_machine, "has_gpu", lambda: True)
    monkeypatch.setattr(_machine, "borrowable", lambda: {"torch": metadata.version("torch")})
    _setup.prepare((), chosen)
    monkeypatch.setattr(_setup, "_run", pytest.fail)
    _setup.prepare((), chosen)
    assert "is up to date" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"base": 1}', "\x00"])
def test_a_damaged_stamp_is_no_stamp(tmp_path: Path, text: str) -> None:
    """A stamp that cannot be read counts as none, whatever it holds."""
    (tmp_path / _setup.STAMP).write_text(text, encoding="utf-8")
    assert _setup.Stamp.read(tmp_path) is None


def test_what_is_fetched_is_said_first(tmp_path: Path) -> None:
    """The sentence before an installation gives its size, or the folder it is read from."""
    fetched = _setup._announcement(Machine(gpu=False, borrowed={}), options(tmp_path / "venv"), renewed=False)
    assert "about 0.4 GB are downloaded" in fetched
    (tmp_path / "some.whl").write_bytes(bytes(2_000_000))
    offline = _setup._announcement(Machine(False, {}), options(tmp_path / "venv", tmp_path), renewed=False)
    assert "nothing is downloaded, up to 2 MB" in offline
