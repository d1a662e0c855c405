"""Attention as a KernelSpec: what the tuner must know to search, time and prove its kernels.

The gate compares one kernel's outputs at a time: ``out`` and ``lse`` of the forward, ``delta``, ``dq`` and
``dq_bias`` of one backward pass, ``dk``, ``dv`` and ``dk_bias`` of another, ``dmask`` of the last. Factor gradients
are those of every (batch, query head) in fp32; the launcher sums them over broadcast dims.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final, TypedDict

import torch
from torch import Tensor

from autotune.device import DeviceInfo
from autotune.source import source_hash
from autotune.spec import Case, Floor, Reference, Rule, Tensors, TensorSpec
from cache_db.models import Config, Problem
from flashbias import reference
from flashbias.band import Band
from flashbias.kernels import arguments, binding, cases, factors, ragged, sequences, space, splitting
from flashbias.kernels.arguments import Sizes
from flashbias.kernels.binding import Binary
from flashbias.kernels.factors import Packing
from flashbias.kernels.precisions import floor_of, rounding_of
from flashbias.kernels.problem import GRADIENTS, SOFT_FIELDS, packing, wanted

_Call = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Band, float]


class _How(TypedDict):
    """How the reference computes gradients here."""

    compute_dtype: torch.dtype
    wanted: reference.Wanted
    dlse: Tensor | None


_QUERY_GRADIENTS: Final = ("q", "q_bias")
_KEY_GRADIENTS: Final = ("k", "v", "k_bias")


CONSTANTS: Final = {**binding.CONSTANTS, **factors.CONSTANTS, **arguments.CONSTANTS, **sequences.CONSTANTS}


@functools.cache
def source() -> str:
    """Returns the hash of everything that decides what the kernels compute."""
    functions = [*arguments.FUNCTIONS.values(), *factors.FUNCTIONS, *splitting.FUNCTIONS.values()]
    functions += [*arguments.HOST_FUNCTIONS, *sequences.FUNCTIONS, *sequences.HOST_FUNCTIONS]
    return source_hash([*functions, *binding.HOST_FUNCTIONS, packing, space.padded], CONSTANTS)


def softmax_scale(problem: Problem) -> float:
    """Returns the scale that timing and proofs use; kernels take any at run time."""
    return 1.0 / math.sqrt(float(problem.fields["head_dim"]))


class AttentionSpec:
    """Implements :class:`autotune.spec.KernelSpec` for the attention kernels."""

    every_kernel: Final = space.KERNELS

    def kernels(self, problem: Problem) -> tuple[str, ...]:
        """Returns the forward alone, or with the backward passes that the wanted gradients need."""
        gradients = wanted(problem)
        if not gradients:
            return ("forward",)
        # delta, which every pass needs, comes out of backward_dq even where no query gradient is wanted.
        dkdv = ("backward_dkdv",) if gradients & set(_KEY_GRADIENTS) else ()
        mask = ("backward_mask",) if "mask" in gradients else ()
        return ("forward", "backward_dq", *dkdv, *mask)

    def depends_on(self, kernel: str, problem: Problem) -> tuple[str, ...]:
        """Returns the kernels whose outputs ``kernel`` reads."""
        del problem
        return {"forward": (), "backward_dq": ("forward",)}.get(kernel, ("forward", "backward_dq"))

    def soft_fields(self) -> frozenset[str]:
        """Returns the size buckets: a neighbour may differ in them."""
        return SOFT_FIELDS

    def representative(self, problem: Problem, device: DeviceInfo) -> Case:
        """Returns the bucket's own lengths with as many heads as the occupancy class means."""
        return (ragged.representative if problem.fields["varlen"] else cases.representative)(problem, device)

    def smaller(self, problem: Problem, case: Case) -> Case | None:
        """Returns the timed case in about half of the memory, None where that would say nothing of the problem."""
        return (ragged.smaller if problem.fields["varlen"] else cases.smaller)(problem, case)

    def cases(self, problem: Problem, device: DeviceInfo) -> Sequence[Case]:
        """Returns the proof's cases, a small ragged one first."""
        return (ragged.proof if problem.fields["varlen"] else cases.proof)(problem, device)

    def race_case(self, problem: Problem, device: DeviceInfo) -> Case:
        """Returns a case just over one wave of the device."""
        return (ragged.race if problem.fields["varlen"] else cases.race)(problem, device)

    def inputs(self, problem: Problem, case: Case, seed: int, device: torch.device) -> Tensors:
        """Returns q, k, v, dout and, as the problem and the case have them, q_bias, k_bias, mask, dlse."""
        return (ragged.inputs if problem.fields["varlen"] else cases.inputs)(problem, case, seed, device)

    def outputs(self, kernel: str, problem: Problem, case: Case) -> dict[str, TensorSpec]:
        """Returns the buffers ``kernel`` fills: (B, S, H, D) like the inputs, row values (B, H, Sq) in fp32."""
        fields, gradients = problem.fields, wanted(problem)
        dtype = getattr(torch, str(fields["dtype"]))
        batch, nheads, nheads_kv, rank = (int(case.sizes[name]) for name in ("batch", "nheads", "nheads_kv", "rank"))
        rows = {"q": int(case.sizes["seqlen_q"]), "k": int(case.sizes["seqlen_k"])}
        head_dim, value_dim = int(fields["head_dim"]), int(fields["value_dim"])
        row_values = TensorSpec.contiguous((batch, nheads, rows["q"]), torch.float32)
        if kernel == "forward":
            out = TensorSpec.contiguous((batch, rows["q"], nheads, value_dim), dtype)
            return {"out": out, "lse": row_values}
        if kernel == "backward_mask":
            return {
                "dmask": TensorSpec.contiguous(cases.mask_shape(problem, case), getattr(torch, str(fields["mask"])))
            }
        side = "q" if kernel == "backward_dq" else "k"
        found = {"delta": row_values} if side == "q" else {}
        dims = {"q": (nheads, head_dim), "k": (nheads_kv, head_dim), "v": (nheads_kv, value_dim)}
        for name in _QUERY_GRADIENTS if side == "q" else _KEY_GRADIENTS:
            if name in gradients:
                own = int(case.sizes.get(f"{side}_factor_rows", rows[side])) if "bias" in name else rows[side]
                shape = (batch, own, *dims.get(name, (nheads, rank)))
                found[f"d{name}"] = TensorSpec.contiguous(shape, torch.float32 if "bias" in name else dtype)
        return found

    def scratch(self, kernel: str, problem: Problem, config: Config, case: Case) -> dict[str, TensorSpec]:
        """Returns room for what splits find, packed factors, what balances them, and their gradients before they are summed."""
        sizes = case.sizes
        split = splitting.split_of(kernel, config, problem)
        lengths = (int(sizes[name]) for name in ("seqlen_q", "seqlen_k"))
        shapes = split.shapes(int(sizes["batch"]) * int(sizes["nheads"]), *lengths) if split else {}
        partial = {name: TensorSpec.contiguous(shape, torch.float32) for name, shape in shapes.items()}
        if not problem.fields["rank_dim"]:
            return partial
        how = _packing(kernel, problem, int(sizes["rank"]))
        dtype = getattr(torch, how.dtype)
        found = {}
        for name, length in (("q_factor", "seqlen_q"), ("k_factor", "seqlen_k")):
            rows = int(sizes.get(f"{name}_rows", sizes[length]))
            shape = (int(sizes["factor_batch"]), rows, int(sizes[f"{name}_nheads"]), how.columns)
            found[name] = TensorSpec.contiguous(shape, dtype)
        if how.balanced:
            found["peaks"] = TensorSpec.contiguous((2, how.rank), torch.int32)
        side = {"backward_dq": "q", "backward_dkdv": "k"}.get(kernel)
        if side and f"{side}_bias" in wanted(problem) and (how.split or f"{side}_factor_rows" in sizes):
            shape = (int(sizes["batch"]), int(sizes[f"seqlen_{side}"]), int(sizes["nheads"]), how.used)
            found[f"d{side}_packed"] = TensorSpec.contiguous(shape, torch.float32)
        return found | partial

    def candidates(self, kernel: str, problem: Problem, device: DeviceInfo) -> Sequence[Config]:
        """Returns every config worth trying."""
        del kernel
        return space.candidates(problem, device)

    def rejects(self, kernel: str, config: Config, problem: Problem, device: DeviceInfo) -> str | None:
        """Returns why ``config`` may not run here, or None."""
        return space.rejects(kernel, config, problem, device)

    def default(self, kernel: str, problem: Problem, device: DeviceInfo) -> Config:
        """Returns the conservative config."""
        return space.default(kernel, problem, device)

    def compile(self, kernel: str, config: Config, problem: Problem, device: DeviceInfo) -> Binary:
        """Compiles without touching a GPU; raises what Triton raises."""
        return arguments.compile_kernel(kernel, config, problem, device)

    def launch(
        self, kernel: str, compiled: Binary, problem: Problem, inputs: Tensors, outputs: Tensors, scratch: Tensors
    ) -> None:
        """Packs the factors where needed, enqueues one run, and gathers the gradients of split factors, as the launcher does."""
        sizes = sizes_of(problem, inputs)
        tensors = {**inputs, **outputs, **{name: scratch[name] for name in scratch if name.startswith("partial_")}}
        packed = None
        if "q_factor" in scratch:
            how = _packing(kernel, problem, inputs["q_bias"].shape[3])
            packed = factors.prepare(inputs["q_bias"], inputs["k_bias"], how, lambda name, *_: scratch[name])
            tensors |= {"q_factor": packed.q_factor, "k_factor": packed.k_factor}
            tensors |= {f"d{side}_bias": scratch[f"d{side}_packed"] for side in "qk" if f"d{side}_packed" in scratch}
            sizes = replace(sizes, columns=how.used)
        if "mask" in inputs:
            tensors["mask"] = arguments.as_bytes(inputs["mask"], sizes)
        arguments.launch_kernel(kernel, compiled, tensors, sizes, softmax_scale(problem))
        for side in "qk":
            if packed is not None and f"d{side}_packed" in scratch:
                gradient = scratch[f"d{side}_packed"]
                if f"{side}_factor" in sizes.positional:
                    rows = inputs[f"{side}_bias"].shape[1]
                    gradient = sequences.summed(gradient, inputs[f"cu_seqlens_{side}"], rows)
                outputs[f"d{side}_bias"].copy_(packed.gradient(side, gradient))

    def oracle(self, problem: Problem, inputs: Tensors) -> dict[str, Reference]:
        """Returns every output in fp64, and the same sums over absolute values."""
        if "cu_seqlens_q" in inputs:
            parts = (self.oracle(problem, part) for part in sequences.split(inputs))
            return sequences.joined_references(parts, inputs)
        call, dout, dlse = _call(problem, inputs), inputs["dout"], inputs.get("dlse")
        out, lse = reference.forward(*call, compute_dtype=torch.float64)
        how: _How = {"compute_dtype": torch.float64, "wanted": _flags(problem), "dlse": dlse}
        gradients = reference.backward(dout, *call, out, lse, **how)
        sizes = reference.magnitudes(dout, *call, out, lse, **how)
        found = {
            "out": Reference(out, sizes[0]),
            "lse": Reference(lse),
            "delta": Reference(_delta(out, dout, lse, dlse), _delta(out.abs(), dout.abs(), lse, _negated(dlse))),
        }
        for name, value, size in zip(gradients._fields, gradients, sizes[1:], strict=True):
            if value is not None:
                found[name] = Reference(value, size)
        return found

    def ideal(self, problem: Problem, inputs: Tensors) -> Tensors:
        """Returns every output as the ideal kernel gives it: products' operands rounded once, outputs rounded once."""
        if "cu_seqlens_q" in inputs:
            return sequences.joined((self.ideal(problem, part) for part in sequences.split(inputs)), inputs)
        call, dout, dlse = _call(problem, inputs), inputs["dout"], inputs.get("dlse")
        dtype = rounding_of(str(problem.fields["dtype"]), str(problem.fields["precision"]))
        out, lse = reference.forward(*call, compute_dtype=torch.float32, round_to=dtype)
        how: _How = {"compute_dtype": torch.float32, "wanted": _flags(problem), "dlse": dlse}
        gradients = reference.backward(dout, *call, out, lse, round_to=dtype, recentre=True, **how)
        found = {"out": out, "lse": lse, "delta": _delta(out.float(), dout.float(), lse, dlse)}
        found.update({name: value for name, value in gradients._asdict().items() if value is not None})
        if "dmask" in found:
            found["dmask"] = found["dmask"].to(inputs["mask"].dtype)
        return found

    def rule(self, output: str) -> Rule:
        """Returns LSE in nats, O at twice and gradients at three times the ideal's worst row."""
        if output == "lse":
            return Rule("log")
        return Rule("rows", 2.0 if output == "out" else 3.0)

    def axes(self, output: str) -> tuple[str, ...]:
        """Returns the names of an output's dims short of a row's elements, for maps of its errors."""
        named = {"lse": ("batch", "head", "row"), "dmask": ("batch", "head", "row"), "delta": ("batch", "head")}
        return named.get(output, ("batch", "row", "head"))

    def floor_dtype(self, problem: Problem) -> torch.dtype | Floor:
        """Returns the inputs' dtype, for fp32 ones the floor of their precision."""
        return floor_of(str(problem.fields["dtype"]), str(problem.fields["precision"]), int(problem.fields["head_dim"]))


