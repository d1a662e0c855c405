"""The benchmark's oracle: whole heads of what is too large for it; and the inputs that peers are given."""

from __future__ import annotations

import pytest
import torch

from flashbias.bench.inputs import make
from flashbias.bench.judge import Truth
from flashbias.bench.providers.base import concatenated
from flashbias.bench.providers.sdpa import concat
from flashbias.kernels.problem import GRADIENTS, Shape

CPU = torch.device("cpu")
SHAPE = Shape(batch=1, nheads=2, seqlen_q=24, seqlen_k=24, headdim=16, rank=3, causal=True, grads=GRADIENTS)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_large_shape_is_judged_by_whole_heads(kv_heads: int) -> None:
    """The sample is the same each time, holds whole groups, and its errors are those of the whole calls' heads."""
    shape = SHAPE.model_copy(update={"batch": 5, "nheads": 4, "nheads_kv": kv_heads})
    inputs = make(shape, 0, CPU)
    group = 4 // kv_heads
    truth = Truth.of(inputs, most=6 * 24 * 24 * group)
    assert truth.judged == f"{kv_heads * group * (6 // kv_heads)} of 20 heads"
    assert truth.batches.tolist() == ([0] if kv_heads == 4 else [0, 2, 4])
    whole = Truth.of(inputs)
    assert whole.judged == "all heads"
    for name, value in truth.values.items():
        torch.testing.assert_close(value, truth.of_heads(whole.values[name], inputs), rtol=1e-12, atol=1e-12)
    out = concat(inputs).detach()
    errors = truth.errors({"out": out}, inputs)
    assert truth.right([*errors.values()])
    spoiled = out.clone()
    spoiled[0, :, 0] = 0
    assert not truth.right([*truth.errors({"out": spoiled}, inputs).values()])


def test_a_sample_of_one_head_is_the_least() -> None:
    """However many scores a head has, one group is judged."""
    truth = Truth.of(make(SHAPE, 0, CPU), most=1)
    assert (truth.heads.tolist(), truth.judged) == ([0], "1 of 2 heads")


@pytest.mark.parametrize(("multiple", "columns"), [(8, 24), (32, 32)])
def test_concatenated_inputs_are_padded_with_zeros(multiple: int, columns: int) -> None:
    """16 + 3 columns become a multiple, and the product of the two is score and bias."""
    inputs = make(SHAPE.model_copy(update={"dtype": "float32"}), 0, CPU)
    q, k = concatenated(inputs, multiple)
    assert inputs.q_bias is not None
    assert inputs.k_bias is not None
    assert q.shape[3] == k.shape[3] == columns
    product = torch.einsum("bihd,bjhd->bhij", q, k)
    scores = torch.einsum("bihd,bjhd->bhij", inputs.q, inputs.k) * inputs.scale
    torch.testing.assert_close(product, scores + torch.einsum("bihr,bjhr->bhij", inputs.q_bias, inputs.k_bias))
