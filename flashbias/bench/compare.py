"""Times and checks every provider on one shape: forward and backward apart, in interleaved runs with a cold L2."""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from autotune.device import describe
from autotune.turns import turn
from flashbias.bench import memory, times
from flashbias.bench.inputs import Inputs, make, work
from flashbias.bench.judge import Truth
from flashbias.bench.providers import Provider
from flashbias.bench.results import Result, Row
from flashbias.bench.times import Launch
from flashbias.errors import FlashBiasError
from flashbias.kernels.problem import Shape

_BACKWARD_WORK: Final = 2.5
_Found = TypeVar("_Found")


class DeviceLost(FlashBiasError):
    """A provider made the GPU unusable for this process; ``provider`` and ``shape`` say which and where."""

    def __init__(self, provider: str, shape: Shape, reason: str) -> None:
        super().__init__(
            f"{provider} made the GPU unusable for this process ({reason}); nothing can be measured any more"
        )
        self.provider, self.shape = provider, shape


def compare(
    shape: Shape,
    providers: Mapping[str, Provider],
    rounds: int,
    device: torch.device,
    *,
    crashed: Collection[str] = (),
    notice: Callable[[str], None] = lambda _: None,
) -> Result:
    """Runs every provider on ``shape``; one that cannot run it is a row that says why.

    ``crashed`` names those that are known to kill the process; ``notice`` is told what is being done. Raises DeviceLost
    when the GPU cannot be used any more. With ``rounds`` 0 nothing is timed.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # it gives up on a function that saw too many shapes
    inputs = make(shape, 0, device)
    notice("oracle")
    truths = {floor: Truth.of(inputs, biased=not floor) for floor in {each.floor for each in providers.values()}}
    rows = {}
    for name, provider in providers.items():
        notice(name)
        row = rows[name] = Row(name, provider.own, provider.floor)
        row.missing = "killed the process that ran it here before" if name in crashed else _missing(provider, inputs)
        if not row.missing:
            _try(row, provider, inputs, truths[provider.floor])
            _check_device(row, shape, device)
    judged = "; ".join(sorted({truth.judged for truth in truths.values()}))
    if rounds:
        runs = _ready(rows, providers, inputs, truths, notice)
        del truths
        notice("times")
        with turn(describe(device.index or 0).uuid if device.type == "cuda" else ""), _kept_buffers():
            _time(rows, runs, inputs, rounds, device)
    return Result(shape, tuple(rows.values()), judged=judged)


def _ready(
    rows: Mapping[str, Row],
    providers: Mapping[str, Provider],
    inputs: Inputs,
    truths: Mapping[bool, Truth],
    notice: Callable[[str], None],
) -> dict[str, Provider]:
    """Returns the providers to be timed: those that ran, once they did so without gradients too, and were judged there.

    That is another problem, which may run other code: a first call may tune, and wait for the turn on the GPU.
    """
    found, device = {}, inputs.q.device
    for name, row in rows.items():
        if row.missing:
            continue
        notice(f"{name} without gradients")
        out, row.missing = _attempt(lambda name=name: _without_gradients(providers[name], inputs), device)  # type: ignore[misc]
        if out is not None:
            found[name] = providers[name]
            _judge_again(row, out, inputs, truths[row.floor])
        _check_device(row, inputs.shape, device)
    return found


def _judge_again(row: Row, out: Tensor, inputs: Inputs, truth: Truth) -> None:
    """Judges the forward by the worse of its results, with gradients to come and without."""
    error, before = truth.errors({"out": out}, inputs)["out"], row.errors["out"]
    row.errors["out"] = None if error is None or before is None else max(error, before)
    row.right_forward = truth.right([row.errors["out"]])


def _missing(provider: Provider, inputs: Inputs) -> str:
    """Returns why the provider does not run here, "" if it may."""
    return provider.refuses(inputs) or memory.too_much(provider, inputs) or provider.rehearse(inputs)


def _try(row: Row, provider: Provider, inputs: Inputs, truth: Truth) -> None:
    """Calls forward and backward for the first time, and judges what comes out. A backward that fails leaves the forward."""
    device = inputs.q.device
    out, reason = _attempt(lambda: provider.run(inputs), device)
    if out is None and inputs.leaves:
        row.missing_backward = reason
        out, reason = _attempt(lambda: _without_gradients(provider, inputs), device)
    if out is None:
        row.missing, row.missing_backward = reason, ""
        return
    row.errors = truth.errors({"out": out.detach()}, inputs)
    row.right_forward = truth.right([*row.errors.values()])
    if inputs.leaves and not row.missing_backward:
        wanted = inputs.wanted if not row.floor else {n: t for n, t in inputs.wanted.items() if "bias" not in n}
        gradients, row.missing_backward = _attempt(lambda: _gradients(out, [*wanted.values()], inputs.dout), device)
        if gradients is not None:
            found = {f"d{name}": value for name, value in zip(wanted, gradients, strict=True)}
            row.errors |= truth.errors(found, inputs)
            row.right_backward = truth.right([*row.errors.values()])
    chosen, _ = _attempt(lambda: provider.chosen(inputs), device)
    row.configs = chosen or {}


def _without_gradients(provider: Provider, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return provider.run(inputs.detached())


def _attempt(call: Callable[[], _Found], device: torch.device) -> tuple[_Found | None, str]:
    """Returns what ``call`` gives once its kernels have ended, or None and the reason."""
    try:
        with _kept_buffers():
            found = call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return found, ""
    except Exception as error:  # noqa: BLE001 - whatever a peer raises is what its row says
        full = isinstance(error, torch.OutOfMemoryError)
        told = _told(error)
    if full:
        gc.collect()  # frames that hold each other hold what filled the memory
    return None, told


def _told(error: Exception) -> str:
    """Returns an error in a line: its kind and first words, or for lack of words the line that raised it."""
    words = str(error).strip().partition("\n")[0]
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {words or place.line or place.name}"


def _check_device(row: Row, shape: Shape, device: torch.device) -> None:
    """Raises DeviceLost when what ``row``'s provider launched ended this process's use of the GPU."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError as error:
        raise DeviceLost(row.provider, shape, str(error).partition("\n")[0]) from error


