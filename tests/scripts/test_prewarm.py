"""scripts/prewarm.py, run for real: flags, files, exit codes, and a run that was killed."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from autotune import Settings
from autotune.device import describe
from cache_db import Pin, Problem, open_layers
from flashbias.cli import prewarm, shapes
from flashbias.cli.guard import MISUSED
from flashbias.errors import ArgumentError
from flashbias.kernels.problem import GRADIENTS, Shape, problem
from tests.autotune.planted_spec import planted_problem
from tests.autotune.softmax_spec import softmax_config

ROOT = Path(__file__).resolve().parents[2]
GOOD = '{"batch": 1, "nheads": 2, "headdim": 32, "seqlen_q": 8}'
SMALL = ["--nheads", "1", "--seqlen-q", "40", "--headdim", "16", "--rank", "2"]


def start(folder: Path, *arguments: str, interpret: str = "1") -> subprocess.Popen[str]:
    """Starts the script as a user would, in another directory, with its database in ``folder``."""
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "FLASHBIAS_CACHE_DIR": str(folder)}
    environment.pop("PYTHONPATH", None)
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "prewarm.py"), *arguments],
        env=environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder: Path, *arguments: str, interpret: str = "1") -> tuple[int, str, str]:
    """Returns exit code, stdout and stderr of a whole run."""
    process = start(folder, *arguments, interpret=interpret)
    output, errors = process.communicate(timeout=170)
    return process.returncode, output, errors


def parse(*flags: str) -> list[Shape]:
    """Returns the shapes that ``flags`` mean."""
    parser = argparse.ArgumentParser()
    shapes.add_arguments(parser)
    return shapes.from_arguments(parser.parse_args(flags))


def test_flags_mean_every_combination() -> None:
    """Two batches and three lengths are six shapes, each with as many keys as queries."""
    found = parse("--batch", "1", "2", "--seqlen-q", "10", "20", "30", "--headdim", "32", "--rank", "3")
    assert [(each.batch, each.seqlen_q) for each in found] == [(1, 10), (1, 20), (1, 30), (2, 10), (2, 20), (2, 30)]
    assert all(each.seqlen_k == each.seqlen_q and each.headdim == 32 for each in found)


def test_flags_reach_every_field() -> None:
    """Each flag sets the field of its name."""
    (found,) = parse(
        *(
            [
                "--batch",
                "3",
                "--nheads",
                "5",
                "--seqlen-q",
                "7",
                "--seqlen-k",
                "9",
                "--headdim",
                "32",
                "--value-dim",
                "64",
                "--rank",
                "4",
            ]
        ),
        *(["--dtype", "bfloat16", "--mask", "bool", "--layout", "strided", "--causal", "true", "--grads", "q,k"]),
    )
    expected = {"batch": 3, "nheads": 5, "seqlen_q": 7, "seqlen_k": 9, "headdim": 32, "value_dim": 64, "rank": 4}
    expected |= {"dtype": "bfloat16", "mask": "bool", "layout": "strided", "causal": True}
    assert {name: getattr(found, name) for name in expected} == expected
    assert set(found.grads) == {"q", "k"}


@pytest.mark.parametrize(("word", "expected"), [("all", set(GRADIENTS[:5])), ("none", set())])
def test_gradients_may_be_all_or_none(word: str, expected: set[str]) -> None:
    """The two common wishes have words."""
    (found,) = parse("--grads", word)
    assert set(found.grads) == expected


def test_toml_and_json_files_mean_the_same(tmp_path: Path) -> None:
    """The same shapes read from either format are equal."""
    sizes = {"batch": 1, "nheads": 2, "headdim": 32}
    entries = [{**sizes, "seqlen_q": 64, "dtype": "bfloat16", "grads": ["q"]}, {**sizes, "seqlen_q": 65}]
    tables = ["\n".join(f"{name} = {json.dumps(value)}" for name, value in entry.items()) for entry in entries]
    (tmp_path / "a.toml").write_text("".join(f"[[shape]]\n{table}\n" for table in tables))
    text = json.dumps(entries)
    (tmp_path / "a.json").write_text(text)
    (tmp_path / "b.json").write_text(f'{{"shape": {text}}}')
    first = shapes.from_file(tmp_path / "a.toml")
    assert [each.seqlen_q for each in first] == [64, 65]
    assert shapes.from_file(tmp_path / "a.json") == first == shapes.from_file(tmp_path / "b.json")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.toml", "[[shape]\n", "cannot be read as .toml"),
        ("a.json", "{", "cannot be read as .json"),
        ("a.json", "{}", "expected a list of shapes"),
        ("a.json", "[]", "expected a list of shapes"),
        ("a.json", f"[{GOOD}, 5]", "shape 2: expected a table of fields, got 5"),
        ("a.json", f'[{GOOD}, {GOOD[:-1]}, "dtype": "float8"}}]', "shape 2: dtype"),
        ("a.json", f'[{GOOD[:-1]}, "colour": 1}}]', "shape 1: colour"),
        ("a.json", "[{}]", "shape 1: batch: Field required"),
    ],
)
def test_bad_file_is_told_by_entry_and_field(tmp_path: Path, name: str, content: str, expected: str) -> None:
    """A file that is no list of shapes is refused with the place and the reason."""
    (tmp_path / name).write_text(content)
    with pytest.raises(ArgumentError) as caught:
        shapes.from_file(tmp_path / name)
    assert expected in str(caught.value)
    assert name in str(caught.value)


def test_missing_file_is_told(tmp_path: Path) -> None:
    """A path that leads nowhere is an error with that path."""
    with pytest.raises(ArgumentError, match=r"nowhere\.json"):
        shapes.from_file(tmp_path / "nowhere.json")


@pytest.mark.parametrize("flags", [["--causal", "perhaps"], ["--batch", "two"], ["--grads", "x"], ["--dtype", "int8"]])
def test_wrong_flag_ends_with_usage_error(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong value on the command line ends with exit code 2 and names itself."""
    try:
        code = prewarm.main(flags)
    except SystemExit as error:
        code = int(str(error.code))
    assert code == MISUSED
    assert flags[1] in capsys.readouterr().err


