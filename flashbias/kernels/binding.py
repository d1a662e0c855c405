"""From a kernel function to a launchable binary, with nothing left to the JIT's own specialisation.

Triton's JIT specialises on the alignment of every pointer and stride it happens to see, so the binary that
is launched need not be the one that was proven. Here the signature and its alignment attributes follow from
the problem alone (``layout``), which makes a compiled kernel a function of (problem, config, architecture).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import _allocation

from autotune import interpreter, occupancy
from cache_db.models import Scalar

if TYPE_CHECKING:
    from flashbias.kernels.splitting import Split

_SCALARS: Final[Mapping[str, Any]] = {
    "batches": "i32",
    "positions": "i32",
    "columns": "i32",
    "nheads": "i32",
    "group": "i32",
    "factor_group": "i32",
    "mask_batches": "i32",
    "mask_nheads": "i32",
    "seqlen_q": "i32",
    "seqlen_k": "i32",
    "low": "i32",
    "high": "i32",
    "sequence_facts": ("i32", "i32"),
    "has_dlse": "i32",
    "factor_columns": "i32",
    "rank": "i32",
    "splits": "i32",
    "q_nheads": "i32",
    "k_nheads": "i32",
    "q_rows": "i64",
    "k_rows": "i64",
    "scale": "fp32",
}
_ELEMENT = {
    "float16": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "float64": "fp64",
    "int32": "i32",
    "bool": "u8",
    "none": "u8",
}
_NO_BITS: Final = 8  # ELF's section type for memory that the file does not hold
# These are read through all four strides; of the others the last is 1.
_ANY_STRIDES = frozenset({"mask_strides", "dmask_strides", "q_bias_strides", "k_bias_strides"})
_FP32_POINTERS = frozenset({"lse_ptr", "dlse_ptr", "delta_ptr", "dq_bias_ptr", "dk_bias_ptr"})
_SCRATCH = "partial_"  # what splits found: fp32 as well
# Row values and factor gradients have rows of any length, masks any strides: neither is promised to be aligned.
_UNALIGNED = frozenset(
    {"mask_ptr", "mask_strides", "dmask_ptr", "dmask_strides", "dlse_ptr", "dq_bias_strides", "dk_bias_strides"}
    | {"cu_seqlens_q_ptr", "cu_seqlens_k_ptr"}
)

if triton.knobs.runtime.interpret:
    interpreter.hasten()


@dataclass(frozen=True)
class Binary:
    """A compiled kernel. ``binary`` is the SHA-256 of its machine code, "" in the interpreter.

    ``facts`` are the figures that its compiler knows. ``split`` says how a kernel that splits keys does, and ``combine``
    is what merges its splits.
    """

    function: Any
    compiled: Any
    constants: Mapping[str, Any]
    arguments: tuple[str, ...]
    binary: str
    facts: Mapping[str, Scalar] = field(default_factory=dict)
    split: Split | None = None
    combine: Binary | None = None

    @property
    def stats(self) -> Mapping[str, Scalar]:
        """The figures known by now, without those of ``combine``: once it is loaded also registers, spills, occupancy."""
        return {**self.facts, **occupancy.figures(self.compiled)}

    @property
    def assembly(self) -> Mapping[str, str | bytes]:
        """What the compiler made, from Triton's IR to machine code, by suffix; none in the interpreter."""
        own = {} if self.compiled is None else dict(self.compiled.asm)
        combine = {} if self.combine is None else self.combine.assembly
        return own | {f"combine.{suffix}": made for suffix, made in combine.items()}

    def load(self) -> Binary:
        """Loads the machine code onto the current device, and Triton's C launcher with it; raises what that raises."""
        if self.compiled is not None:
            _ = self.compiled.run
        if self.combine is not None:
            self.combine.load()
        return self


def signature_of(function: Any, dtypes: Mapping[str, str]) -> dict[str, Any]:
    """Returns Triton's signature of a kernel of this package; ``dtypes`` names those of its pointers, "" of all others."""
    signature: dict[str, Any] = {}
    for name in function.arg_names:
        if name.endswith("_ptr"):
            single = name in _FP32_POINTERS or name.startswith(_SCRATCH)
            dtype = "float32" if single else dtypes.get(name, dtypes[""])
            signature[name] = "*" + _ELEMENT[dtype]
        elif name.endswith("_strides"):
            signature[name] = ("i64",) * (4 if name in _ANY_STRIDES else 3)
        else:
            signature[name] = _SCALARS.get(name, "constexpr")
    return signature


def attributes_of(function: Any, aligned: bool, step: int = 8) -> dict[tuple[int, ...], list[list[Any]]]:
    """Returns the alignment facts of the layout class: 16-byte pointers, strides of whole 16-byte steps (``step`` elements)."""
    facts: dict[tuple[int, ...], list[list[Any]]] = {}
    if not aligned:
        return facts
    for index, name in enumerate(function.arg_names):
        if name in _UNALIGNED:
            continue
        if name.endswith("_ptr"):
            facts[(index,)] = [["tt.divisibility", 16]]
        elif name.endswith("_strides"):
            facts.update({(index, axis): [["tt.divisibility", step]] for axis in range(3)})
        elif name == "factor_columns":
            facts[(index,)] = [["tt.divisibility", 8]]
    return facts


