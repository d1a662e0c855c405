"""``flashbias doctor`` and ``flashbias env``: what each fact means, the cure of what is bad, and what is never told."""

from __future__ import annotations

import getpass
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autotune import Settings
from autotune.device import DeviceInfo
from cache_db.models import Environment, Scalar
from cache_db.store import Store
from flashbias.cli import compiler, compilers, facts, filesystem
from flashbias.cli.checks import GIB, Check, State, gpu_checks, software_checks, storage_checks
from flashbias.cli.facts import Cuda, Database, Gpu
from flashbias.cli.main import main
from tests.cache_db.store_examples import trial
from tests.scripts.command_cases import ROOT, python

H200 = DeviceInfo(
    index=0,
    name="NVIDIA H200",
    uuid="GPU-1",
    capability=(9, 0),
    sm_count=132,
    shared_memory=227 * 1024,
    mig_profile="",
    triton_version="3.7.1",
    environment=Environment(driver="580.159", ptxas="13.3", torch="2.11.0"),
)
WELL = Gpu(H200, mode=0, free=100 * GIB, total=139 * GIB, health={"temperature_c": 40, "slowed_by": ""})
SIGHTED = Cuda("2.11.0", "13.0", None, (WELL,))


def states(found: list[Check]) -> dict[str, State]:
    """Returns the worst state of each name."""
    order = list(State)
    worst: dict[str, State] = {}
    for each in found:
        worst[each.name] = max(worst.get(each.name, State.OK), each.state, key=order.index)
    return worst


def with_gpu(**changes: Any) -> list[Check]:
    """Returns the checks of one GPU that is well but for ``changes``."""
    device = {name: value for name, value in changes.items() if name in DeviceInfo.__dataclass_fields__}
    rest = {name: value for name, value in changes.items() if name not in device}
    return list(gpu_checks(replace(SIGHTED, gpus=(replace(WELL, device=replace(H200, **device), **rest),)), "580.159"))


def test_a_healthy_gpu_has_nothing_to_cure() -> None:
    """Model, mode, memory, clocks and assembler are all told and ok."""
    found = with_gpu()
    assert set(states(found).values()) == {State.OK}
    assert {"torch", "driver", "gpu 0", "mode 0", "memory 0", "clocks 0", "ptxas 0"} == states(found).keys()
    told = " ".join(each.told for each in found)
    for part in ("NVIDIA H200, 9.0, 132 SMs", "Default", "100.0 of 139.0 GiB free", "not slowed, 40 °C", "580.159"):
        assert part in told


@pytest.mark.parametrize(
    ("changes", "name", "state", "told"),
    [
        ({"mode": 3}, "mode 0", State.WARNING, "Exclusive_Process"),
        ({"mode": 2}, "mode 0", State.BAD, "Prohibited"),
        ({"free": GIB}, "memory 0", State.WARNING, "1.0 of 139.0 GiB free"),
        ({"health": {"slowed_by": "hardware thermal"}}, "clocks 0", State.WARNING, "hardware thermal"),
        ({"capability": (7, 5)}, "gpu 0", State.WARNING, "older than Ampere"),
        ({"environment": Environment(driver="1", ptxas="", torch="2")}, "ptxas 0", State.BAD, "no assembler"),
        ({"environment": Environment(driver="1", ptxas="12.8", torch="2")}, "compilers", State.WARNING, "ptxas 12.8"),
        ({"triton_version": "3.6.0"}, "compilers", State.WARNING, "triton 3.6.0"),
    ],
)
def test_what_is_wrong_with_a_gpu_is_named_with_its_cure(
    changes: dict[str, Any], name: str, state: State, told: str
) -> None:
    """Each fault shows under its own name, as bad only where it keeps something from working."""
    found = [each for each in with_gpu(**changes) if each.state is not State.OK]
    assert [(each.name, each.state) for each in found] == [(name, state)]
    assert told in found[0].told
    assert found[0].cure


