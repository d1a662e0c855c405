"""The hot path: from tensors to launched kernels, or to ``eager`` where nothing proven may run.

What runs is decided in :mod:`flashbias.plans`; here factors are packed, buffers made, kernels launched and gradients
brought into their inputs' shapes.
"""

from __future__ import annotations

import functools
import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
from torch import Tensor

from flashbias import eager
from flashbias.band import Band
from flashbias.chunks import compact
from flashbias.kernels import arguments, factors
from flashbias.kernels.arguments import Sizes
from flashbias.kernels.factors import Factors
from flashbias.kernels.problem import GRADIENTS
from flashbias.plans import EAGER, Plan, has_kernels, names_of, packing_of, plan_for
from flashbias.reference import Wanted

Found = tuple[Tensor | None, ...]
logger = logging.getLogger(__name__)

_REASONS: Final = 64  # that are remembered, so that each is told once
_FORWARD_ONLY: Final[Wanted] = (False, False, False, False, False, False)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    mask: Tensor | None,
    band: Band,
    scale: float,
    grads: Wanted = _FORWARD_ONLY,
    precision: str = "default",
) -> tuple[Tensor, Tensor]:
    """Returns ``out`` (B, Sq, H, Dv) in v's dtype and ``lse`` (B, H, Sq) in fp32, natural log.

    ``grads`` says which of q, k, v, q_bias, k_bias, mask will want a gradient: all kernels of the backward are then
    resolved before the forward is launched. ``precision`` is that of :mod:`flashbias.precision`: fp32 inputs have
    kernels unless it is "default". Raises what :func:`autotune.resolve` raises.
    """
    out, lse, _ = planned_forward(q, k, v, q_bias, k_bias, mask, band, scale, grads, precision)
    return out, lse


def planned_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    mask: Tensor | None,
    band: Band,
    scale: float,
    grads: Wanted,
    precision: str = "default",
) -> tuple[Tensor, Tensor, Plan]:
    """Returns what :func:`forward` does, and the plan that this call's backward must run with."""
    q, k, v, q_bias, k_bias, mask = map(_plain, (q, k, v, q_bias, k_bias, mask))  # type: ignore[assignment]
    call = (q, k, v, q_bias, k_bias, mask, band, scale)
    if not has_kernels(q, k, v, q_bias, precision):
        return *eager.forward(*call, grads), EAGER
    q, k, v = _unit_rows(q), _unit_rows(k), _unit_rows(v)
    band = band.within(q.shape[1], k.shape[1])
    with _on(q.device):
        plan = plan_for(q, k, v, q_bias, mask, band, for_kernels(grads, mask), precision)
        if plan.eager:
            return *eager.forward(*call, grads), EAGER
        if "forward" in plan.foreign:
            try:
                return *plan.foreign["forward"].forward(q, k, v, q_bias, k_bias, band, scale), plan
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # noqa: BLE001 - the proof says nothing of a length that a backend refuses
                _tell("forward", str(error))
                return *eager.forward(*call, grads), EAGER
        tensors, sizes, _ = _prepared(q, k, q_bias, k_bias, mask, band, ())
        tensors.update(q=q, k=k, v=v)
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
    band: Band,
    scale: float,
    grads: Wanted,
    dlse: Tensor | None = None,
    plan: Plan | None = None,
    precision: str = "default",
) -> Found:
    """Returns (dq, dk, dv, dq_bias, dk_bias, dmask) in the inputs' own shapes and dtypes, None where not in ``grads``.

    ``dlse`` (B, H, Sq) is the upstream gradient of LSE. ``precision`` is the forward's, and so is ``plan``: its configs
    were proven together.
    Without it (a compiled graph carries no Python object) the plan of the latest forward with this launch key is
    taken.
    """
    dout, q, k, v, out, lse = map(_plain, (dout, q, k, v, out, lse))  # type: ignore[assignment]
    q_bias, k_bias, mask, dlse = map(_plain, (q_bias, k_bias, mask, dlse))
    call = (dout, q, k, v, q_bias, k_bias, mask, out, lse, band, scale, grads, dlse)
    if not has_kernels(q, k, v, q_bias, precision):
        return eager.backward(*call)
    whole, mask = mask, None if mask is None else compact(mask)
    band = band.within(q.shape[1], k.shape[1])
    inputs = (q, k, v, q_bias, k_bias, mask)
    with _on(q.device):
        kernel_grads = for_kernels(grads, mask)
        plan = plan or plan_for(q, k, v, q_bias, mask, band, kernel_grads, precision, through_forward=True)
        if plan.eager:
            return eager.backward(*call)
        names = names_of(kernel_grads)
        if "backward" in plan.foreign:
            dout, q, k, v, out = map(plan.fit, (dout, q, k, v, out))
            run = plan.foreign["backward"].backward
            try:
                return _as_inputs(run(dout, q, k, v, q_bias, k_bias, out, lse, band, scale, dlse), inputs, names)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # noqa: BLE001 - as in the forward
                _tell("backward", str(error))
                return eager.backward(*call)
        tensors, sizes, packed = _prepared(q, k, q_bias, k_bias, mask, band, names)
        # Hooks on saved tensors (offloading) may give them back in other memory than they were taken from.
        read = {"q": q, "k": k, "v": v, "out": out, "dout": dout}
        tensors |= {name: plan.fit(tensor) for name, tensor in read.items()}
        tensors["lse"] = _whole_rows(lse)
        tensors["delta"] = torch.empty_like(tensors["lse"])
        if dlse is not None:
            tensors["dlse"] = dlse.to(torch.float32).contiguous()
        tensors.update(_gradient_buffers(inputs, sizes, names))
        for kernel in ("backward_dq", "backward_dkdv", "backward_mask"):
            if kernel in plan.binaries:
                arguments.launch_kernel(kernel, plan.binaries[kernel], tensors, sizes, scale)
        found = [
            _as_input(name, tensors[f"d{name}"], tensor, packed) if name in names and tensor is not None else None
            for name, tensor in zip(GRADIENTS, inputs, strict=True)
        ]
    *gradients, dmask = found
    if grads[5] and not kernel_grads[5] and mask is not None:
        dmask = _without_keys(dlse, lse, mask)
    return (*gradients, dmask if whole is None else expanded(dmask, whole.shape))


