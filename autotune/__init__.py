"""Finds, proves and remembers the fastest safe config of any kernel that implements :class:`KernelSpec`.

One door: :func:`resolve` turns a problem into the configs to run.
"""

from autotune.device import DeviceInfo
from autotune.errors import AutotuneError, CacheMiss, SettingsError
from autotune.proofs import Choice
from autotune.settings import Mode, Settings
from autotune.spec import KernelSpec
from autotune.tuner import Resolution, confirm, forget, resolve

__all__ = [
    "AutotuneError",
    "CacheMiss",
    "Choice",
    "DeviceInfo",
    "KernelSpec",
    "Mode",
    "Resolution",
    "Settings",
    "SettingsError",
    "confirm",
    "forget",
    "resolve",
]
