"""A call that ends in time whatever the network does.

``connect_timeout`` covers no name server, ``statement_timeout`` no link that swallows the answer, and keep-alives no
proxy that acknowledges and forwards nothing. So the call runs in a daemon thread, and its caller leaves when the
time is over. A duplicate of the connection's socket, made when the connection was, is then shut down: the thread
wakes with an error and ends, and no number of a file that was closed meanwhile is ever touched.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from cache_db.errors import Busy, Unavailable

FIRST_PAUSE, LONGEST_PAUSE = 0.02, 0.4
T = TypeVar("T")
_here = threading.local()


class Overdue(Unavailable):
    """No answer within the time."""


def within(seconds: float, action: Callable[[], T]) -> T:
    """Returns what ``action`` returns within ``seconds``; while it raises Busy, and time is left, it runs again.

    Raises what ``action`` raises, Overdue when it takes longer (what it does after that has no effect here, but may
    have in the database), Unavailable where no thread can be started.
    """
    call = _Call(action, time.monotonic() + seconds)
    thread = threading.Thread(target=call.run, name="cache-db-call", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise Unavailable(f"no thread for a call to a server: {error}") from error
    try:
        if call.over.wait(seconds):
            return call.result()
    finally:
        call.leave()
    raise Overdue(f"no answer within {seconds:g} s")


def adopt(descriptor: int) -> None:
    """Has the socket ``descriptor`` shut down when the call that this thread runs is overdue."""
    call = getattr(_here, "call", None)
    if call is not None:
        call.adopt(descriptor)


class _Call(Generic[T]):
    """One action in a thread, with the socket it waits on."""

    def __init__(self, action: Callable[[], T], until: float) -> None:
        self.over = threading.Event()
        self._action = action
        self._until = until
        self._value: list[T] = []
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._left = False
        self._sockets: list[socket.socket] = []

    def run(self) -> None:
        """Runs the action, in the thread."""
        _here.call = self
        try:
            self._value.append(self._again_while_busy())
        except BaseException as error:  # noqa: BLE001 - the caller's thread raises it
            self._error = error
        finally:
            self.over.set()
            _here.call = None
            self._close()

    def result(self) -> T:
        """Returns, or raises, what the action did."""
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # an exception that holds its own traceback's frame is garbage for long
        return self._value[0]

    def adopt(self, descriptor: int) -> None:
        """Keeps a duplicate of ``descriptor``; raises Overdue when nobody waits any more."""
        with self._lock:
            if self._left:
                raise Overdue("nobody waits for this answer any more")
            self._sockets.append(socket.socket(fileno=os.dup(descriptor)))

    def leave(self) -> None:
        """Ends the waiting: what the thread still waits for is cut off."""
        with self._lock:
            self._left = True
            if not self.over.is_set():
                for each in self._sockets:
                    with contextlib.suppress(OSError):
                        each.shutdown(socket.SHUT_RDWR)

    def _again_while_busy(self) -> T:
        pause = FIRST_PAUSE
        while True:
            try:
                return self._action()
            except Busy:
                wait = random.uniform(pause / 2, pause)  # noqa: S311 - jitter keeps no secret
                if self._left or time.monotonic() + wait >= self._until:
                    raise
                time.sleep(wait)
                pause = min(2 * pause, LONGEST_PAUSE)

    def _close(self) -> None:
        with self._lock:
            for each in self._sockets:
                each.close()
            self._sockets.clear()
