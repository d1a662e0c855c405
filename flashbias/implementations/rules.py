"""Which foreign implementations compete for a problem, and the named rules that keep one from running."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from typing import Final

from autotune.device import DeviceInfo
from autotune.source import module_hash
from cache_db.models import Config, Problem, Scalar, digest
from flashbias import band
from flashbias.implementations import backend as protocol
from flashbias.implementations import flash4, foreign, joining, sdpa
from flashbias.implementations.backend import Backend
from flashbias.implementations.foreign import Foreign
from flashbias.implementations.identity import CUDNN, FLASH4, SDPA, identity
from flashbias.implementations.joining import columns_of

FORWARD: Final = "forward"
BACKWARD: Final = "backward"  # all passes of it at once
FOREIGN: Final = (SDPA, FLASH4)

_ON_GPU: Final[Mapping[tuple[str, str], Backend]] = {
    (SDPA, CUDNN): sdpa.CUDNN,
    (SDPA, "flash"): sdpa.FLASH,
    (SDPA, "efficient"): sdpa.EFFICIENT,
    (FLASH4, "plain"): flash4.PLAIN,
    (FLASH4, "padded"): flash4.PADDED,
}
_ON_CPU: Final[Mapping[tuple[str, str], Backend]] = {(SDPA, "flash"): sdpa.ON_CPU}
# The parts in which factors may have to be written, by a softmax_scale that the problem does not tell.
_MOST_PARTS: Final = 2
# Columns that a gradient of LSE adds to v.
_LSE_COLUMNS: Final = 2
_CODE_DIGITS: Final = 12
_IN_ANY_ORDER: Final = "its backward adds gradients in any order, and ours are promised to repeat bit for bit"


class NotHereError(OSError):
    """A foreign config of other versions than those here: no fault of its own, so no verdict that stays."""


def candidates(kernel: str, device: DeviceInfo) -> list[Config]:
    """Returns the foreign configs that are installed here and could compute ``kernel``."""
    if kernel not in (FORWARD, BACKWARD) or (device.index < 0 and not device.interpreted):
        return []
    found = []
    for (implementation, variant), backend in _backends(device).items():
        versions = _versions(implementation, variant, backend)
        if versions is not None:
            found.append(Config(implementation=implementation, variant=variant, params=versions))
    return found


def rejects(kernel: str, config: Config, problem: Problem, device: DeviceInfo) -> str | None:
    """Returns why the foreign ``config`` may not run ``kernel`` of ``problem`` here, or None."""
    if kernel not in (FORWARD, BACKWARD):
        return f"{config.implementation} computes the forward or the whole backward, not {kernel} alone"
    backend = _backends(device).get((config.implementation, config.variant))
    if backend is None:
        return f"unknown implementation {config.implementation}/{config.variant} on this device"
    reason = _of_problem(kernel, problem) or _of_widths(kernel, backend, problem) or _of_device(kernel, config, device)
    return reason or _of_versions(config, backend)


def compiled(config: Config, device: DeviceInfo) -> Foreign:
    """Returns what runs the foreign ``config``; imports nothing. Raises NotHereError for one of other versions."""
    backend = _backends(device).get((config.implementation, config.variant))
    reason = "there is no such variant" if backend is None else _of_versions(config, backend)
    if backend is None or reason is not None:
        raise NotHereError(f"{config.implementation}/{config.variant}: {reason}")
    return Foreign(backend, digest(config.model_dump()))


def _backends(device: DeviceInfo) -> Mapping[tuple[str, str], Backend]:
    return _ON_CPU if device.interpreted else _ON_GPU


def _of_problem(kernel: str, problem: Problem) -> str | None:
    """Returns what of the problem no foreign implementation can do, or only at the price that ours saves."""
    fields = problem.fields
    if fields["mask"] != "none":
        return "a mask would have to be joined with the bias to a matrix of all scores"
    if fields["varlen"]:
        return "packed sequences are not joined with their factors"
    if int(fields["gqa_group"]) > 1:
        return "grouped queries: k would be copied for every query head, to stand beside its factor"
    if fields["window"]:
        return "a window is no band that all of them know"
    if fields["precision"] != "default":
        return "no fp32 arithmetic of a promised precision"
    if fields["factor_dtype"] not in ("none", fields["dtype"]):
        return "factors of more precision than q's would be rounded to it"
    if kernel == BACKWARD and fields["factor_dtype"] == "float16":
        return "dq is rounded to fp16 before its scale is undone, which takes most of fp16's range from it"
    if problem.layout != "aligned":
        return "needs rows of whole, aligned 16-byte steps"
    return None


def _of_widths(kernel: str, backend: Backend, problem: Problem) -> str | None:
    """Returns why q and k with factors of any rank of the problem's, or v, are too wide."""
    fields = problem.fields
    columns = columns_of(int(fields["head_dim"]), int(fields["rank_dim"]), _MOST_PARTS)
    value_dim = int(fields["value_dim"]) + (_LSE_COLUMNS if kernel == BACKWARD else 0)
    return backend.limit(*backend.widths(columns, value_dim))


def _of_device(kernel: str, config: Config, device: DeviceInfo) -> str | None:
    if config.implementation == FLASH4 and device.capability[0] not in (9, 10, 11):
        return "flash-attn-4 needs compute capability 9, 10 or 11"
    if kernel == FORWARD or device.interpreted:
        return None
    if config.implementation == SDPA and config.variant != "efficient":
        return _IN_ANY_ORDER
    if config.implementation == FLASH4 and device.capability[0] == 9:
        return _IN_ANY_ORDER
    return None


def _of_versions(config: Config, backend: Backend) -> str | None:
    """Returns which versions are not those that ``config`` is of."""
    here = _versions(config.implementation, config.variant, backend)
    if here is None:
        return f"{config.implementation}/{config.variant} is not installed here"
    for name in sorted(config.params.keys() | here.keys()):
        if config.params.get(name) != here.get(name):
            return f"it is of {name} {config.params.get(name)}, here {here.get(name)}"
    return None


def _versions(implementation: str, variant: str, backend: Backend) -> dict[str, Scalar] | None:
    """Returns the versions here, and a hash of our own code between the caller and the backend."""
    found = identity(implementation, variant)
    return None if found is None else {**found, "code": _code(type(backend), tuple(sorted(vars(backend).items())))}


@functools.cache
def _code(kind: type[Backend], facts: tuple[tuple[str, object], ...]) -> str:
    """Returns the hash of all our code that a backend of this ``kind`` runs through, and of its own ``facts``."""
    modules = (band, joining, foreign, protocol, sys.modules[kind.__module__])
    return module_hash(modules, {"kind": kind.__qualname__, **dict(facts)})[:_CODE_DIGITS]
