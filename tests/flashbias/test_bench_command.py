"""The benchmark's commands: what they refuse, how a run goes on where it was, and what needs no GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from flashbias.bench import campaign, environment, figures, scoreboard
from flashbias.bench.campaign import measure
from flashbias.bench.compare import DeviceLost
from flashbias.bench.results import Book, Result, Row, Timing
from flashbias.cli import benchmark
from flashbias.errors import FlashBiasError
from flashbias.kernels.problem import GRADIENTS, Shape

CPU = torch.device("cpu")
SHAPE = Shape(batch=1, nheads=1, seqlen_q=12, seqlen_k=12, headdim=8, rank=2, grads=GRADIENTS[:5])
TWO = (SHAPE, SHAPE.model_copy(update={"causal": True}))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the command believe in a GPU: what is tested comes before it uses one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def run(path: Path | None, *names: str, shapes: tuple[Shape, ...] = TWO) -> tuple[list[Result], list[str]]:
    """Measures ``shapes`` on the CPU with the results file ``path``; returns the results and what was told."""
    told: list[str] = []
    return measure(shapes, names, None, Book(path), 1, CPU, told.append), told


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path) -> None:
    """Shapes in the file are not measured again; the others are, and all are given back."""
    path = tmp_path / "results.json"
    first, _ = run(path, "vanilla", "sdpa-concat", shapes=TWO[:1])
    both, told = run(path, "vanilla")
    assert both[0] == first[0]
    assert told[0].startswith("[1/2] B1 H1 S12x12 D8 R2 float16: measured 20")
    assert [row.provider for row in both[1].rows] == ["vanilla"]
    assert list(Book(path)) == both


def test_a_provider_asked_for_later_is_measured_beside_those_before(tmp_path: Path) -> None:
    """Figures are compared within one run, so the shape is measured again with all of them."""
    path = tmp_path / "results.json"
    run(path, "vanilla", shapes=TWO[:1])
    (result,), _ = run(path, "sdpa-concat", shapes=TWO[:1])
    assert [row.provider for row in result.rows] == ["sdpa-concat", "vanilla"]


def test_upstream_that_had_no_folder_is_measured_once_it_has(tmp_path: Path) -> None:
    """The reason kept is not what would be found now."""
    row = Row("upstream", missing="needs --upstream FOLDER")
    assert campaign._settled(row, None)
    assert not campaign._settled(row, tmp_path)
    assert campaign._settled(Row("upstream", missing="upstream has no window"), tmp_path)


def test_who_made_the_gpu_unusable_is_left_out_of_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends, what was measured stays, and the same command goes on without that provider on that shape."""
    path = tmp_path / "results.json"
    honest = campaign.compare

    def dies(shape: Shape, *arguments: object, **more: object) -> Result:
        if shape == TWO[1]:
            raise DeviceLost("vanilla", shape, "an illegal memory access")
        return honest(shape, *arguments, **more)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(campaign, "compare", dies)
        with pytest.raises(DeviceLost, match="vanilla made the GPU unusable"):
            run(path, "vanilla", "sdpa-concat")
    (first, second), _ = run(path, "vanilla", "sdpa-concat")
    assert [row.missing for row in first.rows] == ["", ""]
    assert {row.provider: row.missing for row in second.rows} == {
        "sdpa-concat": "",
        "vanilla": "killed the process that ran it here before",
    }


def test_figures_say_what_they_were_taken_with() -> None:
    """Versions, date, commit of this code, rounds; what is not there is None, and all of it is JSON."""
    found = environment.record(CPU, None, 7)
    assert json.loads(json.dumps(found)) == found
    assert (found["torch"], found["rounds"], found["gpu"]) == (torch.__version__, 7, None)
    assert set(found["peers"]) == {"flash-attn-4", "xformers"}


def test_a_folder_without_git_has_no_commit(tmp_path: Path) -> None:
    """Nor has one inside somebody else's repository."""
    assert environment.commit(tmp_path) is None
    assert environment.commit(Path(__file__).resolve().parent) is None


