"""Children for the sandbox: forks of one process of this caller's, which has imported torch and Triton once.

Importing takes seconds, so what has imported stays for a while after its last child, for the next sweep or the next
candidate that crashes. It is a fresh interpreter (nothing is pickled, the caller's ``__main__`` is never imported) in a
session of its own, where no Ctrl-C reaches it, and never touches a GPU. The operating system ends it with the caller's
process, and its children with it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Final

from autotune.last_words import appending_file, last_line
from autotune.threads import NoThread, start

LINGER_SECONDS: Final = 30.0
START_SECONDS: Final = 60.0
MESSAGE_BYTES: Final = 4096
# What nothing reads while it is imported: these may differ between a nursery and its children.
READ_LATE: Final = frozenset({"CUDA_VISIBLE_DEVICES", "TRITON_CACHE_DIR", "GLIBC_TUNABLES", "PYTEST_CURRENT_TEST"})
# Huge pages, none given back: a third of the page faults of a compile, 11 % less time (H200 host).
ALLOCATION: Final = "glibc.malloc.hugetlb=1:glibc.malloc.top_pad=67108864:glibc.malloc.trim_threshold=1073741824"


class Newborn:
    """One child. ``status`` is its exit status (negative: by signal) once it has ended, ``words`` why it was never born."""

    def __init__(self, kill: Callable[[], None]) -> None:
        self.status: int | None = None
        self.words = ""
        self._kill = kill
        self._pid: int | None = None
        self._known = threading.Event()
        self._over = threading.Event()

    @property
    def pid(self) -> int | None:
        """Its process id, waited for; None if it has not been born."""
        self._known.wait(START_SECONDS)
        return self._pid

    @property
    def is_born(self) -> bool:
        """Whether there is, or has been, a process. What imports may still be at work."""
        return self._pid is not None

    def kill(self) -> None:
        """Kills it with everything it has started, as soon as it is born. Does not wait."""
        if self.status is None:
            self._kill()

    def wait(self, seconds: float) -> None:
        """Waits for its end, at most so long."""
        self._over.wait(seconds)

    def born(self, pid: int) -> None:
        """Takes its process id."""
        self._pid = pid
        self._known.set()

    def ended(self, status: int, words: str = "") -> None:
        """Takes its exit status."""
        self.status, self.words = status, words
        self._known.set()
        self._over.set()


def bear(role: str, variables: Mapping[str, str], connection: int, output: int) -> Newborn:
    """Has a child born that serves ``role`` on the descriptor ``connection`` and writes to ``output`` as its stderr.

    ``variables`` is its whole environment. Returns at once. Raises OSError or NoThread when nothing can be started.
    """
    # An environment may begin with an entry without a name, which nobody can set or clear.
    variables = {name: value for name, value in variables.items() if name}
    letter = {"role": role, "variables": variables, "folder": _folder()}
    while True:
        newborn = Nursery.of(variables).bear(letter, connection, output)
        if newborn is not None:
            return newborn


def _key(variables: Mapping[str, str]) -> frozenset[tuple[str, str]]:
    """Returns what may decide what an import does, and who the process is."""
    read = {name: value for name, value in variables.items() if name not in READ_LATE}
    return frozenset({**read, "": str(os.geteuid())}.items())


def _folder() -> str:
    try:
        return str(Path.cwd())
    except OSError:  # it is gone
        return "/"


class Nursery:
    """One process that bears children while it is ``open``, and the thread that listens to it.

    The kernel's death signal follows the *thread* that started a process, so that thread lives as long as it.
    """

    _known: ClassVar[dict[frozenset[tuple[str, str]], Nursery]] = {}
    _choosing: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._children: dict[int, Newborn] = {}
        # Whom this nursery was asked to kill without a sign of having heard, and those of them that it has ignored for long.
        self._unheard: set[int] = set()
        self._ignored: set[int] = set()
        self._numbers = 0
        self.open = True
        self._answered = False
        self._output = appending_file()
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._line.settimeout(LINGER_SECONDS)
        with theirs:
            # Above 2: where the caller closed its stdio the socket has such a number, and the child's stdio would take it.
            end = fcntl.fcntl(theirs.fileno(), fcntl.F_DUPFD_CLOEXEC, 3)
        thread = threading.Thread(target=self._keep, args=(dict(variables), end), name="autotune-keeper", daemon=True)
        try:
            start(thread)
        except NoThread:
            os.close(end)
            self._line.close()
            os.close(self._output)
            raise

    @classmethod
    def of(cls, variables: Mapping[str, str]) -> Nursery:
        """Returns where a child with this environment may be born: an open nursery, or else a new one."""
        key = _key(variables)
        with cls._choosing:
            for closed in [key for key, each in cls._known.items() if not each.open]:
                del cls._known[closed]
            if key not in cls._known:
                cls._known[key] = cls(variables)
            return cls._known[key]

    @classmethod
    def forget(cls) -> None:
        """Starts anew, as in a fork of the caller: what its parent has is not its own."""
        cls._known, cls._choosing = {}, threading.Lock()

    def bear(self, letter: Mapping[str, Any], connection: int, output: int) -> Newborn | None:
        """Asks for a child; returns None where this nursery has closed meanwhile. Raises OSError where one cannot be asked for."""
        with tempfile.TemporaryFile() as file, self._lock:
            if not self.open:
                return None
            file.write(json.dumps(letter).encode())
            file.seek(0)
            self._numbers += 1
            number = self._numbers
            newborn = self._children[number] = Newborn(lambda: self._ask("kill", number))
            try:
                socket.send_fds(self._line, [_message("bear", number)], [connection, output, file.fileno()])
            except OSError as error:
                del self._children[number]
                if error.errno not in (errno.EPIPE, errno.ECONNRESET):  # another nursery could do no better
                    raise
                self.open = False  # it has died; the listening thread is about to find out
                return None
            return newborn

    def _ask(self, what: str, number: int) -> None:
        if self._owner == os.getpid():  # in a fork of the caller the child is not ours to end
            with self._lock, contextlib.suppress(OSError):
                if number in self._children:
                    self._unheard.add(number)
                    self._line.send(_message(what, number))

    def _keep(self, variables: dict[str, str], end: int) -> None:
        """Starts the process, hears what becomes of its children, and closes it once it has had none for a while."""
        variables["CUDA_VISIBLE_DEVICES"] = ""
        if "TRITON_INTERPRET" not in variables:
            variables.setdefault("GLIBC_TUNABLES", ALLOCATION)
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "autotune.nurse", str(end), str(self._owner)],
                env=variables,
                pass_fds=(end,),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._output,
                start_new_session=True,
            )
        except Exception as error:  # noqa: BLE001  # whatever it is, those who wait shall hear it
            self._end(1, str(error))
            return
        finally:
            os.close(end)
        while self._listen(process):
            pass
        with contextlib.suppress(OSError):
            self._line.shutdown(socket.SHUT_RDWR)  # a fork of the caller may hold the line too
        status = process.wait()
        self._end(-signal.SIGKILL if self._answered else status, last_line(self._output))

    def _listen(self, process: subprocess.Popen[bytes]) -> bool:
        """Takes the next answer; returns False when there will be no other."""
        try:
            message = self._line.recv(MESSAGE_BYTES)
        except TimeoutError:
            return self._bear_with_silence(process)
        except OSError:  # it ended with a request unread, or the caller has closed what it does not know
            return False
        if not message:
            return False
        self._answered = True
        answer = json.loads(message)
        with self._lock:
            number = answer["number"]
            if "pid" in answer:
                self._children[number].born(answer["pid"])
                return True
            self._unheard.discard(number)
            if "status" in answer:
                self._children.pop(number).ended(answer["status"], answer.get("why", ""))
        return True

    def _bear_with_silence(self, process: subprocess.Popen[bytes]) -> bool:
        """Returns whether to listen on to a process that has said nothing for a while, and ends it otherwise.

        It may go on while it has children, unless it has died (a fork of the caller made at the wrong moment holds its
        end of the line) or hears no more (stopped, or hung): it ignored a kill. One that still imports hears nothing
        either; it ends when nobody waits for it any more.
        """
        with self._lock:
            ignored = self._ignored & self._unheard
            self._ignored = set(self._unheard)
            deaf = bool(ignored) and (self._answered or self._unheard >= self._children.keys())
            self.open = bool(self._children) and not deaf and process.poll() is None
            if not self.open:
                process.kill()
            return self.open

    def _end(self, status: int, words: str) -> None:
        """Tells the children that are left, born or not, that they have died with their nursery."""
        with self._lock:
            self.open = False
            left, self._children = self._children, {}
            for close in (self._line.close, lambda: os.close(self._output)):
                with contextlib.suppress(OSError):  # the caller has closed what it does not know
                    close()
        for newborn in left.values():
            newborn.ended(status, words)


os.register_at_fork(after_in_child=Nursery.forget)


def _message(what: str, number: int) -> bytes:
    return json.dumps({"do": what, "number": number}).encode()
