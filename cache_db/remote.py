"""The shared database as one process sees it: ready, read-only or away, and never in the way.

A call that does not come back within its time is given up, and with it the server: it is then left alone, calls
fail at once, and a thread of its own asks again with growing pauses. So is one that answers, but slowly, once that has cost as much. When the server is back, the thread first sends what
was learned meanwhile. A second outage costs at most half the first one's time, a third half of that, so that a process
that trains for a month never waits much longer than twice the time it was given once.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
import weakref
from collections.abc import Callable
from typing import TypeVar

from cache_db import deadline
from cache_db.address import Address
from cache_db.delivery import Ask
from cache_db.errors import CacheError, Forbidden, RowRefused, Unavailable, UnknownSchema
from cache_db.store import Store

SHORTEST_SECONDS = 0.5
QUICK_SECONDS = 0.25
"""A call that takes less costs nobody anything to speak of; one is 5 ms on a local network."""

FIRST_PAUSE, LONGEST_PAUSE = 5.0, 300.0
COURIER_SECONDS = 15.0
"""How long the thread that asks again waits for each answer: nobody waits for it."""

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Remote:
    """One shared database. ``deliver`` sends what is owed to it, and may raise CacheError."""

    def __init__(self, address: Address, seconds: float, deliver: Callable[[Ask], None]) -> None:
        self.address = address
        self._patience = seconds
        self._slow = 0.0
        self._deliver = deliver
        self._store: Store | None = None
        self._away: CacheError | None = None
        self._barred: Forbidden | None = None
        self._warned: set[type] = set()
        self._closed = threading.Event()
        self.renew()
        _all.add(self)

    def renew(self) -> None:
        """Takes up the work in a forked child: locks may be held, and the courier runs, in the parent only."""
        closed = self._closed.is_set()
        self._closed = threading.Event()
        if closed:
            self._closed.set()
        self._lock = threading.Lock()
        self._courier: threading.Thread | None = None
        self._store = None

    @property
    def met(self) -> bool:
        """Whether this process has opened the server's database."""
        return self._store is not None

    @property
    def state(self) -> str:
        """What is known of the server without asking it: "ready", "read-only" or "away"."""
        return "away" if self._away else "read-only" if self._barred else "ready"

    def read(self, action: Callable[[Store], T]) -> T:
        """Returns what ``action`` returns. Raises CacheError, at once while the server is away."""
        away = self._away
        if away is not None:
            self.send_later()
            raise away.with_traceback(None)
        started = time.monotonic()
        try:
            found = deadline.within(self._patience, lambda: action(self._opened()))
        except RowRefused:
            raise
        except Forbidden as error:
            self._bar(error)
            raise
        except CacheError as error:
            self._lose(error)
            raise
        self._judge(time.monotonic() - started)
        return found

    def write(self, action: Callable[[Store], T]) -> T:
        """As ``read``, for an ``action`` that writes; raises Forbidden at once where that is known to be in vain."""
        barred = self._barred
        if barred is not None:
            self.send_later()
            raise barred.with_traceback(None)
        return self.read(action)

    def send_later(self) -> None:
        """Has what is owed sent by a thread, after a first pause if the server is away or read-only."""
        with self._lock:
            if self._courier is not None or self._is_hopeless() or self._closed.is_set():
                return
            self._courier = threading.Thread(target=self._carry, name="cache-db-courier", daemon=True)
            # None to be had, or none any more: what is owed stays owed to a later process.
            try:
                self._courier.start()
            except RuntimeError:
                self._courier = None

    def close(self) -> None:
        """Ends the thread, if any; what is owed stays owed."""
        self._closed.set()
        courier = self._courier
        if courier is not None and courier is not threading.current_thread():
            courier.join(COURIER_SECONDS)

    def _opened(self) -> Store:
        """Returns the server's database, which the first call of a process opens, in the call's own thread."""
        store = self._store
        if store is None:
            store = self._store = Store.connect(self.address)
        return store

    def _judge(self, seconds: float) -> None:
        """Gives a server up that answers, but so slowly that its answers together cost more than one wait for it."""
        with self._lock:
            # A quick answer forgives half: a month of training has slow moments that have nothing to do with each other.
            self._slow = self._slow + seconds if seconds > QUICK_SECONDS else self._slow / 2
            slow, patience = self._slow, self._patience
        if slow > patience:
            self._lose(Unavailable(f"slow answers took {slow:.1f} s in all"))

    def _lose(self, error: CacheError) -> None:
        with self._lock:
            if self._away is not None:
                return
            self._away, self._store, self._slow = error, None, 0.0
            self._patience = max(SHORTEST_SECONDS, self._patience / 2)
        then = "is left alone; results go to the user's database"
        later = "" if isinstance(error, UnknownSchema) else ", and to the server when it is back"
        self._warn(Unavailable, error, f"{then}{later}")
        self.send_later()

    def _bar(self, error: Forbidden) -> None:
        with self._lock:
            if self._barred is not None:
                return
            self._barred = error
        later = "" if error.by_right else ", and to the server when it takes them again"
        self._warn(Forbidden, error, f"is read, not written; results go to the user's database{later}")
        self.send_later()

    def _carry(self) -> None:
        """Sends what is owed, again and again while the server is away or read-only; runs in the thread."""
        pause = FIRST_PAUSE
        while True:
            if self.state != "ready":
                self._closed.wait(pause * random.uniform(0.8, 1.2))  # noqa: S311 - jitter keeps no secret
                pause = min(2 * pause, LONGEST_PAUSE)
            if not self._closed.is_set():
                self._visit()
            with self._lock:
                # Under the lock: who loses the server after this looks for a thread, and finds none.
                if self._closed.is_set() or self.state == "ready" or self._is_hopeless():
                    self._courier = None
                    return

    def _is_hopeless(self) -> bool:
        """Whether no waiting helps: a newer library made the schema, or this account may not write."""
        return isinstance(self._away, UnknownSchema) or (self._barred is not None and self._barred.by_right)

    def _visit(self) -> None:
        """Opens the server and sends what is owed to it."""
        before = self.state
        try:
            store = deadline.within(COURIER_SECONDS, lambda: Store.connect(self.address))
            with self._lock:
                self._away, self._store = None, store
            self._deliver(lambda action: deadline.within(COURIER_SECONDS, lambda: action(store)))
        except Forbidden as error:
            self._bar(error)
        except CacheError as error:
            self._lose(error)
        else:
            with self._lock:
                self._barred = None
            if before != "ready":
                logger.info("Tuning server %s is back", self.address)

    def _warn(self, kind: type, error: CacheError, consequence: str) -> None:
        """Says it once for each kind of trouble; what fails after that changes nothing for the reader."""
        level = logging.DEBUG if kind in self._warned else logging.WARNING
        self._warned.add(kind)
        text = str(error)
        named = text if str(self.address) in text else f"{self.address}: {text}"
        logger.log(level, "Tuning server %s; it %s.", named, consequence)


_all: weakref.WeakSet[Remote] = weakref.WeakSet()


def _renew_all() -> None:
    for remote in list(_all):
        remote.renew()


os.register_at_fork(after_in_child=_renew_all)
