"""``flashbias explain`` and ``flashbias.explain``: what they say of a call is what the call then does."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import autotune
import flashbias
from autotune.device import describe, interpreting
from cache_db.models import Problem, Trial, Verdict, Winner
from cache_db.store import Store
from flashbias import explain, flash_bias_func, plans
from flashbias.cli.main import main
from flashbias.errors import ArgumentError, UnsupportedError
from flashbias.kernels import arguments
from flashbias.kernels.problem import Shape
from flashbias.kernels.problem import problem as problem_of
from flashbias.kernels.spec import ATTENTION
from tests.scripts.command_cases import python

needs_kernels = pytest.mark.skipif(
    not interpreting(), reason="runs kernels in Triton's interpreter (TRITON_INTERPRET=1)"
)
DEVICE = describe(-1)
FLAGS = ["--nheads", "1", "--seqlen-q", "40", "--headdim", "16", "--rank", "4", "--grads", "none", "--causal", "true"]
SHAPE = Shape(batch=1, nheads=1, seqlen_q=40, seqlen_k=40, headdim=16, rank=4, causal=True)


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    """Makes a test start, and leave, like a new process."""
    autotune.forget()
    plans.forget()
    yield
    autotune.forget()
    plans.forget()


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    """A folder whose database has the spec's default as winner of every kernel of ``SHAPE``, with and without gradients."""
    store = Store.open(tmp_path / "flashbias.db")
    wanted = Shape(**{**SHAPE.model_dump(), "grads": ("q", "k", "v", "q_bias", "k_bias")})
    for shape in (SHAPE, wanted):
        problem, before = problem_of(shape, DEVICE), {}
        for kernel in ATTENTION.kernels(problem):
            row = trial(problem, kernel, before)
            store.add_trial(row)
            store.put_winner(winner(row))
            before[kernel] = row.config.hash
    return tmp_path


def trial(problem: Problem, kernel: str, before: dict[str, str]) -> Trial:
    """Returns a row as a sweep stores it, behind the configs ``before`` that the kernel needs."""
    return Trial(
        problem=problem,
        kernel=kernel,
        config=ATTENTION.default(kernel, problem, DEVICE),
        verdict=Verdict.SAFE,
        level=2,
        figures={"ms": 0.5, "out_error": 0.001, "out_ratio": 0.25, "worst_case": "ragged", "repeats": 300},
        proven_with={name: before[name] for name in ATTENTION.depends_on(kernel, problem)},
        environment=DEVICE.environment,
        gpu_uuid="",
        host="node-7",
        created_at=time.time(),
        seconds=1.0,
    )


def winner(row: Trial) -> Winner:
    """Returns the winner's row of ``row``."""
    names = ("problem", "kernel", "config", "level", "proven_with", "binary", "environment", "created_at")
    return Winner(**{name: getattr(row, name) for name in names}, ms=0.5, tried=3, total=3, complete=True)


def tensors(*, grads: bool = False) -> list[torch.Tensor]:
    """Returns q, k, v, q_bias and k_bias of ``SHAPE``."""
    made = [torch.randn(1, 40, 1, size, dtype=torch.float16) for size in (16, 16, 16, 4, 4)]
    return [each.requires_grad_(grads) for each in made]


