"""The sweep of one problem: kernel after kernel, compile, time, prove, choose.

Each kernel is judged through the winners of the kernels before it. All candidates are timed first, unproven, because
that costs milliseconds; then they are proven in ascending time, so the budget is spent where a winner can come from.
Every trial is committed as it ends: a killed sweep repeats only the one it was at.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

from autotune.candidate import Candidate, at_other_sizes, cost, hosts, ranked, told
from autotune.compilation import Compilation
from autotune.plan import Plan, unpinned
from autotune.progress import counted, track
from autotune.sandbox import Outcome
from autotune.scene import Scene, hashes
from autotune.settings import INTERPRETER_SECONDS
from autotune.steadiness import Watch
from cache_db.models import Config, Verdict, Winner

FINALISTS: Final = 4
CLOSE: Final = 1.2  # a finalist is at most this much slower than the fastest; quick times are a few per cent off
HOPELESS: Final = 1.5  # slower than this, a candidate cannot win once there are enough safe ones, and is not proven
OVERTIME_PROOFS: Final = 3  # proofs tried after the budget's end while nothing is safe yet
RESERVE_SECONDS: Final = 3.0  # of each kernel's share, for the final and the winner's long race screen
WINNER_REPEATS: Final = 10_000
QUICK_ROUNDS: Final = 5
FINAL_ROUNDS: Final = 50
PATIENCE_SECONDS: Final = 60.0

logger = logging.getLogger(__name__)


class Sweep:
    """Tunes every kernel of ``scene``'s problem within its budget."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        limit = INTERPRETER_SECONDS if scene.device.interpreted and not scene.settings.finish else math.inf
        self.seconds = min(scene.settings.budget_seconds, limit)
        plans = {kernel: Plan.of(scene, kernel) for kernel in (*scene.kernels, *unpinned(scene))}
        self._plans = {kernel: plan for kernel, plan in plans.items() if kernel in scene.kernels or plan.candidates}
        self.failure = ""
        self.failed: str | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """How many candidates each kernel has."""
        return {kernel: 1 if plan.pinned else plan.total for kernel, plan in self._plans.items()}

    def run(self) -> dict[str, Winner]:
        """Returns a winner of every kernel, or nothing, and why in ``failure``, when one (``failed``) has none.

        Raises SuspectDevice, with no trial left in force, when the GPU does not repeat a reference computation.
        """
        scene = self._scene
        deadline = time.monotonic() + self.seconds
        items = [(kernel, config) for kernel, plan in self._plans.items() for config in plan.to_compile]
        compilation = Compilation(scene.sandbox, items)  # its children start while the GPU is watched
        try:
            with Watch(scene) as watch:
                winners = self._tune(compilation, deadline)
                watch.quiet = not winners  # whoever asked warns of that
                return winners
        finally:
            # Without its pin the kernel that failed is swept at once, with compiles of its own.
            compilation.close(PATIENCE_SECONDS if self.failed in scene.pins else 0.0)

    def _tune(self, compilation: Compilation, deadline: float) -> dict[str, Winner]:
        scene = self._scene
        winners: dict[str, Winner] = {}
        failures: dict[str, str] = {}
        for left, kernel in zip(range(len(self._plans), 0, -1), self._plans, strict=True):
            now = time.monotonic()
            share = max(deadline - now, 0.0) / left
            if any(name not in winners for name in scene.requires(kernel)):
                failures[kernel] = f"nothing that {kernel} could run behind passed"
                continue
            through = scene.upstream(kernel, {name: row.config for name, row in winners.items()})
            sweep = KernelSweep(scene, self._plans[kernel], compilation, through)
            winner = sweep.run(now + share, share)
            compilation.abandon(kernel)
            if winner is not None:
                winners[kernel] = winner
            elif kernel in scene.kernels:
                failures[kernel] = f"no candidate of {kernel} passed ({sweep.tally()})"
                if not any(kernel in scene.alternatives[name] for name in self._plans.keys() & scene.alternatives):
                    break
        covered = {place for name, places in scene.alternatives.items() if name in winners for place in places}
        for kernel, failure in failures.items():
            if kernel in scene.kernels and kernel not in covered:
                self.failed, self.failure = kernel, failure
                return {}
        return winners


