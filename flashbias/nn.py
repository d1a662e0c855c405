"""An attention layer made with the operator: the example to copy, and modules that give its bias.

``FlashBiasAttention`` projects, asks for the bias's factors and calls ``flash_bias_func``. A bias is anything that
answers ``bias(seqlen_q, seqlen_k)`` with ``(q_bias, k_bias)``: a function, a builder of :mod:`flashbias.factors` with
its other arguments bound, or a module, whose parameters then belong to the layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from flashbias.api import flash_bias_func
from flashbias.errors import ArgumentError
from flashbias.factors import alibi, alibi_slopes, checks

__all__ = ["AlibiBias", "FlashBiasAttention", "PositionBias"]

Factors = tuple[Tensor, Tensor]
Bias = Callable[[int, int], Factors]


class FlashBiasAttention(nn.Module):
    """Multi-head self- or cross-attention with a low-rank bias, between linear projections; no dropout, no cache.

    Args:
        embed_dim: size E of inputs and outputs.
        nheads: number of query heads H.
        nheads_kv: number of key and value heads, a divisor of H (grouped queries, arXiv 2305.13245); H by default.
        headdim: size D of each head; E / H by default.
        bias: called with (Sq, Sk) in each forward, returns q_bias (B or 1, Sq, H or 1, R) and k_bias (B or 1, Sk, H,
            ``nheads_kv`` or 1, R) on any device; None is no bias. Both are taken as they are where they have the
            queries' dtype, else in fp32 (fp64 beside fp64).
        causal: False, True (query i sees keys j <= i) or "bottom_right" (the last query sees the last key).
        window_size: how many keys to the left and to the right of its own position a query sees, -1 for all.
        qkv_bias, out_bias: whether the projections to q, k and v, and the last one, add a vector.
        device, dtype: of the projections' weights. Kernels take 16 bits: on a GPU use such a dtype, or autocast.

    Raises:
        ArgumentError: sizes are no positive integers or do not divide each other, or ``bias`` is not callable.
            ``causal`` and ``window_size`` are checked in each forward.

    """

    def __init__(
        self,
        embed_dim: int,
        nheads: int,
        *,
        nheads_kv: int | None = None,
        headdim: int | None = None,
        bias: Bias | None = None,
        causal: bool | Literal["bottom_right"] = False,
        window_size: tuple[int, int] = (-1, -1),
        qkv_bias: bool = True,
        out_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim, self.nheads = checks.count("embed_dim", embed_dim), checks.count("nheads", nheads)
        self.nheads_kv = self.nheads if nheads_kv is None else checks.count("nheads_kv", nheads_kv)
        if headdim is None:
            _check_multiple("embed_dim", self.embed_dim, "nheads", self.nheads, "Or say headdim.")
            headdim = self.embed_dim // self.nheads
        self.headdim = checks.count("headdim", headdim)
        _check_multiple("nheads", self.nheads, "nheads_kv", self.nheads_kv)
        _check_bias(bias)
        self.bias, self.causal, self.window_size = bias, causal, window_size
        inner, inner_kv = self.nheads * self.headdim, self.nheads_kv * self.headdim
        self.query = nn.Linear(self.embed_dim, inner, bias=qkv_bias, device=device, dtype=dtype)
        self.key = nn.Linear(self.embed_dim, inner_kv, bias=qkv_bias, device=device, dtype=dtype)
        self.value = nn.Linear(self.embed_dim, inner_kv, bias=qkv_bias, device=device, dtype=dtype)
        self.out = nn.Linear(inner, self.embed_dim, bias=out_bias, device=device, dtype=dtype)

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, factors: Factors | None = None
    ) -> Tensor:
        """Returns the attention of ``x`` to ``context``, (B, Sq, E).

        Args:
            x: (B, Sq, E), where queries come from.
            context: (B, Sk, E), where keys and values come from; ``x`` by default.
            mask: broadcastable to (B, H, Sq, Sk); bool (True takes part) or added to the scores.
            factors: (q_bias, k_bias) for this call, in place of the module's own bias: for a bias that depends on
                more than the lengths, or that is built once for all layers.

        Raises:
            ArgumentError: an argument has a wrong type or shape, or ``flash_bias_func`` refuses the call.
            UnsupportedError: as ``flash_bias_func``.

        """
        context = x if context is None else context
        self._check_input("x", x)
        self._check_input("context", context)
        q = self.query(x).unflatten(-1, (self.nheads, self.headdim))
        k = self.key(context).unflatten(-1, (self.nheads_kv, self.headdim))
        v = self.value(context).unflatten(-1, (self.nheads_kv, self.headdim))
        if factors is None and self.bias is not None:
            factors = self.bias(q.shape[1], k.shape[1])
        q_bias, k_bias = (None, None) if factors is None else _beside(q, factors)
        out = flash_bias_func(q, k, v, q_bias, k_bias, mask, self.causal, window_size=self.window_size)
        return self.out(out.flatten(2))  # type: ignore[no-any-return]

    def _check_input(self, name: str, tensor: object) -> None:
        if not isinstance(tensor, Tensor) or tensor.dim() != 3 or tensor.shape[2] != self.embed_dim:
            got = f"shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ArgumentError.explain(name, expected=f"a tensor (B, S, {self.embed_dim})", got=got)

    def extra_repr(self) -> str:
        """Returns what ``print(module)`` says beside the projections."""
        names = ("nheads", "nheads_kv", "headdim", "causal", "window_size")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


class AlibiBias(nn.Module):
    """ALiBi's bias slope · (j − i) (arXiv 2108.12409) for causal attention, by ``flashbias.factors.alibi``.

    ``module.to(torch.bfloat16)`` rounds slopes too, which scales a head's bias as a whole; positions stay in fp32.

    Args:
        nheads: number of query heads H.
        learnable: whether the slopes are a parameter; they start as the published ones.
        device: of the slopes.

    Raises:
        ArgumentError: ``nheads`` is no positive integer.

    """

    slopes: Tensor

    def __init__(self, nheads: int, *, learnable: bool = False, device: torch.device | str | None = None) -> None:
        super().__init__()
        slopes = alibi_slopes(nheads, device=device)
        if learnable:
            self.slopes = nn.Parameter(slopes)
        else:
            self.register_buffer("slopes", slopes, persistent=False)

    def forward(self, seqlen_q: int, seqlen_k: int) -> Factors:
        """Returns q_bias (1, Sq, H, 1) and k_bias (1, Sk, 1, 1) in fp32, in fp64 if the slopes are."""
        dtype = torch.promote_types(self.slopes.dtype, torch.float32)
        return alibi(len(self.slopes), seqlen_q, seqlen_k, slopes=self.slopes, dtype=dtype)


class PositionBias(nn.Module):
    """A bias between fixed places, such as an image's patches: a builder of factors and the coordinates it is given.

    Args:
        builder: called with both coordinates, returns (q_bias, k_bias): ``flashbias.factors.squared_distance``, a
            ``NeuralFactors``, or a function of yours. If it is a module, its parameters belong to this one.
        coordinates: (Sq, d), or what else the builder takes, for the queries. No part of the state dict.
        coordinates_k: (Sk, d), likewise for the keys; ``coordinates`` by default.

    """

    coordinates: Tensor
    coordinates_k: Tensor

    def __init__(
        self, builder: Callable[[Tensor, Tensor], Factors], coordinates: Tensor, coordinates_k: Tensor | None = None
    ) -> None:
        super().__init__()
        self.builder = builder
        self.register_buffer("coordinates", coordinates, persistent=False)
        self.register_buffer("coordinates_k", coordinates if coordinates_k is None else coordinates_k, persistent=False)

    def forward(self, seqlen_q: int, seqlen_k: int) -> Factors:
        """Returns what the builder makes of the coordinates."""
        del seqlen_q, seqlen_k  # the operator refuses lengths other than theirs
        return self.builder(self.coordinates, self.coordinates_k)


def _check_multiple(name: str, value: int, owner: str, divisor: int, cure: str = "") -> None:
    if value % divisor:
        raise ArgumentError.explain(name, expected=f"a multiple of {owner} = {divisor}", got=str(value), cure=cure)


def _check_bias(bias: object) -> None:
    if bias is not None and not callable(bias):
        cure = "qkv_bias and out_bias say whether projections add a vector."
        expected = "a callable (seqlen_q, seqlen_k) -> (q_bias, k_bias), or None"
        raise ArgumentError.explain("bias", expected=expected, got=type(bias).__name__, cure=cure)


def _beside(q: Tensor, factors: object) -> Factors:
    """Returns the factors on q's device, in one dtype that the operator takes beside it."""
    pair = factors if isinstance(factors, tuple | list) else ()
    if len(pair) != 2 or not all(isinstance(factor, Tensor) for factor in pair):
        expected, cure = "two tensors (q_bias, k_bias)", "flashbias.factors.from_dense makes them of a dense bias."
        raise ArgumentError.explain("factors", expected=expected, got=type(factors).__name__, cure=cure)
    # 16 bits hold few digits of a position or a distance: a factor is never rounded to them here.
    same = all(factor.dtype == q.dtype for factor in pair)
    dtype = q.dtype if same else torch.promote_types(q.dtype, torch.float32)
    q_bias, k_bias = (factor.to(device=q.device, dtype=dtype) for factor in pair)
    return q_bias, k_bias