def sizes_of(problem: Problem, inputs: Tensors) -> Sizes:
    """Returns the sizes of a case's inputs."""
    batch, seqlen_q, nheads, _ = inputs["q"].shape
    columns = inputs["q_bias"].shape[3] if "q_bias" in inputs else 0
    nheads_kv, seqlen_k = inputs["k"].shape[2], inputs["k"].shape[1]
    if "cu_seqlens_q" in inputs:
        batch, (longest_q, longest_k, _) = inputs["cu_seqlens_q"].shape[0] - 1, inputs["longest"].shape
        sides = [side for side in "qk" if columns and inputs[f"{side}_bias"].shape[1] != inputs[side].shape[1]]
        band, shifted = ragged.band_of(problem, inputs)
        sizes = Sizes(batch, nheads, nheads_kv, longest_q, longest_k, columns, band)
        positional = tuple(f"{side}_factor" for side in sides)
        return replace(sizes, packed=True, rows_q=seqlen_q, shifted=shifted, positional=positional)
    if "longest" in inputs:
        return Sizes(batch, nheads, nheads_kv, seqlen_q, seqlen_k, columns, ragged.band_of_part(problem, inputs))
    band = cases.band_of(problem, seqlen_q, seqlen_k)
    return Sizes(batch, nheads, nheads_kv, seqlen_q, seqlen_k, columns, band)


