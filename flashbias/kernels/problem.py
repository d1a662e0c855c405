"""Attention's problem fields: what decides which configuration is fastest, as flat scalars.

Lengths are bucketed to the next power of two (at least 128, or 16 and 64 for few queries), and batch times heads enters only as *occupancy*,
the number of 128-row query tiles per multiprocessor, so that one tuned problem serves many shapes.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from autotune.device import DeviceInfo
from cache_db.models import Layout, Problem
from flashbias.band import Band
from flashbias.band import band as band_of
from flashbias.kernels.factors import Packing, packed_rank
from flashbias.precision import Arithmetic, Precision
from flashbias.varlen.band import sequence_band

Gradient = Literal["q", "k", "v", "q_bias", "k_bias", "mask"]
GRADIENTS: Final[tuple[Gradient, ...]] = ("q", "k", "v", "q_bias", "k_bias", "mask")
MaskKind = Literal["none", "bool", "float16", "bfloat16", "float32", "float64"]
MaskDims = Literal["matrix", "keys"]
SPEC: Final = "flashbias.kernels.spec:ATTENTION"
MAX_HEAD_DIM: Final = 256
MAX_RANK: Final = 256
SOFT_FIELDS: Final = frozenset({"seqlen_q", "seqlen_k", "occupancy"})
FEW_QUERIES: Final = 64
_OCCUPANCY_ROWS: Final = 128

Dim = Annotated[int, Field(ge=1, le=MAX_HEAD_DIM)]
Length = Annotated[int, Field(ge=1)]


class Shape(BaseModel):
    """One attention call's sizes and kinds, as a shapes file or a call states them.

    ``nheads_kv`` is the number of heads of k and v (``nheads`` by default); ``rank`` is 0 without a bias, and
    ``factor_dtype`` its precision (``dtype`` by default); ``precision`` is that of float32 (by default "ieee");
    ``causal`` and ``window`` are those of the operator; ``mask_dims`` says whether the mask has queries and keys or
    keys alone. With ``varlen`` the ``batch`` is a number of packed sequences and the lengths are the largest ones.
    ``grads`` names the inputs that want a gradient, none for inference; what a call does not have is not among them.
    ``layout`` is "strided" when any pointer or stride of q, k, v is not a multiple of 16 bytes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch: Length
    nheads: Length
    nheads_kv: Length | None = None
    seqlen_q: Length
    seqlen_k: Length
    headdim: Dim
    value_dim: Dim | None = None
    rank: Annotated[int, Field(ge=0, le=MAX_RANK)] = 0
    factor_dtype: Literal["float16", "bfloat16", "float32"] | None = None
    causal: bool | Literal["bottom_right"] = False
    window: tuple[int, int] = (-1, -1)
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    precision: Precision | None = None
    mask: MaskKind = "none"
    mask_dims: MaskDims = "matrix"
    varlen: bool = False
    grads: tuple[Gradient, ...] = ()
    layout: Layout = "aligned"

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        """Refuses head counts and factors that do not fit together."""
        if self.nheads % self.kv_heads:
            raise ValueError(f"nheads {self.nheads} must be a multiple of nheads_kv {self.kv_heads}")
        if self.varlen and self.mask != "none":
            raise ValueError("packed sequences (varlen) take no mask")
        if self.factor_dtype not in (None, self.dtype, "float32"):
            raise ValueError(f"factor_dtype must be {self.dtype} or float32")
        if self.precision is not None and self.dtype != "float32":
            raise ValueError(f"precision is that of float32 shapes, a {self.dtype} one has none")
        if self.rank and self.packing.used > MAX_RANK:
            raise ValueError(
                f"rank {self.rank} in {self.factor_dtype} needs {self.packing.used} packed columns, at most {MAX_RANK}"
            )
        return self

    @property
    def kv_heads(self) -> int:
        """Returns the number of heads of k and v."""
        return self.nheads_kv or self.nheads

    @property
    def packing(self) -> Packing:
        """Returns how this call's factors are packed for its backward."""
        split = self.factor_dtype == "float32" != self.dtype
        return packing(self.rank, self.dtype, split=split, grads=self.grads)

    @property
    def arithmetic(self) -> Arithmetic:
        """Returns how products are rounded: "default" for 16-bit inputs."""
        return "default" if self.dtype != "float32" else self.precision or "ieee"

    @property
    def band(self) -> Band:
        """Returns the diagonals seen; of packed sequences those of two as long as each other."""
        if self.varlen:
            return sequence_band(self.causal, self.window, self.seqlen_q, self.seqlen_k)[0]
        seen = band_of(self.causal, self.window, self.seqlen_q, self.seqlen_k)
        return seen.within(self.seqlen_q, self.seqlen_k)


