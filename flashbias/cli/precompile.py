"""Filling Triton's cache on disk: with what was tuned elsewhere, on a node with or without a GPU."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Final

import triton

from autotune import AutotuneError, DeviceInfo
from autotune.messages import summary
from autotune.place import INTERPRETER
from autotune.remake import gpu, permit, reported, target
from autotune.spec import load
from cache_db.models import Config, Problem, Winner
from flashbias.errors import ArgumentError
from flashbias.kernels.problem import SPEC, Shape
from flashbias.kernels.problem import problem as problem_of

if TYPE_CHECKING:
    from cache_db.address import Address

Item = tuple[Problem, str, Config]
"""A problem, one of its kernels, and the config to compile it with."""

_LARGE: Final = 132  # multiprocessors of a GPU of which only the architecture is known
_TARGET: Final = re.compile(r"sm_?(\d{1,2})(\d)")


def capability(text: str) -> str:
    """Returns the compute capability that ``text``, "sm_90" or "sm90", names, as rows have it: "9.0". Raises ArgumentError."""
    found = _TARGET.fullmatch(text.strip().lower())
    if found is None:
        raise ArgumentError(f"--target: expected an architecture as sm_90, got {text!r}")
    return f"{found[1]}.{found[2]}"


def compile_here(problem: Problem, configs: Mapping[str, Config], device: DeviceInfo) -> str:
    """Compiles ``configs`` of ``problem``'s kernels for ``device``, or finds them in the cache; returns what failed, or ""."""
    spec = load(problem.spec)
    for kernel, config in configs.items():
        try:
            with reported(f"{kernel} {config}"):
                spec.compile(kernel, config, problem, device)
        except AutotuneError as error:
            return str(error)
    return ""


def winners(path: Path | None, address: Address | None) -> list[Winner]:
    """Returns every stored winner of attention, the server's at ``address`` and the file's. Raises CacheError."""
    from cache_db.store import Store

    stores = []
    if address is not None:
        stores.append(Store.connect(address))
    if path is not None and path.exists() and path.stat().st_size:
        stores.append(Store.open(path))
    rows = [row for store in stores for row in store.find(Winner) if row.problem.spec == SPEC]
    return list({(row.problem.key(row.kernel), row.config.hash): row for row in rows}.values())


def items(rows: Iterable[Winner], shapes: Sequence[Shape] | None, wanted: str | None) -> list[Item]:
    """Returns what to compile: today's winners among ``rows``, of ``shapes`` only where some are given.

    ``wanted`` is the only compute capability; for a shape that has no winner for it the default config stands in.
    """
    from flashbias.kernels.spec import source

    today = [row for row in rows if _is_todays(row.problem, source()) and wanted in (None, row.problem.capability)]
    if shapes is None:
        return [(row.problem, row.kernel, row.config) for row in today]
    gpus = {_gpu(row.problem): target(row.problem) for row in today}
    devices = list(gpus.values()) or ([gpu(f"sm_{wanted}", wanted, _LARGE)] if wanted else [])
    stored = {(row.problem, row.kernel): row.config for row in today}
    found: dict[Item, None] = {}
    for device in devices:
        for problem in dict.fromkeys(problem_of(shape, device) for shape in shapes):
            spec = load(problem.spec)
            for kernel in spec.kernels(problem):
                config = stored.get((problem, kernel)) or spec.default(kernel, problem, device)
                found[problem, kernel, config] = None
    return list(found)


def compiled(work: Sequence[Item], processes: int) -> Iterator[tuple[Item, str]]:
    """Yields each of ``work`` with what failed, or "", as it is compiled, ``processes`` at a time, in this order."""
    with ProcessPoolExecutor(max(1, min(processes, len(work))), mp_context=get_context("fork")) as pool:
        yield from zip(work, pool.map(_compile, work), strict=True)


def told(item: Item, fault: str) -> str:
    """Returns the line that tells of one compile."""
    problem, kernel, config = item
    return f"{kernel} {config} of {summary(problem)}: {f'FAILED: {fault}' if fault else 'compiled'}"


def _compile(item: Item) -> str:
    problem, kernel, config = item
    try:
        device = target(problem)
        permit(load(problem.spec), kernel, config, problem, device)
    except AutotuneError as error:
        return str(error)
    return compile_here(problem, {kernel: config}, device)


def _is_todays(problem: Problem, source_hash: str) -> bool:
    """Returns whether this version of the kernels and of Triton would run ``problem``'s winners."""
    here = (source_hash, triton.__version__)
    return (problem.source_hash, problem.triton_version) == here and problem.gpu_name != INTERPRETER


def _gpu(problem: Problem) -> tuple[str, str, int, str]:
    return problem.gpu_name, problem.capability, problem.sm_count, problem.mig_profile
