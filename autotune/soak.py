"""The soak: on request, stored winners are put through far more than winning took, and reach level 3.

What a gate of seconds can miss, a race that shows once in ten thousand launches above all, has hours to show here.
A config that fails is out for good, like any other: the next sweep or prewarm chooses among the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from autotune.device import DeviceInfo
from autotune.sandbox import Outcome, Sandbox
from autotune.scene import Scene
from autotune.settings import Settings
from autotune.spec import load
from autotune.steadiness import Watch
from autotune.tuner import limits
from cache_db.models import Config, Problem, Verdict, Winner

if TYPE_CHECKING:
    from cache_db import Layers

LEVEL: Final = 3
REPEATS: Final = 100_000
# Each part draws inputs of its own and runs all cases: values decide what rounds, and rounding what a race shows.
PARTS: Final = 4
# The interpreter runs programs one after another: nothing races there.
INTERPRETER_REPEATS: Final = 20


@dataclass(frozen=True)
class Soaked:
    """What became of one winner: ``repeats`` it has agreed with itself, by now or earlier (``already``)."""

    winner: Winner
    verdict: Verdict
    repeats: int
    reason: str = ""
    already: bool = False

    @property
    def passed(self) -> bool:
        """Whether it is still safe."""
        return self.verdict is Verdict.SAFE


def soak(problem: Problem, device: DeviceInfo, settings: Settings, store: Layers, repeats: int) -> list[Soaked]:
    """Puts the stored winners of ``problem`` through ``repeats`` race repeats each, and all cases with ``PARTS`` new seeds.

    Kernels come in running order, each behind what runs before it; the first that fails ends it. Who passed has level 3
    and its count stored, who failed its verdict. A winner that has passed as many before is not run again, nor is one
    that does not run because its kernel is pinned.

    Raises AutotuneError when no child starts, the gate cannot judge, or the device is suspect.
    """
    with Sandbox(problem, device, limits(device, settings)) as sandbox:
        scene = Scene(problem, device, settings, load(problem.spec), store, sandbox)
        stored = scene.store.winners(problem)
        winners = {kernel: stored[kernel] for kernel in scene.kernels if kernel in stored and kernel not in scene.pins}
        known = {kernel: _passed(scene, winner) for kernel, winner in winners.items()}
        if all(count >= repeats for count in known.values()):
            return [Soaked(winners[kernel], Verdict.SAFE, count, already=True) for kernel, count in known.items()]
        with Watch(scene):
            return list(_soak(scene, winners, known, repeats))


def _soak(scene: Scene, winners: Mapping[str, Winner], known: Mapping[str, int], repeats: int) -> Iterator[Soaked]:
    running = {kernel: winner.config for kernel, winner in winners.items()}
    running |= {kernel: pin.config for kernel, pin in scene.pins.items()}
    for kernel, winner in winners.items():
        if known[kernel] >= repeats:
            yield Soaked(winner, Verdict.SAFE, known[kernel], already=True)
            continue
        through = scene.upstream(kernel, running)
        outcome, done = _parts(scene, kernel, winner.config, through, repeats)
        _keep(scene, winner, through, outcome, done)
        yield Soaked(winner, outcome.verdict, done, outcome.reason)
        if not outcome.safe:
            return


def _parts(
    scene: Scene, kernel: str, config: Config, through: Mapping[str, Config], repeats: int
) -> tuple[Outcome, int]:
    """Returns the last outcome, and how many repeats have agreed by then."""
    done = 0
    for part in range(PARTS):
        scene.seed += 1
        outcome = scene.prove(kernel, config, through, LEVEL, repeats * (part + 1) // PARTS - repeats * part // PARTS)
        if not outcome.safe:
            return outcome, done
        done += int(outcome.figures["repeats"])
    return outcome, done


def _keep(scene: Scene, winner: Winner, through: Mapping[str, Config], outcome: Outcome, done: int) -> None:
    """Stores the trial, its times as they were, and the winner's new level if it is still the winner."""
    kernel = winner.kernel
    before = [each for each in scene.store.trials(scene.problem, kernel) if each.config == winner.config]
    figures = {**(before[0].figures if before else {"ms": winner.ms}), **outcome.figures}
    if outcome.safe:
        figures["repeats"] = done
    trial = scene.trial(kernel, winner.config, replace(outcome, figures=figures), through)
    scene.commit(trial)
    now = scene.store.winners(scene.problem).get(kernel)
    if outcome.safe and now is not None and now.config == winner.config:
        changed = {"level": LEVEL, "binary": trial.binary, "environment": trial.environment}
        changed |= {"proven_with": trial.proven_with, "created_at": trial.created_at}
        scene.store.put_winner(now.model_copy(update=changed), replace=True)


def _passed(scene: Scene, winner: Winner) -> int:
    """Returns how many repeats ``winner`` has passed in a soak that still holds, 0 if there was none."""
    if winner.level < LEVEL or winner.environment != scene.device.environment:
        return 0
    trials = [each for each in scene.judgements(winner.kernel).trials() if each.config == winner.config]
    return max((int(each.figures.get("repeats", 0)) for each in trials if each.level >= LEVEL), default=0)
