"""What was measured, as plain data: rows, the shapes they belong to, and the file that keeps them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, Self

from flashbias.errors import ArgumentError
from flashbias.kernels.problem import Shape

Pass = Literal["forward", "backward"]
PASSES: Final[tuple[Pass, Pass]] = ("forward", "backward")
VERSION: Final = 1
OURS: Final = "ours"


@dataclass(frozen=True)
class Timing:
    """One pass of one provider: milliseconds (median and quantiles) of ``samples`` rounds, and useful TFLOP/s.

    ``over_ours`` is the median, over rounds, of its time as a multiple of ours in the same round; None where ours did not
    run. ``sm_mhz`` is the clock and ``throttled`` the number of rounds that were dropped, of all who ran beside it.
    """

    ms: float
    p20: float
    p80: float
    samples: int
    tflops: float
    over_ours: float | None = None
    sm_mhz: int | None = None
    throttled: int = 0


@dataclass
class Row:
    """One provider on one shape.

    ``errors`` are relative to the oracle, of ``out`` and each gradient; None is no finite number, or no gradient. Right is
    None where nothing was judged. ``missing`` says why it did not run, ``missing_backward`` the same of its backward.
    A ``floor`` leaves out the bias and is judged by the oracle without it. ``configs`` says what ran by kernel.
    """

    provider: str
    own: bool = False
    floor: bool = False
    forward: Timing | None = None
    backward: Timing | None = None
    errors: dict[str, float | None] = field(default_factory=dict)
    right_forward: bool | None = None
    right_backward: bool | None = None
    missing: str = ""
    missing_backward: str = ""
    configs: dict[str, str] = field(default_factory=dict)

    def timing(self, which: Pass) -> Timing | None:
        """Returns the figures of one pass."""
        return self.forward if which == "forward" else self.backward

    def right(self, which: Pass) -> bool | None:
        """Returns whether what the pass computes is right: a backward is not behind a wrong forward."""
        return self.right_forward if which == "forward" else self.right_backward

    def ranked(self, which: Pass) -> bool:
        """Returns whether it is a peer to be compared with in this pass: it ran, and it is the same function."""
        return self.timing(which) is not None and self.right(which) is not False and not (self.own or self.floor)

    @classmethod
    def of(cls, data: dict[str, Any]) -> Self:
        """Rebuilds what ``asdict`` made."""
        timings: dict[str, Any] = {name: Timing(**data[name]) if data[name] else None for name in PASSES}
        return cls(**{**data, **timings})


@dataclass(frozen=True)
class Result:
    """All providers on one shape; ``judged`` says how much of it the oracle looked at."""

    shape: Shape
    rows: tuple[Row, ...]
    environment: dict[str, Any] = field(default_factory=dict)
    judged: str = ""

    def row(self, provider: str) -> Row | None:
        """Returns the provider's row, None if it was not asked for."""
        return next((row for row in self.rows if row.provider == provider), None)

    def to_json(self) -> dict[str, Any]:
        """Returns plain data."""
        rows = [asdict(row) for row in self.rows]
        shape = self.shape.model_dump(mode="json")
        return {"shape": shape, "judged": self.judged, "environment": self.environment, "rows": rows}

    @classmethod
    def of(cls, data: dict[str, Any]) -> Self:
        """Rebuilds what :meth:`to_json` made."""
        shape = Shape.model_validate_json(json.dumps(data["shape"]))
        return cls(shape, tuple(map(Row.of, data["rows"])), data["environment"], data["judged"])


def best_peer(result: Result, which: Pass) -> Row | None:
    """Returns the fastest right peer of one pass, beside ours where times are paired; None without any."""

    def time(row: Row) -> float:
        timing = row.timing(which)
        assert timing is not None
        return timing.ms if timing.over_ours is None else timing.over_ours

    peers = [row for row in result.rows if row.ranked(which)]
    paired = [row for row in peers if (timing := row.timing(which)) and timing.over_ours is not None]
    return min(paired or peers, key=time, default=None)


def speed(result: Result, which: Pass, provider: str, other: str) -> float | None:
    """Returns how many times as fast as ``other`` the ``provider`` is, None where either has no figure."""
    rows = result.row(provider), result.row(other)
    mine, theirs = (None if row is None else row.timing(which) for row in rows)
    if mine is None or theirs is None:
        return None
    if mine.over_ours is not None and theirs.over_ours is not None:
        return theirs.over_ours / mine.over_ours
    return theirs.ms / mine.ms


def geometric_mean(values: Sequence[float]) -> float | None:
    """Returns the geometric mean, None of nothing."""
    return math.exp(math.fsum(map(math.log, values)) / len(values)) if values else None


class Book:
    """Results by shape, and whom a crash of the process was traced to; kept in a JSON file if there is one.

    The file is written whole after each shape, so a run that was stopped goes on where it was.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._results: dict[Shape, Result] = {}
        self._crashed: dict[Shape, list[str]] = {}
        if path is not None and path.exists():
            self._read(path)

    def __iter__(self) -> Iterator[Result]:
        return iter(self._results.values())

    def get(self, shape: Shape) -> Result | None:
        """Returns what is known of ``shape``."""
        return self._results.get(shape)

    def add(self, result: Result) -> None:
        """Keeps ``result``, in the place of an older one of its shape."""
        self._results[result.shape] = result
        self._write()

    def crashed(self, shape: Shape) -> list[str]:
        """Returns the providers that made the GPU unusable on ``shape``."""
        return self._crashed.get(shape, [])

    def add_crash(self, shape: Shape, provider: str) -> None:
        """Remembers that ``provider`` must not run on ``shape``."""
        self._crashed.setdefault(shape, []).append(provider)
        self._write()

    def _read(self, path: Path) -> None:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            version = data["version"]
            if version == VERSION:
                self._results = {result.shape: result for result in map(Result.of, data["results"])}
                for entry in data["crashed"]:
                    self._crashed[Shape.model_validate_json(json.dumps(entry["shape"]))] = entry["providers"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArgumentError(
                f"{path}: cannot be read as a benchmark's results ({type(error).__name__}: {error}); name another file"
            ) from error
        if version != VERSION:
            raise ArgumentError(f"{path}: expected version {VERSION} of a benchmark's results, got {version}")

    def _write(self) -> None:
        if self._path is None:
            return
        crashed = [
            {"shape": shape.model_dump(mode="json"), "providers": names} for shape, names in self._crashed.items()
        ]
        data = {"version": VERSION, "results": [result.to_json() for result in self], "crashed": crashed}
        # Replaced, not written over: a machine that goes away meanwhile leaves the results before.
        fresh = self._path.with_name(f"{self._path.name}.new")
        fresh.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        fresh.replace(self._path)
