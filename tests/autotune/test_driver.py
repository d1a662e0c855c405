"""Special GPUs, as a driver library that was planted tells of them: who may use a device, and what a slice is called."""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import autotune
from autotune import Settings, driver, resolve, room
from autotune.device import UNKNOWN_SLICE, DeviceInfo, describe
from autotune.driver import Driver
from autotune.occupancy import occupancy
from autotune.process import SandboxError
from autotune.sandbox import Sandbox
from autotune.surroundings import HOME, environment, visible_device
from cache_db import open_layers
from tests.autotune.planted_spec import planted_problem
from tests.autotune.softmax_spec import softmax_config
from tests.autotune.test_sandbox import HOPPER

UUID = "01234567-89ab-cdef-0123-456789abcdef"
WHOLE = replace(HOPPER, index=1, uuid=f"GPU-{UUID}")
SLICE = replace(HOPPER, index=1, uuid=f"MIG-{UUID}", mig_profile="1g.18gb")
UNNAMED = replace(SLICE, uuid=f"{UNKNOWN_SLICE}{UUID}")
# Device 1 alone exists; what a question is answered with is planted.
SOURCE = """
int cuDeviceGet(int *device, int ordinal) { *device = 100 + ordinal; return ordinal == 1 ? 0 : 101; }
int cuDeviceGetAttribute(int *value, int attribute, int device)
{ *value = device != 101 ? -7 : attribute == 20 ? MODE : attribute == 39 ? 2048 : -7; return 0; }
int cuCtxGetDevice(int *device) { *device = 101; return CONTEXT ? 0 : 201; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 4; *active = CONTEXT; return 0; }
#ifndef OLD
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void *function, int threads, unsigned long shared)
{ *blocks = shared / 1000; return function != (void *)7 || threads != 128; }
int cuDeviceGetUuid_v2(unsigned char *uuid, int device)
{ for (int i = 0; i < 16; i++) uuid[i] = (i % 8 * 2) << 4 | (i % 8 * 2 + 1); return device != 101; }
#endif
"""
Plant = Callable[..., Driver]


@pytest.fixture
def plant(tmp_path: Path) -> Plant:
    """Builds a driver library of which these things are true."""

    def build(mode: int = driver.DEFAULT, context: int = 0, *flags: str) -> Driver:
        (tmp_path / "driver.c").write_text(SOURCE, encoding="utf-8")
        library = tmp_path / f"libplanted-{mode}-{context}.so"
        defined = [f"-DMODE={mode}", f"-DCONTEXT={context}", *flags]
        subprocess.run(["cc", "-shared", "-fPIC", *defined, "-o", library, tmp_path / "driver.c"], check=True)
        return Driver(ctypes.CDLL(str(library)))

    return build


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    """Makes each test start like a new process."""
    autotune.forget()
    yield
    autotune.forget()


def children() -> set[str]:
    """Returns the process ids of this process's children."""
    found: set[str] = set()
    for task in Path("/proc/self/task").iterdir():
        found.update((task / "children").read_text(encoding="ascii").split())
    return found


def test_the_driver_is_asked_in_its_own_terms(plant: Plant) -> None:
    """Compute mode, primary context and UUID come back as the library tells them."""
    asked = plant(driver.EXCLUSIVE_PROCESS, 1)
    assert asked.compute_mode(1) == driver.EXCLUSIVE_PROCESS
    assert asked.has_context(1) is True
    assert plant().has_context(1) is False
    assert asked.uuid(1) == UUID


def test_what_the_driver_does_not_know_is_unknown(plant: Plant) -> None:
    """A device that is not there, an old driver without the question, a library that is none: no error, no answer."""
    old, none = plant(0, 0, "-DOLD"), Driver(ctypes.CDLL(None))
    assert old.compute_mode(1) == driver.DEFAULT
    unknown = [
        old.uuid(1),
        old.compute_mode(0),
        old.has_context(0),
        none.compute_mode(1),
        none.has_context(1),
        none.uuid(1),
    ]
    assert unknown == [None] * 6


def test_occupancy_is_what_the_driver_says_of_the_current_context(plant: Plant) -> None:
    """Resident warps by those that fit; a driver without context, kernel or question knows nothing, and nothing fails."""
    asked, idle, old = plant(0, 1), plant(0, 0), plant(driver.PROHIBITED, 1, "-DOLD")
    assert occupancy(7, 4, 8000, asked) == 8 * 128 / 2048
    unknown = [occupancy(7, 4, 8000, each) for each in (idle, old, Driver(ctypes.CDLL(None)))]
    assert [*unknown, occupancy(8, 4, 8000, asked)] == [None] * 4


def test_one_binding_serves_whoever_asks_the_driver(monkeypatch: pytest.MonkeyPatch, plant: Plant) -> None:
    """Occupancy needs no CUDA of torch's: any context will do."""
    asked = plant(0, 1)
    monkeypatch.setattr(driver, "loaded", lambda: asked)
    assert driver.started() is None
    assert occupancy(7, 4, 8000) == 8 * 128 / 2048


