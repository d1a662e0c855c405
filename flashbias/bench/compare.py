"""Times and checks every provider on one shape: forward and backward apart, in interleaved runs with a cold L2."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from autotune.device import describe
from autotune.timing import interleaved
from autotune.turns import turn
from flashbias import reference
from flashbias.band import EVERYTHING
from flashbias.bench.providers import PROVIDERS, Forward, Inputs, make
from flashbias.kernels.problem import GRADIENTS, Shape

# A head start of about 1 ms for the host: a whole backward through autograd takes it up to 0.8 ms, and kernels shall be
# timed, not the host.
_LEAD_CYCLES: Final = 2_000_000
# A provider whose result is further from the oracle than this, relative to the whole tensor, computes something else.
LIMITS: Final = {"float16": 5e-3, "bfloat16": 4e-2, "float32": 5e-3}


@dataclass
class Row:
    """One provider on one shape: milliseconds, relative errors of ``out`` and each gradient, and why it is missing.

    ``tflops`` are useful ones: forward 2 (D + Dv) for each score that counts, backward 2.5 times that. A shape without
    gradients has no backward.
    """

    provider: str
    forward_ms: float | None = None
    backward_ms: float | None = None
    forward_tflops: float | None = None
    backward_tflops: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    right: bool | None = None
    missing: str = ""

    def to_json(self) -> dict[str, Any]:
        """Returns plain data."""
        return asdict(self)


def compare(shape: Shape, rounds: int, device: torch.device, *, check: bool = True) -> list[Row]:
    """Runs every provider on ``shape``; one that cannot run it is a row that says why."""
    inputs = make(shape, 0, device)
    rows, results = {}, {}
    for name, forward in PROVIDERS.items():
        rows[name] = Row(name)
        try:
            results[name] = (forward(inputs), *(_gradients(forward, inputs) if inputs.leaves else ()))
        except (RuntimeError, AssertionError) as error:  # what SDPA raises where no kernel fits
            rows[name].missing = str(error).splitlines()[0] if str(error) else type(error).__name__
    if check:
        _judge(rows, results, inputs, LIMITS[shape.dtype])
    runs = {name: PROVIDERS[name] for name in results}
    with (
        torch.no_grad()
    ):  # without gradients it is another problem; its first call may tune, and wait for the turn below
        for forward in runs.values():
            forward(inputs)
    with turn(describe(device.index or 0).uuid if device.type == "cuda" else ""):
        _time(rows, runs, inputs, rounds, device)
    work = 2.0 * shape.batch * shape.nheads * scores(shape) * (shape.headdim + (shape.value_dim or shape.headdim))
    for row in rows.values():
        row.forward_tflops = work / row.forward_ms / 1e9 if row.forward_ms else None
        row.backward_tflops = 2.5 * work / row.backward_ms / 1e9 if row.backward_ms else None
    return list(rows.values())


def scores(shape: Shape) -> float:
    """Returns how many scores of one head count: all, those in the band, or by the field's custom half of a causal square."""
    everything = float(shape.seqlen_q * shape.seqlen_k)
    if shape.causal and shape.window == (-1, -1) and shape.seqlen_q == shape.seqlen_k:
        return everything / 2
    rows = (shape.band.keys(row, row, shape.seqlen_k) for row in range(shape.seqlen_q))
    return everything if shape.band == EVERYTHING else float(sum(keys.stop - keys.start for keys in rows))


def _gradients(forward: Forward, inputs: Inputs) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(forward(inputs), inputs.leaves, inputs.dout, allow_unused=True)


def _time(rows: dict[str, Row], runs: dict[str, Forward], inputs: Inputs, rounds: int, device: torch.device) -> None:
    """Fills in medians; a provider's backward is timed alone, on a graph that is kept."""
    with torch.no_grad():
        forwards = {name: (lambda forward=forward: forward(inputs)) for name, forward in runs.items()}
        for name, figures in interleaved(forwards, rounds, device, lead_cycles=_LEAD_CYCLES).figures().items():
            rows[name].forward_ms = float(figures["ms"])
    if not inputs.leaves:
        return
    graphs = {name: forward(inputs) for name, forward in runs.items()}

    def backward(out: Tensor) -> None:
        torch.autograd.grad(out, inputs.leaves, inputs.dout, retain_graph=True, allow_unused=True)

    backwards = {name: (lambda out=out: backward(out)) for name, out in graphs.items()}
    for name, figures in interleaved(backwards, rounds, device, lead_cycles=_LEAD_CYCLES).figures().items():
        rows[name].backward_ms = float(figures["ms"])


def _judge(rows: dict[str, Row], results: dict[str, tuple[Tensor | None, ...]], inputs: Inputs, limit: float) -> None:
    """Compares O and every gradient with the fp64 oracle."""
    with torch.no_grad():
        call = (inputs.q, inputs.k, inputs.v, inputs.q_bias, inputs.k_bias, None, inputs.shape.band, inputs.scale)
        out, lse = reference.forward(*call, compute_dtype=torch.float64)
        truth = {"out": out}
        if inputs.leaves:
            gradients = reference.backward(inputs.dout, *call, out, lse, compute_dtype=torch.float64)
            wanted = inputs.shape.grads
            truth |= {f"d{n}": g for n, g in zip(GRADIENTS, gradients, strict=True) if n in wanted and g is not None}
        for name, found in results.items():
            for (label, right), value in zip(truth.items(), found, strict=False):
                error = float("inf") if value is None else float((value.double() - right).norm() / right.norm())
                rows[name].errors[label] = error
            rows[name].right = all(error <= limit for error in rows[name].errors.values())
