"""What one process remembers of its tuning."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

from autotune.resolution import Resolution
from autotune.settings import Mode, Settings

if TYPE_CHECKING:
    from cache_db import Layers
    from cache_db.address import Address

    Place = tuple[Path | None, Address | None, tuple[Path, ...]]


class Process:
    """What one process remembers: decisions, their locks, and the databases opened."""

    def __init__(self) -> None:
        self.decided: dict[object, Resolution] = {}
        self.confirmed: dict[object, bool] = {}
        self.stores: dict[Place, Layers] = {}
        self.epoch = 0  # of the agreements of this process's job
        self.renew_locks()

    def renew_locks(self) -> None:
        """Makes fresh locks: those inherited by a forked child may be held by threads it does not have."""
        self._guard = threading.RLock()
        self._locks: dict[object, threading.Lock] = {}
        self.sweeping = threading.Lock()

    def lock(self, key: object) -> threading.Lock:
        """Returns the lock under which ``key`` is decided."""
        with self._guard:
            return self._locks.setdefault(key, threading.Lock())

    def store(self, settings: Settings) -> Layers:
        """Returns the database of ``settings``, opened at its first use (importing SQLAlchemy takes 0.2 s)."""
        from cache_db import open_layers

        at = place(settings)
        with self._guard:
            if at not in self.stores:
                folder, address, seeds = at
                self.stores[at] = open_layers(folder, address, settings.db_seconds, seeds)
            return self.stores[at]


def place(settings: Settings) -> Place:
    """Returns the folder, the server and the seeds of a database; mode off has none of them."""
    return (None, None, ()) if settings.mode is Mode.OFF else (settings.cache_dir, settings.db_url, settings.seeds)