def test_what_is_not_known_is_no_fault() -> None:
    """A slice of a GPU, an old driver or a missing tool leaves facts out, and nothing is bad for that."""
    health: dict[str, Scalar] = {}
    found = with_gpu(mode=None, free=None, total=None, health=health, mig_profile="1g.18gb")
    assert set(states(found).values()) == {State.OK}
    assert "MIG 1g.18gb" in " ".join(each.told for each in found)


@pytest.mark.parametrize(
    ("cuda", "driver", "state", "told"),
    [
        (Cuda("2.11", "13.0"), "", State.WARNING, "none: PyTorch in chunks"),
        (Cuda("2.11", "13.0"), "450.1", State.BAD, "torch sees no device"),
        (Cuda("2.11+cpu"), "580.1", State.BAD, "built without CUDA"),
        (Cuda(fault="OSError: libcudart.so.13"), "580.1", State.BAD, "libcudart.so.13"),
        (replace(SIGHTED, hip="6.4"), "", State.WARNING, "of another maker"),
        (replace(SIGHTED, interpreted=True), "580.1", State.WARNING, "TRITON_INTERPRET is set"),
    ],
)
def test_torch_without_a_usable_gpu_is_told_apart(cuda: Cuda, driver: str, state: State, told: str) -> None:
    """No GPU at all is a warning; one that torch cannot use is bad, and so is a torch that does not load."""
    (found,) = (each for each in gpu_checks(cuda, driver) if each.state is not State.OK)
    assert found.state is state
    assert told in found.told
    assert found.cure


@pytest.mark.parametrize(
    ("capability", "versions", "count"),
    [
        ((9, 0), {"triton": "3.6.0", "ptxas": "12.8"}, 2),
        ((9, 0), {"triton": "3.7.1", "ptxas": "13.3"}, 0),
        ((9, 0), {"triton": "3.7.0+git1", "ptxas": ""}, 1),
        ((8, 0), {"triton": "3.6.0", "ptxas": "12.8"}, 0),
        ((10, 0), {"triton": "3.7.1"}, 1),
        ((9, 0), {"triton": "unknown"}, 0),
    ],
)
def test_known_bad_versions_are_found_by_range(
    capability: tuple[int, int], versions: dict[str, str], count: int
) -> None:
    """The first good version is good; a version that says nothing is not accused."""
    assert len(list(compilers.known(capability, versions))) == count


