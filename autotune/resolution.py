"""What was decided for a problem."""

from __future__ import annotations

from dataclasses import dataclass

from autotune.proofs import Choice


@dataclass(frozen=True)
class Resolution:
    """What to run. Empty ``choices``: nothing proven, the caller must use its own fallback; ``reason`` says why.

    ``swept`` is True for the one call that tuned the problem; ``location`` names the database.
    """

    choices: dict[str, Choice]
    reason: str
    swept: bool
    location: str

    @property
    def won(self) -> bool:
        """Whether every kernel runs its winner, or what was pinned in its place, and not a rung below."""
        return bool(self.choices) and all(choice.rung in ("winner", "pinned") for choice in self.choices.values())
