"""Ours: the tuned operator, the same with its default configs, and the same without a bias."""

from __future__ import annotations

import functools
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from autotune import resolve
from autotune.device import describe
from flashbias.api import flash_bias_func
from flashbias.bench.inputs import Inputs
from flashbias.bench.providers.base import Provider
from flashbias.kernels.problem import problem
from flashbias.settings import IMPLEMENTATIONS, current, settings

TRITON: Final = "triton"


def ours(inputs: Inputs) -> Tensor:
    """Returns O of the operator under the settings in force."""
    return _attend(inputs, inputs.q_bias, inputs.k_bias)


def without_bias(inputs: Inputs) -> Tensor:
    """Returns O of the operator without its bias."""
    return _attend(inputs, None, None)


def by_default(inputs: Inputs) -> Tensor:
    """Returns O of the operator with each kernel's default config."""
    with untuned():
        return ours(inputs)


def by_triton(inputs: Inputs) -> Tensor:
    """Returns O of the operator restricted to our own kernels."""
    with settings(implementations=(TRITON,)):
        return ours(inputs)


@contextmanager
def untuned() -> Iterator[None]:
    """Has calls run the default configs, quickly proven, whatever the user's database holds: it is not looked at.

    An empty database in mode "read" has nothing to offer but the ladder's default.
    """
    loud = logging.getLogger("autotune")
    level = loud.level
    with settings(mode="read", cache_dir=_empty_folder()):
        loud.setLevel(logging.ERROR)  # that nothing is tuned is meant here
        try:
            yield
        finally:
            loud.setLevel(level)


def _attend(inputs: Inputs, q_bias: Tensor | None, k_bias: Tensor | None) -> Tensor:
    shape = inputs.shape
    precision = None if shape.arithmetic == "default" else shape.arithmetic
    given = (inputs.q, inputs.k, inputs.v, q_bias, k_bias)
    return flash_bias_func(*given, causal=shape.causal, window_size=shape.window, precision=precision)


@functools.cache
def _empty_folder() -> Path:
    """Returns a folder of this process's own, which ends with it."""
    folder = tempfile.TemporaryDirectory(prefix="flashbias-benchmark-")
    _folders.append(folder)
    return Path(folder.name)


def _chosen(inputs: Inputs, how: Callable[[], AbstractContextManager[Any]], *, biased: bool = True) -> dict[str, str]:
    """Returns the config of each kernel under the settings of ``how``; "eager" where nothing proven may run."""
    if inputs.q.device.type != "cuda":
        return {}
    device = describe(inputs.q.get_device())
    changed = {} if biased else {"rank": 0, "factor_dtype": None}
    with how(), settings(mode="read"):
        found = resolve(problem(inputs.shape.model_copy(update=changed), device), device, current())
    if not found.choices:
        return {"all": "eager"}
    return {kernel: f"{choice.config} ({choice.rung})" for kernel, choice in found.choices.items()}


def _only_triton() -> AbstractContextManager[Any]:
    return settings(implementations=(TRITON,))


def providers() -> Mapping[str, Provider]:
    """Returns ours by name; the operator restricted to its own kernels only where it has others to choose from."""
    found = {"ours": Provider(ours, own=True, chosen=lambda inputs: _chosen(inputs, nullcontext))}
    if set(IMPLEMENTATIONS) != {TRITON}:
        found["ours-triton"] = Provider(by_triton, own=True, chosen=lambda inputs: _chosen(inputs, _only_triton))
    found["ours-default"] = Provider(by_default, own=True, chosen=lambda inputs: _chosen(inputs, untuned))
    found["ours-no-bias"] = Provider(
        without_bias, own=True, floor=True, chosen=lambda inputs: _chosen(inputs, nullcontext, biased=False)
    )
    return found


_folders: list[tempfile.TemporaryDirectory[str]] = []
