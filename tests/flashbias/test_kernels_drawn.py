"""The kernels in the interpreter on whatever hypothesis draws, judged by the gate's rule."""

from __future__ import annotations

import hypothesis
import pytest
import torch

from autotune.device import interpreting
from tests.flashbias.drawn import Drawn, default_configs, drawn_calls

pytestmark = pytest.mark.skipif(not interpreting(), reason="runs kernels in Triton's interpreter (TRITON_INTERPRET=1)")


@hypothesis.settings(max_examples=30, deadline=None, derandomize=True)
@hypothesis.given(drawn_calls(36, torch.device("cpu")))
def test_any_call_in_any_layout_passes_the_gate(drawn: Drawn) -> None:
    """Layouts, dtypes, groups, bands, masks and wanted gradients in any mixture."""
    with default_configs():
        drawn.check()
