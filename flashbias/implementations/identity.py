"""Who a foreign implementation is: the versions of all that decides what it computes and how fast.

They are the parameters of its configs, so a row of other versions is another config: what was found of it, good or
bad, says nothing of the one that is installed here, and the rules refuse to run it.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Mapping
from typing import Final

import torch

from cache_db.models import Scalar

SDPA: Final = "sdpa"
FLASH4: Final = "flash4"
CUDNN: Final = "cudnn"
# flash-attn-4 is compiled on the spot by nvidia-cutlass-dsl, whose version decides the machine code.
_FLASH4_PACKAGES: Final = ("flash-attn-4", "nvidia-cutlass-dsl")


@functools.cache
def identity(implementation: str, variant: str) -> Mapping[str, Scalar] | None:
    """Returns the versions that ``implementation`` has here, None where it is missing or does not say.

    Imports nothing foreign; the version of cuDNN is asked of torch, which loads that library.
    """
    found: dict[str, Scalar] = {"torch": str(torch.__version__)}
    if implementation == FLASH4:
        for package in _FLASH4_PACKAGES:
            version = _installed(package)
            if version is None:
                return None
            found[package] = version
    elif implementation == SDPA and variant == CUDNN:
        cudnn = _cudnn()
        if cudnn is None:
            return None
        found[CUDNN] = cudnn
    elif implementation != SDPA:
        return None
    return found


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except (importlib.metadata.PackageNotFoundError, OSError, ValueError):
        return None


def _cudnn() -> int | None:
    try:
        found = torch.backends.cudnn.version()
    except (RuntimeError, OSError):  # libraries that do not fit together say so here
        return None
    return found if isinstance(found, int) else None