def _packing(kernel: str, problem: Problem, rank: int) -> Packing:
    """Returns how ``kernel`` is given its factors; every pass of the backward shares one packing."""
    fields = problem.fields
    split = fields["factor_dtype"] != fields["dtype"]
    return Packing(str(fields["dtype"]), rank, split, kernel != "forward" and bool(fields["ones_column"]))


def _flags(problem: Problem) -> reference.Wanted:
    """Returns the wanted gradients in the order of the reference."""
    q, k, v, q_bias, k_bias, mask = (name in wanted(problem) for name in GRADIENTS)
    return q, k, v, q_bias, k_bias, mask


def _delta(out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None) -> Tensor:
    """Returns rowsum(O ∘ dO) - dLSE as (B, H, Sq); a row without a key has no dLSE."""
    delta = (out * dout).sum(-1).transpose(1, 2)
    return delta if dlse is None else delta - torch.where(lse == -torch.inf, 0.0, dlse.to(delta.dtype))


def _negated(dlse: Tensor | None) -> Tensor | None:
    """Returns -|dLSE|, which ``_delta`` takes from a sum of absolute values."""
    return None if dlse is None else -dlse.abs()


def _call(problem: Problem, inputs: Tensors) -> _Call:
    """Returns the reference's arguments, factors expanded so that their gradients are those of every (batch, head)."""
    sizes = sizes_of(problem, inputs)
    group = sizes.nheads // sizes.nheads_kv
    both: list[Tensor | None] = [None, None]
    for index, name in enumerate(("q_bias", "k_bias")):
        if name in inputs:
            factor = inputs[name]
            if 1 < factor.shape[2] < sizes.nheads:
                factor = factor.repeat_interleave(group, dim=2)
            both[index] = factor.expand(sizes.batch, factor.shape[1], sizes.nheads, factor.shape[3])
    scale = softmax_scale(problem)
    return inputs["q"], inputs["k"], inputs["v"], both[0], both[1], inputs.get("mask"), sizes.band, scale


ATTENTION: Final = AttentionSpec()
