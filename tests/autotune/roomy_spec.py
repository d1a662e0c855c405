"""The planted softmax on a device that holds only so many rows: the number in the file that ``PLANTED_ROWS`` names.

``ROOMY`` can be timed with fewer rows, ``CROWDED`` cannot. Both are timed on 64 rows, proven on 7 at most and screened
for races on 9. ``BIG`` is for a real device.
"""

from __future__ import annotations

import itertools
import os
import weakref
from pathlib import Path

import torch

from autotune.device import DeviceInfo
from autotune.spec import Case, Tensors
from cache_db.models import Problem
from tests.autotune.planted_spec import PlantedSpec, planted_problem

TIMED_ROWS = 64
_in_use: dict[int, int] = {}
_numbers = itertools.count()


class CrowdedSpec(PlantedSpec):
    """Planted softmax whose inputs do not fit above the planted number of rows."""

    def representative(self, problem: Problem, device: DeviceInfo) -> Case:
        """Returns more rows than any case has."""
        return self._case("representative", problem, rows=TIMED_ROWS)

    def inputs(self, problem: Problem, case: Case, seed: int, device: torch.device) -> Tensors:
        """Returns the softmax's, or runs out of memory; the rows of inputs that are still in use count too."""
        limit, rows = Path(os.environ["PLANTED_ROWS"]).read_text(encoding="utf-8"), int(case.sizes["rows"])
        found, number = super().inputs(problem, case, seed, device), next(_numbers)
        _in_use[number] = rows
        weakref.finalize(found["x"], _in_use.pop, number)
        if sum(_in_use.values()) > int(limit):
            error = torch.OutOfMemoryError("planted. Tried to allocate 7.00 GiB. GPU 0 is full")
            error.cycle = error  # type: ignore[attr-defined]  # it, and what its frames hold, outlives its handling
            raise error
        return found


class RoomySpec(CrowdedSpec):
    """The same with smaller sizes to be timed, 16 rows at least."""

    def smaller(self, problem: Problem, case: Case) -> Case | None:
        """Returns half of the rows."""
        rows = int(case.sizes["rows"]) // 2
        return self._case(case.name, problem, rows=rows) if rows >= 16 else None


class BigSpec(PlantedSpec):
    """Planted softmax that is timed on 0.6 GB a tensor, or less, on a device that is as full as it is."""

    def representative(self, problem: Problem, device: DeviceInfo) -> Case:
        """Returns eight million rows."""
        return self._case("representative", problem, rows=1 << 23)

    def inputs(self, problem: Problem, case: Case, seed: int, device: torch.device) -> Tensors:
        """Returns the softmax's; at the timed sizes drawn on ``device``, for a CPU would need a minute."""
        if case.name != "representative":
            return super().inputs(problem, case, seed, device)
        generator = torch.Generator(device).manual_seed(seed)
        shape, dtype = self._shape(case), self.floor_dtype(problem)
        return {name: torch.randn(shape, generator=generator, device=device, dtype=dtype) for name in ("x", "dy")}

    def smaller(self, problem: Problem, case: Case) -> Case | None:
        """Returns half of the rows, 65,536 at least."""
        rows = int(case.sizes["rows"]) // 2
        return self._case(case.name, problem, rows=rows) if rows >= 1 << 16 else None


def roomy_problem(
    spec: str = "ROOMY", forward: str = "32 64", backward: str = "32", device: DeviceInfo | None = None
) -> Problem:
    """Returns a problem with these candidates, on ``device`` or else the interpreter."""
    plain = planted_problem(forward, backward, device=device)
    return Problem(**{**dict(plain), "spec": f"{__name__}:{spec}"})


BIG = BigSpec()
CROWDED = CrowdedSpec()
ROOMY = RoomySpec()
