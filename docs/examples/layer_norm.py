"""A foreign kernel, tuned and proven: layer normalisation and its gradient, with `autotune` alone.

    python docs/examples/layer_norm.py                      # on a GPU
    TRITON_INTERPRET=1 python docs/examples/layer_norm.py   # without one: slow, and its times are no speeds

The first run sweeps, proves and stores; the next one launches what was stored. `docs/foreign-kernels.md` explains it.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from autotune import DeviceInfo, Settings, resolve
from autotune.device import describe
from autotune.occupancy import figures
from autotune.source import source_hash
from autotune.spec import Case, Reference, Rule, Tensors, TensorSpec
from cache_db.models import Config, Problem, Scalar

EPSILON = 1e-5
DTYPES = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}


# --- The kernels: one program normalises ROWS rows. ----------------------------------------------------------------


@triton.jit
def forward(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    rows,
    columns,
    epsilon,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Computes y = (x - mean) rstd weight + bias."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    place = row.to(tl.int64)[:, None] * columns + column[None, :]
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1) / columns
    centred = tl.where(inside, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / columns + epsilon)
    weight = tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    y = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit
def backward(
    dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, rows, columns, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """Computes dx = rstd (g - mean(g) - z mean(g z)) with g = dy weight and z = (x - mean) rstd."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    place = row.to(tl.int64)[:, None] * columns + column[None, :]
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + place, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)
    rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
    z = tl.where(inside, (x - mean[:, None]) * rstd[:, None], 0.0)
    g = dy * weight[None, :]
    dx = (g - (tl.sum(g, 1) / columns)[:, None] - z * (tl.sum(g * z, 1) / columns)[:, None]) * rstd[:, None]
    tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=inside)


KERNELS = {"forward": forward, "backward": backward}


# --- What autotune has to be told. ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ready:
    """A kernel ready to launch; ``run`` is what enqueues it."""

    run: _Bound
    rows: int
    binary: str = ""

    @property
    def stats(self) -> dict[str, Scalar]:
        """Figures that are stored with each trial: shared memory, and once it runs registers, spills and occupancy."""
        return figures(self.run.kernel)

    @property
    def assembly(self) -> dict[str, str | bytes]:
        """What `flashbias ptx` saves: Triton's IR, PTX and machine code; nothing in the interpreter."""
        return dict(getattr(self.run.kernel, "asm", {}))


