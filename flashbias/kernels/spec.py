"""Attention as a KernelSpec: what the tuner must know to search, time and prove its kernels.

The gate compares one kernel's outputs at a time: ``out`` and ``lse`` of the forward, ``delta``, ``dq`` and
``dq_bias`` of one backward pass, ``dk``, ``dv`` and ``dk_bias`` of the other. Factor gradients leave the kernels
in fp32 for every (batch, head); the launcher sums them over broadcast dims.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from autotune.device import DeviceInfo
from autotune.source import source_hash
from autotune.spec import Case, Reference, Rule, Tensors, TensorSpec
from cache_db.models import Config, Problem
from flashbias import reference
from flashbias.kernels import arguments, cases, space
from flashbias.kernels.arguments import Sizes
from flashbias.kernels.binding import Binary
from flashbias.kernels.packing import pack
from flashbias.kernels.problem import SOFT_FIELDS, wanted

_Call = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, bool, float]
_QUERY_GRADIENTS: Final = ("q", "q_bias")
_KEY_GRADIENTS: Final = ("k", "v", "k_bias")


@functools.cache
def source() -> str:
    """Returns the hash of everything that decides what the kernels compute."""
    return source_hash([*arguments.FUNCTIONS.values(), pack, *arguments.HOST_FUNCTIONS])


def sizes_of(inputs: Tensors) -> Sizes:
    """Returns the sizes of a case's inputs."""
    batch, seqlen_q, nheads, _ = inputs["q"].shape
    rank = inputs["q_bias"].shape[3] if "q_bias" in inputs else 0
    return Sizes(batch, nheads, seqlen_q, inputs["k"].shape[1], rank)


def softmax_scale(problem: Problem) -> float:
    """Returns the scale that timing and proofs use; kernels take any at run time."""
    return 1.0 / math.sqrt(float(problem.fields["head_dim"]))


