"""What the sweep of one kernel starts from: the candidates, and what earlier sweeps and proofs found of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from autotune import spaces
from autotune.judgements import Judgement, Judgements
from autotune.scene import Scene
from autotune.settings import Mode
from cache_db.models import Config, Trial, Verdict

INTERPRETER_CANDIDATES: Final = 3


@dataclass(frozen=True)
class Plan:
    """What one kernel's sweep starts from: the candidates allowed, those to compile, and safe trials that still stand.

    ``related`` are the hashes of configs that won a similar problem. ``pinned``: the one candidate is the kernel's pin.
    """

    kernel: str
    candidates: tuple[Config, ...]
    to_compile: tuple[Config, ...]
    proven: Mapping[str, Trial]
    related: frozenset[str]
    total: int
    judgements: Judgements
    pinned: bool = False

    @classmethod
    def of(cls, scene: Scene, kernel: str) -> Plan:
        """Reads candidates from spec and space, and earlier trials from the store; what won elsewhere comes first."""
        allowed = list(dict.fromkeys([*_allowed(scene, kernel), *_added(scene, kernel)]))
        pin = scene.pins.get(kernel)
        wanted = allowed if pin is None else [pin.config]
        used = [config for config in wanted if scene.settings.allows(config.implementation)]
        neighbours = [scene.store.winners(problem) for problem in scene.store.nearest(scene.problem)]
        related = frozenset(rows[kernel].config.hash for rows in neighbours if kernel in rows)
        used.sort(key=lambda config: config.hash not in related)
        judgements = scene.judgements(kernel)
        proven = {
            trial.config.hash: trial
            for trial in judgements.trials()
            if trial.verdict is Verdict.SAFE
            and trial.environment == scene.device.environment
            and scene.settings.mode is not Mode.RETUNE
        }
        # What is wrong behind one forward only is compiled: which forward wins is not known yet.
        to_compile = tuple(
            config for config in used if config.hash not in proven and judgements.bar(config, {}) is None
        )
        total = len(allowed)
        return cls(kernel, tuple(used), to_compile, proven, related, total, judgements, pinned=pin is not None)

    def barred(self, config: Config, through: Mapping[str, str]) -> Trial | None:
        """Returns, as a trial, what keeps ``config`` from running here behind the configs ``through``."""
        bar: Judgement | None = self.judgements.bar(config, through)
        if bar is None or isinstance(bar, Trial):
            return bar
        return Trial(**{name: getattr(bar, name) for name in type(bar).model_fields}, seconds=0.0)


def _allowed(scene: Scene, kernel: str) -> list[Config]:
    """Returns the spec's candidates that its rules let run here."""
    allowed = [
        config
        for config in dict.fromkeys(scene.spec.candidates(kernel, scene.problem, scene.device))
        if scene.spec.rejects(kernel, config, scene.problem, scene.device) is None
    ]
    return _interpreted(scene, kernel, allowed) if scene.device.interpreted else allowed


def _interpreted(scene: Scene, kernel: str, allowed: list[Config]) -> list[Config]:
    """Returns the few that are tried in the interpreter, where all that is foreign is faster, so only if it is asked for."""
    named = scene.settings.implementations
    foreign = [config for config in allowed if scene.foreign(kernel, config)]
    own = [config for config in allowed if config not in foreign]
    wanted = [config for config in foreign if config.implementation in named]
    return wanted[:INTERPRETER_CANDIDATES] + own[:INTERPRETER_CANDIDATES]


def exhausted(scene: Scene) -> bool:
    """Returns whether every config of the space, and every foreign one, has been tried; a kernel's pin stands for all of its.

    What others wrote comes and goes with its packages, so a complete sweep of another day says nothing of it.
    """
    return not any(_untried(scene, kernel) for kernel in (*scene.kernels, *unpinned(scene)) if kernel not in scene.pins)


def unpinned(scene: Scene) -> list[str]:
    """Returns the alternatives that may be chosen: whoever pins a kernel wants that one to run."""
    return [name for name, places in scene.alternatives.items() if not any(place in scene.pins for place in places)]


def _untried(scene: Scene, kernel: str) -> set[str]:
    """Returns the hashes of what the space, or others, offer for ``kernel`` and nothing is known of since its last lift."""
    allowed = [each for each in _allowed(scene, kernel) if scene.foreign(kernel, each)] + list(_added(scene, kernel))
    offered = {config.hash for config in allowed if scene.settings.allows(config.implementation)}
    if not offered:
        return offered
    judgements = scene.judgements(kernel)
    rows = [*judgements.trials(), *judgements.unsafe()]
    return offered - {row.config.hash for row in rows if not judgements.lifted(row)}


def _added(scene: Scene, kernel: str) -> tuple[Config, ...]:
    """Returns what the caller's own space adds to the candidates of ``kernel``; of an alternative it knows nothing."""
    if scene.settings.space is None or kernel not in scene.kernels:
        return ()
    added = spaces.offer(scene.settings.space, kernel, scene.problem, scene.device).configs
    return added[:INTERPRETER_CANDIDATES] if scene.device.interpreted else added
