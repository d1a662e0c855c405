"""An operation in plain torch with two implementations, our ``own`` and a ``guest``'s, and an alternative kernel.

``first`` computes y = x + 1, ``left`` l = 2 y and ``right`` r = 3 y; ``both`` computes l and r at once, and only guests
do. A launch naps for the config's ``nap`` milliseconds; ``off`` is added to what it computes. Guests are of a
``version``, which has to be that of the file that ``GUEST_VERSION`` names.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from autotune.device import DeviceInfo, describe
from autotune.spec import Case, Reference, Rule, Tensors, TensorSpec
from cache_db.models import Config, Problem, Scalar, digest

FACTORS = {"l": 2.0, "r": 3.0}
MADE = {"first": ("y",), "left": ("l",), "right": ("r",), "both": ("l", "r")}


@dataclass(frozen=True)
class Ready:
    """A candidate ready to run."""

    config: Config
    binary: str
    stats: dict[str, Scalar] = field(default_factory=dict)


def own(nap: float, off: float = 0.0) -> Config:
    """Returns a config of our own."""
    return Config(implementation="own", variant="plain", params={"nap": float(nap), "off": float(off)})


def guest(nap: float, off: float = 0.0, version: str = "1") -> Config:
    """Returns a guest's config."""
    return Config(
        implementation="guest", variant="plain", params={"nap": float(nap), "off": float(off), "version": version}
    )


def guest_problem(both: str = "", first: str = "", pair: str = "own 20 0") -> Problem:
    """Returns a problem with these candidates of a kernel, each "implementation nap off", beside a good one of our own."""
    device = describe(-1)
    return Problem(
        spec=f"{__name__}:GUEST",
        gpu_name=device.name,
        capability="0.0",
        sm_count=device.sm_count,
        mig_profile="",
        triton_version=device.triton_version,
        source_hash="guest-1",
        layout="aligned",
        fields={"both": both, "first": first, "pair": pair},
    )


class GuestSpec:
    """Three kernels and one that may stand for two of them."""

    every_kernel = tuple(MADE)

    def kernels(self, problem: Problem) -> tuple[str, ...]:
        """Returns the three."""
        return ("first", "left", "right")

    def alternatives(self, problem: Problem) -> dict[str, tuple[str, ...]]:
        """Returns that one stands for two."""
        return {"both": ("left", "right")}

    def depends_on(self, kernel: str, problem: Problem) -> tuple[str, ...]:
        """Returns that all read y."""
        return () if kernel == "first" else ("first",)

    def soft_fields(self) -> frozenset[str]:
        """Returns that no problem has neighbours."""
        return frozenset()

    def representative(self, problem: Problem, device: DeviceInfo) -> Case:
        """Returns the only case."""
        return Case("only")

    def cases(self, problem: Problem, device: DeviceInfo) -> Sequence[Case]:
        """Returns the only case."""
        return (Case("only"),)

    def race_case(self, problem: Problem, device: DeviceInfo) -> Case:
        """Returns the only case."""
        return Case("only")

    def inputs(self, problem: Problem, case: Case, seed: int, device: torch.device) -> Tensors:
        """Returns x."""
        return {"x": torch.randn((4, 8), generator=torch.Generator().manual_seed(seed))}

    def outputs(self, kernel: str, problem: Problem, case: Case) -> dict[str, TensorSpec]:
        """Returns what the kernel makes."""
        return {name: TensorSpec.contiguous((4, 8), torch.float32) for name in MADE[kernel]}

    def scratch(self, kernel: str, problem: Problem, config: Config, case: Case) -> dict[str, TensorSpec]:
        """Returns that none is needed."""
        return {}

    def candidates(self, kernel: str, problem: Problem, device: DeviceInfo) -> Sequence[Config]:
        """Returns what the problem lists, for ``first`` beside a slow one of our own."""
        listed = str(problem.fields[{"left": "pair", "right": "pair"}.get(kernel, kernel)]).split(",")
        found = [_config(entry) for entry in listed if entry]
        return [*found, own(20)] if kernel == "first" else found

    def rejects(self, kernel: str, config: Config, problem: Problem, device: DeviceInfo) -> str | None:
        """Returns that a guest is not here, or of another version."""
        if config.implementation != "guest":
            return "only guests do both" if kernel == "both" else None
        path = Path(os.environ["GUEST_VERSION"])
        here = path.read_text(encoding="utf-8") if path.exists() else "none"
        return None if config.params.get("version") == here else f"it is of version {config.params}, here {here}"

    def default(self, kernel: str, problem: Problem, device: DeviceInfo) -> Config:
        """Returns our own."""
        return own(20)

    def compile(self, kernel: str, config: Config, problem: Problem, device: DeviceInfo) -> Ready:
        """Returns what the config says."""
        return Ready(config, digest(config.model_dump()))

    def launch(
        self, kernel: str, compiled: Ready, problem: Problem, inputs: Tensors, outputs: Tensors, scratch: Tensors
    ) -> None:
        """Naps and computes."""
        time.sleep(float(compiled.config.params["nap"]) / 1e3)
        for name in MADE[kernel]:
            value = inputs["x"] + 1.0 if name == "y" else FACTORS[name] * inputs["y"]
            outputs[name].copy_(value + float(compiled.config.params["off"]))

    def oracle(self, problem: Problem, inputs: Tensors) -> dict[str, Reference]:
        """Returns all in fp64."""
        y = inputs["x"].double() + 1.0
        return {"y": Reference(y, y.abs())} | {
            name: Reference(factor * y, (factor * y).abs()) for name, factor in FACTORS.items()
        }

    def ideal(self, problem: Problem, inputs: Tensors) -> Tensors:
        """Returns all in fp32."""
        y = inputs["x"] + 1.0
        return {"y": y} | {name: factor * y for name, factor in FACTORS.items()}

    def rule(self, output: str) -> Rule:
        """Returns that rows are judged."""
        return Rule("rows")

    def floor_dtype(self, problem: Problem) -> torch.dtype:
        """Returns fp32."""
        return torch.float32


def _config(entry: str) -> Config:
    implementation, nap, off = entry.split()
    make: Any = {"own": own, "guest": guest}[implementation]
    config: Config = make(nap, off)
    return config


def source() -> str:
    """Returns the source hash of today's problems."""
    return "guest-1"


GUEST = GuestSpec()
