"""Files in a folder that a group works in: whoever makes one, the others of the group can use it.

With the usual umask a new file is the group's to read at most, and a database that cannot be written is one that cannot be
read by SQLite either while a journal lies beside it. (SQLite gives its journal the database's mode.)
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

_FILE, _FOLDER = 0o060, 0o070


def share(path: Path) -> None:
    """Gives the group of ``path``, which we made, the rights that it has in the folder; never any to everybody."""
    with contextlib.suppress(OSError):
        above, made = path.parent.stat(), path.stat()
        if above.st_mode & stat.S_IWGRP and above.st_gid == made.st_gid and made.st_uid == os.geteuid():
            rights = above.st_mode & (_FOLDER if stat.S_ISDIR(made.st_mode) else _FILE)
            path.chmod(stat.S_IMODE(made.st_mode) | rights)


def make_folder(path: Path) -> None:
    """Makes the folder ``path`` and those above it where they are missing. Raises OSError."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for each in reversed(missing):
        share(each)


def is_written(path: Path) -> bool:
    """Returns whether a journal says that the database ``path`` is being written, or was when all ended. Raises OSError."""
    return any(Path(f"{path}{suffix}").exists() for suffix in ("-journal", "-wal"))


def unsealed(path: Path) -> str:
    """Returns what keeps the database ``path`` from being read as one that nobody writes, "" for nothing."""
    try:
        if is_written(path):
            return "is being written, or was left so by a crash: open it once with flashbias to mend it"
        return "" if path.is_file() else "is not there, or is no file"  # to open a pipe would wait for ever
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def no_file(path: Path) -> str:
    """Returns why nothing at ``path`` can be or become a database, "" for nothing: to open a pipe would wait for ever."""
    try:
        special = path.exists() and not (path.is_file() or path.is_dir())
    except OSError:  # SQLite says it better, and so of a folder
        return ""
    return "is no file: move it away" if special else ""


def make_file(path: Path) -> None:
    """Makes an empty file, which to SQLite is an empty database, unless there is one; what fails is left to SQLite to say."""
    with contextlib.suppress(OSError):
        path.open("x").close()
        share(path)
