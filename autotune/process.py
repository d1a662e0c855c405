"""A killable child process and the line to it: how :mod:`autotune.sandbox` reaches :mod:`autotune.worker`.

The child is born in a :mod:`autotune.nursery`, so it starts from a script without a guard, ``python -c``, a REPL and a
notebook alike. It lives in a session of its own, where no Ctrl-C reaches it, and the kernel of the operating system
kills it when the caller's process ends in any way.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing import Pipe
from typing import Any, Final

from autotune.errors import AutotuneError
from autotune.last_words import appending_file, last_line
from autotune.nursery import bear
from autotune.threads import NoThread
from cache_db.models import Verdict

Message = dict[str, Any]

REAP_SECONDS: Final = 20.0


class SandboxError(AutotuneError):
    """No child could be started, so nothing can be compiled, proven or timed here."""


class ChildDied(Exception):
    """The child ended or was killed while it was asked something: an event that becomes the candidate's verdict."""

    def __init__(self, verdict: Verdict, reason: str) -> None:
        super().__init__(reason)
        self.verdict = verdict
        self.reason = reason


class Child:
    """One child of ``role`` ("compiler" or "runner"), started on demand, killed and started again as often as needed.

    ``lock`` belongs to whoever talks to the child; ``kill`` and ``start`` may come from any thread. ``admit`` is called
    before each start and raises an AutotuneError where there may be no process now.
    """

    def __init__(
        self,
        role: str,
        hello: Message,
        variables: dict[str, str],
        start_seconds: float,
        admit: Callable[[], None] = lambda: None,
    ) -> None:
        self.lock = threading.Lock()
        self._role = role
        self._hello = hello
        self._variables = variables
        self._start_seconds = start_seconds
        self._admit = admit
        self._state = threading.Lock()
        self._process: _Process | None = None
        # Whose answer is awaited: after that one's death another thread may start a new process.
        self._partner: _Process | None = None
        self._ready = False
        self._closed = False

    @property
    def pid(self) -> int | None:
        """The process id while there is a process."""
        process = self._process
        return process.pid if process else None

    @property
    def closed(self) -> bool:
        """Whether the child may never start again."""
        return self._closed

    def start(self) -> None:
        """Starts the process unless it runs; does not wait until it is ready. Raises SandboxError when it cannot."""
        with self._state:
            self._running()

    def send(self, message: Message) -> None:
        """Sends ``message`` to a ready child. Raises SandboxError when there can be none."""
        for _ in range(2):
            process = self._ready_process()
            process.forget_output()
            try:
                process.send(message)
            except OSError:  # it died while idle: once more, to a fresh one
                self._drop(process)
            else:
                self._partner = process
                return
        raise SandboxError(f"the {self._role} ends as soon as it has started")

    def receive(self, seconds: float) -> Message:
        """Returns the next message. Raises ChildDied when none comes within ``seconds`` or the child ends."""
        process = self._partner
        if self._process is None or process is None:
            raise ChildDied(Verdict.KILLED, "the sandbox was closed")
        try:
            return process.receive(seconds)
        except BaseException:  # Ctrl-C too leaves the conversation broken off in the middle
            self._drop(process)
            raise

    def kill(self) -> None:
        """Kills the process, if there is one, with everything it started."""
        with self._state:
            process, self._process = self._process, None
        if process is not None:
            process.kill()

    def close(self) -> None:
        """Kills the process for good."""
        self._closed = True
        self.kill()

    def _running(self) -> _Process:
        if self._closed:
            raise SandboxError("this sandbox is closed")
        if self._process is None or not self._process.alive:
            self._admit()
            try:
                self._process = _Process(self._role, self._variables)
                self._process.send(self._hello)
            except (OSError, NoThread) as error:
                raise SandboxError(f"cannot start the {self._role}: {error}") from error
            self._ready = False
        return self._process

    def _ready_process(self) -> _Process:
        with self._state:
            process = self._running()
        if not self._ready:
            self._partner = process
            try:
                answer = self.receive(self._start_seconds)
            except ChildDied as death:
                raise SandboxError(f"the {self._role} did not start: {death.reason}") from death
            if "fault" in answer:
                self.kill()
                raise SandboxError(f"the {self._role} did not start: {answer['fault']}")
            self._ready = True
        return process

    def _drop(self, process: _Process) -> None:
        with self._state:
            if self._process is process:
                self._process = None
        process.kill()


class _Process:
    """One child as the caller has it: connection, end, and what it wrote to stderr."""

    def __init__(self, role: str, variables: dict[str, str]) -> None:
        self._owner = os.getpid()
        self._output = appending_file()
        self._connection, end = Pipe()
        with end:
            self._child = bear(role, variables, end.fileno(), self._output)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # there was no descriptor left for it
            os.close(self._output)

    @property
    def pid(self) -> int | None:
        return self._child.pid

    @property
    def alive(self) -> bool:
        return self._child.status is None and os.getpid() == self._owner

    def send(self, message: Message) -> None:
        self._connection.send_bytes(json.dumps(message).encode())

    def receive(self, seconds: float) -> Message:
        try:
            if self._connection.poll(seconds):
                message: Message = json.loads(self._connection.recv_bytes())
                return message
        except (EOFError, OSError):
            raise self._death() from None
        raise ChildDied(Verdict.TIMEOUT, f"no answer within {seconds:g} s")

    def forget_output(self) -> None:
        os.ftruncate(self._output, 0)

    def kill(self) -> None:
        if os.getpid() != self._owner:  # a fork of the caller: the child is not ours to end
            return
        self._child.kill()
        if self._child.is_born:
            self._child.wait(REAP_SECONDS)

    def _death(self) -> ChildDied:
        self._child.wait(REAP_SECONDS)
        status, said = self._child.status, last_line(self._output) or self._child.words
        if status is None:
            return ChildDied(Verdict.CRASHED, f"the worker closed its connection; {said}")
        return death(status, said)


def death(status: int, said: str) -> ChildDied:
    """Returns what an exit ``status`` (negative: by signal) and the last words on stderr make of a candidate."""
    if status == -signal.SIGKILL:
        return ChildDied(Verdict.KILLED, "killed from outside: out of memory, or by hand")
    how = f"exit status {status}"
    if status < 0:
        try:
            how = signal.Signals(-status).name
        except ValueError:
            how = f"signal {-status}"
    return ChildDied(Verdict.CRASHED, f"{how}: {said}" if said else how)
