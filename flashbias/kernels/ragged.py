"""The inputs on which kernels of packed sequences are timed and proven; :mod:`flashbias.kernels.cases` has the dense ones.

Added to what goes wrong there: sequences without queries, without keys, with one of either, shorter than a tile, and
factors that are packed or positional, each side on its own. Rows that no sequence reads hold NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from autotune.device import DeviceInfo
from autotune.spec import Case, Tensors
from cache_db.models import Problem, Scalar
from flashbias.band import Band
from flashbias.kernels import cases
from flashbias.varlen.band import of_sequence

Lengths = tuple[int, ...]
_TIMED_SEQUENCES: Final = 4


def representative(problem: Problem, device: DeviceInfo) -> Case:
    """Returns the sizes that are timed: equal sequences of the buckets' own lengths, several where there is work for them."""
    sizes = cases.representative(problem, device).sizes
    pairs = int(sizes["batch"]) * int(sizes["nheads"])
    batch = max(int(sizes["batch"]), min(pairs, _TIMED_SEQUENCES))
    share = batch if device.interpreted else 1  # the interpreter has no time for more than one sequence's work
    lengths = tuple((int(sizes[name]) // share,) * batch for name in ("seqlen_q", "seqlen_k"))
    return _case("representative", problem, -(-pairs // batch), lengths[0], lengths[1])


def smaller(problem: Problem, case: Case) -> Case | None:
    """Returns the timed ``case`` with half of the sequences, else of the heads, else of each length; None at the least."""
    lengths = [[int(each) for each in str(case.sizes[f"lengths_{side}"]).split(",")] for side in "qk"]
    found = cases.halved(problem, len(lengths[0]), int(case.sizes["nheads"]), lengths[0][0], lengths[1][0])
    if found is None:
        return None
    batch, nheads, length_q, length_k = found
    return _case(case.name, problem, nheads, (length_q,) * batch, (length_k,) * batch)


def proof(problem: Problem, device: DeviceInfo) -> list[Case]:
    """Returns the proof's cases; the first alone is the quick proof."""
    if device.interpreted:
        return [
            _case("ragged", problem, 2, (38, 0, 7, 5), (37, 3, 0, 1), "k"),
            _case("large logits", problem, 1, (17, 6, 10), (17, 6, 10), "qk", logit=200.0, dlse=True),
            _case("positions", problem, 2, (20, 13), (21, 19), "q", positions=True),
        ]
    return [
        _case("ragged", problem, 3, (203, 0, 77, 40), (331, 5, 0, 1), "k"),
        _case("short", problem, 2, (17, 1, 3, 0, 22), (22, 17, 2, 0, 1), dlse=True),
        _case("one query", problem, 4, (1,) * 5, (239, 64, 333, 128, 200)),
        _case("self", problem, 2, (257, 64, 0, 1, 130), (257, 64, 0, 1, 130), "qk", dlse=True),
        _case("cross", problem, 2, (513, 65, 128), (255, 300, 128), "q"),
        _case("long", problem, 2, (1151, 70), (2049, 333), "k", dlse=True),
        _case("large logits", problem, 4, (300, 20), (300, 21), logit=200.0),
        _case("shared factors", problem, 4, (257, 31), (255, 127), "q", shared=True, dlse=True),
        _case("negative bias", problem, 4, (300, 33), (333, 66), "qk", bias=-60.0),
        _case("positions", problem, 4, (140, 100), (157, 100), "k", positions=True),
    ]


def race(problem: Problem, device: DeviceInfo) -> Case:
    """Returns sizes of little more than one wave, in sequences of two lengths."""
    sizes = cases.race(problem, device).sizes
    rows, keys, nheads = (int(sizes[name]) for name in ("seqlen_q", "seqlen_k", "nheads"))
    return _case("race", problem, -(-2 * nheads // 3), (rows, rows // 2 + 3), (keys, keys // 2 + 3))


def _case(
    name: str, problem: Problem, nheads: int, lengths_q: Lengths, lengths_k: Lengths, positional: str = "", **how: Any
) -> Case:
    """Returns a case of packed sequences; ``positional`` names the sides whose factor is, ``how`` is as in dense cases."""
    case = cases._case(name, problem, 1, nheads, sum(lengths_q), sum(lengths_k), **how)  # noqa: SLF001 - its sibling
    sizes: dict[str, Scalar] = dict(case.sizes)
    for side, lengths in (("q", lengths_q), ("k", lengths_k)):
        sizes[f"lengths_{side}"] = ",".join(map(str, lengths))
        if side in positional and problem.fields["rank_dim"]:
            sizes[f"{side}_factor_rows"] = max(lengths)
    return replace(case, sizes=sizes)


def inputs(problem: Problem, case: Case, seed: int, device: torch.device) -> Tensors:
    """Returns the case's packed tensors, ``cu_seqlens_q`` and ``cu_seqlens_k``, and ``longest``.

    ``longest`` holds nothing: its shape is (largest length of q, that of k, 2 if the band is aligned bottom-right else
    1), which a launch must know without waiting for the device.
    """
    found = cases.inputs(problem, case, seed, device)
    lengths = {side: [int(each) for each in str(case.sizes[f"lengths_{side}"]).split(",")] for side in "qk"}
    for side, each in lengths.items():
        found[f"cu_seqlens_{side}"] = torch.tensor([0, *each], device=device).cumsum(0).to(torch.int32)
        rows = case.sizes.get(f"{side}_factor_rows")
        if rows is not None:
            factor = found[f"{side}_bias"]
            factor[:, int(rows) :] = torch.nan
            found[f"{side}_bias"] = factor[:, : int(rows)]
    rows_q, rows_k = (sum(each) for each in lengths.values())
    bottom_right = rows_k % 2 == 1 or rows_k >= 2 * rows_q
    one = torch.zeros(1, dtype=torch.int32, device=device)
    found["longest"] = one.expand(max(lengths["q"]), max(lengths["k"]), 1 + bottom_right)
    return found


def band_of(problem: Problem, found: Mapping[str, Tensor]) -> tuple[Band, bool]:
    """Returns the band of a case's sequences with as many keys as queries, and whether others move it bottom-right."""
    _, longest_k, alignments = found["longest"].shape
    window = min(int(problem.fields["window"]), longest_k // 2 + 1)
    return Band(window - 1 if window else None, 0 if problem.fields["causal"] else None), alignments == 2


def band_of_part(problem: Problem, part: Mapping[str, Tensor]) -> Band:
    """Returns the diagonals seen in one sequence of a case, of :func:`flashbias.kernels.sequences.split`."""
    band, shifted = band_of(problem, part)
    return of_sequence(band, shifted, part["q"].shape[1], part["k"].shape[1])
