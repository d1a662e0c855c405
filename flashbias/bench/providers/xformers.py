"""xFormers' memory-efficient attention on concatenated inputs."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from flashbias.bench.inputs import Inputs
from flashbias.bench.providers.base import Provider, concatenated, for_each_head, needs_cuda


def concat(inputs: Inputs) -> Tensor:
    """Returns O on concatenated inputs; heads of k and v are repeated under grouped heads."""
    q, k = concatenated(inputs)
    ops = _ops()
    mask = None
    if inputs.shape.causal is True:
        mask = ops.LowerTriangularMask()
    elif inputs.shape.causal:
        mask = ops.fmha.attn_bias.LowerTriangularFromBottomRightMask()
    k, v = for_each_head(k, inputs), for_each_head(inputs.v, inputs)
    found: Tensor = ops.memory_efficient_attention(q, k, v, attn_bias=mask, scale=1.0)
    return found


def _refuses(inputs: Inputs) -> str:
    if inputs.shape.window != (-1, -1):
        return "windows of xFormers are not compared"
    if reason := needs_cuda(inputs):
        return reason
    try:
        _ops()
    except Exception as error:  # noqa: BLE001 - a broken installation raises what it likes
        return f"xFormers cannot be imported: {error}"
    return ""


@functools.cache
def _ops() -> Any:
    return importlib.import_module("xformers.ops")


def providers() -> Mapping[str, Provider]:
    """Returns xFormers' way by name."""
    return {"xformers-concat": Provider(concat, _refuses)}
