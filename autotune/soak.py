"""The soak: on request, stored winners are put through far more than winning took, and reach level 3.

What a gate of seconds can miss, a race that shows once in ten thousand launches above all, has hours to show here.
A config that fails is out for good, like any other: the next sweep or prewarm chooses among the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from autotune.device import DeviceInfo
from autotune.errors import AutotuneError
from autotune.lease import claim
from autotune.progress import track
from autotune.proofs import Choice, Prover
from autotune.sandbox import Outcome
from autotune.scene import Scene, hashes, open_scene
from autotune.settings import Settings
from autotune.steadiness import Watch
from cache_db.models import Config, Problem, Verdict

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
    """What became of one kernel's winner: ``repeats`` it has agreed with itself, by now or earlier (``already``)."""

    kernel: str
    config: Config
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
    and its count stored, who failed its verdict. A winner that has passed as many before, behind the same, is not run
    again; one that does not run because its kernel is pinned is left out. Nobody else tunes the problem meanwhile.

    Raises AutotuneError when there are no winners that may run, another process tunes the problem for longer than
    ``settings.wait_seconds``, no child starts, the gate cannot judge, or the device is suspect.
    """
    held = claim(store, problem, settings.wait_seconds)
    if held is None:
        raise AutotuneError("another process is tuning the problem; soak it when that has ended")
    with held, open_scene(problem, device, settings, store) as scene:
        adopted = Prover(scene).adopt(store.winners(problem))
        if not adopted.choices:
            raise AutotuneError(f"there is nothing to soak: {adopted.reason}")
        known = {name: _passed(scene, name, adopted.choices) for name in _won(adopted.choices)}
        if all(count >= repeats for count in known.values()):
            return [_already(name, adopted.choices[name], count) for name, count in known.items()]
        with Watch(scene):
            return list(_soak(scene, adopted.choices, known, repeats))


def _soak(scene: Scene, choices: Mapping[str, Choice], known: Mapping[str, int], repeats: int) -> Iterator[Soaked]:
    for kernel in _won(choices):
        config = choices[kernel].config
        if known[kernel] >= repeats:
            yield _already(kernel, choices[kernel], known[kernel])
            continue
        through = _through(scene, kernel, choices)
        outcome, done = _parts(scene, kernel, config, through, repeats)
        _keep(scene, kernel, config, through, outcome, done)
        yield Soaked(kernel, config, outcome.verdict, done, outcome.reason)
        if not outcome.safe:
            return


def _parts(
    scene: Scene, kernel: str, config: Config, through: Mapping[str, Config], repeats: int
) -> tuple[Outcome, int]:
    """Returns the last outcome, and how many repeats have agreed by then."""
    done = 0
    parts = track(
        range(PARTS),
        f"soaking {kernel}",
        PARTS,
        log=scene.settings.log,
        note=lambda: f"{done} of {repeats} repeats agree",
    )
    for part in parts:
        scene.seed += 1
        outcome = scene.prove(kernel, config, through, LEVEL, repeats * (part + 1) // PARTS - repeats * part // PARTS)
        if not outcome.safe:
            return outcome, done
        done += int(outcome.figures["repeats"])
    return outcome, done


def _keep(
    scene: Scene, kernel: str, config: Config, through: Mapping[str, Config], outcome: Outcome, done: int
) -> None:
    """Stores the trial, its times as they were, and the winner's new level."""
    before = [each for each in scene.store.trials(scene.problem, kernel) if each.config == config]
    figures = {**(before[0].figures if before else {}), **outcome.figures}
    if outcome.safe:
        figures["repeats"] = done
    trial = scene.trial(kernel, config, replace(outcome, figures=figures), through)
    scene.commit(trial)
    winner = scene.store.winners(scene.problem).get(kernel)
    if outcome.safe and winner is not None and winner.config == config:
        changed = {"level": LEVEL, "binary": trial.binary, "environment": trial.environment}
        changed |= {"proven_with": trial.proven_with, "created_at": trial.created_at}
        scene.store.put_winner(winner.model_copy(update=changed), replace=True)


def _passed(scene: Scene, kernel: str, choices: Mapping[str, Choice]) -> int:
    """Returns how many repeats the winner has passed in a soak that still holds, 0 if there was none."""
    choice, through = choices[kernel], hashes(_through(scene, kernel, choices))
    rows = scene.judgements(kernel).proofs(choice.config, scene.device.environment, through)
    trials = [row for row in scene.judgements(kernel).trials() if row in rows and row.binary == choice.binary]
    counts = [row.figures.get("repeats") for row in trials if row.level >= LEVEL]
    return max((count for count in counts if type(count) is int), default=0)  # a row's may be anything


def _won(choices: Mapping[str, Choice]) -> list[str]:
    return [kernel for kernel, choice in choices.items() if choice.rung == "winner"]


def _through(scene: Scene, kernel: str, choices: Mapping[str, Choice]) -> dict[str, Config]:
    return scene.upstream(kernel, {name: choice.config for name, choice in choices.items()})


def _already(kernel: str, choice: Choice, count: int) -> Soaked:
    return Soaked(kernel, choice.config, Verdict.SAFE, count, already=True)
