"""What ``resolve`` answers, or would answer now, and why: found out without a launch, a sweep, or a row written.

The rules are those of :mod:`autotune.proofs` itself. Where they ask for a proof, none is made: it is noted as due and
taken to pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from autotune.device import DeviceInfo
from autotune.evidence import Difference, differences
from autotune.messages import remedy
from autotune.plan import exhausted
from autotune.proofs import Adoption, Choice, Prover
from autotune.sandbox import Outcome, Sandbox
from autotune.scene import Scene, limits
from autotune.search import Sweep
from autotune.settings import Mode, Settings
from autotune.spec import load
from autotune.tuner import decided
from cache_db.models import Config, Lease, Pin, Problem, Trial, Verdict, Winner

if TYPE_CHECKING:
    from cache_db import Layers


class Doing(StrEnum):
    """What a call does before it runs."""

    DECIDED = "decided"
    NOTHING = "nothing"
    PROVE = "prove"
    TUNE = "tune"
    WAIT = "wait"
    RAISE = "raise"


@dataclass(frozen=True)
class Answer:
    """One kernel: its ``choice``, the level of a proof that is ``due`` before it runs (0 for none), and the rows behind it.

    ``trial`` is how the config was judged when it was tuned, ``winner`` the row that chose it; both are of the
    neighbouring problem ``neighbour`` where the choice is that one's winner.
    """

    kernel: str
    choice: Choice
    due: int
    trial: Trial | None
    winner: Winner | None
    pin: Pin | None
    neighbour: Problem | None


@dataclass(frozen=True)
class Explanation:
    """What a call runs, or would, and why.

    ``answers`` has every kernel, or none, which means the caller's own fallback. With ``doing`` TUNE and WAIT they are
    what runs if the sweep finds nothing, or another process keeps it from this one. ``sizes``: candidates of each
    kernel, and ``seconds`` the longest that their sweep takes. ``nearest``: other stored problems, with what differs.
    """

    problem: Problem
    device: DeviceInfo
    settings: Settings
    location: str
    doing: Doing
    reason: str
    answers: tuple[Answer, ...]
    cure: str = ""
    sizes: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    lease: Lease | None = None
    nearest: tuple[tuple[Problem, tuple[Difference, ...]], ...] = ()

    @property
    def won(self) -> bool:
        """Whether a call runs the proven winner, or pin, of every kernel, if the proofs that are due pass."""
        runs = self.doing in (Doing.DECIDED, Doing.NOTHING, Doing.PROVE) and bool(self.answers)
        return runs and all(each.choice.rung in ("winner", "pinned") for each in self.answers)


def explain(problem: Problem, device: DeviceInfo, settings: Settings, store: Layers) -> Explanation:
    """Returns what this process has decided for ``problem``, else what it would do now with what is in ``store``.

    Raises what reading ``store`` raises.
    """
    known = decided(problem, device, settings)
    with Sandbox(problem, device, limits(device, settings)) as sandbox:
        scene = _Glance(problem, device, settings, load(problem.spec), store, sandbox)
        if known is None:
            doing, found = _foresee(scene)
        else:
            doing, found = Doing.DECIDED, Adoption(known.choices, known.reason)
        answers = tuple(_answer(scene, kernel, choice) for kernel, choice in found.choices.items())
        if doing is Doing.NOTHING and any(each.due for each in answers):
            doing = Doing.PROVE
        made = Explanation(problem, device, settings, store.location, doing, found.reason, answers)
        return made if made.won else _with_cure(scene, made)


def _with_cure(scene: _Glance, made: Explanation) -> Explanation:
    """Returns ``made`` with what a reader needs to do better: the nearest rows, the sweep's size, who else tunes it."""
    near = tuple((other, differences(other, made.problem)) for other in scene.store.nearest(made.problem))
    sweep = Sweep(scene) if made.doing in (Doing.TUNE, Doing.WAIT) else None
    return replace(
        made,
        cure=remedy(scene.settings),
        sizes=sweep.sizes if sweep else {},
        seconds=sweep.seconds if sweep else 0.0,
        lease=scene.store.holder(made.problem.hash),
        nearest=near,
    )


@dataclass
class _Glance(Scene):
    """A scene in which nothing runs and nothing is stored: proofs are noted as due, at which level, and taken to pass."""

    due: dict[tuple[str, Config], int] = field(default_factory=dict)

    def prove(
        self, kernel: str, config: Config, through: Mapping[str, Config], level: int, repeats: int | None = None
    ) -> Outcome:
        """Returns that ``config`` passed, and notes that this has yet to be seen."""
        del through, repeats
        self.due[kernel, config] = level
        return Outcome(Verdict.SAFE, level, seed=self.seed)

    def note(self, kernel: str, config: Config, outcome: Outcome, through: Mapping[str, Config]) -> None:
        """Stores nothing."""


class _Quiet(Prover):
    """The rules, without a word about proofs that are not made."""

    def _announce(self, kernel: str) -> None:
        pass


def _foresee(scene: _Glance) -> tuple[Doing, Adoption]:
    """Returns what a call would do now, and with which choices, as ``autotune.tuner`` decides it."""
    prover, settings = _Quiet(scene), scene.settings
    winners = scene.store.winners(scene.problem)
    stored = prover.adopt({} if settings.mode is Mode.RETUNE else winners)
    if stored.choices and (not settings.finish or (stored.complete and exhausted(scene))):
        return Doing.NOTHING, stored
    if settings.mode is Mode.ASSERT:
        return Doing.RAISE, Adoption({}, stored.reason)
    if settings.mode is Mode.RETUNE and not stored.choices:
        stored = Adoption({}, 'mode "retune" ignores what is stored')
    scene.due.clear()
    ladder = stored if stored.choices else prover.descend(winners)
    if settings.mode not in (Mode.TUNE, Mode.RETUNE):
        return Doing.NOTHING, Adoption(ladder.choices, f"{stored.reason}; {ladder.reason}")
    doing = Doing.TUNE if scene.store.holder(scene.problem.hash) is None else Doing.WAIT
    return doing, Adoption(ladder.choices, stored.reason)


def _answer(scene: _Glance, kernel: str, choice: Choice) -> Answer:
    """Returns ``choice`` with the rows that stand behind it."""
    problem, neighbour = scene.problem, None
    if choice.rung == "neighbour":
        near = scene.store.neighbours(problem, scene.spec.soft_fields())
        rows = (group[kernel] for group in near if kernel in group and group[kernel].config == choice.config)
        neighbour = next((row.problem for row in rows), None)
    home = neighbour or problem
    judged = [row for row in scene.store.trials(home, kernel) if row.config == choice.config]
    won = scene.store.winners(home).get(kernel)
    return Answer(
        kernel,
        choice,
        scene.due.get((kernel, choice.config), 0),
        judged[-1] if judged else None,
        won if won is not None and won.config == choice.config else None,
        scene.store.pins(problem).get(kernel) if choice.rung == "pinned" else None,
        neighbour,
    )
