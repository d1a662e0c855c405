"""``flashbias env``: what is here as plain ``key=value`` lines, for a bug report.

No secret is among them: no password, no host's or user's name, no serial number of a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import flashbias
from flashbias.cli import compiler, facts
from flashbias.cli.text import tell
from flashbias.settings import current

# Variables of others that decide what is compiled and which device is seen; none of them holds a secret.
_VARIABLES: Final = (
    "CC",
    "CUDA_VISIBLE_DEVICES",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TRITON_CACHE_DIR",
    "TRITON_INTERPRET",
    "TRITON_PTXAS_PATH",
    "WORLD_SIZE",
)


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds ``env`` to ``commands``; ``common`` has the flags of every command."""
    parser = commands.add_parser("env", parents=[common], help="facts for a bug report", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints every fact; returns 0."""
    found = dict(collected(options.cache_dir))
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        tell(f"{name}={'' if value is None else value}" for name, value in found.items())
    return 0


def collected(folder: Path | None) -> Iterator[tuple[str, str | int | None]]:
    """Yields name and value of every fact; None is what is not there or cannot be told."""
    yield "flashbias", flashbias.__version__
    yield "flashbias.folder", facts.at_home(Path(flashbias.__file__).resolve().parent)
    yield "python", facts.python()
    yield "system", facts.system()
    for name, version in facts.versions().items():
        yield name, version or None
    yield "c_compiler", compiler.compiler()
    headers = compiler.headers()
    yield "python_headers", None if headers is None else facts.at_home(headers)
    yield from _gpus()
    for variable in _VARIABLES:
        if variable in os.environ:
            yield f"variable.{variable}", facts.at_home(os.environ[variable])
    yield from _settings(folder)


def _gpus() -> Iterator[tuple[str, str | int | None]]:
    cuda = facts.cuda()
    yield "driver", facts.driver() or None
    yield "torch.cuda", cuda.build or (None if cuda.hip is None else f"hip {cuda.hip}")
    yield "torch.fault", cuda.fault or None
    yield "interpreter", str(cuda.interpreted).lower()
    yield "gpus", len(cuda.gpus)
    for gpu in cuda.gpus:
        device, name = gpu.device, f"gpu.{gpu.device.index}"
        yield name, device.name
        yield f"{name}.capability", f"{device.capability[0]}.{device.capability[1]}"
        yield f"{name}.sm_count", device.sm_count
        yield f"{name}.mig_profile", device.mig_profile or None
        yield f"{name}.compute_mode", None if gpu.mode is None else facts.MODES.get(gpu.mode, str(gpu.mode))
        yield f"{name}.memory_free", gpu.free
        yield f"{name}.memory_total", gpu.total
        yield f"{name}.ptxas", device.environment.ptxas or None
        for what, value in gpu.health.items():
            yield f"{name}.{what}", str(value)


def _settings(folder: Path | None) -> Iterator[tuple[str, str | int | None]]:
    settings = current()
    yield "settings.mode", str(settings.mode)
    yield "settings.budget_seconds", f"{settings.budget_seconds:g}"
    yield "settings.wait_seconds", f"{settings.wait_seconds:g}"
    yield "settings.implementations", ",".join(settings.implementations) or None
    yield "settings.log", settings.log
    found = facts.database(folder or settings.cache_dir)
    kind, _ = facts.disk(found)
    yield "database", None if found.path is None else facts.at_home(found.path)
    yield "database.state", found.state
    yield "database.engine", found.engine
    yield "database.filesystem", kind
    for name, count in found.rows.items():
        yield f"database.{name}", count
