"""The contract a kernel signs to be tuned and proven: ``KernelSpec``.

A spec describes one operation made of one or more kernels that run in order (attention: ``forward``,
``backward_dq``, ``backward_dkdv``). autotune never looks inside: it asks the spec for inputs, buffers,
candidates, a trusted answer and a launch, and does the searching, timing, proving and isolating itself.
A spec is loaded by ``module:attribute`` in the caller's process and again in the worker.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch

from autotune.device import DeviceInfo
from cache_db.models import Config, Problem, Scalar

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class TensorSpec:
    """A buffer autotune shall allocate: shape and stride in elements, and the dtype."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def contiguous(cls, shape: Sequence[int], dtype: torch.dtype) -> TensorSpec:
        """Returns the spec of a row-major buffer."""
        stride, step = [], 1
        for size in reversed(shape):
            stride.append(step)
            step *= max(size, 1)
        return cls(tuple(shape), tuple(reversed(stride)), dtype)


@dataclass(frozen=True)
class Case:
    """Concrete sizes on which a problem is run: a name for reports and the spec's own size map."""

    name: str
    sizes: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True)
class Reference:
    """The trusted value of one output, and the same sum over absolute values (for rows that cancel)."""

    value: torch.Tensor
    magnitude: torch.Tensor | None = None


@dataclass(frozen=True)
class Rule:
    """How an output is judged.

    ``rows``: relative error of each last-dim row, at most ``factor`` times the ideal kernel's worst row
    plus one unit roundoff. ``log``: absolute error in nats (LSE), -inf must match exactly.
    """

    kind: Literal["rows", "log"]
    factor: float = 2.0


@dataclass(frozen=True)
class Floor:
    """What no kernel of a problem can do better than, where that is not a dtype's rounding alone.

    ``roundoff`` is the relative error every budget allows; inputs on which the ideal kernel is off by more than
    ``ceiling`` prove nothing. A ``log`` output may be off by ``nats``, or by ``log_ulps`` fp32 ulp of itself and more
    where the ideal is off.
    """

    roundoff: float
    ceiling: float
    nats: float
    log_ulps: float = 4.0


@runtime_checkable
class Compiled(Protocol):
    """A kernel ready to launch. ``binary`` names the machine code (SHA-256; "" in the interpreter).

    ``stats`` are figures to store with its trials; they are read again after its launches, when
    :func:`autotune.occupancy.figures` knows more. A compiled kernel may have one more attribute, ``assembly:
    Mapping[str, str | bytes]``: what the compiler made of it on the way to machine code, by file suffix ("ptx", "cubin").
    ``flashbias ptx`` saves that.
    """

    binary: str
    stats: Mapping[str, Scalar]


