"""``flashbias.explain``: which configuration a call runs, why, and how it is known to be right; nothing is launched or tuned.

What is decided is asked of :mod:`autotune.explanation`; here calls become problems, and answers words.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, cast

import torch
from torch import Tensor

from autotune import explanation, tuner
from autotune.device import DeviceInfo, describe, interpreting
from autotune.settings import Mode, Settings
from cache_db.errors import CacheError
from cache_db.layers import FILE_NAME
from cache_db.memory import Memory
from cache_db.models import Problem, Winner
from cache_db.seeds import Seeds
from flashbias import plans, validation
from flashbias.band import Band, band
from flashbias.explained import RUNGS, Explanation
from flashbias.implementations import rules
from flashbias.kernels.factors import is_aligned
from flashbias.kernels.problem import MAX_HEAD_DIM, Shape
from flashbias.kernels.problem import problem as problem_of
from flashbias.kernels.space import IMPLEMENTATION
from flashbias.launcher import for_kernels
from flashbias.plans import has_kernels, shape_of
from flashbias.precision import Precision, chosen
from flashbias.reference import Wanted
from flashbias.settings import current

if TYPE_CHECKING:
    from cache_db import Layers
    from cache_db.store import Store

_READS: Final = frozenset({"trials", "verifications", "lifts", "winners", "pins", "neighbours", "nearest", "holder"})


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool | Literal["bottom_right"] = False,
    softmax_scale: float | None = None,
    *,
    window_size: tuple[int, int] = (-1, -1),
    return_lse: bool = False,
    deterministic: bool | None = None,
    dropout_p: float = 0.0,
    precision: Precision | None = None,
) -> Explanation:
    """Returns what :func:`flashbias.flash_bias_func` would run with these very arguments, here and now, and why.

    The arguments are that function's, with its shapes, dtypes and errors; which gradients are wanted is taken from
    ``requires_grad`` and the grad mode, as there. Nothing is launched, tuned or written, and no database is made.

    Raises:
        ArgumentError: an argument has a wrong type, shape, dtype, device or value (it is a ValueError).
        UnsupportedError: a sensible call that this version cannot compute (it is a NotImplementedError).

    """
    validation.check_inputs(q, k, v)
    validation.check_factors(q, k, q_bias, k_bias)
    if mask is not None:
        mask = validation.checked_mask(mask, q, k)
    validation.check_switches(return_lse, deterministic, dropout_p)
    seen = band(validation.causal(causal), validation.window(window_size), q.shape[1], k.shape[1])
    validation.scale(softmax_scale, q)
    arithmetic = chosen(precision, q)
    if not has_kernels(q, k, v, q_bias, arithmetic):
        return Explanation(_without_kernels(q, k, v, arithmetic))
    recording = torch.is_grad_enabled()
    wants = [recording and each is not None and each.requires_grad for each in (q, k, v, q_bias, k_bias, mask)]
    aligned = all(_aligned(each) for each in (q, k, v))
    shape = shape_of(q, k, v, q_bias, mask, for_kernels(cast("Wanted", tuple(wants)), mask), aligned, arithmetic, None)
    device = describe(q.get_device())
    seen = seen.within(q.shape[1], k.shape[1])
    found, settings = problem_of(shape, device, seen), current()
    answer = explain_problem(found, device, settings)
    if _suits(answer, seen, q.shape[1], k.shape[1]) or not settings.allows(IMPLEMENTATION):
        return answer
    ours = explain_problem(found, device, plans.ours_alone(settings))
    raises = ours.found is not None and ours.found.doing is explanation.Doing.RAISE
    return answer if raises or ours.rung == RUNGS[0] else ours


def explain_shape(shape: Shape, device: DeviceInfo) -> Explanation:
    """Returns what a call of this shape would run on ``device``, and why, under the settings in force."""
    return explain_problem(problem_of(shape, device), device)


def explain_problem(problem: Problem, device: DeviceInfo, settings: Settings | None = None) -> Explanation:
    """Returns what calls of ``problem`` run on ``device``, and why, under ``settings``, else those in force."""
    settings = settings or current()
    refusal = plans.refusal(problem, device, settings)
    if refusal is not None:
        return Explanation(refusal)
    try:
        found = explanation.explain(problem, device, settings, _reader(settings))
    except CacheError as error:  # it broke while it was read: calls go on in memory
        empty = _read_only(Memory(), f"memory, for the database cannot be read: {error}")
        found = explanation.explain(problem, device, settings, empty)
    return Explanation(found.reason, found)


def _suits(answer: Explanation, seen: Band, seqlen_q: int, seqlen_k: int) -> bool:
    """Returns whether what ``answer`` tells of is what such a call runs, as :meth:`flashbias.plans.Plan.suits` has it."""
    if answer.found is None:
        return True
    configs = (each.choice.config for each in answer.found.answers)
    foreign = [rules.compiled(each, answer.found.device) for each in configs if each.implementation in rules.FOREIGN]
    return all(each.suits(seen, seqlen_q, seqlen_k) for each in foreign)


class _ReadOnly:
    """The reading half of ``Layers``, over one database or this process's memory; ``location`` is for messages."""

    def __init__(self, rows: Store | Memory, location: str, seeds: Sequence[Path] = ()) -> None:
        self._rows = rows
        self._seeds = Seeds(seeds)
        self.location = location

    def winners(self, problem: Problem) -> dict[str, Winner]:
        """Returns kernel -> winner; those of seeds fill gaps."""
        return {kernel: row for kernel, (_, row) in self._seeds.winners(problem).items()} | self._rows.winners(problem)

    def __getattr__(self, name: str) -> Any:
        if name not in _READS:
            raise AttributeError(f"{name} is not for reading", name=name)
        return getattr(self._rows, name)


