"""torch.distributed's own Store as the place where the ranks of a job agree: no collective, no keys but our own.

Where torchrun's agent keeps a Store for its workers, each rank has a connection of its own to that, whether it has called
``init_process_group`` or not. Elsewhere it is a clone of the default group's Store. Either is asked only what is
answered at once (``compare_set``, ``check``): a rank that waited inside the group's own connection would keep its
watchdog from it. A Store that stalls ignores its own time-out (seen with torch 2.13), so each question has a thread.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final, TypeVar

import torch

from autotune import lease
from autotune.job import Job
from autotune.threads import start
from cache_db.deadline import within
from cache_db.errors import CacheError

STORE_SECONDS: Final = 5.0
PREFIX: Final = "flashbias"
_FREE: Final = "free"

T = TypeVar("T")


class Unreachable(Exception):
    """Where the job agrees cannot be asked; what it has agreed on is unknown."""


class Rendezvous:
    """One Store, asked with a time limit; after the first failure it is left alone."""

    def __init__(self, opened: Callable[[], Any], shown: str, source: object) -> None:
        self.shown = shown
        self.source = source
        self._opened = opened
        self._store: Any = None
        self._lost = ""

    def read(self, name: str) -> str | None:
        """Returns what stands under ``name``, None if nothing does. Raises Unreachable."""
        return self._ask(lambda store: str(store.get(name), "utf-8") if store.check([name]) else None)

    def publish(self, name: str, text: str) -> str:
        """Writes ``text`` under ``name`` unless something stands there; returns what does. Raises Unreachable."""
        return self.exchange(name, "", text)

    def exchange(self, name: str, before: str, after: str) -> str:
        """Writes ``after`` where ``before`` stands ("" for nothing); returns what stands then. Raises Unreachable."""
        return self._ask(lambda store: str(store.compare_set(name, before, after), "utf-8"))

    def turn(self, name: str) -> Turn:
        """Returns the right to sweep, in this job, what ``name`` says."""
        return Turn(self, f"{name}/turn")

    def _ask(self, action: Callable[[Any], T]) -> T:
        if self._lost:
            raise Unreachable(self._lost)

        def call() -> T:
            if self._store is None:
                self._store = self._opened()
            return action(self._store)

        try:
            return within(STORE_SECONDS, call)
        except (CacheError, RuntimeError, OSError, ValueError) as error:
            self._lost = f"{self.shown}: {str(error).strip().partition(chr(10))[0] or type(error).__name__}"
            raise Unreachable(self._lost) from None


class Turn:
    """The right of one rank to sweep a problem. A holder that stops beating, or is seen to be dead, loses it.

    No clocks are compared: a rank takes over when it has seen the same beat for as long as a lease lasts.
    """

    def __init__(self, rendezvous: Rendezvous, name: str) -> None:
        self._rendezvous = rendezvous
        self._name = name
        self._owner = f"{lease.hostname()}|{lease.address()}:{uuid.uuid4().hex[:12]}"
        self._beat = 0
        self._seen = ""
        self._seen_at = 0.0
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self, now: float) -> bool:
        """Returns whether it is this rank's turn, at ``now`` by a monotonic clock. Raises Unreachable and NoThread."""
        found = self._rendezvous.exchange(self._name, "", self._mine)
        if found not in (self._seen, self._mine):
            self._seen, self._seen_at = found, now
        if found != self._mine and self._may_take(found, now):
            found = self._rendezvous.exchange(self._name, found, self._mine)
        if found != self._mine:
            return False
        self._thread = threading.Thread(target=self._keep, name="autotune-turn", daemon=True)
        start(self._thread)
        return True

    def release(self) -> None:
        """Gives the turn back, if this rank has it."""
        if self._thread is None:
            return
        self._over.set()
        self._thread.join()
        self._thread = None
        try:
            self._rendezvous.exchange(self._name, self._mine, _FREE)
        except Unreachable:
            return

    @property
    def _mine(self) -> str:
        return f"{self._owner}|{self._beat}"

    def _may_take(self, found: str, now: float) -> bool:
        if found == _FREE or now - self._seen_at >= lease.LEASE_SECONDS:
            return True
        host, _, rest = found.partition("|")
        return lease.is_dead(rest.rpartition("|")[0], host)

    def _keep(self) -> None:
        while not self._over.wait(lease.LEASE_SECONDS / 3):
            before = self._mine
            self._beat += 1
            try:
                if self._rendezvous.exchange(self._name, before, self._mine) != self._mine:
                    return
            except Unreachable:
                return


_lock = threading.Lock()
_current: Rendezvous | None = None


def find(job: Job) -> Rendezvous | None:
    """Returns the Store that the ranks of ``job`` have in common, None where torch.distributed has none."""
    global _current  # noqa: PLW0603 - a process is in one job
    source: object = job.agent or _default_store()
    if source is None:
        return None
    with _lock:
        # By identity: who leaves a process group and enters another has another Store.
        if _current is None or (_current.source is not source and _current.source != source):
            if job.agent is not None:
                agent = job.agent
                _current = Rendezvous(lambda: _connected(agent), "the Store of torchrun's agent", agent)
            else:
                _current = Rendezvous(lambda: _cloned(source), "the process group's Store", source)
        return _current


def forget() -> None:
    """Drops the connection; the next question makes another."""
    global _current  # noqa: PLW0603 - a process is in one job
    with _lock:
        _current = None


def _renew() -> None:
    """Leaves a forked child without its parent's connection and without a lock that a lost thread may hold."""
    global _current, _lock
    _current, _lock = None, threading.Lock()


def _connected(agent: tuple[str, int]) -> Any:
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    limit = timedelta(seconds=STORE_SECONDS)
    host, port = agent
    store = TCPStore(host, port, None, is_master=False, timeout=limit, wait_for_workers=False)
    return PrefixStore(PREFIX, store)


def _cloned(source: Any) -> Any:
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    try:
        store = source.clone()
        store.set_timeout(timedelta(seconds=STORE_SECONDS))
    except (AttributeError, NotImplementedError, RuntimeError):  # a Store of the user's own
        store = source
    return PrefixStore(PREFIX, store)


def _default_store() -> Any:
    """Returns the default group's Store, None where there is no group of several, or torch has moved it."""
    if Job.of_process_group() is None:
        return None
    try:
        return torch.distributed.distributed_c10d._get_default_store()  # noqa: SLF001 - there is no public way
    except (AttributeError, ValueError, RuntimeError):
        return None


os.register_at_fork(after_in_child=_renew)