class KernelSpec(Protocol):
    """What a kernel must say of itself. All methods are pure but ``compile`` and ``launch``.

    A spec may have more methods. ``axes(output) -> tuple[str, ...]``: the names of an output's dimensions short of
    a row's elements, for reports. The one called "row" is told in ranges. ``smaller(problem, case) -> Case | None``:
    the timed ``case`` (``representative``, or what this method made of it) in about half of the memory, with the same
    name, or None where it would no longer stand for the problem; without it nothing is tuned where the free memory
    does not hold the representative. ``alternatives(problem) -> Mapping[str, tuple[str, ...]]``: kernels beside those
    of ``kernels``, each with those whose place it can take all at once; it is swept too, runs where it is faster than
    their sum, and need not pass. No kernel reads its outputs. ``enqueue``: ``launch`` as it is timed, for one that only
    has to copy its results to where the proof wants them. And an attribute ``every_kernel``, the names of the kernels of all its problems,
    where not every problem has them all. Its module may have a function ``source() -> str``, which returns the
    ``source_hash`` that its problems have today.
    """

    def kernels(self, problem: Problem) -> tuple[str, ...]:
        """Returns the kernels this problem needs, in the order they run."""
        ...

    def depends_on(self, kernel: str, problem: Problem) -> tuple[str, ...]:
        """Returns the kernels whose outputs ``kernel`` reads; they are run first with their chosen configs."""
        ...

    def soft_fields(self) -> frozenset[str]:
        """Returns the fields (sizes) in which a neighbouring problem's winner may differ and still be tried."""
        ...

    def representative(self, problem: Problem, device: DeviceInfo) -> Case:
        """Returns the sizes that are timed; never the caller's tensors."""
        ...

    def cases(self, problem: Problem, device: DeviceInfo) -> Sequence[Case]:
        """Returns the proof's cases, the cheapest ragged one (used alone for level 1) first."""
        ...

    def race_case(self, problem: Problem, device: DeviceInfo) -> Case:
        """Returns sizes just over one wave of the device and short (0.15 ms or less a launch)."""
        ...

    def inputs(self, problem: Problem, case: Case, seed: int, device: torch.device) -> Tensors:
        """Returns fresh inputs, the same bits for the same (problem, case, seed)."""
        ...

    def outputs(self, kernel: str, problem: Problem, case: Case) -> dict[str, TensorSpec]:
        """Returns the buffers ``kernel`` must fill completely."""
        ...

    def scratch(self, kernel: str, problem: Problem, config: Config, case: Case) -> dict[str, TensorSpec]:
        """Returns work space ``kernel`` may use; its contents mean nothing afterwards."""
        ...

    def candidates(self, kernel: str, problem: Problem, device: DeviceInfo) -> Sequence[Config]:
        """Returns every config worth trying, most promising first; those with a reason in ``rejects`` too."""
        ...

    def rejects(self, kernel: str, config: Config, problem: Problem, device: DeviceInfo) -> str | None:
        """Returns why ``config`` may not run here, or None. Decides on stored rows as well as on candidates."""
        ...

    def default(self, kernel: str, problem: Problem, device: DeviceInfo) -> Config:
        """Returns the conservative config of the ladder's last Triton rung."""
        ...

    def compile(self, kernel: str, config: Config, problem: Problem, device: DeviceInfo) -> Compiled:
        """Compiles without touching the GPU's memory; raises what the compiler raises."""
        ...

    def launch(
        self, kernel: str, compiled: Any, problem: Problem, inputs: Tensors, outputs: Tensors, scratch: Tensors
    ) -> None:
        """Enqueues one run on the current stream. ``inputs`` holds the case's inputs and all needed outputs."""
        ...

    def oracle(self, problem: Problem, inputs: Tensors) -> dict[str, Reference]:
        """Returns every output of every kernel in fp64."""
        ...

    def ideal(self, problem: Problem, inputs: Tensors) -> Tensors:
        """Returns every output as the best low-precision kernel could: the yardstick of errors."""
        ...

    def rule(self, output: str) -> Rule:
        """Returns how ``output`` is judged."""
        ...

    def floor_dtype(self, problem: Problem) -> torch.dtype | Floor:
        """Returns the dtype whose unit roundoff every budget of this problem starts from, or that floor itself."""
        ...


def load(path: str) -> KernelSpec:
    """Imports the spec named ``module:attribute``.

    Raises ImportError when the module or attribute does not exist.
    """
    module_name, _, attribute = path.partition(":")
    module = importlib.import_module(module_name)
    try:
        spec: KernelSpec = getattr(module, attribute)
    except AttributeError as error:
        raise ImportError(f"spec {path!r}: module {module_name!r} has no attribute {attribute!r}") from error
    return spec


def source_of(path: str) -> str | None:
    """Returns the ``source_hash`` that problems of the spec at ``path`` have today; None where its module does not say.

    Raises ImportError when there is no such module or attribute, and for whatever the module raises.
    """
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
        getattr(module, attribute)
        source = getattr(module, "source", None)
        return None if source is None else str(source())
    except (Exception, SystemExit) as error:  # a module's own code runs here
        raise ImportError(f"{type(error).__name__}: {' '.join(str(error).split())[:400]}") from error
