"""What the zoo's faults are, which verdict each must end in, and how each is planted round a right kernel.

A fault of launch time is a function of the buffers that runs after the real kernel (``SPOILERS``); of compile time, one
that runs before it is compiled (``SABOTEURS``).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from autotune.device import DeviceInfo
from autotune.spec import Tensors
from cache_db.models import Layout, Verdict
from tests.zoo import bad_kernels

BLOCK: Final = 1024
TILE_ROWS: Final = 16
# No host has a petabyte to give, and none of a GPU's chunks is larger than what is left of it.
HOST_BOMB: Final = 1 << 50
DEVICE_BOMB: Final = 1 << 28


@dataclass(frozen=True)
class Exhibit:
    """One fault: the kernel it sits in, the verdict it must end in, and what it does, in words.

    ``reason`` is what the verdict's reason must say; ``interpreted`` tells whether Triton's interpreter can show the
    fault; ``layout`` is that of the problem in which it acts.
    """

    kernel: str
    verdict: Verdict
    sentence: str
    reason: str = ""
    interpreted: bool = True
    layout: Layout = "aligned"


_WRONG, _OUTSIDE = Verdict.WRONG, Verdict.OUT_OF_BOUNDS
ZOO: Final[Mapping[str, Exhibit]] = {
    "ragged_lengths": Exhibit("forward", _WRONG, "wrong only in rows behind the last whole tile of 64", "'out' is off"),
    "wrong_lse": Exhibit("forward", _WRONG, "O right, LSE in bits instead of nats", "'lse' is off"),
    "scaled_lse": Exhibit("forward", _WRONG, "O right, LSE 3 % off", "'lse' is off"),
    "zeroed_row": Exhibit("forward", _WRONG, "one row of O is zero", "'out' is off by 1 "),
    "other_head": Exhibit("forward", _WRONG, "one tile of O is that of another head", "'out' is off"),
    "wrong_dk_bias": Exhibit("backward_dkdv", _WRONG, "wrong only in the gradient of k_bias", "'dk_bias' is off"),
    "unwritten_tail": Exhibit("backward_dkdv", _WRONG, "the last row of dV is never written", "never wrote"),
    "writes_past_end": Exhibit("forward", _OUTSIDE, "writes one row past the end of O", "past the end of 'out'"),
    "reads_past_end": Exhibit("forward", _WRONG, "reads past the end of K, into O", "are NaN"),
    "modifies_input": Exhibit("backward_dq", _OUTSIDE, "changes an element of q", "modified 'q'"),
    "rare_race": Exhibit(
        "forward", Verdict.RACY, "one bit of LSE differs in one launch of 1,000", "differ", interpreted=False
    ),
    "large_logits": Exhibit("forward", _WRONG, "NaN where a score is over 88, else right", "on case 'large logits'"),
    "illegal_access": Exhibit("forward", Verdict.CRASHED, "writes to an illegal address"),
    "endless_loop": Exhibit("forward", Verdict.TIMEOUT, "never ends", "no answer within"),
    "compile_error": Exhibit("forward", Verdict.COMPILE_ERROR, "Triton refuses its source", "power of 2"),
    "compiler_abort": Exhibit("forward", Verdict.CRASHED, "LLVM aborts the process that compiles it", "SIGABRT"),
    "shared_memory": Exhibit(
        "forward",
        Verdict.OUT_OF_RESOURCES,
        "its tiles need more shared memory than there is",
        "shared memory",
        interpreted=False,
    ),
    "allocation_bomb": Exhibit("forward", Verdict.KILLED, "allocates until nothing is left", "Memory"),
    "unaligned": Exhibit(
        "forward", _WRONG, "wrong only where rows start off a 16-byte boundary", "'out' is off", layout="strided"
    ),
}


@dataclass(frozen=True)
class Buffers:
    """What one launch reads and writes, all by name, and the scale of its scores."""

    inputs: Tensors
    outputs: Tensors
    scale: float


def sabotage(fault: str, device: DeviceInfo) -> None:
    """Does what ``fault`` does when its config is compiled for ``device``; nothing if it acts at the launch.

    Raises what Triton raises; may end the process.
    """
    if fault == "compile_error" and device.interpreted:
        bad_kernels.not_a_tile[(1,)](torch.zeros(4))
    elif fault == "compiler_abort" and device.interpreted:  # it has no LLVM to abort
        os.abort()
    elif fault in _UNCOMPILABLE:
        source = ASTSource(_UNCOMPILABLE[fault], {"x_ptr": "*fp32"}, {})
        triton.compile(source, target=GPUTarget("cuda", 10 * device.capability[0] + device.capability[1], 32))


def spoil(fault: str, buffers: Buffers) -> None:
    """Does what ``fault`` does after a launch; nothing if it acts elsewhere."""
    if fault in _SPOILERS:
        with np.errstate(all="ignore"):  # the interpreter's: exponentials that overflow are a fault of their own
            _SPOILERS[fault](buffers)


def _ragged_lengths(buffers: Buffers) -> None:
    _, seqlen, nheads, dim = buffers.outputs["out"].shape
    row = nheads * dim
    block = triton.next_power_of_2(row)
    bad_kernels.rescale_partial_tile[(int(bad_kernels.TILE),)](buffers.outputs["out"], seqlen, row, 1.1, block)


def _rescale(x: Tensor, start: int, stop: int, factor: float) -> None:
    bad_kernels.rescale[(triton.cdiv(stop - start, BLOCK),)](x, start, stop, factor, BLOCK)


def _wrong_lse(buffers: Buffers) -> None:
    lse = buffers.outputs["lse"]
    _rescale(lse, 0, lse.numel(), 1 / math.log(2))


def _scaled_lse(buffers: Buffers) -> None:
    lse = buffers.outputs["lse"]
    _rescale(lse, 0, lse.numel(), 1.03)


def _zeroed_row(buffers: Buffers) -> None:
    out = buffers.outputs["out"]
    dim = out.shape[3]
    start = (out.shape[1] // 2 * out.shape[2] + out.shape[2] - 1) * dim
    _rescale(out, start, start + dim, 0.0)


def _other_head(buffers: Buffers) -> None:
    out = buffers.outputs["out"]
    _, seqlen, nheads, dim = out.shape
    rows, block = min(seqlen, TILE_ROWS), triton.next_power_of_2(dim)
    bad_kernels.move_row[(rows,)](out, 0, (nheads - 1) * dim, nheads * dim, dim, block)


def _wrong_dk_bias(buffers: Buffers) -> None:
    gradient = buffers.outputs["dk_bias"]
    _rescale(gradient, gradient.numel() // 2, gradient.numel(), 1.1)


def _writes_past_end(buffers: Buffers) -> None:
    out = buffers.outputs["out"]
    dim = out.shape[3]
    bad_kernels.store_past_end[(1,)](out, out.numel(), dim, triton.next_power_of_2(dim))


def _reads_past_end(buffers: Buffers) -> None:
    out, k = buffers.outputs["out"], buffers.inputs["k"]
    dim = out.shape[3]
    bad_kernels.add_from_past_end[(1,)](out, k, k.numel(), dim, triton.next_power_of_2(dim))


def _modifies_input(buffers: Buffers) -> None:
    _rescale(buffers.inputs["q"], 0, 1, 2.0)


def _rare_race(buffers: Buffers) -> None:
    bad_kernels.flip_rarely[(1,)](buffers.outputs["lse"])


def _large_logits(buffers: Buffers) -> None:
    q, k, out = buffers.inputs["q"], buffers.inputs["k"], buffers.outputs["out"]
    batch, _, nheads, head_dim = q.shape
    bad_kernels.exponentiate_bare[(batch * nheads,)](
        out,
        q,
        k,
        out.stride(),
        q.stride(),
        k.stride(),
        nheads,
        nheads // k.shape[2],
        k.shape[1],
        head_dim,
        out.shape[3],
        buffers.scale,
        triton.next_power_of_2(head_dim),
        triton.next_power_of_2(out.shape[3]),
    )


def _illegal_access(buffers: Buffers) -> None:
    bad_kernels.store_far_away[(1,)](buffers.outputs["out"])


def _endless_loop(buffers: Buffers) -> None:
    bad_kernels.wait_forever[(1,)](torch.zeros(1, dtype=torch.int32, device=buffers.inputs["q"].device))


def _allocation_bomb(buffers: Buffers) -> None:
    """Takes all memory of the device, or more of the host's than it has: in pieces that would take others' down."""
    device = buffers.inputs["q"].device
    if device.type == "cpu":
        np.empty(HOST_BOMB, dtype=np.uint8)
    taken = []
    while device.type != "cpu":
        taken.append(torch.empty(DEVICE_BOMB, dtype=torch.uint8, device=device))


def _unaligned(buffers: Buffers) -> None:
    out = buffers.outputs["out"]
    dim = out.shape[3]
    bad_kernels.rescale_if_unaligned[(1,)](out, buffers.inputs["q"], dim, triton.next_power_of_2(dim))


_UNCOMPILABLE: Final[Mapping[str, Any]] = {
    "compile_error": bad_kernels.not_a_tile,
    "compiler_abort": bad_kernels.not_an_operand,
}
_SPOILERS: Final[Mapping[str, Callable[[Buffers], None]]] = {
    "ragged_lengths": _ragged_lengths,
    "wrong_lse": _wrong_lse,
    "scaled_lse": _scaled_lse,
    "zeroed_row": _zeroed_row,
    "other_head": _other_head,
    "wrong_dk_bias": _wrong_dk_bias,
    "writes_past_end": _writes_past_end,
    "reads_past_end": _reads_past_end,
    "modifies_input": _modifies_input,
    "rare_race": _rare_race,
    "large_logits": _large_logits,
    "illegal_access": _illegal_access,
    "endless_loop": _endless_loop,
    "allocation_bomb": _allocation_bomb,
    "unaligned": _unaligned,
}
