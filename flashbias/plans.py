"""Which proven binaries a call runs: launch keys, and the plans made for them.

A call is reduced to a *launch key*, the small tuple of what decides the binaries; a hit costs no SQL, JSON or
hashing. A miss asks :func:`autotune.resolve`, which may tune. Backward finds the plan its forward made: autograd's
threads see no settings, and both must run configs that were proven together.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, cast

import torch
import triton
from torch import Tensor

import autotune
from autotune.device import DeviceInfo, describe
from cache_db.models import Problem
from flashbias.band import Band
from flashbias.implementations.foreign import Foreign
from flashbias.kernels import factors
from flashbias.kernels.binding import Binary
from flashbias.kernels.factors import Packing
from flashbias.kernels.problem import (
    GRADIENTS,
    MAX_HEAD_DIM,
    MAX_RANK,
    Gradient,
    MaskDims,
    MaskKind,
    Shape,
    bucket,
    occupancy,
    packing,
    problem,
    query_bucket,
    window_bucket,
)
from flashbias.kernels.space import IMPLEMENTATION
from flashbias.kernels.spec import ATTENTION
from flashbias.precision import Precision
from flashbias.recording import record
from flashbias.reference import Wanted
from flashbias.settings import current
from flashbias.varlen.sequences import Extent

logger = logging.getLogger(__name__)

_DTYPES: Final[dict[torch.dtype, Literal["float16", "bfloat16", "float32"]]] = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
}
_FIRST_CAPABILITY: Final = (8, 0)


@dataclass(frozen=True)
class Plan:
    """What one launch key runs: a proven binary for each kernel, or none, which means ``eager``.

    ``foreign`` implementations run in the place of the forward's binary, or of all of the backward. ``aligned`` is the
    layout class that all of them are for; other tensors must be copied to fit it.
    """

    binaries: dict[str, Binary] = field(default_factory=dict)
    aligned: bool = False
    foreign: dict[str, Foreign] = field(default_factory=dict)

    @property
    def eager(self) -> bool:
        """Whether nothing proven may run."""
        return not (self.binaries or self.foreign)

    def suits(self, band: Band, seqlen_q: int, seqlen_k: int) -> bool:
        """Returns whether what is foreign is as fast on this call as it was when it was chosen."""
        return all(each.suits(band, seqlen_q, seqlen_k) for each in self.foreign.values())

    def fit(self, tensor: Tensor) -> Tensor:
        """Returns the (B, S, H, D) tensor, or a copy that the binaries may read."""
        if tensor.stride(3) == 1 and (not self.aligned or factors.is_aligned(tensor)):
            return tensor
        return torch.empty_like(tensor, memory_format=torch.contiguous_format).copy_(tensor)


EAGER: Final = Plan()
_plans: dict[tuple[Any, ...], Plan] = {}
_latest: dict[tuple[Any, ...], Plan] = {}
_refused: dict[tuple[Any, ...], str] = {}
# Where mode "assert" has no kernel of ours for the calls that nothing foreign suits.
_without_ours: set[tuple[Any, ...]] = set()


def forget() -> None:
    """Forgets every plan of this process, so that the next call asks the tuner again."""
    _plans.clear()
    _latest.clear()
    _refused.clear()
    _without_ours.clear()


def refusal(problem: Problem, device: DeviceInfo, settings: autotune.Settings) -> str | None:
    """Returns why this process runs ``problem`` eager although its configs are proven, None where it does not."""
    return _refused.get((problem, device.index, settings.identity))


def has_kernels(q: Tensor, k: Tensor, v: Tensor, q_bias: Tensor | None, precision: str = "default") -> bool:
    """Returns whether there are kernels for these tensors at all: device, dtype, head dims, rank, no empty dim.

    For fp32 inputs ``precision`` must name an arithmetic.
    """
    if q.dtype not in _DTYPES or (q.dtype == torch.float32) != (precision != "default"):
        return False
    if max(q.shape[3], v.shape[3]) > MAX_HEAD_DIM:
        return False
    if q_bias is not None and packing_of(q, q_bias, ()).used > MAX_RANK:
        return False
    if 0 in q.shape or 0 in k.shape or 0 in v.shape:
        return False
    if triton.knobs.runtime.interpret:
        return q.device.type == "cpu"
    if q.device.type != "cuda" or torch.version.hip is not None:
        return False
    return describe(q.get_device()).capability >= _FIRST_CAPABILITY


def packing_of(q: Tensor, q_bias: Tensor, grads: tuple[str, ...]) -> Packing:
    """Returns how factors like ``q_bias`` beside ``q`` are packed; those wider than 16-bit q are split into its dtype."""
    split = q_bias.dtype != q.dtype != torch.float32
    return packing(q_bias.shape[3], _DTYPES[q.dtype], split=split, grads=grads)


def plan_for(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bias: Tensor | None,
    mask: Tensor | None,
    band: Band,
    grads: Wanted,
    precision: str = "default",
    *,
    through_forward: bool = False,
    extent: Extent | None = None,
) -> Plan:
    """Returns what to run; ``through_forward`` takes what the latest forward with this launch key ran.

    ``extent`` says that the tensors are packed sequences, in one batch, and ``band`` is that of equal lengths.
    A backward decides nothing: autograd's threads see no settings. Its tensors are made to fit the plan's layout.
    """
    device = describe(q.get_device())
    batch, seqlen_q, seqlen_k = extent or (q.shape[0], q.shape[1], k.shape[1])
    key = (
        device.index,
        q.dtype,
        precision,
        q.shape[3],
        v.shape[3],
        None if q_bias is None else packing_of(q, q_bias, names_of(grads)).kind,
        band.high is not None,
        window_bucket(band, seqlen_k),
        None if mask is None else (mask.dtype, _mask_dims(mask) if grads[5] else None),
        grads,
        q.shape[2] // k.shape[2],
        query_bucket(seqlen_q),
        bucket(seqlen_k),
        occupancy(batch, q.shape[2], seqlen_q, device.sm_count),
        extent is not None,
    )
    if through_forward:
        return _latest.get(key, EAGER)
    aligned = factors.is_aligned(q) and factors.is_aligned(k) and factors.is_aligned(v)

    def made(chosen: autotune.Settings) -> Plan:
        plan = _plans.get((key, aligned, chosen.identity))
        if plan is None:
            if device.index >= 0 and torch.cuda.is_current_stream_capturing():
                return EAGER
            plan = _make_plan(shape_of(q, k, v, q_bias, mask, grads, aligned, precision, extent), band, device, chosen)
            _plans[key, aligned, chosen.identity] = plan
        return plan

    chosen = current()
    plan = made(chosen)
    whole_key = (key, aligned, chosen.identity)
    if not plan.suits(band, seqlen_q, seqlen_k) and chosen.allows(IMPLEMENTATION) and whole_key not in _without_ours:
        try:
            ours = made(ours_alone(chosen))
        except autotune.CacheMiss:  # the proven winner runs: it is right, only slower than on other calls
            _without_ours.add(whole_key)
            ours = EAGER
        plan = plan if ours.eager else ours
    if not plan.eager or whole_key in _plans:
        _latest[key] = plan
    return plan


def ours_alone(settings: autotune.Settings) -> autotune.Settings:
    """Returns ``settings`` as they are for calls that nothing foreign suits (:meth:`Plan.suits`)."""
    return replace(settings, implementations=(IMPLEMENTATION,))


def shape_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bias: Tensor | None,
    mask: Tensor | None,
    grads: Wanted,
    aligned: bool,
    precision: str,
    extent: Extent | None,
) -> Shape:
    """Returns what this call asks the tuner for; ``aligned`` says whether q, k and v all lie on 16-byte steps."""
    batch, seqlen_q, seqlen_k = extent or (q.shape[0], q.shape[1], k.shape[1])
    return Shape(
        batch=batch,
        nheads=q.shape[2],
        nheads_kv=k.shape[2],
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        headdim=q.shape[3],
        value_dim=v.shape[3],
        rank=0 if q_bias is None else q_bias.shape[3],
        factor_dtype=None if q_bias is None else _DTYPES.get(q_bias.dtype, "float32"),
        dtype=_DTYPES[q.dtype],
        precision=None if precision == "default" else cast(Precision, precision),
        mask="none" if mask is None else cast(MaskKind, str(mask.dtype).removeprefix("torch.")),
        mask_dims="matrix" if mask is None else _mask_dims(mask),
        varlen=extent is not None,
        grads=names_of(grads),
        layout="aligned" if aligned else "strided",
    )


def _compile_packing(shape: Shape, device: DeviceInfo) -> None:
    """Compiles what packs the factors of this call's forward and backward, so that no launch has to."""
    if not shape.rank:
        return
    dtype = shape.factor_dtype or shape.dtype
    for how in (replace(shape.packing, ones_column=False), shape.packing):
        if how.split or how.ones_column or how.rank % 8 or shape.layout != "aligned":
            factors.binaries(device.index, how.kind, dtype, dtype)