def _kept_buffers() -> Any:
    """Has torch.compile keep what a backward reads: it is run again and again on one graph."""
    import torch._functorch.config as functorch

    return functorch.patch(donated_buffer=False)


def _gradients(out: Tensor, leaves: list[Tensor], dout: Tensor, *, keep: bool = False) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(out, leaves, dout, retain_graph=keep, allow_unused=True)


def _time(
    rows: dict[str, Row], runs: Mapping[str, Provider], inputs: Inputs, rounds: int, device: torch.device
) -> None:
    """Fills in the figures; a provider's backward is timed alone, on a graph that is kept."""
    useful = work(inputs.shape)
    with torch.no_grad():
        plain = inputs.detached()
        forwards = {name: (lambda run=provider.run: run(plain)) for name, provider in runs.items()}
        for name, timing in times.timings(forwards, rounds, device, useful).items():
            rows[name].forward = timing
    if not inputs.leaves:
        return

    def build(name: str) -> Launch:
        out = runs[name].run(inputs)
        return lambda: _drop(_gradients(out, inputs.leaves, inputs.dout, keep=True))

    held = {name: provider.bytes(inputs) for name, provider in runs.items() if not rows[name].missing_backward}
    parts = times.groups(held, memory.free(device))
    found = times.in_groups(parts, build, rounds, device, _BACKWARD_WORK * useful)
    for name in held:
        rows[name].backward = found.get(name)
        if name not in found:
            rows[name].missing_backward = "ran out of memory when it was timed"


def _drop(_value: object) -> None:
    """Lets go of ``_value``."""
