"""The compile matrix: which candidates of which problems exist for which architecture, and what became of each.

A candidate is compiled (:mod:`flashbias.bench.compiling`), or a rule of its space prunes it on that architecture.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Literal, Self

import torch
import triton

from autotune.device import DeviceInfo
from cache_db.models import Config, Environment, Scalar
from flashbias.kernels.problem import GRADIENTS, Shape, problem
from flashbias.kernels.spec import ATTENTION

Status = Literal["compiled", "pruned", "too_large", "failed"]
Key = tuple[str, str, str, str]

# Capability, multiprocessors and opt-in shared memory of a block of one GPU of each architecture (CUDA C++ Programming
# Guide, technical specifications by compute capability): A100, A10, L4, H200, B200, RTX 5090.
_GPUS: Final = {
    "sm_80": ((8, 0), 108, 166912),
    "sm_86": ((8, 6), 72, 101376),
    "sm_89": ((8, 9), 58, 101376),
    "sm_90": ((9, 0), 132, 232448),
    "sm_100": ((10, 0), 148, 232448),
    "sm_120": ((12, 0), 170, 101376),
    # MI300X. The operator computes with ``eager`` on AMD's GPUs, so what fails there is told and is no fault.
    "gfx942": ((0, 0), 304, 65536),
}
ARCHITECTURES: Final = tuple(_GPUS)
AMD: Final = "gfx942"
# Of a multiprocessor of compute capability 10. Past it Triton 3.6 makes a binary without products, and does not load it.
TENSOR_MEMORY_COLUMNS: Final = 512

_BASE: Final = Shape(
    batch=2, nheads=16, seqlen_q=4096, seqlen_k=4096, headdim=64, rank=8, dtype="bfloat16", grads=GRADIENTS[:5]
)
_CHANGES: Final[dict[str, dict[str, object]]] = {
    "D64": {},
    "D64 causal fp16": {"causal": True, "dtype": "float16"},
    "D64 few tiles": {"batch": 1, "nheads": 4, "seqlen_q": 1024, "seqlen_k": 1024, "causal": True},
    "D64 unaligned": {"layout": "strided"},
    "D64 no bias": {"rank": 0},
    "D64 R16": {"rank": 16},
    "D64 R96": {"rank": 96, "causal": True},
    "D64 fp32 factors": {"factor_dtype": "float32", "causal": True},
    "D64 GQA": {"nheads_kv": 4, "causal": True},
    "D64 window": {"window": (256, 0)},
    "D64 bool mask": {"mask": "bool"},
    "D64 mask gradient": {"mask": "float32", "grads": GRADIENTS},
    "D64 key mask gradient": {"mask": "bfloat16", "mask_dims": "keys", "grads": GRADIENTS, "nheads_kv": 4},
    "D64 varlen": {"varlen": True, "causal": True},
    "D32 causal fp16": {"headdim": 32, "rank": 2, "causal": True, "dtype": "float16"},
    "D96": {"headdim": 96},
    "D128": {"headdim": 128, "causal": True},
    "D128 GQA varlen R16": {"headdim": 128, "rank": 16, "nheads_kv": 4, "varlen": True},
    "D256": {"headdim": 256, "causal": True},
    "D128 1 query": {"headdim": 128, "seqlen_q": 1, "seqlen_k": 8192, "causal": "bottom_right", "nheads_kv": 4},
    "D64 64 queries": {"seqlen_q": 64, "seqlen_k": 8192, "rank": 16},
    "D64 fp32 ieee": {"dtype": "float32", "precision": "ieee", "causal": True},
    "D128 fp32 ieee": {"dtype": "float32", "precision": "ieee", "headdim": 128},
    "D32 fp32 tf32 R96": {"dtype": "float32", "precision": "tf32", "headdim": 32, "rank": 96},
    "D64 fp32 tf32": {"dtype": "float32", "precision": "tf32", "causal": True},
    "D128 fp32 tf32x3": {"dtype": "float32", "precision": "tf32x3", "headdim": 128},
    "D256 fp32 tf32": {"dtype": "float32", "precision": "tf32", "headdim": 256},
}
PROBLEMS: Final = {name: Shape(**{**_BASE.model_dump(), **changes}) for name, changes in _CHANGES.items()}


@dataclass(frozen=True)
class Row:
    """One candidate on one architecture, and what became of it.

    ``reason`` is the rule that prunes it or why it failed. ``figures`` are those of :func:`flashbias.bench.compiling.made`
    and the ``seconds`` that compiling took. ``final`` is false for what ended a process: it may be worth another try.
    """

    arch: str
    problem: str
    kernel: str
    config: Config
    status: Status = "pruned"
    reason: str = ""
    figures: dict[str, Scalar] = field(default_factory=dict)
    final: bool = True

    @property
    def key(self) -> Key:
        """What a row is known by."""
        return self.arch, self.problem, self.kernel, self.config.hash

    @property
    def fault(self) -> bool:
        """Whether the candidate neither compiles nor is pruned, where the kernels are meant to run."""
        return self.status == "failed" and self.arch != AMD

    @property
    def rule(self) -> str:
        """The reason without its numbers: what all rows of one rule have in common."""
        return re.sub(r"\d+(\.\d+)?", "#", self.reason)

    def to_json(self) -> dict[str, Any]:
        """Returns plain data that :meth:`from_json` turns back into an equal object."""
        return {**asdict(self), "config": self.config.model_dump()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Rebuilds what :meth:`to_json` wrote."""
        return cls(**{**data, "config": Config(**data["config"])})


