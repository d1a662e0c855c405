"""Attention as a KernelSpec: what the tuner must know to search, time and prove its kernels.

The gate compares one kernel's outputs at a time: ``out`` and ``lse`` of the forward, ``delta``, ``dq`` and
``dq_bias`` of one backward pass, ``dk``, ``dv`` and ``dk_bias`` of another, ``dmask`` of the last. Factor gradients
are those of every (batch, query head) in fp32; the launcher sums them over broadcast dims.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import torch

from autotune.device import DeviceInfo
from autotune.source import source_hash
from autotune.spec import Case, Floor, Reference, Rule, Tensors, TensorSpec
from cache_db.models import Config, Problem
from flashbias.implementations import rules
from flashbias.implementations.foreign import Foreign
from flashbias.kernels import answers, arguments, binding, cases, factors, ragged, sequences, space, splitting
from flashbias.kernels.answers import sizes_of, softmax_scale
from flashbias.kernels.binding import Binary
from flashbias.kernels.factors import Packing
from flashbias.kernels.precisions import floor_of
from flashbias.kernels.problem import SOFT_FIELDS, packing, wanted

_QUERY_GRADIENTS: Final = ("q", "q_bias")
_KEY_GRADIENTS: Final = ("k", "v", "k_bias")


CONSTANTS: Final = {**binding.CONSTANTS, **factors.CONSTANTS, **arguments.CONSTANTS, **sequences.CONSTANTS}


@functools.cache
def source() -> str:
    """Returns the hash of everything that decides what the kernels compute."""
    functions = [*arguments.FUNCTIONS.values(), *factors.FUNCTIONS, *splitting.FUNCTIONS.values()]
    functions += [*arguments.HOST_FUNCTIONS, *sequences.FUNCTIONS, *sequences.HOST_FUNCTIONS]
    return source_hash([*functions, *binding.HOST_FUNCTIONS, packing, space.padded], CONSTANTS)


class AttentionSpec:
    """Implements :class:`autotune.spec.KernelSpec` for the attention kernels."""

    every_kernel: Final = (*space.KERNELS, rules.BACKWARD)

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
        alone: dict[str, tuple[str, ...]] = {"forward": (), "backward_dq": ("forward",), rules.BACKWARD: ("forward",)}
        return alone.get(kernel, ("forward", "backward_dq"))

    def alternatives(self, problem: Problem) -> dict[str, tuple[str, ...]]:
        """Returns that the whole backward at once may stand for its passes, where a foreign implementation could do it."""
        passes = self.kernels(problem)[1:]
        return {rules.BACKWARD: passes} if passes and "backward_mask" not in passes else {}

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
        if kernel == rules.BACKWARD:
            passes = self.outputs("backward_dq", problem, case) | self.outputs("backward_dkdv", problem, case)
            return {name: buffer for name, buffer in passes.items() if name != "delta"}
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
        if config.implementation != space.IMPLEMENTATION:
            return {}  # a foreign one takes its own
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
        """Returns every config worth trying: what others have written, which is compiled, and ours of one pass each."""
        own = [] if kernel == rules.BACKWARD else space.candidates(problem, device)
        return [*rules.candidates(kernel, device), *own]

    def rejects(self, kernel: str, config: Config, problem: Problem, device: DeviceInfo) -> str | None:
        """Returns why ``config`` may not run here, or None."""
        if config.implementation in rules.FOREIGN:
            return rules.rejects(kernel, config, problem, device)
        return space.rejects(kernel, config, problem, device)

    def default(self, kernel: str, problem: Problem, device: DeviceInfo) -> Config:
        """Returns the conservative config."""
        return space.default(kernel, problem, device)

    def compile(self, kernel: str, config: Config, problem: Problem, device: DeviceInfo) -> Binary | Foreign:
        """Compiles without touching a GPU; raises what Triton raises, OSError for a foreign config of other versions."""
        if config.implementation in rules.FOREIGN:
            return rules.compiled(config, device)
        return arguments.compile_kernel(kernel, config, problem, device)

    def launch(
        self,
        kernel: str,
        compiled: Binary | Foreign,
        problem: Problem,
        inputs: Tensors,
        outputs: Tensors,
        scratch: Tensors,
    ) -> None:
        """Packs the factors where needed, enqueues one run, and gathers the gradients of split factors, as the launcher does."""
        if isinstance(compiled, Foreign):
            found = self._found(kernel, compiled, problem, inputs)
            for name, buffer in outputs.items():
                buffer.copy_(found[name])
            return
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

    def enqueue(
        self,
        kernel: str,
        compiled: Binary | Foreign,
        problem: Problem,
        inputs: Tensors,
        outputs: Tensors,
        scratch: Tensors,
    ) -> None:
        """Does what ``launch`` does for its time alone: what a foreign implementation finds stays where it has put it."""
        if isinstance(compiled, Foreign):
            self._found(kernel, compiled, problem, inputs)
        else:
            self.launch(kernel, compiled, problem, inputs, outputs, scratch)

    def _found(self, kernel: str, compiled: Foreign, problem: Problem, inputs: Tensors) -> Tensors:
        """Returns what a foreign implementation makes of ``inputs``, in memory of its own, as the launcher hands it on."""
        q, k, v = (inputs[name] for name in ("q", "k", "v"))
        q_bias, k_bias = inputs.get("q_bias"), inputs.get("k_bias")
        band, scale = sizes_of(problem, inputs).band, softmax_scale(problem)
        if kernel == rules.FORWARD:
            out, lse = compiled.forward(q, k, v, q_bias, k_bias, band, scale)
            return {"out": out, "lse": lse}
        call = (q, k, v, q_bias, k_bias, inputs["out"], inputs["lse"], band, scale, inputs.get("dlse"))
        return compiled.backward(inputs["dout"], *call)

    def oracle(self, problem: Problem, inputs: Tensors) -> dict[str, Reference]:
        """Returns every output in fp64, and the same sums over absolute values."""
        return answers.oracle(problem, inputs)

    def ideal(self, problem: Problem, inputs: Tensors) -> Tensors:
        """Returns every output as the ideal kernel gives it: products' operands rounded once, outputs rounded once."""
        return answers.ideal(problem, inputs)

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


def _packing(kernel: str, problem: Problem, rank: int) -> Packing:
    """Returns how ``kernel`` is given its factors; every pass of the backward shares one packing."""
    fields = problem.fields
    split = fields["factor_dtype"] != fields["dtype"]
    return Packing(str(fields["dtype"]), rank, split, kernel != "forward" and bool(fields["ones_column"]))


ATTENTION: Final = AttentionSpec()
