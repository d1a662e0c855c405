"""``FLASHBIAS_RECORD``: the shapes that a program calls with, written down as ``scripts/prewarm.py`` reads them.

One table for each launch key that a process meets, so that different lengths of one bucket are written once. Any number of
processes may share the file.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
from pathlib import Path
from typing import Any

from flashbias.band import Band
from flashbias.kernels.problem import Shape

logger = logging.getLogger(__name__)
_failed: set[Path] = set()


def record(path: Path, shape: Shape, band: Band) -> None:
    """Adds ``shape``, seen through ``band``, to the shapes file ``path`` unless it is there; a fault is one warning."""
    if path in _failed:
        return
    try:
        _add(path, table(shape, band))
    except (OSError, UnicodeError) as error:  # it may be no text
        _failed.add(path)
        reason = getattr(error, "strerror", None) or error
        logger.warning("FLASHBIAS_RECORD: %s cannot be written: %s; no more shapes are noted", path, reason)


def table(shape: Shape, band: Band) -> str:
    """Returns the TOML table of a shape, whose own ``causal`` and ``window`` say nothing yet, seen through ``band``."""
    values = shape.model_dump(mode="json", exclude_defaults=True) | _words(shape, band)
    return "\n".join(["[[shape]]", *(f"{name} = {json.dumps(value)}" for name, value in values.items())]) + "\n"


def _words(shape: Shape, band: Band) -> dict[str, Any]:
    """Returns a ``causal`` and a ``window`` that mean ``band`` for a call of this shape; {} where nothing is bounded."""
    words: dict[str, Any] = {}
    causals: tuple[bool | str, ...] = (True, "bottom_right", False)
    for causal in causals if band.high is not None else (False, *causals):
        shift = 0 if causal is True or shape.varlen else shape.seqlen_k - shape.seqlen_q
        left = -1 if band.low is None else band.low + shift
        right = -1 if causal or band.high is None else band.high - shift
        words = ({"causal": causal} if causal else {}) | ({} if left == right == -1 else {"window": (left, right)})
        if shape.model_copy(update=words).band == band:
            break
    return words


def _add(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND | os.O_CLOEXEC, 0o666)
    with os.fdopen(descriptor, "r+", encoding="utf-8") as file:
        with contextlib.suppress(OSError):  # some file systems have no locks: a table may then stand there twice
            fcntl.flock(file, fcntl.LOCK_EX)
        known = file.read().split("\n\n")
        if text.strip() not in (each.strip() for each in known):
            _append(descriptor, f"{text}\n".encode())


def _append(descriptor: int, data: bytes) -> None:
    """Writes ``data`` at the file's end, or nothing of it: half a table would make the file unreadable. Raises OSError."""
    end = os.fstat(descriptor).st_size
    try:
        while data:
            data = data[os.write(descriptor, data) :]
    except OSError:
        os.ftruncate(descriptor, end)
        raise
