"""What can go wrong with a tuning database.

    CacheError
    ├── BadAddress      not the address of a PostgreSQL database, or no driver for it here
    ├── Unavailable     cannot be opened, read or written now: path, permission, full disk, lock held too long
    │   ├── Busy        no room at this moment, but soon: too many clients, a deadlock, a server that starts
    │   └── Forbidden   can be read, but not written: a read-only server, an account without the right
    ├── Damaged         the file is not a whole SQLite database
    ├── UnknownSchema   laid out by another version of this library, in a way that this one cannot use
    ├── PackRefused     not a pack of rows, or one of a newer version of this library
    └── RowRefused      one row does not pass its model, or the engine cannot hold it

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


class BadAddress(CacheError):
    """The address of a shared database cannot be used, whatever the state of its server."""


class Unavailable(CacheError):
    """The database cannot be opened, read or written now."""


class Busy(Unavailable):
    """The server had no room for this call at this moment; the same call may succeed in the next."""


class Forbidden(Unavailable):
    """The database can be read but not written; ``by_right`` when that is the account's doing, not the server's state."""

    def __init__(self, message: str, *, by_right: bool) -> None:
        super().__init__(message)
        self.by_right = by_right


class Damaged(CacheError):
    """The file is not a SQLite database, or not a whole one."""


class UnknownSchema(CacheError):
    """The database was laid out by another version of this library, and cannot be carried over."""


class PackRefused(CacheError):
    """The file is no pack of rows, or one that only a newer version of this library can read."""


class RowRefused(CacheError):
    """A row does not pass its model, or the engine cannot hold it; it is skipped and left where it is."""
