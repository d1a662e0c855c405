"""Results survive their files, are told as a reader needs them, and are held against the bars."""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path

import pytest

from flashbias.bench import figures, report, scoreboard
from flashbias.bench.results import Book, Pass, Result, Row, Timing, best_peer, geometric_mean, speed
from flashbias.errors import ArgumentError, FlashBiasError
from flashbias.kernels.problem import GRADIENTS, Shape

SHAPE = Shape(batch=1, nheads=2, seqlen_q=24, seqlen_k=24, headdim=16, rank=3, grads=GRADIENTS[:5])


def row(
    provider: str, forward: float = 1.0, backward: float = 1.0, *, right: bool = True, gradients: bool = True
) -> Row:
    """Returns a row with these times as multiples of ours, which takes 2 ms forward and 4 ms backward."""
    timings = [
        Timing(
            ms=unit * over, p20=unit * over, p80=unit * over, samples=7, tflops=100 / over, over_ours=over, sm_mhz=1980
        )
        for unit, over in ((2.0, forward), (4.0, backward))
    ]
    return Row(
        provider,
        own=provider.startswith("ours"),
        floor=provider.endswith("no-bias"),
        forward=timings[0],
        backward=timings[1],
        errors={"out": 1e-4 if right else None, "dq": 2e-4 if gradients else 1.2},
        right_forward=right,
        right_backward=right and gradients,
    )


def result(*rows: Row, shape: Shape = SHAPE) -> Result:
    """Returns a result with an environment."""
    return Result(shape, rows, {"gpu": "a GPU", "date": "2026-01-01", "commit": None}, "all heads")


FULL = result(
    row("ours"),
    row("ours-no-bias", 0.8, 0.5),
    row("upstream", 2.0, 5.0, gradients=False),
    row("flash4-concat", 1.1, 0.7, gradients=False),
    row("sdpa-concat", 1.2, 1.3),
    row("vanilla", 0.5, 0.5, right=False),
    Row("xformers-concat", missing="xFormers cannot be imported: no | such\nmodule"),
)


@pytest.mark.parametrize(("which", "best"), [("forward", "flash4-concat"), ("backward", "sdpa-concat")])
def test_the_best_peer_is_the_fastest_right_one(which: Pass, best: str) -> None:
    """Neither ours, nor a floor, nor who is wrong in that pass, nor who is missing."""
    found = best_peer(FULL, which)
    assert found is not None
    assert found.provider == best


def test_speeds_are_taken_from_paired_rounds_where_there_are_some() -> None:
    """Without ours beside them the milliseconds decide; without a figure there is no speed."""
    assert speed(FULL, "forward", "flash4-concat", "sdpa-concat") == pytest.approx(1.2 / 1.1)
    assert speed(FULL, "forward", "ours", "xformers-concat") is None
    assert speed(FULL, "forward", "ours", "nobody") is None
    alone = [Row(name, forward=Timing(ms, ms, ms, 1, 1.0)) for name, ms in (("a", 3.0), ("b", 2.0))]
    assert speed(result(*alone), "forward", "b", "a") == 1.5
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert geometric_mean([]) is None


def test_a_file_gives_back_what_was_put_in(tmp_path: Path) -> None:
    """Every figure, reason and crash; a result of the same shape takes the place of the older one."""
    path = tmp_path / "results.json"
    book = Book(path)
    book.add(result(row("ours")))
    book.add(FULL)
    other = SHAPE.model_copy(update={"causal": "bottom_right", "window": (3, 0), "seqlen_q": 7})
    book.add(result(row("ours"), shape=other))
    book.add_crash(other, "upstream")
    again = Book(path)
    assert list(again) == [FULL, result(row("ours"), shape=other)]
    assert again.get(SHAPE) == FULL
    assert (again.crashed(SHAPE), again.crashed(other)) == ([], ["upstream"])
    assert [each.name for each in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("text", ["", "[]", '{"version": 1}', '{"version": 1, "results": [{}], "crashed": []}'])
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path: Path, text: str) -> None:
    """The error names the file and the way out; nothing is written over."""
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ArgumentError, match=r"other\.json.*name another file"):
        Book(path)
    assert path.read_text() == text


