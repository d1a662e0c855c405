"""What the compile matrix found, as Markdown tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from statistics import median

from flashbias.bench.matrix import ARCHITECTURES, PROBLEMS, Row


def summary(rows: Sequence[Row], left: Sequence[Row]) -> Iterator[str]:
    """Yields the lines of all tables: ``rows`` are compiled or pruned, ``left`` have not been compiled."""
    every = [*rows, *left]
    archs = [arch for arch in ARCHITECTURES if any(row.arch == arch for row in every)]
    yield from _table(["", *archs], _by_arch(rows, left, archs))
    yield ""
    yield "Compiled / pruned / too large or failed, of all candidates:"
    yield ""
    names = [name for name in PROBLEMS if any(row.problem == name for row in every)]
    cells = ([name, *(_cell(rows, every, arch, name) for arch in archs)] for name in names)
    yield from _table(["problem", *archs], cells)
    for title, chosen in (("rule that prunes", _pruned), ("what does not compile or fit", _broken)):
        found = [row for row in rows if chosen(row)]
        if found:
            yield ""
            yield from _table([title, *archs], _by_rule(found, archs))


def faults(rows: Sequence[Row]) -> Iterator[str]:
    """Yields one line for each candidate that is neither pruned nor compiles, where the kernels are meant to run."""
    for row in rows:
        if row.fault:
            yield f"{row.arch} | {row.problem} | {row.kernel} | {row.config.variant} {_params(row)}: {row.reason}"


def _pruned(row: Row) -> bool:
    return row.status == "pruned"


def _broken(row: Row) -> bool:
    return row.status in {"too_large", "failed"}


def _by_arch(rows: Sequence[Row], left: Sequence[Row], archs: Sequence[str]) -> Iterator[list[str]]:
    """Yields a line for each kind of outcome, then figures of what was compiled."""

    def counted(label: str, among: Sequence[Row], chosen: Callable[[Row], object]) -> list[str]:
        return [label, *(f"{sum(row.arch == arch and bool(chosen(row)) for row in among):,}" for arch in archs)]

    made = [row for row in rows if row.status in {"compiled", "too_large"}]
    yield counted("candidates", [*rows, *left], lambda _: True)
    yield counted("pruned by a rule", rows, _pruned)
    yield counted("compiled", rows, lambda row: row.status == "compiled")
    yield counted("compiled, but too large for the GPU", rows, lambda row: row.status == "too_large")
    yield counted("failed", rows, lambda row: row.status == "failed")
    yield counted("not compiled yet", left, lambda _: True)
    for cores in ("tcgen05", "wgmma", "mma", "mfma", ""):
        with_them = [row for row in made if row.figures.get("tensor_cores") == cores]
        yield counted(f"… with {cores}" if cores else "… without tensor cores", with_them, lambda _: True)
    yield counted("… with bulk copies", made, lambda row: row.figures.get("bulk_copies"))
    yield counted("… with spills", made, lambda row: row.figures.get("spills"))
    seconds = ([float(row.figures["seconds"]) for row in made if row.arch == arch] for arch in archs)
    yield ["seconds for each, median (most)", *(f"{median(s):.1f} ({max(s):.1f})" if s else "–" for s in seconds)]


def _cell(rows: Sequence[Row], every: Sequence[Row], arch: str, name: str) -> str:
    here = Counter(row.status for row in rows if (row.arch, row.problem) == (arch, name))
    total = sum((row.arch, row.problem) == (arch, name) for row in every)
    return f"{here['compiled']} / {here['pruned']} / {here['too_large'] + here['failed']} of {total}" if total else "–"


def _by_rule(found: Sequence[Row], archs: Sequence[str]) -> Iterator[list[str]]:
    for rule, _ in Counter(row.rule for row in found).most_common():
        yield [rule, *(f"{sum((row.rule, row.arch) == (rule, arch) for row in found):,}" for arch in archs)]


def _params(row: Row) -> str:
    return " ".join(f"{name}={value}" for name, value in row.config.params.items())


def _table(head: Sequence[str], lines: Iterator[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for line in lines:
        yield f"| {' | '.join(cell.replace('|', '/') for cell in line)} |"
