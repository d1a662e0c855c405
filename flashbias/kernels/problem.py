"""Attention's problem fields: what decides which configuration is fastest, as flat scalars.

Lengths are bucketed to the next power of two (at least 128), and batch times heads enters only as *occupancy*,
the number of 128-row query tiles per multiprocessor, so that one tuned problem serves many shapes.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from autotune.device import DeviceInfo
from cache_db.models import Layout, Problem

Gradient = Literal["q", "k", "v", "q_bias", "k_bias"]
GRADIENTS: Final[tuple[Gradient, ...]] = ("q", "k", "v", "q_bias", "k_bias")
MaskKind = Literal["none", "bool", "float16", "bfloat16", "float32", "float64"]
SPEC: Final = "flashbias.kernels.spec:ATTENTION"
MAX_HEAD_DIM: Final = 128
MAX_RANK: Final = 128
SOFT_FIELDS: Final = frozenset({"seqlen_q", "seqlen_k", "occupancy"})
_OCCUPANCY_ROWS: Final = 128

Dim = Annotated[int, Field(ge=1, le=MAX_HEAD_DIM)]
Length = Annotated[int, Field(ge=1)]


class Shape(BaseModel):
    """One attention call's sizes and kinds, as a shapes file or a call states them.

    ``rank`` is 0 without a bias; ``grads`` names the inputs that want a gradient, none
    for inference; without a bias its factors are not among them;
    ``layout`` is "strided" when any pointer or stride of q, k, v is not a multiple of 16 bytes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch: Length
    nheads: Length
    seqlen_q: Length
    seqlen_k: Length
    headdim: Dim
    value_dim: Dim | None = None
    rank: Annotated[int, Field(ge=0, le=MAX_RANK)] = 0
    causal: bool = False
    dtype: Literal["float16", "bfloat16"] = "float16"
    mask: MaskKind = "none"
    grads: tuple[Gradient, ...] = ()
    layout: Layout = "aligned"


def packed_rank(rank: int) -> int:
    """Returns the width a factor is packed to: 0, 16, 32, 64 or 128 columns."""
    return 0 if rank == 0 else max(16, 1 << (rank - 1).bit_length())


def has_ones_column(rank: int, grads: Collection[str]) -> bool:
    """Returns whether the backward's packed k_factor has a column of ones, which recentres dq_bias for free.

    A rank that fills its packed width leaves no column for it, and costs two small products more.
    """
    return "q_bias" in grads and 0 < rank < packed_rank(rank)


def bucket(seqlen: int) -> int:
    """Returns the length's bucket: the next power of two, at least 128."""
    return max(128, 1 << (seqlen - 1).bit_length())


def occupancy(batch: int, nheads: int, seqlen_q: int, sm_count: int) -> str:
    """Returns how many 128-row query tiles a multiprocessor gets: "<1", "1-4" or ">4"."""
    tiles = batch * nheads * -(-seqlen_q // _OCCUPANCY_ROWS) / sm_count
    return "<1" if tiles < 1 else "1-4" if tiles <= 4 else ">4"


def problem(shape: Shape, device: DeviceInfo) -> Problem:
    """Returns the tuning problem that ``shape`` belongs to on ``device``."""
    from flashbias.kernels.spec import source

    value_dim = shape.value_dim or shape.headdim
    # Results are contiguous: their rows are whole 16-byte steps only if the head dims are.
    aligned = shape.layout == "aligned" and shape.headdim % 8 == 0 and value_dim % 8 == 0
    present = GRADIENTS if shape.rank else GRADIENTS[:3]
    return Problem(
        spec=SPEC,
        gpu_name=device.name,
        capability=f"{device.capability[0]}.{device.capability[1]}",
        sm_count=device.sm_count,
        mig_profile=device.mig_profile,
        triton_version=device.triton_version,
        source_hash=source(),
        layout="aligned" if aligned else "strided",
        fields={
            "dtype": shape.dtype,
            "head_dim": shape.headdim,
            "value_dim": value_dim,
            "rank_dim": packed_rank(shape.rank),
            "ones_column": has_ones_column(shape.rank, shape.grads),
            "causal": shape.causal,
            "mask": shape.mask,
            "gqa_group": 1,
            "varlen": False,
            "factor_dtype": shape.dtype if shape.rank else "none",
            "factor_parts": 1,
            "grads": ",".join(name for name in present if name in shape.grads),
            "precision": "default",
            "deterministic": True,
            "seqlen_q": bucket(shape.seqlen_q),
            "seqlen_k": bucket(shape.seqlen_k),
            "occupancy": occupancy(shape.batch, shape.nheads, shape.seqlen_q, device.sm_count),
        },
    )


def wanted(problem: Problem) -> frozenset[str]:
    """Returns the names of the inputs whose gradients the problem asks for."""
    return frozenset(name for name in str(problem.fields["grads"]).split(",") if name)