def test_a_file_of_another_version_is_refused(tmp_path: Path) -> None:
    """It is not misread."""
    path = tmp_path / "other.json"
    path.write_text('{"version": 99, "results": [], "crashed": []}')
    with pytest.raises(ArgumentError, match=r"expected version 1 .* got 99"):
        Book(path)


def test_the_table_shows_times_errors_and_who_is_no_peer() -> None:
    """A line for each provider: forward and backward apart, TFLOP/s, the multiple of ours, the largest error, the reason."""
    lines = list(report.markdown(FULL))
    split = [[part.strip() for part in line.split("|")[1:-1]] for line in lines]
    cells = {parts[0]: parts[1:] for parts in split if parts}
    assert lines[0] == "### B1 H2 S24x24 D16 R3 float16 on a GPU"
    assert cells["ours"] == ["2.000", "100", "1.00", "4.000", "100", "1.00", "dq 2.0e-04", ""]
    assert cells["flash4-concat"][-2:] == ["dq 1.2e+00", "backward WRONG"]
    assert cells["vanilla"][-2:] == ["out missing or not finite", "WRONG"]
    assert cells["ours-no-bias"][-1] == "another function: no bias"
    assert "| xFormers cannot be imported: no \\| such module" in lines[-5]
    assert lines[-3] == "forward: ours is 1.10x as fast as the best right peer, flash4-concat."
    assert lines[-2] == "backward: ours is 1.30x as fast as the best right peer, sdpa-concat."


def test_a_wrong_result_of_ours_is_no_speed() -> None:
    """Neither the table nor the bars rank ours where it is wrong."""
    wrong = result(row("ours", right=False), row("sdpa-concat", 9.0, 9.0), shape=scoreboard.SHAPES[0])
    assert "forward: ours is WRONG." in list(report.markdown(wrong))
    assert {bar.value for bar in scoreboard.bars([wrong])} == {None}


def test_what_runs_without_a_kernel_is_said() -> None:
    """A time of plain PyTorch under our name is no time of a kernel."""
    eager = row("ours")
    eager.configs = {"all": "eager"}
    assert any("eager: no kernel could be proven |" in line for line in report.markdown(result(eager)))


def test_a_sample_of_heads_is_said() -> None:
    """Who reads the table knows how much of it was judged."""
    sampled = Result(SHAPE, FULL.rows, {}, "3 of 50 heads")
    assert "The oracle judged 3 of 50 heads." in list(report.markdown(sampled))


def test_csv_has_a_line_for_each_provider_and_shape() -> None:
    """Every figure comes back from it; what is missing is empty."""
    file = io.StringIO()
    report.write_csv([FULL], file)
    lines = list(csv.DictReader(io.StringIO(file.getvalue())))
    assert [line["provider"] for line in lines] == [each.provider for each in FULL.rows]
    ours, missing = lines[0], lines[-1]
    assert (float(ours["forward_ms"]), float(ours["backward_over_ours"]), ours["right_backward"]) == (2.0, 1.0, "True")
    assert (ours["seqlen_k"], ours["window"], ours["gpu"], ours["errors"]) == (
        "24",
        "-1,-1",
        "a GPU",
        "out=1.000e-04 dq=2.000e-04",
    )
    assert (missing["forward_ms"], missing["right_forward"]) == ("", "")
    assert missing["missing"].startswith("xFormers cannot be imported")


def test_the_scoreboard_is_ten_shapes() -> None:
    """Each with every gradient, and each another."""
    assert len(set(scoreboard.SHAPES)) == 10
    assert {shape.grads for shape in scoreboard.SHAPES} == {GRADIENTS[:5]}
    third = scoreboard.SHAPES[2]
    assert (third.batch, third.nheads, third.seqlen_q, third.headdim, third.rank) == (1, 50, 16384, 32, 2)
    assert (third.causal, third.dtype) == (True, "float16")


