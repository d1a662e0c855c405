"""``flashbias cache export``, ``import`` and ``merge``: what is tuned, as a file that can be reviewed and handed on.

Nothing from a pack is executed, and nothing it calls proven is: imported configs are proven here before they run.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from autotune.place import INTERPRETER
from cache_db.batch import Batch, Shared
from cache_db.layers import FILE_NAME
from cache_db.models import Verdict
from cache_db.packs import Refusal
from flashbias.cli import owed
from flashbias.cli.admission import Admission
from flashbias.cli.database import WrongUsage, add_spec, open_store, short
from flashbias.cli.destination import destination, file_destination
from flashbias.cli.text import tell
from flashbias.settings import current

if TYPE_CHECKING:
    from cache_db.intake import Taken
    from cache_db.store import Store

TOGETHER: Final = 200
LISTED: Final = 20
KEPT: Final = 1000
STREAM: Final = Path("-")


@dataclass
class Report:
    """What became of the rows of one pack. ``first`` has the first refusals, ``refused`` counts all of them."""

    source: str
    read: int = 0
    refused: int = 0
    first: list[Refusal] = field(default_factory=list)
    taken: Taken | None = None

    def refuse(self, refusal: Refusal) -> None:
        """Counts a refusal; of a pack that is nothing else, not all are remembered."""
        self.refused += 1
        if len(self.first) < KEPT:
            self.first.append(refusal)


def add_parsers(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds ``export``, ``import`` and ``merge`` to ``commands``; ``common`` has the flags of every command."""
    target = argparse.ArgumentParser(add_help=False)
    target.add_argument("--output", type=Path, default=STREAM, metavar="FILE", help="where to (default: -, stdout)")
    target.add_argument(
        "--format", choices=("jsonl", "sqlite"), default="jsonl", help="text to review, or a database (default: jsonl)"
    )
    leaving = commands.add_parser("export", parents=[common, target], help="write what is tuned as a pack")
    leaving.add_argument("--winners", action="store_true", help="leave out trials that passed and did not win")
    leaving.set_defaults(run=leave)
    entering = commands.add_parser("import", parents=[common], help="take packs into the database, to be proven here")
    entering.add_argument("packs", nargs="+", type=Path, metavar="PACK", help="text or database; - is text on stdin")
    entering.add_argument("--dry-run", action="store_true", help="say what would be refused, and store nothing")
    entering.add_argument("--json", action="store_true", help="print JSON")
    add_spec(entering)
    entering.set_defaults(run=enter)
    merging = commands.add_parser("merge", parents=[target], help="make one pack of several, in whatever order")
    merging.add_argument("packs", nargs="+", type=Path, metavar="PACK", help="text or database; - is text on stdin")
    merging.set_defaults(run=merge)


def leave(options: argparse.Namespace) -> int:
    """Writes all rows but those of the interpreter, pins, leases and jobs; returns 0."""
    store = open_store(options.cache_dir)
    batches = (_winning(batch) if options.winners else batch for batch in store.by_problem())
    count = _write(options, (batch for batch in batches if not _interpreted(batch)), store.path)
    print(f"flashbias: {count} rows of {store.path} exported", file=sys.stderr)
    return 0


def enter(options: argparse.Namespace) -> int:
    """Takes in what the rules allow; returns 1 if anything was refused, else 0.

    Raises CacheError for a file that is no pack, and where the database cannot be written: what was stored by then stays.
    """
    from cache_db.intake import take

    store = open_store(options.cache_dir, make=not options.dry_run)
    admission, reports = Admission(options.specs), []
    for path in options.packs:
        report = Report(str(path))
        reports.append(report)
        for rows in _together(_admitted(path, report, admission)):
            found = take(store, rows, dry=options.dry_run)
            report.taken = found if report.taken is None else report.taken + found
    sent = options.dry_run or owed.send(store)
    if options.json:
        data = {"database": str(store.path), "dry_run": options.dry_run, "sent": sent}
        print(json.dumps(data | {"packs": [_data(report) for report in reports]}, indent=1))
    else:
        for report in reports:
            tell(_lines(report, dry=options.dry_run))
    return int(any(report.refused for report in reports))


def merge(options: argparse.Namespace) -> int:
    """Writes one pack of all rows of several, of two that differ the better; returns 1 if a row was refused, else 0."""
    from cache_db.snapshot import fill
    from cache_db.store import Store

    reports = [Report(str(path)) for path in options.packs]
    with tempfile.TemporaryDirectory(prefix="flashbias-") as scratch:
        store = Store.open(Path(scratch) / "merged.db")
        for path, report in zip(options.packs, reports, strict=True):
            fill(store, _admitted(path, report, None))
        folder = current().cache_dir  # of all files the one that is hardest to make again
        count = _write(options, store.by_problem(), folder and folder / FILE_NAME, filled=store)
    for report in reports:
        for refusal in report.first[:LISTED]:
            _complain(f"{report.source}: {refusal.where} refused: {refusal.reason}")
    _complain(f"{count} rows of {len(reports)} packs, {sum(report.refused for report in reports)} refused")
    return int(any(report.refused for report in reports))


