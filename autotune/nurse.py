"""The process that children are born in: ``python -P -m autotune.nurse FD PARENT``, started by :mod:`autotune.nursery`.

It has imported what every child imports, touches no GPU and starts no thread, so that a fork of it is ready within
milliseconds. On the socket FD it is asked for children by number, each request with the descriptors of the child's
connection, its stderr and a file with the rest; it answers who was born, and later how each of them ended.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import sys
import traceback
from typing import Any, Final

from autotune import worker

MESSAGE_BYTES: Final = 4096
DESCRIPTORS: Final = 3


class Nurse:
    """Bears children at the request of ``line`` and reaps them."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self._children: dict[int, int] = {}  # process id -> number
        # A signal wakes the wait below through this pair, also one that comes just before it.
        self._wake, self._alarm = socket.socketpair()
        for end in (self._wake, self._alarm):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._alarm.fileno())

    def serve(self) -> None:
        """Works until the other end of the line closes."""
        poll = select.poll()  # ``select`` takes no descriptor above 1023, which the line has where the caller has many
        for end in (self._line, self._wake):
            poll.register(end, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in poll.poll()}
            if self._wake.fileno() in ready:
                with contextlib.suppress(BlockingIOError):
                    while self._wake.recv(MESSAGE_BYTES):
                        pass
            self._reap()
            if self._line.fileno() not in ready:
                continue
            message, descriptors, *_ = socket.recv_fds(self._line, MESSAGE_BYTES, DESCRIPTORS)
            if not message:
                return
            request = json.loads(message)
            if request["do"] == "kill":
                self._kill(request["number"])
                continue
            try:
                self._bear(request["number"], *descriptors)
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)

    def _bear(self, number: int, connection: int, output: int, letter: int) -> None:
        nurse = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            self._tell({"number": number, "status": 1, "why": str(error)})
            return
        if pid == 0:
            self._live(nurse, connection, output, letter)
        self._children[pid] = number
        self._tell({"number": number, "pid": pid})

    def _live(self, nurse: int, connection: int, output: int, letter: int) -> None:
        """The child's whole life. It leaves by ``os._exit``: nothing of this process's may be torn down there."""
        try:
            os.setsid()
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for end in (self._line, self._wake, self._alarm):
                end.close()
            os.dup2(output, 2)
            os.close(output)
            os.set_inheritable(connection, False)  # held by a program started here, it would hide this child's end
            with os.fdopen(letter, "rb") as file:
                told: dict[str, Any] = json.loads(file.read())
            os.environ.clear()
            os.environ.update(told["variables"])
            with contextlib.suppress(OSError):  # a folder that is gone, or forbidden
                os.chdir(told["folder"])
            worker.live(told["role"], connection, nurse)
        except BaseException:  # noqa: BLE001  # ``_exit`` would hide it; the caller reports the last line
            traceback.print_exc()
        finally:
            os._exit(1)

    def _kill(self, number: int) -> None:
        """Kills a child with everything it started, if it has not been reaped: its process id is still its own.

        Answers that it has heard: what is killed may take long to end.
        """
        for pid in [pid for pid, each in self._children.items() if each == number]:
            for kill in (os.killpg, os.kill):  # killpg finds nothing while the child has no session yet
                with contextlib.suppress(ProcessLookupError):
                    kill(pid, signal.SIGKILL)
        self._tell({"number": number, "heard": True})

    def _reap(self) -> None:
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            self._tell({"number": self._children.pop(pid), "status": os.waitstatus_to_exitcode(status)})

    def _tell(self, message: dict[str, Any]) -> None:
        self._line.send(json.dumps(message).encode())


def main() -> None:
    """Serves until the caller closes the line or ends."""
    descriptor, parent = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's to handle: it has children killed
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the caller's thread may block SIGCHLD, and deaths would go unseen
    worker.die_with(int(parent))
    worker.prepare()
    gc.freeze()  # a collection in a fork would touch, and so copy, every page of the imports
    Nurse(socket.socket(fileno=int(descriptor))).serve()
    os._exit(0)


if __name__ == "__main__":
    main()
