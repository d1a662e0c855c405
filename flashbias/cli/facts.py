"""What is here: GPUs, software, settings and the database, each asked without changing anything.

No context is made on a GPU, which one in compute mode Exclusive_Process would give once, and no database is made.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import flashbias
from cache_db.errors import CacheError
from cache_db.layers import FILE_NAME
from cache_db.models import Scalar
from flashbias.cli import filesystem

if TYPE_CHECKING:
    from autotune.device import DeviceInfo

SECONDS: Final = 10.0
MODES: Final = {0: "Default", 1: "Exclusive_Thread", 2: "Prohibited", 3: "Exclusive_Process"}
PACKAGES: Final = ("torch", "triton", "numpy", "pydantic", "sqlalchemy", "psycopg", "rich")
OURS: Final = ("autotune", "cache_db", "flashbias")


@dataclass(frozen=True)
class Gpu:
    """One CUDA device; sizes in bytes, None for what is not known. ``health`` is that of :mod:`autotune.health`."""

    device: DeviceInfo
    mode: int | None
    free: int | None
    total: int | None
    health: dict[str, Scalar]


@dataclass(frozen=True)
class Cuda:
    """What torch sees: its build, whether it can compute on a GPU, and every device. ``fault`` is why it cannot be asked."""

    torch: str = ""
    build: str | None = None
    hip: str | None = None
    gpus: tuple[Gpu, ...] = ()
    interpreted: bool = False
    fault: str = ""


@dataclass(frozen=True)
class Database:
    """The user's database: ``state`` is none (memory only), absent, empty, readable or unreadable (``fault`` says why)."""

    path: Path | None
    state: str
    rows: dict[str, int] = field(default_factory=dict)
    fault: str = ""

    @property
    def engine(self) -> str:
        """What reads it."""
        return f"SQLite {sqlite3.sqlite_version}"


def cuda() -> Cuda:
    """Returns what torch and the driver tell of the GPUs; whatever fails there is a ``fault``, never an exception."""
    try:
        import torch

        from autotune.device import describe, interpreting
    except Exception as error:  # noqa: BLE001 - a broken installation raises anything, OSError of a library first
        return Cuda(fault=f"{type(error).__name__}: {error}")
    build, hip, on = torch.version.cuda, torch.version.hip, interpreting()
    try:
        gpus = tuple(_gpu(describe(index)) for index in range(torch.cuda.device_count()))
    except Exception as error:  # noqa: BLE001 - a driver that fails at its start
        return Cuda(str(torch.__version__), build, hip, (), on, f"{type(error).__name__}: {error}")
    return Cuda(str(torch.__version__), build, hip, gpus, on)


def database(folder: Path | None) -> Database:
    """Returns what is known of the database in ``folder``; it is read if it is there, and never made, mended or moved."""
    if folder is None:
        return Database(None, "none")
    path = folder / FILE_NAME
    try:
        if not path.stat().st_size:
            return Database(path, "empty")
    except (FileNotFoundError, NotADirectoryError):
        return Database(path, "absent")
    except OSError as error:
        return Database(path, "unreadable", fault=str(error))
    from cache_db.store import Store

    try:
        return Database(path, "readable", Store.open(path).counts())
    except CacheError as error:
        return Database(path, "unreadable", fault=str(error))


def versions() -> dict[str, str]:
    """Returns the version of every package that takes part, "" where it is not installed."""
    return {name: _version(name) for name in PACKAGES}


def driver() -> str:
    """Returns the version of NVIDIA's kernel driver, "" where none is loaded; known without torch."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
        found = re.search(r"\b(\d{3}\.\d+(?:\.\d+)?)\b", text)
        return found.group(1) if found else ""
    except OSError:
        return _smi("--query-gpu=driver_version").partition("\n")[0]


def system() -> str:
    """Returns the operating system and the processor's kind."""
    return f"{platform.system()} {platform.release()} {platform.machine()}"


def python() -> str:
    """Returns the running Python's version."""
    return f"{platform.python_implementation()} {platform.python_version()}"


def shadows() -> Iterator[Path]:
    """Yields files and folders on the import path that have the name of one of our packages and are not ours."""
    home = Path(flashbias.__file__).resolve().parent.parent
    for entry in dict.fromkeys(sys.path):
        folder = Path(entry or os.curdir)
        for name in OURS:
            for found in (folder / f"{name}.py", folder / name / "__init__.py"):
                if found.exists() and not found.resolve().is_relative_to(home / name):
                    yield found


def claimants() -> dict[str, list[str]]:
    """Returns package -> the installed distributions other than flashbias that bring a package of that name."""
    owners = importlib.metadata.packages_distributions()
    found = {name: sorted({each for each in owners.get(name, ()) if each.lower() != "flashbias"}) for name in OURS}
    return {name: others for name, others in found.items() if others}


def at_home(path: object) -> str:
    """Returns a path as a bug report may hold it: the home folder, which has its owner's name, is ``~``."""
    text, home = str(path), os.path.expanduser("~")  # noqa: PTH111 - where there is no home it raises nothing
    return f"~{text.removeprefix(home)}" if home not in ("", "/", "~") and text.startswith(f"{home}{os.sep}") else text


def disk(found: Database) -> tuple[str | None, int | None]:
    """Returns the type of the file system below the database, and the bytes free on it."""
    if found.path is None:
        return None, None
    return filesystem.kind(found.path), filesystem.free_bytes(found.path)


def memory(answer: str) -> tuple[int | None, int | None]:
    """Returns the bytes free and in all that ``nvidia-smi`` tells in MiB, as "139000, 143771"."""
    parts = [part.strip() for part in answer.partition("\n")[0].split(",")]
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        return None, None
    return int(parts[0]) << 20, int(parts[1]) << 20


def _gpu(device: DeviceInfo) -> Gpu:
    from autotune import driver as asked
    from autotune import health

    known = asked.started()
    mode = known.compute_mode(device.index) if known else None
    whole = device.uuid.startswith("GPU-")  # the tool tells nothing of a slice by its UUID
    free, total = memory(_smi("--query-gpu=memory.free,memory.total", f"--id={device.uuid}")) if whole else (None, None)
    return Gpu(device, mode, free, total, health.read(device.uuid))


def _smi(*query: str) -> str:
    """Returns what ``nvidia-smi`` answers as comma-separated values, "" where it does not."""
    command = ["nvidia-smi", *query, "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
