"""What a child finds round it: its environment, its import path, and the one GPU it sees."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from autotune.device import UNKNOWN_SLICE, DeviceInfo

HOME: Final = str(Path(__file__).resolve().parent.parent)
# A child that believed it were a rank of the caller's job would wait for the others, and one that launched
# synchronously would time the host.
DROPPED: Final = frozenset(
    {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK"}
    | {"ROLE_WORLD_SIZE", "ROLE_NAME", "CUDA_LAUNCH_BLOCKING", "PYTHONINSPECT", "PYTHONWARNINGS"}
    | {"TRITON_INTERPRET"}
)
DROPPED_PREFIXES: Final = ("MASTER_", "TORCHELASTIC_")


def import_path() -> list[str]:
    """Returns the caller's ``sys.path`` for a child that must import the very same packages.

    The empty entry of a REPL becomes the working directory. A directory that would shadow this package (a user's own
    ``autotune.py``, the unrelated distribution of that name) goes to the end.
    """
    entries = list(dict.fromkeys(str(Path(entry).absolute()) for entry in sys.path if isinstance(entry, str)))
    entries = [entry for entry in entries if os.pathsep not in entry]
    shadowing = [entry for entry in entries if _shadows(Path(entry))]
    kept = [entry for entry in entries if entry not in shadowing]
    return kept + [HOME] * (HOME not in kept) + shadowing


def _shadows(folder: Path) -> bool:
    """Returns whether ``import autotune`` would find another one in ``folder``."""
    found = (folder / "autotune.py").exists() or (folder / "autotune" / "__init__.py").exists()
    return found and str(folder.resolve()) != HOME


def visible_device(device: DeviceInfo, variables: Mapping[str, str]) -> str:
    """Returns what names ``device``, and nothing else, in a child's CUDA_VISIBLE_DEVICES.

    That is the caller's own entry where it is a UUID of this very device in whatever form its driver understands (old
    ones call a MIG slice MIG-GPU-UUID/instance/instance), else the device's UUID. An entry that is a number is taken
    only for a slice whose UUID nobody knows: CUDA read the variable once, and a program may have set it since.
    """
    entry = _entry(device.index, variables.get("CUDA_VISIBLE_DEVICES", ""))
    if device.uuid.startswith(UNKNOWN_SLICE):
        return entry or str(device.index)
    if entry.startswith("MIG-GPU-") and device.mig_profile:
        return entry
    return entry if entry and device.uuid.lower().startswith(entry.lower()) else device.uuid


def _entry(index: int, value: str) -> str:
    """Returns entry ``index`` of a list of devices, "" where it has none: the first that is no device ends it."""
    entries = []
    for entry in map(str.strip, value.split(",")):
        if not re.fullmatch(r"\d+|(?:GPU|MIG)-[0-9A-Za-z/-]+", entry):
            break
        entries.append(entry)
    return entries[index] if 0 <= index < len(entries) else ""


def environment(device: DeviceInfo, *, gpu: bool) -> dict[str, str]:
    """Returns a child's environment: the caller's in no job, with its one GPU or (to compile) without any."""
    kept = {name: value for name, value in os.environ.items() if name not in DROPPED}
    kept = {name: value for name, value in kept.items() if not name.startswith(DROPPED_PREFIXES)}
    kept["PYTHONPATH"] = os.pathsep.join(import_path())
    kept["CUDA_VISIBLE_DEVICES"] = visible_device(device, os.environ) if gpu else ""
    if device.interpreted:
        kept["TRITON_INTERPRET"] = "1"
    return kept
