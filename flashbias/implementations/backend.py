"""What a foreign implementation has to do to be run: plain attention, forward and backward, on (B, S, H, D) tensors."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Backend(Protocol):
    """Plain attention softmax(q kᵀ · scale) v of 16-bit tensors with as many heads of k and v as of q.

    Causal attention is asked of as many queries as keys, and where it is ``bottom_right`` also of fewer: the last
    query then sees the last key. Packages are imported at the first call, not before.
    """

    @property
    def bottom_right(self) -> bool:
        """Whether causal attention may be asked of fewer queries than keys."""
        ...

    def widths(self, columns: int, value_dim: int) -> tuple[int, int]:
        """Returns the head dims of q and k, and of v, that zeros have to fill up to."""
        ...

    def limit(self, columns: int, value_dim: int) -> str | None:
        """Returns why such widths (what ``widths`` returns) cannot be computed, or None."""
        ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
        """Returns O (B, Sq, H, Dv), and LSE (B, H, Sq) in fp32, natural log."""
        ...

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
        *,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns dq, dk, dv. ``out`` and ``lse`` are any forward's, with a finite ``lse`` in every row."""
        ...


def up(size: int, multiple: int) -> int:
    """Returns ``size`` rounded up to a multiple."""
    return -(-size // multiple) * multiple
