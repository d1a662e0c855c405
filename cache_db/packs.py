"""Packs: the rows of a database as a text that can be reviewed, compared, and kept in version control.

A pack is JSON lines in ASCII: a header, then one row a line, by GPU, spec, Triton, problem, kernel and kind. What is the same
gives the same bytes, wherever it was written. Times, hosts, levels of proof and environments stand in each row; pins, leases
and jobs, which mean something to one user or one moment only, stand in none.

What is read is taken for hostile: each line is bounded, parsed as data, and passes the models and limits here, or is
refused with its number while the others are read on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Final, TextIO

from cache_db import rows
from cache_db.batch import Batch, Shared
from cache_db.errors import PackRefused, RowRefused
from cache_db.models import Lift, Trial, Verdict, Verification, Winner

VERSION: Final = 1
"""The version of the rows in a pack: that of the schema whose columns they are."""

LONGEST: Final = 1 << 20
"""Bytes of the longest line, or stored row, that is looked at; the longest seen has 6,000."""

KINDS: Final[dict[str, type[Shared]]] = {"winner": Winner, "trial": Trial, "verification": Verification, "lift": Lift}
_NAMES: Final = {model: kind for kind, model in KINDS.items()}
_ORDER: Final = list(KINDS)
_HEADER: Final = json.dumps({"pack": "flashbias", "schema_version": VERSION})


@dataclass(frozen=True)
class Refusal:
    """A row that was not taken: ``where`` it stands in its file, and the ``reason``."""

    where: str
    reason: str


def write(batches: Iterable[Batch], stream: TextIO) -> int:
    """Writes a pack of ``batches``, each all rows of one problem, in the order they come; returns how many rows."""
    stream.write(f"{_HEADER}\n")
    count = 0
    for batch in batches:
        found: list[Shared] = [*batch.winners, *batch.trials, *batch.verifications, *batch.lifts]
        keyed = sorted((row.kernel, _ORDER.index(_NAMES[type(row)]), row.config.hash, line(row)) for row in found)
        stream.writelines(f"{each[-1]}\n" for each in keyed)
        count += len(keyed)
    return count


def line(row: Shared) -> str:
    """Returns the one text of ``row``, in ASCII: nothing in it can recolour, reorder or hide what a reviewer sees."""
    data = row.model_dump()
    data["problem"] = data.pop("problem")  # last: it is what the lines of a problem have in common
    return _dump({"kind": _NAMES[type(row)], **data})


def parse(text: bytes) -> Shared:
    """Returns the row that ``text`` is. Raises RowRefused."""
    try:
        data = _parse(text)
        model = KINDS[data.pop("kind")]
        if "verdict" in data:
            data["verdict"] = Verdict(data["verdict"])
        if isinstance(data.get("figures"), dict):
            figures = data["figures"].items()
            data["figures"] = {name: math.nan if value is None else value for name, value in figures}
        row = model.model_validate(data)
        rows.encode(row)  # its hashes: what cannot be named cannot be stored
        json.dumps(data, ensure_ascii=False, default=str).encode()  # nor can half a surrogate pair
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise RowRefused(rows.first_line(error)) from error
    return row


def read(stream: BinaryIO) -> Iterator[Shared | Refusal]:
    """Yields each row of a pack, or why it is none.

    Raises PackRefused where the first line is no header, or that of a newer version.
    """
    number = 0
    while text := stream.readline(LONGEST + 1):
        number += 1
        if len(text) > LONGEST:
            _first(number, None)  # before the rest is passed over: /dev/zero has no end
            while text and not text.endswith(b"\n"):
                text = stream.readline(LONGEST)
            yield Refusal(f"line {number}", f"longer than {LONGEST} bytes")
        elif number == 1:
            _first(number, text)
        elif text.strip() and text.strip().decode("utf-8", "replace") != _HEADER:  # packs may have been joined
            try:
                yield parse(text)
            except RowRefused as error:
                yield Refusal(f"line {number}", str(error))


def _first(number: int, text: bytes | None) -> None:
    """Raises PackRefused unless the first line, ``text``, is a header of ours; None is a line too long to be one."""
    if number > 1:
        return
    try:
        header = _parse(text or b"")
        ours, version = header.get("pack") == "flashbias", header.get("schema_version")
    except (ValueError, TypeError, RecursionError, AttributeError):
        ours, version = False, None
    if not ours:
        raise PackRefused(f"it is no pack: its first line should be {_HEADER}")
    if version != VERSION:
        raise PackRefused(
            f"it is of schema version {str(version)[:20]}, this library reads {VERSION}: upgrade flashbias, or export it again"
        )


def _parse(text: bytes) -> dict[str, Any]:
    found = json.loads(text.decode(), parse_constant=_no_number, object_pairs_hook=_once)
    if not isinstance(found, dict):
        raise TypeError(f"expected a JSON object, got a {type(found).__name__}")
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuses a name that stands twice: a reviewer may read the one that is not used."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _dump(values: Mapping[str, Any]) -> str:
    """Returns JSON with the names of inner maps in order; inf is 1e999 and NaN null, as in the database."""
    parts = (f"{json.dumps(name)}: {_value(value)}" for name, value in values.items())
    return "{" + ", ".join(parts) + "}"


def _value(value: Any) -> str:
    return _dump(dict(sorted(value.items()))) if isinstance(value, dict) else rows.scalar(value)
