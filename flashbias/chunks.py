"""One attention call read a chunk of query rows and heads at a time, in a dtype of one's choice.

The shared part of :mod:`flashbias.reference`'s passes: which blocks of scores there are, what their scores and
probabilities are, and where their share of each gradient goes. Nothing here synchronises the device or looks
at a value on the host.

k and v may have fewer heads than q (grouped queries, arXiv 2305.13245): each serves a group of neighbouring query
heads. They are repeated for a chunk at a time, and only where a chunk spans several groups.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flashbias.band import EVERYTHING, Band
from flashbias.rounding import Rounding, product

# Which gradients a backward is asked for, in the order of ``Gradients``.
Wanted = tuple[bool, bool, bool, bool, bool, bool]

# Bytes of one chunk of scores; about four such tensors live at once. On a CPU a chunk should stay in cache,
# on a GPU it should fill the device.
CPU_CHUNK_BYTES = 16 << 20
GPU_CHUNK_BYTES = 256 << 20
# cuBLAS spreads a batched product over a grid dimension that ends here.
MAX_BATCH = 65_535
# Rows of a chunk in a narrow window: more compute mostly scores that nobody sees, fewer are slow to launch.
WINDOW_ROWS = 128


class Gradients(NamedTuple):
    """The gradients of one call, each in its input's own shape; None where not wanted or no such input."""

    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    dq_bias: Tensor | None
    dk_bias: Tensor | None
    dmask: Tensor | None