@functools.lru_cache(maxsize=_REASONS)
def _tell(kernel: str, reason: str) -> None:
    """Warns once of a foreign implementation that refuses a call."""
    logger.warning("the foreign %s refuses a call: %s; running it eager", kernel, reason)


def for_kernels(grads: Wanted, mask: Tensor | None) -> Wanted:
    """Returns what kernels have to compute: the gradient of a mask without keys of its own is not among it."""
    keys = mask is not None and mask.shape[3] > 1 and mask.stride(3) != 0
    return (*grads[:5], grads[5] and keys)


def _without_keys(dlse: Tensor | None, lse: Tensor, mask: Tensor) -> Tensor:
    """Returns the gradient of a mask that has no keys: each of its numbers moves whole rows, and rows of dS sum to dLSE."""
    if dlse is None:
        return torch.zeros_like(mask)
    rows = dlse.to(torch.float32).masked_fill(lse == -torch.inf, 0.0).unsqueeze(3)
    return rows.sum_to_size(mask.shape).to(mask.dtype)


def expanded(gradient: Tensor | None, shape: torch.Size) -> Tensor | None:
    """Returns the gradient of an expanded mask from that of its compact part.

    Whoever expanded the mask sums its gradient over the copies. Each gets an equal share, in no more memory; in fp16,
    where a share could vanish, the first copy gets all.
    """
    if gradient is None or gradient.shape == shape:
        return gradient
    copies = shape.numel() // max(gradient.numel(), 1)
    if gradient.dtype != torch.float16 or copies == 0:
        return (gradient / max(copies, 1)).expand(shape)
    whole = gradient.new_zeros(shape)
    whole[tuple(slice(size) for size in gradient.shape)] = gradient
    return whole


def _plain(tensor: Tensor | None) -> Tensor | None:
    """Returns the tensor with its values in memory: the imaginary part of a conjugate holds them negated."""
    return tensor.resolve_neg() if tensor is not None and tensor.is_neg() else tensor


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


def _prepared(
    q: Tensor,
    k: Tensor,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    mask: Tensor | None,
    band: Band,
    grads: tuple[str, ...],
) -> tuple[dict[str, Tensor], Sizes, Factors | None]:
    """Returns factors as kernels read them and the expanded mask, as far as the call has them, the sizes and the packing."""
    found: dict[str, Tensor] = {}
    packed, columns = None, 0
    if q_bias is not None and k_bias is not None:
        if q_bias.dtype == torch.float64:  # what is split, or stands beside fp32 inputs, has fp32's precision
            q_bias, k_bias = q_bias.float(), k_bias.float()
        how = packing_of(q, q_bias, grads)
        packed = factors.prepare(
            q_bias, k_bias, how, lambda _, shape, dtype: torch.empty(shape, dtype=dtype, device=q.device)
        )
        columns = how.used
        found = {"q_factor": packed.q_factor, "k_factor": packed.k_factor}
    batch, seqlen_q, nheads, _ = q.shape
    sizes = Sizes(batch, nheads, k.shape[2], seqlen_q, k.shape[1], columns, band)
    if mask is not None:
        found["mask"] = arguments.as_bytes(mask, sizes)
    return found, sizes, packed


def _gradient_buffers(inputs: tuple[Tensor | None, ...], sizes: Sizes, grads: tuple[str, ...]) -> dict[str, Tensor]:
    """Returns room for the wanted gradients; those of factors are fp32, for every batch, query head and packed column."""
    found = {}
    for name, tensor in zip(GRADIENTS, inputs, strict=True):
        if name not in grads or tensor is None:
            continue
        if name in ("q_bias", "k_bias"):
            shape = (sizes.batch, tensor.shape[1], sizes.nheads, sizes.columns)
            found[f"d{name}"] = torch.empty(shape, dtype=torch.float32, device=tensor.device)
        else:
            found[f"d{name}"] = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return found


def _as_input(name: str, gradient: Tensor, tensor: Tensor, packed: Factors | None) -> Tensor:
    """Returns a kernel's gradient in its input's shape and dtype: factors' are summed over the dims they share."""
    if name not in ("q_bias", "k_bias") or packed is None:
        return gradient
    return _shared(packed.gradient(name[0], gradient), tensor)


def _as_inputs(gradients: dict[str, Tensor], inputs: tuple[Tensor | None, ...], names: tuple[str, ...]) -> Found:
    """Returns a foreign implementation's gradients, those of ``names``, in their inputs' shapes and dtypes."""
    return tuple(
        None if name not in names or tensor is None else _shared(gradients[f"d{name}"], tensor)
        for name, tensor in zip(GRADIENTS, inputs, strict=True)
    )


def _shared(gradient: Tensor, tensor: Tensor) -> Tensor:
    """Returns the gradient of every batch and head in the input's shape and dtype, summed over the dims it shares."""
    nheads = tensor.shape[2]
    if 1 < nheads < gradient.shape[2]:
        gradient = gradient.unflatten(2, (nheads, -1)).sum(3)
    return gradient.sum_to_size(tensor.shape).to(tensor.dtype)