def device(arch: str) -> DeviceInfo:
    """Returns the GPU that ``arch`` is compiled for, as far as compiling and the rules need it.

    AMD's has memory without end: what the rules know of shared memory is how NVIDIA's compiler uses it.
    """
    capability, sm_count, shared_memory = _GPUS[arch]
    return DeviceInfo(
        index=-1,
        name=arch,
        uuid="",
        capability=capability,
        sm_count=sm_count,
        shared_memory=shared_memory if arch != AMD else 1 << 30,
        mig_profile="",
        triton_version=triton.__version__,
        environment=Environment(driver="", ptxas="", torch=str(torch.__version__)),
    )


def rows(arch: str, name: str) -> Iterator[Row]:
    """Yields every candidate of every kernel of the problem ``name``, the default first; not pruned ones have no reason yet.

    Of split configs that differ in WAVES alone, which is one binary, the first stands for all.
    """
    target = device(arch)
    found = problem(PROBLEMS[name], target)
    for kernel in ATTENTION.kernels(found):
        seen = set()
        for config in (
            ATTENTION.default(kernel, found, target),
            *ATTENTION.candidates(kernel, found, target),
        ):
            code = config.variant, *((key, value) for key, value in config.params.items() if key != "WAVES")
            if code not in seen:
                seen.add(code)
                reason = ATTENTION.rejects(kernel, config, found, target) or ""
                yield Row(arch, name, kernel, config, "pruned", reason)


def split(all_rows: Iterable[Row]) -> tuple[list[Row], list[Row]]:
    """Returns the pruned rows and those left to compile."""
    pruned: list[Row] = []
    left: list[Row] = []
    for row in all_rows:
        (pruned if row.reason else left).append(row)
    return pruned, left


def fair(left: Sequence[Row], seed: int) -> list[Row]:
    """Returns ``left`` in an order of which any beginning is a fair sample.

    Architectures take turns, and on each of them every kernel of every problem has its turn before the first of them has
    its second. The order depends on ``seed`` alone.
    """
    draw = random.Random(seed)  # noqa: S311  # a sample that can be drawn again, no secret
    strata: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in left:
        strata[row.arch, row.problem, row.kernel].append(row)
    queues: dict[str, list[tuple[int, float, Row]]] = defaultdict(list)
    for (arch, *_), each in strata.items():
        draw.shuffle(each)
        queues[arch] += [(turn, draw.random(), row) for turn, row in enumerate(each)]
    ranked = [
        (place, arch, row)
        for arch, queue in queues.items()
        for place, (*_, row) in enumerate(sorted(queue, key=lambda item: item[:2]))
    ]
    return [row for *_, row in sorted(ranked, key=lambda item: item[:2])]


def judged(row: Row, reason: str, figures: dict[str, Scalar], *, final: bool = True) -> Row:
    """Returns ``row`` after its compile: failed with ``reason``, or compiled, and then too large for the GPU or not.

    Too large is no fault: how much the compiler adds to what the rules know is seen when it has compiled, by the tuner too.
    """
    if reason:
        return replace(row, status="failed", reason=reason, figures=figures, final=final)
    shared, columns = int(figures.get("shared", 0)), int(figures.get("tensor_memory", 0))
    if shared > _GPUS[row.arch][2]:
        reason = f"needs {shared} bytes of shared memory, the device has {_GPUS[row.arch][2]}"
    elif columns > TENSOR_MEMORY_COLUMNS:
        reason = f"needs {columns} columns of tensor memory, the device has {TENSOR_MEMORY_COLUMNS}"
    if reason:
        return replace(row, status="too_large", reason=reason, figures=figures)
    return replace(row, status="compiled", reason="", figures=figures)
