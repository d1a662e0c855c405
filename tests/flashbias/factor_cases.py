"""Attention with a bias given as factors, beside the same with the dense bias."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flashbias import flash_bias_func


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Returns standard normal numbers that depend on shape and seed only."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def product(q_bias: Tensor, k_bias: Tensor) -> Tensor:
    """Returns q_bias k_biasᵀ (B, H, Sq, Sk) in fp64."""
    q_bias, k_bias = torch.broadcast_tensors(q_bias.double()[:, :, None], k_bias.double()[:, None])
    return (q_bias * k_bias).sum(-1).permute(0, 3, 1, 2)


def attend(q_bias: Tensor, k_bias: Tensor, bias: Tensor, heads: int, causal: bool = False) -> tuple[Tensor, Tensor]:
    """Returns two outputs of one random call: the operator's with factors, in fp32, and SDPA's with ``bias``, in fp64."""
    batch = max(len(q_bias), len(k_bias), len(bias) if bias.dim() == 4 else 1)
    q, k, v = (
        normal(batch, length, heads, 8, seed=seed, dtype=torch.float32)
        for seed, length in ((1, q_bias.shape[1]), (2, k_bias.shape[1]), (3, k_bias.shape[1]))
    )
    out = flash_bias_func(q, k, v, q_bias, k_bias, causal=causal)
    mask = bias.double().expand(batch, heads, -1, -1)
    if causal:
        seen = torch.ones(mask.shape[-2:], dtype=torch.bool).tril()
        mask = mask.masked_fill(~seen, -torch.inf)
    expected = F.scaled_dot_product_attention(*(t.double().transpose(1, 2) for t in (q, k, v)), attn_mask=mask)
    return out, expected.transpose(1, 2)


def assert_same_gradients(out: Tensor, expected: Tensor, leaf: Tensor, tolerance: float = 1e-4) -> None:
    """Asserts that ``leaf`` gets the same gradient through both outputs of ``attend``."""
    dout = normal(*out.shape, seed=4)
    got, wanted = (torch.autograd.grad(o, leaf, dout.to(o.dtype), retain_graph=True)[0] for o in (out, expected))
    assert wanted.norm() > 0
    assert (got.double() - wanted.double()).norm() <= tolerance * wanted.double().norm()