def test_where_cuda_has_not_started_the_driver_is_not_asked() -> None:
    """Asking would start it, here in a process that may never use it."""
    code = (
        "from autotune import driver; import torch; assert driver.started() is None and not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=HOME, check=True)


@pytest.mark.parametrize(
    ("mode", "context", "refusal"),
    [
        (driver.DEFAULT, 0, ""),
        (driver.DEFAULT, 1, ""),
        (driver.EXCLUSIVE_PROCESS, 0, ""),
        (driver.EXCLUSIVE_PROCESS, 1, "Exclusive_Process"),
        (driver.PROHIBITED, 0, "Prohibited"),
        (driver.PROHIBITED, 1, "Prohibited"),
    ],
)
def test_a_child_may_start_only_where_two_processes_may_be(plant: Plant, mode: int, context: int, refusal: str) -> None:
    """On an exclusive GPU the one process is the child, or the caller if that was first."""
    if not refusal:
        room.admit(WHOLE, plant(mode, context))
        return
    with pytest.raises(SandboxError, match=refusal):
        room.admit(WHOLE, plant(mode, context))


def test_an_exclusive_gpu_costs_one_warning_and_starts_nothing(
    plant: Plant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No sweep, no proof, no child: the warning names the mode and the cure."""
    asked = plant(driver.EXCLUSIVE_PROCESS, 1)
    monkeypatch.setattr(driver, "started", lambda: asked)
    before = children()
    found = resolve(planted_problem(device=WHOLE), WHOLE, Settings(cache_dir=tmp_path, remedy="turn the handle"))
    assert found.choices == {}
    assert children() == before
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "Exclusive_Process" in warning
    assert "turn the handle" in warning


def test_a_stored_winner_runs_on_an_exclusive_gpu(
    plant: Plant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What was proven beforehand in this environment needs no child."""
    resolve(planted_problem(), describe(-1), Settings(cache_dir=tmp_path))
    problem, store = planted_problem(device=WHOLE), open_layers(tmp_path)
    for winner in store.winners(planted_problem()).values():
        store.put_winner(winner.model_copy(update={"problem": problem, "environment": WHOLE.environment}), replace=True)
    asked = plant(driver.EXCLUSIVE_PROCESS, 1)
    monkeypatch.setattr(driver, "started", lambda: asked)
    autotune.forget()
    caplog.clear()
    found = resolve(problem, WHOLE, Settings(cache_dir=tmp_path))
    assert {choice.rung for choice in found.choices.values()} == {"winner"}
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_compiling_needs_no_gpu_and_asks_none(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a runner may not start, the request to compile for it fails before a compiler does."""
    asked = plant(driver.PROHIBITED, 0)
    monkeypatch.setattr(driver, "started", lambda: asked)
    before = children()
    with Sandbox(planted_problem(device=WHOLE), WHOLE) as sandbox, pytest.raises(SandboxError, match="Prohibited"):
        sandbox.compile([("forward", softmax_config())])
    assert children() == before


@pytest.mark.parametrize(
    ("device", "visible", "child"),
    [
        pytest.param(WHOLE, None, WHOLE.uuid, id="unset"),
        pytest.param(WHOLE, "", WHOLE.uuid, id="empty"),
        pytest.param(WHOLE, "-1", WHOLE.uuid, id="none"),
        pytest.param(WHOLE, "3,2", WHOLE.uuid, id="numbers"),
        pytest.param(WHOLE, f"0,GPU-{UUID}", WHOLE.uuid, id="uuid"),
        pytest.param(WHOLE, "0, GPU-0123 ", "GPU-0123", id="abbreviated, with spaces"),
        pytest.param(WHOLE, "0,GPU-0123,GPU-fedc", "GPU-0123", id="one of three"),
        pytest.param(WHOLE, "GPU-0123,GPU-fedc", WHOLE.uuid, id="set or reordered after the start"),
        pytest.param(WHOLE, "0,-1,1", WHOLE.uuid, id="ended early"),
        pytest.param(WHOLE, "0,gpu one", WHOLE.uuid, id="nonsense"),
        pytest.param(SLICE, None, SLICE.uuid, id="slice, unset"),
        pytest.param(SLICE, "0,1", SLICE.uuid, id="slice by number"),
        pytest.param(SLICE, f"MIG-fedc,MIG-{UUID}", SLICE.uuid, id="slice by uuid"),
        pytest.param(SLICE, "MIG-fedc,MIG-01234567", "MIG-01234567", id="slice, abbreviated"),
        pytest.param(SLICE, "MIG-GPU-fedc/2/0,MIG-GPU-fedc/1/0", "MIG-GPU-fedc/1/0", id="slice in the old form"),
        pytest.param(UNNAMED, None, "1", id="slice without a name"),
        pytest.param(UNNAMED, "5,7", "7", id="slice without a name, by number"),
        pytest.param(UNNAMED, "0,MIG-GPU-fedc/1/0", "MIG-GPU-fedc/1/0", id="slice without a name, in the old form"),
    ],
)
def test_a_child_sees_the_callers_own_device(
    device: DeviceInfo, visible: str | None, child: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the caller's variable names its devices, the child's names the caller's one and no other."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_device(device, os.environ) == child
    assert environment(device, gpu=True)["CUDA_VISIBLE_DEVICES"] == child
    assert environment(device, gpu=False)["CUDA_VISIBLE_DEVICES"] == ""
