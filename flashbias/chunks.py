"""One attention call read a chunk of query rows and heads at a time, in a dtype of one's choice.

The shared part of :mod:`flashbias.reference`'s passes: which blocks of scores there are, what their scores and
probabilities are, and where their share of each gradient goes. Nothing here synchronises the device or looks
at a value on the host.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Wanted = tuple[bool, bool, bool, bool, bool]

# Bytes of one chunk of scores; about four such tensors live at once. On a CPU a chunk should stay in cache,
# on a GPU it should fill the device.
CPU_CHUNK_BYTES = 16 << 20
GPU_CHUNK_BYTES = 256 << 20
# cuBLAS spreads a batched product over a grid dimension that ends here.
MAX_BATCH = 65_535


class Gradients(NamedTuple):
    """The gradients of one call, each in its input's own shape; None where not wanted or no such input."""

    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    dq_bias: Tensor | None
    dk_bias: Tensor | None


@dataclass(frozen=True)
class Chunk:
    """A block of scores: ranges of batches, heads, query rows and keys."""

    batch: slice
    heads: slice
    rows: slice
    keys: slice

    def of_rows(self, tensor: Tensor) -> Tensor:
        """Returns the (b, h, rows, D) view of a (B|1, Sq, H|1, D) tensor that belongs to this chunk's rows."""
        return _cut(tensor.transpose(1, 2), self.batch, self.heads, self.rows)

    def of_keys(self, tensor: Tensor) -> Tensor:
        """Returns the (b, h, keys, D) view of a (B|1, Sk, H|1, D) tensor that belongs to this chunk's keys."""
        return _cut(tensor.transpose(1, 2), self.batch, self.heads, self.keys)


