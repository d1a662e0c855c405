"""How products of fp32 inputs are rounded: the operator's ``precision``, and PyTorch's own setting behind None."""

from __future__ import annotations

from typing import Final, Literal, get_args

import torch
from torch import Tensor

from flashbias.errors import ArgumentError

Precision = Literal["ieee", "tf32x3", "tf32"]
# What problems, plans and ops carry; "default" beside every dtype but fp32, and for fp32 on a CPU.
Arithmetic = Literal["default", "ieee", "tf32x3", "tf32"]
PRECISIONS: Final[tuple[Precision, ...]] = get_args(Precision)


def chosen(precision: object, q: Tensor) -> Arithmetic:
    """Returns the arithmetic of a call with this ``precision``; raises ArgumentError for one that ``q`` cannot have.

    On a CPU it is "default" (``eager`` computes in fp32), except that a named precision has Triton's interpreter run
    the kernels where it is on.
    """
    if precision is None:
        return torchs_own() if q.dtype == torch.float32 and q.device.type == "cuda" else "default"
    if precision not in PRECISIONS:
        got = f"{precision!r:.60} ({type(precision).__name__})"
        raise ArgumentError.explain("precision", expected=f"None or one of {', '.join(PRECISIONS)}", got=got)
    if q.dtype != torch.float32:
        raise ArgumentError.explain(
            "precision",
            expected=f"None beside {str(q.dtype).removeprefix('torch.')} q, k and v",
            got=repr(precision),
            cure="Leave it out, or cast q, k and v to float32: only products of these can be rounded in several ways.",
        )
    return precision


def torchs_own() -> Precision:
    """Returns what PyTorch's fp32 matrix products on a GPU are set to now: "tf32", or "ieee" for full precision.

    From PyTorch 2.9 on there are a new setting and an old one. Asking for the old one raises if the new one was
    written, and warns in some versions; the new one knows of both.
    """
    matmul = torch.backends.cuda.matmul
    setting = getattr(matmul, "fp32_precision", None)
    if setting is None:
        setting = "tf32" if matmul.allow_tf32 else "ieee"
    return "tf32" if setting == "tf32" else "ieee"


# While torch.compile traces, the answer becomes a constant of the graph. The decorator that marks it for Dynamo,
# torch.compiler.assume_constant_result, would import all of Dynamo along with this package.
torchs_own._dynamo_marked_constant = True  # type: ignore[attr-defined]  # noqa: SLF001