class LayerNorm:
    """Implements `autotune.spec.KernelSpec`."""

    def kernels(self, problem: Problem) -> tuple[str, ...]:
        """Both, in the order they run."""
        return ("forward", "backward")

    def depends_on(self, kernel: str, problem: Problem) -> tuple[str, ...]:
        """The gradient reads mean and rstd, so it is proven through the very forward it will run with."""
        return ("forward",) if kernel == "backward" else ()

    def soft_fields(self) -> frozenset[str]:
        """A neighbour with longer or shorter rows may lend its config."""
        return frozenset({"columns"})

    def representative(self, problem: Problem, device: DeviceInfo) -> Case:
        """The sizes that are timed."""
        return Case("representative", {"rows": 16 if device.interpreted else 16384, "shift": 0.0})

    def cases(self, problem: Problem, device: DeviceInfo) -> Sequence[Case]:
        """The sizes that are proven: a ragged number of rows, one row, and rows far from zero."""
        return (
            Case("ragged", {"rows": 37, "shift": 0.0}),
            Case("one row", {"rows": 1, "shift": 0.0}),
            Case("far from zero", {"rows": 19, "shift": 8.0}),
        )

    def race_case(self, problem: Problem, device: DeviceInfo) -> Case:
        """A few programs for each multiprocessor."""
        return Case("race", {"rows": 16 if device.interpreted else 16 * device.sm_count + 1, "shift": 0.0})

    def inputs(self, problem: Problem, case: Case, seed: int, device: torch.device) -> Tensors:
        """x, dy (rows, columns), weight and bias (columns), the same for the same seed."""
        generator = torch.Generator(device).manual_seed(seed)
        columns, dtype = int(problem.fields["columns"]), self.floor_dtype(problem)

        def normal(*shape: int, around: float = 0.0) -> Tensor:
            return (torch.randn(shape, generator=generator, device=device) + around).to(dtype)

        full = (int(case.sizes["rows"]), columns)
        x, dy = normal(*full, around=float(case.sizes["shift"])), normal(*full)
        return {"x": x, "dy": dy, "weight": normal(columns, around=1.0), "bias": normal(columns)}

    def outputs(self, kernel: str, problem: Problem, case: Case) -> dict[str, TensorSpec]:
        """y, mean and rstd, or dx. autotune allocates them, poisons them and guards their borders."""
        rows, columns, dtype = int(case.sizes["rows"]), int(problem.fields["columns"]), self.floor_dtype(problem)
        full, one = TensorSpec.contiguous((rows, columns), dtype), TensorSpec.contiguous((rows, 1), torch.float32)
        return {"dx": full} if kernel == "backward" else {"y": full, "mean": one, "rstd": one}

    def scratch(self, kernel: str, problem: Problem, config: Config, case: Case) -> dict[str, TensorSpec]:
        """No work space."""
        return {}

    def candidates(self, kernel: str, problem: Problem, device: DeviceInfo) -> Sequence[Config]:
        """Rows a program, and warps."""
        return [_config(rows, warps) for rows in (1, 2, 4, 8, 16) for warps in (1, 2, 4, 8)]

    def rejects(self, kernel: str, config: Config, problem: Problem, device: DeviceInfo) -> str | None:
        """Every rule says why; stored rows have to pass it too."""
        rows, warps = config.params.get("ROWS"), config.params.get("num_warps")
        if (
            not isinstance(rows, int)
            or not isinstance(warps, int)
            or (config.variant, len(config.params)) != ("rows", 2)
        ):
            return "params must be ROWS and num_warps"
        values = rows * triton.next_power_of_2(int(problem.fields["columns"])) // (32 * warps)
        return f"{values} values a thread would spill (limit 128)" if values > 128 else None

    def default(self, kernel: str, problem: Problem, device: DeviceInfo) -> Config:
        """What runs when nothing could be tuned and a quick proof passes."""
        return _config(1, 8)

    def compile(self, kernel: str, config: Config, problem: Problem, device: DeviceInfo) -> Ready:
        """Compiles without a GPU, so that all candidates can be compiled at once."""
        function, rows, columns = KERNELS[kernel], int(config.params["ROWS"]), int(problem.fields["columns"])
        constants = {"ROWS": rows, "WIDTH": triton.next_power_of_2(columns)}
        if device.interpreted:
            return Ready(_Bound(function, constants), rows)
        types = {"rows": "i32", "columns": "i32", "epsilon": "fp32", "ROWS": "constexpr", "WIDTH": "constexpr"}
        pointer = DTYPES[str(problem.fields["dtype"])]
        types |= {name: pointer for name in function.arg_names if name.endswith("_ptr")}
        types |= {"mean_ptr": "*fp32", "rstd_ptr": "*fp32"}
        source = ASTSource(function, {name: types[name] for name in function.arg_names}, constants)
        target = GPUTarget("cuda", 10 * device.capability[0] + device.capability[1], 32)
        compiled = triton.compile(source, target=target, options={"num_warps": int(config.params["num_warps"])})
        binary = hashlib.sha256(compiled.asm["cubin"]).hexdigest()
        return Ready(_Bound(compiled, constants), rows, binary)

    def launch(
        self, kernel: str, compiled: Ready, problem: Problem, inputs: Tensors, outputs: Tensors, scratch: Tensors
    ) -> None:
        """Enqueues one run. The gate and the user both come through here."""
        given = {**inputs, **outputs}
        rows, columns = given["x"].shape
        names = [name.removesuffix("_ptr") for name in KERNELS[kernel].arg_names if name.endswith("_ptr")]
        sizes = (rows, columns, EPSILON) if kernel == "forward" else (rows, columns)
        compiled.run(-(-rows // compiled.rows), *(given[name] for name in names), *sizes)

    def oracle(self, problem: Problem, inputs: Tensors) -> dict[str, Reference]:
        """All outputs in fp64."""
        return {name: Reference(value) for name, value in _reference(inputs, torch.float64).items()}

    def ideal(self, problem: Problem, inputs: Tensors) -> Tensors:
        """The best a kernel could do: fp32 arithmetic, each result rounded once. The yardstick of errors."""
        dtype, found = self.floor_dtype(problem), _reference(inputs, torch.float32)
        return {name: value.to(dtype) if name in ("y", "dx") else value for name, value in found.items()}

    def rule(self, output: str) -> Rule:
        """Every row of every output within twice the ideal's worst row."""
        return Rule("rows", 2.0)

    def floor_dtype(self, problem: Problem) -> torch.dtype:
        """Budgets start from the rounding of the results' dtype."""
        found: torch.dtype = getattr(torch, str(problem.fields["dtype"]))
        return found


class _Bound:
    """A kernel with its constants: what Triton's compiled kernels and its interpreter both want last."""

    def __init__(self, kernel: Any, constants: dict[str, int]) -> None:
        self.kernel, self._constants = kernel, tuple(constants.values())

    def __call__(self, programs: int, *arguments: Any) -> None:
        self.kernel[(programs, 1, 1)](*arguments, *self._constants)


def _config(rows: int, warps: int) -> Config:
    return Config(implementation="triton", variant="rows", params={"ROWS": rows, "num_warps": warps})


def _reference(inputs: Tensors, dtype: torch.dtype) -> Tensors:
    x, dy, weight, bias = (inputs[name].to(dtype) for name in ("x", "dy", "weight", "bias"))
    mean = x.mean(1, keepdim=True)
    rstd = ((x - mean).square().mean(1, keepdim=True) + EPSILON).rsqrt()
    z, g = (x - mean) * rstd, dy * weight
    dx = rstd * (g - g.mean(1, keepdim=True) - z * (g * z).mean(1, keepdim=True))
    return {"y": z * weight + bias, "mean": mean, "rstd": rstd, "dx": dx}


LAYER_NORM = LayerNorm()


# --- Using it. -----------------------------------------------------------------------------------------------------


def problem_of(x: Tensor, device: DeviceInfo) -> Problem:
    """Returns what is tuned for: all that decides which config is fastest, and nothing else."""
    return Problem(
        spec="layer_norm:LAYER_NORM",  # found by this name in the sweep's own processes too
        gpu_name=device.name,
        capability=".".join(map(str, device.capability)),
        sm_count=device.sm_count,
        mig_profile=device.mig_profile,
        triton_version=device.triton_version,
        source_hash=source_hash([*KERNELS.values(), LayerNorm.launch]),
        layout="aligned",
        fields={"columns": x.shape[1], "dtype": str(x.dtype).removeprefix("torch.")},
    )


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, settings: Settings) -> Tensor:
    """Returns the normalised rows of x (rows, columns), by the fastest proven config."""
    device = describe(x.get_device())
    problem = problem_of(x, device)
    choice = resolve(problem, device, settings).choices["forward"]
    compiled = LAYER_NORM.compile("forward", choice.config, problem, device)
    y, mean = torch.empty_like(x), torch.empty((x.shape[0], 1), device=x.device)
    outputs = {"y": y, "mean": mean, "rstd": torch.empty_like(mean)}
    LAYER_NORM.launch("forward", compiled, problem, {"x": x, "weight": weight, "bias": bias}, outputs, {})
    return y


def main() -> None:
    """Tunes one problem on this machine's device and compares the result with PyTorch's."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    x, weight, bias = torch.randn(1000, 768), torch.randn(768), torch.randn(768)
    x, weight, bias = (tensor.to(device, torch.float16) for tensor in (x, weight, bias))
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".layer_norm_cache")
    y = layer_norm(x, weight, bias, Settings(cache_dir=folder))
    found = resolve(problem_of(x, describe(x.get_device())), describe(x.get_device()), Settings(cache_dir=folder))
    for kernel, choice in found.choices.items():
        print(f"{kernel}: {choice.config} ({choice.rung}, level {choice.level})")
    error = (y.float() - torch.nn.functional.layer_norm(x.float(), (768,), weight.float(), bias.float())).abs().max()
    print(f"largest difference to PyTorch: {float(error):.2g}; database: {found.location}")


if __name__ == "__main__":
    main()
