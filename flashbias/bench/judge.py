"""The fp64 oracle of one comparison, and how far from it a provider is.

Large shapes are judged by a sample of heads, the same in each run: whole heads with all their rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from flashbias import reference
from flashbias.bench.inputs import Inputs
from flashbias.kernels.problem import GRADIENTS

# A provider whose result is further from the oracle than this, relative to the whole tensor, computes something else.
LIMITS: Final = {"float16": 5e-3, "bfloat16": 4e-2, "float32": 5e-3}
# Scores that the oracle may look at: some seconds of fp64. The largest shape of the scoreboard has 1.3e10.
CPU_SCORES: Final = 1 << 26
GPU_SCORES: Final = 1 << 34


@dataclass(frozen=True)
class Truth:
    """O and the gradients in fp64 of the ``batches`` and the heads of k (``heads``) that are judged."""

    values: dict[str, Tensor]
    batches: Tensor
    heads: Tensor
    dtype: str
    judged: str

    @classmethod
    def of(cls, inputs: Inputs, *, biased: bool = True, most: int | None = None) -> Truth:
        """Asks the oracle, with the bias or without it, about at most ``most`` scores (but one group of heads at least)."""
        shape, group = inputs.shape, inputs.group
        if most is None:
            most = GPU_SCORES if inputs.q.device.type == "cuda" else CPU_SCORES
        count = max(1, most // (shape.seqlen_q * shape.seqlen_k * group))
        n_heads = min(shape.kv_heads, count)
        n_batches = min(shape.batch, max(1, count // n_heads))
        batches, heads = (
            _spread(n, size).to(inputs.q.device) for n, size in ((n_batches, shape.batch), (n_heads, shape.kv_heads))
        )
        some = f"{n_batches * n_heads * group} of {shape.batch * shape.nheads} heads"
        whole = n_batches == shape.batch and n_heads == shape.kv_heads
        found = cls({}, batches, heads, shape.dtype, "all heads" if whole else some)
        with torch.no_grad():
            found.values.update(found.solve(inputs, biased=biased))
        return found

    def solve(self, inputs: Inputs, *, biased: bool) -> dict[str, Tensor]:
        """Returns O and the wanted gradients of the judged heads by name."""
        given = (inputs.q, inputs.k, inputs.v, inputs.dout)
        q, k, v, dout = (self.of_heads(tensor, inputs) for tensor in given)
        q_bias, k_bias = (
            self.of_heads(factor, inputs) if biased and factor is not None else None
            for factor in (inputs.q_bias, inputs.k_bias)
        )
        call = (q, k, v, q_bias, k_bias, None, inputs.shape.band, inputs.scale)
        out, lse = reference.forward(*call, compute_dtype=torch.float64)
        values = {"out": out}
        if inputs.wanted:
            gradients = reference.backward(dout, *call, out, lse, compute_dtype=torch.float64)
            named = zip(GRADIENTS, gradients, strict=True)
            values |= {f"d{name}": value for name, value in named if name in inputs.wanted and value is not None}
        return values

    def of_heads(self, tensor: Tensor, inputs: Inputs) -> Tensor:
        """Returns the judged part of a (B, S, H or Hkv, columns) tensor."""
        share = tensor.shape[2] // inputs.shape.kv_heads
        heads = (self.heads[:, None] * share + torch.arange(share, device=self.heads.device)).flatten()
        if len(heads) < tensor.shape[2]:
            tensor = tensor.index_select(2, heads)
        return tensor.index_select(0, self.batches) if len(self.batches) < tensor.shape[0] else tensor

    def errors(self, found: dict[str, Tensor | None], inputs: Inputs) -> dict[str, float | None]:
        """Returns how far each of the ``found`` tensors is from the truth; None where it is no finite number or missing."""
        with torch.no_grad():
            return {name: self._error(name, found.get(name), inputs) for name in found if name in self.values}

    def _error(self, name: str, value: Tensor | None, inputs: Inputs) -> float | None:
        if value is None or value.shape[2] % inputs.shape.kv_heads:
            return None
        right = self.values[name]
        value = self.of_heads(value, inputs)
        if value.shape != right.shape:
            return None
        error = float((value.double() - right).norm() / right.norm())
        return error if math.isfinite(error) else None

    def right(self, errors: Sequence[float | None]) -> bool:
        """Returns whether all of these errors are rounding."""
        return all(error is not None and error <= LIMITS[self.dtype] for error in errors)


def _spread(count: int, size: int) -> Tensor:
    """Returns ``count`` of ``size`` indices, evenly spread from the first to the last."""
    return torch.tensor([round(each * (size - 1) / max(1, count - 1)) for each in range(count)])
