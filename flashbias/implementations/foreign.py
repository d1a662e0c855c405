"""A foreign implementation in the place of our forward, or of all passes of our backward.

LSE is natural in all of them, and that of the biased scores: so each forward feeds each backward, ours too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from cache_db.models import Scalar
from flashbias.band import Band
from flashbias.implementations.backend import Backend
from flashbias.implementations.joining import Fold, Joined, Piece, columns_of, join, led, pieces

_DLSE_PARTS: Final = 2


@dataclass(frozen=True)
class Foreign:
    """What runs a foreign config. ``binary`` is the SHA-256 of that config, which names the versions it is of."""

    backend: Backend
    binary: str
    stats: Mapping[str, Scalar] = field(default_factory=dict)

    def suits(self, band: Band, seqlen_q: int, seqlen_k: int) -> bool:
        """Returns whether such a call costs no more than its scores: else it is right, but ours is faster."""
        return not any(piece.lead for piece in pieces(band, seqlen_q, seqlen_k, bottom_right=self.backend.bottom_right))

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_bias: Tensor | None,
        k_bias: Tensor | None,
        band: Band,
        softmax_scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Returns ``out`` (B, Sq, H, Dv) in v's dtype and ``lse`` (B, H, Sq) in fp32, natural log; both contiguous."""
        joined, width = self._join(q, k, q_bias, k_bias, softmax_scale, v.shape[3])
        value_dim = v.shape[3]
        v = _padded(v, width)
        scale = joined.fold.scale
        cut = pieces(band, q.shape[1], k.shape[1], bottom_right=self.backend.bottom_right)
        if _whole(cut, q.shape[1]):
            keys = cut[0].keys
            found = self.backend.forward(joined.q, joined.k[:, keys], v[:, keys], scale, causal=cut[0].causal)
            return found[0][..., :value_dim].contiguous(), found[1].contiguous()
        out = v.new_zeros((*q.shape[:3], value_dim))
        lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=torch.float32, device=q.device)
        for piece in cut:
            given = (led(joined.q, piece), joined.k[:, piece.keys], v[:, piece.keys], scale)
            part, part_lse = self.backend.forward(*given, causal=piece.causal)
            out[:, piece.rows] = part[:, piece.lead :, :, :value_dim]
            lse[:, :, piece.rows] = part_lse[:, :, piece.lead :]
        return out, lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_bias: Tensor | None,
        k_bias: Tensor | None,
        out: Tensor,
        lse: Tensor,
        band: Band,
        softmax_scale: float,
        dlse: Tensor | None,
    ) -> dict[str, Tensor]:
        """Returns dq, dk and dv in their inputs' shapes and dtypes, and dq_bias and dk_bias (B, S, H, R) in fp32.

        ``dlse`` (B, H, Sq) is a gradient that no backend knows: it is written as two more columns of dout, which meet
        columns of ones in v, and of zeros in out. So it joins dP, and not the sum of rows that is taken from it.
        """
        value_dim = v.shape[3]
        if dlse is not None:
            dout, v, out = _with_dlse(dout, v, out, dlse)
        joined, width = self._join(q, k, q_bias, k_bias, softmax_scale, v.shape[3])
        values = [_padded(tensor, width) for tensor in (dout, v, out)]
        cut = pieces(band, q.shape[1], k.shape[1], bottom_right=self.backend.bottom_right)
        if _whole(cut, q.shape[1]) and cut[0].keys.stop == k.shape[1]:
            dq, dk, dv = self._piece(joined, values, lse, cut[0])
        else:
            dq, dk, dv = self._pieces(joined, values, lse, cut)
        return {**joined.gradients(dq, dk), "dv": dv[..., :value_dim].contiguous()}

    def load(self) -> Foreign:
        """Returns itself: there is nothing to load before the first run."""
        return self

    def _join(
        self,
        q: Tensor,
        k: Tensor,
        q_bias: Tensor | None,
        k_bias: Tensor | None,
        softmax_scale: float,
        value_dim: int,
    ) -> tuple[Joined, int]:
        """Returns q and k with their factors, and how wide v has to be."""
        # No backend has been seen to take a scale below zero: its largest score would be its least.
        plain = q_bias is None and softmax_scale > 0
        fold = Fold(1.0, softmax_scale, 1) if plain else Fold.of(softmax_scale)
        rank = 0 if q_bias is None else q_bias.shape[3]
        columns, width = self.backend.widths(columns_of(q.shape[3], rank, fold.parts), value_dim)
        return join(q, k, q_bias, k_bias, fold, columns), width

    def _piece(self, joined: Joined, values: list[Tensor], lse: Tensor, piece: Piece) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the gradients of one piece; a row of zeros before it has an LSE of 0, and dout of 0, and adds nothing."""
        dout, v, out = values
        return self.backend.backward(
            led(dout, piece),
            led(joined.q, piece),
            joined.k[:, piece.keys],
            v[:, piece.keys],
            led(out, piece),
            F.pad(lse[:, :, piece.rows], (piece.lead, 0)).contiguous(),
            joined.fold.scale,
            causal=piece.causal,
        )

    def _pieces(
        self, joined: Joined, values: list[Tensor], lse: Tensor, cut: list[Piece]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the gradients of all pieces, those of keys and values summed in fp32."""
        dq = torch.zeros_like(joined.q, memory_format=torch.contiguous_format)
        dk, dv = (
            torch.zeros(tensor.shape, dtype=torch.float32, device=tensor.device) for tensor in (joined.k, values[1])
        )
        for piece in cut:
            part_q, part_k, part_v = self._piece(joined, values, lse, piece)
            dq[:, piece.rows] = part_q[:, piece.lead :]
            dk[:, piece.keys] += part_k
            dv[:, piece.keys] += part_v
        return dq, dk.to(dq.dtype), dv.to(dq.dtype)


def _whole(cut: list[Piece], seqlen_q: int) -> bool:
    """Returns whether one piece without rows of zeros holds all rows."""
    return len(cut) == 1 and cut[0].lead == 0 and cut[0].rows == slice(0, seqlen_q)


def _padded(tensor: Tensor, width: int) -> Tensor:
    room = width - tensor.shape[3]
    return F.pad(tensor, (0, room)) if room else tensor


def _with_dlse(dout: Tensor, v: Tensor, out: Tensor, dlse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dout with dlse in two columns, each a part of it in dout's dtype, and v and out with what they meet."""
    whole = dlse.float().transpose(1, 2).unsqueeze(3)
    first = whole.to(dout.dtype)
    columns = torch.cat([dout, first, (whole - first.float()).to(dout.dtype)], -1)
    return columns, F.pad(v, (0, _DLSE_PARTS), value=1.0), F.pad(out, (0, _DLSE_PARTS))
