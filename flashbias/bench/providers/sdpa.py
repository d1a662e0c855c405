"""PyTorch's SDPA: on concatenated inputs, with the bias as a dense mask, and without it, by backend."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from flashbias.bench.inputs import Inputs
from flashbias.bench.providers.base import Forward, Provider, concatenated, nothing
from flashbias.bench.providers.dense import dense_bias
from flashbias.kernels.problem import Shape

_BACKENDS: Final[Mapping[str, SDPBackend | None]] = {
    "": None,
    "-cudnn": SDPBackend.CUDNN_ATTENTION,
    "-flash": SDPBackend.FLASH_ATTENTION,
    "-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "-math": SDPBackend.MATH,
}
# About: a dense bias and its gradient; where the scores themselves are formed, also those, P, dP and dS, in fp32.
_DENSE_MATRICES: Final = 3.0
# What torch says of backends that nobody asked for, and its headings.
_NO_REASONS: Final = ("not used because", "runtime disabled")
_MATH_MATRICES: Final = 14.0


def concat(inputs: Inputs) -> Tensor:
    """Returns O of SDPA on concatenated inputs, whatever backend is enabled."""
    q, k = concatenated(inputs)
    return _attend(q, k, inputs.v, 1.0, inputs.shape)


def concat_flash(inputs: Inputs) -> Tensor:
    """Returns O of SDPA's flash backend, which wants one head dim: v is padded to q's and the result cut."""
    q, k = concatenated(inputs)
    v = F.pad(inputs.v, (0, q.shape[3] - inputs.v.shape[3]))
    return _attend(q, k, v, 1.0, inputs.shape)[..., : inputs.v.shape[3]]


def dense(inputs: Inputs) -> Tensor:
    """Returns O of SDPA given the bias, and what the band hides, as one mask of all scores."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (inputs.q, inputs.k, inputs.v))
    more: dict[str, Any] = {"enable_gqa": True} if inputs.group > 1 else {}
    found = F.scaled_dot_product_attention(q, k, v, attn_mask=dense_bias(inputs), scale=inputs.scale, **more)
    return found.transpose(1, 2)


def without_bias(inputs: Inputs) -> Tensor:
    """Returns O of SDPA without the bias: not the same function, but the floor that a bias is measured against."""
    return _attend(inputs.q, inputs.k, inputs.v, inputs.scale, inputs.shape)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, shape: Shape) -> Tensor:
    """Returns O (B, S, H, D) under the causal bound of ``shape``."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    more: dict[str, Any] = {"enable_gqa": True} if shape.kv_heads != shape.nheads else {}
    if shape.causal == "bottom_right" and shape.seqlen_q > 1:  # one query sees all keys
        more["attn_mask"] = causal_lower_right(shape.seqlen_q, shape.seqlen_k)
    if shape.causal is True:
        more["is_causal"] = True
    return F.scaled_dot_product_attention(q, k, v, scale=scale, **more).transpose(1, 2)


def _no_window(inputs: Inputs) -> str:
    """Returns the reason against a window, which SDPA has only as a mask of all scores."""
    return "SDPA has no window" if inputs.shape.window != (-1, -1) else ""


def _takes_no_mask(_inputs: Inputs) -> str:
    return "SDPA's flash backend takes no mask"


def _with(run: Forward, backend: SDPBackend | None) -> Forward:
    def chosen(inputs: Inputs) -> Tensor:
        with _only(backend):
            return run(inputs)

    return run if backend is None else chosen


@contextmanager
def _only(backend: SDPBackend | None) -> Iterator[None]:
    """Allows one SDPA backend; where it refuses, what torch would only warn of is the error.

    Raises RuntimeError with the backend's own reasons.
    """
    assert backend is not None
    with warnings.catch_warnings(record=True) as told, sdpa_kernel(backend):
        warnings.simplefilter("always")
        try:
            yield
        except RuntimeError as error:
            lines = dict.fromkeys(str(each.message).partition(" (Triggered internally")[0] for each in told)
            reasons = [line for line in lines if not any(word in line for word in _NO_REASONS)]
            raise RuntimeError("; ".join(reasons) or str(error)) from error


def providers() -> Mapping[str, Provider]:
    """Returns SDPA's ways by name; the plain names leave the choice of backend to PyTorch."""
    found = {}
    for suffix, backend in _BACKENDS.items():
        if suffix != "-math":  # dense-math is the same work
            run = concat_flash if suffix == "-flash" else concat
            found[f"sdpa-concat{suffix}"] = Provider(_with(run, backend), _no_window)
    for suffix, backend in _BACKENDS.items():
        # Without a choice SDPA may form the scores.
        matrices = _MATH_MATRICES if suffix in {"", "-math"} else _DENSE_MATRICES
        refuses = _takes_no_mask if suffix == "-flash" else nothing
        found[f"sdpa-dense{suffix}"] = Provider(_with(dense, backend), refuses, matrices=matrices)
    found["sdpa-no-bias"] = Provider(without_bias, _no_window, floor=True)
    return found
