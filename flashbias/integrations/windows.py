"""Window attention of Swin V2 (arXiv 2111.09883) by factors: its bias over relative positions, cut to a given share."""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor, nn

from flashbias.api import flash_bias_func
from flashbias.factors import from_dense

_LARGEST_SCALE: Final = math.log(100.0)  # the paper's bound on the learned scale of the cosines
_HEIGHT: Final = 16.0  # and of the bias, which is this times a sigmoid
_KEPT: Final = "_flashbias_factors"


def forward(layer: Any, hidden_states: Tensor, attention_mask: Tensor | None, *, energy: float) -> tuple[Tensor]:
    """Computes what transformers' Swinv2SelfAttention does, for hidden states (windows, N, C); returns the same shape.

    ``attention_mask`` (W, N, N) is added for each of the W windows of an image. ``energy`` is the share of the bias that
    is kept, see :func:`flashbias.factors.from_dense`.
    """
    windows = hidden_states.shape[0]
    heads = (layer.num_attention_heads, layer.attention_head_size)
    query, key, value = (part(hidden_states).unflatten(2, heads) for part in (layer.query, layer.key, layer.value))
    scale = layer.logit_scale.clamp(max=_LARGEST_SCALE).exp().view(-1, 1)
    query = (nn.functional.normalize(query, dim=-1) * scale).to(value.dtype)
    key = nn.functional.normalize(key, dim=-1)
    q_bias, k_bias = _factors(layer, energy)
    mask = None
    if attention_mask is not None:
        # The library adds it twice. Windows of one image follow each other, images too.
        mask = (2 * attention_mask).to(value.dtype).repeat(windows // attention_mask.shape[0], 1, 1)[:, None]
    out = flash_bias_func(query, key, value, q_bias, k_bias, mask, softmax_scale=1.0)
    return (out.flatten(2),)


def bias(layer: Any) -> Tensor:
    """Returns the layer's dense bias (H, N, N), short of each row's mean, which softmax ignores."""
    area = math.prod(layer.window_size)
    table = layer.continuous_position_bias_mlp(layer.relative_coords_table).view(-1, layer.num_attention_heads)
    dense = table[layer.relative_position_index.view(-1)].view(area, area, -1).permute(2, 0, 1)
    dense = _HEIGHT * torch.sigmoid(dense.float())
    return dense - dense.mean(-1, keepdim=True)


def _factors(layer: Any, energy: float) -> tuple[Tensor, Tensor]:
    """Returns the bias's factors; without gradients those of before, until a weight behind them changes."""
    weights = list(layer.continuous_position_bias_mlp.parameters())
    if torch.is_grad_enabled() and any(each.requires_grad for each in weights):
        return from_dense(bias(layer), energy=energy)
    state = [(each.data_ptr(), each._version, each.dtype, each.device) for each in weights]  # noqa: SLF001 - torch's own count of changes
    kept = vars(layer).get(_KEPT)
    if kept is None or kept[0] != state:
        with torch.no_grad():
            kept = state, from_dense(bias(layer), energy=energy)
        vars(layer)[_KEPT] = kept
    found: tuple[Tensor, Tensor] = kept[1]
    return found


def forget(layer: Any) -> None:
    """Drops what :func:`forward` keeps."""
    vars(layer).pop(_KEPT, None)
