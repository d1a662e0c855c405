"""Where a judgement was made, and whether that is here; known without torch."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from autotune.lease import hostname

INTERPRETER: Final = "triton-interpreter"
_UUID: Final = re.compile(r"\b(?:GPU|MIG)-[0-9a-fA-F-]{36}(?:/\d+/\d+)?")


@dataclass(frozen=True)
class Place:
    """A host and the UUIDs of its GPUs (those that count: one for a search, all of them for a person)."""

    host: str
    gpus: frozenset[str]

    @classmethod
    def here(cls) -> Self:
        """Returns this host with every GPU that its driver shows; without a driver it has none."""
        return cls(hostname(), frozenset(_UUID.findall(_listed())))


def _listed() -> str:
    """Returns a text in which the UUID of each GPU, and of each slice of one, stands."""
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        files = Path("/proc/driver/nvidia/gpus").glob("*/information")
        return "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
