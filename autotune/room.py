"""Whether a child may work beside its caller on one device, and how much of its memory it may take.

What the caller will soon need is not the sweep's to take: a child leaves ``reserve`` of what is free when it starts.
Nothing here starts CUDA or makes a context in the caller, and what cannot be found out forbids nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
from typing import Final

import torch

from autotune import driver
from autotune.device import DeviceInfo
from autotune.driver import Driver
from autotune.errors import NoRoom
from autotune.process import SandboxError

GIB: Final = 1 << 30
# A child's context and libraries take about 0.5 GiB, the smallest proofs a few hundred MiB.
SMALLEST: Final = 3 * GIB // 2
CURE: Final = "tune before the model is loaded"
# What messages say where memory ran out. A fresh process whose cuBLAS finds none for its handle calls it not initialised;
# nothing else but a broken installation or context does, and that shows itself in every other way too.
SIGNS: Final = ("out of memory", "MemoryError", "ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED")


def reserve(free: int) -> int:
    """Returns how many of ``free`` bytes a child leaves to its caller: a tenth, at least 1 GiB."""
    return max(GIB, free // 10)


def admit(device: DeviceInfo, asked: Driver | None = None) -> None:
    """Raises SandboxError where no second process may use ``device``, and NoRoom where too little memory is free.

    The caller's unused cached memory is given back before the latter. ``asked`` is the driver (by default this
    process's own).
    """
    asked = asked or (driver.started() if device.index >= 0 else None)
    if asked is None:
        return
    mode, used_here = asked.compute_mode(device.index), asked.has_context(device.index)
    if mode == driver.PROHIBITED:
        raise SandboxError(f"{device.name} is in compute mode Prohibited, in which no process may use it")
    if mode == driver.EXCLUSIVE_PROCESS and used_here:
        raise SandboxError(
            f"{device.name} is in compute mode Exclusive_Process and this process has it, so that no child can prove or "
            "time anything there. Tune beforehand, while no other process uses this GPU"
        )
    if not used_here:
        return
    free = free_memory(device)
    if free is not None and free < SMALLEST and release(device):
        free = free_memory(device)
    if free is not None and free < SMALLEST:
        raise NoRoom(f"{gib(free)} of GPU memory are free, and at least {gib(SMALLEST)} are needed; {CURE}")


def free_memory(device: DeviceInfo) -> int | None:
    """Returns how many bytes are free on a device on which this process has a context, None if it cannot tell."""
    try:
        return int(torch.cuda.mem_get_info(device.index)[0])
    except (RuntimeError, AssertionError):  # the latter where torch knows no CUDA
        return None


def release(device: DeviceInfo) -> bool:
    """Gives back what this process's allocator keeps unused; returns whether there was anything and it may.

    That waits for the device, which may wait for the other ranks of a job, and is forbidden while a graph is captured:
    there nothing is given back.
    """
    if device.index < 0 or not torch.cuda.is_initialized() or in_job():
        return False
    try:
        unused = torch.cuda.memory_reserved(device.index) - torch.cuda.memory_allocated(device.index)
        if unused <= 0 or torch.cuda.is_current_stream_capturing():
            return False
        torch.cuda.empty_cache()
    except RuntimeError:  # a sticky error of the caller's own; its next call will say so
        return False
    return True


def in_job() -> bool:
    """Returns whether this process has peers, for whose collectives its device may be waiting."""
    with contextlib.suppress(ValueError):
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            return True
    distributed = torch.distributed
    return bool(distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1)


def confine(device: torch.device) -> None:
    """Limits this process, a child, to what it has and what is free now, less the ``reserve``."""
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    allowed = torch.cuda.memory_reserved(device) + max(free - reserve(free), 0)
    torch.cuda.set_per_process_memory_fraction(min(allowed / total, 1.0), device)


def ran_out(error: BaseException) -> bool:
    """Returns whether ``error`` says that memory ran out: torch's own, or that of a library which asks the driver itself."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and tells_of_no_memory(str(error))


def tells_of_no_memory(text: str) -> bool:
    """Returns whether ``text``, what an error said here or in a child, means that memory ran out."""
    return any(sign in text for sign in SIGNS)


def lack(what: str, error: BaseException, device: torch.device) -> str:
    """Returns what a person is told where ``what`` did not fit: how much was wanted, and how much is free."""
    wanted = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
    size = f": {wanted.group(1)} more were needed" if wanted else ""
    free = ""
    if device.type == "cuda":
        bytes_ = int(torch.cuda.mem_get_info(device)[0])
        free = f"; {gib(bytes_)} of GPU memory are free, of which {gib(min(reserve(bytes_), bytes_))} are left to the caller"
    return f"no room for {what}{size}{free}; {CURE}"


def gib(count: int) -> str:
    """Returns ``count`` bytes in GiB."""
    return f"{count / GIB:.2f} GiB"
