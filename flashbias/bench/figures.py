"""Figures of speed over sequence length, drawn from results: no GPU is needed to draw one again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from flashbias.bench.results import PASSES, Pass, Result
from flashbias.errors import FlashBiasError
from flashbias.kernels.problem import GRADIENTS, Shape

LENGTHS: Final = tuple(2**power for power in range(8, 15))
# The two settings of upstream's own benchmark.
SETTINGS: Final[Mapping[str, dict[str, Any]]] = {
    "alibi-gpt2": {"batch": 1, "nheads": 50, "headdim": 32, "rank": 2, "causal": True},
    "flash-bias": {"batch": 2, "nheads": 4, "headdim": 32, "rank": 8, "causal": False},
}
_TITLES: Final = {
    "alibi-gpt2": "GPT-2 with ALiBi: batch 1, 50 heads, D 32, R 2, causal, fp16",
    "flash-bias": "batch 2, 4 heads, D 32, R 8, fp16",
}
_SIZE: Final = (13.0, 5.5)


class NoMatplotlib(FlashBiasError):
    """A figure was asked for where matplotlib is not installed."""


def shapes(setting: str, lengths: Sequence[int] = LENGTHS) -> list[Shape]:
    """Returns the shapes of a setting, shortest first."""
    return [
        Shape(seqlen_q=length, seqlen_k=length, dtype="float16", grads=GRADIENTS[:5], **SETTINGS[setting])
        for length in lengths
    ]


def curves(results: Iterable[Result], setting: str, which: Pass) -> dict[str, list[tuple[int, float]]]:
    """Returns (length, TFLOP/s) of each provider that is right, or a floor, by name; wrong figures are no speeds."""
    found: dict[str, list[tuple[int, float]]] = {}
    belonging = [result for result in results if [result.shape] == shapes(setting, [result.shape.seqlen_q])]
    for result in sorted(belonging, key=lambda result: result.shape.seqlen_q):
        for row in result.rows:
            timing = row.timing(which)
            if timing is not None and row.right(which) is not False:
                name = f"{row.provider} (no bias)" if row.floor else row.provider
                found.setdefault(name, []).append((result.shape.seqlen_q, timing.tflops))
    return found


def require() -> None:
    """Raises NoMatplotlib where no figure can be drawn."""
    _matplotlib()


def draw(results: Sequence[Result], setting: str, path: Path) -> None:
    """Writes the setting's figure to ``path``: forward and backward beside each other, TFLOP/s over sequence length.

    Raises NoMatplotlib where it is not installed, and FlashBiasError when no result belongs to the setting.
    """
    figure_class = _matplotlib()
    drawn = {which: curves(results, setting, which) for which in PASSES}
    if not any(drawn.values()):
        raise FlashBiasError(f"figure: no result of the setting {setting} is there to draw; measure it first")
    figure = figure_class(figsize=_SIZE, layout="constrained")
    names = list(dict.fromkeys(name for which in PASSES for name in drawn[which]))
    for axes, which in zip(figure.subplots(1, len(PASSES)), PASSES, strict=True):
        _panel(axes, which, drawn[which], names)
    figure.suptitle(f"{_TITLES[setting]}; {_places(results)}")
    handles = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels())}  # noqa: B905
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize="small")
    figure.savefig(path, format="png", dpi=150)


def _panel(axes: Any, which: Pass, lines: Mapping[str, Sequence[tuple[int, float]]], names: Sequence[str]) -> None:
    """Draws one pass; a provider has the same colour in both, and ours a thick line."""
    for name, points in lines.items():
        number = names.index(name)
        axes.plot(
            *zip(*points, strict=True),
            label=name,
            color=f"C{number % 10}",
            linestyle=("-", "--", ":")[number // 10 % 3],
            linewidth=3.0 if name == "ours" else 1.2,
            marker="o",
            markersize=3,
            zorder=3 if name == "ours" else 2,
        )
    lengths = sorted({length for points in lines.values() for length, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set_xlabel("sequence length")
    axes.set_ylabel("useful TFLOP/s")
    axes.set_ylim(bottom=0)
    axes.set_title(which)
    axes.grid(alpha=0.3)


def _places(results: Sequence[Result]) -> str:
    return ", ".join(sorted({result.environment.get("gpu") or "CPU" for result in results}))


def _matplotlib() -> Any:
    """Returns matplotlib's figure class, which draws without a display."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NoMatplotlib(
            f"figure: matplotlib cannot be imported ({error}); install the extra: pip install '.[bench]'"
        ) from error
    return Figure
