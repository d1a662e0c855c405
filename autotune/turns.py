"""One process at a time takes times on a GPU: two at once would each find the other's kernels in their milliseconds.

The turn is a lock on a file of the machine's temporary folder, named after the GPU. The operating system gives it back
when its holder ends in any way. It is a courtesy between our own processes, no safeguard: who cannot have it in time, or
at all (another user's file, a read-only disk), measures without.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

LONGEST_WAIT: Final = 60.0
POLL_SECONDS: Final = 0.05


@contextlib.contextmanager
def turn(gpu: str, notice: Callable[[], None] = lambda: None, seconds: float = LONGEST_WAIT) -> Iterator[bool]:
    """Holds the turn on the GPU of this UUID ("" is no GPU: nothing to wait for); gives whether it could be had.

    ``notice`` is called while waiting, at most ``seconds``: the wait is no hang.
    """
    descriptor = _open(gpu) if gpu else None
    if descriptor is None:
        yield False
        return
    try:
        yield _wait(descriptor, notice, time.monotonic() + seconds)
    finally:
        os.close(descriptor)


def place(gpu: str) -> Path:
    """Returns the file whose lock is the turn."""
    return Path(tempfile.gettempdir()) / f"flashbias-times-{gpu.replace('/', '-')}.lock"


def _open(gpu: str) -> int | None:
    flags = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe in the file's place must not block either
    for how in (
        os.O_RDONLY,
        os.O_RDONLY | os.O_CREAT,
    ):  # systems forbid O_CREAT on another user's file in such a folder
        with contextlib.suppress(OSError):
            return os.open(place(gpu), flags | how, 0o644)
    return None


def _wait(descriptor: int, notice: Callable[[], None], until: float) -> bool:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            notice()
            time.sleep(POLL_SECONDS)
        except OSError:  # a file system without locks
            return False
        else:
            return True
