"""flash-attn-4 (the package ``flash_attn.cute``) on concatenated inputs, and without the bias.

Its gradients are wrong at some head dims and right where the concatenation is padded to a multiple of 32; where v is much
narrower than q it does not compile, so a third way pads v too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from flashbias.bench.inputs import Inputs
from flashbias.bench.providers.base import Provider, concatenated, needs_16_bits, needs_cuda
from flashbias.implementations.flash4 import MULTIPLE, SAFE_MULTIPLE, package


def concat(inputs: Inputs) -> Tensor:
    """Returns O on concatenated inputs, as wide as they must be."""
    return _attend(*concatenated(inputs, MULTIPLE), inputs.v, 1.0, inputs)


def concat_padded(inputs: Inputs) -> Tensor:
    """Returns O on concatenated inputs, padded to a multiple of 32 columns."""
    return _attend(*concatenated(inputs, SAFE_MULTIPLE), inputs.v, 1.0, inputs)


def concat_padded_v(inputs: Inputs) -> Tensor:
    """Returns O on concatenated inputs padded to a multiple of 32 columns, v padded to as many and the result cut."""
    q, k = concatenated(inputs, SAFE_MULTIPLE)
    v = F.pad(inputs.v, (0, max(0, q.shape[3] - inputs.v.shape[3])))
    return _attend(q, k, v, 1.0, inputs)[..., : inputs.v.shape[3]]


def without_bias(inputs: Inputs) -> Tensor:
    """Returns O without the bias: the floor."""
    return _attend(inputs.q, inputs.k, inputs.v, inputs.scale, inputs)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, inputs: Inputs) -> Tensor:
    shape = inputs.shape
    more: dict[str, Any] = {}
    if shape.window != (-1, -1):
        more["window_size"] = tuple(None if side < 0 else side for side in shape.window)
    found = package().flash_attn_func(q, k, v, softmax_scale=scale, causal=bool(shape.causal), **more)
    out: Tensor = found[0] if isinstance(found, tuple) else found  # O, or O and LSE, by version
    return out


def _refuses(inputs: Inputs) -> str:
    shape = inputs.shape
    if reason := needs_cuda(inputs) or needs_16_bits(inputs):
        return reason
    if shape.causal is True and shape.seqlen_q != shape.seqlen_k:
        return "flash-attn-4's causal bound is aligned bottom-right only"
    try:
        _ = package().flash_attn_func
    except Exception as error:  # noqa: BLE001 - a broken installation raises what it likes
        return f"flash-attn-4 cannot be imported: {error}"
    return ""


def providers() -> Mapping[str, Provider]:
    """Returns flash-attn-4's ways by name."""
    ways = {"": concat, "-padded": concat_padded, "-padded-v": concat_padded_v}
    found = {f"flash4-concat{suffix}": Provider(run, _refuses) for suffix, run in ways.items()}
    found["flash4-no-bias"] = Provider(without_bias, _refuses, floor=True)
    return found