def compile_binary(
    function: Any,
    *,
    dtypes: Mapping[str, str],
    aligned: bool,
    constants: Mapping[str, Any],
    options: Mapping[str, int],
    capability: tuple[int, int],
) -> Binary:
    """Compiles ``function`` for an NVIDIA architecture without needing a GPU; in the interpreter only wraps it.

    Every argument that ``constants`` names is part of the code: one that a problem does not have is None there.
    Raises what Triton raises: CompilationError, OutOfResources, PTXASError, RuntimeError.
    """
    arguments = tuple(name for name in function.arg_names if name not in constants)
    if triton.knobs.runtime.interpret:
        return Binary(function, None, dict(constants), arguments, "")
    absent = {index for index, name in enumerate(function.arg_names) if name in constants}
    attributes = attributes_of(function, aligned, 4 if dtypes[""] == "float32" else 8)
    source = ASTSource(
        fn=function,
        signature=signature_of(function, dtypes) | dict.fromkeys(constants, "constexpr"),
        constexprs=dict(constants),
        attrs={place: fact for place, fact in attributes.items() if place[0] not in absent},
    )
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    # What was measured was compiled with multiply-adds fused; from 3.10 on Triton fuses only when told to.
    compiled = triton.compile(source, target=target, options={**options, "enable_fp_fusion": True})
    binary = hashlib.sha256(machine_code(compiled.asm["cubin"])).hexdigest()
    stats = {"shared": compiled.metadata.shared, "num_warps": compiled.metadata.num_warps}
    return Binary(function, compiled, dict(constants), arguments, binary, stats)


def machine_code(cubin: bytes) -> bytes:
    """Returns the parts of an ELF cubin that run: code, constants, shared memory and launch facts.

    The rest holds line numbers and file names, which differ between two installations of the same source.
    """
    table, (entry_size, entries, names_index) = (
        *struct.unpack_from("<Q", cubin, 40),
        struct.unpack_from("<HHH", cubin, 58),
    )
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + entry_size * index) for index in range(entries)]
    names_at = headers[names_index][4]
    parts = []
    for name_at, kind, _, _, offset, size in headers:
        start = names_at + name_at
        name = cubin[start : cubin.index(b"\0", start)]
        if name.startswith((b".text", b".nv.constant", b".nv.shared", b".nv.info")):
            parts += [name, b"" if kind == _NO_BITS else cubin[offset : offset + size]]
    return b"\0".join(parts)


def _scratch(size: int, _alignment: int, _stream: int | None) -> torch.Tensor:
    """Returns work space; PyTorch frees it in stream order, after the launch that uses it."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


@contextmanager
def _scratch_allocator() -> Iterator[None]:
    """Lends kernels that make descriptors their work space, and gives the caller's allocator back.

    ``triton.set_allocator`` sets a context variable, which autograd's backward thread does not inherit, so this
    stands round each launch. Triton has no call to read the allocator back.
    """
    token = _allocation._allocator.set(_scratch)  # type: ignore[arg-type]  # noqa: SLF001
    try:
        yield
    finally:
        _allocation._allocator.reset(token)  # noqa: SLF001


def launch_binary(binary: Binary, programs: int, arguments: Mapping[str, Any], splits: int = 1) -> None:
    """Enqueues ``programs`` programs, each once for every split, on the current stream of the current device.

    ``arguments`` holds a value for each run-time argument: tensors for pointers, int tuples for strides.
    """
    if programs == 0:
        return
    if binary.compiled is None:
        # A GPU has no floating-point warnings either: rows past the end may overflow before they are clipped.
        with np.errstate(all="ignore"):
            binary.function[(programs, splits)](
                **{name: arguments[name] for name in binary.arguments}, **binary.constants
            )
        return
    constants = binary.constants
    values: Sequence[Any] = [
        constants[name] if name in constants else arguments[name] for name in binary.function.arg_names
    ]
    launch = binary.compiled[(programs, splits, 1)]
    if binary.compiled.metadata.global_scratch_size:
        with _scratch_allocator():
            launch(*values)
    else:
        launch(*values)


# What, beside the kernels, decides which binary is made and what it is given: part of the source hash.
HOST_FUNCTIONS: Final[tuple[Any, ...]] = (signature_of, attributes_of, compile_binary, launch_binary)
CONSTANTS: Final[Mapping[str, object]] = {
    "scalars": _SCALARS,
    "any strides": sorted(_ANY_STRIDES),
    "fp32 pointers": sorted(_FP32_POINTERS),
    "scratch": _SCRATCH,
    "unaligned": sorted(_UNALIGNED),
}
