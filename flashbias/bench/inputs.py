"""The inputs of one comparison, how many scores it has, and the useful work in them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from flashbias.band import EVERYTHING, Band
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
    def wanted(self) -> dict[str, Tensor]:
        """The tensors that want gradients by name, none for a shape without."""
        given = zip(GRADIENTS, (self.q, self.k, self.v, self.q_bias, self.k_bias), strict=False)
        return {name: tensor for name, tensor in given if tensor is not None and tensor.requires_grad}

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors that want gradients, none for a shape without."""
        return list(self.wanted.values())

    def detached(self) -> Inputs:
        """Returns the same numbers, none of which wants a gradient."""
        q_bias, k_bias = (None if factor is None else factor.detach() for factor in (self.q_bias, self.k_bias))
        return Inputs(self.q.detach(), self.k.detach(), self.v.detach(), q_bias, k_bias, self.dout, self.shape)

    @property
    def group(self) -> int:
        """How many heads of q share one of k and v."""
        return self.shape.nheads // self.shape.kv_heads

    @property
    def bytes(self) -> int:
        """The memory of all tensors together."""
        given = (self.q, self.k, self.v, self.q_bias, self.k_bias, self.dout)
        return sum(tensor.numel() * tensor.element_size() for tensor in given if tensor is not None)


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


def scores(shape: Shape) -> float:
    """Returns how many scores of one head count: all, those in the band, or by the field's custom half of a causal square."""
    everything = float(shape.seqlen_q * shape.seqlen_k)
    if shape.causal and shape.window == (-1, -1) and shape.seqlen_q == shape.seqlen_k:
        return everything / 2
    rows = (shape.band.keys(row, row, shape.seqlen_k) for row in range(shape.seqlen_q))
    return everything if shape.band == EVERYTHING else float(sum(keys.stop - keys.start for keys in rows))


def work(shape: Shape) -> float:
    """Returns the useful operations of a forward: 2 (D + Dv) for each score that counts. A backward has 2.5 times as many."""
    return 2.0 * shape.batch * shape.nheads * scores(shape) * (shape.headdim + (shape.value_dim or shape.headdim))


def seen(shape: Shape, device: torch.device) -> Tensor | None:
    """Returns which keys each row sees, (Sq, Sk) bool, or None where it sees all. Made once: it is not in anybody's time."""
    return _seen(shape.band, shape.seqlen_q, shape.seqlen_k, device)


@functools.lru_cache(maxsize=1)
def _seen(band: Band, rows: int, keys: int, device: torch.device) -> Tensor | None:
    if band == EVERYTHING:
        return None
    # A tensor of broadcast comparisons: 1 byte a score, where two index matrices would take 16.
    row, key = torch.arange(rows, device=device)[:, None], torch.arange(keys, device=device)
    found = torch.ones((rows, keys), dtype=torch.bool, device=device)
    if band.high is not None:
        found &= key <= row + band.high
    if band.low is not None:
        found &= key >= row - band.low
    return found
