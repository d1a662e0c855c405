"""PyTorch's FlexAttention: on concatenated inputs, and with the bias as a score_mod that reads the factors."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from flashbias.band import EVERYTHING, Band
from flashbias.bench.inputs import Inputs
from flashbias.bench.providers.base import Provider, concatenated
from flashbias.bench.providers.dense import compile_for


def concat(inputs: Inputs) -> Tensor:
    """Returns O of FlexAttention on concatenated inputs."""
    q, k = concatenated(inputs)
    return _run(_concatenated, inputs, q, k, inputs.v, _blocks(inputs), inputs.group > 1)


def score_mod(inputs: Inputs) -> Tensor:
    """Returns O of FlexAttention with a score_mod that adds the product of two factor rows.

    Each column is a tensor of its own: FlexAttention refuses a tensor that is read twice and wants a gradient.
    """
    columns = [
        [column.contiguous() for column in factor.transpose(1, 2).unbind(-1)]
        for factor in (inputs.q_bias, inputs.k_bias)
        if factor is not None
    ]
    given = (inputs.q, inputs.k, inputs.v, columns, _blocks(inputs), inputs.scale, inputs.group)
    return _run(_scored, inputs, *given)


def _concatenated(q: Tensor, k: Tensor, v: Tensor, blocks: Any, grouped: bool) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    found = flex_attention(q, k, v, block_mask=blocks, scale=1.0, enable_gqa=grouped)
    assert isinstance(found, Tensor)
    return found.transpose(1, 2)


def _scored(
    q: Tensor, k: Tensor, v: Tensor, columns: list[list[Tensor]], blocks: Any, scale: float, group: int
) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    def biased(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        for left, right in zip(*columns, strict=True):
            score = score + left[batch, head, row] * right[batch, head // group, key]
        return score

    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    mod = biased if columns else None
    found = flex_attention(q, k, v, score_mod=mod, block_mask=blocks, scale=scale, enable_gqa=group > 1)
    assert isinstance(found, Tensor)
    return found.transpose(1, 2)


def _run(function: Callable[..., Tensor], inputs: Inputs, *arguments: Any) -> Tensor:
    """Returns ``function`` of the arguments: compiled on a GPU; a CPU's compiled kernel has no backward."""
    if inputs.q.device.type == "cuda":
        return _compiled(function)(*arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is not compiled is known
        return function(*arguments)


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return compile_for(function, "cuda")


def _blocks(inputs: Inputs) -> Any:
    """Returns the block mask of the band, None where all is seen. It is made once and in nobody's time."""
    shape = inputs.shape
    return None if shape.band == EVERYTHING else _made(shape.band, shape.seqlen_q, shape.seqlen_k, inputs.q.device)


@functools.lru_cache(maxsize=1)
def _made(band: Band, rows: int, keys: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(_batch: Tensor, _head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        found = row >= 0
        if band.high is not None:
            found = found & (key <= row + band.high)
        if band.low is not None:
            found = found & (key >= row - band.low)
        return found

    return create_block_mask(visible, None, None, rows, keys, device=device)


def providers() -> Mapping[str, Provider]:
    """Returns the two by name."""
    return {"flex-concat": Provider(concat), "flex-score-mod": Provider(score_mod)}
