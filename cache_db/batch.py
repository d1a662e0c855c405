"""Rows that travel together from one database to another, and the marks of those that still have to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cache_db.models import Lift, Trial, Verification, Winner

Shared = Trial | Verification | Lift | Winner
"""The rows that a user's database and the shared one exchange. Pins stay with the user who wished them."""


@dataclass(frozen=True)
class Batch:
    """Rows to be merged into a database.

    ``forced`` and ``renewed`` are the hashes of keys whose winner ranks by no figure: a forced one goes over any other,
    a renewed one, which was meant to take another's place, over those that are older.
    """

    trials: tuple[Trial, ...] = ()
    verifications: tuple[Verification, ...] = ()
    lifts: tuple[Lift, ...] = ()
    winners: tuple[Winner, ...] = ()
    forced: frozenset[str] = frozenset()
    renewed: frozenset[str] = frozenset()

    @classmethod
    def of(cls, rows: Iterable[Shared], renewed: frozenset[str] = frozenset()) -> Batch:
        """Returns ``rows`` sorted by kind."""
        rows = list(rows)
        return cls(
            tuple(row for row in rows if isinstance(row, Trial)),
            tuple(row for row in rows if isinstance(row, Verification)),
            tuple(row for row in rows if isinstance(row, Lift)),
            tuple(row for row in rows if isinstance(row, Winner)),
            renewed=renewed,
        )

    def winners_by_rule(self) -> tuple[list[Winner], list[Winner], list[Winner]]:
        """Returns the winners that go by rank, those that only have to be later, and those that go over any."""
        rules: tuple[list[Winner], list[Winner], list[Winner]] = ([], [], [])
        for winner in self.winners:
            key = winner.problem.key(winner.kernel)
            rules[2 if key in self.forced else 1 if key in self.renewed else 0].append(winner)
        return rules


@dataclass(frozen=True)
class Debt:
    """A row that the user's database has and the shared one lacks, or the other way round (``cache_db.outbox.GONE``).

    ``row`` is None when it is not stored (any more).

    ``stamp`` names the row's contents: what was changed after a debt was read stays owed. ``replace`` says that the
    winner was meant to take another's place.
    """

    kind: str
    name: str
    stamp: str
    replace: bool
    row: Shared | None = None
