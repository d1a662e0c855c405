"""Candidates of the caller's own: a *space*, named ``module:attribute``, whose configs join a spec's.

A space is a callable ``(kernel, problem, device) -> iterable of Config``, or an iterable of (kernel, Config). It is
imported here, in the caller's process, and never in a child: children get configs as data. What it gives is only
proposed: the spec's rules decide on each config, and the gate on each that they allow.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

from autotune.device import DeviceInfo
from autotune.errors import SettingsError
from autotune.spec import KernelSpec, load
from cache_db.models import Config, Problem

MOST: Final = 10_000  # configs of one space: an endless generator ends in a message, not in the memory
_ANYTHING: Final = (Exception, SystemExit)  # a script that is imported as a module may want to end the program

logger = logging.getLogger(__name__)

Pair = tuple[str, Config]
Space = Callable[[str, Problem, DeviceInfo], Iterable[Config]] | tuple[Any, ...]


@dataclass(frozen=True)
class Offer:
    """What a space has for one kernel of one problem: configs that the rules allow, and those refused, with reasons."""

    configs: tuple[Config, ...]
    refused: tuple[tuple[Config, str], ...]


@functools.cache
def load_space(path: str) -> Space:
    """Imports the space named ``module:attribute``; an iterable is read here, once, for it may be a generator.

    Raises SettingsError when there is none, or when it is neither callable nor iterable.
    """
    module_name, _, attribute = path.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except _ANYTHING as error:  # it is the user's module, which may raise anything
        raise SettingsError(
            f"space {path!r}: expected a module that this process can import, with that attribute, got {_told(error)}. "
            "A script's or an installed command's import path has no working directory: name the module's folder in "
            "PYTHONPATH"
        ) from error
    if callable(found):
        space: Space = found
        return space
    if isinstance(found, str) or not hasattr(found, "__iter__"):
        raise _wrong(path, "a callable (kernel, problem, device) or an iterable of (kernel, Config)", _shown(found))
    return tuple(_read(path, found))


@functools.lru_cache(maxsize=4096)
def offer(path: str, kernel: str, problem: Problem, device: DeviceInfo) -> Offer:
    """Returns what the space at ``path`` has for ``kernel``, each config once, in its order; asked once a process.

    Raises SettingsError, with what was expected and what came, when anything it gives is no config, or one of a kernel
    or an implementation that the problem's spec does not know.
    """
    spec, space = load(problem.spec), load_space(path)
    if callable(space):
        found = [_config(path, each) for each in _called(path, space, kernel, problem, device)]
    else:
        known = getattr(spec, "every_kernel", None) or spec.kernels(problem)
        pairs = [_pair(path, each, known) for each in space]
        found = [config for name, config in pairs if name == kernel]
    implementations = _implementations(spec, problem, device)
    for config in found:
        if config.implementation not in implementations:
            expected = f"configs of implementation {', '.join(sorted(implementations))}"
            raise _wrong(path, expected, f"{config.implementation!r} in {config}")
    reasons = {config: spec.rejects(kernel, config, problem, device) for config in dict.fromkeys(found)}
    refused = tuple((config, reason) for config, reason in reasons.items() if reason is not None)
    for config, reason in refused:
        logger.debug("space %s: %s %s is refused: %s", path, kernel, config, reason)
    return Offer(tuple(config for config, reason in reasons.items() if reason is None), refused)


def check(path: str, problem: Problem, device: DeviceInfo) -> None:
    """Asks the space at ``path`` for all kernels of ``problem``; raises SettingsError when anything of it is wrong."""
    for kernel in load(problem.spec).kernels(problem):
        offer(path, kernel, problem, device)


def forget() -> None:
    """Forgets what spaces gave, so that they are asked again."""
    load_space.cache_clear()
    offer.cache_clear()


def _called(path: str, space: Callable[..., Any], kernel: str, problem: Problem, device: DeviceInfo) -> list[Any]:
    """Returns what ``space`` has for ``kernel``; it is handed a copy of ``problem``, which it may spoil."""
    try:
        found = iter(space(kernel, problem.model_copy(deep=True), device))
    except _ANYTHING as error:  # it is the user's function, which may raise anything
        raise _wrong(path, f"an iterable of Config for kernel {kernel!r}", _told(error)) from error
    return _read(path, found)


def _read(path: str, found: Iterable[Any]) -> list[Any]:
    """Returns what ``found`` holds, with its own errors as SettingsError."""
    try:
        read = list(islice(found, MOST + 1))
    except _ANYTHING as error:  # it is the user's generator, which may raise anything
        raise _wrong(path, "configs", _told(error)) from error
    if len(read) > MOST:
        raise _wrong(path, f"{MOST} configs at most", "more")
    return read


def _pair(path: str, each: Any, known: Iterable[str]) -> Pair:
    if not isinstance(each, tuple | list) or len(each) != 2:
        raise _wrong(path, "pairs (kernel, Config)", _shown(each))
    kernel, config = each
    if not isinstance(kernel, str) or kernel not in known:
        raise _wrong(path, f"a kernel among {', '.join(known)}", _shown(kernel))
    return kernel, _config(path, config)


def _config(path: str, each: Any) -> Config:
    """Returns ``each`` validated anew: a Config can be built around its own checks, and hold what has no name."""
    expected = "a Config(implementation=str, variant=str, params={name: finite number, flag or text})"
    if not isinstance(each, Config):
        raise _wrong(path, expected, _shown(each))
    try:
        config = Config(implementation=each.implementation, variant=each.variant, params=each.params)
        config.hash  # noqa: B018 - what is not finite has no canonical JSON
    except (ValueError, AttributeError) as error:
        raise _wrong(path, expected, _told(error)) from error
    return config


def _implementations(spec: KernelSpec, problem: Problem, device: DeviceInfo) -> frozenset[str]:
    """Returns the implementations among which the spec itself chooses, for any kernel of ``problem``."""
    configs: list[Config] = []
    for kernel in spec.kernels(problem):
        configs += [*spec.candidates(kernel, problem, device), spec.default(kernel, problem, device)]
    return frozenset(config.implementation for config in configs)


def _wrong(path: str, expected: str, got: str) -> SettingsError:
    return SettingsError(f"space {path!r}: expected {expected}, got {got}")


def _told(error: BaseException) -> str:
    """Returns ``error`` for a message, as one line; a stranger's may have no text at all."""
    try:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    except Exception:  # noqa: BLE001 - its __str__ may raise anything
        return f"{type(error).__name__}, which has no text"


def _shown(value: object) -> str:
    """Returns ``value`` for a message; a stranger's may be long, or have no text at all."""
    try:
        return f"{repr(value)[:200]} ({type(value).__name__})"
    except Exception:  # noqa: BLE001 - its __repr__ may raise anything
        return f"a {type(value).__name__}"
