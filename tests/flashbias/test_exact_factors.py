"""fp32 factors beside 16-bit inputs: the bias is as exact as fp32 arithmetic, and its gradients are fp32 and accurate."""

from __future__ import annotations

import pytest
import torch

from autotune.device import interpreting
from flashbias import factors
from tests.flashbias.score_kernel import bias_scores, ulps

pytestmark = pytest.mark.skipif(not interpreting(), reason="runs kernels in Triton's interpreter (TRITON_INTERPRET=1)")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("slope", [2.0**-0.25, 2.0**-8 * 1.1])
@pytest.mark.parametrize("form", ["centred", "two columns"])
def test_alibi_scores_are_within_four_ulp(dtype: torch.dtype, slope: float, form: str) -> None:
    """Queries and keys of a sequence of 65,536, by the builder and as [slope, -slope i] [j, 1]."""
    seqlen = 65536
    if form == "centred":
        built = factors.alibi(1, seqlen, slopes=torch.tensor([slope]))
        q_bias, k_bias = (factor[0, :, 0] for factor in built)
    else:
        position = torch.arange(seqlen, dtype=torch.float32)
        q_bias = torch.stack([torch.full_like(position, slope), -slope * position], -1)
        k_bias = torch.stack([position, torch.ones_like(position)], -1)
    chosen = torch.cat([torch.arange(48), torch.arange(seqlen // 2 - 8, seqlen // 2 + 8), torch.arange(-64, 0)])
    q_bias, k_bias = q_bias[chosen], k_bias[chosen]
    assert ulps(bias_scores(q_bias, k_bias, dtype), q_bias.double() @ k_bias.double().T) <= 4
