"""The hot path: from tensors to launched kernels, or to ``eager`` where nothing proven may run.

A call is reduced to a *launch key*, the small tuple of what decides the binaries; a hit in ``_plans`` launches
compiled kernels with no SQL, JSON or hashing. A miss asks :func:`autotune.resolve`, which may tune. Backward finds
the plan its forward made: autograd's threads see no settings, and both must run configs that were proven together.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Final, Literal, cast

import torch
import triton
from torch import Tensor

import autotune
from autotune.device import DeviceInfo, describe
from flashbias import eager
from flashbias.kernels import arguments
from flashbias.kernels.arguments import Sizes
from flashbias.kernels.binding import Binary
from flashbias.kernels.problem import (
    GRADIENTS,
    MAX_HEAD_DIM,
    MAX_RANK,
    MaskKind,
    Shape,
    bucket,
    has_ones_column,
    occupancy,
    packed_rank,
    problem,
)
from flashbias.reference import Wanted
from flashbias.settings import current

logger = logging.getLogger(__name__)

Found = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
_DTYPES: Final[dict[torch.dtype, Literal["float16", "bfloat16"]]] = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
_FORWARD_ONLY: Final[Wanted] = (False, False, False, False, False)
_FIRST_CAPABILITY: Final = (8, 0)


@dataclass(frozen=True)
class Plan:
    """What one launch key runs: a proven binary for each kernel, or none, which means ``eager``.

    ``aligned`` is the layout class the binaries were compiled for; other tensors must be copied to fit it.
    """

    binaries: dict[str, Binary] = field(default_factory=dict)
    aligned: bool = False

    def fit(self, tensor: Tensor) -> Tensor:
        """Returns the (B, S, H, D) tensor, or a copy that the binaries may read."""
        if tensor.stride(3) == 1 and (not self.aligned or arguments.is_aligned(tensor)):
            return tensor
        return torch.empty_like(tensor, memory_format=torch.contiguous_format).copy_(tensor)


_EAGER: Final = Plan()
_plans: dict[tuple[Any, ...], Plan] = {}
_latest: dict[tuple[Any, ...], Plan] = {}


def forget() -> None:
    """Forgets every plan of this process, so that the next call asks the tuner again."""
    _plans.clear()
    _latest.clear()


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    grads: Wanted = _FORWARD_ONLY,
) -> tuple[Tensor, Tensor]:
    """Returns ``out`` (B, Sq, H, Dv) in v's dtype and ``lse`` (B, H, Sq) in fp32, natural log.

    ``grads`` says which of q, k, v, q_bias, k_bias will want a gradient: all kernels of the backward are then
    resolved before the forward is launched. Raises what :func:`autotune.resolve` raises.
    """
    out, lse, _ = planned_forward(q, k, v, q_bias, k_bias, mask, causal, scale, grads)
    return out, lse


def planned_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    grads: Wanted,
) -> tuple[Tensor, Tensor, Plan]:
    """Returns what :func:`forward` does, and the plan that this call's backward must run with."""
    call = (q, k, v, q_bias, k_bias, mask, causal, scale)
    if not _has_kernels(q, k, v, q_bias):
        return *eager.forward(*call, grads), _EAGER
    q, k, v = _unit_rows(q), _unit_rows(k), _unit_rows(v)
    with _on(q.device):
        plan = _plan(q, k, v, q_bias, mask, causal, grads)
        if not plan.binaries:
            return *eager.forward(*call, grads), _EAGER
        sizes = _sizes(q, k, q_bias)
        tensors = {"q": q, "k": k, "v": v, **_extras(q_bias, k_bias, mask, sizes, ones_column=False)}
        out = v.new_empty((sizes.batch, sizes.seqlen_q, sizes.nheads, v.shape[3]))
        lse = torch.empty((sizes.batch, sizes.nheads, sizes.seqlen_q), dtype=torch.float32, device=q.device)
        tensors.update(out=out, lse=lse)
        arguments.launch_kernel("forward", plan.binaries["forward"], tensors, sizes, scale)
    return out, lse, plan


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    grads: Wanted,
    plan: Plan | None = None,
) -> Found:
    """Returns (dq, dk, dv, dq_bias, dk_bias) in the inputs' own shapes and dtypes, None where not in ``grads``.

    ``plan`` is the forward's: its configs were proven together. Without it (a compiled graph carries no Python
    object) the plan of the latest forward with this launch key is taken.
    """
    call = (dout, q, k, v, q_bias, k_bias, mask, out, lse, causal, scale, grads)
    if not _has_kernels(q, k, v, q_bias):
        return eager.backward(*call)
    inputs = (q, k, v, q_bias, k_bias)
    with _on(q.device):
        plan = plan or _plan(q, k, v, q_bias, mask, causal, grads, through_forward=True)
        if not plan.binaries:
            return eager.backward(*call)
        sizes = _sizes(q, k, q_bias)
        # Hooks on saved tensors (offloading) may give them back in other memory than they were taken from.
        read = {"q": q, "k": k, "v": v, "out": out, "dout": dout}
        tensors = {name: plan.fit(tensor) for name, tensor in read.items()}
        ones_column = grads[3] and has_ones_column(sizes.rank, ("q_bias",))
        tensors |= {"lse": _whole_rows(lse), **_extras(q_bias, k_bias, mask, sizes, ones_column=ones_column)}
        tensors["delta"] = torch.empty_like(tensors["lse"])
        tensors.update(_gradient_buffers(inputs, sizes, grads))
        for kernel in ("backward_dq", "backward_dkdv"):
            if kernel in plan.binaries:
                arguments.launch_kernel(kernel, plan.binaries[kernel], tensors, sizes, scale)
        dq, dk, dv, dq_bias, dk_bias = (
            _as_input(tensors[f"d{name}"], tensor) if want and tensor is not None else None
            for name, tensor, want in zip(GRADIENTS, inputs, grads, strict=True)
        )
    return dq, dk, dv, dq_bias, dk_bias