def names_of(grads: Wanted) -> tuple[Gradient, ...]:
    """Returns the names of the inputs whose gradient ``grads`` asks for."""
    return tuple(name for name, want in zip(GRADIENTS, grads, strict=True) if want)


def _mask_dims(mask: Tensor) -> MaskDims:
    """Returns whether the mask has queries of its own, or keys alone."""
    return "matrix" if mask.shape[2] > 1 and mask.stride(2) != 0 else "keys"


def _make_plan(shape: Shape, band: Band, device: DeviceInfo, settings: autotune.Settings) -> Plan:
    """Resolves every kernel of the call and compiles it; a binary that is not the proven one is proven first."""
    if settings.record is not None:
        record(settings.record, shape, band)
    found = problem(shape, device, band)
    resolution = autotune.resolve(found, device, settings)
    if not resolution.choices:
        return EAGER
    binaries: dict[str, Binary] = {}
    foreign: dict[str, Foreign] = {}
    try:
        _compile_packing(shape, device)
    except Exception as error:  # noqa: BLE001 - as below
        return _eager(found, device, settings, f"factors cannot be packed: no kernel can be compiled here ({error})")
    for kernel, choice in resolution.choices.items():
        try:
            binary = ATTENTION.compile(kernel, choice.config, found, device).load()
        except Exception as error:  # noqa: BLE001 - it compiled when it was proven; a full disk or no compiler is no reason to crash
            return _eager(found, device, settings, f"{kernel} is not used: it cannot be compiled here ({error})")
        if not autotune.confirm(found, device, settings, kernel, choice, binary.binary):
            return _eager(
                found, device, settings, f"{kernel} is not used: the binary compiled here could not be proven"
            )
        if isinstance(binary, Foreign):
            foreign[kernel] = binary
        else:
            binaries[kernel] = binary
    return Plan(binaries, found.layout == "aligned", foreign)


def _eager(found: Problem, device: DeviceInfo, settings: autotune.Settings, reason: str) -> Plan:
    """Returns the plan without kernels, and says and remembers why."""
    logger.warning("%s; running eager", reason)
    _refused[found, device.index, settings.identity] = reason
    return EAGER
