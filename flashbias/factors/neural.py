"""Factors as functions of positions, by two small networks (FlashBias, arXiv 2505.12044: the neural decomposition)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flashbias.errors import ArgumentError
from flashbias.factors import checks
from flashbias.factors.dense import approximation

Progress = Callable[[int, int, float], None]

_ROUND_STEPS = 50  # steps of gradient descent between two exact solutions of the output layers
_BLOCK = 512  # rows and keys of the bias that one step looks at
_RATE = 1e-3  # of 1e-3, 3e-3 and 1e-2 the best on three biases in 2-D and 3-D
_SMALLEST = 1e-4  # directions of hidden features below this share of the largest would ask for huge weights

logger = logging.getLogger(__name__)


class NeuralFactors(nn.Module):
    """Two small networks, phi_q(x_i) · phi_k(y_j) ≈ bias(x_i, y_j): factors for any positions of queries and keys.

    Each has two hidden layers with tanh and a linear output, as in FlashBias (arXiv 2505.12044). Where an SVD gives
    factors of one matrix, these are functions: fitted to one set of positions, they serve others within its range,
    and gradients reach weights and positions, so they can also be trained as a part of a model.

    Args:
        dim_q: number of coordinates d of a query.
        nheads: number of heads H.
        rank: number of columns R.
        dim_k: number of coordinates of a key; that of a query by default.
        width: units in each hidden layer.
        seed: of the initial weights; PyTorch's own random state is neither read nor changed.

    Raises:
        ArgumentError: a size is no positive integer.

    """

    def __init__(
        self, dim_q: int, nheads: int, rank: int, *, dim_k: int | None = None, width: int = 128, seed: int = 0
    ) -> None:
        super().__init__()
        self.nheads, self.rank = checks.count("nheads", nheads), checks.count("rank", rank)
        dims = checks.count("dim_q", dim_q), checks.count("dim_k", dim_q if dim_k is None else dim_k)
        random = torch.Generator().manual_seed(seed)
        width, outputs = checks.count("width", width), self.nheads * self.rank
        self.phi_q, self.phi_k = (_Network(dim, width, outputs, random) for dim in dims)

    def forward(self, coordinates_q: Tensor, coordinates_k: Tensor) -> tuple[Tensor, Tensor]:
        """Returns q_bias (B or 1, Sq, H, R) and k_bias (B or 1, Sk, H, R) in the weights' dtype, also under autocast.

        Args:
            coordinates_q: (Sq, d) or (B, Sq, d), any float dtype.
            coordinates_k: (Sk, d) or (B, Sk, d).

        Raises:
            ArgumentError: coordinates have a wrong type, shape or device.

        """
        dims = (2, 3)
        q_bias = self.phi_q(_coordinates("coordinates_q", coordinates_q, self.phi_q, dims))
        k_bias = self.phi_k(_coordinates("coordinates_k", coordinates_k, self.phi_k, dims))
        heads = (self.nheads, self.rank)
        return _batched(q_bias).unflatten(-1, heads), _batched(k_bias).unflatten(-1, heads)

    def fit(
        self,
        coordinates_q: Tensor,
        coordinates_k: Tensor,
        bias: Tensor,
        *,
        steps: int = 2000,
        tolerance: float = 0.01,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> float:
        """Returns the relative error after fitting the networks to a dense bias: that of the worst head, Frobenius.

        For fixed hidden layers the best output layers are known: a least-squares solution truncated to rank R. It is
        taken first, and often suffices for a smooth bias in few dimensions; then Adam improves all layers, in rounds of
        50 steps that each end with that solution. The best weights seen are kept. The fit ends as soon as the
        tolerance is met, so the call is cheap on weights that fit already. No rank-R factors, these or others, have a
        smaller error than those of ``from_dense(bias, rank=R)``: where those miss the tolerance, ask for a higher rank.

        Positions are standardised by this call's mean and spread first, which become part of the module's state.
        Everything is computed on the weights' device. The same seed and inputs give the same weights on one machine.

        Args:
            coordinates_q: (Sq, d), any float dtype.
            coordinates_k: (Sk, d).
            bias: (Sq, Sk) or (H, Sq, Sk), finite.
            steps: the most steps of gradient descent.
            tolerance: relative error to stop at; 0 takes all steps.
            seed: of the rows and keys that a step looks at where there are more than 512.
            progress: called with (steps done, ``steps``, relative error so far) before the first round and after each.
                Without it the same goes to the logger ``flashbias.factors.neural`` at level DEBUG.

        Raises:
            ArgumentError: an argument has a wrong type, shape, device or value.

        """
        steps = checks.count("steps", steps, 0)
        if not isinstance(tolerance, int | float) or not 0.0 <= tolerance < math.inf:
            raise ArgumentError.explain("tolerance", expected="a number, not negative", got=repr(tolerance)[:60])
        task = self._task(coordinates_q, coordinates_k, bias)
        with torch.autocast(task.bias.device.type, enabled=False):  # else a caller's would lower the backward passes
            return self._descend(task, steps, tolerance, torch.Generator().manual_seed(seed), progress)

    def _descend(
        self, task: _Task, steps: int, tolerance: float, random: torch.Generator, progress: Progress | None
    ) -> float:
        """Fits the networks in rounds and leaves the best weights seen in them; returns their relative error."""
        self.phi_q.standardise(task.points_q)
        self.phi_k.standardise(task.points_k)
        weights = list(self.parameters())
        optimizer = torch.optim.Adam(weights, lr=_RATE)
        done, error, best = 0, self._solve(task), [weight.detach().clone() for weight in weights]
        _report(progress, done, steps, error)
        while done < steps and error > tolerance:
            count = min(_ROUND_STEPS, steps - done)
            for _ in range(count):
                self._step(optimizer, task, random)
            done += count
            reached = self._solve(task)
            if reached < error:
                error, best = reached, [weight.detach().clone() for weight in weights]
            _report(progress, done, steps, error)
        with torch.no_grad():
            for weight, value in zip(weights, best, strict=True):
                weight.copy_(value)
        return error

    def _task(self, coordinates_q: object, coordinates_k: object, bias: object) -> _Task:
        """Returns valid arguments of a fit, in the weights' dtype and without gradients."""
        points_q = _coordinates("coordinates_q", coordinates_q, self.phi_q, (2,)).detach()
        points_k = _coordinates("coordinates_k", coordinates_k, self.phi_k, (2,)).detach()
        bias = checks.floats("bias", bias, "(Sq, Sk) or (H, Sq, Sk)", (2, 3))
        expected = (self.nheads, len(points_q), len(points_k))
        if (1, *bias.shape)[-3:] != expected:
            got = f"shape {tuple(bias.shape)}"
            raise ArgumentError.explain("bias", expected=f"(H, Sq, Sk) = {expected}", got=got)
        checks.same_device("bias", bias, "coordinates_q", points_q)
        checks.finite("bias", bias, "Exclude keys by the operator's mask, and give the bias any finite value there.")
        target = bias.detach().to(points_q.dtype).reshape(expected)
        power = target.square().mean((1, 2))
        return _Task(points_q, points_k, target, power.masked_fill(power == 0.0, 1.0))

    @torch.enable_grad()
    def _step(self, optimizer: torch.optim.Optimizer, task: _Task, random: torch.Generator) -> None:
        """Takes one step down the mean over heads of the relative squared error, on a block of the bias."""
        rows, keys = (_block(len(points), random).to(points.device) for points in (task.points_q, task.points_k))
        q_bias, k_bias = self(task.points_q[rows], task.points_k[keys])
        difference = q_bias[0].transpose(0, 1) @ k_bias[0].permute(1, 2, 0) - task.bias[:, rows[:, None], keys]
        optimizer.zero_grad()
        (difference.square().mean((1, 2)) / task.power).mean().backward()
        optimizer.step()

    @torch.no_grad()
    def _solve(self, task: _Task) -> float:
        """Sets the output layers to the best ones for the hidden layers as they are; returns the relative error.

        With Φ the hidden features and a column of ones, Φ = P Σ T' per side, the best product Φ_q W_q (Φ_k W_k)' of
        rank R comes from the singular values of the small matrix P_q' bias P_k.
        """
        basis_q, weights_q = self.phi_q.basis(task.points_q)
        basis_k, weights_k = self.phi_k.basis(task.points_k)
        for head, matrix in enumerate(task.bias):
            left, values, right = torch.linalg.svd(basis_q.mT @ (matrix.double() @ basis_k), full_matrices=False)
            roots = values[: self.rank].sqrt()
            self.phi_q.set_output(head * self.rank, self.rank, weights_q @ (left[:, : self.rank] * roots))
            self.phi_k.set_output(head * self.rank, self.rank, weights_k @ (right.mT[:, : self.rank] * roots))
        q_bias, k_bias = self(task.points_q, task.points_k)
        return float(approximation(task.bias, q_bias, k_bias).relative_error.max())


