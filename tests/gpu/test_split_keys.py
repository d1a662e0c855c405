"""A few queries over many keys on a GPU: split configs of every kind, and one tuned problem, judged by the gate's rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autotune.device import DeviceInfo
from cache_db.models import Config, Problem
from flashbias import flash_bias_func, plans
from flashbias.kernels import space, splitting
from flashbias.settings import settings
from tests.flashbias.drawn import default_configs
from tests.gpu.test_features import judge, tensors


def split(variant: str, waves: int) -> Any:
    """Returns what chooses a split config for every kernel that has one, else the default."""

    def choose(kernel: str, found: Problem, device: DeviceInfo) -> Config:
        block_m = 16 if int(found.fields["seqlen_q"]) <= 16 else 64
        config = space.split_config(variant, block_m, 64, 4, 2, waves)
        if kernel not in splitting.FUNCTIONS:
            return space.default(kernel, found, device)
        assert space.rejects(kernel, config, found, device) is None
        return config

    return choose


@pytest.mark.parametrize("waves", [1, 4])
@pytest.mark.parametrize("variant", splitting.VARIANTS)
@pytest.mark.parametrize(
    ("sizes", "how", "switches"),
    [
        ((2, 1, 8191, 8, 64), {"nheads_kv": 2}, {"causal": "bottom_right"}),
        ((1, 50, 5000, 4, 128), {"rank": 16}, {"causal": "bottom_right", "window_size": (3000, 0)}),
        ((3, 16, 300, 4, 64), {"mask": (3, 1, 16, 300), "dtype": torch.float16}, {}),
        ((1, 64, 4096, 2, 32), {"rank": 2, "factor_dtype": torch.float32}, {}),
    ],
    ids=["one query, grouped", "window, rank fills its width", "additive mask that learns", "fp32 factors"],
)
def test_split_configs_are_right(
    variant: str, waves: int, sizes: tuple[int, ...], how: dict[str, Any], switches: dict[str, Any]
) -> None:
    """O, LSE and all gradients, with splits that see no key among them."""
    with default_configs(split(variant, waves)):
        judge(tensors(*sizes, **how), with_lse=True, **switches)


def test_a_tuned_decode_is_right_and_repeats_bitwise() -> None:
    """The public call tunes a problem of one query; keys are split where that is fastest, and 300 runs agree."""
    given = {name: None if each is None else each.detach() for name, each in tensors(2, 1, 20000, 8, 64).items()}
    plans.forget()
    with torch.no_grad(), settings(budget_seconds=30.0):
        out, lse = flash_bias_func(**given, causal="bottom_right", return_lse=True)  # type: ignore[arg-type]
        differing = torch.zeros((), dtype=torch.int64, device=out.device)
        for _ in range(300):
            again = flash_bias_func(**given, causal="bottom_right", return_lse=True)  # type: ignore[arg-type]
            differing += again[0].ne(out).sum() + again[1].ne(lse).sum()
        assert int(differing) == 0
        learning = {name: None if each is None else each.requires_grad_() for name, each in given.items()}
    with settings(mode="read"):
        judge(learning, causal="bottom_right")
