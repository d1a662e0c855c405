"""Factors by singular value decomposition, and the learned tables they are made of."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashbias.errors import ArgumentError
from flashbias.factors import approximation, from_dense, swin_table, t5_relative, t5_table
from tests.flashbias.factor_cases import assert_same_gradients, attend, normal, product

SIZES = st.integers(1, 9)


def smooth(heads: int = 2, length: int = 24) -> Tensor:
    """Returns biases (H, S, S) whose singular values fall fast, faster in later heads."""
    places = torch.linspace(0, 1, length, dtype=torch.float64)
    widths = torch.arange(1, heads + 1, dtype=torch.float64)[:, None, None]
    return torch.exp(-((places[:, None] - places) ** 2) * 20 / widths**2)


@settings(deadline=None, max_examples=50)
@given(batch=st.integers(1, 2), heads=st.integers(1, 3), rows=SIZES, keys=SIZES, rank=st.integers(1, 12))
def test_a_truncated_decomposition_loses_exactly_the_smaller_singular_values(
    batch: int, heads: int, rows: int, keys: int, rank: int
) -> None:
    """The error is the least that any factors of this rank have, and ``approximation`` measures it."""
    bias = normal(batch, heads, rows, keys)
    q_bias, k_bias = from_dense(bias, rank=rank)
    assert q_bias.shape == (batch, rows, heads, rank)
    assert k_bias.shape == (batch, keys, heads, rank)
    difference = bias - product(q_bias, k_bias)
    lost = torch.linalg.svdvals(bias)[..., rank:].square().sum(-1)
    torch.testing.assert_close(difference.square().sum((2, 3)), lost)
    figures = approximation(bias, q_bias, k_bias)
    share = (lost / bias.square().sum((2, 3))).amax(0)
    torch.testing.assert_close(figures.relative_error, share.sqrt(), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(figures.energy, 1 - share)
    torch.testing.assert_close(figures.max_error, difference.abs().amax((0, 2, 3)))


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 0.9999])
def test_energy_takes_the_fewest_columns_that_keep_it(energy: float) -> None:
    """Every head keeps the share asked for, and with one column less some head would not."""
    bias = smooth()
    q_bias, k_bias = from_dense(bias, energy=energy)
    assert approximation(bias, q_bias, k_bias).energy.min() >= energy
    rank = q_bias.shape[3]
    assert rank > 1
    assert approximation(bias, *from_dense(bias, rank=rank - 1)).energy.min() < energy


def test_all_energy_is_all_but_rounding() -> None:
    """Energy 1 stops at the bias's own rank and reproduces it."""
    bias = normal(9, 4) @ normal(4, 8, seed=1)
    q_bias, k_bias = from_dense(bias, energy=1.0)
    assert q_bias.shape[3] == 4
    assert approximation(bias, q_bias, k_bias).relative_error < 1e-14


def test_both_sides_are_equally_large_and_superfluous_columns_are_zero() -> None:
    """Singular values are split evenly, and what lies beyond the bias's own rank is 0 rather than noise."""
    bias = normal(5, 1) @ normal(1, 7, seed=1)
    q_bias, k_bias = from_dense(bias, rank=3)
    torch.testing.assert_close(q_bias.norm(), k_bias.norm())
    assert not q_bias[..., 1:].any()
    assert not k_bias[..., 1:].any()
    q_bias, k_bias = from_dense(torch.zeros(3, 4), energy=0.9)
    assert q_bias.shape[3] == 1
    assert approximation(torch.zeros(3, 4), q_bias, k_bias) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("given_as", "made"), [(torch.float16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2], ids=str
)
def test_factors_are_wide_enough_for_their_input(given_as: torch.dtype, made: torch.dtype) -> None:
    """16-bit biases get fp32 factors, accurate to fp32; fp64 ones fp64."""
    bias = normal(6, 5).to(given_as)
    q_bias, k_bias = from_dense(bias, rank=5)
    assert q_bias.dtype == k_bias.dtype == made
    assert approximation(bias, q_bias, k_bias).relative_error < 4 * torch.finfo(made).eps


def test_a_bias_that_misses_the_factors_altogether_is_no_zero_error() -> None:
    """Against a zero bias, factors that are not zero are infinitely wrong, relatively."""
    figures = approximation(torch.zeros(2, 2), torch.ones(1, 2, 1, 1), torch.ones(1, 2, 1, 1))
    assert figures == (-math.inf, math.inf, 1.0)


@pytest.mark.parametrize("shape", [(19, 23), (3, 19, 23), (2, 3, 19, 23)], ids=str)
def test_attention_with_full_rank_agrees_with_the_dense_bias(shape: tuple[int, ...]) -> None:
    """Output and the bias's own gradient are those of SDPA with the dense bias."""
    bias = normal(*shape, dtype=torch.float32).requires_grad_()
    out, expected = attend(*from_dense(bias, rank=19), bias, 3)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(out, expected, bias)


def test_the_gradient_at_lower_rank_is_that_of_the_projection() -> None:
    """With q_bias's directions held fixed, the bias gets the gradient of its projection onto them."""
    bias = normal(6, 7).requires_grad_()
    q_bias, k_bias = from_dense(bias, rank=2)
    assert not q_bias.requires_grad
    left = torch.linalg.svd(bias.detach())[0][:, :2]
    dproduct = normal(6, 7, seed=1)
    (got,) = torch.autograd.grad(product(q_bias, k_bias)[0, 0], bias, dproduct)
    torch.testing.assert_close(got, left @ left.T @ dproduct)


