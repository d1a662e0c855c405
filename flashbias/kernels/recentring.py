"""How backward_dq keeps dQ_bias accurate for factors that are large next to their spread in a row.

Rows of dS sum to zero, so dQ_bias_i = Σ_j dS_ij k_bias_j = Σ_j dS_ij (k_bias_j - c_i) for any c_i.
The rounding of dS and of delta spoils the first form where k_bias is large next to its spread within the row, as
ALiBi's key positions are; with c_i = Σ_j P_ij k_bias_j the second does not notice. Both sums over P and dS rounded,
Σ P and Σ dS, are needed for it: a column of ones in the packed k_factor gives them in the same products.
"""

import triton
import triton.language as tl

# A product of fewer columns does not exist.
SUM_COLUMNS = tl.constexpr(16)


@triton.jit
def recentred(ds_factor, p_factor, ds_sum, p_sum, dlse, rank, ONES_COLUMN: tl.constexpr):
    """Returns Σ_j dS_ij (k_factor_j - c_i) + dLSE_i c_i, c_i = Σ_j P_ij k_factor_j / Σ_j P_ij; 0 in a row without a key.

    A row of dS sums to dLSE, and to that only before it is rounded. The sums over P and dS are in column ``rank`` of
    the products, or in every column of ``ds_sum`` and ``p_sum``.
    """
    if ONES_COLUMN:
        ones = (tl.arange(0, ds_factor.shape[1]) == rank)[None, :]
        ds_sum = tl.where(ones, ds_factor, 0.0)
        p_sum = tl.where(ones, p_factor, 0.0)
    else:
        first = (tl.arange(0, SUM_COLUMNS) == 0)[None, :]
        ds_sum = tl.where(first, ds_sum, 0.0)
        p_sum = tl.where(first, p_sum, 0.0)
    total = tl.sum(p_sum, 1)
    # Before it was rounded P summed to 1, which is what dLSE goes with, or to more under a mask of huge negative numbers.
    before = tl.where(tl.abs(total - 1.0) < 0.25, 1.0, total)
    share = (tl.sum(ds_sum, 1) - before * dlse) / tl.where(total > 0.0, total, 1.0)
    return ds_factor - share[:, None] * p_factor
