"""Which keys each query of a packed sequence may see: one band, moved in each sequence by the difference of its lengths."""

from __future__ import annotations

from typing import Literal

from flashbias.band import EVERYTHING, Band

Causal = bool | Literal["top_left", "bottom_right"]


def sequence_band(causal: Causal, window: tuple[int, int], seqlen_q: int, seqlen_k: int) -> tuple[Band, bool]:
    """Returns the band of a sequence with as many keys as queries, and whether others move it bottom-right.

    ``causal`` and ``window`` are those of :func:`flashbias.band.band`, with "top_left" for True; ``seqlen_q`` and
    ``seqlen_k`` are the largest lengths. A band that moves lies ``keys - queries`` further right in each sequence.
    Bounds that exclude nothing in any sequence are left out.
    """
    left, right = window
    shifted = causal not in (True, "top_left")
    low = None if left < 0 else left
    high = 0 if causal else None if right < 0 else right
    # A query stands at a key of its own: left of it are at most all other keys, or all other queries.
    if low is not None and low >= (seqlen_k if shifted else seqlen_q) - 1:
        low = None
    if high is not None and high >= (seqlen_q if shifted else seqlen_k) - 1:
        high = None
    band = Band(low, high)
    return band, shifted and band != EVERYTHING


def of_sequence(band: Band, shifted: bool, seqlen_q: int, seqlen_k: int) -> Band:
    """Returns the diagonals seen in a sequence of these lengths."""
    shift = seqlen_k - seqlen_q if shifted else 0
    low, high = band
    return Band(None if low is None else low - shift, None if high is None else high + shift)
