"""Results as a reader wants them: Markdown tables, and CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from typing import Final, TextIO

from flashbias.bench.campaign import title
from flashbias.bench.results import OURS, PASSES, Pass, Result, Row, Timing, best_peer, speed

_HEAD: Final = (
    "provider", "forward ms", "TFLOP/s", "over ours", "backward ms", "TFLOP/s", "over ours", "largest error", "",
)  # fmt: skip
_MEASURES: Final = tuple(field.name for field in fields(Timing))
_COLUMNS: Final = (
    *("shape", "batch", "nheads", "nheads_kv", "seqlen_q", "seqlen_k", "headdim", "value_dim", "rank"),
    *("factor_dtype", "causal", "window", "dtype", "provider", "own", "floor", "missing", "missing_backward"),
    *(f"{which}_{name}" for which in PASSES for name in _MEASURES),
    *("right_forward", "right_backward", "errors", "judged", "gpu", "date", "commit"),
)  # fmt: skip


def markdown(result: Result) -> Iterator[str]:
    """Yields the lines of one shape: a table with a line for each provider, and ours against the best right peer."""
    where = result.environment.get("gpu") or "CPU"
    yield f"### {title(result.shape)} on {where}"
    yield ""
    yield from _table(_HEAD, [_cells(row) for row in result.rows])
    yield ""
    if result.judged and result.judged != "all heads":
        yield f"The oracle judged {result.judged}."
    for which in PASSES:
        yield from _against(result, which)
    yield ""


def _against(result: Result, which: Pass) -> Iterator[str]:
    ours, best = result.row(OURS), best_peer(result, which)
    if ours is None or ours.timing(which) is None:
        return
    if ours.right(which) is False:
        yield f"{which}: ours is WRONG."
        return
    if best is None:
        yield f"{which}: no right peer."
        return
    ratio = speed(result, which, OURS, best.provider)
    yield f"{which}: ours is {ratio:.2f}x as fast as the best right peer, {best.provider}."


def _cells(row: Row) -> list[str]:
    if row.missing:
        return [row.provider, *("–",) * 7, _escaped(row.missing)]
    cells = [row.provider]
    for which in PASSES:
        timing = row.timing(which)
        if timing is None:
            cells += ["–"] * 3
            continue
        over = "–" if timing.over_ours is None else f"{timing.over_ours:.2f}"
        cells += [f"{timing.ms:.3f}", f"{timing.tflops:.3g}", over]
    return [*cells, worst_error(row), _remark(row)]


def worst_error(row: Row) -> str:
    """Returns the largest of a row's errors with its tensor, as "dq 3.1e-04"; "not finite" stands above all."""
    if not row.errors:
        return "unchecked"
    name = max(row.errors, key=lambda each: float("inf") if (error := row.errors[each]) is None else error)
    error = row.errors[name]
    return f"{name} {'missing or not finite' if error is None else f'{error:.1e}'}"


def _remark(row: Row) -> str:
    """Returns what a reader must know of a row that ran."""
    words = ["another function: no bias"] if row.floor else []
    if row.right_forward is False:
        words.append("WRONG")
    elif row.right_backward is False:
        words.append("backward WRONG")
    if "eager" in row.configs.values():
        words.append("eager: no kernel could be proven")
    if row.missing_backward:
        words.append(f"no backward: {row.missing_backward}")
    return _escaped("; ".join(words))


def _escaped(text: str) -> str:
    """Returns ``text`` fit for a cell."""
    return text.replace("|", "\\|").replace("\n", " ")


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yields an aligned Markdown table."""
    widths = [max(3, *(len(line[column]) for line in [head, *lines])) for column in range(len(head))]
    for number, line in enumerate([head, *lines]):
        cells = zip(line, widths, strict=True)
        yield "| " + " | ".join(cell.ljust(width) for cell, width in cells) + " |"
        if number == 0:
            yield "|" + "|".join("-" * (width + 2) for width in widths) + "|"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of an aligned Markdown table."""
    return list(_table(head, lines))


def write_csv(results: Iterable[Result], file: TextIO) -> None:
    """Writes a line for each provider on each shape, with the columns of ``_COLUMNS``; what is not there is empty."""
    writer = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for result in results:
        shape = {name: value for name, value in result.shape.model_dump().items() if name in _COLUMNS}
        shape["window"] = ",".join(map(str, result.shape.window))
        about = {name: result.environment.get(name) for name in ("gpu", "date", "commit")}
        for row in result.rows:
            writer.writerow({**shape, **about, **_values(row), "shape": title(result.shape), "judged": result.judged})


def _values(row: Row) -> dict[str, object]:
    plain = ("provider", "own", "floor", "missing", "missing_backward", "right_forward", "right_backward")
    values = {name: getattr(row, name) for name in plain}
    values["errors"] = " ".join(f"{name}={'-' if each is None else f'{each:.3e}'}" for name, each in row.errors.items())
    for which in PASSES:
        timing = row.timing(which)
        for name in _MEASURES if timing is not None else ():
            values[f"{which}_{name}"] = getattr(timing, name)
    return values
