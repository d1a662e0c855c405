"""Everything in this folder needs a CUDA device and real compilation; elsewhere it is skipped with the reason."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def _missing() -> str | None:
    """Returns why GPU tests cannot run in this process, None where they can."""
    if os.environ.get("TRITON_INTERPRET", "0") not in {"", "0"}:
        return "TRITON_INTERPRET is set: kernels would run on the CPU"
    import torch

    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks this folder's tests ``gpu`` and skips them where no GPU can run them."""
    here = Path(__file__).parent
    mine = [item for item in items if here in item.path.parents]
    reason = _missing() if mine else None
    for item in mine:
        item.add_marker(pytest.mark.gpu)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
