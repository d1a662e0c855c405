"""flash-attn-4, the package ``flash_attn.cute``, imported when it first runs.

Its causal bound is aligned bottom-right. Its gradients are wrong at some widths and right where those are multiples
of 32 (an H200 with version 4.0.0b30): the gate tells which, and two variants, as wide as must be and padded, compete.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor

from flashbias.implementations.backend import Backend, up

MULTIPLE: Final = 8
SAFE_MULTIPLE: Final = 32
_WIDEST: Final = 256


@functools.cache
def package() -> Any:
    """Returns the package; raises what importing it raises, which for a broken installation may be anything."""
    return importlib.import_module("flash_attn.cute")


@functools.cache
def _interface() -> Any:
    """Returns the module whose functions give LSE, and take that of another forward."""
    return importlib.import_module("flash_attn.cute.interface")


@dataclass(frozen=True)
class Flash4:
    """flash-attn-4 with q and k padded to a ``multiple`` of columns."""

    multiple: int
    bottom_right: bool = True

    def widths(self, columns: int, value_dim: int) -> tuple[int, int]:
        """Returns whole steps; v keeps its own width."""
        return up(columns, self.multiple), up(value_dim, MULTIPLE)

    def limit(self, columns: int, value_dim: int) -> str | None:
        """Returns why such widths cannot be computed."""
        widest = max(columns, value_dim)
        return None if widest <= _WIDEST else f"flash-attn-4 takes at most {_WIDEST} columns, this needs {widest}"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
        """Returns O and LSE."""
        run = _interface()._flash_attn_fwd  # noqa: SLF001 - the public one gives LSE only to those that differentiate
        out, lse, *_ = run(q, k, v, softmax_scale=scale, causal=causal, return_lse=True)
        return out, lse

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
        """Returns dq, dk, dv, added in one order; raises where this version cannot do that."""
        run = _interface()._flash_attn_bwd  # noqa: SLF001 - the public one takes no other forward's LSE
        how = {"softmax_scale": scale, "causal": causal, "deterministic": True}
        dq, dk, dv, *_ = run(q, k, v, out, dout, lse.contiguous(), **how)
        return dq, dk, dv


PLAIN: Final[Backend] = Flash4(MULTIPLE)
PADDED: Final[Backend] = Flash4(SAFE_MULTIPLE)
