"""Measures shapes one after the other and keeps each result at once, so that a stopped run goes on where it was."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from autotune.progress import remaining
from flashbias.bench import environment
from flashbias.bench.compare import DeviceLost, compare
from flashbias.bench.providers import Provider, catalogue
from flashbias.bench.providers.upstream import NO_FOLDER
from flashbias.bench.results import Book, Result, Row
from flashbias.kernels.problem import Shape

Notice = Callable[[str], None]


def measure(
    shapes: Sequence[Shape],
    names: Sequence[str],
    folder: Path | None,
    book: Book,
    rounds: int,
    device: torch.device,
    notice: Notice = lambda _: None,
) -> list[Result]:
    """Returns a result for each shape: from the book if it has one of all providers asked for, else measured now.

    A shape measured again keeps the company it had: figures are compared within one run. ``names`` are providers, none for
    all, and ``folder`` holds upstream's files; ``notice`` is told what is being done.

    Raises ArgumentError for an unknown provider, and DeviceLost; the next run leaves out who caused that.
    """
    asked = list(catalogue(folder, names))
    found = []
    measured, start = 0, time.monotonic()
    for number, shape in enumerate(shapes, start=1):
        # Those kept from an earlier run cost nothing: the pace is that of the others.
        rest = measured + len(shapes) - number + 1
        left = f", {remaining(measured, rest, time.monotonic() - start)} left at most" if measured else ""
        place = f"[{number}/{len(shapes)}{left}] {title(shape)}"
        known = book.get(shape)
        before = [] if known is None else [row.provider for row in known.rows if _settled(row, folder)]
        if known is not None and set(asked) <= set(before):
            notice(f"{place}: measured {known.environment.get('date', 'before')}")
            found.append(known)
            continue
        everyone = catalogue(folder, [name for name in catalogue() if name in {*before, *asked}])

        def told(what: str, place: str = place) -> None:
            notice(f"{place}: {what}")

        found.append(_measured(shape, everyone, folder, book, rounds, device, told))
        measured += 1
    return found


def _settled(row: Row, folder: Path | None) -> bool:
    """Returns whether a row kept is what would be found now: upstream's, without its folder then, may run by now."""
    return folder is None or row.missing != NO_FOLDER


def _measured(
    shape: Shape,
    providers: Mapping[str, Provider],
    folder: Path | None,
    book: Book,
    rounds: int,
    device: torch.device,
    notice: Notice,
) -> Result:
    try:
        result = compare(shape, providers, rounds, device, crashed=book.crashed(shape), notice=notice)
    except DeviceLost as lost:
        book.add_crash(shape, lost.provider)
        raise
    result = dataclasses.replace(result, environment=environment.record(device, folder, rounds))
    book.add(result)
    return result


def title(shape: Shape) -> str:
    """Returns a shape in a line, as "B2 H16/4 S1024x4096 D64 R8 causal bfloat16"."""
    heads = f"{shape.nheads}/{shape.kv_heads}" if shape.kv_heads != shape.nheads else f"{shape.nheads}"
    dims = f"{shape.headdim}" if shape.value_dim in {None, shape.headdim} else f"{shape.headdim}/{shape.value_dim}"
    words = [f"B{shape.batch} H{heads} S{shape.seqlen_q}x{shape.seqlen_k} D{dims} R{shape.rank}"]
    words += ["causal" if shape.causal is True else shape.causal] if shape.causal else []
    words += [f"window {shape.window[0]},{shape.window[1]}"] if shape.window != (-1, -1) else []
    words += [shape.dtype] + ([shape.arithmetic] if shape.arithmetic != "default" else [])
    words += [f"factors {shape.factor_dtype}"] if shape.factor_dtype not in (None, shape.dtype) else []
    return " ".join(words)
