"""Compiles candidates in forked processes, several at a time, each with its own time limit.

The process that forks has imported torch, Triton and the spec once and never touches a GPU, so a fork starts to
compile within milliseconds. A compiler that aborts, hangs or eats the memory takes only its fork along.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import IO, Any

from autotune.last_words import last_line
from autotune.process import Message, death
from cache_db.models import Verdict

# Returns the message that goes back for one item.
Work = Callable[[Message], Message]


@dataclass(frozen=True)
class _Fork:
    """One compile under way."""

    item: int
    pid: int
    deadline: float
    started: float
    output: IO[bytes]


class ForkServer:
    """Answers "compile" requests on ``connection`` with one message per item, in the order they are done.

    ``work`` runs in the fork; it may raise nothing. ``in_fork`` runs first there, to bind the fork to this process.
    """

    def __init__(
        self, connection: Connection[Any, Any], work: Work, in_fork: Callable[[], None], workers: int, seconds: float
    ) -> None:
        self._connection = connection
        self._work = work
        self._in_fork = in_fork
        self._workers = workers
        self._seconds = seconds
        self._waiting: deque[tuple[int, Message]] = deque()
        self._running: dict[Connection[Any, Any], _Fork] = {}

    def serve(self) -> None:
        """Works until the other end of the connection closes; then no fork is left."""
        try:
            while True:
                while self._waiting and len(self._running) < self._workers:
                    self._fork(*self._waiting.popleft())
                for ready in wait([self._connection, *self._running], self._patience()):
                    if ready is self._connection:
                        self._hear(json.loads(self._connection.recv_bytes()))
                    elif ready in self._running:  # a cancel in the same batch may have ended it
                        self._collect(ready)
                self._end_overdue()
        except (EOFError, OSError):
            return
        finally:
            self._end_all()

    def _hear(self, message: Message) -> None:
        if message["do"] == "cancel":
            self._waiting.clear()
            self._end_all()
            self._send({"cancelled": True})
            return
        for number, kernel, config in message["items"]:
            self._waiting.append((number, {"kernel": kernel, "config": config}))

    def _fork(self, item: int, question: Message) -> None:
        ours, theirs = Pipe(duplex=False)
        output = tempfile.TemporaryFile()  # noqa: SIM115  # closed when the fork has ended
        started = time.monotonic()
        pid = os.fork()
        if pid == 0:
            self._compile(theirs, output, question)
        theirs.close()
        self._running[ours] = _Fork(item, pid, started + self._seconds, started, output)

    def _compile(self, answers: Connection[Any, Any], output: IO[bytes], question: Message) -> None:
        """The fork's whole life. It leaves by ``os._exit``: nothing of the server's may be torn down here."""
        try:
            os.setpgid(0, 0)  # so that an overdue compile ends together with the assembler it started
            self._in_fork()
            os.dup2(output.fileno(), 2)
            self._connection.close()
            for other in self._running:
                other.close()
            answers.send_bytes(json.dumps(self._work(question)).encode())
        finally:
            os._exit(0)

    def _collect(self, answers: Connection[Any, Any]) -> None:
        fork = self._running.pop(answers)
        try:
            outcome = json.loads(answers.recv_bytes())
            _end(fork.pid)
        except (EOFError, OSError):
            _, status = os.waitpid(fork.pid, 0)
            fate = death(os.waitstatus_to_exitcode(status), last_line(fork.output.fileno()))
            outcome = _failure(fate.verdict, fate.reason, fork)
        self._finish(fork, answers, outcome)

    def _end_overdue(self) -> None:
        now = time.monotonic()
        for answers, fork in list(self._running.items()):
            if fork.deadline <= now:
                del self._running[answers]
                _end(fork.pid)
                reason = f"still compiling after {self._seconds:g} s"
                self._finish(fork, answers, _failure(Verdict.TIMEOUT, reason, fork))

    def _finish(self, fork: _Fork, answers: Connection[Any, Any], outcome: Message) -> None:
        answers.close()
        fork.output.close()
        self._send({"item": fork.item, "outcome": outcome})

    def _end_all(self) -> None:
        for answers, fork in self._running.items():
            answers.close()
            fork.output.close()
            _end(fork.pid)
        self._running.clear()

    def _patience(self) -> float | None:
        deadlines = [fork.deadline for fork in self._running.values()]
        return max(min(deadlines) - time.monotonic(), 0.0) if deadlines else None

    def _send(self, message: Message) -> None:
        self._connection.send_bytes(json.dumps(message).encode())


def _failure(verdict: Verdict, reason: str, fork: _Fork) -> Message:
    return {"verdict": verdict, "reason": reason, "seconds": time.monotonic() - fork.started}


def _end(pid: int) -> None:
    """Kills and reaps a fork with all it started."""
    for kill in (os.killpg, os.kill):  # killpg finds nothing while the fork has not made its group yet
        try:
            kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    os.waitpid(pid, 0)
