"""What NVIDIA's driver library knows of a device, asked without making a context on it.

A question that cannot be answered (no library, an old driver, an error) is answered with None. CUDA's runtime numbers
devices as the driver does, so an index is that of torch.
"""

from __future__ import annotations

import ctypes
import functools
import uuid
from typing import Any, Final

import torch

DEFAULT, PROHIBITED, EXCLUSIVE_PROCESS = 0, 2, 3
_LIBRARIES: Final = ("libcuda.so.1", "libcuda.so")
_COMPUTE_MODE: Final = 20  # CU_DEVICE_ATTRIBUTE_COMPUTE_MODE
_THREADS_PER_MULTIPROCESSOR: Final = 39  # CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR
_SUCCESS: Final = 0


class Driver:
    """The driver behind ``library`` (libcuda, loaded by ctypes); before something else initialises it, it knows nothing."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def compute_mode(self, index: int) -> int | None:
        """Returns who may use the device: ``DEFAULT`` (any process), ``EXCLUSIVE_PROCESS`` (one), ``PROHIBITED`` (none)."""
        device = self._device(index)
        return None if device is None else self._attribute(_COMPUTE_MODE, device)

    def has_context(self, index: int) -> bool | None:
        """Returns whether this process has its primary context, the one that torch uses, on the device."""
        device, flags, active = self._device(index), ctypes.c_uint(0), ctypes.c_int(0)
        done = device is not None and self._call(
            "cuDevicePrimaryCtxGetState", device, ctypes.byref(flags), ctypes.byref(active)
        )
        return bool(active.value) if done else None

    def uuid(self, index: int) -> str | None:
        """Returns the device's UUID without a prefix: that of the slice, not of its GPU, where the device is a MIG slice."""
        device, text = self._device(index), (ctypes.c_ubyte * 16)()
        done = device is not None and self._call("cuDeviceGetUuid_v2", ctypes.byref(text), device)
        return str(uuid.UUID(bytes=bytes(text))) if done else None

    def resident_blocks(self, function: int, threads: int, shared: int) -> int | None:
        """Returns how many blocks of a kernel a multiprocessor of the current context's device holds at a time.

        ``function`` is the handle (CUfunction) of a kernel that is loaded there, ``threads`` are those of a block, and
        ``shared`` is its dynamic shared memory in bytes.
        """
        blocks = ctypes.c_int(-1)
        arguments = ctypes.c_void_p(function), ctypes.c_int(threads), ctypes.c_size_t(shared)
        done = self._call("cuOccupancyMaxActiveBlocksPerMultiprocessor", ctypes.byref(blocks), *arguments)
        return blocks.value if done else None

    def resident_threads(self) -> int | None:
        """Returns the most threads that a multiprocessor of the current context's device holds at a time."""
        device = ctypes.c_int(-1)
        done = self._call("cuCtxGetDevice", ctypes.byref(device))
        return self._attribute(_THREADS_PER_MULTIPROCESSOR, device) if done else None

    def _attribute(self, number: int, device: ctypes.c_int) -> int | None:
        value = ctypes.c_int(-1)
        return value.value if self._call("cuDeviceGetAttribute", ctypes.byref(value), number, device) else None

    def _device(self, index: int) -> ctypes.c_int | None:
        device = ctypes.c_int(-1)
        return device if self._call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(index)) else None

    def _call(self, name: str, *arguments: Any) -> bool:
        """Returns whether the driver has such a function and it succeeded."""
        function = getattr(self._library, name, None)
        return function is not None and function(*arguments) == _SUCCESS


def started() -> Driver | None:
    """Returns the driver if CUDA works in this process by now; asking starts nothing.

    In a fork of a process that used CUDA it does not work.
    """
    if not torch.cuda.is_initialized() or torch.version.hip is not None:
        return None
    return loaded()


@functools.cache
def loaded() -> Driver | None:
    """Returns the driver whether CUDA works in this process or not, None where there is no library of it."""
    for name in _LIBRARIES:
        try:
            return Driver(ctypes.CDLL(name))
        except OSError:
            continue
    return None
