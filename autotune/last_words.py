"""What a child wrote to stderr before it ended, kept in a nameless file."""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path
from typing import Final

TAIL_BYTES: Final = 8192


def last_line(descriptor: int) -> str:
    """Returns the last line with anything on it of the file ``descriptor``, shortened for a reason."""
    size = os.fstat(descriptor).st_size
    tail = os.pread(descriptor, TAIL_BYTES, max(size - TAIL_BYTES, 0)).decode(errors="replace")
    lines = [line.strip() for line in tail.splitlines() if line.strip()]
    return lines[-1][-300:] if lines else ""


def appending_file() -> int:
    """Returns the descriptor of a nameless file in append mode: truncated, it is written from its start again."""
    descriptor, name = tempfile.mkstemp(prefix="autotune-")
    Path(name).unlink()
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_APPEND)
    return descriptor
