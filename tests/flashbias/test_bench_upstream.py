"""Upstream's kernels come from the user's folder, tune in a child that may die, and are judged like any peer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flashbias.bench.compare import compare
from flashbias.bench.providers import catalogue
from flashbias.bench.providers.upstream import digests, load
from flashbias.bench.rehearsal import rehearsed
from flashbias.errors import ArgumentError
from flashbias.kernels.problem import GRADIENTS, Shape

CPU = torch.device("cpu")
SHAPE = Shape(batch=2, nheads=2, seqlen_q=24, seqlen_k=24, headdim=16, rank=3, causal=True, grads=GRADIENTS[:5])
# What the two modules have in common: a class to apply, in plain PyTorch, and a kernel with an autotuner.
STAND_IN = """
import torch, triton, triton.language as tl

configs = [triton.Config({"BLOCK": block}, num_warps=warps) for block in (32, 64) for warps in (2, 4)]

@triton.autotune(configs, key=["n"])
@triton.jit
def _fwd_kernel(pointer, n, BLOCK: tl.constexpr):
    tl.store(pointer, n)

def product(q_bias, k_bias):
    return None if q_bias is None else q_bias.transpose(1, 2).float() @ k_bias.permute(0, 2, 3, 1).float()

def attend(q, k, v, bias, causal, scale):
    scores = q.transpose(1, 2).float() @ k.permute(0, 2, 3, 1).float() * scale
    if bias is not None:
        scores = scores + bias.float()
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    return (scores.softmax(-1) @ v.transpose(1, 2).float()).transpose(1, 2).to(q.dtype)

class {name}:
    @staticmethod
    def apply({arguments}, causal=False, softmax_scale=None):
        {action}
        _fwd_kernel.cache[(q.shape[1], "torch.float16")] = configs[2]
        return attend(q, k, v, {bias}, causal, softmax_scale)

from {file} import {name} as itself
"""


def write(folder: Path, action: str = "pass") -> Path:
    """Writes both modules, whose calls begin with ``action``."""
    text = STAND_IN.replace("{action}", action)
    biased = (
        text.replace("{name}", "FlashBiasFunc")
        .replace("{file}", "flash_bias_triton")
        .replace("{arguments}", "q, k, v, q_bias=None, k_bias=None, mask=None")
    )
    biased = biased.replace("{bias}", "product(q_bias, k_bias)")
    dense = (
        text.replace("{name}", "FlashAttnFunc")
        .replace("{file}", "flash_attn_triton")
        .replace("{arguments}", "q, k, v, bias=None")
        .replace("{bias}", "bias")
    )
    (folder / "flash_bias_triton.py").write_text(biased)
    (folder / "flash_attn_triton.py").write_text(dense)
    return folder


@pytest.mark.parametrize("changes", [{}, {"causal": False, "nheads": 4, "nheads_kv": 2}, {"rank": 0}])
def test_upstreams_functions_are_called_as_they_want_it(tmp_path: Path, changes: dict[str, object]) -> None:
    """Arguments in upstream's order; heads of k and v are repeated; the bias is a matrix for the dense one."""
    shape = SHAPE.model_copy(update=changes)
    write(tmp_path)
    found = compare(shape, catalogue(tmp_path, ["upstream", "upstream-dense"]), 1, CPU)
    for row in found.rows:
        assert (row.missing, row.right_forward, row.right_backward) == ("", True, True), row
        assert row.backward is not None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"window": (3, 0)}, "upstream has no window"),
        ({"value_dim": 8}, "upstream has one head dim for q, k and v, at most 128"),
        ({"headdim": 136}, "upstream has one head dim for q, k and v, at most 128"),
        ({"dtype": "float32"}, "takes float16 and bfloat16, not float32"),
        ({"causal": "bottom_right", "seqlen_q": 8}, "upstream's causal bound is aligned top-left only"),
    ],
)
def test_what_upstream_does_not_take_is_said(tmp_path: Path, changes: dict[str, object], reason: str) -> None:
    """Before it runs, and by name."""
    found = compare(SHAPE.model_copy(update=changes), catalogue(write(tmp_path), ["upstream"]), 0, CPU)
    assert [row.missing for row in found.rows] == [reason]


def test_a_folder_without_the_files_is_refused(tmp_path: Path) -> None:
    """The error names the file that is not there and what folder is meant; who does not ask for upstream needs none."""
    with pytest.raises(ArgumentError, match=r"a folder with flash_bias_triton\.py.*flash_bias of a clone"):
        catalogue(tmp_path)
    assert list(catalogue(tmp_path, ["vanilla"])) == ["vanilla"]


@pytest.mark.parametrize("text", ["import nothing_of_this_name", "FlashBiasFunc = 3", "def broken(:"])
def test_a_file_that_is_something_else_is_refused(tmp_path: Path, text: str) -> None:
    """With the path and the fault."""
    write(tmp_path)
    (tmp_path / "flash_bias_triton.py").write_text(text)
    with pytest.raises(ArgumentError, match=r"flash_bias_triton\.py cannot be used: \w+Error"):
        catalogue(tmp_path, ["upstream"])


def test_what_a_child_tuned_is_taken_over(tmp_path: Path) -> None:
    """The child runs forward and backward; its autotuner's choice, as plain data, becomes that of this process."""
    folder = write(tmp_path)
    found = rehearsed("upstream", folder, SHAPE, -1)
    assert found.reason == ""
    module = load("upstream", folder)
    module.take_over(found.tuned)
    assert [(kernel, key) for kernel, key, _ in module.tuned] == [("_fwd_kernel", [24, "torch.float16"])]
    assert module.module._fwd_kernel.cache[24, "torch.float16"] is module.module.configs[2]
    assert module.tuned[0][2]["BLOCK"] == 64
    assert set(digests(folder)) == {"flash_bias_triton.py", "flash_attn_triton.py"}


def test_a_provider_that_kills_its_process_is_a_reason(tmp_path: Path) -> None:
    """The child dies, this process goes on, and the death is what the row will say."""
    reason = rehearsed("upstream", write(tmp_path, "import os; os.abort()"), SHAPE, -1).reason
    assert reason.startswith("kills its process: SIGABRT")
