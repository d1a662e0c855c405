"""A small foreign operation for autotune's tests: a row softmax and its gradient as a KernelSpec.

It knows nothing of attention. ``config.params["fault"]`` plants one of ``FAULTS`` into a kernel, so a test can ask
for a kernel that is wrong, writes where it must not, crashes or hangs. It runs interpreted and on a GPU.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.errors import OutOfResources

from autotune.device import DeviceInfo, describe
from autotune.spec import Case, Reference, Rule, Tensors, TensorSpec
from cache_db.models import Config, Problem, Scalar

FAULTS = {
    "zeroed_row": 1,
    "foreign_row": 2,
    "past_end": 3,
    "unwritten_tail": 4,
    "overflows": 5,
    "modifies_input": 6,
    "lse_off": 7,
    "racy": 8,
    "raises_at_compile": 0,
    "aborts_at_compile": 0,
    "hangs_at_compile": 0,
    "aborts_at_launch": 0,
    "hangs_at_launch": 0,
    "raises_at_launch": 0,
    "reads_scratch": 9,
    "illegal_access": 10,
    "killed_at_launch": 0,
    "races_late": 11,
    "races_at_scale": 12,
    "wrong_for_some": 13,
    "out_of_resources": 0,
    "out_of_memory": 0,
    "crashes_once": 0,
}
POINTERS = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}
ELEMENTS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
JUDGED_ROWS = (7, 5, 4)
UNJUDGEABLE_SEED = 666
# The first number of the judged rows is below it for seeds 0 and 1, and above it for the next.
LUCKY = tl.constexpr(-1.1)
_launches = itertools.count()


@triton.jit
def softmax_kernel(x_ptr, y_ptr, lse_ptr, scratch_ptr, rows, columns, tick, BLOCK: tl.constexpr, FAULT: tl.constexpr):
    """One program computes y = softmax(x) and LSE of one row."""
    row = tl.program_id(0).to(tl.int64)
    source = row
    if FAULT == 2:
        source = (row + rows // 2) % rows
    offsets = tl.arange(0, BLOCK)
    # A scalar condition beside a tensor of them is no mask in Triton 3.9's interpreter.
    mask = (offsets < columns) & (source + 0 * offsets < rows)
    x = tl.load(x_ptr + source * columns + offsets, mask=mask, other=float("-inf")).to(tl.float32)
    top = tl.max(x, 0)
    if FAULT == 5:
        top = top * 0
    base = tl.where(top == float("-inf"), 0.0, top)
    exponentials = tl.exp(x - base)
    total = tl.sum(exponentials, 0)
    lse = base + tl.log(total)
    y = exponentials / tl.where(total == 0.0, 1.0, total)
    if FAULT == 1:
        y = y * (row != 3)
    if FAULT == 6:
        tl.store(x_ptr + row * columns, 0.0, mask=row < rows)
    if FAULT == 7:
        lse = lse * 1.03
    if FAULT == 8:
        y = y * (1 + tick % 2)
    if FAULT >= 11:  # 11, 12: not in the judged cases, whose rows are few; 12 in the representative one alone
        late = (tick % 2 == 1) & (rows > 7) & ((FAULT == 11) | (rows % 8 == 0))
        unlucky = (rows == 7) & (tl.load(x_ptr).to(tl.float32) > LUCKY)
        y = y * (1 + tl.where(FAULT == 13, unlucky, late))
    if FAULT == 9:
        y = y + tl.load(scratch_ptr + row)
    if FAULT == 10:
        y_ptr += 1 << 40
    stored = mask
    if FAULT == 3:
        stored = offsets < columns
    if FAULT == 4:
        stored = mask & (offsets < columns - 1)
    # Below 0 it is no fault, but another binary: what scratch holds means nothing.
    tl.store(scratch_ptr + row, lse + (FAULT < 0) * FAULT, mask=row < rows)
    tl.store(y_ptr + row * columns + offsets, y.to(y_ptr.dtype.element_ty), mask=stored)
    tl.store(lse_ptr + row, lse, mask=row < rows)


@triton.jit
def gradient_kernel(dy_ptr, y_ptr, dx_ptr, rows, columns, tick, BLOCK: tl.constexpr, FAULT: tl.constexpr):
    """One program computes dx = y (dy - sum(dy y)) of one row."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    mask = (offsets < columns) & (row + 0 * offsets < rows)
    y = tl.load(y_ptr + row * columns + offsets, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * columns + offsets, mask=mask, other=0.0).to(tl.float32)
    dx = y * (dy - tl.sum(dy * y, 0))
    if FAULT == 1:
        dx = dx * (row != 3)
    if FAULT == 6:
        tl.store(y_ptr + row * columns, 0.0, mask=row < rows)
    if FAULT == 8:
        dx = dx * (1 + tick % 2)
    if FAULT == 11:
        dx = dx * (1 + tick % 2 * (rows > 7))
    tl.store(dx_ptr + row * columns + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def spin_kernel(flag_ptr):
    """One program that waits for a flag nobody raises."""
    while tl.load(flag_ptr, volatile=True) == 0:
        tl.debug_barrier()


@dataclass(frozen=True)
class Ready:
    """A kernel with its config, compiled (``kernel``) or to be interpreted (None)."""

    block: int
    fault: str
    binary: str = ""
    stats: Mapping[str, Scalar] = field(default_factory=dict)
    kernel: Any = None


def softmax_problem(device: DeviceInfo | None = None, *, columns: int = 19, dtype: str = "float32") -> Problem:
    """Returns the problem of rows of up to ``columns`` elements on ``device`` (the interpreter by default)."""
    device = device or describe(-1)
    return Problem(
        spec=f"{__name__}:SOFTMAX",
        gpu_name=device.name,
        capability=".".join(map(str, device.capability)),
        sm_count=device.sm_count,
        mig_profile=device.mig_profile,
        triton_version=device.triton_version,
        source_hash="softmax-1",
        layout="aligned",
        fields={"columns": columns, "dtype": dtype},
    )


def softmax_config(block: int = 32, fault: str = "", **params: Scalar) -> Config:
    """Returns the config that runs with ``block`` columns at a time and plants ``fault``."""
    planted = {"fault": fault} if fault else {}
    return Config(implementation="triton", variant="rows", params={"block": block, **planted, **params})


class SoftmaxSpec:
    """``forward``: x -> y, lse; ``backward``: dy and forward's y -> dx."""

    def kernels(self, problem: Problem) -> tuple[str, ...]:
        """Returns both kernels in running order."""
        return ("forward", "backward")

    def depends_on(self, kernel: str, problem: Problem) -> tuple[str, ...]:
        """Returns that the backward reads the forward's y."""
        return ("forward",) if kernel == "backward" else ()

    def soft_fields(self) -> frozenset[str]:
        """Returns that rows of another length are neighbours."""
        return frozenset({"columns"})

    def representative(self, problem: Problem, device: DeviceInfo) -> Case:
        """Returns many rows on a GPU, few in the interpreter."""
        return self._case("representative", problem, rows=8 if device.interpreted else 32768)

    def cases(self, problem: Problem, device: DeviceInfo) -> Sequence[Case]:
        """Returns odd rows, then logits whose exponential overflows, then a row without any finite logit."""
        return (
            self._case("ragged", problem, rows=JUDGED_ROWS[0]),
            self._case("large", problem, rows=JUDGED_ROWS[1], scale=60.0),
            self._case("dead row", problem, rows=JUDGED_ROWS[2], dead=True),
        )

    def race_case(self, problem: Problem, device: DeviceInfo) -> Case:
        """Returns a few rows for each multiprocessor."""
        return self._case("race", problem, rows=9 if device.interpreted else 4 * device.sm_count + 1)

    def inputs(self, problem: Problem, case: Case, seed: int, device: torch.device) -> Tensors:
        """Returns x and dy, drawn on the CPU so that every device sees the same bits."""
        if seed == UNJUDGEABLE_SEED:
            raise ArithmeticError("planted: no oracle for this seed")
        generator = torch.Generator().manual_seed(seed)
        shape, dtype = self._shape(case), self.floor_dtype(problem)
        x = torch.randn(shape, generator=generator) * float(case.sizes["scale"])
        if case.sizes["dead"]:
            x[1] = float("-inf")
        dy = torch.randn(shape, generator=generator)
        return {"x": x.to(device, dtype), "dy": dy.to(device, dtype)}

    def outputs(self, kernel: str, problem: Problem, case: Case) -> dict[str, TensorSpec]:
        """Returns y and lse, or dx."""
        full = TensorSpec.contiguous(self._shape(case), self.floor_dtype(problem))
        if kernel == "backward":
            return {"dx": full}
        return {"y": full, "lse": TensorSpec.contiguous(self._shape(case)[:1], torch.float32)}

    def scratch(self, kernel: str, problem: Problem, config: Config, case: Case) -> dict[str, TensorSpec]:
        """Returns one fp32 a row for the forward."""
        if kernel == "backward":
            return {}
        return {"scratch": TensorSpec.contiguous(self._shape(case)[:1], torch.float32)}

    def candidates(self, kernel: str, problem: Problem, device: DeviceInfo) -> Sequence[Config]:
        """Returns three block sizes; a block shorter than the row is there to be rejected."""
        smallest = triton.next_power_of_2(int(problem.fields["columns"]))
        return tuple(softmax_config(block) for block in (smallest, 2 * smallest, max(smallest // 2, 1)))

    def rejects(self, kernel: str, config: Config, problem: Problem, device: DeviceInfo) -> str | None:
        """Returns that a block must hold a row."""
        columns, block = problem.fields["columns"], config.params.get("block")
        if not isinstance(block, int) or block < int(columns):
            return f"block {block} does not hold a row of {columns}"
        return None

    def default(self, kernel: str, problem: Problem, device: DeviceInfo) -> Config:
        """Returns the smallest block that holds a row."""
        return self.candidates(kernel, problem, device)[0]

    def compile(self, kernel: str, config: Config, problem: Problem, device: DeviceInfo) -> Ready:
        """Compiles for ``device``, or does nothing in the interpreter; plants the faults of compile time."""
        block, fault = int(config.params["block"]), str(config.params.get("fault", ""))
        number = int(config.params.get("number", 0))  # makes another binary that does the same
        if fault == "raises_at_compile":
            raise ValueError("planted: this config does not compile\nand says so at length")
        if fault == "aborts_at_compile":
            os.abort()
        if fault == "hangs_at_compile":
            time.sleep(3600)
        if device.interpreted:
            return Ready(block, fault)
        function = gradient_kernel if kernel == "backward" else softmax_kernel
        if fault == "hangs_at_launch":
            function, signature, constants = spin_kernel, {"flag_ptr": "*i32"}, {}
        else:
            signature, constants = self._signature(function, problem, block, FAULTS.get(fault, 0) or -number)
        source = ASTSource(function, signature, constants)
        target = GPUTarget("cuda", 10 * device.capability[0] + device.capability[1], 32)
        compiled = triton.compile(source, target=target, options={"num_warps": int(config.params.get("warps", 4))})
        binary = hashlib.sha256(compiled.asm["cubin"]).hexdigest()
        return Ready(block, fault, binary, {"shared": compiled.metadata.shared}, compiled)

    def launch(
        self, kernel: str, compiled: Ready, problem: Problem, inputs: Tensors, outputs: Tensors, scratch: Tensors
    ) -> None:
        """Enqueues one run; plants the faults of run time."""
        self._misbehave(compiled, inputs)
        tick, fault = next(_launches), FAULTS.get(compiled.fault, 0)
        rows, columns = inputs["x"].shape
        grid = (rows + (compiled.fault == "past_end"), 1, 1)
        if kernel == "backward":
            arguments = (inputs["dy"], inputs["y"], outputs["dx"], rows, columns, tick)
            function = gradient_kernel
        else:
            arguments = (inputs["x"], outputs["y"], outputs["lse"], scratch["scratch"], rows, columns, tick)
            function = softmax_kernel
        (compiled.kernel or function)[grid](*arguments, compiled.block, fault)

    def oracle(self, problem: Problem, inputs: Tensors) -> dict[str, Reference]:
        """Returns y, lse and dx in fp64."""
        x, dy = inputs["x"].double(), inputs["dy"].double()
        y = torch.softmax(x, -1).nan_to_num(0.0)
        total = (dy * y).sum(-1, keepdim=True)
        magnitude = y * (dy.abs() + (dy * y).abs().sum(-1, keepdim=True))
        lse = Reference(torch.logsumexp(x, -1))
        return {"y": Reference(y, y), "lse": lse, "dx": Reference(y * (dy - total), magnitude)}

    def ideal(self, problem: Problem, inputs: Tensors) -> Tensors:
        """Returns y, lse and dx in fp32 arithmetic, y rounded once where it leaves the kernel."""
        dtype = self.floor_dtype(problem)
        x, dy = inputs["x"].float(), inputs["dy"].float()
        y = torch.softmax(x, -1).nan_to_num(0.0).to(dtype)
        rounded = y.float()
        dx = rounded * (dy - (dy * rounded).sum(-1, keepdim=True))
        return {"y": y, "lse": torch.logsumexp(x, -1), "dx": dx.to(dtype)}

    def rule(self, output: str) -> Rule:
        """Returns nats for lse, rows for the others."""
        return Rule("log") if output == "lse" else Rule("rows", 3.0 if output == "dx" else 2.0)

    def floor_dtype(self, problem: Problem) -> torch.dtype:
        """Returns the element type of x, y and their gradients."""
        return ELEMENTS[str(problem.fields["dtype"])]

    @staticmethod
    def _case(name: str, problem: Problem, *, rows: int, scale: float = 1.0, dead: bool = False) -> Case:
        columns = int(problem.fields["columns"])
        return Case(name, {"rows": rows, "columns": columns, "scale": scale, "dead": dead})

    @staticmethod
    def _shape(case: Case) -> tuple[int, int]:
        return int(case.sizes["rows"]), int(case.sizes["columns"])

    @staticmethod
    def _misbehave(compiled: Ready, inputs: Tensors) -> None:
        if compiled.fault == "aborts_at_launch":
            os.abort()
        if compiled.fault == "killed_at_launch":
            os.kill(os.getpid(), 9)
        if compiled.fault == "raises_at_launch":
            raise RuntimeError("planted: this config does not launch")
        if compiled.fault == "out_of_resources":
            raise OutOfResources(300000, 232448, "shared memory")
        if compiled.fault == "out_of_memory":
            raise torch.OutOfMemoryError("planted: no memory left")
        if compiled.fault == "crashes_once":
            marker = Path(os.environ["SOFTMAX_MARKER"])
            if not marker.exists():
                marker.touch()
                os.abort()
        if compiled.fault == "hangs_at_launch":
            flag = torch.zeros(1, dtype=torch.int32, device=inputs["x"].device)
            (compiled.kernel or spin_kernel)[(1, 1, 1)](flag)

    @staticmethod
    def _signature(function: Any, problem: Problem, block: int, fault: int) -> tuple[dict[str, str], dict[str, Scalar]]:
        constants: dict[str, Scalar] = {"BLOCK": block, "FAULT": fault}
        element = POINTERS[str(problem.fields["dtype"])]
        fixed = {"lse_ptr": "*fp32", "scratch_ptr": "*fp32", "BLOCK": "constexpr", "FAULT": "constexpr"}
        kinds = {name: fixed.get(name, element if name.endswith("_ptr") else "i32") for name in function.arg_names}
        return kinds, constants


SOFTMAX = SoftmaxSpec()
