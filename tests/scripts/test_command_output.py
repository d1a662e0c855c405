"""Where the commands' output goes: closed, full and broken streams, files that stay whole, text that a terminal obeys."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cache_db import open_layers
from cache_db.models import Pin
from flashbias.cli.guard import guarded
from flashbias.cli.text import printable
from tests.scripts.command_cases import GOOD, PROBLEM, ROOT, WRONG, Run, proofs, python, trial

CODES = "\x1b[2Jforged\nline\u202e"
ESCAPED = "\\x1b[2Jforged\\nline\\u202e"
ENDS = "import os, sys; from flashbias.cli.guard import guarded; "


def redirected(redirection: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with a shell's redirection of its streams."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("redirection", "command", "expected"),
    [
        (">&-", ["trials"], 0),
        (">&-", ["pins"], 0),
        ("<&- >&- 2>&-", ["pins"], 0),
        ("2>/dev/full", ["trials", "--kernel", "sideways"], 2),
    ],
)
def test_closed_or_full_streams_are_no_traceback(
    folder: Path, redirection: str, command: list[str], expected: int
) -> None:
    """A stream that the caller closed is the null device; a complaint that nobody can read keeps its exit code."""
    done = redirected(redirection, "-m", "flashbias", *command, "--cache-dir", str(folder))
    assert (done.returncode, done.stdout, done.stderr) == (expected, "", "")


def test_closed_streams_leave_their_numbers_to_nothing_else() -> None:
    """A file opened later is not descriptor 1, into which a library might print."""
    done = redirected(">&-", "-c", f"{ENDS}sys.exit(guarded('x', lambda: os.open(os.devnull, 0) < 3, ()))")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("device", "complaint"), [("/dev/full", "prewarm: [Errno 28]"), ("a closed pipe", "")])
def test_prewarm_ends_with_1_where_its_stdout_takes_nothing(tmp_path: Path, device: str, complaint: str) -> None:
    """It stops at the first line, without a traceback, as ``flashbias`` does."""
    sizes = ["--nheads", "1", "--seqlen-q", "40", "--headdim", "16", "--cache-dir", str(tmp_path)]
    if device == "/dev/full":
        descriptor = os.open(device, os.O_WRONLY)
    else:
        reader, descriptor = os.pipe()
        os.close(reader)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, str(ROOT / "scripts" / "prewarm.py"), *sizes]
    done = subprocess.run(command, env=environment, stdout=descriptor, stderr=subprocess.PIPE, text=True, check=False)
    os.close(descriptor)
    assert done.returncode == 1
    assert done.stderr.startswith(complaint)
    assert len(done.stderr.splitlines()) == bool(complaint)


def test_ctrl_c_is_an_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    """It is 130, with one line on stderr that says what is kept."""

    def command() -> int:
        raise KeyboardInterrupt

    assert guarded("tool", command, (), "stopped; go on") == 130
    assert capsys.readouterr() == ("", "tool: stopped; go on\n")


@pytest.mark.parametrize("name", ["flashbias.db", "flashbias.db-wal", "flashbias.db-journal", "a link", "a hard link"])
def test_export_over_the_database_is_refused(run: Run, folder: Path, name: str) -> None:
    """By whatever name: the exit code is 2, and every row is there afterwards."""
    before = open_layers(folder).counts()
    output = folder / name
    if name == "a link":
        output.symlink_to(folder / "flashbias.db")
    elif name == "a hard link":
        output.hardlink_to(folder / "flashbias.db")
    code, _, errors = run("trials", "--output", str(output))
    assert code == 2
    assert "which is the database" in errors
    assert open_layers(folder).counts() == before


def test_export_that_does_not_fit_leaves_no_trace(folder: Path, tmp_path: Path) -> None:
    """The disk is full in the middle: the file of before stays, and there is no half of a new one."""
    open_layers(folder).add_trial(trial(folder, WRONG).model_copy(update={"reason": "x" * 200_000}))
    output = tmp_path / "exported" / "trials.jsonl"
    output.parent.mkdir()
    output.write_text("earlier")
    code = (
        "import resource, sys; from flashbias.cli.main import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**17, 2**17)); sys.exit(main(sys.argv[1:]))"
    )
    export = ("trials", "--format", "jsonl", "--output", str(output), "--cache-dir", str(folder))
    done = python("-c", code, *export)
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    assert output.read_text() == "earlier"


def test_export_keeps_links_modes_and_pipes(run: Run, tmp_path: Path) -> None:
    """What a link points to is written, with the mode it had; a pipe is written into and stays one."""
    target, link, pipe = tmp_path / "target.csv", tmp_path / "link.csv", tmp_path / "pipe"
    target.touch(mode=0o600)
    link.symlink_to(target)
    assert run("trials", "--output", str(link))[0] == 0
    assert link.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o600
    assert GOOD.hash[:12] in target.read_text()
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    assert run("trials", "--output", str(pipe))[0] == 0
    assert GOOD.hash[:12].encode() in os.read(reader, 2**16)
    os.close(reader)
    assert pipe.is_fifo()


def test_control_characters_of_rows_never_reach_the_terminal(run: Run, folder: Path) -> None:
    """Pins, quarantine, the table of trials and verify show them as escapes: no colour, no forged line, no reversal."""
    store = open_layers(folder)
    wish = {"pinned_by": "me", "host": "here", "created_at": time.time()}
    store.put_pin(Pin(problem=PROBLEM, kernel="forward", config=GOOD, reason=CODES, **wish))
    store.add_trial(trial(folder, WRONG).model_copy(update={"reason": CODES}))
    store.add_trial(trial(folder, GOOD).model_copy(update={"kernel": CODES}))
    store.put_winner(store.winners(PROBLEM)["forward"].model_copy(update={"kernel": CODES}))
    for command in (["pins"], ["cache", "quarantine", "list"], ["trials"], ["verify", "--all"]):
        code, output, errors = run(*command)
        assert code == 0, errors
        assert ESCAPED in output
        assert all(printable(line) == line for line in (output + errors).splitlines())
        assert "\nline" not in output
    code, _, errors = run("verify", "--key", "0" * 64, "--config", "00")
    assert code == 2
    assert ESCAPED in errors


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        (os.fsdecode(b"\xff"), "got '\\udcff'"),
        (CODES, "expected one line of printable characters"),
        ("x" * 501, "expected at most 500 characters, got 501"),
    ],
    ids=["undecodable", "control characters", "long"],
)
def test_reason_of_a_pin_is_checked_before_the_proof(run: Run, folder: Path, reason: str, expected: str) -> None:
    """What could not be stored or shown is wrong usage; nothing is proven for it, and nothing pinned."""
    names = ("--key", PROBLEM.key("forward"), "--config", GOOD.hash)
    code, _, errors = run("pin", *names, "--reason", reason)
    assert code == 2
    assert expected in errors
    assert open_layers(folder).counts()["pins"] == 0
    assert proofs(folder) == []
