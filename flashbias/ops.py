"""The one boundary between flashbias and PyTorch's autograd and tracers.

Plain calls go straight to :mod:`flashbias.launcher` through an ``autograd.Function``, which costs a few
microseconds. Where PyTorch is tracing (``torch.compile``, ``torch.export``, fake tensors, any dispatch mode or
tensor subclass) the call becomes the registered ops ``flashbias::attention_forward`` and
``flashbias::attention_backward``, whose implementation is the same launcher.

LSE is (B, H, Sq), fp32 (fp64 for fp64 inputs). O and LSE are both differentiable, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from flashbias import launcher
from flashbias.band import Band
from flashbias.chunks import compact
from flashbias.eager import compute_dtype
from flashbias.errors import UnsupportedError
from flashbias.reference import Wanted

_PLAIN = (Tensor, torch.nn.Parameter)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    mask: Tensor | None,
    band: Band,
    scale: float,
    precision: str = "default",
) -> tuple[Tensor, Tensor]:
    """Returns O and LSE of valid arguments (see :mod:`flashbias.api`), differentiable once."""
    inputs = (q, k, v, q_bias, k_bias, mask)
    _refuse_transforms(inputs)
    grads = _wanted(inputs)
    if _traced(inputs):
        traced: tuple[Tensor, Tensor] = attention_forward(*inputs, band.low, band.high, scale, grads, precision)
        return traced
    if not any(grads):
        return launcher.forward(*inputs, band, scale, grads, precision)
    found: tuple[Tensor, Tensor] = _Attention.apply(*inputs, band, scale, precision)  # type: ignore[no-untyped-call]
    return found


def _refuse_transforms(inputs: Sequence[Tensor | None], name: str = "flash_bias_func") -> None:
    """Raises UnsupportedError under forward-mode differentiation and torch.func transforms, which kernels cannot see."""
    if torch.compiler.is_compiling():
        return
    if torch._C._are_functorch_transforms_active():  # noqa: SLF001 - torch has no public question for it
        got = "a torch.func transform (grad, vmap, jvp, ...)"
    elif forward_ad._current_level >= 0 and any(  # noqa: SLF001 - the same
        tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in inputs
    ):
        got = "an input with a tangent (forward-mode differentiation)"
    else:
        return
    raise UnsupportedError.explain(
        name,
        expected="plain tensors, differentiated by backward() or torch.autograd.grad",
        got=got,
        cure="Differentiate with torch.autograd, or compute this term with "
        "torch.nn.functional.scaled_dot_product_attention and the dense bias q_bias @ k_bias.mT instead.",
    )


def _wanted(inputs: Sequence[Tensor | None]) -> Wanted:
    """Returns which inputs will want a gradient from this call."""
    recording = torch.is_grad_enabled()
    return _six([recording and tensor is not None and tensor.requires_grad for tensor in inputs])


def _six(flags: Sequence[bool]) -> Wanted:
    q, k, v, q_bias, k_bias, mask = flags
    return q, k, v, q_bias, k_bias, mask


def _traced(inputs: Sequence[Tensor | None]) -> bool:
    """Whether something other than this process's kernels must see the call as one op."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return True
    return any(tensor is not None and (type(tensor) not in _PLAIN or tensor.is_meta) for tensor in inputs)


def _refuse_second_derivative() -> UnsupportedError:
    return UnsupportedError.explain(
        "double backward of flash_bias_func",
        expected="at most one differentiation",
        got="a derivative of its gradient (create_graph=True, gradgradcheck or a gradient penalty)",
        cure="Compute this term with torch.nn.functional.scaled_dot_product_attention and "
        "the dense bias q_bias @ k_bias.mT instead.",
    )


