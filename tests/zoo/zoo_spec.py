"""Attention with planted faults: the KernelSpec whose configs name the fault that their kernel shall have.

``planted(config, "zeroed_row")`` is a config of ``flashbias.kernels.spec.ATTENTION`` with one more parameter; without
it the spec is attention's own. The problem may list faults: then the candidates of a kernel are those of its faults, in
the fastest of a few tiles, and one slow tile without any, which a sweep must choose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
import triton

from autotune.device import DeviceInfo
from autotune.source import source_hash
from autotune.spec import Case, Tensors, TensorSpec
from cache_db.models import Config, Problem, Scalar
from flashbias.kernels import space, spec
from flashbias.kernels.answers import softmax_scale
from flashbias.kernels.binding import Binary
from flashbias.kernels.problem import Shape, problem
from flashbias.kernels.spec import AttentionSpec
from tests.zoo import bad_kernels
from tests.zoo.faults import BLOCK, ZOO, Buffers, sabotage, spoil

# (BLOCK_M, BLOCK_N, num_warps, num_stages): a tile that is fast where a planted fault sits, and one that is slow.
FAST: Final = (64, 64, 4, 3)
SLOW: Final = (32, 32, 4, 1)
INTERPRETED_FAST: Final = (32, 32, 4, 1)
INTERPRETED_SLOW: Final = (16, 32, 4, 1)
# 308 KiB of shared memory at headdim 128 on sm_90, which has 227.
TOO_LARGE: Final = (128, 128, 8, 4)


@dataclass(frozen=True)
class Specimen:
    """A compiled kernel with the ``fault`` that its launches have, "" for none."""

    kernel: Binary
    fault: str

    @property
    def binary(self) -> str:
        """The SHA-256 of the right kernel's machine code."""
        return self.kernel.binary

    @property
    def stats(self) -> Mapping[str, Scalar]:
        """The compiler's statistics of the right kernel."""
        return self.kernel.stats


class ZooSpec(AttentionSpec):
    """Attention whose configs may have the parameter ``fault``, one of ``ZOO``."""

    def candidates(self, kernel: str, problem: Problem, device: DeviceInfo) -> Sequence[Config]:
        """Returns the faults that the problem lists for ``kernel`` and a slow good config, or attention's own."""
        listed = str(problem.fields["faults"]).split()
        if not listed:
            return super().candidates(kernel, problem, device)
        found = [planted(bearer(fault, device), fault) for fault in listed if ZOO[fault].kernel == kernel]
        return [*found, slow(device)]

    def rejects(self, kernel: str, config: Config, problem: Problem, device: DeviceInfo) -> str | None:
        """Returns what attention says of the config without its fault, or that it has no such fault.

        Of shared memory the zoo has no rule: a sweep shall find out by itself.
        """
        fault = config.params.get("fault")
        if fault is not None and (fault not in ZOO or ZOO[str(fault)].kernel != kernel):
            return f"{kernel} has no fault {fault!r}"
        return None if fault == "shared_memory" else super().rejects(kernel, healthy(config), problem, device)

    def scratch(self, kernel: str, problem: Problem, config: Config, case: Case) -> dict[str, TensorSpec]:
        """Returns the right kernel's."""
        return super().scratch(kernel, problem, healthy(config), case)

    def compile(self, kernel: str, config: Config, problem: Problem, device: DeviceInfo) -> Specimen:  # type: ignore[override]
        """Compiles the right kernel, unless the fault is one of compile time; raises what Triton raises."""
        fault = str(config.params.get("fault", ""))
        sabotage(fault, device)
        return Specimen(super().compile(kernel, healthy(config), problem, device), fault)

    def launch(  # type: ignore[override]
        self, kernel: str, compiled: Specimen, problem: Problem, inputs: Tensors, outputs: Tensors, scratch: Tensors
    ) -> None:
        """Enqueues one run of the right kernel, then what its fault does to it."""
        if compiled.fault == "unwritten_tail":
            complete = {name: torch.empty_like(tensor) for name, tensor in outputs.items()}
            super().launch(kernel, compiled.kernel, problem, inputs, complete, scratch)
            _copy_all_but_a_row(outputs, complete, "dv")
            return
        super().launch(kernel, compiled.kernel, problem, inputs, outputs, scratch)
        spoil(compiled.fault, Buffers(inputs, outputs, softmax_scale(problem)))


def planted(config: Config, fault: str) -> Config:
    """Returns ``config`` with ``fault``."""
    return config.model_copy(update={"params": {**config.params, "fault": fault}})


def healthy(config: Config) -> Config:
    """Returns ``config`` without its fault, if it has one."""
    kept = {name: value for name, value in config.params.items() if name != "fault"}
    return config.model_copy(update={"params": kept})


def bearer(fault: str, device: DeviceInfo) -> Config:
    """Returns the good config that ``fault`` is planted into."""
    tile = TOO_LARGE if fault == "shared_memory" else INTERPRETED_FAST if device.interpreted else FAST
    return space.config(space.POINTERS, *tile)


def slow(device: DeviceInfo) -> Config:
    """Returns a good config that loses to any other by its time."""
    return space.config(space.POINTERS, *(INTERPRETED_SLOW if device.interpreted else SLOW))


def zoo_problem(shape: Shape, device: DeviceInfo, faults: str = "") -> Problem:
    """Returns the problem of ``shape`` with the candidates that ``faults`` lists, by names with blanks between."""
    plain = problem(shape, device)
    how = {"spec": f"{__name__}:SPEC", "source_hash": source(), "fields": {**plain.fields, "faults": faults}}
    return Problem(**{**dict(plain), **how})


def source() -> str:
    """Returns the source hash that problems have today: attention's, and that of the bad kernels."""
    return source_hash(bad_kernels.SPOILERS, {"attention": spec.source()})


def _copy_all_but_a_row(outputs: Tensors, complete: Tensors, name: str) -> None:
    """Writes ``complete`` to ``outputs``, of the tensor ``name`` all but the last row."""
    for each, tensor in outputs.items():
        stop = tensor.numel() - (tensor.shape[-1] if each == name else 0)
        bad_kernels.copy_start[(triton.cdiv(stop, BLOCK),)](tensor, complete[each], stop, BLOCK)


SPEC: Final = ZooSpec()
