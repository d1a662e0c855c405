"""Shows the whole way once: tune a small real problem, call the operator, then do it again in a new process.

The problem is causal attention with a learned rank-8 bias, all gradients wanted. The second process must find everything in
the database: it sweeps nothing and leaves the file as it was, byte for byte. ``scripts/quickstart`` sets up and comes here.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import autotune
import flashbias
from autotune.candidate import told
from autotune.device import DeviceInfo, describe, interpreting
from autotune.errors import AutotuneError
from autotune.gate.accuracy import yardstick
from autotune.spec import Reference
from cache_db import Trial, open_layers
from flashbias import reference
from flashbias.errors import FlashBiasError
from flashbias.kernels.problem import GRADIENTS, Shape
from flashbias.kernels.problem import problem as problem_of
from flashbias.kernels.spec import ATTENTION
from flashbias.settings import current

MODULE = "flashbias.cli.quickstart"
SHOWN_PER_VERDICT = 2
DTYPE = torch.float16


class Call(NamedTuple):
    """One call of the operator: its inputs, the gradient sent back, and what came out."""

    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
    dout: torch.Tensor
    results: dict[str, torch.Tensor]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the quickstart; returns 0 if everything promised was seen, 1 if not, 2 for wrong settings."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="scripts/quickstart", description=__doc__)
    parser.add_argument(
        "--cache-dir", metavar="DIR", help="keep the tuning database here (default: FLASHBIAS_CACHE_DIR)"
    )
    parser.add_argument("--again-since", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if not torch.cuda.is_available() and not interpreting():
        # Kernels are decorated while flashbias is imported: the interpreter has to be chosen before that.
        os.environ["TRITON_INTERPRET"] = "1"
        os.execv(sys.executable, _command(given))
    try:
        chosen = flashbias.settings(cache_dir=options.cache_dir) if options.cache_dir else contextlib.nullcontext()
        with chosen:
            return _second(options.again_since) if options.again_since else _first(given)
    except (FlashBiasError, AutotuneError) as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("quickstart: stopped; finished trials are kept, run the same command to go on", file=sys.stderr)
        return 130


def _command(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-P", "-m", MODULE, *arguments]


def _first(arguments: Sequence[str]) -> int:
    """Tunes if need be, calls, reports, and starts the second process."""
    device = describe(-1 if interpreting() else torch.cuda.current_device())
    shape = _shape(device)
    problem = problem_of(shape, device)
    print(
        f"FlashBias {flashbias.__version__}\ndevice    {_device_line(device)}\nproblem   {_problem_line(shape)}",
        flush=True,
    )
    started = time.monotonic()
    resolution = autotune.resolve(problem, device, current())
    found = f"swept in {time.monotonic() - started:.1f} s" if resolution.swept else "found in the database"
    print(f"database  {resolution.location}\ntuning    {found}; {resolution.reason}")
    layers = open_layers(current().cache_dir)
    trials = layers.trials(problem)
    milliseconds = {kernel: winner.ms for kernel, winner in layers.winners(problem).items()}
    _print(_tried_lines(trials))
    _print(_chosen_lines(resolution, milliseconds))
    within, lines = _error_lines(_call(shape, device), shape)
    _print(lines)
    promises = {
        "a proven configuration runs (PyTorch computed this)": bool(resolution.choices),
        "every error is within the gate's budget": within,
        "the operator runs the problem tuned above": len(layers.trials(problem)) == len(trials),
        **_second_process(resolution.location, arguments),
    }
    if device.interpreted:
        print("note      no GPU here: Triton's interpreter ran the kernels on the CPU, its timings are not speeds")
    broken = [promise for promise, kept in promises.items() if not kept]
    _print([f"FAILED    this does not hold: {promise}" for promise in broken] or ["done      everything above holds"])
    return int(bool(broken))


def _print(lines: Iterable[str]) -> None:
    print("\n".join(lines), flush=True)


def _second(started: float) -> int:
    """Calls the operator as any later process would, and says what it cost."""
    device = describe(-1 if interpreting() else torch.cuda.current_device())
    shape = _shape(device)
    _call(shape, device)
    seconds = time.time() - started
    resolution = autotune.resolve(problem_of(shape, device), device, current())
    rungs = sorted({str(choice.rung) for choice in resolution.choices.values()}) or ["eager"]
    print(f"again     new process: forward and backward done {seconds:.1f} s after its start, ran: {', '.join(rungs)}")
    return int(resolution.swept or not {"winner", "pinned"}.issuperset(rungs))


def _second_process(location: str, arguments: Sequence[str]) -> dict[str, bool]:
    """Runs the second process; returns what was promised of it and whether it held."""
    database = Path(location)
    if not database.exists():
        return {f"a second process finds the results (they are in {location} only)": False}
    before = hashlib.sha256(database.read_bytes()).digest()
    # The clock starts before the interpreter does: its start and all imports count.
    status = subprocess.run(_command([*arguments, "--again-since", repr(time.time())]), check=False).returncode
    same = hashlib.sha256(database.read_bytes()).digest() == before
    if same and status == 0:
        print(f"          it swept nothing: {database.name} is unchanged, byte for byte", flush=True)
    return {"the second process runs the stored winners": status == 0, "the second process writes nothing": same}


def _shape(device: DeviceInfo) -> Shape:
    """Returns the problem shown: small for a GPU, tiny for the interpreter."""
    batch, heads, length, dim = (1, 2, 48, 16) if device.interpreted else (2, 8, 1024, 64)
    return Shape(
        batch=batch,
        nheads=heads,
        seqlen_q=length,
        seqlen_k=length,
        headdim=dim,
        rank=8,
        causal=True,
        dtype="float16",
        grads=GRADIENTS[:5],
    )


def _call(shape: Shape, device: DeviceInfo) -> Call:
    """Runs forward and backward on random inputs, and waits for the results; k_bias is shared by all heads."""
    generator = torch.Generator().manual_seed(0)
    length, heads, dim, rank = shape.seqlen_q, shape.nheads, shape.headdim, shape.rank
    full = (shape.batch, length, heads, dim)
    sizes = [full, full, full, (1, length, heads, rank), (1, length, 1, rank), full]
    # Factors scaled so that the bias, a sum of `rank` products, has unit variance like scaled scores.
    spread = [1.0, 1.0, 1.0, rank**-0.25, rank**-0.25, 1.0]
    drawn = [torch.randn(size, generator=generator) * scale for size, scale in zip(sizes, spread, strict=True)]
    *tensors, dout = (tensor.to(device.torch_device, DTYPE) for tensor in drawn)
    q, k, v, q_bias, k_bias = (tensor.requires_grad_() for tensor in tensors)
    out, lse = flashbias.flash_bias_func(q, k, v, q_bias, k_bias, causal=shape.causal, return_lse=True)
    gradients = torch.autograd.grad(out, (q, k, v, q_bias, k_bias), dout)
    if device.index >= 0:
        torch.cuda.synchronize(device.index)
    named = {f"d{name}": gradient for name, gradient in zip(shape.grads, gradients, strict=True)}
    results = {"out": out.detach(), "lse": lse.detach(), **named}
    return Call((q.detach(), k.detach(), v.detach(), q_bias.detach(), k_bias.detach()), dout, results)


def _error_lines(call: Call, shape: Shape) -> tuple[bool, list[str]]:
    """Returns whether every error is within the gate's budget, and the table that shows it."""
    given = (*call.inputs, None, shape.band, shape.headdim**-0.5)
    out, lse = reference.forward(*given, compute_dtype=torch.float64)
    gradients = reference.backward(call.dout, *given, out, lse, compute_dtype=torch.float64)
    sizes = reference.magnitudes(call.dout, *given, out, lse, compute_dtype=torch.float64)
    pairs = zip(gradients, sizes[1:], strict=True)
    exact = [None if value is None else Reference(value, size) for value, size in pairs]
    truth = _named(Reference(out, sizes.out), Reference(lse), exact)
    best_out, best_lse = reference.forward(*given, compute_dtype=torch.float32, round_to=DTYPE)
    best = reference.backward(
        call.dout, *given, best_out, best_lse, compute_dtype=torch.float32, round_to=DTYPE, recentre=True
    )
    ideal = _named(best_out, best_lse, best)
    lines = [f"errors    {'worst row, against fp64':<28}{'ours':>10}{'of the budget':>16}"]
    within = True
    for name, value in call.results.items():
        stick = yardstick(name, ATTENTION.rule(name), truth[name], ideal[name], DTYPE)
        finding = stick.finding(stick.judge(value).tolist())
        within &= finding.ratio <= 1
        lines.append(f"          {name:<28}{finding.error:>10.1e}{finding.ratio:>16.0%}")
    return within, lines