class _Task(NamedTuple):
    """What to fit: positions (Sq, d) and (Sk, d), the bias (H, Sq, Sk) and each head's mean square (H,), 1 for 0."""

    points_q: Tensor
    points_k: Tensor
    bias: Tensor
    power: Tensor


class _Network(nn.Module):
    """One side: (…, d) -> (…, outputs). Initial weights are drawn from ``random``."""

    centre: Tensor
    spread: Tensor

    def __init__(self, dim: int, width: int, outputs: int, random: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(dim))
        self.register_buffer("spread", torch.ones(dim))
        self.first, self.second, self.output = (
            _linear(*sizes, random) for sizes in ((dim, width), (width, width), (width, outputs))
        )

    def features(self, points: Tensor) -> Tensor:
        """Returns what the output layer sees: (…, width)."""
        hidden = self.first((points - self.centre) / self.spread).tanh()
        return self.second(hidden).tanh()  # type: ignore[no-any-return]

    def forward(self, points: Tensor) -> Tensor:
        with torch.autocast(points.device.type, enabled=False):
            return self.output(self.features(points))  # type: ignore[no-any-return]

    @torch.no_grad()
    def standardise(self, points: Tensor) -> None:
        """Measures positions from the mean of ``points`` in units of their spread from now on."""
        spread = points.std(0, correction=0)
        self.centre.copy_(points.mean(0))
        self.spread.copy_(spread.masked_fill(spread == 0.0, 1.0))

    def basis(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Returns an orthonormal basis (S, n) of the features and a constant, and (width + 1, n) that makes it of them."""
        features = self.features(points).double()
        features = torch.cat([features, features.new_ones(len(points), 1)], 1)
        left, values, right = torch.linalg.svd(features, full_matrices=False)
        kept = int((values > _SMALLEST * values[0]).sum())
        return left[:, :kept], right.mT[:, :kept] / values[:kept]

    def set_output(self, start: int, count: int, weights: Tensor) -> None:
        """Sets ``count`` outputs from ``start`` on to weights (width + 1, n) and those beyond n to zero."""
        layer = nn.functional.pad(weights, (0, count - weights.shape[1])).mT
        self.output.weight[start : start + count] = layer[:, :-1].to(self.output.weight.dtype)
        self.output.bias[start : start + count] = layer[:, -1].to(self.output.bias.dtype)


def _linear(inputs: int, outputs: int, random: torch.Generator) -> nn.Linear:
    """Returns a layer with normal weights of variance 1 / inputs and standard normal biases: tanh bends everywhere."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs, device=torch.get_default_device())
    with torch.no_grad():
        layer.weight.copy_(torch.randn(outputs, inputs, generator=random, device=random.device) / math.sqrt(inputs))
        layer.bias.copy_(torch.randn(outputs, generator=random, device=random.device))
    return layer


def _coordinates(name: str, points: object, network: _Network, dims: tuple[int, ...]) -> Tensor:
    """Returns valid coordinates in the weights' dtype."""
    layout = "(S, d)" if dims == (2,) else "(S, d) or (B, S, d)"
    points = checks.floats(name, points, layout, dims)
    if points.shape[-1] != len(network.centre):
        expected = f"{len(network.centre)} coordinates (last dim)"
        raise ArgumentError.explain(name, expected=expected, got=f"shape {tuple(points.shape)}")
    checks.same_device(name, points, "the module's weights", network.centre)
    return points.to(network.centre.dtype)


def _batched(outputs: Tensor) -> Tensor:
    """Returns outputs (S, n) or (B, S, n) as (1, S, n) or (B, S, n)."""
    return outputs if outputs.dim() == 3 else outputs[None]


def _block(length: int, random: torch.Generator) -> Tensor:
    """Returns the positions one step looks at: all, or as many random ones as it takes at once."""
    if length <= _BLOCK:
        return torch.arange(length)
    return torch.randperm(length, generator=random, device=random.device)[:_BLOCK]


def _report(progress: Progress | None, done: int, steps: int, error: float) -> None:
    if progress is None:
        logger.debug("NeuralFactors: %d of at most %d steps, relative error %.2e", done, steps, error)
    else:
        progress(done, steps, error)