def command(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> tuple[int, str, str]:
    """Runs ``flashbias explain``; returns exit code, stdout and stderr."""
    try:
        code = main(["explain", "--cache-dir", str(folder), *arguments])
    except SystemExit as error:
        code = int(str(error.code))
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@needs_kernels
class TestFunction:
    """``flashbias.explain``, with the operator's own arguments."""

    @pytest.mark.parametrize("grads", [False, True])
    def test_a_stored_winner_is_told_and_runs(self, tuned: Path, grads: bool) -> None:
        """Rung, level, errors, who and when; then the operator runs exactly that, in a mode that forbids anything else."""
        inputs = tensors(grads=grads)
        before = (tuned / "flashbias.db").read_bytes()
        with flashbias.settings(mode="assert", cache_dir=tuned):
            found = explain(*inputs, causal=True)
            assert (found.rung, found.proven) == ("winner", True)
            text = str(found)
            for part in ("level 2 (gate), holds here", "out 1.0e-03 (25% of its budget)", "on case 'ragged'", "node-7"):
                assert part in text
            out = flash_bias_func(*inputs, causal=True)
            assert out.isfinite().all()
            after = explain(*inputs, causal=True)
        assert "this process has decided so" in str(after)
        assert [each["config"] for each in after.to_json()["kernels"]] == [
            each["config"] for each in found.to_json()["kernels"]
        ]
        kernels = [each["kernel"] for each in found.to_json()["kernels"]]
        assert kernels == (["forward", "backward_dq", "backward_dkdv"] if grads else ["forward"])
        assert (tuned / "flashbias.db").read_bytes() == before

    def test_kernels_that_this_process_cannot_compile_are_told(
        self, tuned: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What is proven but does not compile here runs eager, and that is what is explained afterwards, there alone."""

        def full(*_arguments: object) -> None:
            raise OSError("No space left on device")

        with flashbias.settings(mode="assert", cache_dir=tuned):
            with monkeypatch.context() as patch:
                patch.setattr(arguments, "compile_kernel", full)
                flash_bias_func(*tensors(), causal=True)
            found = explain(*tensors(), causal=True)
            assert (found.rung, found.proven) == ("eager", False)
            assert "forward is not used: it cannot be compiled here (No space left on device)" in str(found)
        with flashbias.settings(mode="read", cache_dir=tuned):
            assert explain(*tensors(), causal=True).proven
        plans.forget()
        with flashbias.settings(mode="assert", cache_dir=tuned):
            assert explain(*tensors(), causal=True).proven

    def test_no_grad_asks_for_the_forward_alone(self, tuned: Path) -> None:
        """Which gradients are wanted is what the call would want."""
        with flashbias.settings(mode="assert", cache_dir=tuned), torch.no_grad():
            found = explain(*tensors(grads=True), causal=True).to_json()
        assert [each["kernel"] for each in found["kernels"]] == ["forward"]

    def test_a_miss_names_the_nearest_rows_and_what_differs(self, tuned: Path) -> None:
        """The fields that keep the stored winner from serving are named, with what a call would do."""
        with flashbias.settings(mode="tune", cache_dir=tuned, budget_seconds=7):
            found = explain(*tensors(), causal=False)
        assert (found.rung, found.proven) == ("none", False)
        assert 'mode "tune": a call tunes it first, ' in str(found)
        assert "at most 7 s" in str(found)
        assert "nearest   " in str(found)
        (near, *_) = found.to_json()["nearest"]
        assert near["differs"] == {"causal": {"there": True, "wanted": False}}

    @pytest.mark.parametrize("place", ["absent", "empty", "damaged", "none"])
    def test_no_database_is_no_error_and_none_is_made(self, tmp_path: Path, place: str) -> None:
        """Whatever is wrong with it, the answer says so, and what was there is there still."""
        file = tmp_path / "flashbias.db"
        if place in ("empty", "damaged"):
            file.write_bytes(b"garbage" * 1000 if place == "damaged" else b"")
        before = [(each.name, each.read_bytes()) for each in tmp_path.iterdir()]
        with flashbias.settings(mode="read", cache_dir=None if place == "none" else tmp_path):
            found = explain(*tensors(), causal=True)
        assert (found.rung, found.proven) == ("default", False)
        told = {
            "absent": "which is not there",
            "empty": "which is empty",
            "damaged": "cannot be read",
            "none": "memory",
        }
        assert told[place] in found.to_json()["database"]
        assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == before

    def test_layout_is_that_of_the_tensors_as_kernels_see_them(self, tuned: Path) -> None:
        """An odd pointer is another problem; rows with gaps are copied, and the copy is aligned."""
        _, k, v, q_bias, k_bias = tensors()
        odd = torch.empty(1 * 40 * 16 + 1, dtype=torch.float16)[1:].view(1, 40, 1, 16)
        gaps = torch.empty(1, 40, 1, 32, dtype=torch.float16)[..., ::2]
        with flashbias.settings(mode="read", cache_dir=tuned):
            assert explain(odd, k, v, q_bias, k_bias, causal=True).to_json()["problem"]["layout"] == "strided"
            assert explain(gaps, k, v, q_bias, k_bias, causal=True).proven

    def test_arguments_are_checked_as_the_operator_does(self) -> None:
        """What the operator refuses is refused with the same error."""
        q, k, v, q_bias, _ = tensors()
        for call in (explain, flash_bias_func):
            with pytest.raises(ArgumentError, match="k_bias"):
                call(q, k, v, q_bias)
            with pytest.raises(UnsupportedError, match="dropout"):
                call(q, k, v, dropout_p=0.5)
        wanted = inspect.signature(flash_bias_func).parameters
        assert [str(each) for each in inspect.signature(explain).parameters.values()] == [
            str(each) for each in wanted.values()
        ]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float64}, "there is no kernel for float64 here" if interpreting() else "kernels run on CUDA"),
        ({"device": "meta"}, "the tensors are on meta, and kernels run on CUDA devices"),
        ({"size": 0}, "a dim is empty"),
    ],
)
def test_calls_without_kernels_say_why(changes: dict[str, Any], reason: str) -> None:
    """PyTorch answers them, and the reason is named, as words and as data."""
    values = {"dtype": torch.float16, "device": "cpu", "size": 8} | changes
    size = values.pop("size")
    q, k, v = (torch.empty(1, size, 1, 16, **values) for _ in range(3))
    found = explain(q, k, v)
    assert (found.rung, found.proven) == ("eager", False)
    assert reason in str(found)
    assert found.to_json() == {"rung": "eager", "proven": False, "reason": found.reason}


@needs_kernels
class TestCommand:
    """``flashbias explain``, with the flags of prewarm."""

    def test_exit_code_says_whether_all_is_tuned(self, tuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """0 where every shape has a proven winner here, 1 where one has not; words on stdout, nothing on stderr."""
        code, output, errors = command(capsys, tuned, *FLAGS)
        assert (code, errors) == (0, "")
        assert "answer    winner: " in output
        code, output, errors = command(capsys, tuned, *FLAGS, "--batch", "1", "700")
        assert (code, errors) == (1, "")
        assert output.count("problem   ") == 2
        assert "answer    none yet" in output

    def test_json_holds_a_row_for_each_shape(self, tuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A program gets shape, rung, configs with levels and margins, and what a call does."""
        code, output, _ = command(capsys, tuned, *FLAGS, "--json")
        (row,) = json.loads(output)["rows"]
        assert code == 0
        assert row["shape"]["headdim"] == 16
        assert (row["rung"], row["doing"], row["mode"]) == ("winner", "nothing", "tune")
        (kernel,) = row["kernels"]
        assert (kernel["level"], kernel["due_level"], kernel["ms"]) == (2, 0, 0.5)
        assert kernel["margins"] == {"out": {"error": 0.001, "budget_part": 0.25}}
        assert kernel["tuned"]["host"] == "node-7"
        assert kernel["key"] == problem_of(SHAPE, DEVICE).key("forward")

    def test_no_database_is_made(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A miss without any database is told, and leaves no file and no folder."""
        code, output, _ = command(capsys, tmp_path / "none", *FLAGS)
        assert code == 1
        assert "which is not there" in output
        assert "nearest   none" in output
        assert not (tmp_path / "none").exists()

    @pytest.mark.parametrize(
        ("wrong", "expected"),
        [
            (["--headdim", "1000"], "less than or equal to 256, got 1000"),
            (["--dtype", "int8"], "got 'int8'"),
            (["no-such-file.json"], "cannot be read"),
            (["--frobnicate"], "unrecognized arguments: --frobnicate"),
        ],
    )
    def test_wrong_shapes_end_with_2(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: list[str], expected: str
    ) -> None:
        """What is no shape is wrong usage, and says what was expected."""
        code, output, errors = command(capsys, tmp_path, *wrong)
        assert (code, output) == (2, "")
        assert expected in errors


def test_help_lists_the_shapes_flags_and_others_need_no_torch() -> None:
    """The flags that only modules with torch know are added when this command is asked for, and at no other time."""
    code = "import sys; from flashbias.cli.main import main; main(sys.argv[1:])"
    assert "--seqlen-q" in python("-c", code, "explain", "--help").stdout
    code = f"import sys\ntry:\n    {code[12:]}\nexcept SystemExit:\n    print('torch' in sys.modules)"
    assert python("-c", code, "--help").stdout.endswith("False\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_device_it_says_so(tmp_path: Path) -> None:
    """There is nothing to explain where nothing runs: exit code 1, with the ways out."""
    done = python("-m", "flashbias", "explain", *FLAGS, "--cache-dir", str(tmp_path), TRITON_INTERPRET="")
    assert (done.returncode, done.stdout) == (1, "")
    assert "no CUDA device found" in done.stderr
