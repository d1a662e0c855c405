"""What every look at the zoo needs: the problem it lives in, good configs to run behind, and one candidate's whole way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Final

from autotune.device import DeviceInfo
from autotune.sandbox import Limits, Outcome, Sandbox
from autotune.search import WINNER_REPEATS
from cache_db.models import Config, Layout, Problem
from flashbias.kernels.problem import GRADIENTS, Gradient, Shape
from tests.zoo.faults import ZOO
from tests.zoo.zoo_spec import SPEC, bearer, planted, slow, zoo_problem

SEED: Final = 3
ALL: Final = GRADIENTS[:5]
KERNELS: Final = ("forward", "backward_dq", "backward_dkdv")
LAYOUTS: Final[tuple[Layout, ...]] = ("aligned", "strided")


def home(
    device: DeviceInfo, *, layout: Layout = "aligned", grads: tuple[Gradient, ...] = ALL, faults: str = ""
) -> Problem:
    """Returns the problem in which the zoo lives on ``device``: of a real size on a GPU, small in the interpreter."""
    if device.interpreted:
        small = Shape(batch=1, nheads=2, seqlen_q=100, seqlen_k=100, headdim=16, rank=2, grads=grads, layout=layout)
        return zoo_problem(small, device, faults)
    how = {"headdim": 128, "rank": 8, "causal": True, "dtype": "bfloat16", "grads": grads, "layout": layout}
    return zoo_problem(Shape(batch=2, nheads=16, seqlen_q=2048, seqlen_k=2048, **how), device, faults)


def behind(kernel: str, problem: Problem, device: DeviceInfo) -> dict[str, Config]:
    """Returns the default config of every kernel that ``kernel`` depends on."""
    needed = set(SPEC.depends_on(kernel, problem))
    return {name: SPEC.default(name, problem, device) for name in SPEC.kernels(problem) if name in needed}


def judge(
    sandbox: Sandbox,
    kernel: str,
    config: Config,
    through: dict[str, Config],
    level: int = 2,
    seed: int = SEED,
    repeats: int | None = None,
) -> Outcome:
    """Returns what becomes of one candidate, first compiled and then proven, as in a sweep; its seconds are those of both."""
    ((_, _, compiled),) = sandbox.compile([(kernel, config)])
    if not compiled.safe:
        return compiled
    proven = sandbox.prove(kernel, config, through, level, seed, repeats)
    return replace(proven, seconds=proven.seconds + compiled.seconds)


@dataclass(frozen=True)
class Cages:
    """One sandbox for each layout in which the zoo's faults act."""

    device: DeviceInfo
    problems: dict[Layout, Problem]
    sandboxes: dict[Layout, Sandbox]

    def show(self, fault: str) -> Outcome:
        """Returns what becomes of ``fault``; the rare race has a winner's long screen to be found in."""
        exhibit = ZOO[fault]
        problem = self.problems[exhibit.layout]
        repeats = WINNER_REPEATS if fault == "rare_race" else None
        config = planted(bearer(fault, self.device), fault)
        through = behind(exhibit.kernel, problem, self.device)
        return judge(self.sandboxes[exhibit.layout], exhibit.kernel, config, through, repeats=repeats)

    def show_good(self, kernel: str = "forward", level: int = 1, layout: Layout = "aligned") -> Outcome:
        """Returns what becomes of a config without any fault."""
        problem = self.problems[layout]
        return judge(self.sandboxes[layout], kernel, slow(self.device), behind(kernel, problem, self.device), level)


@contextmanager
def cages(device: DeviceInfo, trial_seconds: float) -> Iterator[Cages]:
    """Opens the zoo on ``device``; a candidate that says nothing for ``trial_seconds`` is a hanging one."""
    problems = {layout: home(device, layout=layout) for layout in LAYOUTS}
    limits = Limits(trial_seconds=trial_seconds)
    with ExitStack() as open_:
        yield Cages(
            device,
            problems,
            {layout: open_.enter_context(Sandbox(problem, device, limits)) for layout, problem in problems.items()},
        )
