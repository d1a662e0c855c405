"""What autotune knows about the device a problem runs on, read once per process and device."""

from __future__ import annotations

import functools
import os
import re
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
import triton

from autotune import driver
from autotune.place import INTERPRETER
from cache_db.models import Environment

# Stands before what torch calls the UUID of a slice where the driver does not say: it may be its GPU's.
UNKNOWN_SLICE: Final = "MIG-of-"


@dataclass(frozen=True)
class DeviceInfo:
    """One GPU (or Triton's interpreter, or a compile-only target) as seen by the search and the gate.

    ``index`` is the torch device index (-1 without a GPU); ``capability`` is (major, minor);
    ``shared_memory`` is the opt-in shared memory of one block in bytes.
    """

    index: int
    name: str
    uuid: str
    capability: tuple[int, int]
    sm_count: int
    shared_memory: int
    mig_profile: str
    triton_version: str
    environment: Environment

    @property
    def interpreted(self) -> bool:
        """Whether kernels run in Triton's interpreter on the CPU."""
        return self.name == INTERPRETER

    @property
    def torch_device(self) -> torch.device:
        """The torch device that inputs and outputs live on."""
        return torch.device("cpu") if self.index < 0 else torch.device("cuda", self.index)

    def to_json(self) -> dict[str, Any]:
        """Returns plain data that :meth:`from_json` turns back into an equal object."""
        return {**asdict(self), "environment": self.environment.model_dump()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> DeviceInfo:
        """Rebuilds what :meth:`to_json` wrote."""
        data = dict(data)
        data["capability"] = tuple(data["capability"])
        data["environment"] = Environment(**data["environment"])
        return cls(**data)


def interpreting() -> bool:
    """Whether this process runs Triton kernels in the interpreter (``TRITON_INTERPRET=1``)."""
    return bool(triton.knobs.runtime.interpret)


@functools.cache
def ptxas_version(arch: int) -> str:
    """Returns the version of the assembler Triton uses for ``arch`` (90 for Hopper), "" if there is none."""
    try:
        from triton.backends.nvidia.compiler import get_ptxas

        return str(get_ptxas(arch).version)
    except (ImportError, TypeError, RuntimeError, OSError, subprocess.SubprocessError):
        return ""


@functools.cache
def driver_version() -> str:
    """Returns the NVIDIA kernel driver's version, "" where none is loaded."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
        found = re.search(r"\b(\d{3}\.\d+(?:\.\d+)?)\b", text)
        if found:
            return found.group(1)
    except OSError:
        pass
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return ""


@functools.cache
def describe(index: int) -> DeviceInfo:
    """Returns what is known of CUDA device ``index``, or of the interpreter for ``index`` -1."""
    if index < 0:
        environment = Environment(driver="", ptxas="", torch=str(torch.__version__))
        return DeviceInfo(
            -1, INTERPRETER, "", (0, 0), os.cpu_count() or 1, 1 << 30, "", triton.__version__, environment
        )
    properties = torch.cuda.get_device_properties(index)  # makes no context, which an exclusive GPU would give once
    capability = (properties.major, properties.minor)
    environment = Environment(
        driver=driver_version(),
        ptxas=ptxas_version(10 * properties.major + properties.minor),
        torch=str(torch.__version__),
    )
    name = properties.name
    mig = re.search(r"MIG (\S+)", name)
    return DeviceInfo(
        index=index,
        name=name,
        uuid=uuid_of(index),
        capability=capability,
        sm_count=properties.multi_processor_count,
        shared_memory=int(getattr(properties, "shared_memory_per_block_optin", 227 * 1024)),
        mig_profile=mig.group(1) if mig else "",
        triton_version=triton.__version__,
        environment=environment,
    )


def uuid_of(index: int) -> str:
    """Returns the UUID of CUDA device ``index`` as nvidia-smi and CUDA_VISIBLE_DEVICES have it: GPU-…, or MIG-… of a slice.

    A slice has one of its own, which only the driver tells; without it the text begins with ``UNKNOWN_SLICE``.
    """
    properties = torch.cuda.get_device_properties(index)
    sliced = "MIG " in properties.name
    found = driver.started()
    told = found.uuid(index) if found else None
    if told is not None:
        return f"{'MIG' if sliced else 'GPU'}-{told}"
    plain = str(properties.uuid).removeprefix("GPU-").removeprefix("MIG-")
    return f"{UNKNOWN_SLICE if sliced else 'GPU-'}{plain}"