def _named(out: Any, lse: Any, gradients: Iterable[Any]) -> dict[str, Any]:
    """Returns values by the names of the outputs they belong to."""
    return {"out": out, "lse": lse, **{f"d{name}": value for name, value in zip(GRADIENTS, gradients, strict=True)}}


def _device_line(device: DeviceInfo) -> str:
    software = f"Triton {device.triton_version}, torch {device.environment.torch}"
    if device.interpreted:
        return f"none: Triton's interpreter on the CPU, {software}"
    major, minor = device.capability
    return f"{device.name} ({major}.{minor}, {device.sm_count} SMs), driver {device.environment.driver}, {software}"


def _problem_line(shape: Shape) -> str:
    return (
        f"learned bias: batch {shape.batch}, {shape.nheads} heads, {shape.seqlen_q} x {shape.seqlen_k}, head dim {shape.headdim}, "
        f"rank {shape.rank}, causal, {shape.dtype}, gradients of {', '.join(shape.grads)}"
    )


def _tried_lines(trials: Sequence[Trial]) -> Iterator[str]:
    """Yields, for each kernel, what was tried, and what was rejected with the reason."""
    for kernel in dict.fromkeys(trial.kernel for trial in trials):
        mine = [trial for trial in trials if trial.kernel == kernel]
        verdicts = Counter(told(trial) for trial in mine)
        counts = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())
        yield f"tried     {kernel:<16}{len(mine)}: {counts}"
        for verdict in verdicts:
            rejected = [trial for trial in mine if told(trial) == verdict != "safe"]
            for trial in rejected[:SHOWN_PER_VERDICT]:
                yield f"          {verdict}: {trial.config}: {trial.reason}"
            if len(rejected) > SHOWN_PER_VERDICT:
                yield f"          {verdict}: and {len(rejected) - SHOWN_PER_VERDICT} more"


def _chosen_lines(resolution: autotune.Resolution, ms: dict[str, float]) -> Iterator[str]:
    """Yields the config that each kernel runs with."""
    for kernel, choice in resolution.choices.items():
        time_taken = f", {ms[kernel]:.3f} ms" if kernel in ms else ""
        yield f"chosen    {kernel:<16}{choice.config} ({choice.rung}, proof level {choice.level}{time_taken})"


if __name__ == "__main__":
    sys.exit(main())
