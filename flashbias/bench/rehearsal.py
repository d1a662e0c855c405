"""A provider's first run, in a child process that it may crash: ``python -m flashbias.bench.rehearsal``.

An illegal memory access takes the whole process's use of the GPU along, and with it every figure to come.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from autotune.process import death
from flashbias.bench.inputs import make
from flashbias.kernels.problem import Shape

SECONDS: Final = 180.0
_MARK: Final = "rehearsed "


@dataclass(frozen=True)
class Rehearsal:
    """How it went: why the provider must not run here, "" where it may; and what its autotuners chose."""

    reason: str = ""
    tuned: list[Any] = field(default_factory=list)


def rehearsed(name: str, folder: Path, shape: Shape, index: int, seconds: float = SECONDS) -> Rehearsal:
    """Runs the provider ``name`` of ``folder`` forward and backward in a child on CUDA device ``index`` (-1: on the CPU)."""
    order = json.dumps({"name": name, "folder": str(folder), "shape": shape.model_dump(mode="json"), "index": index})
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-P", "-m", "flashbias.bench.rehearsal", order]
    if index >= 0:
        torch.cuda.empty_cache()  # the child needs memory of its own
    try:
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return Rehearsal(f"took more than {seconds:g} s in a process of its own")
    for line in reversed(done.stdout.splitlines()):
        if line.startswith(_MARK):
            return Rehearsal(**json.loads(line.removeprefix(_MARK)))
    said = done.stderr.strip().splitlines()
    return Rehearsal(f"kills its process: {death(done.returncode, said[-1] if said else '')}")


def main(order: str) -> None:
    """Runs what ``order`` says and prints how it went; dies as the provider makes it die."""
    from flashbias.bench.providers.upstream import load, providers

    wish = json.loads(order)
    folder, name = Path(wish["folder"]), wish["name"]
    device = torch.device("cpu") if wish["index"] < 0 else torch.device("cuda", wish["index"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    inputs = make(Shape.model_validate_json(json.dumps(wish["shape"])), 0, device)
    run = providers(folder)[name].run
    out = run(inputs)
    if inputs.leaves:
        torch.autograd.grad(out, inputs.leaves, inputs.dout, allow_unused=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    print(_MARK + json.dumps({"tuned": load(name, folder).tuned}), flush=True)  # noqa: T201 - the answer


if __name__ == "__main__":
    main(sys.argv[1])
