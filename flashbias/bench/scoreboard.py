"""The ten shapes on which ours is measured against its peers, and the bars it has to clear there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from flashbias.bench.campaign import title
from flashbias.bench.report import table
from flashbias.bench.results import OURS, PASSES, Pass, Result, best_peer, geometric_mean, speed
from flashbias.kernels.problem import GRADIENTS, Shape

_WANTED: Final = GRADIENTS[:5]


def _shape(batch: int, heads: int, length: int, dim: int, rank: int, dtype: Any, *, causal: bool = False) -> Shape:
    return Shape(
        batch=batch,
        nheads=heads,
        seqlen_q=length,
        seqlen_k=length,
        headdim=dim,
        rank=rank,
        dtype=dtype,
        causal=causal,
        grads=_WANTED,
    )


SHAPES: Final = (
    _shape(2, 4, 4096, 32, 8, "float16"),
    _shape(2, 4, 16384, 32, 8, "float16"),
    _shape(1, 50, 16384, 32, 2, "float16", causal=True),
    _shape(2, 16, 8192, 64, 8, "bfloat16", causal=True),
    _shape(2, 16, 8192, 64, 8, "bfloat16"),
    _shape(2, 16, 8192, 128, 8, "bfloat16", causal=True),
    _shape(2, 16, 8192, 128, 16, "bfloat16"),
    _shape(256, 24, 576, 32, 16, "float16"),
    _shape(1, 16, 2048, 32, 96, "bfloat16"),
    _shape(1, 8, 32768, 16, 9, "float16"),
)
# The best right peer's milliseconds, forward and backward, as measured on an H200 with torch 2.11 on 2026-11-22.
_KNOWN_GPU: Final = "H200"
_KNOWN_MS: Final[tuple[dict[Pass, float], ...]] = tuple(
    {"forward": forward, "backward": backward}
    for forward, backward in (
        (0.093, 0.218),
        (0.962, 2.479),
        (3.141, 7.798),
        (0.727, 1.838),
        (1.218, 3.398),
        (1.151, 3.728),
        (1.886, 7.018),
        (1.830, 4.601),
        (0.073, 0.223),
        (3.218, 6.839),
    )
)
_SLOWER: Final = 1.1
# Without these, nobody knows how fast the best peer is.
_NEEDED: Final = ("sdpa-concat-cudnn", "flash4-concat", "flash4-concat-padded", "flex-concat")
# The tuner's choice among all implementations may lose this much to a peer that it could have chosen: noise.
_TUNED: Final = 0.98
# The least speed, as a multiple of the best right peer's: of each shape, and of their geometric mean.
_EACH: Final[dict[Pass, float]] = {"forward": 1.0, "backward": 0.9}
_MEAN: Final[dict[Pass, float]] = {"forward": 1.05, "backward": 1.0}
_UPSTREAM: Final[dict[Pass, float]] = {"forward": 1.8, "backward": 4.0}
# The most time with a bias of rank 16 or less, as a multiple of that without: at D = 32, and from D = 64 on.
_BIAS: Final[dict[Pass, tuple[float, float]]] = {"forward": (1.25, 1.15), "backward": (1.35, 1.20)}
_BIAS_RANK: Final = 16
# The least useful TFLOP/s of full attention by head dim.
_TFLOPS: Final[dict[Pass, dict[int, float]]] = {"forward": {64: 440, 128: 560}, "backward": {64: 370, 128: 400}}


@dataclass(frozen=True)
class Bar:
    """One promise: what was measured (None: it was not) and the bound it has to keep."""

    what: str
    value: float | None
    bound: float
    least: bool = True
    remark: str = ""

    @property
    def holds(self) -> bool | None:
        """Whether the promise is kept; None where nothing was measured."""
        if self.value is None:
            return None
        return self.value >= self.bound if self.least else self.value <= self.bound


def bars(results: Sequence[Result]) -> list[Bar]:
    """Returns every promise about the results: against the best right peer, upstream, no bias, and in TFLOP/s.

    They are of our own kernels: of "ours-triton" where the operator has others to choose from. A wrong result of ours is
    no figure.
    """
    found = []
    for which in PASSES:
        found += [*_against_peers(results, which), *_against_upstream(results, which)]
        found += [*_cost_of_bias(results, which), *_useful(results, which)]
    return found


def _ours(result: Result, which: Pass) -> str:
    """Returns the provider whose figures count; "" where it is not right."""
    row = result.row("ours-triton") or result.row(OURS)
    return "" if row is None or row.missing or row.right(which) is False else row.provider


def _against_peers(results: Iterable[Result], which: Pass) -> Iterator[Bar]:
    ratios = []
    for result in results:
        best = best_peer(result, which)
        ratio = None if best is None else speed(result, which, _ours(result, which), best.provider)
        remark = "no right peer" if best is None else best.provider
        yield Bar(f"{which}, speed over the best right peer: {title(result.shape)}", ratio, _EACH[which], remark=remark)
        ratios += [] if ratio is None else [ratio]
        if result.row("ours-triton") and result.row(OURS):
            tuned = None if best is None else speed(result, which, OURS, best.provider)
            yield Bar(
                f"{which}, tuned choice over the best right peer: {title(result.shape)}", tuned, _TUNED, remark=remark
            )
    remark = f"of {len(ratios)} shapes"
    yield Bar(
        f"{which}, speed over the best right peer: geometric mean", geometric_mean(ratios), _MEAN[which], remark=remark
    )


def _against_upstream(results: Iterable[Result], which: Pass) -> Iterator[Bar]:
    found = [(result, speed(result, which, _ours(result, which), "upstream")) for result in results]
    ratios = [ratio for _, ratio in found if ratio is not None]
    wrong = sum(ratio is not None and _wrong(result, which) for result, ratio in found)
    remark = f"of {len(ratios)} shapes, upstream is wrong on {wrong}"
    yield Bar(f"{which}, speed over upstream: geometric mean", geometric_mean(ratios), _UPSTREAM[which], remark=remark)


def _wrong(result: Result, which: Pass) -> bool:
    row = result.row("upstream")
    return row is not None and row.right(which) is False


def _cost_of_bias(results: Iterable[Result], which: Pass) -> Iterator[Bar]:
    for result in results:
        shape = result.shape
        if 0 < shape.rank <= _BIAS_RANK and shape.headdim >= 32:
            bound = _BIAS[which][shape.headdim >= 64]
            cost = speed(result, which, "ours-no-bias", _ours(result, which))
            yield Bar(f"{which}, time over ours without a bias: {title(shape)}", cost, bound, least=False)


def _useful(results: Iterable[Result], which: Pass) -> Iterator[Bar]:
    for result in results:
        shape = result.shape
        if shape.causal or shape.headdim not in _TFLOPS[which] or shape.seqlen_q != 8192:
            continue
        row = result.row(_ours(result, which))
        timing = None if row is None else row.timing(which)
        bound = _TFLOPS[which][shape.headdim]
        yield Bar(f"{which}, useful TFLOP/s: {title(shape)}", None if timing is None else timing.tflops, bound)


def markdown(results: Sequence[Result]) -> Iterator[str]:
    """Yields the table of all bars, and how many hold."""
    found = bars(results)
    yield "### What must hold"
    yield ""
    yield from table(("figure", "measured", "bar", "holds", ""), [_cells(bar) for bar in found])
    yield ""
    kept, known = sum(bar.holds is True for bar in found), sum(bar.holds is not None for bar in found)
    yield f"{kept} of {known} measured figures hold; {len(found) - known} were not measured."
    for doubt in doubts(results):
        yield f"* {doubt}"


def doubts(results: Iterable[Result]) -> list[str]:
    """Returns what speaks against a run: peers that have to be there and did not run, and peers slower than they were."""
    found = []
    for result in results:
        rows = {row.provider: row for row in result.rows if not row.missing}
        absent = [name for name in _NEEDED if name not in rows]
        if absent:
            found.append(f"{title(result.shape)}: without {', '.join(absent)}")
        if result.shape in SHAPES and _KNOWN_GPU in (result.environment.get("gpu") or ""):
            known = _KNOWN_MS[SHAPES.index(result.shape)]
            found += [
                f"{title(result.shape)}, {which}: {best.provider} took {timing.ms:.3f} ms, {known[which]:.3f} ms were known"
                for which in PASSES
                if (best := best_peer(result, which)) is not None
                and (timing := best.timing(which)) is not None
                and timing.ms > _SLOWER * known[which]
            ]
    return found


def _cells(bar: Bar) -> list[str]:
    measured = "–" if bar.value is None else f"{bar.value:.3g}"
    holds = {True: "yes", False: "NO", None: "–"}[bar.holds]
    return [bar.what, measured, f"{'≥' if bar.least else '≤'} {bar.bound:g}", holds, bar.remark]
