"""A kernel that only writes scores, through the products that the attention kernels use: it shows how exact a bias is."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashbias.kernels import factors
from flashbias.kernels.factors import Packing
from flashbias.kernels.primitives import load_tile, scores

TILE = 64


@triton.jit
def write_scores(
    q_factor_ptr,
    k_factor_ptr,
    scores_ptr,
    rows,
    columns,
    factor_columns,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Writes one tile of 0 · 0ᵀ + q_factor k_factorᵀ."""
    start_q = tl.program_id(0) * BLOCK
    start_k = tl.program_id(1) * BLOCK
    zero = tl.zeros([BLOCK, 16], q_factor_ptr.dtype.element_ty)
    q_factor = load_tile(q_factor_ptr, start_q, factor_columns, rows, factor_columns, BLOCK, WIDTH, False, False, True)
    k_factor = load_tile(
        k_factor_ptr, start_k, factor_columns, columns, factor_columns, BLOCK, WIDTH, False, False, True
    )
    s = scores(zero, zero, q_factor, k_factor, 1.0, WIDTH, "default")
    row = start_q + tl.arange(0, BLOCK)
    column = start_k + tl.arange(0, BLOCK)
    pointers = scores_ptr + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(pointers, s, mask=(row < rows)[:, None] & (column < columns)[None, :])


def bias_scores(q_bias: Tensor, k_bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns q_bias k_biasᵀ (Sq, Sk) in fp32 as kernels for inputs of ``dtype`` see it; (S, R) factors of one head."""
    packing = Packing(str(dtype).removeprefix("torch."), q_bias.shape[1], q_bias.dtype != dtype)

    def room(_: str, shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=kind, device=q_bias.device)

    packed = factors.prepare(q_bias[None, :, None], k_bias[None, :, None], packing, room)
    rows, columns = q_bias.shape[0], k_bias.shape[0]
    found = torch.full((rows, columns), torch.nan, dtype=torch.float32, device=q_bias.device)
    width = max(16, 1 << (packing.used - 1).bit_length())
    grid = (triton.cdiv(rows, TILE), triton.cdiv(columns, TILE))
    write_scores[grid](
        packed.q_factor.contiguous(),
        packed.k_factor.contiguous(),
        found,
        rows,
        columns,
        packed.q_factor.shape[3],
        WIDTH=width,
        BLOCK=TILE,
    )
    return found


def ulps(found: Tensor, exact: Tensor) -> float:
    """Returns the largest error in fp32 ulp of the largest |bias| in its row."""
    peak = exact.abs().amax(-1, keepdim=True)
    ulp = torch.exp2(torch.floor(torch.log2(peak)) - 23)
    return float(((found.double() - exact).abs() / ulp).nan_to_num(torch.inf).max())
