"""What this computer has and lacks: the checks before anything is installed. Standard library only."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"


@dataclass(frozen=True)
class Machine:
    """What this computer has: a GPU, and a torch in the running Python that already sees it (``borrowed``).

    ``borrowed`` maps the distributions of the running Python to their versions; it is empty unless they are used.
    """

    gpu: bool
    borrowed: dict[str, str]


def has_gpu() -> bool:
    """Whether an NVIDIA driver shows a device, asked without torch."""
    if list(Path("/dev").glob("nvidia[0-9]*")):
        return True
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return False
    return "GPU " in listed


def borrowable() -> dict[str, str]:
    """Returns the running Python's distributions if its torch sees a GPU, else nothing."""
    if not has("torch"):
        return {}
    code = (
        "import importlib.metadata as m, json, torch, triton\n"
        "found = {d.name: d.version for d in m.distributions()} if torch.cuda.is_available() else {}\n"
        "print(json.dumps(found))"
    )
    try:
        ask = [sys.executable, "-P", "-c", code]
        printed = subprocess.run(ask, capture_output=True, text=True, timeout=300, check=True).stdout
        found: dict[str, str] = json.loads(printed.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return {}
    return {normal(name): version for name, version in found.items()}


def normal(name: str) -> str:
    """Returns a distribution's name as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def faults(venv: Path, gigabytes: float) -> Iterator[str]:
    """Yields everything that forbids to make ``venv``, which takes ``gigabytes`` of disk, each with its cure."""
    if sys.platform != "linux":
        yield f"Triton runs on Linux, this is {sys.platform}: use a Linux machine, container or WSL"
    if not has("venv") or not (has("ensurepip") or has("pip")):
        yield f"Python {VERSION} cannot make environments: apt install python{VERSION}-venv (or your system's package)"
    place = next(folder for folder in venv.parents if folder.exists())
    if not os.access(place, os.W_OK):
        yield f"{place} cannot be written: name another folder with --venv DIR"
    free = shutil.disk_usage(place).free / 1e9
    if free < gigabytes:
        yield f"{place} has {free:.1f} GB free, about {gigabytes:g} GB are needed: free some, or name another disk with --venv DIR"


def has(module: str) -> bool:
    """Whether the running Python can import ``module``."""
    return importlib.util.find_spec(module) is not None


def compiler_fault() -> str | None:
    """Returns why Triton could not build its launcher here, None if it can: compiles one line against Python.h."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    if not compiler:
        return "no C compiler found: apt install gcc (or name one in CC)"
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").exists():
        return f"Python's headers are missing ({include}/Python.h): apt install python{VERSION}-dev"
    command = [*shlex.split(compiler), "-x", "c", "-fsyntax-only", "-I", include, "-"]
    try:
        subprocess.run(command, input="#include <Python.h>\n", text=True, capture_output=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        return f"the C compiler {compiler} cannot compile against Python.h ({said[0]}): apt install gcc libc6-dev"
    return None
