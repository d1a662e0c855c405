"""autotune.progress: what a long loop shows."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator

import pytest

from autotune import progress
from autotune.progress import counted, heading, remaining, track


class Terminal(io.StringIO):
    """A stderr that says it is a terminal."""

    def isatty(self) -> bool:
        """Returns True."""
        return True


@pytest.mark.parametrize(
    ("done", "total", "elapsed", "expected"),
    [(0, 10, 5.0, "?"), (10, 40, 20.0, "1:00"), (1, 2, 3.4, "0:03"), (1, 3601, 1.0, "1:00:00"), (5, 5, 9.0, "0:00")],
)
def test_time_left_is_extrapolated_from_the_pace(done: int, total: int, elapsed: float, expected: str) -> None:
    """The time left assumes that the rest goes as fast as what is done."""
    assert remaining(done, total, elapsed) == expected


@pytest.mark.parametrize(
    ("done", "note", "expected"),
    [
        (0, "", "[1/12]"),
        (0, "resumed", "[1/12, resumed]"),
        (2, "", "[3/12, 0:40 left]"),
        (2, "5 safe", "[3/12, 0:40 left, 5 safe]"),
    ],
)
def test_a_heading_says_which_how_long_and_what_came_out(done: int, note: str, expected: str) -> None:
    """Before anything is done no time left is made up, and an empty note leaves no trace."""
    assert heading(done, 12, 8.0, note) == expected


def test_counts_come_with_the_commonest_first() -> None:
    """Verdicts are counted by name; none at all is an empty text."""
    assert counted(["wrong", "safe", "safe"]) == "2 safe, 1 wrong"
    assert counted([]) == ""


@pytest.mark.parametrize("log", ["quiet", "info", "debug"])
def test_items_pass_through_unchanged(log: str) -> None:
    """Whatever is shown, the loop sees the same items in the same order."""
    assert list(track(iter(range(7)), "counting", 7, log=log)) == list(range(7))


def test_lines_say_done_total_left_and_note(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Off a terminal each report is one log line with count, time left and the caller's note."""
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with caplog.at_level(logging.INFO, logger="autotune.progress"):
        list(track("abc", "proving", 3, note=lambda: "best 2 ms"))
    assert len(caplog.messages) == 3
    assert caplog.messages[0] == "proving: 0 of 3 done, ? left, best 2 ms"
    assert caplog.messages[2].startswith("proving: 2 of 3 done, 0:00 left")


def test_short_loops_write_nothing(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    """A loop that ends before the first report is due leaves no trace off a terminal."""
    with caplog.at_level(logging.DEBUG):
        list(track("abc", "proving", 3))
    assert not caplog.messages
    assert capsys.readouterr() == ("", "")


def test_quiet_shows_nothing_even_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Log level quiet silences the bar."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    list(track("abc", "proving", 3, log="quiet"))
    assert terminal.getvalue() == ""


class Bare:
    """A stderr that can do nothing but write."""

    def write(self, text: str) -> None:
        """Takes ``text``."""


def closed() -> io.StringIO:
    """Returns a stream that was closed."""
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stderr", [None, closed(), Bare()], ids=["missing", "closed", "bare"])
def test_stderr_that_is_no_terminal_stops_no_loop(stderr: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon without stderr, or with somebody's own, tunes like anybody else."""
    monkeypatch.setattr(sys, "stderr", stderr)
    assert list(track("abc", "proving", 3)) == ["a", "b", "c"]


def test_terminal_gets_a_bar_that_is_wiped_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """With rich, a terminal shows title, count and note, and an abandoned loop leaves the cursor visible."""
    pytest.importorskip("rich", reason="the bar needs rich")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    loop: Iterator[str] = track("abc", "proving", 3, note=lambda: "best 2 ms")
    next(loop)
    next(loop)
    loop.close()
    shown = terminal.getvalue()
    assert "proving" in shown
    assert "1/3" in shown
    assert shown.rstrip().endswith("\x1b[2K")
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l")


def test_a_bar_on_stderr_leaves_a_piped_stdout_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is printed while a bar is shown goes where stdout goes, not to the bar's terminal."""
    pytest.importorskip("rich", reason="the bar needs rich")
    terminal, pipe = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", pipe)
    monkeypatch.setenv("TERM", "xterm")
    for item in track("ab", "proving", 2):
        print(f"result {item}")  # noqa: T201 - what is tested
    assert pipe.getvalue() == "result a\nresult b\n"
    assert "result" not in terminal.getvalue()