@pytest.mark.parametrize("window", [1, 4, (2, 5), (3, 1)], ids=str)
def test_swin_tables_are_laid_out_as_published(window: int | tuple[int, int]) -> None:
    """Each pair of tokens reads the row that Swin's index names, written out here token by token."""
    height, width = window if isinstance(window, tuple) else (window, window)
    table = normal((2 * height - 1) * (2 * width - 1), 3)
    bias = swin_table(table, window)
    tokens = [(y, x) for y in range(height) for x in range(width)]
    for i, (y, x) in enumerate(tokens):
        for j, (other_y, other_x) in enumerate(tokens):
            row = (y - other_y + height - 1) * (2 * width - 1) + (x - other_x + width - 1)
            assert torch.equal(bias[:, i, j], table[row])


def test_attention_with_a_swin_table_agrees_with_the_dense_bias() -> None:
    """A window's table as factors gives SDPA's output, and at full rank the table's gradient."""
    table = normal(7 * 7, 2, dtype=torch.float32).requires_grad_()
    bias = swin_table(table, 4)
    out, expected = attend(*from_dense(bias, rank=16), bias, 2)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(out, expected, table)


def published_bucket(distance: int, buckets: int, bidirectional: bool, max_distance: int) -> int:
    """Returns the bucket of j - i by the formula of T5's paper and code, in floating point."""
    first = 0
    if bidirectional:
        buckets //= 2
        first, distance = buckets * (distance > 0), abs(distance)
    else:
        distance = max(-distance, 0)
    exact = buckets // 2
    if distance < exact:
        return first + distance
    share = math.log(distance / exact) / math.log(max_distance / exact)
    return first + min(buckets - 1, exact + int(share * (buckets - exact)))


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(
    ("buckets", "max_distance", "offset"), [(32, 128, 0), (32, 128, 55), (32, 20, 0), (8, 300, 3), (4, 2, 0), (6, 7, 0)]
)
def test_t5_buckets_are_the_published_ones(buckets: int, max_distance: int, offset: int, bidirectional: bool) -> None:
    """Every pair of positions reads the bucket that T5's formula gives."""
    if not bidirectional and max_distance <= buckets // 2:
        max_distance = buckets
    table = torch.arange(buckets, dtype=torch.float64)[:, None]
    got = t5_table(table, 31, 330, bidirectional=bidirectional, max_distance=max_distance, query_offset=offset)[0]
    for i in range(31):
        for j in range(330):
            assert got[i, j] == published_bucket(j - i - offset, buckets, bidirectional, max_distance), (i, j)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_attention_with_a_t5_table_agrees_with_the_dense_bias(bidirectional: bool) -> None:
    """At full rank T5's bias is exact, and its table gets the dense bias's gradient."""
    table = normal(8, 2, dtype=torch.float32).requires_grad_()
    bias = t5_table(table, 17, 21, bidirectional=bidirectional, max_distance=12)
    factors = t5_relative(table, 17, 21, bidirectional=bidirectional, max_distance=12, rank=17)
    out, expected = attend(*factors, bias, 2, causal=not bidirectional)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(out, expected, table)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: from_dense(torch.ones(2, 2)), "exactly one of them, got none"),
        (lambda: from_dense(torch.ones(2, 2), rank=1, energy=0.5), "exactly one of them, got both"),
        (lambda: from_dense(torch.ones(2, 2), rank=0), "rank"),
        (lambda: from_dense(torch.ones(2, 2), energy=1.5), "energy: expected a number above 0, at most 1, got 1.5"),
        (lambda: from_dense(torch.ones(2), rank=1), "bias: expected (Sq, Sk)"),
        (lambda: from_dense(torch.full((2, 2), -math.inf), rank=1), "Exclude keys by the operator's mask"),
        (lambda: approximation(torch.ones(2, 3), torch.ones(1, 3, 1, 1), torch.ones(1, 3, 1, 1)), "q_bias: expected"),
        (lambda: approximation(torch.ones(2, 3), torch.ones(1, 2, 1, 1), torch.ones(1, 3, 1, 2)), "k_bias: expected"),
        (lambda: swin_table(torch.ones(9, 1), 3), "25 rows for a window of 3 x 3, got shape (9, 1)"),
        (lambda: swin_table(torch.ones(9, 1), (2, 2, 2)), "window"),
        (lambda: t5_table(torch.ones(5, 1), 3), "an even number of buckets"),
        (lambda: t5_table(torch.ones(1, 1), 3, bidirectional=False), "at least 2 buckets"),
        (lambda: t5_table(torch.ones(32, 1), 3, max_distance=8), "max_distance: expected more than 8"),
        (lambda: t5_table(torch.ones(32, 1), 3, query_offset=-1), "query_offset"),
    ],
)
def test_wrong_arguments_are_named(call, words: str) -> None:
    """Each error is an ArgumentError that says which argument, what was expected and what came."""
    with pytest.raises(ArgumentError) as caught:
        call()
    assert words in str(caught.value)
