"""Makes a stored trial's kernel again, without its GPU: what it compiles to, and whether that is what was judged."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import torch
import triton

from autotune.device import DeviceInfo, interpreting, ptxas_version
from autotune.errors import AutotuneError
from autotune.place import INTERPRETER
from autotune.reproof import mismatch
from autotune.spec import KernelSpec, load
from autotune.verdicts import summarize
from cache_db.models import Config, Environment, Problem, Scalar, Trial

# Opt-in shared memory of a block in bytes (CUDA C++ Programming Guide, technical specifications by compute capability).
_SHARED_MEMORY: Final = {
    (7, 0): 98304,
    (7, 5): 65536,
    (8, 0): 166912,
    (8, 7): 166912,
    (9, 0): 232448,
    (10, 0): 232448,
    (10, 3): 232448,
}
_USUAL_SHARED_MEMORY: Final = 101376
_OLDEST: Final = (7, 0)  # for less Triton fails in its back end and dumps its whole IR


@dataclass(frozen=True)
class Remade:
    """What a trial's config compiles to today: the name of its machine code, figures, and every stage by file suffix.

    ``environment`` is today's; its ``ptxas`` may be another than the trial's.
    """

    binary: str
    figures: Mapping[str, Scalar]
    assembly: Mapping[str, str | bytes]
    environment: Environment


def target(problem: Problem) -> DeviceInfo:
    """Returns the device of ``problem`` as far as compiling needs it, with today's Triton, assembler and torch.

    Raises AutotuneError for a problem of no NVIDIA GPU, or of one that is too old for Triton.
    """
    return gpu(problem.gpu_name, problem.capability, problem.sm_count, problem.mig_profile)


def gpu(name: str, capability: str, sm_count: int, mig_profile: str = "") -> DeviceInfo:
    """Returns a GPU that need not be here, as far as compiling for it needs it; ``capability`` is as in "9.0".

    Raises AutotuneError for what is no NVIDIA GPU, or too old for Triton.
    """
    found = re.fullmatch(r"([1-9]\d?)\.(\d)", capability)
    if found is None or name == INTERPRETER:
        raise AutotuneError(f"{name} (capability {capability}) is no GPU that Triton compiles for")
    parts = (int(found[1]), int(found[2]))
    if parts < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        raise AutotuneError(
            f"{name} has compute capability {capability}: expected {oldest} or later, "
            "Triton compiles for nothing before"
        )
    return DeviceInfo(
        index=-1,
        name=name,
        uuid="",
        capability=parts,
        sm_count=sm_count,
        shared_memory=_SHARED_MEMORY.get(parts, _USUAL_SHARED_MEMORY),
        mig_profile=mig_profile,
        triton_version=triton.__version__,
        environment=Environment(driver="", ptxas=ptxas_version(10 * parts[0] + parts[1]), torch=str(torch.__version__)),
    )


def obstacle(problem: Problem) -> str | None:
    """Returns why trials of ``problem`` cannot be compiled again in this process, or None."""
    if problem.gpu_name == INTERPRETER:
        return "it is of Triton's interpreter, which compiles nothing"
    if interpreting():
        return "TRITON_INTERPRET is set: functions of Triton's interpreter cannot be compiled"
    return mismatch(problem, target(problem))


def remake(trial: Trial) -> Remade:
    """Compiles the config of ``trial`` for the GPU of its problem, or finds it in Triton's cache on disk.

    Raises AutotuneError when the rules refuse the config, it does not compile, or its spec shows no assembly. Ask
    ``obstacle`` first.
    """
    problem, device = trial.problem, target(trial.problem)
    spec = load(problem.spec)
    permit(spec, trial.kernel, trial.config, problem, device)
    with reported(f"{trial.kernel} {trial.config}"):
        compiled = spec.compile(trial.kernel, trial.config, problem, device)
    assembly = getattr(compiled, "assembly", None)
    if not assembly:
        raise AutotuneError(
            f"the spec {problem.spec} shows no assembly: what its compile returns needs an attribute `assembly` "
            "(autotune/spec.py says which)"
        )
    return Remade(compiled.binary, dict(compiled.stats), dict(assembly), device.environment)


def permit(spec: KernelSpec, kernel: str, config: Config, problem: Problem, device: DeviceInfo) -> None:
    """Raises AutotuneError unless the spec knows ``kernel`` and its rules let ``config`` run: rows are only data."""
    with reported(f"the spec {problem.spec}"):
        alternatives = getattr(spec, "alternatives", None)
        kernels = (*spec.kernels(problem), *(alternatives(problem) if alternatives else ()))
        reason = (
            spec.rejects(kernel, config, problem, device) if kernel in kernels else "the problem has no such kernel"
        )
    if reason is not None:
        raise AutotuneError(f"the rules refuse {kernel} {config} today: {reason}")


@contextlib.contextmanager
def reported(what: str) -> Iterator[None]:
    """Has whatever ``what`` raises in here come out as an AutotuneError that names it: a candidate may raise anything."""
    try:
        yield
    except AutotuneError:
        raise
    except Exception as error:
        raise AutotuneError(f"{what} failed: {summarize(error)}") from error
