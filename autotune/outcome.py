"""What became of one candidate in a child."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from autotune.detail import OutputDetail
from cache_db.models import Scalar, Verdict


@dataclass(frozen=True)
class Outcome:
    """What became of one candidate. ``level`` is the proof reached (0 unless ``verdict`` is safe).

    ``details`` tell of every output on every case that was judged, if they were asked for.
    """

    verdict: Verdict
    level: int = 0
    reason: str = ""
    figures: dict[str, Scalar] = field(default_factory=dict)
    seed: int = 0
    binary: str = ""
    seconds: float = 0.0
    details: tuple[OutputDetail, ...] = ()

    @property
    def safe(self) -> bool:
        """Whether the candidate passed what it was put through."""
        return self.verdict is Verdict.SAFE

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Returns what a child told of a candidate."""
        details = tuple(OutputDetail.model_validate(each) for each in data.get("details", ()))
        return cls(**{**data, "verdict": Verdict(data["verdict"]), "details": details})