def test_a_compiler_that_is_missing_or_broken_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One line is compiled for real; what keeps it from working is bad beside a GPU, a warning elsewhere."""
    assert compiler.fault() is None
    monkeypatch.setenv("CC", str(tmp_path / "no-compiler"))
    found = compiler.fault()
    assert found is not None
    assert "no-compiler cannot compile" in found[0]
    for cuda, state in ((SIGHTED, State.BAD), (Cuda(), State.WARNING)):
        assert states(list(software_checks(cuda)))["c compiler"] is state
    monkeypatch.setenv("CC", "false")
    assert compiler.fault() is not None
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compiler.fault() == ("there is no C compiler", "apt install gcc, or name one in CC")


def test_namesakes_on_the_import_path_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file, and an installed distribution, that have the name of one of our packages."""
    assert states(list(software_checks(Cuda())))["packages"] is State.OK
    (tmp_path / "autotune.py").touch()
    info = tmp_path / "autotune-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: autotune\nVersion: 1.0\n", encoding="utf-8")
    (info / "top_level.txt").write_text("autotune\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    found = [each for each in software_checks(Cuda()) if each.name == "packages"]
    assert [each.state for each in found] == [State.BAD, State.WARNING]
    assert "autotune brings a package 'autotune' too" in found[0].told
    assert str(tmp_path / "autotune.py") in found[1].told


class TestDatabase:
    """What is said of the database, which is only looked at."""

    @pytest.mark.parametrize("state", ["absent", "empty", "readable", "unreadable"])
    def test_each_state_is_told_and_left_as_it_is(self, tmp_path: Path, state: str) -> None:
        """Rows are counted where they can be; garbage is bad with its cure, and nothing is made or moved."""
        file = tmp_path / "flashbias.db"
        if state == "readable":
            Store.open(file).add_trial(trial())
        elif state != "absent":
            file.write_bytes(b"" if state == "empty" else b"garbage" * 1000)
        before = [(each.name, each.read_bytes()) for each in tmp_path.iterdir()]
        found = facts.database(tmp_path)
        (told,) = (each for each in storage_checks(found, Settings()) if each.name == "database")
        assert found.state == state
        assert told.state is (State.BAD if state == "unreadable" else State.OK)
        assert {"readable": "1 trials", "unreadable": "damaged"}.get(state, f"is {state}: the first") in told.told
        assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == before

    def test_no_folder_is_a_warning(self) -> None:
        """Without a place nothing is remembered."""
        assert states(list(storage_checks(facts.database(None), Settings())))["database"] is State.WARNING

    def test_a_file_where_a_folder_should_be_is_no_traceback(self, tmp_path: Path) -> None:
        """The place is a file: that cannot be written, and the checks go on."""
        (tmp_path / "file").touch()
        found = list(storage_checks(facts.database(tmp_path / "file"), Settings()))
        assert states(found)["database"] is State.WARNING
        assert "cannot be written" in next(each.told for each in found if each.name == "database")

    def test_a_network_file_system_is_named(self, tmp_path: Path) -> None:
        """The deepest mount decides, the latest of two at one place, escapes in its name undone; types go by name."""
        there = Path(os.path.realpath(tmp_path)) / "a b" / "db"
        there.mkdir(parents=True)
        escaped = str(there.parent).replace(" ", "\\040")
        mounts = tmp_path / "mountinfo"
        lines = [
            "22 1 8:1 / / rw - ext4 /dev/root rw",
            f"40 22 0:50 / {escaped} rw shared:1 master:2 - xfs /dev/sdb rw",
            f"41 22 0:51 / {escaped} rw shared:1 - nfs4 server:/home rw",
            "broken line",
        ]
        mounts.write_text("\n".join(lines), encoding="utf-8")
        assert filesystem.kind(there / "not" / "there" / "flashbias.db", mounts) == "nfs4"
        assert filesystem.kind(tmp_path, mounts) == "ext4"
        assert filesystem.kind(tmp_path, tmp_path / "absent") is None
        assert [
            filesystem.is_network(name) for name in ("nfs4", "lustre", "fuse.sshfs", "9p", "ext4", "fuse", None)
        ] == [
            True,
            True,
            True,
            True,
            False,
            False,
            False,
        ]
        assert filesystem.kind(tmp_path) is not None

    def test_layers_and_room_are_told(self, tmp_path: Path) -> None:
        """There is one layer, on a disk with room."""
        found = {each.name: each for each in storage_checks(Database(tmp_path / "flashbias.db", "absent"), Settings())}
        assert "SQLite 3." in found["layers"].told
        assert "GiB free" in found["disk"].told


def test_memory_is_read_as_far_as_it_is_understood() -> None:
    """MiB become bytes; anything else is unknown."""
    assert facts.memory("139000, 143771\n") == (139000 << 20, 143771 << 20)
    for answer in ("", "[N/A], 143771", "No devices were found", "1"):
        assert facts.memory(answer) == (None, None)


def tool(folder: Path, script: str) -> dict[str, str]:
    """Makes an ``nvidia-smi`` and returns the environment in which it is found first."""
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def flashbias(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs the command in a process of its own."""
    return python("-m", "flashbias", *arguments, TRITON_INTERPRET="", **variables)


def test_exit_code_is_1_where_something_is_bad(tmp_path: Path) -> None:
    """A torch that does not load is bad: its error is told, all other checks are made, and nothing is a traceback."""
    broken = tmp_path / "torch"
    broken.mkdir()
    text = "raise OSError('libcudart.so.13: cannot open shared object file')\n"
    (broken / "__init__.py").write_text(text, encoding="utf-8")
    variables = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "FLASHBIAS_CACHE_DIR": str(tmp_path / "none")}
    done = flashbias("doctor", "--json", **variables)
    assert (done.returncode, done.stderr) == (1, "")
    found = json.loads(done.stdout)
    (bad,) = (each for each in found["checks"] if each["state"] == "bad")
    assert (bad["name"], found["bad"]) == ("torch", 1)
    assert "OSError: libcudart.so.13" in bad["told"]
    assert {"triton", "c compiler", "database", "disk"} <= {each["name"] for each in found["checks"]}
    assert not (tmp_path / "none").exists()
    done = flashbias("env", **variables)
    assert done.returncode == 0
    assert "torch.fault=OSError: libcudart.so.13" in done.stdout


@pytest.mark.skipif(Path("/proc/driver/nvidia").exists(), reason="needs a machine without a driver")
def test_a_driver_that_torch_cannot_use_is_bad(tmp_path: Path) -> None:
    """A GPU's driver beside a torch that sees no GPU ends with 1 and names both."""
    done = flashbias("doctor", **tool(tmp_path, "echo 555.42"), FLASHBIAS_CACHE_DIR=str(tmp_path))
    assert done.returncode == 1
    assert "ok       driver       555.42\nbad      gpu          " in done.stdout
    assert "\n                      cure: install a " in done.stdout


def test_doctor_ends_with_0_where_nothing_is_bad(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every line begins with ok, warning or bad, a cure follows its line, and the sum ends it."""
    assert main(["doctor", "--cache-dir", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    *lines, last = printed.out.splitlines()
    assert printed.err == ""
    assert {line.split()[0] for line in lines} <= {"ok", "warning", "cure:"}
    assert last.endswith(f" checks: 0 bad, {sum(line.startswith('warning') for line in lines)} warnings")
    assert list(tmp_path.iterdir()) == []


def test_env_is_plain_and_holds_no_secret(tmp_path: Path) -> None:
    """Keys and values of one line each, the same as JSON; the owner's name, the host's, and other variables are not told."""
    home = tmp_path / "home-of-somebody"
    Store.open(home / "cache" / "flashbias.db").add_trial(trial())
    variables = {"HOME": str(home), "FLASHBIAS_CACHE_DIR": str(home / "cache"), "SECRET_TOKEN": "hunter2"}
    variables |= {"CUDA_VISIBLE_DEVICES": "0", "TRITON_PTXAS_PATH": f"{home}/ptxas\nforged=1"}
    done = flashbias("env", **variables)
    assert (done.returncode, done.stderr) == (0, "")
    found = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert found["database"] == "~/cache/flashbias.db"
    assert (found["database.trials"], found["variable.CUDA_VISIBLE_DEVICES"]) == ("1", "0")
    assert found["variable.TRITON_PTXAS_PATH"] == "~/ptxas\\nforged=1"
    assert found["python"].startswith("CPython 3.")
    assert {"triton", "settings.mode", "driver", "gpus", "database.filesystem", "c_compiler"} <= found.keys()
    told = [
        line for line in done.stdout.splitlines() if not line.startswith(("system=", "flashbias.folder=", "c_comp"))
    ]
    for secret in ("hunter2", "home-of-somebody", socket.gethostname() if len(socket.gethostname()) > 3 else "hunter2"):
        assert not any(secret in line for line in told)
    assert f"={getpass.getuser()}\n" not in done.stdout
    plain = json.loads(flashbias("env", "--json", **variables).stdout)
    assert {name: "" if value is None else str(value) for name, value in plain.items()}.keys() == found.keys()


def test_neither_loads_torch_before_it_is_asked() -> None:
    """Their flags are read without torch, as those of every other command."""
    code = "import sys, flashbias.cli.doctor, flashbias.cli.env; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