def _read_only(rows: Store | Memory, location: str, seeds: Sequence[Path] = ()) -> Layers:
    return cast("Layers", _ReadOnly(rows, location, seeds))


def _reader(settings: Settings) -> Layers:
    """Returns the database of ``settings``, only to be read; none is made, mended or moved aside."""
    opened = tuner.opened(settings)
    if opened is not None:
        return opened
    if settings.mode is Mode.OFF or settings.cache_dir is None:
        return _read_only(Memory(), "memory")
    path = settings.cache_dir / FILE_NAME
    try:
        if not path.stat().st_size:
            return _read_only(Memory(), f"{path}, which is empty", settings.seeds)
    except OSError:
        return _read_only(Memory(), f"{path}, which is not there", settings.seeds)
    from cache_db.own import open_own

    return _read_only(open_own(path), str(path), settings.seeds)


def _aligned(tensor: Tensor) -> bool:
    """Returns whether kernels see ``tensor``, or the copy that rows with gaps are given, on 16-byte steps."""
    return is_aligned(tensor) if tensor.stride(3) == 1 else tensor.shape[3] * tensor.element_size() % 16 == 0


def _without_kernels(q: Tensor, k: Tensor, v: Tensor, precision: str) -> str:
    """Returns why ``has_kernels`` says no."""
    if 0 in (*q.shape, *k.shape, *v.shape):
        return "a dim is empty, so there is nothing for a kernel to do"
    if q.device.type != "cuda" and not (q.device.type == "cpu" and interpreting()):
        return f"the tensors are on {q.device.type}, and kernels run on CUDA devices"
    if q.dtype == torch.float64 or (q.dtype == torch.float32) != (precision != "default"):
        return f"there is no kernel for {str(q.dtype).removeprefix('torch.')} here"
    if max(q.shape[3], v.shape[3]) > MAX_HEAD_DIM:
        return f"head dims above {MAX_HEAD_DIM} have no kernel"
    if q.device.type == "cuda" and torch.version.hip is None:
        major, minor = describe(q.get_device()).capability
        return f"{describe(q.get_device()).name} has compute capability {major}.{minor}, and kernels need 8.0"
    return "this version has no kernel for such tensors"
