"""Finds, proves and remembers the fastest safe config of any kernel that implements :class:`KernelSpec`.

One door: :func:`resolve` turns a problem into the configs to run.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autotune.device import DeviceInfo
    from autotune.errors import AutotuneError, CacheMiss, SettingsError, Taken
    from autotune.proofs import Choice
    from autotune.resolution import Resolution
    from autotune.settings import Mode, Settings
    from autotune.spec import KernelSpec
    from autotune.tuner import confirm, forget, refresh, resolve

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
    "Taken",
    "confirm",
    "forget",
    "refresh",
    "resolve",
]

_HOMES = {
    "AutotuneError": "errors",
    "CacheMiss": "errors",
    "Choice": "proofs",
    "DeviceInfo": "device",
    "KernelSpec": "spec",
    "Mode": "settings",
    "Resolution": "resolution",
    "Settings": "settings",
    "SettingsError": "errors",
    "Taken": "errors",
    "confirm": "tuner",
    "forget": "tuner",
    "refresh": "tuner",
    "resolve": "tuner",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: who only reads the database pays for neither torch nor Triton."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
