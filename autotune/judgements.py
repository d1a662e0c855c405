"""What the database says of the configs of one kernel, and how far each judgement reaches.

Final verdicts hold everywhere. A crash, a time-out or a kill may be the machine's doing: it holds on its own host and
GPU for a day, and everywhere once the config failed so on two GPUs. In Triton's interpreter it holds nowhere.
A lift takes the force of all that was judged before it; what is judged later counts again.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Final

from autotune.place import INTERPRETER, Place
from cache_db.models import FINAL, Config, Environment, Lift, Trial, Verdict, Verification

QUARANTINE_SECONDS: Final = 86_400.0
ENOUGH_GPUS: Final = 2
GATE_LEVEL: Final = 2

Judgement = Trial | Verification


class Reach(StrEnum):
    """Where a judgement that found a config unsafe keeps it from running.

    ``ELSEWHERE`` is on the host and GPU of the failure, for a day; ``OVER``: that day has passed, or the config was
    proven on that GPU since; ``NEVER``: a failure of the interpreter.
    """

    EVERYWHERE = "everywhere"
    HERE = "here"
    ELSEWHERE = "elsewhere"
    OVER = "over"
    LIFTED = "lifted"
    NEVER = "never"


class Judgements:
    """All that is stored of one (problem, kernel), as seen from ``place``."""

    def __init__(
        self, place: Place, trials: Iterable[Trial], verifications: Iterable[Verification], lifts: Iterable[Lift]
    ) -> None:
        self._place = place
        self._rows: dict[str, list[Judgement]] = defaultdict(list)
        self._lifts: dict[str, Lift] = {}
        rows: list[Judgement] = [*trials, *verifications]
        for row in rows:
            self._rows[row.config.hash].append(row)
        for lift in sorted(lifts, key=lambda lift: lift.created_at):
            self._lifts[lift.config.hash] = lift

    def trials(self) -> list[Trial]:
        """Returns the trials that no lift has taken the force of."""
        rows = [row for rows in self._rows.values() for row in rows if isinstance(row, Trial)]
        return [row for row in rows if not self.lifted(row)]

    def unsafe(self) -> list[Judgement]:
        """Returns whatever was found of any config but that it is safe; what a trial and a proof both say, once."""
        found: dict[tuple[str, float, Verdict], Judgement] = {}
        for name, rows in self._rows.items():
            for row in rows:
                if row.verdict is not Verdict.SAFE:
                    found.setdefault((name, row.created_at, row.verdict), row)
        return sorted(found.values(), key=lambda row: row.created_at)

    def lift(self, config: Config) -> Lift | None:
        """Returns the latest lift of ``config``."""
        return self._lifts.get(config.hash)

    def lifted_at(self, config: Config) -> float:
        """Returns until when judgements of ``config`` have lost their force (epoch seconds)."""
        lift = self.lift(config)
        return -math.inf if lift is None else lift.created_at

    def lifted(self, row: Judgement) -> bool:
        """Returns whether a lift took the force of ``row``."""
        return row.created_at <= self.lifted_at(row.config)

    def bar(self, config: Config, through: Mapping[str, str]) -> Judgement | None:
        """Returns the judgement that keeps ``config`` from running here behind the configs ``through``, or None."""
        return next((row for row in self._rows.get(config.hash, ()) if self._bars(row, through)), None)

    def proofs(self, config: Config, environment: Environment, through: Mapping[str, str]) -> list[Judgement]:
        """Returns what proves ``config`` in ``environment`` behind the configs ``through``, at whatever level."""
        return [
            row
            for row in self._rows.get(config.hash, ())
            if row.verdict is Verdict.SAFE
            and row.environment == environment
            and row.proven_with == through
            and not self.lifted(row)
        ]

    def reach(self, row: Judgement) -> Reach:
        """Returns where ``row``, which found its config unsafe, holds."""
        if self.lifted(row):
            return Reach.LIFTED
        if row.verdict in FINAL:
            return Reach.EVERYWHERE
        if row.problem.gpu_name == INTERPRETER:
            return Reach.NEVER
        failed = {each.gpu_uuid for each in self._rows[row.config.hash] if self._counts(each)}
        if self._counts(row) and len(failed - {""}) >= ENOUGH_GPUS:
            return Reach.EVERYWHERE
        if not self._counts(row) or time.time() - row.created_at >= QUARANTINE_SECONDS:
            return Reach.OVER
        here = row.host == self._place.host and row.gpu_uuid in self._place.gpus
        return Reach.HERE if here else Reach.ELSEWHERE

    def _bars(self, row: Judgement, through: Mapping[str, str]) -> bool:
        """Returns whether ``row`` keeps its config from running here.

        A later proof speaks of the very configs it went through: what is wrong behind a wrong forward is not wrong
        behind another. (A trial's are the winners of its sweep: those were proven.)
        """
        if row.verdict is Verdict.SAFE or self.reach(row) not in (Reach.EVERYWHERE, Reach.HERE):
            return False
        return isinstance(row, Trial) or row.verdict not in FINAL or row.proven_with == through

    def _counts(self, row: Judgement) -> bool:
        """Returns whether ``row`` is a failure that may pass and that no proof on the same GPU has answered since."""
        if row.verdict in FINAL or self.lifted(row):
            return False
        return not any(
            later.verdict is Verdict.SAFE
            and later.level >= GATE_LEVEL
            and later.gpu_uuid == row.gpu_uuid
            and later.created_at > row.created_at
            for later in self._rows[row.config.hash]
        )