def test_machine_without_gpu_is_told_what_to_do(tmp_path: Path) -> None:
    """Without a GPU and without the interpreter the script says so and ends with exit code 2."""
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    code, output, errors = run(tmp_path, *SMALL, interpret="0")
    assert (code, output) == (2, "")
    assert "TRITON_INTERPRET=1" in errors


@pytest.mark.timeout(400)
def test_run_tunes_and_the_next_run_finds_it_done(tmp_path: Path) -> None:
    """The first run tunes each problem once and exits 0; the second changes nothing in the file and exits 0."""
    flags = [*SMALL, "--batch", "1", "--rank", "2", "3", "--grads", "none"]
    code, output, errors = run(tmp_path, *flags)
    assert code == 0, errors
    assert output.count("[1/1] ") == 1, "ranks 2 and 3 share a packed width, so they are one problem"
    assert "tuned in" in output
    before = (tmp_path / "flashbias.db").read_bytes()
    code, output, errors = run(tmp_path, *flags)
    assert code == 0, errors
    assert "already tuned" in output
    assert (tmp_path / "flashbias.db").read_bytes() == before


@pytest.mark.timeout(400)
def test_killed_run_goes_on_with_the_trials_that_are_left(tmp_path: Path) -> None:
    """SIGKILL after k of n trials: the rerun keeps those k rows as they are and measures the n - k others."""
    flags = [*SMALL, "--grads", "none"]
    victim = start(tmp_path, *flags)
    until = time.monotonic() + 120
    rows: dict[str, float] = {}
    while not rows:
        assert time.monotonic() < until, "no trial was stored in time"
        assert victim.poll() is None, victim.communicate()[1]
        time.sleep(0.02)
        rows = trials(tmp_path)
    victim.kill()
    victim.communicate()
    rows = trials(tmp_path)
    code, _, errors = run(tmp_path, *flags)
    after = trials(tmp_path)
    assert code == 0, errors
    assert {name: after[name] for name in rows} == rows
    winner = open_layers(tmp_path).winners(small_problem())["forward"]
    assert len(rows) < len(after) == winner.tried == winner.total


def small_problem() -> Problem:
    """Returns the problem of the flags ``SMALL`` without gradients."""
    (shape,) = parse(*SMALL, "--grads", "none")
    return problem(shape, describe(-1))


def trials(folder: Path) -> dict[str, float]:
    """Returns config -> time of its trial, for every stored trial."""
    if not (folder / "flashbias.db").exists():
        return {}
    return {f"{row.kernel} {row.config}": row.created_at for row in open_layers(folder).trials(small_problem())}