@functools.cache
def packing(rank: int, dtype: str, *, split: bool, grads: tuple[str, ...]) -> Packing:
    """Returns how factors are packed for the backward of a call that wants ``grads``.

    Its k_factor has a column of ones if dq_bias is wanted, which recentres that gradient for free; a rank that fills
    its packed width leaves no column for it, and costs two small products more.
    """
    plain = Packing(dtype, rank, split)
    return replace(plain, ones_column="q_bias" in grads and 0 < plain.used < packed_rank(plain.used))


def window_bucket(band: Band, seqlen_k: int) -> int:
    """Returns the bucket of the number of keys a row sees where it has a lower bound, 0 where it has none."""
    if band.low is None:
        return 0
    width = seqlen_k if band.high is None else band.low + band.high + 1
    return bucket(min(max(width, 1), seqlen_k))


def bucket(seqlen: int) -> int:
    """Returns the length's bucket: the next power of two, at least 128."""
    return max(128, 1 << (seqlen - 1).bit_length())


def query_bucket(seqlen_q: int) -> int:
    """Returns the bucket of the number of queries: 16 or 64 for few of them, whose keys may be split, else its length's."""
    return 16 if seqlen_q <= 16 else FEW_QUERIES if seqlen_q <= FEW_QUERIES else bucket(seqlen_q)


def occupancy(batch: int, nheads: int, seqlen_q: int, sm_count: int) -> str:
    """Returns how many 128-row query tiles a multiprocessor gets: "<1", "1-4" or ">4"."""
    tiles = batch * nheads * -(-seqlen_q // _OCCUPANCY_ROWS) / sm_count
    return "<1" if tiles < 1 else "1-4" if tiles <= 4 else ">4"


def problem(shape: Shape, device: DeviceInfo, band: Band | None = None) -> Problem:
    """Returns the tuning problem that ``shape`` belongs to on ``device``; ``band`` overrides its causal and window."""
    from flashbias.kernels.spec import source

    band = band or shape.band
    value_dim = shape.value_dim or shape.headdim
    # Results are contiguous: their rows are whole 16-byte steps only if the head dims are.
    aligned = shape.layout == "aligned" and shape.headdim % 8 == 0 and value_dim % 8 == 0
    additive = shape.mask not in ("none", "bool")
    absent = {"q_bias", "k_bias"} if not shape.rank else set()
    grads = [name for name in GRADIENTS if name in shape.grads and name not in absent]
    if not additive:
        grads = [name for name in grads if name != "mask"]
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
            "rank_dim": packed_rank(shape.packing.used),
            "ones_column": shape.packing.ones_column,
            "causal": band.high is not None,
            "window": window_bucket(band, shape.seqlen_k),
            "mask": shape.mask,
            "mask_dims": ("matrix" if shape.mask_dims == "matrix" and shape.seqlen_q > 1 else "keys")
            if "mask" in grads
            else "none"
            if shape.mask == "none"
            else "any",
            "gqa_group": shape.nheads // shape.kv_heads,
            "varlen": shape.varlen,
            "factor_dtype": (shape.factor_dtype or shape.dtype) if shape.rank else "none",
            "factor_parts": shape.packing.blocks if shape.rank else 0,
            "grads": ",".join(grads),
            "precision": shape.arithmetic,
            "deterministic": True,
            "seqlen_q": query_bucket(shape.seqlen_q),
            "seqlen_k": bucket(shape.seqlen_k),
            "occupancy": occupancy(shape.batch, shape.nheads, shape.seqlen_q, device.sm_count),
        },
    )


def wanted(problem: Problem) -> frozenset[str]:
    """Returns the names of the inputs whose gradients the problem asks for."""
    return frozenset(name for name in str(problem.fields["grads"]).split(",") if name)