@pytest.mark.usefixtures("gpu")
def test_packed_sequences_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command refuses them: every provider would time dense calls in their name."""
    (tmp_path / "shapes.json").write_text(f"[{SHAPE.model_copy(update={'varlen': True}).model_dump_json()}]")
    assert benchmark.main([str(tmp_path / "shapes.json")]) == 2
    assert "varlen: packed sequences cannot be compared" in capsys.readouterr().err


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mask", "bool"], "masks are not compared yet"),
        (["--layout", "strided"], "layout: expected aligned, got strided"),
        (["--providers", "ours,sdpa"], "got 'sdpa'"),
        (["--upstream", "/nowhere"], "--upstream: expected a folder with flash_bias_triton.py, got /nowhere"),
        (["--from-json", "/nowhere.json"], "there is no file /nowhere.json"),
    ],
)
def test_wrong_usage_is_refused_before_anything_is_measured(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flag that would be ignored, an unknown provider, a file or folder that is not there: exit code 2."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert benchmark.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("main", [benchmark.main, benchmark.alibi_gpt2])
def test_without_a_gpu_nothing_is_timed(main: object, capsys: pytest.CaptureFixture[str]) -> None:
    """Times of the interpreter are not speeds."""
    assert main([]) == 2  # type: ignore[operator]
    assert "needs a CUDA device" in capsys.readouterr().err


def kept(path: Path, *shapes: Shape, right: bool = True) -> Path:
    """Writes results of ``shapes`` to ``path``."""
    book = Book(path)
    timing = Timing(1.0, 1.0, 1.0, 7, 500.0, 1.0)
    slower = Timing(1.2, 1.2, 1.2, 7, 400.0, 1.2)
    for shape in shapes:
        ours = Row("ours", own=True, forward=timing, backward=timing, right_forward=True, right_backward=right)
        peer = Row("vanilla", forward=slower, backward=slower, right_forward=True, right_backward=True)
        book.add(Result(shape, (ours, peer), {}, "all heads"))
    return path


@pytest.mark.parametrize(("right", "code"), [(True, 0), (False, 1)])
def test_what_was_kept_is_shown_without_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], right: bool, code: int
) -> None:
    """Tables, CSV and the bars come from the file; the exit code says whether ours was right."""
    path = kept(tmp_path / "results.json", *scoreboard.SHAPES, right=right)
    table = tmp_path / "results.csv"
    assert benchmark.main(["--scoreboard", "--from-json", str(path), "--csv", str(table)]) == code
    printed = capsys.readouterr().out
    assert printed.count("### B") == 10
    assert "forward, speed over the best right peer: geometric mean" in printed
    assert len(table.read_text().splitlines()) == 1 + 2 * 10


def test_a_figure_of_each_setting_is_drawn_from_what_was_kept(tmp_path: Path) -> None:
    """One PNG for each setting asked for, named after it where there are two."""
    pytest.importorskip("matplotlib", reason="figures need the extra bench")
    wanted = [*figures.shapes("alibi-gpt2", [256, 512]), *figures.shapes("flash-bias", [256])]
    path = kept(tmp_path / "results.json", *wanted)
    figure = tmp_path / "figure.png"
    assert benchmark.alibi_gpt2(["--from-json", str(path), "--figure", str(figure)]) == 0
    both = ["--setting", "alibi-gpt2", "flash-bias"]
    assert benchmark.alibi_gpt2(["--from-json", str(path), "--figure", str(figure), *both]) == 0
    names = {"figure.png", "figure-alibi-gpt2.png", "figure-flash-bias.png"}
    assert {each.name for each in tmp_path.glob("*.png")} == names


def test_a_figure_without_matplotlib_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody measures for half an hour to learn it."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert benchmark.alibi_gpt2(["--figure", str(tmp_path / "figure.png")]) == 2
    assert "matplotlib cannot be imported" in capsys.readouterr().err


def test_a_device_that_is_lost_is_no_wrong_usage() -> None:
    """It fails the run, with the exit code of a failure."""
    assert issubclass(DeviceLost, FlashBiasError)
    assert not issubclass(DeviceLost, benchmark._misuse())