def test_space_is_found_beside_the_shapes_and_its_faults_end_the_run(tmp_path: Path) -> None:
    """A module in the working directory is imported as ``python -m`` would; what it offers is judged before any tuning."""
    (tmp_path / "mine.py").write_text("configs = [('forward', 64)]\n", encoding="utf-8")
    code, output, errors = run(tmp_path, *SMALL, "--grads", "none", "--space", "mine:configs")
    assert (code, "tuned" in output) == (2, False)
    assert "prewarm: space 'mine:configs': expected a Config(" in errors
    assert "got 64 (int)" in errors


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        ("mine", "space: expected module:attribute, got 'mine'"),
        ("mine:", "got 'mine:'"),
        ("no_such_one:x", "PYTHONPATH"),
    ],
)
def test_space_that_is_none_is_wrong_usage(
    space: str, expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that leads nowhere ends with exit code 2 and is named with what was expected."""
    monkeypatch.setattr("sys.path", [*sys.path])
    assert prewarm.main([*SMALL, "--cache-dir", str(tmp_path), "--space", space]) == MISUSED
    errors = capsys.readouterr().err
    assert expected in errors
    assert space in errors


def test_prewarm_tries_a_space_tells_what_was_refused_and_takes_a_pin_for_a_winner(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each kernel's line counts what it was offered and gives the first reason; a pinned problem is a ready one."""
    found = planted_problem("32", "32")
    chosen = Settings(cache_dir=tmp_path, finish=True, space="tests.autotune.space_examples:forward")
    pin = Pin(
        problem=found,
        kernel="backward",
        config=softmax_config(64),
        pinned_by="me",
        host="here",
        created_at=time.time(),
    )
    open_layers(tmp_path).put_pin(pin)
    assert prewarm.warm([found], describe(-1), chosen) == prewarm.DONE
    output = capsys.readouterr().out
    assert "space_examples:forward: 3 configs for forward, 1 refused by the rules, the first: " in output
    assert "block=8: block 8 does not hold a row of 19\n" in output
    assert "space_examples:forward: 0 configs for backward\n" in output
    assert "pinned: backward" in output
    assert {row.config for row in open_layers(tmp_path).trials(found, "forward")} == {
        softmax_config(32),
        softmax_config(64),
        softmax_config(64, "zeroed_row"),
    }


def test_problem_without_a_winner_makes_the_run_fail(tmp_path: Path) -> None:
    """When another process holds a problem to the end of the waiting time, the exit code is 1 and the line says why."""
    open_layers(tmp_path).claim(small_problem().hash, "someone", "another-host", 600)
    code, output, errors = run(tmp_path, *SMALL, "--grads", "none", "--budget", "0.5")
    assert code == 1, errors
    assert "NO WINNER" in output
    assert "another-host" in output


def test_a_soak_raises_the_level_once(tmp_path: Path) -> None:
    """The winner reaches level 3 with the repeats named; a second run finds that done."""
    command = [*SMALL, "--grads", "none", "--soak", "6"]
    status, output, _ = run(tmp_path, *command)
    assert status == 0
    assert "forward: 6 repeats agree: triton/" in output
    found = problem(parse(*SMALL, "--grads", "none")[0], describe(-1))
    assert open_layers(tmp_path).winners(found)["forward"].level == 3
    status, output, _ = run(tmp_path, *command)
    assert status == 0
    assert "forward: 6 repeats agree (earlier)" in output


@pytest.mark.parametrize("count", ["0", "-4", "many", "1e3"])
def test_a_soak_of_no_number_is_refused(tmp_path: Path, count: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Repeats are a whole number from 1 on."""
    with pytest.raises(SystemExit) as ended:
        prewarm.main([*SMALL, "--cache-dir", str(tmp_path), f"--soak={count}"])
    assert ended.value.code == 2
    assert "expected a whole number from 1 to 1000000000" in capsys.readouterr().err


def test_the_script_ends_with_the_exit_code_of_wrong_usage(tmp_path: Path) -> None:
    """What a wrong value ends with is what a shell sees."""
    status, _, errors = run(tmp_path, *SMALL, "--soak=0")
    assert status == 2
    assert "expected a whole number from 1 to 1000000000" in errors
