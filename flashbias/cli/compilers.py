"""Versions of compilers that are known to make wrong code of kernels like ours, and what is to be done about each.

Gathered from the issues that are named. No list is complete: what keeps a miscompiled config from running is the gate.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

OLDEST_TRITON: Final = (3, 6)

Version = tuple[int, ...]


class Fault(NamedTuple):
    """One known fault: on which capabilities, with which compiler, between which versions (the last is the first good one)."""

    tool: str
    capabilities: Callable[[int], bool]
    first: Version
    good: Version
    told: str
    cure: str


_GATED: Final = "nothing for attention itself, whose kernels avoid it and are proven"
FAULTS: Final = (
    Fault(
        "triton",
        lambda major: major == 9,
        (3, 4),
        (3, 7, 1),
        "transposes of computed tiles come out wrong (fla-org/flash-linear-attention #640)",
        f"{_GATED}; kernels of your own must not transpose what they computed, or want Triton 3.7.1",
    ),
    Fault(
        "ptxas",
        lambda major: major == 9,
        (0,),
        (13, 3),
        "registers of asynchronous products may be overwritten too early (triton-lang/triton #9433, #11781)",
        "nothing while the gate's race screens pass; if many configs are racy, name a ptxas of CUDA 13.3 in TRITON_PTXAS_PATH",
    ),
    Fault(
        "triton",
        lambda major: major == 10,
        (3, 6),
        (3, 8),
        "sums of products may differ from launch to launch with 4 and 8 warps (triton-lang/triton #9871, #10590)",
        "nothing while the gate's race screens pass; if many configs are racy, a newer Triton",
    ),
)


def version(text: str) -> Version:
    """Returns the numbers that a version begins with, () where it begins with none."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, found.group().split("."))) if found else ()


def known(capability: tuple[int, int], versions: dict[str, str]) -> Iterator[Fault]:
    """Yields the faults of these versions (tool -> version) on a GPU of ``capability``; an unknown version has none."""
    for fault in FAULTS:
        found = version(versions.get(fault.tool, ""))
        if found and fault.capabilities(capability[0]) and fault.first <= found < fault.good:
            yield fault
