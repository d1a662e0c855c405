"""The right to sweep one problem, kept alive by a thread while the sweep runs.

A lease names its owner so exactly that a process on the same machine can see that the owner is dead and need not wait
for the lease to run out.
"""

from __future__ import annotations

import functools
import logging
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from autotune.threads import NoThread, start
from cache_db.models import Lease, Problem

if TYPE_CHECKING:
    from cache_db import Layers

LEASE_SECONDS: Final = 30.0
POLL_SECONDS: Final = 0.2
LONGEST_PAUSE: Final = 1.0
PID_DIGITS: Final = 10  # Linux stops at 2**22; what a damaged row holds may be longer than int() reads

logger = logging.getLogger(__name__)


def claim(
    store: Layers, problem: Problem | str, wait_seconds: float, check: Callable[[], None] = lambda: None
) -> Held | None:
    """Takes the lease of ``problem``, or of any other thing by its hash, waiting up to ``wait_seconds`` for its holder; None when it stays taken.

    ``check`` is called before each look, and ends the waiting by what it raises.
    """
    until = time.monotonic() + wait_seconds
    owner = f"{address()}:{uuid.uuid4().hex[:12]}"
    pause = POLL_SECONDS
    name = problem if isinstance(problem, str) else problem.hash
    while True:
        check()
        lease = store.claim(name, owner, hostname(), LEASE_SECONDS)
        if lease is None and _bury(store, name):
            lease = store.claim(name, owner, hostname(), LEASE_SECONDS)
        if lease is not None:
            return Held(store, lease)
        if time.monotonic() >= until:
            return None
        time.sleep(random.uniform(pause / 2, pause))  # noqa: S311 - jitter keeps no secret
        pause = min(1.2 * pause, LONGEST_PAUSE)  # a thousand ranks may be waiting for one server


class Held:
    """A lease in use: renewed in the background until the ``with`` block ends, then released.

    Entering raises NoThread, and gives the lease back, when there is no thread to renew it.
    """

    def __init__(self, store: Layers, lease: Lease) -> None:
        self._store = store
        self._lease = lease
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="autotune-lease", daemon=True)

    def __enter__(self) -> Self:
        try:
            start(self._thread)
        except NoThread:
            self._store.release(self._lease)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self._store.release(self._lease)

    def _renew(self) -> None:
        while not self._over.wait(LEASE_SECONDS / 3):
            lease = self._store.renew(self._lease, LEASE_SECONDS)
            if lease is None:
                logger.warning(
                    "lost the lease of problem %.12s; another process may tune it too", self._lease.problem_hash
                )
                return
            self._lease = lease


@functools.cache
def hostname() -> str:
    """Returns this machine's name as rows record it."""
    return socket.gethostname()


def holder_of(store: Layers, problem: Problem) -> Lease | None:
    """Returns the standing lease of ``problem``, None where nobody has it who may be alive."""
    found = store.holder(problem.hash)
    return None if found is None or is_dead(found.owner, found.host) else found


def _bury(store: Layers, name: str) -> bool:
    """Releases the lease of a holder that is provably dead; returns whether it did."""
    holder = store.holder(name)
    if holder is None or not is_dead(holder.owner, holder.host):
        return False
    store.release(holder)
    return True


def is_dead(owner: str, host: str) -> bool:
    """Returns whether ``owner``, an address with anything behind a colon, is a process of this machine that has ended."""
    if host != hostname():
        return False
    machine, _, rest = owner.rpartition("/")
    here, _, _ = address().rpartition("/")
    pid, _, born = rest.partition(":")[0].partition("-")
    known = machine == here and pid.isdecimal() and len(pid) <= PID_DIGITS
    return known and _birth(int(pid)) != born and not _hidden(int(pid))


def address() -> str:
    """Returns machine and process as ``boot/pid namespace/pid-birth``: host names alone are not unique in containers."""
    return f"{_machine()}/{os.getpid()}-{_birth(os.getpid())}"


@functools.cache
def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}".replace(":", "")
    except OSError:
        return uuid.uuid4().hex


def _birth(pid: int) -> str:
    """Returns when process ``pid`` started (clock ticks since boot), "" if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return _start_time(stat)


def _hidden(pid: int) -> bool:
    """Returns whether ``pid`` is another user's process that /proc, mounted with hidepid, does not show."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return not Path(f"/proc/{pid}").exists()
    except (OSError, OverflowError):
        return False
    return False


def _start_time(stat: str) -> str:
    """Returns field 22 of ``/proc/PID/stat``, "" for a zombie's and for a text that does not reach so far."""
    state, *fields = stat.rpartition(")")[2].split() or [""]
    return fields[18] if state not in ("", "Z") and len(fields) > 18 else ""
