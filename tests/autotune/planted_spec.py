"""The softmax of ``softmax_spec`` with the candidates that the problem itself lists, good and bad.

A kernel's field reads like "32 64:zeroed_row": blocks, each with the fault to plant. Listed in the problem, they are
the same in every process that is given it. While the file that ``PLANTED_UNSTEADY`` names exists, this device computes
one thing in two ways, or fails with what the file says ("full": no memory left); the faults "breaks_device" and
"fills_device" make it, and "fills_and_fails" does not launch besides.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from autotune.device import DeviceInfo, describe
from autotune.spec import Tensors
from cache_db.models import Config, Problem
from tests.autotune.softmax_spec import Ready, SoftmaxSpec, softmax_config, softmax_problem

_ideals = itertools.count()


class PlantedSpec(SoftmaxSpec):
    """Softmax and its gradient, with planted candidates; a launch takes ``slow`` seconds."""

    def soft_fields(self) -> frozenset[str]:
        """Returns that the row length and the planted lists may differ between neighbours."""
        return frozenset({"columns", "forward", "backward", "slow"})

    def candidates(self, kernel: str, problem: Problem, device: DeviceInfo) -> Sequence[Config]:
        """Returns what the problem lists for ``kernel``."""
        return [_config(entry) for entry in str(problem.fields[kernel]).split()]

    def default(self, kernel: str, problem: Problem, device: DeviceInfo) -> Config:
        """Returns what the problem names as default of every kernel."""
        return _config(str(problem.fields["default"]))

    def launch(
        self, kernel: str, compiled: Ready, problem: Problem, inputs: Tensors, outputs: Tensors, scratch: Tensors
    ) -> None:
        """Runs the kernel after a nap."""
        time.sleep(float(problem.fields["slow"]))
        if compiled.fault == "breaks_device":
            Path(os.environ["PLANTED_UNSTEADY"]).touch()
        if compiled.fault in ("fills_device", "fills_and_fails"):
            Path(os.environ["PLANTED_UNSTEADY"]).write_text("full", encoding="utf-8")
        if compiled.fault == "fills_and_fails":
            raise RuntimeError("planted: this config does not launch")
        super().launch(kernel, compiled, problem, inputs, outputs, scratch)

    def ideal(self, problem: Problem, inputs: Tensors) -> Tensors:
        """Returns the softmax's, every other time one bit off while the device is unsteady."""
        found, unsteady = super().ideal(problem, inputs), os.environ.get("PLANTED_UNSTEADY", "")
        if unsteady and Path(unsteady).exists():
            failure = Path(unsteady).read_text(encoding="utf-8")
            if failure == "full":
                raise torch.OutOfMemoryError("planted: no memory left")
            if failure:
                raise RuntimeError(failure)
            found["y"] = found["y"] * (1 + 2**-23 * (next(_ideals) % 2))
        return found

    def axes(self, output: str) -> tuple[str, ...]:
        """Returns that every output has one row after the other."""
        return ("row",)


def source() -> str:
    """Returns the source hash of today's problems."""
    return "softmax-1"


def planted_problem(
    forward: str = "32",
    backward: str = "32",
    *,
    default: str = "256",
    columns: int = 19,
    slow: float = 0.0,
    dtype: str = "float32",
    device: DeviceInfo | None = None,
) -> Problem:
    """Returns a problem with these candidates, on ``device`` or else the interpreter."""
    plain = softmax_problem(device or describe(-1), columns=columns, dtype=dtype)
    planted = {"forward": forward, "backward": backward, "default": default, "slow": slow}
    return Problem(**{**dict(plain), "spec": f"{__name__}:PLANTED", "fields": {**plain.fields, **planted}})


def _config(entry: str) -> Config:
    block, _, fault = entry.partition(":")
    return softmax_config(int(block), fault)


PLANTED = PlantedSpec()
