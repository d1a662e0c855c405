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
_COMPUTE_MODE: Final = 20  # CU_DEVICE_ATTRIBUTE_COMPUTE_MODE
_SUCCESS: Final = 0


class Driver:
    """The driver behind ``library`` (libcuda, loaded by ctypes), which something else has initialised."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def compute_mode(self, index: int) -> int | None:
        """Returns who may use the device: ``DEFAULT`` (any process), ``EXCLUSIVE_PROCESS`` (one), ``PROHIBITED`` (none)."""
        device, mode = self._device(index), ctypes.c_int(-1)
        done = device is not None and self._call("cuDeviceGetAttribute", ctypes.byref(mode), _COMPUTE_MODE, device)
        return mode.value if done else None

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
    return _loaded()


@functools.cache
def _loaded() -> Driver | None:
    try:
        return Driver(ctypes.CDLL("libcuda.so.1"))
    except OSError:
        return None