class KernelSweep:
    """Times and proves the candidates of one kernel, and chooses its winner."""

    def __init__(self, scene: Scene, plan: Plan, compilation: Compilation, through: Mapping[str, Config]) -> None:
        self._scene = scene
        self._plan = plan
        self._kernel = plan.kernel
        self._compilation = compilation
        self._through = through
        self._pool = {config.hash: Candidate(config) for config in plan.candidates}
        for candidate in self._pool.values():
            self._resume(candidate)

    def run(self, deadline: float, share: float) -> Winner | None:
        """Returns the fastest candidate that passed everything, None if there is none. ``deadline`` is monotonic."""
        deadline -= min(RESERVE_SECONDS, share / 5)
        settings = self._scene.settings
        for candidate in track(
            self._order(deadline), f"proving {self._kernel}", len(self._pool), log=settings.log, note=self._note
        ):
            self._judge(candidate)
        winner = self._choose()
        logger.info("%s: %s; winner: %s", self._kernel, self.tally(), _name(winner))
        return winner

    def tally(self) -> str:
        """Returns how the candidates fared, as "30 safe, 6 timed only, 4 wrong of 40"."""
        return f"{self._verdicts() or 'none tried'} of {self._plan.total}"

    def _verdicts(self) -> str:
        return counted(told(candidate.trial) for candidate in self._pool.values() if candidate.trial)

    def _resume(self, candidate: Candidate) -> None:
        """Takes over what was found earlier: what bars it here, or a proof through the same configs."""
        through = hashes(self._through)
        bar, trial = self._plan.barred(candidate.config, through), self._plan.proven.get(candidate.config.hash)
        if bar is not None:
            candidate.resume(bar)
        elif trial is not None:
            candidate.ready = True
            if trial.proven_with == through:
                candidate.resume(trial)

    def _order(self, deadline: float) -> Iterator[Candidate]:
        """Yields the candidates to judge, each time the fastest one known by then.

        Judging starts when all are compiled and timed, or half the time is gone; it ends at the deadline, but not
        before something is safe or ``OVERTIME_PROOFS`` more have failed.
        """
        halfway = (time.monotonic() + deadline) / 2
        late = 0
        resumed = [each for each in self._pool.values() if each.ready and not each.settled]
        self._measure(resumed, QUICK_ROUNDS)
        for candidate in resumed:
            candidate.settled = candidate.safe  # proven earlier and only its time was missing
        while True:
            self._receive(halfway - time.monotonic())
            finished = self._compilation.finished(self._kernel)
            if not finished and time.monotonic() < halfway:
                continue
            over = time.monotonic() >= deadline
            if over and (self._safe() or late >= OVERTIME_PROOFS):
                return
            open_ = [each for each in self._pool.values() if each.ready and not each.settled]
            if open_:
                late += over
                # Until something is safe, what won a related problem comes first: it is likely to be.
                related = frozenset() if self._safe() else self._plan.related
                yield min(open_, key=lambda each: (each.config.hash not in related, each.ms))
            elif finished:
                return
            else:
                self._receive(1.0)

    def _receive(self, seconds: float) -> None:
        """Times what has been compiled meanwhile, waiting up to ``seconds`` for something to come."""
        good = []
        for config, outcome in self._compilation.take(self._kernel, seconds):
            candidate = self._pool[config.hash]
            if candidate.settled:  # barred behind the configs that have won meanwhile
                continue
            if outcome.verdict is Verdict.SAFE:
                candidate.ready = True
                candidate.figures |= outcome.figures
                good.append(candidate)
            else:
                self._commit(candidate, outcome)
        self._measure(good, QUICK_ROUNDS)

    def _measure(self, candidates: Sequence[Candidate], rounds: int) -> None:
        """Times ``candidates`` against each other; one that fails keeps an infinite time."""
        while candidates:  # where memory ran short meanwhile, the others too: times of two sizes do not compare
            self._time(candidates, rounds)
            candidates = at_other_sizes(self._pool.values(), candidates)

    def _time(self, candidates: Sequence[Candidate], rounds: int) -> None:
        rounds = 1 if self._scene.device.interpreted else rounds
        configs = [candidate.config for candidate in candidates]
        figures = self._scene.sandbox.measure(self._kernel, configs, self._through, rounds)
        for candidate in candidates:
            candidate.untime()
            candidate.figures |= figures.get(candidate.config.hash, {})

    def _judge(self, candidate: Candidate) -> None:
        """Proves ``candidate`` and stores the verdict, unless it is too slow to win."""
        if self._hopeless(candidate):
            if candidate.trial is None:
                reason = f"timed but not proven: over {HOPELESS:g}x the time of the fastest safe config"
                self._commit(candidate, Outcome(Verdict.SAFE, 0, reason, {}, self._scene.seed, "", 0.0))
            candidate.settled = True
            return
        outcome = self._scene.prove(self._kernel, candidate.config, self._through, 2)
        if outcome.verdict is Verdict.SAFE and candidate.ms == math.inf:
            self._measure([candidate], QUICK_ROUNDS)
            if candidate.ms == math.inf:
                outcome = replace(
                    outcome, verdict=Verdict.CRASHED, level=0, reason="passed the gate, failed when timed"
                )
        self._commit(candidate, outcome)

    def _choose(self) -> Winner | None:
        """Returns the fastest of the best few safe candidates, timed against each other and screened for races."""
        safe, host = self._safe(), hosts(self._pool.values())
        best = [each for each in safe[:FINALISTS] if cost(each, host) <= CLOSE * cost(safe[0], host)]
        if len(best) > 1:
            self._measure(best, FINAL_ROUNDS)
        for candidate in [*ranked(best), *safe[len(best) :]][:FINALISTS]:
            if candidate.ms < math.inf and self._screened(candidate):
                return self._winner(candidate)
        return None

    def _screened(self, candidate: Candidate) -> bool:
        """Returns whether ``candidate`` passes, or has passed, the winner's long race screen (the interpreter has no races)."""
        if self._scene.device.interpreted or candidate.repeats >= WINNER_REPEATS:
            return True
        outcome = self._scene.prove(self._kernel, candidate.config, self._through, 2, WINNER_REPEATS)
        self._commit(candidate, outcome)
        return candidate.safe

    def _winner(self, candidate: Candidate) -> Winner:
        assert candidate.trial is not None, "only a proven candidate is chosen"
        tried = sum(each.trial is not None for each in self._pool.values())
        return Winner(
            problem=self._scene.problem,
            kernel=self._kernel,
            config=candidate.config,
            level=candidate.trial.level,
            ms=candidate.ms,
            tried=tried,
            total=self._plan.total,
            complete=tried == self._plan.total and not self._plan.pinned and "timed_at" not in candidate.figures,
            proven_with=hashes(self._through),
            binary=candidate.trial.binary,
            environment=self._scene.device.environment,
            created_at=time.time(),
        )

    def _commit(self, candidate: Candidate, outcome: Outcome) -> None:
        """Stores what became of ``candidate``, with all figures known of it."""
        candidate.settled = True
        merged = replace(outcome, figures={**candidate.figures, **outcome.figures})
        candidate.trial = self._scene.trial(self._kernel, candidate.config, merged, self._through)
        self._scene.commit(candidate.trial)
        logger.debug("%s %s: %s %s", self._kernel, candidate.config, outcome.verdict, outcome.reason)

    def _safe(self) -> list[Candidate]:
        host = hosts(self._pool.values())
        found = (each for each in self._pool.values() if each.safe)
        return sorted(found, key=lambda each: (cost(each, host), each.ms))

    def _hopeless(self, candidate: Candidate) -> bool:
        """Returns whether enough safe ones, of all or of its own implementation, are so much faster than ``candidate``.

        Of each implementation one is proven, whatever the others take: they may not be there everywhere.
        """
        safe, host = self._safe(), hosts(self._pool.values())
        own = [each for each in safe if each.config.implementation == candidate.config.implementation]
        if not own or candidate.ms == math.inf:
            return False
        beaten = len(safe) >= FINALISTS and HOPELESS * cost(safe[0], host) < cost(candidate, host)
        return beaten or (len(own) >= FINALISTS and HOPELESS * own[0].ms < candidate.ms)

    def _note(self) -> str:
        safe = self._safe()
        best = f"best {safe[0].ms:.3g} ms" if safe else "none safe yet"
        return ", ".join(filter(None, [self._verdicts(), best]))


def _name(winner: Winner | None) -> str:
    return f"{winner.config}, {winner.ms:.3g} ms" if winner else "none"