def _has_kernels(q: Tensor, k: Tensor, v: Tensor, q_bias: Tensor | None) -> bool:
    """Returns whether there are kernels for these tensors at all: device, dtype, head dims, rank, no empty dim."""
    if q.dtype not in _DTYPES or max(q.shape[3], v.shape[3]) > MAX_HEAD_DIM:
        return False
    if q_bias is not None and (q_bias.dtype != q.dtype or q_bias.shape[3] > MAX_RANK):
        return False
    if 0 in q.shape or 0 in k.shape or 0 in v.shape:
        return False
    if triton.knobs.runtime.interpret:
        return q.device.type == "cpu"
    if q.device.type != "cuda" or torch.version.hip is not None:
        return False
    return describe(q.get_device()).capability >= _FIRST_CAPABILITY


def _unit_rows(tensor: Tensor) -> Tensor:
    """Returns the tensor itself if its last stride is 1, else a contiguous copy."""
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _whole_rows(lse: Tensor) -> Tensor:
    """Returns contiguous, 16-byte aligned row values."""
    lse = lse.contiguous()
    return lse.clone() if lse.data_ptr() % 16 else lse


def _on(device: torch.device) -> AbstractContextManager[Any]:
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _sizes(q: Tensor, k: Tensor, q_bias: Tensor | None) -> Sizes:
    rank = 0 if q_bias is None else q_bias.shape[3]
    return Sizes(q.shape[0], q.shape[2], q.shape[1], k.shape[1], rank)


def _extras(
    q_bias: Tensor | None, k_bias: Tensor | None, mask: Tensor | None, sizes: Sizes, *, ones_column: bool
) -> dict[str, Tensor]:
    """Returns factors as kernels read them and the expanded mask, as far as the call has them."""
    found: dict[str, Tensor] = {}
    if q_bias is not None and k_bias is not None:
        found = arguments.factors(q_bias, k_bias, ones_column, lambda _, shape: q_bias.new_empty(shape))
    if mask is not None:
        found["mask"] = arguments.as_bytes(mask, sizes)
    return found


