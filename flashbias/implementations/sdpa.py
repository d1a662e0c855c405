"""PyTorch's scaled_dot_product_attention, each backend by its own op: these give LSE, and take that of another forward.

The ops' schemas are torch's own, private and without promises; a torch in which one has changed raises, which is a
verdict on that candidate and nothing else.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from flashbias.implementations.backend import Backend, up

_MULTIPLE: Final = 8  # columns: 16 bytes of a 16-bit dtype
_LSE_ROWS: Final = 32  # the efficient backend's rows of LSE come and go in whole steps of so many
_TOP_LEFT, _BOTTOM_RIGHT = 1, 2
_CUDNN_WIDEST: Final = 128
# Beyond that cuDNN has one pair of widths, q and k of 192 with v of 128, and that on Hopper and later.
_CUDNN_PAIR: Final = (192, 128)
_WIDEST: Final = 256


class Cudnn:
    """cuDNN's forward. Its backward adds in any order, so it is not asked for."""

    bottom_right = False

    def widths(self, columns: int, value_dim: int) -> tuple[int, int]:
        """Returns whole steps of 16 bytes, or the one wide pair."""
        found = up(columns, _MULTIPLE), up(value_dim, _MULTIPLE)
        return _CUDNN_PAIR if _CUDNN_WIDEST < found[0] <= _CUDNN_PAIR[0] and found[1] <= _CUDNN_PAIR[1] else found

    def limit(self, columns: int, value_dim: int) -> str | None:
        """Returns why cuDNN cannot compute such widths."""
        if (columns, value_dim) == _CUDNN_PAIR or max(columns, value_dim) <= _CUDNN_WIDEST:
            return None
        return f"cuDNN takes at most {_CUDNN_WIDEST} columns, or {_CUDNN_PAIR}; this needs ({columns}, {value_dim})"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
        """Returns O and LSE."""
        if k.shape[1] == 1:  # which cuDNN does not take
            return EFFICIENT.forward(q, k, v, scale, causal=causal)
        given = (tensor.transpose(1, 2) for tensor in (q, k, v))
        op: Any = torch.ops.aten._scaled_dot_product_cudnn_attention.default  # noqa: SLF001 - the op that gives LSE
        out, lse, *_ = op(*given, None, True, 0.0, causal, False, scale=scale)
        return out.transpose(1, 2), lse.reshape(lse.shape[:3])

    def backward(self, *_given: Any, **_more: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Raises NotImplementedError: the rules never let this run."""
        raise NotImplementedError("cuDNN's backward is not bitwise repeatable")


class Flash:
    """FlashAttention-2 as torch has it: v as wide as q and k. Its backward adds in any order, so it is not asked for."""

    bottom_right = True

    def widths(self, columns: int, value_dim: int) -> tuple[int, int]:
        """Returns the wider of the two, for both."""
        width = up(max(columns, value_dim), _MULTIPLE)
        return width, width

    def limit(self, columns: int, value_dim: int) -> str | None:
        """Returns why such widths cannot be computed."""
        return _too_wide(columns, value_dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
        """Returns O and LSE."""
        given = (tensor.transpose(1, 2) for tensor in (q, k, v))
        op: Any = torch.ops.aten._scaled_dot_product_flash_attention.default  # noqa: SLF001 - the op that gives LSE
        out, lse, *_ = op(*given, 0.0, causal, False, scale=scale)
        return out.transpose(1, 2), lse[:, :, : q.shape[1]]

    def backward(self, *_given: Any, **_more: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Raises NotImplementedError: the rules never let this run."""
        raise NotImplementedError("FlashAttention-2's backward is not bitwise repeatable")


class Efficient:
    """The memory-efficient backend, which was xFormers'. Its backward is repeatable as long as keys are not split."""

    bottom_right = True

    def widths(self, columns: int, value_dim: int) -> tuple[int, int]:
        """Returns whole steps of 16 bytes."""
        return up(columns, _MULTIPLE), up(value_dim, _MULTIPLE)

    def limit(self, columns: int, value_dim: int) -> str | None:
        """Returns why such widths cannot be computed."""
        return _too_wide(columns, value_dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
        """Returns O and LSE."""
        op: Any = torch.ops.aten._efficient_attention_forward.default  # noqa: SLF001 - the op that gives LSE
        lengths = (None, None, None, None)
        out, lse, *_ = op(q, k, v, None, *lengths, 0.0, _bound(q, k, causal=causal), True, scale=scale)
        return out, lse[:, :, : q.shape[1]]

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
        *,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns dq, dk, dv."""
        rows = q.shape[1]
        # Rows past the end take no part: nothing is left of exp(score - inf).
        lse = torch.nn.functional.pad(lse, (0, -rows % _LSE_ROWS), value=torch.inf).contiguous()
        unused = torch.zeros((), dtype=torch.int64, device=q.device)  # the state of a dropout that there is not
        op: Any = torch.ops.aten._efficient_attention_backward.default  # noqa: SLF001 - the op that takes LSE
        dq, dk, dv, _ = op(
            *(dout, q, k, v, None, out, None, None, rows, k.shape[1], lse, 0.0, unused, unused),
            *(_bound(q, k, causal=causal), False),
            scale=scale,
            num_splits_key=1,
        )
        return dq, dk, dv


class OnCpu:
    """The flash backend of a CPU: v as wide as q and k."""

    bottom_right = False

    def widths(self, columns: int, value_dim: int) -> tuple[int, int]:
        """Returns the wider of the two, for both."""
        width = max(columns, value_dim)
        return width, width

    def limit(self, columns: int, value_dim: int) -> str | None:
        """Returns None: any width will do."""
        del columns, value_dim
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
        """Returns O and LSE."""
        given = (tensor.transpose(1, 2) for tensor in (q, k, v))
        op: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default  # noqa: SLF001 - gives LSE
        out, lse = op(*given, 0.0, causal, attn_mask=None, scale=scale)
        return out.transpose(1, 2), lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
        *,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns dq, dk, dv."""
        given = (tensor.transpose(1, 2) for tensor in (dout, q, k, v, out))
        op: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default  # noqa: SLF001
        found = op(*given, lse, 0.0, causal, attn_mask=None, scale=scale)
        dq, dk, dv = (gradient.transpose(1, 2) for gradient in found)
        return dq, dk, dv


def _bound(q: Tensor, k: Tensor, *, causal: bool) -> int:
    """Returns how the efficient backend names the causal bound of these lengths."""
    return 0 if not causal else _TOP_LEFT if q.shape[1] == k.shape[1] else _BOTTOM_RIGHT


def _too_wide(columns: int, value_dim: int) -> str | None:
    widest = max(columns, value_dim)
    return None if widest <= _WIDEST else f"takes at most {_WIDEST} columns, this needs {widest}"


CUDNN: Final[Backend] = Cudnn()
FLASH: Final[Backend] = Flash()
EFFICIENT: Final[Backend] = Efficient()
ON_CPU: Final[Backend] = OnCpu()