class _Attention(torch.autograd.Function):
    """The recorded call: keeps inputs, O and LSE, and computes wanted gradients only."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, mask, band, scale, precision = arguments
        tensors.append(None if mask is None else compact(mask))
        complete = (*tensors, band, scale, ctx.needs_input_grad[:6], precision)
        out, lse, ctx.plan = launcher.planned_forward(*complete)
        ctx.save_for_backward(*tensors, out, lse)
        ctx.band, ctx.scale, ctx.precision = band, scale, precision
        ctx.mask_shape = None if mask is None else mask.shape
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(saved[-2])
        arguments = (dout, *saved, ctx.band, ctx.scale, ctx.needs_input_grad[:6], dlse, ctx.plan, ctx.precision)
        # Grad mode is on only for create_graph=True: then the gradients must know that they end here.
        compute = _AttentionBackward.apply if torch.is_grad_enabled() else launcher.backward
        *gradients, dmask = compute(*arguments)
        return (*gradients, launcher.expanded(dmask, ctx.mask_shape), None, None, None)


class _AttentionBackward(torch.autograd.Function):
    """The recorded backward: exists to refuse its own derivative by name."""

    @staticmethod
    def forward(_ctx: Any, *arguments: Any) -> tuple[Tensor | None, ...]:
        return launcher.backward(*arguments)

    @staticmethod
    def backward(_ctx: Any, *_gradients: Tensor) -> None:
        raise _refuse_second_derivative()


@torch.library.custom_op(
    "flashbias::attention_forward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? q_bias, Tensor? k_bias, Tensor? mask, SymInt? low, SymInt? high, "
    "float scale, bool[] grads, str precision='default') -> (Tensor, Tensor)",
)
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    mask: Tensor | None,
    low: int | None,
    high: int | None,
    scale: float,
    grads: Sequence[bool],
    precision: str = "default",
) -> tuple[Tensor, Tensor]:
    """Returns (out, lse), both contiguous; ``grads`` says which of the six inputs will want a gradient."""
    out, lse = launcher.forward(q, k, v, q_bias, k_bias, mask, Band(low, high), scale, _six(grads), precision)
    return out.contiguous(), lse.contiguous()


@attention_forward.register_fake
def _(q: Tensor, _k: Tensor, v: Tensor, *_rest: Any) -> tuple[Tensor, Tensor]:
    batch, rows, heads, _ = q.shape
    out = v.new_empty((batch, rows, heads, v.shape[3]))
    return out, q.new_empty((batch, heads, rows), dtype=compute_dtype(q.dtype))


@torch.library.custom_op(
    "flashbias::attention_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? q_bias, Tensor? k_bias, Tensor? mask, Tensor out, "
    "Tensor lse, SymInt? low, SymInt? high, float scale, bool[] grads, Tensor? dlse, str precision='default') "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    low: int | None,
    high: int | None,
    scale: float,
    grads: Sequence[bool],
    dlse: Tensor | None,
    precision: str = "default",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the six gradients, contiguous; a torch op cannot return None, so unwanted ones are empty."""
    call = (q, k, v, q_bias, k_bias, mask, out, lse, Band(low, high), scale, _six(grads), dlse)
    found = launcher.backward(dout, *call, precision=precision)
    dq, dk, dv, dq_bias, dk_bias, dmask = (
        q.new_empty(0) if tensor is None else tensor.contiguous() for tensor in found
    )
    return dq, dk, dv, dq_bias, dk_bias, dmask


@attention_backward.register_fake
def _(_dout: Tensor, q: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    k, v, q_bias, k_bias, mask, _out, _lse, _low, _high, _scale, grads, *_ = rest
    dq, dk, dv, dq_bias, dk_bias, dmask = (
        tensor.new_empty(tensor.shape) if tensor is not None and want else q.new_empty(0)
        for tensor, want in zip((q, k, v, q_bias, k_bias, mask), grads, strict=True)
    )
    return dq, dk, dv, dq_bias, dk_bias, dmask


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, low, high, scale, _, precision = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.band, ctx.scale, ctx.precision = (low, high), scale, precision


def _differentiate_forward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    grads = ctx.needs_input_grad[:6]
    found = attention_backward(dout, *ctx.saved_tensors, *ctx.band, ctx.scale, grads, dlse, ctx.precision)
    wanted = (gradient if want else None for gradient, want in zip(found, grads, strict=True))
    return (*wanted, None, None, None, None, None)


def _differentiate_backward(_ctx: Any, *_gradients: Tensor) -> None:
    raise _refuse_second_derivative()


attention_forward.register_autograd(_differentiate_forward, setup_context=_save_forward)
attention_backward.register_autograd(_differentiate_backward)