@dataclass(frozen=True)
class Call:
    """One call's arguments, read a chunk at a time in the compute dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_bias: Tensor | None
    k_bias: Tensor | None
    mask: Tensor | None
    causal: bool
    scale: float
    dtype: torch.dtype

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """The tensors that have a gradient, in the order of ``Gradients``."""
        return self.q, self.k, self.v, self.q_bias, self.k_bias

    def absolute(self) -> Call:
        """Returns the call on absolute values, except for the mask."""
        q, k, v = self.q.abs(), self.k.abs(), self.v.abs()
        q_bias, k_bias = (None if factor is None else factor.abs() for factor in (self.q_bias, self.k_bias))
        return Call(q, k, v, q_bias, k_bias, self.mask, self.causal, abs(self.scale), self.dtype)

    def zeros(self, shape: tuple[int, ...]) -> Tensor:
        """Returns a zero tensor of the compute dtype on the call's device."""
        return torch.zeros(shape, dtype=self.dtype, device=self.q.device)

    def sums(self, wanted: Wanted) -> Gradients:
        """Returns zeros to sum the wanted gradients in."""
        pairs = zip(self.inputs, wanted, strict=True)
        return Gradients(*(self.zeros(x.shape) if x is not None and want else None for x, want in pairs))

    def like_inputs(self, sums: Gradients) -> Gradients:
        """Returns ``sums`` rounded to the dtypes of the inputs they belong to."""
        pairs = zip(sums, self.inputs, strict=True)
        return Gradients(*(None if total is None or x is None else total.to(x.dtype) for total, x in pairs))

    def rows(self, tensor: Tensor, chunk: Chunk) -> Tensor:
        """Returns the chunk's rows of ``tensor``, heads first, in the compute dtype."""
        return chunk.of_rows(tensor).to(self.dtype)

    def keys(self, tensor: Tensor, chunk: Chunk) -> Tensor:
        """Returns the chunk's keys of ``tensor``, heads first, in the compute dtype."""
        return chunk.of_keys(tensor).to(self.dtype)

    def chunks(self) -> Iterator[Chunk]:
        """Yields blocks that cover all scores, none if a size is zero. A causal block has no keys it cannot see."""
        batch, rows, heads, _ = self.q.shape
        keys = self.k.shape[1]
        if batch * heads * rows * keys == 0:
            return
        limit = CPU_CHUNK_BYTES if self.q.device.type == "cpu" else GPU_CHUNK_BYTES
        limit //= self.dtype.itemsize
        row_step = min(rows, max(1, limit // keys))
        head_step = min(heads, max(1, limit // (row_step * keys)), MAX_BATCH)
        batch_step = min(batch, max(1, limit // (head_step * row_step * keys)), MAX_BATCH // head_step)
        starts = itertools.product(range(0, batch, batch_step), range(0, heads, head_step), range(0, rows, row_step))
        for first, head, row in starts:
            seen = min(keys, row + row_step) if self.causal else keys
            yield Chunk(
                slice(first, first + batch_step),
                slice(head, head + head_step),
                slice(row, row + row_step),
                slice(0, seen),
            )

    def scores(self, chunk: Chunk) -> Tensor:
        """Returns scale q k' + q_bias k_bias' + mask of the chunk: (b, h, rows, keys), -inf where not seen."""
        scores = (self.rows(self.q, chunk) @ self.keys(self.k, chunk).mT).mul_(self.scale)
        if self.q_bias is not None and self.k_bias is not None:
            scores += self.rows(self.q_bias, chunk) @ self.keys(self.k_bias, chunk).mT
        if self.mask is not None:
            mask = _cut(_compact(self.mask), chunk.batch, chunk.heads, chunk.rows, chunk.keys)
            if mask.dtype == torch.bool:
                scores.masked_fill_(mask.logical_not(), -torch.inf)
            else:
                scores += mask.to(self.dtype)
        if self.causal:
            row = torch.arange(chunk.rows.start, chunk.rows.start + scores.shape[2], device=scores.device)
            key = torch.arange(scores.shape[3], device=scores.device)
            scores.masked_fill_(key > row[:, None], -torch.inf)
        return scores

    def weights(self, chunk: Chunk, lse: Tensor) -> Tensor:
        """Returns P = exp(S - LSE) of the chunk; rows without a key are 0."""
        shift = lse[chunk.batch, chunk.heads, chunk.rows].to(self.dtype).unsqueeze(-1)
        return self.scores(chunk).sub_(shift.masked_fill(shift == -torch.inf, 0.0)).exp_()

    def add_products(self, sums: Gradients, chunk: Chunk, dscores: Tensor) -> None:
        """Adds the chunk's dS times its partner to each gradient that goes through the scores."""
        for total, partner, factor in ((sums.dq, self.k, self.scale), (sums.dq_bias, self.k_bias, 1.0)):
            if total is not None and partner is not None:
                add(chunk.of_rows(total), dscores @ self.keys(partner, chunk), factor)
        for total, partner, factor in ((sums.dk, self.q, self.scale), (sums.dk_bias, self.q_bias, 1.0)):
            if total is not None and partner is not None:
                add(chunk.of_keys(total), dscores.mT @ self.rows(partner, chunk), factor)


@contextmanager
def plain_arithmetic(device: torch.device) -> Iterator[None]:
    """Keeps autograd from recording and a caller's autocast from lowering the compute dtype."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def _compact(mask: Tensor) -> Tensor:
    """Returns ``mask`` as a 4-D view in which every broadcast dim has size 1 (expanded ones are shrunk back)."""
    for dim, (size, stride) in enumerate(zip(mask.shape, mask.stride(), strict=True)):
        if stride == 0 and size > 1:
            mask = mask.narrow(dim, 0, 1)
    return mask[(None,) * (4 - mask.dim())]


def _cut(tensor: Tensor, *ranges: slice) -> Tensor:
    """Returns the view of ``tensor`` within ``ranges``; dims of size 1 are broadcast and stay whole."""
    return tensor[tuple(slice(None) if size == 1 else cut for size, cut in zip(tensor.shape, ranges, strict=False))]


def rounded(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Returns ``tensor`` rounded to ``dtype`` but kept in its own."""
    return tensor if dtype is None else tensor.to(dtype).to(tensor.dtype)


def add(total: Tensor, value: Tensor, factor: float = 1.0) -> None:
    """Adds ``factor * value`` to ``total`` in place, summed over the dims in which ``total`` is broadcast."""
    total.add_(value.sum_to_size(total.shape), alpha=factor)
