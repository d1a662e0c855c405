"""Plain PyTorch with the bias as a matrix: written out, and the same through torch.compile."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from flashbias.bench.inputs import Inputs, seen
from flashbias.bench.providers.base import Provider, for_each_head

# Bias, scores, P, dP, dS and what a dtype conversion of one of them takes.
_MATRICES: Final = 6.0


def dense_bias(inputs: Inputs, *, banded: bool = True) -> Tensor | None:
    """Returns q_bias k_biasᵀ with -inf where the band hides a key, (B, H, Sq, Sk) in q's dtype; None if there is neither.

    Making it is part of a peer's time: the factors are what a caller has, and what wants gradients. Not ``banded`` is the
    bias alone.
    """
    hidden = seen(inputs.shape, inputs.q.device) if banded else None
    if inputs.q_bias is None or inputs.k_bias is None:
        if hidden is None:
            return None
        return inputs.q.new_zeros(hidden.shape).masked_fill(hidden.logical_not(), -torch.inf)
    bias = _product(inputs.q_bias, for_each_head(inputs.k_bias, inputs)).to(inputs.q.dtype)
    return bias if hidden is None else bias.masked_fill(hidden.logical_not(), -torch.inf)


def vanilla(inputs: Inputs) -> Tensor:
    """Returns O as a reader of the formula would write it."""
    return _attention(*_arguments(inputs))


def compiled(inputs: Inputs) -> Tensor:
    """Returns the same through torch.compile."""
    found: Tensor = _compiled(inputs.q.device.type)(*_arguments(inputs))
    return found


def _arguments(inputs: Inputs) -> tuple[Any, ...]:
    k, v = for_each_head(inputs.k, inputs), for_each_head(inputs.v, inputs)
    k_bias = None if inputs.k_bias is None else for_each_head(inputs.k_bias, inputs)
    return inputs.q, k, v, inputs.q_bias, k_bias, inputs.scale, seen(inputs.shape, inputs.q.device)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, q_bias: Tensor | None, k_bias: Tensor | None, scale: float, visible: Tensor | None
) -> Tensor:
    scores = _product(q, k) * scale
    if q_bias is not None and k_bias is not None:
        scores = scores + _product(q_bias, k_bias).to(q.dtype)
    if visible is not None:
        scores = scores.masked_fill(visible.logical_not(), -torch.inf)
    return torch.matmul(scores.softmax(-1), v.transpose(1, 2)).transpose(1, 2)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Returns left rightᵀ, heads first: (B, H, Sq, Sk) from (B, Sq, H, n) and (B, Sk, H, n)."""
    return torch.matmul(left.transpose(1, 2), right.permute(0, 2, 3, 1))


@functools.cache
def _compiled(device: str) -> Callable[..., Tensor]:
    return compile_for(_attention, device)


def compile_for(function: Callable[..., Tensor], device: str) -> Callable[..., Tensor]:
    """Returns ``function`` through torch.compile for one shape at a time; on a CPU it is traced, but not made into code."""
    made: Callable[..., Tensor] = torch.compile(
        function, dynamic=False, backend="inductor" if device == "cuda" else "aot_eager"
    )
    return made


def providers() -> Mapping[str, Provider]:
    """Returns the two by name."""
    return {
        "vanilla": Provider(vanilla, matrices=_MATRICES),
        "compile": Provider(compiled, matrices=_MATRICES),
    }
