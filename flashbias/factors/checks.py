"""What the builders demand of their arguments."""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from flashbias.errors import ArgumentError


def count(name: str, value: object, least: int = 1) -> int:
    """Returns ``value`` as an int of at least ``least``; any other is an ArgumentError."""
    try:
        number = operator.index(value)  # type: ignore[arg-type] # what has no __index__ is the TypeError below
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or number < least:
        raise ArgumentError.explain(name, expected=f"an integer of at least {least}", got=repr(value)[:60])
    return number


def floats(name: str, value: object, layout: str, dims: tuple[int, ...]) -> Tensor:
    """Returns ``value`` if it is a dense float tensor of as many dims as one of ``dims``, none of size 0."""
    if not isinstance(value, Tensor):
        raise ArgumentError.explain(name, expected=f"a tensor {layout}", got=type(value).__name__)
    if not value.is_floating_point() or value.layout != torch.strided:
        got = f"{value.layout} of {value.dtype}".replace("torch.", "")
        raise ArgumentError.explain(name, expected="a dense float tensor", got=got, cure=f"Try {name}.float().")
    if value.dim() not in dims or value.numel() == 0:
        expected = f"{layout}, no size 0"
        raise ArgumentError.explain(name, expected=expected, got=f"shape {tuple(value.shape)}")
    return value


def finite(name: str, value: Tensor, cure: str = "") -> None:
    """Raises an ArgumentError if ``value`` holds an infinity or a NaN."""
    if not bool(torch.isfinite(value.detach()).all()):
        raise ArgumentError.explain(name, expected="finite values", got="infinities or NaN", cure=cure)


def same_device(name: str, value: Tensor, owner: str, other: Tensor) -> None:
    """Raises an ArgumentError unless ``value`` lies on the device of ``other``, which is called ``owner``."""
    if value.device != other.device:
        cure = f"Move it: {name}.to({owner}.device)."
        raise ArgumentError.explain(name, expected=f"{other.device} as {owner}", got=str(value.device), cure=cure)


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """Returns the dtype of factors made from ``tensors``: float64 if one of them is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
