"""Spaces for the tests: configs of a caller's own for the planted spec, good ones and things that are no configs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from autotune.device import DeviceInfo
from cache_db.models import Config, Problem
from tests.autotune.softmax_spec import softmax_config


class Unspeakable:
    """What cannot even be shown."""

    def __repr__(self) -> str:
        raise RuntimeError("planted: no text")


class Untold(Exception):
    """What is raised and cannot be told."""

    def __str__(self) -> str:
        raise ValueError("planted: no text")


def forward(kernel: str, problem: Problem, device: DeviceInfo) -> Iterator[Config]:
    """Yields for the forward: a new config, one of the spec's own, the new one again, a refused one, a wrong one."""
    if kernel == "forward":
        yield from (softmax_config(64), softmax_config(32), softmax_config(64), softmax_config(8))
        yield softmax_config(64, "zeroed_row")


def many(kernel: str, problem: Problem, device: DeviceInfo) -> list[Config]:
    """Returns more configs than the interpreter tries."""
    return [softmax_config(32 << step) for step in range(1, 7)]


def _config(**changes: Any) -> Config:
    values = {"implementation": "triton", "variant": "rows", "params": {"block": 64}}
    return Config.model_construct(**{**values, **changes})


def _endless(kernel: str, problem: Problem, device: DeviceInfo) -> Iterator[Config]:
    return (softmax_config(32 + step) for step in itertools.count())


def _failing(kernel: str, problem: Problem, device: DeviceInfo) -> Iterator[Config]:
    yield softmax_config(64)
    raise KeyError("planted")


def _untold(kernel: str, problem: Problem, device: DeviceInfo) -> list[Config]:
    raise Untold


def _leaving(kernel: str, problem: Problem, device: DeviceInfo) -> list[Config]:
    raise SystemExit(3)


def _leaving_late(kernel: str, problem: Problem, device: DeviceInfo) -> Iterator[Config]:
    yield softmax_config(64)
    raise SystemExit(3)


def _spoiling(kernel: str, problem: Problem, device: DeviceInfo) -> list[Config]:
    problem.fields["columns"] = 1
    return [softmax_config(64)]


def __getattr__(name: str) -> object:
    """Ends the program where ``at_import`` is asked for, and knows nothing else."""
    if name == "at_import":
        raise SystemExit(3)
    raise AttributeError(name)


listed = [("forward", softmax_config(64)), ("backward", softmax_config(128)), ["forward", softmax_config(256)]]
generated = (pair for pair in [("forward", softmax_config(64))])
empty: list[Any] = []

number = 7
text = "forward"
endless = _endless
failing = _failing
untold = _untold
leaving = _leaving
leaving_late = _leaving_late
spoiling = _spoiling
one_argument = len
returns_nothing = lambda kernel, problem, device: None  # noqa: E731
returns_dicts = lambda kernel, problem, device: [{"block": 64}]  # noqa: E731
returns_pairs = lambda kernel, problem, device: [(kernel, softmax_config(64))]  # noqa: E731
unspeakable = lambda kernel, problem, device: [Unspeakable()]  # noqa: E731
configs_alone = [softmax_config(64)]
unknown_kernel = [("sideways", softmax_config(64))]
kernel_is_no_text = [(3, softmax_config(64))]
other_implementation = [("forward", _config(implementation="cuda"))]
list_for_a_number = [("forward", _config(params={"block": [64]}))]
no_params = [("forward", _config(params=None))]
not_finite = [("forward", _config(params={"block": 64, "scale": float("nan")}))]
too_long_to_print = [("forward", _config(params={"block": 10**5000}))]
half_a_config = [("forward", Config.model_construct(implementation="triton"))]
