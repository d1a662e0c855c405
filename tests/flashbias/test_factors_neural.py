"""Factors as functions of positions: fitted, reproducible, and trainable through the operator."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import Tensor

from flashbias.errors import ArgumentError
from flashbias.factors import NeuralFactors, approximation, from_dense, neural
from tests.flashbias.factor_cases import assert_same_gradients, attend, normal, product


def grid(side: int) -> Tensor:
    """Returns the positions (side², 2) of a grid in the unit square."""
    places = torch.linspace(0, 1, side, dtype=torch.float64)
    return torch.cartesian_prod(places, places)


def distance(x: Tensor, y: Tensor) -> Tensor:
    """Returns minus the smoothed distance, (1, Sq, Sk)."""
    return -((x[:, None] - y).square().sum(-1) + 0.01).sqrt()[None]


def swin_v2(x: Tensor, heads: int = 4) -> Tensor:
    """Returns a bias (H, S, S) of the form of Swin V2's: 16 σ(small ReLU network of log-spaced offsets)."""
    offsets = 8 * (x[:, None] - x)
    offsets = offsets.sign() * offsets.abs().log1p() / math.log(9)
    hidden = (offsets @ normal(2, 512, seed=1) / 2**0.5 + normal(512, seed=2) / 2).relu()
    return 16 * torch.sigmoid(hidden @ normal(512, heads, seed=3) / 2 / 512**0.5).permute(2, 0, 1)


@pytest.mark.parametrize("kind", ["distance", "swin_v2"])
def test_a_smooth_relative_bias_in_two_dimensions_is_fitted_to_one_per_cent(kind: str) -> None:
    """At rank 16 every head is within 1 %, as promised and as reported, close to the best that any factors reach."""
    x = grid(16)
    bias = distance(x, x) if kind == "distance" else swin_v2(x)
    module = NeuralFactors(2, len(bias), 16)
    error = module.fit(x, x, bias)
    q_bias, k_bias = module(x, x)
    assert q_bias.shape == k_bias.shape == (1, 256, len(bias), 16)
    difference = bias - product(q_bias, k_bias)[0].detach()
    actual = (difference.norm(dim=(1, 2)) / bias.norm(dim=(1, 2))).max()
    assert actual <= 0.01
    assert error == pytest.approx(float(actual), rel=1e-4)
    best = approximation(bias, *from_dense(bias, rank=16)).relative_error.max()
    assert error <= 1.1 * best


def test_descent_improves_what_the_output_layers_alone_cannot() -> None:
    """Narrow networks start above the tolerance; steps on all layers bring them down, and the error never rises."""
    x = grid(12)
    seen: list[tuple[int, int, float]] = []
    module = NeuralFactors(2, 1, 16, width=24)
    error = module.fit(x, x, distance(x, x), steps=400, tolerance=0.0, progress=lambda *row: seen.append(row))
    assert [row[:2] for row in seen] == [(step, 400) for step in range(0, 401, 50)]
    errors = [row[2] for row in seen]
    assert errors == sorted(errors, reverse=True)
    assert error == errors[-1] < 0.9 * errors[0]
    assert float(approximation(distance(x, x), *module(x, x)).relative_error) == pytest.approx(error)


def test_the_best_weights_seen_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that lead away, here far too long ones, leave the module as good as it was, and as good as reported."""
    monkeypatch.setattr(neural, "_RATE", 3.0)
    x = grid(12)
    module = NeuralFactors(2, 1, 8, width=24)
    before = module.fit(x, x, distance(x, x), steps=0)
    assert module.fit(x, x, distance(x, x), steps=50, tolerance=0.0) == before
    assert float(approximation(distance(x, x), *module(x, x)).relative_error) == pytest.approx(before)


def test_the_fit_serves_positions_it_has_not_seen() -> None:
    """Factors are functions: between the points of the fit the bias is about as good as on them."""
    x, y = grid(12), torch.rand(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    module = NeuralFactors(2, 1, 16)
    module.fit(x, x, distance(x, x), steps=0)
    assert approximation(distance(y, x), *module(y, x)).relative_error < 0.02


def test_queries_and_keys_may_differ_and_be_many() -> None:
    """Other numbers of points and coordinates on each side, more than one step looks at, and a head without bias."""
    x, y = grid(24), normal(530, 1)
    bias = torch.sin(2 * x[:, :1]) * torch.exp(-(y.T**2))
    module = NeuralFactors(2, 2, 3, dim_k=1, width=32)
    error = module.fit(x, y, torch.stack([bias, torch.zeros_like(bias)]), steps=50, tolerance=0.0)
    assert error < 0.02
    q_bias, k_bias = module(x, y)
    assert not product(q_bias, k_bias)[0, 1].any()


def test_a_seed_gives_the_same_weights_and_leaves_torch_alone() -> None:
    """Construction and fit neither read nor change PyTorch's random state; another seed gives other weights."""
    x = grid(24)
    runs = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        module = NeuralFactors(2, 1, 4, width=16, seed=seed)
        module.fit(x, x, distance(x, x), steps=2, tolerance=0.0)
        assert torch.equal(torch.get_rng_state(), state)
        runs.append(torch.cat([weight.detach().flatten() for weight in module.parameters()]))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_autocast_does_not_reach_into_a_fit() -> None:
    """A fit inside a caller's autocast gives the same weights as outside: nothing is rounded to 16 bits."""
    x = grid(5)
    modules = [NeuralFactors(2, 1, 4, width=16) for _ in range(2)]
    modules[0].fit(x, x, distance(x, x), steps=3, tolerance=0.0)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        modules[1].fit(x, x, distance(x, x), steps=3, tolerance=0.0)
    for weight, other in zip(*(module.parameters() for module in modules), strict=True):
        assert torch.equal(weight, other)


