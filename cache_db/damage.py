"""Moving a damaged database out of the way, by one process, once, and never a healthy one.

Two locks. The mover's (``<file>.lock``) leaves one process deciding at a time; under it the file must still be
the one that was diagnosed. Then SQLite's own bytes of the damaged file, so that nobody is inside a transaction
on it: a writer that ended after the move would delete the new file's journal by name.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cache_db.errors import Identity, Unavailable, identity
from cache_db.sharing import share

LOCK_SECONDS = 10.0
# The pending, reserved and shared bytes of SQLite's file format: https://www.sqlite.org/fileformat2.html#the_lock_byte_page
_LOCK_START, _LOCK_LENGTH = 0x40000000, 512
_COMPANIONS = ("-journal", "-wal", "-shm")


def set_aside(path: Path, seen: Identity | None) -> Path | None:
    """Renames ``path`` to ``<path>.damaged-<time>-<n>`` if it is still in the state ``seen``.

    Returns the new name, None when another process was first. Raises Unavailable when it cannot be moved.
    """
    path = Path(os.path.realpath(path))
    try:
        with _locked(path.with_name(path.name + ".lock"), os.O_CREAT | os.O_RDWR, _lock_file):
            if seen is None or identity(path) != seen:
                return None
            with _locked(path, os.O_RDWR, _lock_transactions):
                return _rename(path)
    except OSError as error:
        raise Unavailable(f"{path} is damaged and cannot be moved aside: {error.strerror or error}") from error


def _rename(path: Path) -> Path:
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    count = 1
    while (target := path.with_name(f"{path.name}.damaged-{stamp}-{count}")).exists():
        count += 1
    # Companions first: a journal left beside a fresh file would be rolled back into it.
    for suffix in _COMPANIONS:
        with contextlib.suppress(FileNotFoundError):
            Path(f"{path}{suffix}").rename(f"{target}{suffix}")
    path.rename(target)
    return target


def _lock_file(descriptor: int) -> None:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _lock_transactions(descriptor: int) -> None:
    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, _LOCK_LENGTH, _LOCK_START)


@contextlib.contextmanager
def _locked(path: Path, flags: int, lock: Callable[[int], None]) -> Iterator[None]:
    """Holds ``lock`` on ``path``; raises OSError when another process keeps it for LOCK_SECONDS."""
    deadline = time.monotonic() + LOCK_SECONDS
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        if flags & os.O_CREAT:
            share(path)
        while True:
            try:
                lock(descriptor)
                break
            except (BlockingIOError, PermissionError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)
