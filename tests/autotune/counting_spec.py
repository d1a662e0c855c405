"""The planted softmax, whose compiled kernels count their launches in ``stats``: figures that are known late."""

from __future__ import annotations

from autotune.spec import Tensors
from cache_db.models import Problem
from tests.autotune.planted_spec import PlantedSpec, planted_problem
from tests.autotune.softmax_spec import Ready


class CountingSpec(PlantedSpec):
    """Softmax and its gradient, with planted candidates; ``stats`` has ``launches`` once there was one."""

    def launch(
        self, kernel: str, compiled: Ready, problem: Problem, inputs: Tensors, outputs: Tensors, scratch: Tensors
    ) -> None:
        """Counts the launch before it runs."""
        assert isinstance(compiled.stats, dict)
        compiled.stats["launches"] = int(compiled.stats.get("launches", 0)) + 1
        super().launch(kernel, compiled, problem, inputs, outputs, scratch)


def counting_problem(forward: str) -> Problem:
    """Returns an interpreter's problem with these candidates of the forward."""
    return Problem(**{**dict(planted_problem(forward)), "spec": f"{__name__}:COUNTING"})


def source() -> str:
    """Returns the source hash of today's problems."""
    return "softmax-1"


COUNTING = CountingSpec()
