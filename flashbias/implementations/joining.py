"""Attention with a low-rank bias as plain attention: factors beside q and k, and a band as whole or square pieces.

softmax(q kᵀ · s + q_bias k_biasᵀ) v is plain attention of [q, q_bias / s] and [k, k_bias] at scale s. Two things of
that lose bits in 16-bit numbers: q · s where a backend shall have scale 1, and q_bias / s here, unless s is a power of
two. So s is split: its power of two goes into q, which takes it exactly, and what is left of it, 1 ≤ r < 2, is the
backend's scale; q_bias / r then is written as the sum of two numbers, with k_bias beside both. For r = 1 one is enough.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flashbias.band import Band


@dataclass(frozen=True)
class Fold:
    """``softmax_scale`` as ``factor`` · ``scale``: q is multiplied by the first, the backend by the second.

    ``parts`` numbers stand for each of q_bias.
    """

    factor: float
    scale: float
    parts: int

    @classmethod
    def of(cls, softmax_scale: float) -> Fold:
        """Returns the split that loses least; scales of 2 and more stay whole, for the sake of fp16's range."""
        if softmax_scale == 0.0:
            return cls(0.0, 1.0, 1)
        exponent = min(math.frexp(softmax_scale)[1] - 1, 0)
        factor = math.copysign(math.ldexp(1.0, exponent), softmax_scale)
        scale = softmax_scale / factor
        return cls(factor, scale, 1 if scale == 1.0 else 2)


@dataclass(frozen=True)
class Joined:
    """q and k with their factors beside them, (B, S, H, columns), filled up with zeros."""

    q: Tensor
    k: Tensor
    fold: Fold
    head_dim: int
    rank: int

    def gradients(self, dq: Tensor, dk: Tensor) -> dict[str, Tensor]:
        """Returns dq and dk in their own dtype, dq_bias and dk_bias in fp32, from those of what was joined."""
        own, rank = self.head_dim, self.rank
        found = {
            "dq": dq[..., :own] * self.fold.factor if self.fold.factor != 1.0 else dq[..., :own].contiguous(),
            "dk": dk[..., :own].contiguous(),
        }
        if rank:
            found["dq_bias"] = dq[..., own : own + rank].float() / self.fold.scale
            parts = [dk[..., own + part * rank : own + (part + 1) * rank] for part in range(self.fold.parts)]
            found["dk_bias"] = parts[0].float() if len(parts) == 1 else parts[0].float() + parts[1].float()
        return found


def columns_of(head_dim: int, rank: int, parts: int) -> int:
    """Returns how many columns q and k have with their factors."""
    return head_dim + rank * parts


def join(q: Tensor, k: Tensor, q_bias: Tensor | None, k_bias: Tensor | None, fold: Fold, columns: int) -> Joined:
    """Returns q and k in ``columns`` columns with their factors, which are of q's dtype.

    Factors that batches or heads share are repeated. Without factors q and k are copied only if they are narrower.
    """
    head_dim = q.shape[3]
    if q_bias is None or k_bias is None:
        room = columns - head_dim
        q = q if fold.factor == 1.0 else q * fold.factor
        return Joined(F.pad(q, (0, room)) if room else q, F.pad(k, (0, room)) if room else k, fold, head_dim, 0)
    rank = q_bias.shape[3]
    joined_q, joined_k = q.new_empty((*q.shape[:3], columns)), k.new_empty((*k.shape[:3], columns))
    torch.mul(q, fold.factor, out=joined_q[..., :head_dim])
    joined_k[..., :head_dim] = k
    scaled = q_bias if fold.scale == 1.0 else q_bias.float() / fold.scale
    end = head_dim
    for part in range(fold.parts):
        start, end = end, end + rank
        rounded = scaled.to(q.dtype)
        joined_q[..., start:end] = rounded
        joined_k[..., start:end] = k_bias
        if part + 1 < fold.parts:
            scaled = scaled - rounded.float()
    joined_q[..., end:] = 0
    joined_k[..., end:] = 0
    return Joined(joined_q, joined_k, fold, head_dim, rank)


@dataclass(frozen=True)
class Piece:
    """Rows that see a range of keys, all of it or causally; ``lead`` rows of zeros come first where they are causal.

    With them there are as many rows as keys, which every backend aligns in the same way.
    """

    rows: slice
    keys: slice
    causal: bool = False
    lead: int = 0


def pieces(band: Band, seqlen_q: int, seqlen_k: int, *, bottom_right: bool) -> list[Piece]:
    """Returns the pieces of a band without a lower bound; rows in none of them see no key.

    Those that see but some of the keys are one causal piece, those below that see all another.
    """
    high = band.within(seqlen_q, seqlen_k).high
    if high is None:
        return [Piece(slice(0, seqlen_q), slice(0, seqlen_k))]
    first, shift = max(-high, 0), max(high, 0)  # the first row with a key, and how many keys before its own it sees
    rows = min(seqlen_q - first, seqlen_k - shift)
    found = []
    if rows > 0:
        lead = 0 if bottom_right else shift
        found.append(Piece(slice(first, first + rows), slice(0, rows + shift), causal=True, lead=lead))
    if first + max(rows, 0) < seqlen_q:
        found.append(Piece(slice(first + max(rows, 0), seqlen_q), slice(0, seqlen_k)))
    return found


def led(tensor: Tensor, piece: Piece) -> Tensor:
    """Returns the piece's rows of a (B, S, H, columns) tensor behind its rows of zeros."""
    rows = tensor[:, piece.rows]
    return F.pad(rows, (0, 0, 0, 0, piece.lead, 0)) if piece.lead else rows
