"""Proving stored configs again on request: one trial exactly as it was, or every winner of a problem.

Nothing is stored here: the caller gets judgements to store.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autotune.device import DeviceInfo
from autotune.errors import AutotuneError
from autotune.judgements import GATE_LEVEL
from autotune.sandbox import Outcome
from autotune.scene import Scene, open_scene
from autotune.settings import Settings
from autotune.spec import source_of
from autotune.steadiness import Watch
from cache_db.models import Config, Problem, Trial, Verdict, Verification, Winner

if TYPE_CHECKING:
    from cache_db import Layers


@dataclass(frozen=True)
class Reproof:
    """What became of one winner: ``verification`` is None where it was not run (``skipped``) or could not be judged."""

    winner: Winner
    verification: Verification | None = None
    reason: str = ""
    skipped: bool = False

    @property
    def safe(self) -> bool:
        """Whether it was proven and passed."""
        return self.verification is not None and self.verification.verdict is Verdict.SAFE


def mismatch(problem: Problem, device: DeviceInfo) -> str | None:
    """Returns why ``problem`` cannot be run on ``device`` with today's sources, or None.

    Another GPU model, Triton or kernel source makes another binary: a judgement of that would say nothing of this one.
    """
    here = {
        "gpu_name": device.name,
        "capability": f"{device.capability[0]}.{device.capability[1]}",
        "sm_count": device.sm_count,
        "mig_profile": device.mig_profile,
        "triton_version": device.triton_version,
    }
    for name, value in here.items():
        stored = getattr(problem, name)
        if stored != value:
            return f"it is of another {name.replace('_', ' ')}: {stored!r}, here {value!r}"
    try:
        source = source_of(problem.spec)
    except ImportError as error:
        return f"its spec {problem.spec} cannot be imported: {error}"
    if source not in (None, problem.source_hash):
        return f"it is of another source: {problem.source_hash[:12]}, here {str(source)[:12]}"
    return None


def rerun(
    trial: Trial,
    through: Mapping[str, Config],
    device: DeviceInfo,
    settings: Settings,
    store: Layers,
    seed: int,
    repeats: int | None = None,
) -> tuple[Outcome, Verification]:
    """Proves the config of ``trial`` once more with ``seed``, in detail; returns what came out, and that as a judgement.

    Raises AutotuneError when no child starts, the gate cannot judge with this seed, the device is suspect, or a foreign
    implementation is not here as it was.
    """
    problem = trial.problem
    with open_scene(problem, device, settings, store, seed) as scene:
        refusal = scene.refuses(trial.kernel, trial.config) if scene.foreign(trial.kernel, trial.config) else None
        if refusal is not None:  # what is here is another: its verdict would be that one's
            raise AutotuneError(f"the trial cannot be repeated here: {refusal}")
        with Watch(scene):
            outcome = scene.prove_once(trial.kernel, trial.config, through, GATE_LEVEL, repeats, detail=True)
        return outcome, Verification.of(scene.trial(trial.kernel, trial.config, outcome, through))


def reprove(
    problem: Problem, winners: Mapping[str, Winner], device: DeviceInfo, settings: Settings, store: Layers
) -> list[Reproof]:
    """Proves the stored ``winners`` of ``problem`` again, each through the others, whatever is stored of them.

    Raises AutotuneError when no child starts or the device is suspect.
    """
    with open_scene(problem, device, settings, store) as scene, Watch(scene):
        return list(_reprove(scene, winners))


def _reprove(scene: Scene, winners: Mapping[str, Winner]) -> Iterator[Reproof]:
    usable: dict[str, Config] = {}
    for kernel, winner in winners.items():
        if kernel not in scene.every_kernel:
            yield Reproof(winner, reason=f"the problem has no kernel {kernel}", skipped=True)
    for kernel in (name for name in scene.every_kernel if name in winners):
        winner = winners[kernel]
        refusal = scene.refuses(kernel, winner.config)
        missing = [name for name in scene.requires(kernel) if name not in usable]
        if refusal is not None:
            yield Reproof(winner, reason=f"the rules refuse it today: {refusal}", skipped=True)
        elif missing:
            yield Reproof(winner, reason=f"no config of {missing[0]} that it could run behind is safe", skipped=True)
        else:
            through = scene.upstream(kernel, usable)
            try:
                outcome = scene.prove(kernel, winner.config, through, GATE_LEVEL)
            except AutotuneError as error:
                yield Reproof(winner, reason=f"it could not be judged: {error}")
                continue
            if outcome.safe:
                usable[kernel] = winner.config
            yield Reproof(winner, Verification.of(scene.trial(kernel, winner.config, outcome, through)))
