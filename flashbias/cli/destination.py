"""Where a command writes its rows: stdout, or a file that is whole or not there."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final, TextIO

from flashbias.cli.database import WrongUsage

# What SQLite keeps beside a database (https://sqlite.org/tempfiles.html).
_BESIDE: Final = ("", "-wal", "-shm", "-journal")


@contextlib.contextmanager
def destination(path: Path | None, database: Path) -> Iterator[TextIO]:
    """Opens where rows go, so that line ends stay as they are written; None is stdout.

    A file gets its name, and an earlier one makes room, once all is written. Raises WrongUsage for the ``database`` and
    what belongs to it, OSError for what cannot be written.
    """
    if path is None:
        yield sys.stdout
        return
    there = path.resolve()  # what a symbolic link points to is written, the link stays
    if any(_same(there, database.with_name(f"{database.name}{suffix}")) for suffix in _BESIDE):
        raise WrongUsage.explain("--output", expected="a file of its own", got=f"{path}, which is the database")
    if there.exists() and not there.is_file():  # a pipe or a device has nothing to keep whole
        with there.open("w", encoding="utf-8", newline="") as file:
            yield file
        return
    with _renamed(there) as file:
        yield file


@contextlib.contextmanager
def _renamed(path: Path) -> Iterator[TextIO]:
    """Opens a file beside ``path`` that takes its place at the end, or is gone when something is raised."""
    temporary = path.with_name(f".flashbias-{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("x", encoding="utf-8", newline="") as file:
            yield file
        if path.exists():
            shutil.copymode(path, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _same(one: Path, other: Path) -> bool:
    """Returns whether two paths mean one file, by whatever links."""
    try:
        return one.samefile(other)
    except OSError:  # one of them is not there
        return one == other.resolve()