def _write(
    options: argparse.Namespace, batches: Iterable[Batch], database: Path | None, filled: Store | None = None
) -> int:
    """Writes ``batches`` as the flags say, ``filled`` being a database that has them already; returns how many rows."""
    output = None if options.output == STREAM else options.output
    if options.format == "jsonl":
        from cache_db.packs import write

        with destination(output, database) as stream:
            return write(batches, stream)
    if output is None:
        raise WrongUsage.explain("--output", expected="a file for a database", got="stdout", cure="Name one")
    from cache_db import snapshot
    from cache_db.store import Store

    with file_destination(output, database) as place, tempfile.TemporaryDirectory(prefix="flashbias-") as folder:
        if filled is None:
            filled = Store.open(Path(folder) / "export.db")
            for batch in batches:
                filled.merge(batch)
        snapshot.write(filled, place)
        return sum(filled.counts().values())


def _admitted(path: Path, report: Report, admission: Admission | None) -> Iterator[Shared]:
    """Yields the rows of a pack that may enter, and counts what is refused."""
    for number, each in enumerate(_read(path), 1):
        report.read += 1
        if isinstance(each, Refusal):
            report.refuse(each)
            continue
        reason = None if admission is None else admission.refusal(each)
        if reason is None:
            yield each
        else:
            report.refuse(Refusal(f"row {number}, {each.kernel} of {short(each.problem.hash)}", reason))


def _read(path: Path) -> Iterator[Shared | Refusal]:
    """Yields the rows of the file ``path``, whichever form it has. Raises CacheError, WrongUsage."""
    from cache_db import packs, snapshot

    if path == STREAM:
        yield from packs.read(sys.stdin.buffer)
        return
    try:
        with path.open("rb") as stream:
            if stream.peek(len(snapshot.MAGIC)).startswith(snapshot.MAGIC):
                yield from snapshot.read(path)
            else:
                yield from packs.read(stream)
    except FileNotFoundError:
        raise WrongUsage.explain("PACK", expected="a file", got=f"{path}, which is not there") from None


def _together(found: Iterable[Shared]) -> Iterator[Sequence[Shared]]:
    waiting: list[Shared] = []
    for row in found:
        waiting.append(row)
        if len(waiting) == TOGETHER:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def _interpreted(batch: Batch) -> bool:
    rows: list[Shared] = [*batch.winners, *batch.trials, *batch.verifications, *batch.lifts]
    return any(row.problem.gpu_name == INTERPRETER for row in rows[:1])


def _winning(batch: Batch) -> Batch:
    """Returns ``batch`` without trials of safe configs that no winner runs, or was proven, with, and without their proofs."""
    used = {(row.kernel, row.config.hash) for row in batch.winners}
    used |= {each for row in batch.winners for each in row.proven_with.items()}

    def kept(row: Any) -> bool:
        return row.verdict is not Verdict.SAFE or (row.kernel, row.config.hash) in used

    trials = tuple(row for row in batch.trials if kept(row))
    return replace(batch, trials=trials, verifications=tuple(row for row in batch.verifications if kept(row)))


def _lines(report: Report, *, dry: bool) -> Iterator[str]:
    for refusal in report.first[:LISTED]:
        yield f"refused   {refusal.where}: {refusal.reason}"
    if report.refused > LISTED:
        yield f"refused   … and {report.refused - LISTED} more"
    taken = report.taken
    for key in taken.barred if taken else ():
        yield f"bars      the winner of key {short(key)}, which is tuned again at its next use"
    parts = [f"{report.refused} refused"]
    if taken is not None:
        told = [f"{taken.known} would be taken"] if dry else [f"{taken.stored} stored", f"{taken.known} known already"]
        parts = [*told, *parts] + ([f"{taken.lifts} lifts left out"] if taken.lifts else [])
    yield f"{report.source}: {report.read} rows, {', '.join(parts)}"


def _data(report: Report) -> dict[str, object]:
    taken = report.taken
    return {
        "pack": report.source,
        "read": report.read,
        "stored": taken.stored if taken else 0,
        "known": taken.known if taken else 0,
        "lifts": taken.lifts if taken else 0,
        "bars": list(taken.barred) if taken else [],
        "refused": report.refused,
        "refusals": [{"where": each.where, "reason": each.reason} for each in report.first],
    }


def _complain(text: str) -> None:
    from flashbias.cli.text import printable

    print(printable(f"flashbias: {text}"), file=sys.stderr)
