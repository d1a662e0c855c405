"""The boundary between packed attention and PyTorch's autograd and tracers; :mod:`flashbias.ops` is the dense one.

Plain calls go to :mod:`flashbias.varlen.launcher` through an ``autograd.Function``; where PyTorch is tracing, the call
becomes the registered ops ``flashbias::varlen_forward`` and ``flashbias::varlen_backward``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashbias.band import Band
from flashbias.eager import compute_dtype
from flashbias.errors import UnsupportedError
from flashbias.ops import _refuse_transforms, _traced
from flashbias.varlen import launcher
from flashbias.varlen.eager import Five, Found
from flashbias.varlen.sequences import Sequences


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    packed: Sequences,
    band: Band,
    scale: float,
    precision: str = "default",
) -> tuple[Tensor, Tensor]:
    """Returns O (Tq, H, Dv) and LSE (H, Tq) of valid arguments (see :mod:`flashbias.varlen.api`), differentiable once."""
    inputs = (q, k, v, q_bias, k_bias)
    _refuse_transforms(inputs, "flash_bias_varlen_func")
    recording = torch.is_grad_enabled()
    grads = _five([recording and tensor is not None and tensor.requires_grad for tensor in inputs])
    if _traced((*inputs, *packed[:2])):
        bounds = (band.low, band.high)
        traced: tuple[Tensor, Tensor] = varlen_forward(*inputs, *packed, *bounds, scale, grads, precision)
        return traced
    if not any(grads):
        return launcher.forward(*inputs, packed, band, scale, precision=precision)[:2]
    found: tuple[Tensor, Tensor] = _Attention.apply(*inputs, *packed, band, scale, precision)  # type: ignore[no-untyped-call]
    return found


def _five(flags: Sequence[bool]) -> Five:
    q, k, v, q_bias, k_bias = flags
    return q, k, v, q_bias, k_bias


def _refuse_second_derivative() -> UnsupportedError:
    return UnsupportedError.explain(
        "double backward of flash_bias_varlen_func",
        expected="at most one differentiation",
        got="a derivative of its gradient (create_graph=True, gradgradcheck or a gradient penalty)",
        cure="Compute this term for each sequence with torch.nn.functional.scaled_dot_product_attention and "
        "the dense bias q_bias @ k_bias.mT instead.",
    )


class _Attention(torch.autograd.Function):
    """The recorded call: keeps inputs, O and LSE, and computes wanted gradients only."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        packed, (band, scale, precision) = Sequences(*arguments[5:10]), arguments[10:]
        complete = (*arguments[:5], packed, band, scale, _five(ctx.needs_input_grad[:5]), precision)
        out, lse, ctx.plan = launcher.forward(*complete)
        ctx.save_for_backward(*arguments[:7], out, lse)
        ctx.rest = (packed[2:], band, scale, precision)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, cu_seqlens_q, cu_seqlens_k, out, lse = ctx.saved_tensors
        facts, band, scale, precision = ctx.rest
        if dout is None:
            dout = torch.zeros_like(out)
        packed = Sequences(cu_seqlens_q, cu_seqlens_k, *facts)
        grads = _five(ctx.needs_input_grad[:5])
        # Grad mode is on only for create_graph=True: then the gradients must know that they end here.
        compute = _AttentionBackward.apply if torch.is_grad_enabled() else launcher.backward
        complete = (dout, *tensors, packed, out, lse, band, scale, grads, dlse, ctx.plan, precision)
        found = compute(*complete)
        return (*found, *[None] * 8)


class _AttentionBackward(torch.autograd.Function):
    """The recorded backward: exists to refuse its own derivative by name."""

    @staticmethod
    def forward(_ctx: Any, *arguments: Any) -> Found:
        return launcher.backward(*arguments)

    @staticmethod
    def backward(_ctx: Any, *_gradients: Tensor) -> None:
        raise _refuse_second_derivative()


@torch.library.custom_op(
    "flashbias::varlen_forward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? q_bias, Tensor? k_bias, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, bool shifted, SymInt? low, SymInt? high, float scale, bool[] grads, "
    "str precision='default') -> (Tensor, Tensor)",
)
def varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    shifted: bool,
    low: int | None,
    high: int | None,
    scale: float,
    grads: Sequence[bool],
    precision: str = "default",
) -> tuple[Tensor, Tensor]:
    """Returns (out, lse), both contiguous; ``grads`` says which of the five inputs will want a gradient."""
    packed = Sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, shifted)
    band = Band(low, high)
    out, lse, _ = launcher.forward(q, k, v, q_bias, k_bias, packed, band, scale, _five(grads), precision)
    return out.contiguous(), lse.contiguous()


@varlen_forward.register_fake
def _(q: Tensor, _k: Tensor, v: Tensor, *_rest: Any) -> tuple[Tensor, Tensor]:
    rows, heads, _ = q.shape
    out = v.new_empty((rows, heads, v.shape[2]))
    return out, q.new_empty((heads, rows), dtype=compute_dtype(q.dtype))


@torch.library.custom_op(
    "flashbias::varlen_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? q_bias, Tensor? k_bias, Tensor cu_seqlens_q, "
    "Tensor cu_seqlens_k, Tensor out, Tensor lse, SymInt max_seqlen_q, SymInt max_seqlen_k, bool shifted, SymInt? low, "
    "SymInt? high, float scale, bool[] grads, Tensor? dlse, str precision='default') "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    out: Tensor,
    lse: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    shifted: bool,
    low: int | None,
    high: int | None,
    scale: float,
    grads: Sequence[bool],
    dlse: Tensor | None,
    precision: str = "default",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the five gradients, contiguous; a torch op cannot return None, so unwanted ones are empty."""
    packed = Sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, shifted)
    band = Band(low, high)
    call = (q, k, v, q_bias, k_bias, packed, out, lse, band, scale, _five(grads), dlse)
    found = launcher.backward(dout, *call, precision=precision)
    dq, dk, dv, dq_bias, dk_bias = (q.new_empty(0) if tensor is None else tensor.contiguous() for tensor in found)
    return dq, dk, dv, dq_bias, dk_bias


@varlen_backward.register_fake
def _(_dout: Tensor, q: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    k, v, q_bias, k_bias, grads = *rest[:4], rest[14]  # defaults at the end may be left out
    dq, dk, dv, dq_bias, dk_bias = (
        tensor.new_empty(tensor.shape) if tensor is not None and want else q.new_empty(0)
        for tensor, want in zip((q, k, v, q_bias, k_bias), grads, strict=True)
    )
    return dq, dk, dv, dq_bias, dk_bias


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:7], *output)
    ctx.rest, ctx.precision = inputs[7:13], inputs[14]


def _differentiate_forward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    grads = ctx.needs_input_grad[:5]
    found = varlen_backward(dout, *ctx.saved_tensors, *ctx.rest, grads, dlse, ctx.precision)
    wanted = (gradient if want else None for gradient, want in zip(found, grads, strict=True))
    return (*wanted, *[None] * 10)


def _differentiate_backward(_ctx: Any, *_gradients: Tensor) -> None:
    raise _refuse_second_derivative()


varlen_forward.register_autograd(_differentiate_forward, setup_context=_save_forward)
varlen_backward.register_autograd(_differentiate_backward)
