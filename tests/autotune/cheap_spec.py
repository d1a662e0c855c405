"""An operation that costs next to nothing, x + 1 in plain torch: for tests that need very many candidates.

Config parameter ``number`` tells candidates apart; ``crash`` makes one end its process.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from autotune.device import DeviceInfo, describe
from autotune.spec import Case, Reference, Rule, Tensors, TensorSpec
from cache_db.models import Config, Problem, Scalar


@dataclass(frozen=True)
class Ready:
    """A candidate ready to run."""

    crash: bool
    binary: str = ""
    stats: dict[str, Scalar] = field(default_factory=dict)


def cheap_problem() -> Problem:
    """Returns the one problem there is, in the interpreter."""
    device = describe(-1)
    return Problem(
        spec=f"{__name__}:CHEAP",
        gpu_name=device.name,
        capability="0.0",
        sm_count=device.sm_count,
        mig_profile="",
        triton_version=device.triton_version,
        source_hash="cheap-1",
        layout="aligned",
        fields={},
    )


def cheap_config(number: int, *, crash: bool = False) -> Config:
    """Returns candidate ``number``."""
    return Config(implementation="torch", variant="plain", params={"number": number, "crash": crash})


class CheapSpec:
    """One kernel, ``forward``: x -> y."""

    def kernels(self, problem: Problem) -> tuple[str, ...]:
        """Returns the one kernel."""
        return ("forward",)

    def depends_on(self, kernel: str, problem: Problem) -> tuple[str, ...]:
        """Returns that it needs no other."""
        return ()

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
        """Returns y."""
        return {"y": TensorSpec.contiguous((4, 8), torch.float32)}

    def scratch(self, kernel: str, problem: Problem, config: Config, case: Case) -> dict[str, TensorSpec]:
        """Returns that none is needed."""
        return {}

    def candidates(self, kernel: str, problem: Problem, device: DeviceInfo) -> Sequence[Config]:
        """Returns one of them."""
        return (cheap_config(0),)

    def rejects(self, kernel: str, config: Config, problem: Problem, device: DeviceInfo) -> str | None:
        """Returns that all may run."""
        return None

    def default(self, kernel: str, problem: Problem, device: DeviceInfo) -> Config:
        """Returns one of them."""
        return cheap_config(0)

    def compile(self, kernel: str, config: Config, problem: Problem, device: DeviceInfo) -> Ready:
        """Returns what the config says."""
        return Ready(bool(config.params["crash"]))

    def launch(
        self, kernel: str, compiled: Any, problem: Problem, inputs: Tensors, outputs: Tensors, scratch: Tensors
    ) -> None:
        """Computes y, or ends the process."""
        if compiled.crash:
            os.abort()
        torch.add(inputs["x"], 1.0, out=outputs["y"])

    def oracle(self, problem: Problem, inputs: Tensors) -> dict[str, Reference]:
        """Returns y in fp64."""
        return {"y": Reference(inputs["x"].double() + 1.0)}

    def ideal(self, problem: Problem, inputs: Tensors) -> Tensors:
        """Returns y in fp32."""
        return {"y": inputs["x"] + 1.0}

    def rule(self, output: str) -> Rule:
        """Returns that rows are judged."""
        return Rule("rows")

    def floor_dtype(self, problem: Problem) -> torch.dtype:
        """Returns fp32."""
        return torch.float32


CHEAP = CheapSpec()
