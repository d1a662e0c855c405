"""One problem on one device with all that is needed to search and prove it, and the one way results are stored."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from autotune.device import DeviceInfo
from autotune.judgements import Judgements
from autotune.lease import hostname
from autotune.messages import summary
from autotune.place import Place
from autotune.sandbox import GateFault, Limits, Outcome, Sandbox
from autotune.settings import Settings
from autotune.spec import KernelSpec, load
from cache_db.models import FINAL, Config, Lift, Pin, Problem, Trial, Verdict, Verification

if TYPE_CHECKING:
    from autotune.agreement import Bond
    from cache_db import Layers

SEEDS = 4

logger = logging.getLogger(__name__)


@dataclass
class Scene:
    """All that a search or a proof of one problem needs to know and to talk to.

    ``seed`` draws the inputs of every proof, so that the reference answers are computed once. While ``suspect`` (the
    GPU has computed one thing in two ways) nothing is stored. ``bond`` holds this process to its job, if it is in one.
    """

    problem: Problem
    device: DeviceInfo
    settings: Settings
    spec: KernelSpec
    store: Layers
    sandbox: Sandbox
    seed: int = 0
    suspect: bool = False
    bond: Bond | None = None
    kernels: tuple[str, ...] = field(init=False)
    alternatives: dict[str, tuple[str, ...]] = field(init=False)
    _stored: dict[tuple[str, Config], None] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.kernels = self.spec.kernels(self.problem)
        found = getattr(self.spec, "alternatives", None)
        self.alternatives = dict(found(self.problem)) if found else {}

    @property
    def every_kernel(self) -> tuple[str, ...]:
        """The problem's kernels, then those that may take the place of some of them."""
        return (*self.kernels, *self.alternatives)

    def foreign(self, kernel: str, config: Config) -> bool:
        """Returns whether ``config`` is of another implementation than the spec's own, that of its defaults."""
        return config.implementation != self.spec.default(kernel, self.problem, self.device).implementation

    @functools.cached_property
    def pins(self) -> dict[str, Pin]:
        """The pins that the rules allow here, by kernel, as they were when first asked for, short of those dropped."""
        found = self.store.pins(self.problem)
        refusals = {
            kernel: self.refuses(kernel, pin.config) for kernel, pin in found.items() if kernel in self.every_kernel
        }
        for kernel, refusal in refusals.items():
            if refusal is not None:
                self._pin_warning(found[kernel], refusal)
        return {kernel: found[kernel] for kernel, refusal in refusals.items() if refusal is None}

    def drop_pin(self, kernel: str, reason: str) -> None:
        """Goes on as if ``kernel`` had no pin, and says why; the stored pin stays."""
        self._pin_warning(self.pins.pop(kernel), reason)

    def _pin_warning(self, pin: Pin, reason: str) -> None:
        logger.warning(
            "%s: the pin of %s (key %.12s), %s, is not used here: %s; going on as if there were none",
            summary(self.problem),
            pin.kernel,
            self.problem.key(pin.kernel),
            pin.config,
            reason,
        )

    def requires(self, kernel: str) -> list[str]:
        """Returns all kernels that ``kernel`` needs, directly or not, in the order they run."""
        needed: set[str] = set()
        found = [kernel]
        while found:
            fresh = set(self.spec.depends_on(found.pop(), self.problem)) - needed
            needed |= fresh
            found += fresh
        return [name for name in self.kernels if name in needed]

    def upstream(self, kernel: str, configs: Mapping[str, Config]) -> dict[str, Config]:
        """Returns the configs of all kernels that ``kernel`` needs, in the order they run."""
        return {name: configs[name] for name in self.requires(kernel)}

    def refuses(self, kernel: str, config: Config) -> str | None:
        """Returns why ``config`` may not be used here by the rules (spec and settings), or None."""
        if not self.settings.allows(config.implementation):
            return f"implementation {config.implementation} is not among {', '.join(self.settings.implementations)}"
        return self.spec.rejects(kernel, config, self.problem, self.device)

    def judgements(self, kernel: str) -> Judgements:
        """Returns what is stored of the configs of ``kernel``, as seen from this device."""
        place = Place(hostname(), frozenset({self.device.uuid}))
        store, problem = self.store, self.problem
        return Judgements(
            place, store.trials(problem, kernel), store.verifications(problem, kernel), store.lifts(problem, kernel)
        )

    def prove(
        self, kernel: str, config: Config, through: Mapping[str, Config], level: int, repeats: int | None = None
    ) -> Outcome:
        """Runs the gate in a child; what crashed, hung or was killed gets a second chance in a fresh one.

        Raises GateFault when even ``SEEDS`` draws of inputs cannot be judged.
        """
        for _ in range(SEEDS - 1):
            try:
                return self.prove_once(kernel, config, through, level, repeats)
            except GateFault as fault:
                logger.debug("seed %d proves nothing (%s), taking the next", self.seed, fault)
                self.seed += 1
        return self.prove_once(kernel, config, through, level, repeats)

    def prove_once(
        self,
        kernel: str,
        config: Config,
        through: Mapping[str, Config],
        level: int,
        repeats: int | None = None,
        *,
        detail: bool = False,
    ) -> Outcome:
        """Does what ``prove`` does with this very seed; ``detail`` asks for the figures of every output."""
        outcome = self.sandbox.prove(kernel, config, through, level, self.seed, repeats, detail=detail)
        if outcome.verdict not in FINAL:
            logger.debug("%s %s: %s, once more (%s)", kernel, config, outcome.verdict, outcome.reason)
            outcome = self.sandbox.prove(kernel, config, through, level, self.seed, repeats, detail=detail)
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

    def commit(self, trial: Trial) -> None:
        """Stores ``trial``; a failure also as a judgement of its own, whatever the next trial of the config says.

        Not one that may pass and was met in the interpreter, where it means nothing.
        """
        self._stored[trial.kernel, trial.config] = None
        self.store.add_trial(trial)
        passing = trial.verdict not in FINAL and self.device.interpreted
        if trial.verdict is not Verdict.SAFE and not passing:
            self.store.add_verification(Verification.of(trial))

    def note(self, kernel: str, config: Config, outcome: Outcome, through: Mapping[str, Config]) -> None:
        """Stores ``outcome`` as a proof, unless it says nothing: the GPU is suspect, or the interpreter was slow."""
        passing = outcome.verdict not in FINAL and self.device.interpreted
        if not self.suspect and not passing:
            self.store.add_verification(Verification.of(self.trial(kernel, config, outcome, through)))

    def retract(self, reason: str) -> None:
        """Takes the force of every trial that was committed here: the rows stay, and prove and bar nothing."""
        self.suspect = True
        for kernel, config in self._stored:
            lift = Lift(
                problem=self.problem,
                kernel=kernel,
                config=config,
                lifted_by="autotune",
                host=hostname(),
                reason=reason,
                created_at=time.time(),
            )
            self.store.add_lift(lift)


def hashes(configs: Mapping[str, Config]) -> dict[str, str]:
    """Returns ``configs`` as rows name them: kernel to config hash."""
    return {kernel: config.hash for kernel, config in configs.items()}


@contextmanager
def open_scene(
    problem: Problem, device: DeviceInfo, settings: Settings, store: Layers, seed: int = 0
) -> Iterator[Scene]:
    """Gives ``problem`` with children that end with the block."""
    with Sandbox(problem, device, limits(device, settings)) as sandbox:
        yield Scene(problem, device, settings, load(problem.spec), store, sandbox, seed)


def limits(device: DeviceInfo, settings: Settings) -> Limits:
    """Returns limits that leave most of the budget whatever one candidate does; the interpreter is simply slow."""
    if device.interpreted:
        return Limits(trial_seconds=60)
    share = max(10.0, settings.budget_seconds / 4)
    return Limits(compile_seconds=min(60.0, 2 * share), trial_seconds=min(30.0, share))
