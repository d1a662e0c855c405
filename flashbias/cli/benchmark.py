"""Compares the tuned operator with SDPA on concatenated inputs, on shapes given as for ``prewarm``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from autotune import AutotuneError
from flashbias.bench.compare import Row, compare
from flashbias.cli import shapes
from flashbias.errors import ArgumentError, FlashBiasError
from flashbias.kernels.problem import Shape


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code: 0 when ours was right everywhere, else 1 (2 for wrong usage)."""
    parser = argparse.ArgumentParser(prog="benchmark.py", description=__doc__)
    shapes.add_arguments(parser)
    parser.add_argument("--rounds", type=int, default=15, help="timed runs of each provider (default 15)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to FILE")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmark: needs a CUDA device; timings of Triton's interpreter are not speeds", file=sys.stderr)
        return 2
    try:
        wanted = shapes.from_arguments(options)
        for shape in wanted:
            _comparable(shape)
        results = [(shape, compare(shape, options.rounds, torch.device("cuda"))) for shape in wanted]
    except (FlashBiasError, AutotuneError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    for shape, rows in results:
        print_table(shape, rows)
    if options.json:
        data = [{"shape": shape.model_dump(), "rows": [row.to_json() for row in rows]} for shape, rows in results]
        options.json.write_text(json.dumps(data, indent=1), encoding="utf-8")
    return 0 if all(rows[0].right for _, rows in results) else 1


def _comparable(shape: Shape) -> None:
    """Raises ArgumentError for what would be left out of every figure without a word."""
    if shape.varlen:
        raise ArgumentError("varlen: packed sequences cannot be compared, the other providers have none")
    if shape.mask != "none":
        raise ArgumentError(f"mask: expected none, got {shape.mask}: masks are not compared yet")


def print_table(shape: Shape, rows: Sequence[Row]) -> None:
    """Prints one line for each provider."""
    print(f"\n{title(shape)} on {torch.cuda.get_device_name()}")
    print(f"{'provider':24}{'fwd ms':>9}{'bwd ms':>9}{'fwd TF':>8}{'bwd TF':>8}  largest error")
    for row in rows:
        if row.missing or row.forward_ms is None or row.forward_tflops is None:
            print(f"{row.provider:24}  {row.missing}")
            continue
        name, error = max(row.errors.items(), key=lambda item: item[1], default=("unchecked", 0.0))
        verdict = "" if row.right is not False else "  (another function)" if "without" in row.provider else "  WRONG"
        print(
            f"{row.provider:24}{row.forward_ms:9.3f}{_number(row.backward_ms, '9.3f')}{row.forward_tflops:8.0f}"
            f"{_number(row.backward_tflops, '8.0f')}  {name} {error:.1e}{verdict}"
        )


def title(shape: Shape) -> str:
    """Returns a shape in a line, as "B2 H16/4 S1024x4096 D64 R8 causal bfloat16"."""
    heads = f"{shape.nheads}/{shape.kv_heads}" if shape.kv_heads != shape.nheads else f"{shape.nheads}"
    words = [f"B{shape.batch} H{heads} S{shape.seqlen_q}x{shape.seqlen_k} D{shape.headdim} R{shape.rank}"]
    words += ["causal" if shape.causal is True else shape.causal] if shape.causal else []
    words += [f"window {shape.window[0]},{shape.window[1]}"] if shape.window != (-1, -1) else []
    words += [shape.dtype] + ([shape.arithmetic] if shape.arithmetic != "default" else [])
    words += [f"factors {shape.factor_dtype}"] if shape.factor_dtype not in (None, shape.dtype) else []
    return " ".join(words)


def _number(value: float | None, form: str) -> str:
    """Returns ``value`` in ``form``, or a dash as wide."""
    width = int(form.partition(".")[0])
    return f"{'-':>{width}}" if value is None else format(value, form)
