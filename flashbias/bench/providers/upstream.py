"""Triton kernels from a folder the user names: upstream FlashBias's, and the dense-bias one it descends from.

The folder is that of thuml/FlashBias called ``flash_bias``. Nothing of it is part of this package. Its autotuner may meet
candidates that end a process's use of the GPU, so on a GPU a child process tunes first (:mod:`flashbias.bench.rehearsal`), and
what it chose is taken over: no kernel is swept here.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from torch import Tensor

from flashbias.bench.inputs import Inputs
from flashbias.bench.providers.base import Forward, Provider, for_each_head, needs_16_bits
from flashbias.bench.providers.dense import dense_bias
from flashbias.errors import ArgumentError

# Each provider's file and the function in it that takes (q, k, v, ...).
_FILES: Final = {"upstream": "flash_bias_triton.py", "upstream-dense": "flash_attn_triton.py"}
_CLASSES: Final = {"upstream": "FlashBiasFunc", "upstream-dense": "FlashAttnFunc"}
# The dense one's bias, its gradient, and one copy.
_DENSE_MATRICES: Final = 3.0
NO_FOLDER: Final = "needs --upstream FOLDER"
Tuned = list[tuple[str, list[Any], dict[str, Any]]]


@dataclass(frozen=True)
class Upstream:
    """One of the two modules, loaded from the user's folder."""

    name: str
    module: ModuleType
    apply: Callable[..., Tensor]

    @property
    def tuned(self) -> Tuned:
        """What the module's autotuners chose so far: kernel, key and config, as plain data."""
        return [
            (kernel, list(key), config.all_kwargs())
            for kernel, tuner in self._tuners()
            for key, config in tuner.cache.items()
        ]

    def take_over(self, tuned: Tuned) -> None:
        """Has the module's autotuners run what another process's chose."""
        tuners = dict(self._tuners())
        for kernel, key, chosen in tuned:
            for config in tuners[kernel].configs:
                if config.all_kwargs() == chosen:
                    tuners[kernel].cache[tuple(key)] = config

    def chosen(self) -> dict[str, str]:
        """Returns the config of each kernel that its autotuner used last."""
        return {
            kernel: str(config)
            for kernel, tuner in self._tuners()
            if (config := getattr(tuner, "best_config", None)) is not None
        }

    def _tuners(self) -> Iterator[tuple[str, Any]]:
        from triton.runtime.autotuner import Autotuner

        for name, value in vars(self.module).items():
            if isinstance(value, Autotuner):
                yield name, value


def load(name: str, folder: Path) -> Upstream:
    """Returns the module behind the provider ``name``.

    Raises ArgumentError when the folder has no such file, or the file is not what it should be.
    """
    path = folder / _FILES[name]
    cure = "Give the folder flash_bias of a clone of thuml/FlashBias."
    if not path.is_file():
        raise ArgumentError.explain("--upstream", expected=f"a folder with {path.name}", got=str(folder), cure=cure)
    return _loaded(name, path.resolve(), path.stat().st_mtime_ns)


@functools.cache
def _loaded(name: str, path: Path, _written: int) -> Upstream:
    specification = importlib.util.spec_from_file_location(f"flashbias_benchmark_{path.stem}", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    before = sys.modules.get(path.stem)
    sys.modules[path.stem] = module  # a file may import itself, by its own name
    try:
        specification.loader.exec_module(module)
        apply = getattr(module, _CLASSES[name]).apply
    except Exception as error:
        raise ArgumentError(f"--upstream: {path} cannot be used: {type(error).__name__}: {error}") from error
    finally:
        del sys.modules[path.stem]
        if before is not None:
            sys.modules[path.stem] = before
    return Upstream(name, module, apply)


def digests(folder: Path | None) -> dict[str, str]:
    """Returns the first digits of each file's SHA-256, for the record of what was measured."""
    paths = [] if folder is None else [folder / name for name in _FILES.values() if (folder / name).is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in paths}


def _biased(inputs: Inputs, module: Upstream) -> Tensor:
    k, v = for_each_head(inputs.k, inputs), for_each_head(inputs.v, inputs)
    k_bias = None if inputs.k_bias is None else for_each_head(inputs.k_bias, inputs)
    return module.apply(inputs.q, k, v, inputs.q_bias, k_bias, None, bool(inputs.shape.causal), inputs.scale)


def _dense(inputs: Inputs, module: Upstream) -> Tensor:
    k, v = for_each_head(inputs.k, inputs), for_each_head(inputs.v, inputs)
    causal = bool(inputs.shape.causal)
    bias = dense_bias(inputs, banded=False)
    return module.apply(inputs.q, k, v, bias, causal, inputs.scale)


def _refuses(inputs: Inputs) -> str:
    shape = inputs.shape
    if shape.window != (-1, -1):
        return "upstream has no window"
    if shape.causal == "bottom_right" and shape.seqlen_q != shape.seqlen_k:
        return "upstream's causal bound is aligned top-left only"
    if (shape.value_dim or shape.headdim) != shape.headdim or shape.headdim > 128:
        return "upstream has one head dim for q, k and v, at most 128"
    return needs_16_bits(inputs)


def providers(folder: Path | None) -> Mapping[str, Provider]:
    """Returns the two by name; without a folder they say that they need one."""
    ways: dict[str, tuple[Callable[[Inputs, Upstream], Tensor], float]] = {
        "upstream": (_biased, 0.0),
        "upstream-dense": (_dense, _DENSE_MATRICES),
    }
    if folder is None:
        return {name: Provider(_absent, lambda _: NO_FOLDER) for name in ways}
    return {name: _provider(name, run, matrices, folder) for name, (run, matrices) in ways.items()}


def _absent(_inputs: Inputs) -> Tensor:
    raise ArgumentError("upstream: no folder was given")


def _provider(name: str, run: Callable[[Inputs, Upstream], Tensor], matrices: float, folder: Path) -> Provider:
    module = load(name, folder)
    forward: Forward = lambda inputs: run(inputs, module)  # noqa: E731 - typed

    def rehearse(inputs: Inputs) -> str:
        from flashbias.bench.rehearsal import rehearsed

        if inputs.q.device.type != "cuda":
            return ""
        found = rehearsed(name, folder, inputs.shape, inputs.q.get_device())
        module.take_over(found.tuned)
        return found.reason

    return Provider(forward, _refuses, rehearse, matrices, chosen=lambda _: module.chosen())
