"""What can go wrong with a tuning database.

    CacheError
    ├── Unavailable     cannot be opened, read or written now: path, permission, full disk, lock held too long
    ├── Damaged         the file is not a whole SQLite database
    ├── UnknownSchema   written by a newer version of this library
    └── RowRefused      one row does not pass its model

``Store`` raises these and nothing else. ``Layers`` turns all of them into one warning and goes on.
"""

from __future__ import annotations

from pathlib import Path

Identity = tuple[int, int, int, int]


def identity(path: Path) -> Identity | None:
    """Returns what tells one state of a file from any other (device, inode, size, mtime); None if there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class CacheError(Exception):
    """Base of all errors of this package. ``seen`` is the state of the file the failing operation met."""

    def __init__(self, message: str, seen: Identity | None = None) -> None:
        super().__init__(message)
        self.seen = seen


class Unavailable(CacheError):
    """The database cannot be opened, read or written now."""


class Damaged(CacheError):
    """The file is not a SQLite database, or not a whole one."""


class UnknownSchema(CacheError):
    """The database was laid out by a newer version of this library."""


class RowRefused(CacheError):
    """A stored row does not pass its model; it is skipped and left where it is."""
