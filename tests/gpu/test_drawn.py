"""The kernels on whatever hypothesis draws at sizes of several tiles, judged by the gate's rule."""

from __future__ import annotations

import hypothesis
import torch

from tests.flashbias.drawn import Drawn, default_configs, drawn_calls


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(drawn_calls(400, torch.device("cuda")))
def test_any_call_in_any_layout_passes_the_gate(drawn: Drawn) -> None:
    """Layouts, dtypes, groups, bands, masks and wanted gradients in any mixture."""
    with default_configs():
        drawn.check()
