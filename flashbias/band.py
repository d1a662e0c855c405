"""Which keys each query may see by position: a band of diagonals, of which causal and windowed attention are cases.

The user's words (``causal``, ``window``) are translated once, by :func:`band`; everything below the operator knows
diagonals only. The convention of windows is that of the package flash-attn: -1 is no limit, and without a
top-left causal bound the last query stands level with the last key.
"""

from __future__ import annotations

from typing import Literal, NamedTuple


class Band(NamedTuple):
    """The diagonals seen: row i sees key j iff -low <= j - i <= high. None is no bound; either may be negative."""

    low: int | None
    high: int | None

    def keys(self, first_row: int, last_row: int, seqlen_k: int) -> slice:
        """Returns the range of keys that some row from ``first_row`` to ``last_row`` (included) sees, maybe empty."""
        start = 0 if self.low is None else min(max(first_row - self.low, 0), seqlen_k)
        stop = seqlen_k if self.high is None else min(last_row + self.high + 1, seqlen_k)
        return slice(start, max(start, stop))

    def within(self, seqlen_q: int, seqlen_k: int) -> Band:
        """Returns the band without the bounds that exclude nothing for these lengths."""
        low, high = self
        return Band(
            None if low is not None and low >= seqlen_q - 1 else low,
            None if high is not None and high >= seqlen_k - 1 else high,
        )


EVERYTHING = Band(None, None)
CAUSAL = Band(None, 0)


def band(causal: bool | Literal["bottom_right"], window: tuple[int, int], seqlen_q: int, seqlen_k: int) -> Band:
    """Returns the band that ``causal`` and ``window`` mean for ``seqlen_q`` rows and ``seqlen_k`` keys.

    ``causal``: True is aligned top-left, row i sees keys j <= i; ``"bottom_right"`` lets the last row see the last
    key, j <= i + seqlen_k - seqlen_q. ``window`` is (left, right), a negative one without limit: row i stands at key
    p = i + shift and sees p - left <= j <= p + right, where shift is 0 for ``causal=True``, else seqlen_k - seqlen_q.
    Under either ``causal`` nothing right of p is seen, whatever ``right`` says. With more rows than keys the first
    rows may see no key at all.
    """
    left, right = window
    shift = 0 if causal is True else seqlen_k - seqlen_q
    low = None if left < 0 else left - shift
    if causal:
        return Band(low, shift)
    return Band(low, None if right < 0 else right + shift)
