"""Which configs may run: pins and stored winners that still hold, and the ladder below them.

A proof holds for one environment (driver, ptxas, torch), one binary and the exact configs of the kernels it was judged
through. When any of these differ the config is proven again, in seconds, and the new proof is stored, so that a whole
cluster does it once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from autotune.judgements import Judgement, Judgements
from autotune.sandbox import Outcome
from autotune.scene import Scene, hashes
from autotune.standing import faster, next_safe
from cache_db.models import Config, Environment, Verdict, Winner

Rung = Literal["pinned", "winner", "neighbour", "default"]
NEIGHBOURS = 2

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


class Prover:
    """Finds configs that may run without a sweep, proving what has to be proven."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene

    def adopt(self, winners: Mapping[str, Winner], kernels: Sequence[str] | None = None) -> Adoption:
        """Returns pins, and stored ``winners`` where there is none, if every kernel has one that may run here and now.

        ``kernels`` asks for those alone, in the order they run.
        """
        choices: dict[str, Choice] = {}
        used: list[Winner] = []
        notes: list[str] = []
        done: set[str] = set()
        for kernel in self._scene.kernels if kernels is None else kernels:
            if kernel in done:
                continue
            if kernels is None and (instead := self._instead(kernel, winners, choices, used)):
                done |= {kernel, *self._scene.alternatives[instead]}
                continue
            pinned = self._pinned(kernel, choices)
            if pinned is not None:
                choices[kernel] = pinned
                continue
            winner = winners.get(kernel)
            if winner is None:
                return Adoption({}, f"no winner of {kernel} is stored")
            refusal = self._scene.refuses(kernel, winner.config)
            if refusal is not None:
                row = self._next(winner, choices)
                if row is None:
                    return Adoption({}, f"the stored winner of {kernel} may not run here: {refusal}")
                notes.append(f"{kernel}: passed over {winner.config}: {refusal}")
                used.append(row)
                continue
            proof = self._certify(kernel, winner, choices)
            if proof.verdict is not Verdict.SAFE:
                return Adoption(
                    {}, f"the stored winner of {kernel} failed its proof here: {proof.verdict}, {proof.reason}"
                )
            choices[kernel] = Choice(winner.config, "winner", proof.level, proof.binary)
            used.append(winner)
        reason = "; ".join(filter(None, (_report(used), *notes, _pins(choices))))
        return Adoption(choices, reason, all(winner.complete for winner in used))

    def descend(self, winners: Mapping[str, Winner], *, near: bool = True) -> Adoption:
        """Returns the best choice of each kernel down the ladder; empty when one kernel has nothing that passes.

        Without ``near`` no neighbour is looked for.
        """
        choices: dict[str, Choice] = {}
        for kernel in self._scene.kernels:
            pinned = self._pinned(kernel, choices)
            if pinned is not None:
                choices[kernel] = pinned
                continue
            last = "every rung is refused by the rules"
            for rung, config in self._rungs(kernel, winners, near=near):
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
        known = self._known(scene.judgements(kernel), config, through, level, binary)
        if known is not None:
            return known
        outcome = scene.prove(kernel, config, through, level)
        scene.note(kernel, config, outcome, through)
        return outcome

    def accept(
        self,
        kernel: str,
        config: Config,
        chosen: Mapping[str, Choice],
        needed: int,
        level: int,
        environment: Environment,
        binary: str,
    ) -> Outcome:
        """Returns the proof of another rank, ``level`` in its ``environment``, if it holds here; else proves to ``needed``.

        Raises KeyError when a kernel that ``kernel`` needs is not ``chosen``.
        """
        scene = self._scene
        through = scene.upstream(kernel, {name: choice.config for name, choice in chosen.items()})
        bar = scene.judgements(kernel).bar(config, hashes(through))
        if bar is not None:
            return _told(bar)
        if environment == scene.device.environment and level >= needed:
            return Outcome(Verdict.SAFE, level, "", {}, scene.seed, binary, 0.0)
        self._announce(kernel)
        return self.proof(kernel, config, chosen, needed)

    def _pinned(self, kernel: str, chosen: Mapping[str, Choice]) -> Choice | None:
        """Returns the pin of ``kernel`` if a gate's proof of it holds or can be made here; one that fails is dropped."""
        pin = self._scene.pins.get(kernel)
        if pin is None:
            return None
        proof = self.proof(kernel, pin.config, chosen, 2)
        if proof.verdict is Verdict.SAFE:
            return Choice(pin.config, "pinned", proof.level, proof.binary)
        self._scene.drop_pin(kernel, f"{proof.verdict}, {proof.reason}")
        return None

    def _next(self, winner: Winner, chosen: dict[str, Choice]) -> Winner | None:
        """Returns the first of the next safe rows that holds here, chosen, or None."""
        for row in next_safe(self._scene, winner):
            proof = self._certify(row.kernel, row, chosen)
            if proof.verdict is Verdict.SAFE:
                chosen[row.kernel] = Choice(row.config, "winner", proof.level, proof.binary)
                return row
        return None

    def _instead(
        self, kernel: str, winners: Mapping[str, Winner], chosen: dict[str, Choice], used: list[Winner]
    ) -> str | None:
        """Returns the alternative to ``kernel``, and to others, that is chosen here: a pin, or a faster winner; or None."""
        scene = self._scene
        for name, places in scene.alternatives.items():
            if kernel not in places:
                continue
            pinned = self._pinned(name, chosen)
            if pinned is not None:
                chosen[name] = pinned
                return name
            row = None if any(place in scene.pins for place in places) else winners.get(name)
            if row is None:
                continue
            rows = [row] if scene.refuses(name, row.config) is None else next_safe(scene, row)
            others = [winners[place] for place in places if place in winners]
            for each in rows:
                if len(others) == len(places) and not faster(scene, each, others):
                    break
                proof = self._certify(name, each, chosen)
                if proof.verdict is Verdict.SAFE:
                    chosen[name] = Choice(each.config, "winner", proof.level, proof.binary)
                    used.append(each)
                    return name
        return None

    def _certify(self, kernel: str, winner: Winner, chosen: Mapping[str, Choice]) -> Outcome:
        """Returns the winner row itself as proof where it still holds, otherwise a proof.

        A later failure outweighs it: a retune may have found the winner racy and nothing better. One that was lifted
        since is proven again too.
        """
        scene = self._scene
        through = scene.upstream(kernel, {name: choice.config for name, choice in chosen.items()})
        judgements = scene.judgements(kernel)
        bar = judgements.bar(winner.config, hashes(through))
        if bar is not None:
            return _told(bar)
        same = winner.environment == scene.device.environment and winner.proven_with == hashes(through)
        if same and winner.level >= 2 and winner.created_at > judgements.lifted_at(winner.config):
            return Outcome(Verdict.SAFE, winner.level, "", {}, scene.seed, winner.binary, 0.0)
        self._announce(kernel)
        return self.proof(kernel, winner.config, chosen, 2)

    def _announce(self, kernel: str) -> None:
        """Says that a stored winner has to be proven again."""
        logger.info(
            "proving the stored winner of %s again: it was proven elsewhere, at another level, or lifted", kernel
        )

    def _rungs(self, kernel: str, winners: Mapping[str, Winner], *, near: bool) -> Iterator[tuple[Rung, Config]]:
        scene = self._scene
        seen: set[str] = set()

        def fresh(config: Config) -> bool:
            known = config.hash in seen
            seen.add(config.hash)
            return not known and scene.refuses(kernel, config) is None

        if kernel in winners and fresh(winners[kernel].config):
            yield "winner", winners[kernel].config
        neighbours = scene.store.neighbours(scene.problem, scene.spec.soft_fields()) if near else []
        for neighbour in neighbours[:NEIGHBOURS]:
            if kernel in neighbour and fresh(neighbour[kernel].config):
                yield "neighbour", neighbour[kernel].config
        default = scene.spec.default(kernel, scene.problem, scene.device)
        if fresh(default):
            yield "default", default

    def _known(
        self, judgements: Judgements, config: Config, through: Mapping[str, Config], level: int, binary: str | None
    ) -> Outcome | None:
        """Returns what the store already says of ``config``; a failure that holds here outweighs a proof."""
        bar = judgements.bar(config, hashes(through))
        if bar is not None:
            return _told(bar)
        for row in judgements.proofs(config, self._scene.device.environment, hashes(through)):
            if row.level >= level and binary in (None, row.binary):
                return _told(row)
        return None


def _told(row: Judgement) -> Outcome:
    return Outcome(row.verdict, row.level, row.reason, {}, row.seed, row.binary, 0.0)


def _report(winners: Sequence[Winner]) -> str:
    """Returns "12 of 40 tried" for the kernels whose sweep ended early, else a plain statement; "" without winners."""
    if not winners:
        return ""
    partial = [f"{row.kernel}: {row.tried} of {row.total} tried" for row in winners if not row.complete and row.total]
    return "stored winner" + (f" ({', '.join(partial)})" if partial else "")


def _pins(choices: Mapping[str, Choice]) -> str:
    pinned = [kernel for kernel, choice in choices.items() if choice.rung == "pinned"]
    return f"pinned: {', '.join(pinned)}" if pinned else ""
