"""What causal and window mean in diagonals, against the words of the interface and against known patterns."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flashbias.band import CAUSAL, EVERYTHING, Band, band
from tests.flashbias.cases import Call, visible

Causal = bool | Literal["bottom_right"]


def pattern(found: Band, rows: int, keys: int) -> Tensor:
    """Returns which of ``rows`` x ``keys`` scores the band lets through."""
    distance = torch.arange(keys) - torch.arange(rows)[:, None]
    seen = torch.ones(rows, keys, dtype=torch.bool)
    if found.low is not None:
        seen &= distance >= -found.low
    if found.high is not None:
        seen &= distance <= found.high
    return seen


@given(
    st.sampled_from([False, True, "bottom_right"]),
    st.tuples(st.integers(-1, 9), st.integers(-1, 9)),
    st.integers(1, 8),
    st.integers(1, 8),
)
def test_a_band_is_what_causal_and_window_say(causal: Causal, window: tuple[int, int], rows: int, keys: int) -> None:
    """For all lengths, bounds and windows the band sees what their definitions do."""
    call = Call(torch.zeros(1, rows, 1, 1), *(torch.zeros(1, keys, 1, 1),) * 2, causal=causal, window=window)
    assert torch.equal(pattern(band(causal, window, rows, keys), rows, keys), visible(call))


@pytest.mark.parametrize(
    ("causal", "window", "rows", "keys", "expected"),
    [
        ("bottom_right", (-1, -1), 2, 5, ["11110", "11111"]),
        ("bottom_right", (-1, -1), 5, 2, ["00", "00", "00", "10", "11"]),
        (True, (-1, -1), 2, 5, ["10000", "11000"]),
        (True, (1, 3), 4, 3, ["100", "110", "011", "001"]),
        ("bottom_right", (1, -1), 2, 5, ["00110", "00011"]),
        (False, (1, 0), 2, 4, ["0110", "0011"]),
        (False, (0, 1), 4, 2, ["00", "10", "11", "01"]),
        (False, (-1, 0), 3, 3, ["100", "110", "111"]),
    ],
)
def test_known_patterns(causal: Causal, window: tuple[int, int], rows: int, keys: int, expected: list[str]) -> None:
    """Written out by hand, 1 is seen."""
    seen = pattern(band(causal, window, rows, keys), rows, keys)
    assert ["".join(str(int(each)) for each in row) for row in seen] == expected


def test_the_common_bands_have_names() -> None:
    """No bound at all, and top-left causal whatever the lengths."""
    assert band(False, (-1, -1), 3, 7) == EVERYTHING
    assert band(True, (-1, -1), 3, 7) == CAUSAL
    assert band("bottom_right", (-1, -1), 7, 7) == CAUSAL
    assert band("bottom_right", (2, -1), 7, 3) == Band(6, -4)


@given(
    st.builds(Band, *(st.one_of(st.none(), st.integers(-9, 9)),) * 2),
    st.integers(0, 8),
    st.integers(0, 8),
    st.integers(0, 9),
)
def test_keys_hold_all_that_rows_see(found: Band, first: int, more: int, keys: int) -> None:
    """The range of keys of some rows holds what each sees, stays within the keys, and is tight for a single row."""
    rows = pattern(found, first + more + 1, keys)
    cut = found.keys(first, first + more, keys)
    assert 0 <= cut.start <= cut.stop <= keys
    assert not rows[first:, : cut.start].any()
    assert not rows[first:, cut.stop :].any()
    single = found.keys(first, first, keys)
    assert single.stop - single.start == int(rows[first].sum())


def test_bounds_that_exclude_nothing_are_none() -> None:
    """A window as wide as the sequence and the only row of a decode step are no band at all."""
    assert Band(1023, 0).within(1024, 1024) == Band(None, 0)
    assert Band(1022, 0).within(1024, 1024) == Band(1022, 0)
    assert Band(None, 511).within(1, 512) == EVERYTHING
    assert Band(-3, 510).within(1, 512) == Band(-3, 510)
