"""Where packed sequences begin and end, as the layers below the operator hand it on."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from flashbias.errors import ArgumentError


class Extent(NamedTuple):
    """What the host knows of a call's sequences: how many there are, and the largest lengths."""

    sequences: int
    seqlen_q: int
    seqlen_k: int


class Sequences(NamedTuple):
    """The sequences of one call; ``shifted`` says that the band is aligned bottom-right in each.

    ``cu_seqlens_q`` and ``cu_seqlens_k`` are int32 (B + 1,) on the call's device.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    shifted: bool

    def extent(self, rows_q: int, rows_k: int) -> Extent:
        """Returns what decides which kernels run: no sequence is longer than all rows together."""
        sequences = self.cu_seqlens_q.shape[0] - 1
        return Extent(sequences, min(self.max_seqlen_q, rows_q), min(self.max_seqlen_k, rows_k))

    def check_values(self, rows_q: int, rows_k: int) -> None:
        """Raises ArgumentError if CPU tensors do not cut ``rows_q`` and ``rows_k`` rows as they promise to."""
        if self.cu_seqlens_q.device.type != "cpu":
            return
        for side, tensor, rows, longest in (
            ("q", self.cu_seqlens_q, rows_q, self.max_seqlen_q),
            ("k", self.cu_seqlens_k, rows_k, self.max_seqlen_k),
        ):
            _check_bounds(f"cu_seqlens_{side}", tensor.tolist(), rows)
            found = int(torch.diff(tensor).max()) if tensor.shape[0] > 1 else 0
            if found > longest:
                expected = f"at least {found}, the longest sequence of cu_seqlens_{side}"
                raise ArgumentError.explain(f"max_seqlen_{side}", expected=expected, got=str(longest))


def _check_bounds(name: str, bounds: list[int], rows: int) -> None:
    expected = f"numbers that start at 0, never fall and end at {rows}, the rows of {name[-1]}"
    cure = "It is the cumulative sum of the lengths with a 0 in front."
    if bounds[0] != 0 or bounds[-1] != rows:
        got = f"{bounds[0]} … {bounds[-1]}"
        raise ArgumentError.explain(name, expected=expected, got=got, cure=cure)
    for index, (first, last) in enumerate(itertools.pairwise(bounds)):
        if last < first:
            raise ArgumentError.explain(name, expected=expected, got=f"{first}, {last} at {index}", cure=cure)
