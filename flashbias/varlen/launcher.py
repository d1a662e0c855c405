"""From packed tensors to launched kernels, or to ``eager``; :mod:`flashbias.launcher` does it for dense ones.

Kernels see packed tensors as one batch, (1, T, H, D), and where sequences begin; the host does not wait for the device.
:mod:`flashbias.varlen.eager`, where there is no kernel, does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from flashbias.band import Band
from flashbias.kernels import arguments, sequences
from flashbias.kernels.arguments import Sizes
from flashbias.kernels.factors import Factors
from flashbias.kernels.problem import GRADIENTS
from flashbias.launcher import _as_input, _on, _plain, _prepared, _unit_rows, _whole_rows
from flashbias.plans import EAGER, Plan, has_kernels, names_of, plan_for
from flashbias.varlen import eager
from flashbias.varlen.eager import Five, Found
from flashbias.varlen.sequences import Sequences

_FORWARD_ONLY: Final[Five] = (False, False, False, False, False)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    packed: Sequences,
    band: Band,
    scale: float,
    grads: Five = _FORWARD_ONLY,
    precision: str = "default",
) -> tuple[Tensor, Tensor, Plan]:
    """Returns ``out`` (Tq, H, Dv) in v's dtype, ``lse`` (H, Tq) in fp32 and the plan that the backward must run with.

    ``grads`` says which of q, k, v, q_bias, k_bias will want a gradient; ``precision`` is that of
    :mod:`flashbias.precision`: fp32 inputs have kernels unless it is "default". Raises ArgumentError for ``cu_seqlens`` on a
    CPU that do not fit, and what :func:`autotune.resolve` raises.
    """
    packed.check_values(q.shape[0], k.shape[0])
    q, k, v, q_bias, k_bias = map(_plain, (q, k, v, q_bias, k_bias))  # type: ignore[assignment]
    call = (q, k, v, q_bias, k_bias, packed)
    q, k, v, q_bias, k_bias = map(_batched, call[:5])  # type: ignore[assignment]
    if has_kernels(q, k, v, q_bias, precision):
        q, k, v = _unit_rows(q), _unit_rows(k), _unit_rows(v)
        with _on(q.device):
            extent = packed.extent(q.shape[1], k.shape[1])
            plan = plan_for(q, k, v, q_bias, None, band, (*grads, False), precision, extent=extent)
            if plan.binaries:
                tensors, sizes, _ = _packed(q, k, q_bias, k_bias, packed, band, ())
                if sizes.positional and any(grads[3:]):
                    sequences.binary(q.get_device())  # compiled here, so that no backward has to
                out = v.new_empty((*q.shape[:3], v.shape[3]))
                lse = torch.empty((q.shape[2], q.shape[1]), dtype=torch.float32, device=q.device)
                tensors.update(q=q, k=k, v=v, out=out, lse=lse)
                arguments.launch_kernel("forward", plan.binaries["forward"], tensors, sizes, scale)
                return out[0], lse, plan
    return *eager.forward(*call, band, scale), EAGER


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    packed: Sequences,
    out: Tensor,
    lse: Tensor,
    band: Band,
    scale: float,
    grads: Five,
    dlse: Tensor | None = None,
    plan: Plan | None = None,
    precision: str = "default",
) -> Found:
    """Returns (dq, dk, dv, dq_bias, dk_bias) in the inputs' own shapes and dtypes, None where not in ``grads``.

    ``dlse`` (H, Tq) is the upstream gradient of LSE. ``plan`` is the forward's; without it (a compiled graph carries
    no Python object) that of the latest forward with this launch key is taken. ``precision`` is the forward's.
    """
    dout, q, k, v, out, lse = map(_plain, (dout, q, k, v, out, lse))  # type: ignore[assignment]
    q_bias, k_bias, dlse = map(_plain, (q_bias, k_bias, dlse))
    call = (dout, q, k, v, q_bias, k_bias, packed)
    dout, out = dout.unsqueeze(0), out.unsqueeze(0)
    q, k, v, q_bias, k_bias = map(_batched, call[1:6])  # type: ignore[assignment]
    inputs = (q, k, v, q_bias, k_bias)
    if has_kernels(q, k, v, q_bias, precision):
        with _on(q.device):
            if plan is None:
                extent = packed.extent(q.shape[1], k.shape[1])
                wanted = (*grads, False)
                plan = plan_for(q, k, v, q_bias, None, band, wanted, precision, through_forward=True, extent=extent)
            if plan.binaries:
                names = names_of((*grads, False))
                tensors, sizes, factors = _packed(q, k, q_bias, k_bias, packed, band, names)
                # Hooks on saved tensors (offloading) may give them back in other memory than they were taken from.
                read = {"q": q, "k": k, "v": v, "out": out, "dout": dout}
                tensors |= {name: plan.fit(tensor) for name, tensor in read.items()}
                tensors["lse"] = _whole_rows(lse)
                tensors["delta"] = torch.empty_like(tensors["lse"])
                if dlse is not None:
                    tensors["dlse"] = dlse.to(torch.float32).contiguous()
                tensors.update(_gradient_buffers(inputs, sizes, names))
                for kernel in ("backward_dq", "backward_dkdv"):
                    if kernel in plan.binaries:
                        arguments.launch_kernel(kernel, plan.binaries[kernel], tensors, sizes, scale)
                return _gradients(inputs, tensors, sizes, factors, names)
    return eager.backward(*call, lse, band, scale, grads, dlse)


def _batched(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.unsqueeze(0)


def _packed(
    q: Tensor,
    k: Tensor,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    packed: Sequences,
    band: Band,
    grads: tuple[str, ...],
) -> tuple[dict[str, Tensor], Sizes, Factors | None]:
    """Returns factors as kernels read them and where sequences begin, the sizes and the packing."""
    tensors, sizes, factors = _prepared(q, k, q_bias, k_bias, None, band, grads)
    tensors["cu_seqlens_q"] = packed.cu_seqlens_q.contiguous()
    tensors["cu_seqlens_k"] = packed.cu_seqlens_k.contiguous()
    rows = {"q_factor": q.shape[1], "k_factor": k.shape[1]}
    positional = tuple(name for name in rows if name in tensors and tensors[name].shape[1] != rows[name])
    batch, seqlen_q, seqlen_k = packed.extent(q.shape[1], k.shape[1])
    sizes = replace(sizes, batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k, packed=True)
    return tensors, replace(sizes, rows_q=q.shape[1], shifted=packed.shifted, positional=positional), factors


def _gradient_buffers(inputs: Found, sizes: Sizes, grads: tuple[str, ...]) -> dict[str, Tensor]:
    """Returns room for the wanted gradients; those of factors are fp32, for every row, query head and packed column."""
    rows = [tensor.shape[1] for tensor in inputs[:2] if tensor is not None]
    found = {}
    for name, tensor in zip(GRADIENTS, inputs, strict=False):
        if name not in grads or tensor is None:
            continue
        if name in ("q_bias", "k_bias"):
            shape = (1, rows[name == "k_bias"], sizes.nheads, sizes.columns)
            found[f"d{name}"] = torch.empty(shape, dtype=torch.float32, device=tensor.device)
        else:
            found[f"d{name}"] = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return found


def _gradients(
    inputs: Found, tensors: dict[str, Tensor], sizes: Sizes, factors: Factors | None, grads: tuple[str, ...]
) -> Found:
    """Returns the kernels' gradients in their inputs' shapes: those of positional factors are summed over sequences."""
    found: list[Tensor | None] = []
    for name, tensor in zip(GRADIENTS, inputs, strict=False):
        if name not in grads or tensor is None:
            found.append(None)
            continue
        gradient = tensors[f"d{name}"]
        if f"{name[0]}_factor" in sizes.positional and "bias" in name:
            gradient = sequences.summed(gradient, tensors[f"cu_seqlens_{name[0]}"], tensor.shape[1])
        found.append(_as_input(name, gradient, tensor, factors).squeeze(0))
    return tuple(found)
