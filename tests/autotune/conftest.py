"""Lets sandboxes whose specs are told something else share what imports for them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from autotune import nursery

# The planted specs read these while they run, never while they are imported: a nursery for each value would import torch for nothing.
TOLD = {"PLANTED_ROWS", "PLANTED_UNSTEADY", "SOFTMAX_MARKER", "GUEST_VERSION"}


@pytest.fixture(scope="session", autouse=True)
def shared_nursery() -> Iterator[None]:
    """Has the variables that only planted specs read start no other nursery."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nursery, "READ_LATE", nursery.READ_LATE | TOLD)
        yield
