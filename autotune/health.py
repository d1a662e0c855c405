"""How a GPU is at this moment: its temperature, and what holds its clocks down, as its own tool tells."""

from __future__ import annotations

import subprocess
from typing import Final

from cache_db.models import Scalar

SECONDS: Final = 5.0
# Bits of NVML's "clocks event reasons" that slow a busy GPU. The others say that it is idle or set to some clock.
REASONS: Final = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal",
    0x40: "hardware thermal",
    0x80: "power brake",
}


def read(gpu: str) -> dict[str, Scalar]:
    """Returns ``temperature_c`` and ``slowed_by`` (comma-separated, "" if nothing) of the GPU of this UUID.

    What is not known is left out: there is no GPU, no tool, or the tool is silent about a slice of one.
    """
    if not gpu.startswith("GPU-"):
        return {}
    command = ["nvidia-smi", "--format=csv,noheader,nounits", f"--id={gpu}"]
    # Older drivers know the reasons by their former name only.
    for reasons in ("clocks_event_reasons.active", "clocks_throttle_reasons.active"):
        try:
            told = subprocess.run(
                [*command, f"--query-gpu=temperature.gpu,{reasons}"],
                capture_output=True,
                text=True,
                timeout=SECONDS,
                check=True,
            )
        except (OSError, subprocess.SubprocessError):
            continue
        return parse(told.stdout)
    return {}


def parse(line: str) -> dict[str, Scalar]:
    """Returns what one answer says, as "41, 0x0000000000000004": degrees Celsius and a mask of reasons."""
    temperature, _, reasons = line.strip().partition(",")
    found: dict[str, Scalar] = {}
    if temperature.strip().isdecimal():
        found["temperature_c"] = int(temperature)
    try:
        mask = int(reasons, 16)
    except ValueError:
        return found
    found["slowed_by"] = ", ".join(name for bit, name in REASONS.items() if mask & bit)
    return found
