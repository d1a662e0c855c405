"""The checks of ``flashbias doctor``: from facts to what they mean, and the cure of what is not as it should be."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from flashbias.cli import compiler, compilers, facts, filesystem
from flashbias.cli.facts import Cuda, Database, Gpu

if TYPE_CHECKING:
    from autotune.settings import Settings

GIB: Final = 1 << 30
MIB: Final = 1 << 20
SMALLEST_DISK: Final = 100 * MIB
FIRST_CAPABILITY: Final = (8, 0)


class State(StrEnum):
    """How a check came out; ``WARNING`` costs speed or memory of what was tuned, ``BAD`` keeps something from working."""

    OK = "ok"
    WARNING = "warning"
    BAD = "bad"


class Check(NamedTuple):
    """One check: what was looked at, how it came out, what was seen, and the cure where there is one."""

    name: str
    state: State
    told: str
    cure: str = ""


def gpu_checks(cuda: Cuda, driver: str) -> Iterator[Check]:
    """Yields the checks of torch's build, the driver and each GPU."""
    if cuda.fault:
        yield Check("torch", State.BAD, f"it cannot be used: {cuda.fault}", "reinstall torch, or its driver")
        return
    build = f"CUDA {cuda.build}" if cuda.build else f"ROCm {cuda.hip}" if cuda.hip else "no GPU"
    yield Check("torch", State.OK, f"{cuda.torch}, built for {build}")
    if driver:
        yield Check("driver", State.OK, driver)
    if cuda.interpreted:
        cure = "unset TRITON_INTERPRET" if driver else "none needed to try things out; its timings are not speeds"
        yield Check("interpreter", State.WARNING, "TRITON_INTERPRET is set: kernels run on the CPU, slowly", cure)
    if not cuda.gpus:
        yield _no_gpu(cuda, driver)
    for gpu in cuda.gpus:
        yield from _of_gpu(gpu, hip=cuda.hip is not None)


def _no_gpu(cuda: Cuda, driver: str) -> Check:
    if driver and cuda.build:
        cure = (
            f"install a driver for CUDA {cuda.build}, or a torch built for this one; look at CUDA_VISIBLE_DEVICES too"
        )
        return Check("gpu", State.BAD, f"driver {driver} is loaded, but torch sees no device", cure)
    if driver:
        return Check(
            "gpu", State.BAD, "there is a driver, but this torch is built without CUDA", "install a torch with CUDA"
        )
    return Check("gpu", State.WARNING, "none: PyTorch in chunks answers every call", "run this where the GPU is")


def _of_gpu(gpu: Gpu, *, hip: bool) -> Iterator[Check]:
    device = gpu.device
    name, number = device.name, device.index
    mig = f", MIG {device.mig_profile}" if device.mig_profile else ""
    seen = f"{name}, {device.capability[0]}.{device.capability[1]}, {device.sm_count} SMs{mig}"
    if hip or device.capability < FIRST_CAPABILITY:
        reason = "of another maker" if hip else "older than Ampere"
        cure = "none on this GPU: PyTorch in chunks answers its calls"
        yield Check(f"gpu {number}", State.WARNING, f"{seen}: {reason}, it has no kernels", cure)
        return
    yield Check(f"gpu {number}", State.OK, seen)
    yield _mode(gpu)
    yield _memory(gpu)
    yield _clocks(gpu)
    ptxas = device.environment.ptxas
    if not ptxas:
        cure = "reinstall triton, or name an assembler in TRITON_PTXAS_PATH"
        yield Check(f"ptxas {number}", State.BAD, "Triton finds no assembler for this GPU", cure)
    else:
        yield Check(f"ptxas {number}", State.OK, ptxas)
    for fault in compilers.known(device.capability, {"triton": device.triton_version, "ptxas": ptxas}):
        found = device.triton_version if fault.tool == "triton" else ptxas
        yield Check("compilers", State.WARNING, f"{fault.tool} {found} on gpu {number}: {fault.told}", fault.cure)


def _mode(gpu: Gpu) -> Check:
    from autotune import driver

    name = f"mode {gpu.device.index}"
    told = "unknown" if gpu.mode is None else facts.MODES.get(gpu.mode, str(gpu.mode))
    if gpu.mode == driver.PROHIBITED:
        return Check(name, State.BAD, f"{told}: no process may use it", f"nvidia-smi -i {gpu.device.index} -c DEFAULT")
    if gpu.mode == driver.EXCLUSIVE_PROCESS:
        cure = (
            "tune beforehand with scripts/prewarm.py while nothing else uses it, or set mode DEFAULT with nvidia-smi -c"
        )
        return Check(name, State.WARNING, f"{told}: nothing can be tuned or proven beside a process that uses it", cure)
    return Check(name, State.OK, told)


def _memory(gpu: Gpu) -> Check:
    from autotune.room import SMALLEST

    name = f"memory {gpu.device.index}"
    if gpu.free is None or gpu.total is None:
        return Check(name, State.OK, "how much is free is not known")
    told = f"{gpu.free / GIB:.1f} of {gpu.total / GIB:.1f} GiB free"
    if gpu.free < SMALLEST:
        cure = f"free some: tuning wants {SMALLEST / GIB:g} GiB beside what runs, or tune before the model is loaded"
        return Check(name, State.WARNING, told, cure)
    return Check(name, State.OK, told)


