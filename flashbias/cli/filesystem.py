"""On what kind of file system a path lies, and how much room there is; nothing is made."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Final

MOUNTS: Final = Path("/proc/self/mountinfo")
# Where locks or the order of writes are another machine's business, SQLite's promises do not hold
# (https://sqlite.org/useovernet.html). FUSE's are named after what serves them.
_NETWORK: Final = re.compile(
    r"(fuse\.)?(nfs\d?|cifs|smb\d?|smbfs|smb2|lustre|gpfs|mmfs|beegfs|fhgfs|ceph|cephfs|glusterfs|9p|afs|ncpfs|pvfs2|orangefs|"
    r"wekafs|panfs|ocfs2|gfs2|sshfs|s3fs|gcsfuse|goofys|juicefs|davfs2?|virtiofs|vboxsf|prl_fs|acfs)"
)


def existing(path: Path) -> Path:
    """Returns ``path`` itself, or the nearest folder above it that is there."""
    return next(each for each in (path, *path.parents) if os.path.lexists(each) and each.exists())


def kind(path: Path, mounts: Path = MOUNTS) -> str | None:
    """Returns the type of the file system that ``path`` lies on, or would lie on; None where nobody can tell."""
    there = Path(os.path.realpath(existing(path.absolute())))
    found: tuple[int, str] | None = None
    try:
        lines = mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    for line in lines:
        left, _, right = line.partition(" - ")
        fields, rest = left.split(" "), right.split(" ")
        if len(fields) < 5 or not rest[0]:
            continue
        point = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4]))
        # A later mount hides an earlier one at the same place.
        if there.is_relative_to(point) and (found is None or len(point.parts) >= found[0]):
            found = len(point.parts), rest[0]
    return None if found is None else found[1]


def is_network(name: str | None) -> bool:
    """Returns whether a file system of this type is, or may be, shared over a network."""
    return name is not None and _NETWORK.fullmatch(name) is not None


def free_bytes(path: Path) -> int | None:
    """Returns how many bytes a file at ``path`` could still take, None where nobody can tell."""
    try:
        return shutil.disk_usage(existing(path.absolute())).free
    except OSError:
        return None


def is_writable(path: Path) -> bool:
    """Returns whether ``path`` may be written, or made where it is not there; its folder too, for a file.

    A database writes its journal beside it.
    """
    there = existing(path.absolute())
    if there.is_dir():
        return os.access(there, os.W_OK | os.X_OK)
    beside = there == path.absolute() and os.access(there.parent, os.W_OK | os.X_OK)
    return beside and os.access(there, os.W_OK)
