"""Exact factors: ALiBi and squared distances, and the package they live in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flashbias
from flashbias.errors import ArgumentError
from flashbias.factors import alibi, alibi_slopes, squared_distance
from tests.flashbias.factor_cases import assert_same_gradients, attend, normal, product

ROOT = Path(__file__).resolve().parents[2]
SIZES = st.integers(1, 9)


def relative_positions(rows: int, keys: int) -> torch.Tensor:
    """Returns j - i in fp64."""
    return torch.arange(keys, dtype=torch.float64) - torch.arange(rows, dtype=torch.float64)[:, None]


def test_the_package_is_reached_by_attribute_and_by_import() -> None:
    """``import flashbias`` alone is enough to use flashbias.factors, and it does not load Triton."""
    code = (
        "import sys, flashbias; flashbias.factors.alibi(2, 3); assert 'triton' not in sys.modules\n"
        "from flashbias import factors; assert all(hasattr(factors, name) for name in factors.__all__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "factors" in dir(flashbias)


@pytest.mark.parametrize(
    ("nheads", "exponents"),
    [
        (1, [8]),
        (2, [4, 8]),
        (8, [1, 2, 3, 4, 5, 6, 7, 8]),
        (6, [2, 4, 6, 8, 1, 3]),
        (12, [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5]),
    ],
)
def test_slopes_are_the_published_ones(nheads: int, exponents: list[float]) -> None:
    """Powers of two get a geometric sequence; other numbers fill up with every other slope of twice as many heads."""
    assert torch.equal(alibi_slopes(nheads, dtype=torch.float64), 2.0 ** -torch.tensor(exponents, dtype=torch.float64))


@settings(deadline=None)
@given(nheads=SIZES, rows=SIZES, keys=SIZES)
def test_alibi_is_its_definition_up_to_a_constant_in_each_row(nheads: int, rows: int, keys: int) -> None:
    """The factors' product minus slope (j - i) is what the docstring says was dropped, and nothing that depends on j."""
    q_bias, k_bias = alibi(nheads, rows, keys, dtype=torch.float64)
    assert q_bias.shape == (1, rows, nheads, 1)
    assert k_bias.shape == (1, keys, 1, 1)
    slopes = alibi_slopes(nheads, dtype=torch.float64)[:, None, None]
    dropped = slopes * (keys // 2 - torch.arange(rows, dtype=torch.float64))[:, None]
    torch.testing.assert_close(product(q_bias, k_bias)[0] + dropped, slopes * relative_positions(rows, keys))


@pytest.mark.parametrize(("dtype", "keys"), [(torch.float16, 4096), (torch.bfloat16, 512), (torch.float32, 100_000)])
def test_alibi_positions_are_exact_to_the_length_promised(dtype: torch.dtype, keys: int) -> None:
    """Each position is held exactly, so neighbouring keys differ by 1."""
    _, k_bias = alibi(2, 1, keys, dtype=dtype)
    assert k_bias.dtype == dtype
    assert torch.equal(k_bias.double().flatten().diff(), torch.ones(keys - 1, dtype=torch.float64))


@pytest.mark.parametrize("nheads", [4, 6])
def test_attention_with_alibi_agrees_with_the_dense_bias(nheads: int) -> None:
    """The dropped constants change no output, and learnable slopes get the dense bias's gradient."""
    slopes = alibi_slopes(nheads).requires_grad_()
    bias = slopes.double()[:, None, None] * relative_positions(37, 37)
    out, expected = attend(*alibi(nheads, 37, slopes=slopes), bias, nheads, causal=True)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(out, expected, slopes)


def test_alibi_takes_slopes_as_numbers() -> None:
    """A list of slopes is as good as a tensor."""
    q_bias, k_bias = alibi(2, 3, 5, slopes=[0.5, 3.0], dtype=torch.float64)
    assert q_bias[0, 1, :, 0].tolist() == [0.5, 3.0]
    assert k_bias.flatten().tolist() == [-2.0, -1.0, 0.0, 1.0, 2.0]


@settings(deadline=None, max_examples=50)
@given(rows=SIZES, keys=SIZES, dim=st.integers(1, 5), offset=st.floats(-1e3, 1e3), seed=st.integers(0, 99))
def test_squared_distances_stay_within_the_error_stated(
    rows: int, keys: int, dim: int, offset: float, seed: int
) -> None:
    """In fp32, also far from the origin, the bias is off by at most (d + 8) 2^-22 |weight| r^2."""
    x, y = (normal(n, dim, seed=seed + i, dtype=torch.float32) + offset for i, n in enumerate((rows, keys)))
    q_bias, k_bias = squared_distance(x, y, weight=-0.7)
    assert q_bias.shape == (1, rows, 1, dim + 2)
    assert k_bias.shape == (1, keys, 1, dim + 2)
    x, y = x.double(), y.double()
    expected = -0.7 * (x[:, None] - y).square().sum(-1)
    centre = (x.mean(0) + y.mean(0)) / 2
    radius = (torch.cat([x, y]) - centre).norm(dim=-1).max()
    bound = (dim + 8) * 2.0**-22 * 0.7 * radius**2
    for result in (product(q_bias, k_bias)[0, 0], (q_bias[0, :, 0] @ k_bias[0, :, 0].T).double()):
        assert (result - expected).abs().max() <= bound


@pytest.mark.parametrize(
    ("x_shape", "y_shape", "weights"),
    [
        ((7, 3), (5, 3), ()),
        ((7, 3), (5, 3), (4,)),
        ((2, 7, 3), (5, 3), (4,)),
        ((2, 7, 3), (2, 5, 3), ()),
        ((2, 7, 4, 3), (1, 5, 1, 3), (4,)),
        ((1, 7, 1, 3), (2, 5, 4, 3), (1,)),
    ],
    ids=str,
)
def test_attention_with_squared_distances_agrees_with_the_dense_bias(
    x_shape: tuple[int, ...], y_shape: tuple[int, ...], weights: tuple[int, ...]
) -> None:
    """Points of any batches and heads give SDPA's output, and gradients reach both kinds of points and the weight."""
    x, y = (normal(*shape, seed=i, dtype=torch.float32).requires_grad_() for i, shape in enumerate((x_shape, y_shape)))
    weight = (-normal(*weights, seed=2, dtype=torch.float32).abs()).requires_grad_()
    wide = [t[None, :, None] if t.dim() == 2 else t[:, :, None] if t.dim() == 3 else t for t in (x, y)]
    distance = (wide[0].double()[:, :, None] - wide[1].double()[:, None]).square().sum(-1).permute(0, 3, 1, 2)
    bias = distance * weight.double().reshape(-1, 1, 1)
    heads = bias.shape[1] if bias.shape[1] > 1 else 4
    out, expected = attend(*squared_distance(x, y, weight=weight), bias, heads)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    for leaf in (x, y, weight):
        assert_same_gradients(out, expected, leaf)


def test_each_batch_has_its_own_centre() -> None:
    """Batches that lie far apart keep the accuracy of each: its points are measured from its own mean."""
    places = torch.tensor([0.0, 3e4])[:, None, None]
    x, y = (normal(2, 6, 2, seed=seed, dtype=torch.float32) + places for seed in (0, 1))
    expected = -(x.double()[:, :, None] - y.double()[:, None]).square().sum(-1)
    assert (product(*squared_distance(x, y))[:, 0] - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: alibi(0, 3), "nheads: expected an integer of at least 1, got 0"),
        (lambda: alibi(2, 3.0), "seqlen_q"),
        (lambda: alibi(True, 3), "nheads"),
        (lambda: alibi(2, 3, slopes=torch.ones(3)), "slopes: expected one for each head, shape (2,), got shape (3,)"),
        (lambda: alibi(2, 3, dtype=torch.int64), "dtype"),
        (lambda: alibi(2, 1, 140_000, dtype=torch.float16), "positions to 70000"),
        (lambda: squared_distance(torch.ones(3, 2), torch.ones(3, 1)), "2 in x, 1 in y"),
        (lambda: squared_distance(torch.ones(3), torch.ones(3, 1)), "x: expected (S, d)"),
        (lambda: squared_distance(torch.ones(3, 1), [1.0]), "y: expected a tensor"),
        (lambda: squared_distance(torch.ones(3, 1).int(), torch.ones(3, 1)), "dense float tensor"),
        (lambda: squared_distance(torch.ones(2, 3, 1), torch.ones(3, 3, 1)), "same number of batches"),
        (lambda: squared_distance(torch.ones(3, 1), torch.ones(3, 1, device="meta")), "expected cpu as x"),
        (lambda: squared_distance(torch.ones(3, 1), torch.ones(3, 1), weight="near"), "weight"),
        (lambda: squared_distance(*[torch.ones(1, 3, 2, 1)] * 2, weight=torch.ones(3)), "2 heads as the points"),
    ],
)
def test_wrong_arguments_are_named(call, words: str) -> None:
    """Each error is an ArgumentError that says which argument, what was expected and what came."""
    with pytest.raises(ArgumentError) as caught:
        call()
    assert words in str(caught.value)
