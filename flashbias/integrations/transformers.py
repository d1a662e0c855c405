"""Attention of Hugging Face transformers (5.0 or newer) with a bias, BLOOM, MPT and Swin V2, by ``flash_bias_func``.

These models do not go through the library's attention interface: their layers add the bias themselves. So :func:`attach`
gives each attention layer another forward, and those with ALiBi a mask function that leaves causality to the kernel: of a
batch with padding only the keys' mask is made, (B, 1, 1, Sk), and no matrix of queries and keys at all. Weights, caches,
generation and ``state_dict`` stay as they are, and :func:`detach` undoes it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor, nn

from flashbias.api import flash_bias_func
from flashbias.errors import ArgumentError, UnsupportedError
from flashbias.integrations import windows

# Not with "flash" in it: the library takes that for its own flash-attention.
_MASKS: Final = {"bloom": "low_rank_bias", "mpt": "low_rank_bias_mpt"}
_BEFORE: Final = "_flashbias_before"
ENERGY: Final = 1.0 - 1e-8  # an error of 1e-4 of the bias, below what 16-bit inputs round away


class _Family(NamedTuple):
    """One kind of model: the layers to replace, and the models around them that make the masks, if they do."""

    name: str
    layer: type[nn.Module]
    model: type[nn.Module] | None
    forward: Callable[..., Any]


def attach(model: nn.Module, *, energy: float = ENERGY) -> int:
    """Has every attention layer of BLOOM, MPT and Swin V2 in ``model`` computed by flashbias, in place; returns their number.

    Results agree with those before to the rounding of the layers' dtype, and for Swin V2 to the part of the bias that is
    cut off: ``energy`` is the share to keep (:func:`flashbias.factors.from_dense`). Its factors are made anew in each
    forward that wants gradients of the bias, else when its weights change. Layers that are attached already stay so.

    Raises:
        ArgumentError: ``model`` has no such layer, or ``energy`` is no share.
        UnsupportedError: a layer drops attention weights out, or wants BLOOM's slow_but_exact sum over slices.
        ImportError: transformers is not installed, or older than 5.0.

    """
    found = list(_layers(model))
    if not found:
        raise ArgumentError.explain(
            "model",
            expected="a model with attention layers of BLOOM, MPT or Swin V2",
            got=f"{type(model).__name__}, which has none",
            cure="For other models call flash_bias_func in their attention; flashbias.factors builds the bias.",
        )
    if not isinstance(energy, int | float) or not 0.0 < energy <= 1.0:
        raise ArgumentError.explain("energy", expected="a number above 0, at most 1", got=repr(energy)[:60])
    for family, layer in found:
        _check(family, layer)
    _register_masks()
    for family, part in _mask_makers(model, found):
        if not hasattr(part.config, _BEFORE):
            setattr(part.config, _BEFORE, _implementation(part.config))
            _set_implementation(part.config, _MASKS[family.name])
    for family, layer in found:
        more = {"energy": energy} if family.name == "swinv2" else {}
        layer.forward = functools.partial(family.forward, layer, **more)
    return len(found)


def detach(model: nn.Module) -> int:
    """Gives the layers of ``model`` their own forward back; returns how many were attached."""
    found = list(_layers(model))
    for _, part in _mask_makers(model, found):
        if hasattr(part.config, _BEFORE):
            _set_implementation(part.config, getattr(part.config, _BEFORE))
            delattr(part.config, _BEFORE)
    for _, layer in found:
        windows.forget(layer)
    return sum(vars(layer).pop("forward", None) is not None for _, layer in found)


def _families() -> tuple[_Family, ...]:
    bloom = importlib.import_module("transformers.models.bloom.modeling_bloom")
    mpt = importlib.import_module("transformers.models.mpt.modeling_mpt")
    swin = importlib.import_module("transformers.models.swinv2.modeling_swinv2")
    return (
        _Family("bloom", bloom.BloomAttention, bloom.BloomModel, _bloom_forward),
        _Family("mpt", mpt.MptAttention, mpt.MptModel, _mpt_forward),
        _Family("swinv2", swin.Swinv2SelfAttention, None, _swin_forward),
    )


def _layers(model: nn.Module) -> Iterator[tuple[_Family, Any]]:
    families = _families()
    for part in model.modules():
        for family in families:
            if isinstance(part, family.layer):
                yield family, part


def _mask_makers(model: nn.Module, found: Iterable[tuple[_Family, Any]]) -> Iterator[tuple[_Family, Any]]:
    """Yields the parts of ``model`` that make masks for the layers ``found``."""
    families = {family.name: family for family, _ in found if family.model is not None}
    for part in model.modules():
        for family in families.values():
            if family.model is not None and isinstance(part, family.model):
                yield family, part


def _check(family: _Family, layer: Any) -> None:
    """Raises UnsupportedError for what the kernel has no way to compute."""
    drops = {
        "bloom": lambda: layer.attention_dropout.p,
        "mpt": lambda: layer.attn_dropout_p,
        "swinv2": lambda: layer.dropout.p,
    }[family.name]()
    if drops:
        raise UnsupportedError.explain(
            "attention dropout", expected="0 in the model's configuration", got=f"{drops:g}", cure="Set it to 0."
        )
    if family.name == "bloom" and layer.pretraining_tp > 1 and layer.slow_but_exact:
        raise UnsupportedError.explain(
            "slow_but_exact", expected="False", got="True with pretraining_tp above 1", cure="Set it to False."
        )


def _implementation(config: Any) -> str | None:
    found: str | None = config._attn_implementation  # noqa: SLF001 - the library's own models read it so
    return found


def _set_implementation(config: Any, name: str | None) -> None:
    config._attn_implementation = name  # noqa: SLF001 - the same


def _register_masks() -> None:
    masking = importlib.import_module("transformers.masking_utils")
    masking.AttentionMaskInterface.register(_MASKS["bloom"], _mask)
    masking.AttentionMaskInterface.register(_MASKS["mpt"], _inverse_mask)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    **rest: Any,
) -> Tensor:
    """Returns a boolean mask, True where a key takes part, with as few dims as it needs.

    (1, 1, 1, 1) is causal attention of all, (B, 1, 1, Sk) the same without padding, and (B, 1, Sq, Sk) holds everything:
    a cache with room at its end, packed sequences, or a mask function of the caller's.
    """
    masking = importlib.import_module("transformers.masking_utils")
    causal = mask_function in (None, masking.causal_mask_function) and kv_offset == 0
    if not causal or not isinstance(q_offset, int) or q_offset + q_length != kv_length:
        rest |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        given = {"q_offset": q_offset, "kv_offset": kv_offset, "attention_mask": attention_mask, **rest}
        whole: Tensor = masking.sdpa_mask(
            batch_size, q_length, kv_length, mask_function=mask_function or masking.causal_mask_function, **given
        )
        return whole
    if attention_mask is None:
        return torch.ones((1, 1, 1, 1), dtype=torch.bool, device=rest.get("device"))
    return attention_mask[:, None, None, :kv_length].to(torch.bool)


def _inverse_mask(*arguments: Any, **options: Any) -> Tensor:
    """Returns the mask as MPT has it: True where a key takes no part."""
    return ~_mask(*arguments, **options)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, slope: float, mask: Tensor | None, scale: float
) -> Tensor:
    """Returns attention (B, Sq, H Dv) of (B, H, S, D) tensors with ``slope`` · ``bias``, (B or 1, H, Sk), on every row."""
    causal: Literal["bottom_right", False] = "bottom_right" if mask is None or mask.shape[2] == 1 else False
    if mask is not None and mask.shape[1:] == (1, 1, 1) and mask.shape[0] == 1:
        mask = None
    # ALiBi reads the key's position alone: what all keys of a row share, softmax ignores.
    q_bias = bias.new_full((1, query.shape[2], 1, 1), slope)
    k_bias = bias.transpose(1, 2)[..., None]
    q, k, v = (each.transpose(1, 2) for each in (query, key, value))
    out = flash_bias_func(q, k, v, q_bias, k_bias, mask, causal=causal, softmax_scale=scale)
    return out.flatten(2)


def _bloom_forward(
    layer: Any,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Tensor,
    attention_mask: Tensor | None,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    **_rest: Any,
) -> tuple[Tensor, None]:
    """Computes what BloomAttention does, whose arguments these are; weights of single keys are never formed."""
    del use_cache
    _refuse_weights(output_attentions)
    query, key, value = layer._reshape(layer.query_key_value(hidden_states))  # noqa: SLF001 - the layer's own split
    if layer_past is not None:
        key, value = layer_past.update(key, value, layer.layer_idx)
    bias = alibi.view(-1, layer.num_heads, alibi.shape[-1])
    context = _attend(query, key, value, bias, layer.beta, attention_mask, layer.inv_norm_factor)
    dropped = nn.functional.dropout(layer.dense(context), p=layer.hidden_dropout, training=layer.training)
    return residual + dropped, None


def _mpt_forward(
    layer: Any,
    hidden_states: Tensor,
    position_bias: Tensor | None,
    past_key_values: Any = None,
    attention_mask: Tensor | None = None,
    output_attentions: bool = False,
    **_rest: Any,
) -> tuple[Tensor, None]:
    """Computes what MptAttention does, whose arguments these are; weights of single keys are never formed."""
    _refuse_weights(output_attentions)
    mixed = layer.Wqkv(hidden_states)
    if layer.clip_qkv:
        mixed = mixed.clamp(min=-layer.clip_qkv, max=layer.clip_qkv)
    parts = mixed.chunk(3, dim=2)
    query, key, value = (each.unflatten(2, (layer.n_heads, layer.head_dim)).transpose(1, 2) for each in parts)
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, layer.layer_idx)
    bias = position_bias if position_bias is not None else query.new_zeros((layer.n_heads, 1, key.shape[2]))
    bias = bias[None, :, 0, -key.shape[2] :].to(torch.float32)
    mask = None if attention_mask is None else ~attention_mask
    context = _attend(query, key, value, bias, 1.0, mask, layer.softmax_scale)
    return layer.out_proj(context), None


def _swin_forward(
    layer: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    output_attentions: bool = False,
    **more: Any,
) -> tuple[Tensor]:
    """Computes what Swinv2SelfAttention does, whose arguments these are."""
    _refuse_weights(output_attentions)
    return windows.forward(layer, hidden_states, attention_mask, energy=more["energy"])


def _refuse_weights(output_attentions: bool) -> None:
    if output_attentions:
        raise UnsupportedError.explain(
            "output_attentions",
            expected="False: the weights of single keys are never formed",
            got="True",
            cure="detach(model) first, and look at the weights there.",
        )
