"""The one boundary between flashbias and PyTorch's autograd and tracers.

Plain calls go straight to :mod:`flashbias.launcher` through an ``autograd.Function``, which costs a few
microseconds. Where PyTorch is tracing (``torch.compile``, ``torch.export``, fake tensors, any dispatch mode or
tensor subclass) the call becomes the registered ops ``flashbias::attention_forward`` and
``flashbias::attention_backward``, whose implementation is the same launcher.

LSE is (B, H, Sq), fp32 (fp64 for fp64 inputs), and not differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from flashbias import launcher
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
    causal: bool,
    scale: float,
) -> Tensor:
    """Returns the attention of valid arguments (see :mod:`flashbias.api`), differentiable once."""
    inputs = (q, k, v, q_bias, k_bias)
    _refuse_transforms(inputs)
    grads = _wanted(inputs)
    if _traced(inputs, mask):
        traced_out: Tensor = attention_forward(*inputs, mask, causal, scale, grads)[0]
        return traced_out
    if not any(grads):
        return launcher.forward(*inputs, mask, causal, scale, grads)[0]
    out: Tensor = _Attention.apply(*inputs, mask, causal, scale)  # type: ignore[no-untyped-call]
    return out


def _refuse_transforms(inputs: Sequence[Tensor | None]) -> None:
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
        "flash_bias_func",
        expected="plain tensors, differentiated by backward() or torch.autograd.grad",
        got=got,
        cure="Differentiate with torch.autograd, or compute this term with "
        "torch.nn.functional.scaled_dot_product_attention and the dense bias q_bias @ k_bias.mT instead.",
    )


def _wanted(inputs: Sequence[Tensor | None]) -> Wanted:
    """Returns which inputs will want a gradient from this call."""
    recording = torch.is_grad_enabled()
    q, k, v, q_bias, k_bias = (recording and tensor is not None and tensor.requires_grad for tensor in inputs)
    return q, k, v, q_bias, k_bias


def _traced(inputs: Sequence[Tensor | None], mask: Tensor | None) -> bool:
    """Whether something other than this process's kernels must see the call as one op."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return True
    return any(tensor is not None and (type(tensor) not in _PLAIN or tensor.is_meta) for tensor in (*inputs, mask))


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
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        complete = (*arguments, ctx.needs_input_grad[:5])
        out, lse, ctx.plan = launcher.planned_forward(*complete)
        *tensors, causal, scale = arguments
        ctx.save_for_backward(*tensors, out, lse)
        ctx.causal, ctx.scale = causal, scale
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        arguments = (dout, *ctx.saved_tensors, ctx.causal, ctx.scale, ctx.needs_input_grad[:5], ctx.plan)
        # Grad mode is on only for create_graph=True: then the gradients must know that they end here.
        compute = _AttentionBackward.apply if torch.is_grad_enabled() else launcher.backward
        return (*compute(*arguments), None, None, None)


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
    schema="(Tensor q, Tensor k, Tensor v, Tensor? q_bias, Tensor? k_bias, Tensor? mask, bool causal, float scale, "
    "bool[] grads) -> (Tensor, Tensor)",
)
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    grads: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """Returns (out, lse), both contiguous; ``grads`` says which of the five inputs will want a gradient."""
    out, lse = launcher.forward(q, k, v, q_bias, k_bias, mask, causal, scale, _five(grads))
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
    "Tensor lse, bool causal, float scale, bool[] grads) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
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
    causal: bool,
    scale: float,
    grads: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the five gradients, contiguous; a torch op cannot return None, so unwanted ones are empty."""
    found = launcher.backward(dout, q, k, v, q_bias, k_bias, mask, out, lse, causal, scale, _five(grads))
    dq, dk, dv, dq_bias, dk_bias = (q.new_empty(0) if tensor is None else tensor.contiguous() for tensor in found)
    return dq, dk, dv, dq_bias, dk_bias


@attention_backward.register_fake
def _(_dout: Tensor, q: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    k, v, q_bias, k_bias, *_, grads = rest
    dq, dk, dv, dq_bias, dk_bias = (
        tensor.new_empty(tensor.shape) if tensor is not None and want else q.new_empty(0)
        for tensor, want in zip((q, k, v, q_bias, k_bias), grads, strict=True)
    )
    return dq, dk, dv, dq_bias, dk_bias


def _five(grads: Sequence[bool]) -> Wanted:
    q, k, v, q_bias, k_bias = grads
    return q, k, v, q_bias, k_bias


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, causal, scale, _ = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.causal, ctx.scale = causal, scale
    ctx.mark_non_differentiable(output[1])


def _differentiate_forward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    grads = ctx.needs_input_grad[:5]
    found = attention_backward(dout, *ctx.saved_tensors, ctx.causal, ctx.scale, grads)
    wanted = (gradient if want else None for gradient, want in zip(found, grads, strict=True))
    return (*wanted, None, None, None, None)


def _differentiate_backward(_ctx: Any, *_gradients: Tensor) -> None:
    raise _refuse_second_derivative()


attention_forward.register_autograd(_differentiate_forward, setup_context=_save_forward)
attention_backward.register_autograd(_differentiate_backward)