class AttentionSpec:
    """Implements :class:`autotune.spec.KernelSpec` for the attention kernels."""

    def kernels(self, problem: Problem) -> tuple[str, ...]:
        """Returns the forward alone, or with the backward passes that the wanted gradients need."""
        gradients = wanted(problem)
        if not gradients:
            return ("forward",)
        # delta, which both passes need, comes out of backward_dq even where no query gradient is wanted.
        return ("forward", "backward_dq", *(["backward_dkdv"] if gradients & set(_KEY_GRADIENTS) else []))

    def depends_on(self, kernel: str, problem: Problem) -> tuple[str, ...]:
        """Returns the kernels whose outputs ``kernel`` reads."""
        del problem
        return {"forward": (), "backward_dq": ("forward",), "backward_dkdv": ("forward", "backward_dq")}[kernel]

    def soft_fields(self) -> frozenset[str]:
        """Returns the size buckets: a neighbour may differ in them."""
        return SOFT_FIELDS

    def representative(self, problem: Problem, device: DeviceInfo) -> Case:
        """Returns the bucket's own lengths with as many heads as the occupancy class means."""
        return cases.representative(problem, device)

    def cases(self, problem: Problem, device: DeviceInfo) -> Sequence[Case]:
        """Returns the proof's cases, a small ragged one first."""
        return cases.proof(problem, device)

    def race_case(self, problem: Problem, device: DeviceInfo) -> Case:
        """Returns a case just over one wave of the device."""
        return cases.race(problem, device)

    def inputs(self, problem: Problem, case: Case, seed: int, device: torch.device) -> Tensors:
        """Returns q, k, v, dout and, as the problem has them, q_bias, k_bias, mask."""
        return cases.inputs(problem, case, seed, device)

    def outputs(self, kernel: str, problem: Problem, case: Case) -> dict[str, TensorSpec]:
        """Returns the buffers ``kernel`` fills: (B, S, H, D) like the inputs, row values (B, H, Sq) in fp32."""
        fields, gradients = problem.fields, wanted(problem)
        dtype = getattr(torch, str(fields["dtype"]))
        batch, nheads, rank = (int(case.sizes[name]) for name in ("batch", "nheads", "rank"))
        rows = {"q": int(case.sizes["seqlen_q"]), "k": int(case.sizes["seqlen_k"])}
        head_dim, value_dim = int(fields["head_dim"]), int(fields["value_dim"])
        row_values = TensorSpec.contiguous((batch, nheads, rows["q"]), torch.float32)
        if kernel == "forward":
            out = TensorSpec.contiguous((batch, rows["q"], nheads, value_dim), dtype)
            return {"out": out, "lse": row_values}
        side = "q" if kernel == "backward_dq" else "k"
        found = {"delta": row_values} if side == "q" else {}
        dims = {"q": head_dim, "k": head_dim, "v": value_dim, "q_bias": rank, "k_bias": rank}
        for name in _QUERY_GRADIENTS if side == "q" else _KEY_GRADIENTS:
            if name in gradients:
                shape = (batch, rows[side], nheads, dims[name])
                found[f"d{name}"] = TensorSpec.contiguous(shape, torch.float32 if "bias" in name else dtype)
        return found

    def scratch(self, kernel: str, problem: Problem, config: Config, case: Case) -> dict[str, TensorSpec]:
        """Returns room for the packed factors."""
        del config
        if not problem.fields["rank_dim"]:
            return {}
        width = arguments.packed_columns(int(case.sizes["rank"]), _ones_column(kernel, problem))
        batch, nheads = int(case.sizes["factor_batch"]), int(case.sizes["factor_nheads"])
        dtype = getattr(torch, str(problem.fields["dtype"]))
        return {
            name: TensorSpec.contiguous((batch, int(case.sizes[length]), nheads, width), dtype)
            for name, length in (("q_factor", "seqlen_q"), ("k_factor", "seqlen_k"))
        }

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
        """Packs the factors where needed and enqueues one run, as the launcher does."""
        sizes = sizes_of(inputs)
        tensors = {**inputs, **outputs}
        if scratch:
            ones_column = _ones_column(kernel, problem)
            tensors |= arguments.factors(inputs["q_bias"], inputs["k_bias"], ones_column, lambda name, _: scratch[name])
        if "mask" in inputs:
            tensors["mask"] = arguments.as_bytes(inputs["mask"], sizes)
        arguments.launch_kernel(kernel, compiled, tensors, sizes, softmax_scale(problem))

    def oracle(self, problem: Problem, inputs: Tensors) -> dict[str, Reference]:
        """Returns every output in fp64, and the same sums over absolute values."""
        call, dout = _call(problem, inputs), inputs["dout"]
        out, lse = reference.forward(*call, compute_dtype=torch.float64)
        gradients = reference.backward(dout, *call, out, lse, compute_dtype=torch.float64)
        sizes = reference.magnitudes(dout, *call, out, lse, compute_dtype=torch.float64)
        found = {"out": Reference(out, sizes[0]), "lse": Reference(lse), "delta": Reference(_delta(out, dout))}
        for name, value, size in zip(gradients._fields, gradients, sizes[1:], strict=True):
            if value is not None:
                found[name] = Reference(value, size)
        return found

    def ideal(self, problem: Problem, inputs: Tensors) -> Tensors:
        """Returns every output as the ideal 16-bit kernel gives it: P and dS rounded once, outputs rounded once."""
        call, dout = _call(problem, inputs), inputs["dout"]
        dtype = inputs["q"].dtype
        out, lse = reference.forward(*call, compute_dtype=torch.float32, round_to=dtype)
        gradients = reference.backward(
            dout, *call, out, lse, compute_dtype=torch.float32, round_to=dtype, recentre=True
        )
        found = {"out": out, "lse": lse, "delta": _delta(out.float(), dout.float())}
        found.update({name: value for name, value in gradients._asdict().items() if value is not None})
        return found

    def rule(self, output: str) -> Rule:
        """Returns LSE in nats, O at twice and gradients at three times the ideal's worst row."""
        if output == "lse":
            return Rule("log")
        return Rule("rows", 2.0 if output == "out" else 3.0)

    def floor_dtype(self, problem: Problem) -> torch.dtype:
        """Returns the inputs' dtype."""
        dtype: torch.dtype = getattr(torch, str(problem.fields["dtype"]))
        return dtype


def _ones_column(kernel: str, problem: Problem) -> bool:
    """Returns whether ``kernel`` is given a k_factor with a column of ones: both backward passes share one copy."""
    return kernel != "forward" and bool(problem.fields["ones_column"])


def _delta(out: Tensor, dout: Tensor) -> Tensor:
    """Returns rowsum(O ∘ dO) as (B, H, Sq)."""
    return (out * dout).sum(-1).transpose(1, 2)


def _call(problem: Problem, inputs: Tensors) -> _Call:
    """Returns the reference's arguments, factors expanded so that their gradients are those of every (batch, head)."""
    sizes = sizes_of(inputs)
    factors: list[Tensor | None] = [None, None]
    for index, name in enumerate(("q_bias", "k_bias")):
        if name in inputs:
            factor = inputs[name]
            factors[index] = factor.expand(sizes.batch, factor.shape[1], sizes.nheads, sizes.rank)
    scale = softmax_scale(problem)
    causal = bool(problem.fields["causal"])
    return inputs["q"], inputs["k"], inputs["v"], factors[0], factors[1], inputs.get("mask"), causal, scale


ATTENTION: Final = AttentionSpec()