def _clocks(gpu: Gpu) -> Check:
    name, slowed, degrees = f"clocks {gpu.device.index}", gpu.health.get("slowed_by"), gpu.health.get("temperature_c")
    warmth = f", {degrees} °C" if degrees is not None else ""
    if slowed:
        cure = "let it cool, or raise its power limit: figures measured now are another GPU's"
        return Check(name, State.WARNING, f"slowed by: {slowed}{warmth}", cure)
    return Check(name, State.OK, f"{'not known to be slowed' if slowed is None else 'not slowed'}{warmth}")


def software_checks(cuda: Cuda) -> Iterator[Check]:
    """Yields the checks of Python, Triton, the C compiler, and of packages that have our names."""
    linux = sys.platform == "linux"
    cure = "" if linux else "use a Linux machine, container or WSL: Triton runs nowhere else"
    yield Check("system", State.OK if linux else State.BAD, f"{facts.system()}, {facts.python()}", cure)
    found = facts.versions()["triton"]
    wanted = ".".join(map(str, compilers.OLDEST_TRITON))
    if compilers.version(found) < compilers.OLDEST_TRITON:
        told = found or "not installed"
        yield Check("triton", State.BAD, f"{told}, and {wanted} or newer is needed", f"pip install 'triton>={wanted}'")
    else:
        yield Check("triton", State.OK, found)
    fault = compiler.fault()
    if fault is None:
        yield Check("c compiler", State.OK, f"{compiler.compiler()}, headers in {compiler.headers()}")
    else:
        # Triton builds a launcher for each kernel on a GPU, and none in the interpreter.
        yield Check("c compiler", State.BAD if cuda.gpus else State.WARNING, fault[0], fault[1])
    yield from _packages()


def _packages() -> Iterator[Check]:
    others = facts.claimants()
    for name, owners in others.items():
        cure = f"pip uninstall {' '.join(owners)}, then reinstall flashbias: both write into one folder"
        yield Check("packages", State.BAD, f"{', '.join(owners)} brings a package {name!r} too", cure)
    shadows = list(facts.shadows())
    for path in shadows:
        cure = "rename it, or start Python with -P; children of the tuner look elsewhere first in any case"
        yield Check("packages", State.WARNING, f"{path} has the name of a package of ours", cure)
    if not others and not shadows:
        yield Check("packages", State.OK, f"nothing on the import path is called {', '.join(facts.OURS)} but ours")


def storage_checks(found: Database, settings: Settings) -> Iterator[Check]:
    """Yields the checks of the database, the file system below it, and the settings in force."""
    budget = f"budget {settings.budget_seconds:g} s"
    yield Check("settings", State.OK, f"mode {settings.mode}, {budget}, wait {settings.wait_seconds:g} s")
    if found.path is None:
        cure = "name a folder with --cache-dir, or in FLASHBIAS_CACHE_DIR"
        yield Check("database", State.WARNING, "none: what is tuned is lost when its process ends", cure)
        return
    yield _database(found)
    server = f", 2: the server {settings.db_url}, which is not asked here" if settings.db_url else ""
    yield Check("layers", State.OK, f"1: the user's database ({found.engine}){server}")
    yield _file_system(found.path)
    yield _disk(found.path)


def _database(found: Database) -> Check:
    path = found.path
    assert path is not None, "without a path there is nothing to check"
    writable = filesystem.is_writable(path)
    if found.state == "unreadable":
        cure = "if it is damaged, the next call moves it aside and makes a fresh one; FLASHBIAS_CACHE_DIR names another place"
        return Check("database", State.BAD, f"{path}: {found.fault}", cure)
    if not writable:
        cure = "make its folder writable, or name another in FLASHBIAS_CACHE_DIR"
        return Check("database", State.WARNING, f"{path} cannot be written: what is tuned stays in memory", cure)
    if found.state != "readable":
        return Check("database", State.OK, f"{path} is {found.state}: the first tuning makes it")
    rows = ", ".join(f"{count} {name}" for name, count in found.rows.items() if count) or "no rows"
    return Check("database", State.OK, f"{path}: {rows}")


def _file_system(path: Path) -> Check:
    kind = filesystem.kind(path)
    if filesystem.is_network(kind):
        cure = (
            "name a folder on a local disk in FLASHBIAS_CACHE_DIR, for locks may not hold here; what several nodes shall "
            "know belongs into one PostgreSQL (FLASHBIAS_DB_URL), or, only to be read, into a sealed file (FLASHBIAS_SEEDS)"
        )
        return Check("file system", State.WARNING, f"{kind}: the database lies on a network", cure)
    return Check("file system", State.OK, kind or "unknown")


def _disk(path: Path) -> Check:
    free = filesystem.free_bytes(path)
    if free is None:
        return Check("disk", State.OK, "how much is free is not known")
    told = f"{free / GIB:.1f} GiB free for the database"
    if free < MIB:
        return Check("disk", State.BAD, told, "free some, or name another disk in FLASHBIAS_CACHE_DIR")
    if free < SMALLEST_DISK:
        return Check("disk", State.WARNING, told, "free some: a full disk leaves what is tuned in memory")
    return Check("disk", State.OK, told)