def _gradient_buffers(inputs: tuple[Tensor | None, ...], sizes: Sizes, grads: Wanted) -> dict[str, Tensor]:
    """Returns room for the wanted gradients; those of factors are fp32 and have every batch and head."""
    found = {}
    for name, tensor, want in zip(GRADIENTS, inputs, grads, strict=True):
        if not want or tensor is None:
            continue
        shape = (sizes.batch, tensor.shape[1], sizes.nheads, tensor.shape[3])
        dtype = torch.float32 if name in ("q_bias", "k_bias") else tensor.dtype
        found[f"d{name}"] = torch.empty(shape, dtype=dtype, device=tensor.device)
    return found


def _as_input(gradient: Tensor, tensor: Tensor) -> Tensor:
    """Sums a gradient over the dims the input was broadcast in and rounds it once, to the input's dtype."""
    return gradient.sum_to_size(tensor.shape).to(tensor.dtype)


def _plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bias: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    grads: Wanted,
    *,
    through_forward: bool = False,
) -> Plan:
    """Returns what to run; ``through_forward`` takes what the latest forward with this launch key ran.

    A backward decides nothing: autograd's threads see no settings. Its tensors are made to fit the plan's layout.
    """
    device = describe(q.get_device())
    key = (
        device.index,
        q.dtype,
        q.shape[3],
        v.shape[3],
        (0, False)
        if q_bias is None
        else (packed_rank(q_bias.shape[3]), packed_rank(q_bias.shape[3]) == q_bias.shape[3]),
        causal,
        None if mask is None else mask.dtype,
        grads,
        bucket(q.shape[1]),
        bucket(k.shape[1]),
        occupancy(q.shape[0], q.shape[2], q.shape[1], device.sm_count),
    )
    if through_forward:
        return _latest.get(key, _EAGER)
    aligned = arguments.is_aligned(q) and arguments.is_aligned(k) and arguments.is_aligned(v)
    chosen = current()
    plan = _plans.get((key, aligned, chosen.identity))
    if plan is None:
        if device.index >= 0 and torch.cuda.is_current_stream_capturing():
            return _EAGER
        plan = _make_plan(_shape(q, k, v, q_bias, mask, causal, grads, aligned), device, chosen)
        _plans[key, aligned, chosen.identity] = plan
    _latest[key] = plan
    return plan


def _shape(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bias: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    grads: Wanted,
    aligned: bool,
) -> Shape:
    return Shape(
        batch=q.shape[0],
        nheads=q.shape[2],
        seqlen_q=q.shape[1],
        seqlen_k=k.shape[1],
        headdim=q.shape[3],
        value_dim=v.shape[3],
        rank=0 if q_bias is None else q_bias.shape[3],
        causal=causal,
        dtype=_DTYPES[q.dtype],
        mask="none" if mask is None else cast(MaskKind, str(mask.dtype).removeprefix("torch.")),
        grads=tuple(name for name, want in zip(GRADIENTS, grads, strict=True) if want),
        layout="aligned" if aligned else "strided",
    )


def _make_plan(shape: Shape, device: DeviceInfo, settings: autotune.Settings) -> Plan:
    """Resolves every kernel of the call and compiles it; a binary that is not the proven one is proven first."""
    found = problem(shape, device)
    resolution = autotune.resolve(found, device, settings)
    binaries = {}
    for kernel, choice in resolution.choices.items():
        try:
            binary = arguments.compile_kernel(kernel, choice.config, found, device).load()
        except Exception as error:  # noqa: BLE001 - it compiled when it was proven; a full disk or no compiler is no reason to crash
            logger.warning("%s is not used: it cannot be compiled here (%s); running eager", kernel, error)
            return _EAGER
        if not autotune.confirm(found, device, settings, kernel, choice, binary.binary):
            logger.warning("%s is not used: the binary compiled here could not be proven; running eager", kernel)
            return _EAGER
        binaries[kernel] = binary
    return Plan(binaries, found.layout == "aligned")
