"""Which configs may run: stored winners that still hold, and the ladder below them.

A proof holds for one environment (driver, ptxas, torch), one binary and the exact configs of the kernels it was judged
through. When any of these differ the config is proven again, in seconds, and the new proof is stored, so that a whole
cluster does it once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from autotune.device import DeviceInfo
from autotune.lease import hostname
from autotune.sandbox import GateFault, Outcome, Sandbox
from autotune.settings import Settings
from autotune.spec import KernelSpec
from cache_db.models import FINAL, Config, Problem, Trial, Verdict, Verification, Winner

if TYPE_CHECKING:
    from cache_db import Layers

Rung = Literal["winner", "neighbour", "default"]
QUARANTINE_SECONDS = 86_400.0
NEIGHBOURS = 2
SEEDS = 4

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """The config one kernel runs with, and why: ladder rung, level of proof, SHA-256 of the proven binary."""

    config: Config
    rung: Rung
    level: int
    binary: str


@dataclass(frozen=True)
class Adoption:
    """Choices for every kernel of a problem; empty, with the reason, when some kernel has none."""

    choices: dict[str, Choice]
    reason: str
    complete: bool = True


@dataclass
class Scene:
    """All that a search or a proof of one problem needs to know and to talk to.

    ``seed`` draws the inputs of every proof, so that the reference answers are computed once.
    """

    problem: Problem
    device: DeviceInfo
    settings: Settings
    spec: KernelSpec
    store: Layers
    sandbox: Sandbox
    seed: int = 0
    kernels: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.kernels = self.spec.kernels(self.problem)

    def upstream(self, kernel: str, configs: Mapping[str, Config]) -> dict[str, Config]:
        """Returns the configs of all kernels that ``kernel`` needs, directly or not, in the order they run."""
        needed: set[str] = set()
        found = [kernel]
        while found:
            fresh = set(self.spec.depends_on(found.pop(), self.problem)) - needed
            needed |= fresh
            found += fresh
        return {name: configs[name] for name in self.kernels if name in needed}

    def refuses(self, kernel: str, config: Config) -> str | None:
        """Returns why ``config`` may not be used here by the rules (spec and settings), or None."""
        if not self.settings.allows(config.implementation):
            return f"implementation {config.implementation} is not among {', '.join(self.settings.implementations)}"
        return self.spec.rejects(kernel, config, self.problem, self.device)

    def prove(
        self, kernel: str, config: Config, through: Mapping[str, Config], level: int, repeats: int | None = None
    ) -> Outcome:
        """Runs the gate in a child; what crashed, hung or was killed gets a second chance in a fresh one.

        Raises GateFault when even ``SEEDS`` draws of inputs cannot be judged.
        """
        for _ in range(SEEDS - 1):
            try:
                return self._prove(kernel, config, through, level, repeats)
            except GateFault as fault:
                logger.debug("seed %d proves nothing (%s), taking the next", self.seed, fault)
                self.seed += 1
        return self._prove(kernel, config, through, level, repeats)

    def _prove(
        self, kernel: str, config: Config, through: Mapping[str, Config], level: int, repeats: int | None
    ) -> Outcome:
        outcome = self.sandbox.prove(kernel, config, through, level, self.seed, repeats)
        if outcome.verdict not in FINAL:
            logger.debug("%s %s: %s, once more (%s)", kernel, config, outcome.verdict, outcome.reason)
            outcome = self.sandbox.prove(kernel, config, through, level, self.seed, repeats)
        return outcome

    def trial(self, kernel: str, config: Config, outcome: Outcome, through: Mapping[str, Config]) -> Trial:
        """Returns the row that records ``outcome``."""
        return Trial(
            problem=self.problem,
            kernel=kernel,
            config=config,
            verdict=outcome.verdict,
            level=outcome.level,
            reason=outcome.reason,
            figures=dict(outcome.figures),
            seed=outcome.seed,
            proven_with=hashes(through),
            binary=outcome.binary,
            environment=self.device.environment,
            gpu_uuid=self.device.uuid,
            host=hostname(),
            created_at=time.time(),
            seconds=outcome.seconds,
        )

    def stands(self, trial: Trial, through: Mapping[str, Config] | None = None) -> bool:
        """Returns whether ``trial`` need not be repeated (``through`` None: whatever it was judged through)."""
        if trial.verdict is Verdict.SAFE:
            same = trial.environment == self.device.environment
            return same and (through is None or trial.proven_with == hashes(through))
        if trial.verdict in FINAL:
            return True
        here = trial.host == hostname() and trial.gpu_uuid == self.device.uuid and not self.device.interpreted
        return here and time.time() - trial.created_at < QUARANTINE_SECONDS


def hashes(configs: Mapping[str, Config]) -> dict[str, str]:
    """Returns ``configs`` as rows name them: kernel to config hash."""
    return {kernel: config.hash for kernel, config in configs.items()}


class Prover:
    """Finds configs that may run without a sweep, proving what has to be proven."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene

    def adopt(self, winners: Mapping[str, Winner]) -> Adoption:
        """Returns the stored ``winners`` as choices if every kernel has one that may run here and now."""
        choices: dict[str, Choice] = {}
        for kernel in self._scene.kernels:
            winner = winners.get(kernel)
            if winner is None:
                return Adoption({}, f"no winner of {kernel} is stored")
            refusal = self._scene.refuses(kernel, winner.config)
            if refusal is not None:
                return Adoption({}, f"the stored winner of {kernel} may not run here: {refusal}")
            proof = self._certify(kernel, winner, choices)
            if proof.verdict is not Verdict.SAFE:
                return Adoption(
                    {}, f"the stored winner of {kernel} failed its proof here: {proof.verdict}, {proof.reason}"
                )
            choices[kernel] = Choice(winner.config, "winner", proof.level, proof.binary)
        return Adoption(choices, _report(winners), all(winners[kernel].complete for kernel in choices))

    def descend(self, winners: Mapping[str, Winner]) -> Adoption:
        """Returns the best choice of each kernel down the ladder; empty when one kernel has nothing that passes."""
        choices: dict[str, Choice] = {}
        for kernel in self._scene.kernels:
            last = "every rung is refused by the rules"
            for rung, config in self._rungs(kernel, winners):
                proof = (
                    self._certify(kernel, winners[kernel], choices)
                    if rung == "winner"
                    else self.proof(kernel, config, choices, 1)
                )
                if proof.verdict is Verdict.SAFE:
                    choices[kernel] = Choice(config, rung, proof.level, proof.binary)
                    break
                last = f"{rung} {config}: {proof.verdict}, {proof.reason}"
            else:
                return Adoption({}, f"no config of {kernel} passed a quick proof ({last})")
        rungs = ", ".join(f"{kernel} by {choice.rung}" for kernel, choice in choices.items())
        return Adoption(choices, rungs)

    def proof(
        self, kernel: str, config: Config, chosen: Mapping[str, Choice], level: int, binary: str | None = None
    ) -> Outcome:
        """Returns a stored proof of ``config`` that still holds, else proves it now and stores that.

        ``binary`` accepts only stored proofs of that machine code.
        """
        scene = self._scene
        through = scene.upstream(kernel, {name: choice.config for name, choice in chosen.items()})
        known = self._known(kernel, config, through, level, binary)
        if known is not None:
            return known
        outcome = scene.prove(kernel, config, through, level)
        if outcome.verdict in FINAL:
            scene.store.add_verification(self._verification(kernel, config, outcome, through))
        return outcome

    def _certify(self, kernel: str, winner: Winner, chosen: Mapping[str, Choice]) -> Outcome:
        """Returns the winner row itself as proof where it still holds, otherwise a proof.

        A later failure outweighs it: a retune may have found the winner racy and nothing better.
        """
        scene = self._scene
        through = scene.upstream(kernel, {name: choice.config for name, choice in chosen.items()})
        for row in self._rows(kernel, winner.config, through):
            if row.verdict is not Verdict.SAFE:
                return _told(row)
        same = winner.environment == scene.device.environment and winner.proven_with == hashes(through)
        if same and winner.level >= 2:
            return Outcome(Verdict.SAFE, winner.level, "", {}, scene.seed, winner.binary, 0.0)
        logger.info("proving the stored winner of %s again: it was proven at another level or elsewhere", kernel)
        return self.proof(kernel, winner.config, chosen, 2)

    def _rungs(self, kernel: str, winners: Mapping[str, Winner]) -> Iterator[tuple[Rung, Config]]:
        scene = self._scene
        seen: set[str] = set()

        def fresh(config: Config) -> bool:
            known = config.hash in seen
            seen.add(config.hash)
            return not known and scene.refuses(kernel, config) is None

        if kernel in winners and fresh(winners[kernel].config):
            yield "winner", winners[kernel].config
        for neighbour in scene.store.neighbours(scene.problem, scene.spec.soft_fields())[:NEIGHBOURS]:
            if kernel in neighbour and fresh(neighbour[kernel].config):
                yield "neighbour", neighbour[kernel].config
        default = scene.spec.default(kernel, scene.problem, scene.device)
        if fresh(default):
            yield "default", default

    def _known(
        self, kernel: str, config: Config, through: Mapping[str, Config], level: int, binary: str | None
    ) -> Outcome | None:
        """Returns what the store already says of ``config``; a final failure outweighs a proof."""
        rows = self._rows(kernel, config, through)
        failed = [row for row in rows if row.verdict is not Verdict.SAFE]
        proven = [row for row in rows if row.level >= level and binary in (None, row.binary)]
        for row in failed or proven:
            return _told(row)
        return None

    def _rows(self, kernel: str, config: Config, through: Mapping[str, Config]) -> list[Trial | Verification]:
        """Returns every stored judgement of ``config`` that holds here."""
        scene = self._scene
        rows: list[Trial | Verification] = [
            row
            for row in scene.store.trials(scene.problem, kernel)
            if row.config == config and scene.stands(row, through)
        ]
        return rows + [
            row
            for row in scene.store.verifications(scene.problem, kernel)
            if row.config == config
            and row.environment == scene.device.environment
            and row.proven_with == hashes(through)
        ]

    def _verification(
        self, kernel: str, config: Config, outcome: Outcome, through: Mapping[str, Config]
    ) -> Verification:
        trial = self._scene.trial(kernel, config, outcome, through)
        return Verification(**{name: getattr(trial, name) for name in Verification.model_fields})


def _told(row: Trial | Verification) -> Outcome:
    return Outcome(row.verdict, row.level, row.reason, {}, row.seed, row.binary, 0.0)


def _report(winners: Mapping[str, Winner]) -> str:
    """Returns "12 of 40 tried" for the kernels whose sweep ended early, else a plain statement."""
    partial = [f"{name}: {row.tried} of {row.total} tried" for name, row in winners.items() if not row.complete]
    return "stored winner" + (f" ({', '.join(partial)})" if partial else "")
