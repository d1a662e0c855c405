"""Which rows from elsewhere may enter the database: those that today's rules let run on the GPU they are for."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import TYPE_CHECKING, Final

from autotune.errors import AutotuneError
from autotune.place import INTERPRETER
from cache_db.batch import Shared
from cache_db.models import Problem
from flashbias.cli.database import distrust

if TYPE_CHECKING:
    from autotune.device import DeviceInfo
    from autotune.spec import KernelSpec

AHEAD_SECONDS: Final = 600.0
"""How far ahead of ours another host's clock may be: a row from the far future would outlast all that comes after it."""


class Admission:
    """Judges rows by the rules of their specs; of specs that are not our own, those in ``specs`` are imported."""

    def __init__(self, specs: Collection[str]) -> None:
        self._specs = specs
        self._known: tuple[Problem, KernelSpec, DeviceInfo] | None = None

    def refusal(self, row: Shared) -> str | None:
        """Returns why ``row`` may not enter, or None."""
        problem = row.problem
        if problem.gpu_name == INTERPRETER:
            return "it was made in Triton's interpreter, and says nothing of any GPU"
        if row.created_at > time.time() + AHEAD_SECONDS:
            return "it says that it was stored in the future"
        reason = distrust(problem, self._specs)
        if reason is not None:
            return reason
        from autotune.remake import permit

        try:
            spec, device = self._rules(problem)
            permit(spec, row.kernel, row.config, problem, device)
        except (AutotuneError, ImportError) as error:
            return str(error)
        return None

    def _rules(self, problem: Problem) -> tuple[KernelSpec, DeviceInfo]:
        """Returns the spec of ``problem`` and the device it is for; the last ones are kept, for rows come by problem."""
        if self._known is None or self._known[0] != problem:
            from autotune.remake import reported, target
            from autotune.spec import load

            device = target(problem)
            with reported(f"importing {problem.spec}"):
                self._known = problem, load(problem.spec), device
        return self._known[1], self._known[2]
