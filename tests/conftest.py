"""What every test starts from: no settings of the user's, a database of its own, and memory that bites."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# These begin, so that no process is left with a long one at the end while the others have nothing to do.
LONGEST = (
    "scripts/test_prewarm.py",
    "autotune/test_sandbox.py",
    "scripts/test_quickstart.py",
    "autotune/test_tuner_processes.py",
    "autotune/test_nursery.py",
    "flashbias/test_kernels.py",
)


@pytest.fixture(scope="session", autouse=True)
def own_settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Hides the user's FLASHBIAS_* variables and keeps tuning results out of the user's database.

    One database serves the whole run, as it would a user: each problem is tuned once. A test about tuning names its own.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("FLASHBIAS_")]:
            patch.delenv(name)
        patch.setenv("FLASHBIAS_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Makes torch fill fresh memory with NaN, so that an element nobody writes cannot pass by luck."""
    torch = sys.modules.get("torch")
    if torch is None or torch.cuda.is_available():  # on a GPU many operations have no deterministic form
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first, and skips the tests of the other process: interpreted functions cannot be compiled."""
    place = {str(Path(__file__).parent / name): number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(str(item.path), len(place)))
    if os.environ.get("TRITON_INTERPRET", "0") not in {"", "0"}:
        skip = pytest.mark.skip(reason="functions decorated under TRITON_INTERPRET cannot be compiled")
        for item in items:
            if item.get_closest_marker("compile_only"):
                item.add_marker(skip)