@dataclass(frozen=True)
class Chunk:
    """A block of scores: ranges of batches, query heads, query rows and keys; ``nheads`` is H, all query heads.

    The heads are whole groups of those that share a head of k and v, or lie within one group.
    """

    batch: slice
    heads: slice
    rows: slice
    keys: slice
    nheads: int

    def of_rows(self, tensor: Tensor) -> Tensor:
        """Returns the (b, h, rows, D) view of a (B|1, Sq, H|1, D) tensor that belongs to this chunk's rows."""
        return _cut(tensor.transpose(1, 2), self.batch, self.heads, self.rows)

    def of_keys(self, tensor: Tensor) -> Tensor:
        """Returns the (b, n, keys, D) view of a (B|1, Sk, H|Hkv|1, D) tensor that belongs to this chunk's keys.

        Each of its n heads serves h / n neighbouring ones of the chunk's h query heads.
        """
        share = self.nheads // tensor.shape[2]
        heads = slice(self.heads.start // share, (self.heads.stop - 1) // share + 1)
        return _cut(tensor.transpose(1, 2), self.batch, heads, self.keys)

    def of_scores(self, tensor: Tensor) -> Tensor:
        """Returns the (b|1, h|1, rows|1, keys|1) view of a tensor that broadcasts to (B, H, Sq, Sk), aligned right."""
        return _cut(tensor[(None,) * (4 - tensor.dim())], self.batch, self.heads, self.rows, self.keys)


@dataclass(frozen=True)
class Call:
    """One call's arguments, read a chunk at a time in the compute dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_bias: Tensor | None
    k_bias: Tensor | None
    mask: Tensor | None
    band: Band
    scale: float
    dtype: torch.dtype
    rounding: Rounding = None

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        """The tensors that have a gradient, in the order of ``Gradients``; a bool mask has none."""
        additive = self.mask is not None and self.mask.is_floating_point()
        return self.q, self.k, self.v, self.q_bias, self.k_bias, self.mask if additive else None

    def absolute(self) -> Call:
        """Returns the call on absolute values, except for the mask."""
        q, k, v = self.q.abs(), self.k.abs(), self.v.abs()
        q_bias, k_bias = (None if factor is None else factor.abs() for factor in (self.q_bias, self.k_bias))
        return Call(q, k, v, q_bias, k_bias, self.mask, self.band, abs(self.scale), self.dtype)

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
        """Returns the chunk's keys of ``tensor``, one head for each of the chunk's or one for all, in the compute dtype."""
        keys = chunk.of_keys(tensor).to(self.dtype)
        heads, given = chunk.heads.stop - chunk.heads.start, keys.shape[1]
        return keys if given in {1, heads} else keys.repeat_interleave(heads // given, dim=1)

    def chunks(self) -> Iterator[Chunk]:
        """Yields blocks that cover every score that is seen, cut to the keys their rows see; none without any."""
        batch, rows, heads, _ = self.q.shape
        seqlen_k = self.k.shape[1]
        if batch * heads * rows * seqlen_k == 0:
            return
        steps = self._steps()
        parts = (_pieces(size, step) for size, step in zip((batch, heads, rows), steps, strict=True))
        for batch_part, head_part, row_part in itertools.product(*parts):
            keys = self.band.keys(row_part.start, row_part.stop - 1, seqlen_k)
            if keys.start < keys.stop:
                yield Chunk(batch_part, head_part, row_part, keys, heads)

    def _steps(self) -> tuple[int, int, int]:
        """Returns the batches, heads and rows of a chunk: its scores fit the limit, its heads do not split two groups.

        Its keys, repeated for each head, fit too, so that few rows with many keys (decoding) need no more memory.
        """
        batch, rows, heads, _ = self.q.shape
        span, group = self.k.shape[1], heads // self.k.shape[2]
        limit = CPU_CHUNK_BYTES if self.q.device.type == "cpu" else GPU_CHUNK_BYTES
        limit //= self.dtype.itemsize
        if self.band.low is not None and self.band.high is not None:
            width = max(1, self.band.low + self.band.high + 1)
            rows = min(rows, max(WINDOW_ROWS, width))
            span = min(span, rows + width - 1)
        row_step = min(rows, max(1, limit // span))
        columns = max(row_step, *(tensor.shape[3] for tensor in (self.k, self.v, self.k_bias) if tensor is not None))
        head_step = min(heads, max(1, limit // (columns * span)), MAX_BATCH)
        if head_step >= group:
            head_step -= head_step % group
        else:
            while group % head_step:
                head_step -= 1
        batch_step = min(batch, max(1, limit // (head_step * columns * span)), MAX_BATCH // head_step)
        return batch_step, head_step, row_step

    def scores(self, chunk: Chunk) -> Tensor:
        """Returns scale q k' + q_bias k_bias' + mask of the chunk: (b, h, rows, keys), -inf where not seen."""
        scores = product(self.rows(self.q, chunk), self.keys(self.k, chunk).mT, self.rounding).mul_(self.scale)
        if self.q_bias is not None and self.k_bias is not None:
            scores += self.rows(self.q_bias, chunk) @ self.keys(self.k_bias, chunk).mT
        if self.mask is not None:
            mask = chunk.of_scores(compact(self.mask))
            if mask.dtype == torch.bool:
                scores.masked_fill_(mask.logical_not(), -torch.inf)
            else:
                scores += self._finite(mask)
        if self.band != EVERYTHING:
            row = torch.arange(chunk.rows.start, chunk.rows.stop, device=scores.device)[:, None]
            key = torch.arange(chunk.keys.start, chunk.keys.stop, device=scores.device)
            if self.band.high is not None:
                scores.masked_fill_(key > row + self.band.high, -torch.inf)
            if self.band.low is not None:
                scores.masked_fill_(key < row - self.band.low, -torch.inf)
        return scores

    def dlse(self, chunk: Chunk, dlse: Tensor, lse: Tensor) -> Tensor:
        """Returns the chunk's rows of ``dlse`` (B, H, Sq) as (b, h, rows, 1), 0 for rows without a key."""
        rows = dlse[chunk.batch, chunk.heads, chunk.rows].to(self.dtype)
        return rows.masked_fill(lse[chunk.batch, chunk.heads, chunk.rows] == -torch.inf, 0.0).unsqueeze(-1)

    def _finite(self, mask: Tensor) -> Tensor:
        """Returns the mask in the compute dtype: only -inf excludes a key, however low a number is."""
        limit = torch.finfo(self.dtype).max
        if torch.finfo(mask.dtype).max > limit:
            mask = torch.where(mask == -torch.inf, mask, mask.clamp(-limit, limit))
        return mask.to(self.dtype)

    def weights(self, chunk: Chunk, lse: Tensor) -> Tensor:
        """Returns P = exp(S - LSE) of the chunk; rows without a key are 0."""
        shift = lse[chunk.batch, chunk.heads, chunk.rows].to(self.dtype).unsqueeze(-1)
        return self.scores(chunk).sub_(shift.masked_fill(shift == -torch.inf, 0.0)).exp_()

    def add_products(self, sums: Gradients, chunk: Chunk, dscores: Tensor) -> None:
        """Adds the chunk's dS times its partner to each gradient that goes through the scores; factors are not rounded."""
        of_queries = ((sums.dq, self.k, self.scale, self.rounding), (sums.dq_bias, self.k_bias, 1.0, None))
        for total, partner, factor, rounding in of_queries:
            if total is not None and partner is not None:
                add(chunk.of_rows(total), product(dscores, self.keys(partner, chunk), rounding), factor)
        of_keys = ((sums.dk, self.q, self.scale, self.rounding), (sums.dk_bias, self.q_bias, 1.0, None))
        for total, partner, factor, rounding in of_keys:
            if total is not None and partner is not None:
                add(chunk.of_keys(total), product(dscores.mT, self.rows(partner, chunk), rounding), factor)


@contextmanager
def plain_arithmetic(device: torch.device) -> Iterator[None]:
    """Keeps autograd from recording and a caller's autocast from lowering the compute dtype."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def _pieces(size: int, step: int) -> list[slice]:
    """Returns the ranges of ``step`` that make up ``size``, the last one as short as it must be."""
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def compact(mask: Tensor) -> Tensor:
    """Returns ``mask`` as a view in which every broadcast dim has size 1 (expanded ones are shrunk back)."""
    for dim, (size, stride) in enumerate(zip(mask.shape, mask.stride(), strict=True)):
        if stride == 0 and size > 1:
            mask = mask.narrow(dim, 0, 1)
    return mask


def _cut(tensor: Tensor, *ranges: slice) -> Tensor:
    """Returns the view of ``tensor`` within ``ranges``; dims of size 1 are broadcast and stay whole."""
    return tensor[tuple(slice(None) if size == 1 else cut for size, cut in zip(tensor.shape, ranges, strict=False))]


def add(total: Tensor, value: Tensor, factor: float = 1.0) -> None:
    """Adds ``factor * value`` to ``total`` in place, summed over the heads of a group and the dims ``total`` broadcasts."""
    heads = total.shape[1]
    if 1 < heads < value.shape[1]:
        value = value.unflatten(1, (heads, -1)).sum(2)
    total.add_(value.sum_to_size(total.shape), alpha=factor)