def test_bars_are_ratios_against_peers_upstream_and_no_bias() -> None:
    """Each promise with its figure, its bound and whether it holds."""
    full = scoreboard.SHAPES[4]  # D 64, not causal
    bars = {bar.what: bar for bar in scoreboard.bars([Result(full, FULL.rows)])}
    name = "B2 H16 S8192x8192 D64 R8 bfloat16"
    expected = {
        f"forward, speed over the best right peer: {name}": (1.1, True, "flash4-concat"),
        "forward, speed over the best right peer: geometric mean": (1.1, True, "of 1 shapes"),
        "forward, speed over upstream: geometric mean": (2.0, True, "of 1 shapes, upstream is wrong on 0"),
        f"forward, time over ours without a bias: {name}": (1.25, False, ""),
        f"forward, useful TFLOP/s: {name}": (100, False, ""),
        f"backward, speed over the best right peer: {name}": (1.3, True, "sdpa-concat"),
        "backward, speed over the best right peer: geometric mean": (1.3, True, "of 1 shapes"),
        "backward, speed over upstream: geometric mean": (5.0, True, "of 1 shapes, upstream is wrong on 1"),
        f"backward, time over ours without a bias: {name}": (2.0, False, ""),
        f"backward, useful TFLOP/s: {name}": (100, False, ""),
    }
    assert {what: (pytest.approx(bar.value), bar.holds, bar.remark) for what, bar in bars.items()} == expected
    assert "6 of 10 measured figures hold; 0 were not measured." in list(scoreboard.markdown([Result(full, FULL.rows)]))


def test_our_own_kernels_count_where_the_operator_has_others_too() -> None:
    """The bars are those of Triton alone."""
    rows = (row("ours"), row("ours-triton", 1.5, 1.5), row("sdpa-concat", 3.0, 3.0))
    bars = scoreboard.bars([Result(scoreboard.SHAPES[0], rows)])
    assert bars[0].value == pytest.approx(2.0)
    assert bars[1].what.startswith("forward, tuned choice over the best right peer: ")
    assert bars[1].value == pytest.approx(3.0)


def test_a_run_without_the_peers_that_matter_or_with_slow_ones_is_doubted() -> None:
    """Who reads the bars sees what speaks against them."""
    first = scoreboard.SHAPES[0]
    names = ("ours", "sdpa-concat-cudnn", "flash4-concat", "flash4-concat-padded")
    found = Result(first, tuple(map(row, names)), {"gpu": "NVIDIA H200"})
    name = "B2 H4 S4096x4096 D32 R8 float16"
    assert scoreboard.doubts([found]) == [
        f"{name}: without flex-concat",
        f"{name}, forward: sdpa-concat-cudnn took 2.000 ms, 0.093 ms were known",
        f"{name}, backward: sdpa-concat-cudnn took 4.000 ms, 0.218 ms were known",
    ]
    assert scoreboard.doubts([Result(first, (*found.rows, row("flex-concat")), {"gpu": "another"})]) == []


def growing() -> list[Result]:
    """Returns results of both settings at two lengths, and one of another shape."""
    found = [result(row("ours"))]
    for setting in figures.SETTINGS:
        for length in (512, 256):
            (shape,) = figures.shapes(setting, [length])
            rows = (
                row("ours", 256 / length),
                row("sdpa-no-bias", 0.5),
                row("vanilla", right=False),
                Row("compile", missing="x"),
            )
            found.append(result(*rows, shape=shape))
    return found


def test_curves_are_of_one_setting_in_order_of_length_and_right() -> None:
    """What is wrong or missing has no speed; floors say that they are."""
    curves = figures.curves(growing(), "alibi-gpt2", "forward")
    assert curves == {"ours": [(256, 100.0), (512, 200.0)], "sdpa-no-bias (no bias)": [(256, 200.0), (512, 200.0)]}
    assert [shape.seqlen_q for shape in figures.shapes("flash-bias")] == [256, 512, 1024, 2048, 4096, 8192, 16384]


def test_a_figure_is_drawn_from_results(tmp_path: Path) -> None:
    """A PNG, from what was kept: no GPU is asked."""
    pytest.importorskip("matplotlib", reason="figures need the extra bench")
    figures.draw(growing(), "flash-bias", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(FlashBiasError, match="no result of the setting alibi-gpt2"):
        figures.draw([FULL], "alibi-gpt2", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_without_matplotlib_a_figure_is_refused_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is measured, and with the name of the extra."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(figures.NoMatplotlib, match=r"pip install '\.\[bench\]'"):
        figures.require()
