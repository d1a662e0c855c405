"""What figures were taken with: the machine, the versions of everybody, the state of this code."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any, Final

import torch
import triton

import flashbias
from autotune.device import describe, driver_version
from flashbias.bench.providers import upstream

_PEERS: Final = ("flash-attn-4", "xformers")


def record(device: torch.device, folder: Path | None, rounds: int) -> dict[str, Any]:
    """Returns what a later reader needs to know of figures taken now on ``device``; None is what is not there."""
    cuda = device.type == "cuda"
    return {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "gpu": describe(device.index or 0).name if cuda else None,
        "driver": driver_version() or None,
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "flashbias": flashbias.__version__,
        "commit": commit(Path(flashbias.__file__).resolve().parent.parent),
        "peers": {name: _version(name) for name in _PEERS} | upstream.digests(folder),
        "rounds": rounds,
    }


def commit(folder: Path) -> str | None:
    """Returns the git commit of the code in ``folder``, with "+" where files differ from it; None without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != folder:
            return None  # a repository that merely holds the environment we are installed in
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
