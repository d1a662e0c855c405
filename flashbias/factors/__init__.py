"""Builders of factors: known attention biases as ``(q_bias, k_bias)``, ready for ``flash_bias_func``.

Every builder returns two tensors, (B or 1, Sq, H or 1, R) and (B or 1, Sk, H or 1, R), whose product over R is
the bias; fp64 where its inputs are, else fp32 (``alibi`` takes a dtype). ``approximation`` says how far any such
pair is from a dense bias.

=================  ==========================  =====  ==============================================
builder            bias                        exact  source
=================  ==========================  =====  ==============================================
alibi              slope (j − i)               yes    arXiv 2108.12409
squared_distance   weight ‖x − y‖²             yes    FlashBias, arXiv 2505.12044
from_dense         any matrix                  SVD    Eckart and Young, Psychometrika 1 (1936)
t5_relative        table[bucket(j − i)]        SVD    arXiv 1910.10683
NeuralFactors      any function of positions   fit    FlashBias, arXiv 2505.12044
=================  ==========================  =====  ==============================================

``swin_table`` (arXiv 2103.14030, 2111.09883) and ``t5_table`` expand learned tables to dense biases.
"""

from __future__ import annotations

from flashbias.factors.dense import Approximation, approximation, from_dense
from flashbias.factors.neural import NeuralFactors
from flashbias.factors.points import squared_distance
from flashbias.factors.positions import alibi, alibi_slopes
from flashbias.factors.tables import swin_table, t5_relative, t5_table

__all__ = [
    "Approximation",
    "NeuralFactors",
    "alibi",
    "alibi_slopes",
    "approximation",
    "from_dense",
    "squared_distance",
    "swin_table",
    "t5_relative",
    "t5_table",
]
