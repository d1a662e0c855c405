"""How much memory is free for a provider: asked before it runs, because running out would not be its fault alone."""

from __future__ import annotations

import os
from typing import Final

import torch

from flashbias.bench.inputs import Inputs
from flashbias.bench.providers.base import Provider

# Kept back: workspaces, fragments, and what other processes take meanwhile.
_SHARE: Final = 0.9
GIBIBYTE: Final = 1 << 30


def free(device: torch.device) -> int:
    """Returns the bytes that new tensors may take on ``device``: what nobody has, and what torch keeps unused."""
    if device.type != "cuda":
        return int(_SHARE * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(_SHARE * (torch.cuda.mem_get_info(device)[0] + unused))


def too_much(provider: Provider, inputs: Inputs) -> str:
    """Returns the reason against a provider that needs more memory than is free, "" for any other."""
    needed, there = provider.bytes(inputs), free(inputs.q.device)
    if needed <= there:
        return ""
    return f"needs about {needed / GIBIBYTE:.1f} GiB, {there / GIBIBYTE:.1f} GiB are free"
