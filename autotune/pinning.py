"""Whether a config may be pinned: it is proven as a winner is, behind the configs that would run before it.

The judgement is the caller's to store, and so is the pin.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from autotune.device import DeviceInfo
from autotune.judgements import GATE_LEVEL
from autotune.proofs import Prover
from autotune.sandbox import Outcome
from autotune.scene import hashes, open_scene
from autotune.search import WINNER_REPEATS
from autotune.settings import Settings
from autotune.steadiness import Watch
from cache_db.models import Config, Problem, Verification

if TYPE_CHECKING:
    from cache_db import Layers


@dataclass(frozen=True)
class PinProof:
    """What the gate said of a config ``through`` those before it; without a run (``outcome`` None) why there was none."""

    outcome: Outcome | None = None
    verification: Verification | None = None
    through: Mapping[str, Config] = field(default_factory=dict)
    reason: str = ""

    @property
    def safe(self) -> bool:
        """Whether the config may be pinned."""
        return self.outcome is not None and self.outcome.safe


def prove_pin(
    problem: Problem, kernel: str, config: Config, device: DeviceInfo, settings: Settings, store: Layers
) -> PinProof:
    """Proves ``config`` for ``kernel`` with a winner's race repeats, behind pins, and winners where there is none.

    What the rules or an earlier judgement bar is not run. Raises AutotuneError when no child starts, the gate cannot
    judge, or the device is suspect.
    """
    with open_scene(problem, device, settings, store) as scene:
        refusal = scene.refuses(kernel, config)
        if refusal is not None:
            return PinProof(reason=f"the rules refuse it: {refusal}")
        needed = scene.requires(kernel)
        before = Prover(scene).adopt(store.winners(problem), needed)
        if len(before.choices) < len(needed):
            return PinProof(reason=f"nothing proven can run before it, so tune the problem first: {before.reason}")
        through = {name: choice.config for name, choice in before.choices.items()}
        bar = scene.judgements(kernel).bar(config, hashes(through))
        if bar is not None:
            return PinProof(through=through, reason=f"it is in quarantine: {bar.verdict}, {bar.reason}")
        with Watch(scene):
            repeats = None if device.interpreted else WINNER_REPEATS  # the interpreter has no races
            outcome = scene.prove(kernel, config, through, GATE_LEVEL, repeats)
        judgement = Verification.of(scene.trial(kernel, config, outcome, through))
        return PinProof(outcome, judgement, through, "" if outcome.safe else f"{outcome.verdict}, {outcome.reason}")
