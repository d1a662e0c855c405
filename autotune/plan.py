"""What the sweep of one kernel starts from: the candidates, and what earlier sweeps and proofs found of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from autotune.judgements import Judgement, Judgements
from autotune.scene import Scene
from autotune.settings import Mode
from cache_db.models import Config, Trial, Verdict

INTERPRETER_CANDIDATES: Final = 3


@dataclass(frozen=True)
class Plan:
    """What one kernel's sweep starts from: the candidates allowed, those to compile, and safe trials that still stand.

    ``related`` are the hashes of configs that won a similar problem.
    """

    kernel: str
    candidates: tuple[Config, ...]
    to_compile: tuple[Config, ...]
    proven: Mapping[str, Trial]
    related: frozenset[str]
    total: int
    judgements: Judgements

    @classmethod
    def of(cls, scene: Scene, kernel: str) -> Plan:
        """Reads candidates from the spec and earlier trials from the store; configs that won elsewhere come first."""
        allowed = [
            config
            for config in dict.fromkeys(scene.spec.candidates(kernel, scene.problem, scene.device))
            if scene.spec.rejects(kernel, config, scene.problem, scene.device) is None
        ]
        if scene.device.interpreted:
            allowed = allowed[:INTERPRETER_CANDIDATES]
        used = [config for config in allowed if scene.settings.allows(config.implementation)]
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
        return cls(kernel, tuple(used), to_compile, proven, related, len(allowed), judgements)

    def barred(self, config: Config, through: Mapping[str, str]) -> Trial | None:
        """Returns, as a trial, what keeps ``config`` from running here behind the configs ``through``."""
        bar: Judgement | None = self.judgements.bar(config, through)
        if bar is None or isinstance(bar, Trial):
            return bar
        return Trial(**{name: getattr(bar, name) for name in type(bar).model_fields}, seconds=0.0)