def test_a_saved_module_gives_the_same_factors() -> None:
    """The state dict holds all there is, the measure of positions included."""
    x = 100 + 5 * grid(6)
    module, other = NeuralFactors(2, 2, 4, width=16), NeuralFactors(2, 2, 4, width=16, seed=1)
    module.fit(x, x, distance(x, x).expand(2, -1, -1), steps=1, tolerance=0.0)
    other.load_state_dict(module.state_dict())
    for got, expected in zip(other(x, x), module(x, x), strict=True):
        assert torch.equal(got, expected)


def test_progress_goes_to_the_log_by_default(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture) -> None:
    """Without a callable, rounds are lines at level DEBUG and nothing is printed."""
    x = grid(4)
    with caplog.at_level(logging.DEBUG, "flashbias"):
        NeuralFactors(2, 1, 2, width=8).fit(x, x, distance(x, x), steps=50, tolerance=0.0)
    assert [record.levelname for record in caplog.records] == ["DEBUG", "DEBUG"]
    assert "50 of at most 50 steps" in caplog.text
    assert capsys.readouterr() == ("", "")


def test_attention_with_fitted_factors_agrees_with_the_dense_bias() -> None:
    """The operator's output with the networks' factors is SDPA's with the dense bias, to the accuracy of the fit."""
    x = grid(7)
    bias = 4 * torch.exp(-2 * torch.cdist(x, x).square())
    module = NeuralFactors(2, 1, 16)
    assert module.fit(x, x, bias, tolerance=1e-3) <= 1e-3
    out, expected = attend(*module(x, x), bias, 3)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-2)


def test_networks_train_through_the_operator() -> None:
    """Weights and positions get the gradients that they get through a dense bias, batches and autocast included."""
    x = normal(2, 9, 3, dtype=torch.float32).requires_grad_()
    module = NeuralFactors(3, 2, 4, width=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q_bias, k_bias = module(x, x)
    assert q_bias.shape == k_bias.shape == (2, 9, 2, 4)
    assert q_bias.dtype == torch.float32
    out, expected = attend(q_bias, k_bias, product(q_bias, k_bias), 2)
    for leaf in (x, module.phi_q.first.weight, module.phi_k.output.weight):
        assert_same_gradients(out, expected, leaf, 1e-3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, x, b: NeuralFactors(2, 0, 4), "nheads"),
        (lambda m, x, b: m(x[:, :1], x), "coordinates_q: expected 2 coordinates (last dim), got shape (9, 1)"),
        (lambda m, x, b: m(x, x[0]), "coordinates_k: expected (S, d) or (B, S, d)"),
        (lambda m, x, b: m.fit(x[None], x, b), "coordinates_q: expected (S, d), no size 0"),
        (lambda m, x, b: m.fit(x, x, b[0, :-1]), "bias: expected (H, Sq, Sk) = (1, 9, 9), got shape (8, 9)"),
        (lambda m, x, b: m.fit(x, x, b.log()), "bias: expected finite values"),
        (lambda m, x, b: m.fit(x, x, b, steps=-1), "steps"),
        (lambda m, x, b: m.fit(x, x, b, tolerance=-0.1), "tolerance: expected a number, not negative, got -0.1"),
        (lambda m, x, b: m.fit(x, x, b.to("meta")), "bias: expected cpu"),
    ],
)
def test_wrong_arguments_are_named(call, words: str) -> None:
    """Each error is an ArgumentError that says which argument, what was expected and what came."""
    x = grid(3)
    with pytest.raises(ArgumentError) as caught:
        call(NeuralFactors(2, 1, 4, width=8), x, distance(x, x))
    assert words in str(caught.value)
