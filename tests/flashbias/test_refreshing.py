"""``flashbias.refresh``: a process keeps what it launched first until it is told to move on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import autotune
import flashbias
from autotune import tuner
from autotune.device import describe, interpreting
from cache_db import open_layers
from cache_db.models import Config, Winner
from flashbias import plans
from flashbias.kernels.problem import Shape, problem
from flashbias.kernels.spec import ATTENTION

pytestmark = pytest.mark.skipif(not interpreting(), reason="runs kernels in Triton's interpreter (TRITON_INTERPRET=1)")

DEVICE = describe(-1)
PROBLEM = problem(Shape(batch=1, nheads=1, seqlen_q=9, seqlen_k=9, headdim=16), DEVICE)


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    """Makes each test start like a new process."""
    plans.forget()
    autotune.forget()
    yield
    plans.forget()
    autotune.forget()


def store(folder: Path, config: Config) -> None:
    """Stores ``config`` as the winner, proven here."""
    row = Winner(
        problem=PROBLEM,
        kernel="forward",
        config=config,
        level=2,
        ms=1.0,
        tried=1,
        total=1,
        complete=True,
        binary="",
        environment=DEVICE.environment,
        created_at=time.time(),
    )
    open_layers(folder).put_winner(row, replace=True)


def launched(folder: Path) -> Config:
    """Calls the operator once; returns the config that it ran."""
    with flashbias.settings(cache_dir=folder, mode="assert") as chosen:
        q = torch.randn(1, 9, 1, 16).half()
        out = flashbias.flash_bias_func(q, q, q)
        assert torch.isfinite(out).all()
        found = tuner.decided(PROBLEM, DEVICE, chosen)
    assert found is not None
    return found.choices["forward"].config


def test_a_better_winner_is_taken_up_at_the_refresh_and_not_before(tmp_path: Path) -> None:
    """What is stored meanwhile changes no call until ``refresh``; then the next call runs it."""
    first, second = ATTENTION.candidates("forward", PROBLEM, DEVICE)[:2]
    store(tmp_path, first)
    assert launched(tmp_path) == first
    store(tmp_path, second)
    assert launched(tmp_path) == first
    flashbias.refresh()
    assert launched(tmp_path) == second
