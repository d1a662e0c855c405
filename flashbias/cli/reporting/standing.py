"""What a report says of one config of one kernel: how it was judged, how fast it is, and where it stands now."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from autotune.candidate import Candidate
from autotune.judgements import GATE_LEVEL, Judgement
from cache_db.models import FINAL, Config, Lift, Trial, Verdict, Verification, Winner

TIMED: Final = "timed only"
QUICK: Final = "quick proof"
LIFTED: Final = "lifted"
UNTRIED: Final = "not tried"


@dataclass(frozen=True)
class Standing:
    """One config with what its rows come to.

    ``state`` is a verdict, or in words why there is none that counts: "timed only", "quick proof", "lifted" and "not
    tried". ``ms`` is None where no time of the problem's own size is stored.
    """

    config: Config
    state: str
    reason: str = ""
    level: int = 0
    ms: float | None = None
    trial: Trial | None = None
    judged: Sequence[Verification] = field(default=())

    @property
    def safe(self) -> bool:
        """Whether it has passed the gate, and nothing found since counts against it."""
        return self.state == Verdict.SAFE

    @property
    def failed(self) -> bool:
        """Whether something found of it counts against it."""
        return self.state in _FAILURES


_FAILURES: Final = frozenset(verdict.value for verdict in Verdict if verdict is not Verdict.SAFE)


def standings(
    trials: Iterable[Trial],
    verifications: Iterable[Verification],
    lifts: Iterable[Lift],
    winner: Winner | None,
    others: Iterable[Config],
) -> list[Standing]:
    """Returns all configs that rows of one kernel speak of, and ``others``: the fastest first, those without a time last."""
    tried = {row.config.hash: row for row in trials}
    judged: dict[str, list[Verification]] = {}
    for row in sorted(verifications, key=lambda row: (row.created_at, row.verdict, row.reason)):
        judged.setdefault(row.config.hash, []).append(row)
    lifted: dict[str, float] = {}
    for lift in lifts:
        lifted[lift.config.hash] = max(lift.created_at, lifted.get(lift.config.hash, lift.created_at))
    configs = [row.config for row in tried.values()] + [rows[0].config for rows in judged.values()] + list(others)
    configs += [winner.config] if winner else []
    found = [
        _standing(config, tried.get(config.hash), judged.get(config.hash, ()), lifted.get(config.hash), winner)
        for config in dict.fromkeys(configs)
    ]
    return sorted(found, key=lambda each: (each.ms is None, each.ms or 0.0, each.config.hash))


def runner_up(found: Iterable[Standing], winner: Config) -> Standing | None:
    """Returns the fastest safe config but ``winner`` among ``found``, by the times that are stored."""
    others = (each for each in found if each.safe and each.ms is not None and each.config != winner)
    return min(others, key=lambda each: (each.ms or 0.0, each.config.hash), default=None)


def _standing(
    config: Config, trial: Trial | None, judged: Sequence[Verification], lifted: float | None, winner: Winner | None
) -> Standing:
    won = winner if winner is not None and winner.config == config else None
    ms = _milliseconds(config, trial)
    rows: list[Judgement] = [*([trial] if trial else []), *judged]
    standing = [row for row in rows if lifted is None or row.created_at > lifted]
    against = _against(standing, trial, won)
    level = max((row.level for row in standing if row.verdict is Verdict.SAFE), default=0)
    if against is not None:
        return Standing(config, against.verdict.value, against.reason, against.level, ms, trial, judged)
    if won is not None:
        ms = won.ms if won.ms > 0 else ms
        return Standing(config, _proven(won.level), "", max(level, won.level), ms, trial, judged)
    if standing:
        reason = trial.reason if trial is not None else ""
        return Standing(config, _proven(level), reason, level, ms, trial, judged)
    return Standing(config, LIFTED if rows else UNTRIED, "", 0, ms, trial, judged)


def _against(rows: Sequence[Judgement], trial: Trial | None, won: Winner | None) -> Judgement | None:
    """Returns the newest judgement of ``rows`` that counts against their config, or None.

    Unlike the quarantine this does not ask who looks, and when: a crash counts until a later proof has passed, wherever
    it was. What was found wrong behind other upstream configs than the trial or winner was judged through does not count.
    """
    through = [row.proven_with for row in (trial, won) if row is not None]
    found = None
    for row in sorted(rows, key=lambda row: row.created_at):
        if row.verdict is Verdict.SAFE:
            passing = row.level >= GATE_LEVEL and found is not None and found.verdict not in FINAL
            found = None if passing else found
        elif isinstance(row, Trial) or row.verdict not in FINAL or not through or row.proven_with in through:
            found = row if found is None or row.verdict in FINAL or found.verdict not in FINAL else found
    return found


def _proven(level: int) -> str:
    return str(Verdict.SAFE) if level >= GATE_LEVEL else QUICK if level else TIMED


def _milliseconds(config: Config, trial: Trial | None) -> float | None:
    """Returns the stored median time of ``config`` at the problem's own size; a row's may be anything."""
    if trial is None:
        return None
    candidate = Candidate(config)
    candidate.resume(trial)
    return candidate.ms if candidate.figures.get("ms") is not None else None
