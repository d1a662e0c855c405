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
def destination(path: Path | None, database: Path | None) -> Iterator[TextIO]:
    """Opens where rows go, so that line ends stay as they are written; None is stdout.

    A file gets its name, and an earlier one makes room, once all is written. Raises WrongUsage for the ``database`` and
    what belongs to it, OSError for what cannot be written.
    """
    if path is None:
        yield sys.stdout
        return
    there = _apart(path, database)
    if there.exists() and not there.is_file():  # a pipe or a device has nothing to keep whole
        with there.open("w", encoding="utf-8", newline="") as file:
            yield file
        return
    with _renamed(there) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        yield file


@contextlib.contextmanager
def file_destination(path: Path, database: Path | None) -> Iterator[Path]:
    """As ``destination``, for whoever writes by name: yields an empty file that gets the name ``path`` at the end."""
    with _renamed(_apart(path, database)) as temporary:
        yield temporary


def _apart(path: Path, database: Path | None) -> Path:
    """Returns what is written when ``path`` is: what a symbolic link points to, the link stays."""
    there = path.resolve()
    beside = [database.with_name(f"{database.name}{suffix}") for suffix in _BESIDE] if database else []
    if any(_same(there, each) for each in beside):
        raise WrongUsage.explain("--output", expected="a file of its own", got=f"{path}, which is the database")
    return there


@contextlib.contextmanager
def _renamed(path: Path) -> Iterator[Path]:
    """Makes an empty file beside ``path`` that takes its place at the end, or is gone when something is raised."""
    temporary = path.with_name(f".flashbias-{secrets.token_hex(8)}.tmp")
    try:
        temporary.open("x").close()
        yield temporary
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
