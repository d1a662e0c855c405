"""How autotune may behave: one frozen object, passed down by the caller and read from nowhere else."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from autotune.errors import SettingsError
from autotune.job import Job
from cache_db.address import Address

LOG_LEVELS: Final = ("quiet", "info", "debug")
INTERPRETER_SECONDS: Final = 20.0
_SPACE: Final = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


class Mode(StrEnum):
    """What a missing winner leads to."""

    TUNE = "tune"
    READ = "read"
    ASSERT = "assert"
    RETUNE = "retune"
    OFF = "off"


@dataclass(frozen=True)
class Settings:
    """The choices of one caller.

    ``mode``: ``tune`` sweeps on a miss, ``read`` never sweeps, ``assert`` raises CacheMiss on a miss, ``retune`` sweeps
    even over a stored winner, ``off`` uses no database. ``cache_dir``: folder of the database, None for memory only.
    ``db_url``: the shared database behind it, if any, and ``db_seconds`` the longest wait for it. ``seeds``: sealed databases
    whose winners fill gaps; of two the earlier counts.
    ``budget_seconds``: the longest sweep of one problem. ``wait_seconds``: how long to wait for another process that
    tunes the same problem; ``group_wait_seconds`` the same for one whose job only its process group shows, None for no
    other. ``implementations``: the only ones allowed, empty for all. ``log``: quiet, info or debug.
    ``finish``: whether a winner whose sweep ran out of budget is swept on. ``space``: the ``module:attribute`` of
    candidates of the caller's own, see :mod:`autotune.spaces`. ``job``: the one whose ranks must all run the same, unless
    ``alone``. ``leave``: whether a problem that another process tunes is left to it (``resolve`` raises Taken). ``record``:
    the file in which the caller notes the problems it meets. ``cure``: what messages tell the user to do
    against tuning at the first call, ``remedy`` against running without a tuned kernel.

    Raises SettingsError (a ValueError) for any other value.
    """

    mode: Mode = Mode.TUNE
    cache_dir: Path | None = None
    budget_seconds: float = 60.0
    wait_seconds: float = 0.0
    implementations: tuple[str, ...] = ()
    log: str = "info"
    finish: bool = False
    space: str | None = None
    db_url: Address | None = None
    db_seconds: float = 2.5
    group_wait_seconds: float | None = None
    job: Job | None = None
    alone: bool = False
    leave: bool = False
    record: Path | None = None
    seeds: tuple[Path, ...] = ()
    cure: str = 'use mode "read", or tune it beforehand'
    remedy: str = "tune it beforehand"

    def __post_init__(self) -> None:
        object.__setattr__(self, "mode", _member("mode", self.mode))
        if self.log not in LOG_LEVELS:
            raise SettingsError(f"log: expected one of {', '.join(LOG_LEVELS)}, got {self.log!r}")
        _seconds("budget_seconds", self.budget_seconds, positive=True)
        _seconds("wait_seconds", self.wait_seconds, positive=False)
        if self.group_wait_seconds is not None:
            _seconds("group_wait_seconds", self.group_wait_seconds, positive=False)
        _seconds("db_seconds", self.db_seconds, positive=True)
        if self.space is not None and not (isinstance(self.space, str) and _SPACE.fullmatch(self.space)):
            raise SettingsError(f"space: expected module:attribute, got {self.space!r}")

    @property
    def identity(self) -> tuple[object, ...]:
        """The settings that may change which config is chosen."""
        return self.mode, self.cache_dir, self.implementations, self.finish, self.space, self.db_url, self.seeds

    def allows(self, implementation: str) -> bool:
        """Returns whether configs of ``implementation`` may be used."""
        return not self.implementations or implementation in self.implementations


def _member(name: str, value: str) -> Mode:
    try:
        return Mode(value)
    except ValueError:
        raise SettingsError(f"{name}: expected one of {', '.join(Mode)}, got {value!r}") from None


def _seconds(name: str, value: float, *, positive: bool) -> None:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    if not fits or value < 0 or (positive and value == 0):
        bound = "above 0" if positive else "of 0 or more"
        raise SettingsError(f"{name}: expected a number of seconds {bound}, got {value!r}")
