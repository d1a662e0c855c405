"""Ways to compute attention with a low-rank bias: ours, and PyTorch's SDPA on concatenated inputs.

softmax(q kᵀ·scale + q_bias k_biasᵀ) v is plain attention of [q·scale, q_bias] and [k, k_bias]. Concatenation counts as
part of a peer's time, because a caller has to do it; so does what it takes to bring factors to the dtype of q and k.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from flashbias.api import flash_bias_func
from flashbias.kernels.problem import GRADIENTS, Shape


@dataclass(frozen=True)
class Inputs:
    """One call's tensors: q, k, v and the factors (None without a bias), those of the shape requiring gradients; and dO."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_bias: Tensor | None
    k_bias: Tensor | None
    dout: Tensor
    shape: Shape

    @property
    def scale(self) -> float:
        """The softmax scale, 1/sqrt(headdim)."""
        return float(self.q.shape[3] ** -0.5)

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors that want gradients, none for a shape without."""
        given = (self.q, self.k, self.v, self.q_bias, self.k_bias)
        return [tensor for tensor in given if tensor is not None and tensor.requires_grad]


Forward = Callable[[Inputs], Tensor]


def make(shape: Shape, seed: int, device: torch.device) -> Inputs:
    """Returns normal random inputs; factors are scaled so that the bias has unit variance.

    k_bias has a head for each head of k, so that peers can put the two side by side.
    """
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, shape.dtype)

    def normal(rows: int, columns: int, factor: float = 1.0, heads: int = shape.nheads) -> Tensor:
        size = (shape.batch, rows, heads, columns)
        return torch.randn(size, generator=generator, device=device) * factor

    value_dim = shape.value_dim or shape.headdim
    q, k = normal(shape.seqlen_q, shape.headdim), normal(shape.seqlen_k, shape.headdim, heads=shape.kv_heads)
    v, dout = normal(shape.seqlen_k, value_dim, heads=shape.kv_heads), normal(shape.seqlen_q, value_dim)
    q, k, v, dout = (tensor.to(dtype) for tensor in (q, k, v, dout))
    factors: tuple[Tensor | None, Tensor | None] = (None, None)
    if shape.rank:
        size, kind = shape.rank**-0.25, getattr(torch, shape.factor_dtype or shape.dtype)
        q_bias = normal(shape.seqlen_q, shape.rank, size).to(kind)
        factors = (q_bias, normal(shape.seqlen_k, shape.rank, size, shape.kv_heads).to(kind))
    for name, tensor in zip(GRADIENTS, (q, k, v, *factors), strict=False):
        if tensor is not None:
            tensor.requires_grad_(name in shape.grads)
    return Inputs(q, k, v, *factors, dout, shape)


def ours(inputs: Inputs) -> Tensor:
    """Returns O of the tuned operator."""
    given = (inputs.q, inputs.k, inputs.v, inputs.q_bias, inputs.k_bias)
    shape = inputs.shape
    precision = None if shape.arithmetic == "default" else shape.arithmetic
    return flash_bias_func(*given, causal=shape.causal, window_size=shape.window, precision=precision)


def sdpa_concat(inputs: Inputs) -> Tensor:
    """Returns O of SDPA on concatenated inputs, whatever backend is enabled."""
    return _attend(*_concatenated(inputs), inputs.v.transpose(1, 2), 1.0, inputs.shape)


def sdpa_concat_flash(inputs: Inputs) -> Tensor:
    """Returns O of SDPA's flash backend, which wants one head dim: v is padded to q's and the result cut."""
    q, k = _concatenated(inputs)
    v = F.pad(inputs.v, (0, q.shape[3] - inputs.v.shape[3])).transpose(1, 2)
    with _only(SDPBackend.FLASH_ATTENTION):
        out = _attend(q, k, v, 1.0, inputs.shape)
    return out[..., : inputs.v.shape[3]]


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, shape: Shape) -> Tensor:
    """Returns O (B, S, H, D) of SDPA on (B, H, S, D) under the causal bound of ``shape``.

    Raises RuntimeError for a window: SDPA has none but as a mask of all scores.
    """
    if shape.window != (-1, -1):
        raise RuntimeError("SDPA has no window")
    more: dict[str, Any] = {"enable_gqa": True} if shape.kv_heads != shape.nheads else {}
    if shape.causal == "bottom_right" and shape.seqlen_q > 1:  # one query sees all keys
        more["attn_mask"] = causal_lower_right(shape.seqlen_q, shape.seqlen_k)
    if shape.causal is True:
        more["is_causal"] = True
    return F.scaled_dot_product_attention(q, k, v, scale=scale, **more).transpose(1, 2)


def _concatenated(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Returns [q·scale, q_bias] and [k, k_bias] as (B, H, S, columns), zero columns added up to a multiple of 8.

    SDPA's backends refuse other head dims.
    """
    q_parts, k_parts = [inputs.q * inputs.scale], [inputs.k]
    if inputs.q_bias is not None and inputs.k_bias is not None:
        q_parts.append(inputs.q_bias.to(inputs.q.dtype))
        k_parts.append(inputs.k_bias.to(inputs.k.dtype))
    room = -sum(part.shape[3] for part in q_parts) % 8
    if room:
        q_parts.append(inputs.q.new_zeros((*inputs.q.shape[:3], room)))
        k_parts.append(inputs.k.new_zeros((*inputs.k.shape[:3], room)))
    return torch.cat(q_parts, -1).transpose(1, 2), torch.cat(k_parts, -1).transpose(1, 2)


def sdpa_without_bias(inputs: Inputs) -> Tensor:
    """Returns O of SDPA without the bias: not the same function, but the floor that a bias is measured against."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (inputs.q, inputs.k, inputs.v))
    return _attend(q, k, v, inputs.scale, inputs.shape)


def _with(backend: SDPBackend) -> Forward:
    def run(inputs: Inputs) -> Tensor:
        with _only(backend):
            return sdpa_concat(inputs)

    return run


@contextmanager
def _only(backend: SDPBackend) -> Iterator[None]:
    """Allows one SDPA backend, without the warnings that explain why each of the others was not taken."""
    with warnings.catch_warnings(), sdpa_kernel(backend):
        warnings.simplefilter("ignore")
        yield


PROVIDERS: Final[Mapping[str, Forward]] = {
    "flashbias": ours,
    "SDPA concat cuDNN": _with(SDPBackend.CUDNN_ATTENTION),
    "SDPA concat flash": sdpa_concat_flash,
    "SDPA concat efficient": _with(SDPBackend.EFFICIENT_ATTENTION),
    "SDPA concat math": _with(SDPBackend.MATH),
    "SDPA without bias": sdpa_without_bias,
}
