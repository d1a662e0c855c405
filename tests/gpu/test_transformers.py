"""Models of the real transformers library on a GPU, their attention in our kernels: as near the truth as the original."""

from __future__ import annotations

import copy

import pytest
import torch

import flashbias
from flashbias import plans

pytest.importorskip("transformers", minversion="5.0", reason="transformers 5.0 or newer is not installed")

from flashbias.integrations.transformers import attach
from tests.flashbias.test_transformers import Maker, bloom, images, mpt, off, padding, swin, tokens

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::Warning:transformers.*", "ignore::Warning:huggingface_hub.*"),
]


@pytest.mark.parametrize("make", [bloom, mpt, swin])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_results_in_16_bits_are_as_near_the_truth_as_the_original(make: Maker, dtype: torch.dtype) -> None:
    """Kernels run, not the fallback, and the error against fp32 is at most the original's but for chance.

    fp64 is no truth here: its least number, which these models add where a key is masked, is -inf to their fp32 softmax,
    and a row of padding on the left becomes NaN.
    """
    plain = make().to("cuda", dtype)
    given = (images().to("cuda", dtype),) if make is swin else (tokens().to("cuda"),)
    named = {} if make is swin else {"attention_mask": padding("left").to("cuda")}
    real = slice(None) if make is swin else padding("left").bool().to("cuda")
    ours = copy.deepcopy(plain)
    attach(ours)
    plans.forget()
    with torch.no_grad(), flashbias.settings(mode="read"):
        truth, wanted, found = (
            model(*(each.float() if exact and make is swin else each for each in given), **named)[0].double()[real]
            for exact, model in ((True, copy.deepcopy(plain).float()), (False, plain), (False, ours))
        )
    assert any(plan.binaries for plan in plans._plans.values())
    assert off(found, truth) < 1.5 * off(wanted, truth)
