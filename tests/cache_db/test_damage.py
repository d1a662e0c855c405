"""Files that are no database, or no longer one: moved aside, never deleted, and the work goes on."""

from __future__ import annotations

import fcntl
import logging
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import store_examples as examples

from cache_db import open_layers
from cache_db.damage import set_aside
from cache_db.errors import Damaged, Unavailable, identity
from cache_db.store import Store

CHILD = Path(__file__).with_name("store_child.py")


def _cut(size: int) -> Callable[[bytes], bytes]:
    return lambda whole: whole[: size if size > 0 else len(whole) + size]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "garbage": lambda whole: b"\xde\xad\xbe\xef" * (len(whole) // 4),
    "text": lambda _: b"this is not a database, it is a note to myself\n",
    "zeroed header": lambda whole: bytes(100) + whole[100:],
    "two bytes": lambda _: b"SQ",
    "cut in the header": _cut(60),
    "cut after a page": _cut(4096),
    "cut in the middle": lambda whole: whole[: len(whole) // 2],
    "last page missing": _cut(-4096),
    "pages overwritten": lambda whole: whole[:4096] + b"\xa5" * (len(whole) - 4096),
}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def _moved(cache: Path) -> list[Path]:
    return sorted(cache.glob("flashbias.db.damaged-*"))


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_file_is_moved_aside_and_replaced(
    cache: Path, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever is wrong with the file: every byte of it is kept, one warning names it, a fresh one works."""
    path = cache / "flashbias.db"
    examples.filled(path)
    bad = damage(path.read_bytes())
    path.write_bytes(bad)
    layers = open_layers(cache)
    assert layers.trials(examples.problem()) == []
    layers.add_trial(examples.trial())
    assert [file.read_bytes() for file in _moved(cache)] == [bad]
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert str(_moved(cache)[0]) in warning.getMessage()
    assert layers.location == str(path)
    assert Store.open(path).trials(examples.problem()) == [examples.trial()]


def test_damage_behind_the_first_page_is_met_when_it_is_read(cache: Path) -> None:
    """A file that opens well and turns out damaged later is replaced in the middle of the work."""
    path = cache / "flashbias.db"
    examples.filled(path, rows=200)
    layers = open_layers(cache)
    whole = path.read_bytes()
    with sqlite3.connect(path) as connection:
        (root,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'flashbias_trials'").fetchone()
    connection.close()
    start = 4096 * (root - 1)
    path.write_bytes(whole[:start] + b"\xa5" * 4096 + whole[start + 4096 :])
    assert layers.trials(examples.problem()) == []
    layers.add_trial(examples.trial())
    assert layers.trials(examples.problem()) == [examples.trial()]
    assert len(_moved(cache)) == 1


def test_empty_file_is_an_empty_database(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What ``touch`` makes is good enough: nothing is moved, nobody is warned."""
    (cache / "flashbias.db").touch()
    layers = open_layers(cache)
    layers.put_winner(examples.winner())
    assert layers.winners(examples.problem()) == {"forward": examples.winner()}
    assert _moved(cache) == []
    assert caplog.records == []


def test_pipe_in_the_files_place_is_refused_and_waits_for_nobody(tmp_path: Path) -> None:
    """To open a pipe waits for a writer: it is not opened, and stays."""
    path = tmp_path / "flashbias.db"
    os.mkfifo(path)
    with pytest.raises(Unavailable, match="is no file: move it away"):
        Store.open(path)
    assert path.is_fifo()


def test_symlink_stays_and_its_target_is_moved(cache: Path, tmp_path: Path) -> None:
    """A linked database is replaced where it lies; the link keeps working."""
    target = tmp_path / "elsewhere.db"
    target.write_bytes(b"garbage" * 1000)
    (cache / "flashbias.db").symlink_to(target)
    open_layers(cache).put_winner(examples.winner())
    assert (cache / "flashbias.db").is_symlink()
    assert Store.open(target).winners(examples.problem())
    assert len(list(tmp_path.glob("elsewhere.db.damaged-*"))) == 1


def test_journal_goes_with_its_file(cache: Path) -> None:
    """A journal left beside the fresh file would be rolled back into it, so it moves too."""
    path = cache / "flashbias.db"
    path.write_bytes(b"garbage" * 1000)
    (cache / "flashbias.db-journal").write_bytes(b"its journal")
    moved = set_aside(path, identity(path))
    assert moved is not None
    assert Path(f"{moved}-journal").read_bytes() == b"its journal"
    assert not (cache / "flashbias.db-journal").exists()


def test_two_damages_in_one_second_keep_both_files(cache: Path) -> None:
    """A name is never given twice: the second damaged file does not overwrite the first."""
    path = cache / "flashbias.db"
    for content in (b"first" * 100, b"second" * 100):
        path.write_bytes(content)
        open_layers(cache)
    assert {file.read_bytes() for file in _moved(cache)} == {b"first" * 100, b"second" * 100}


def test_file_that_is_no_longer_the_diagnosed_one_stays(cache: Path) -> None:
    """A healthy file that took the damaged one's place meanwhile is never moved."""
    path = cache / "flashbias.db"
    path.write_bytes(b"garbage" * 1000)
    with pytest.raises(Damaged) as caught:
        Store.open(path)
    path.unlink()
    examples.filled(path)
    assert set_aside(path, caught.value.seen) is None
    assert len(Store.open(path).trials(examples.problem())) == 60
    assert set_aside(path, None) is None


def test_file_in_the_middle_of_a_transaction_is_not_moved(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While another process is inside a transaction the file stays: its journal is found by the file's name."""
    path = cache / "flashbias.db"
    examples.filled(path)
    holder = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None); c.execute('BEGIN IMMEDIATE');"
        "print('held', flush=True); sys.stdin.read()"
    )
    monkeypatch.setattr("cache_db.damage.LOCK_SECONDS", 0.2)
    command = [sys.executable, "-c", holder, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(Unavailable, match="cannot be moved aside"):
            set_aside(path, identity(path))
        process.communicate("")
    assert set_aside(path, identity(path)) is not None


def test_one_process_decides_at_a_time(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one process looks at the damaged file, no other moves it; a mover that hangs is not waited for for ever."""
    path = cache / "flashbias.db"
    path.write_bytes(b"garbage" * 1000)
    monkeypatch.setattr("cache_db.damage.LOCK_SECONDS", 0.1)
    with (cache / "flashbias.db.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(Unavailable, match="cannot be moved aside"):
            set_aside(path, identity(path))
        assert path.exists()
    assert set_aside(path, identity(path)) is not None


def test_foreign_tables_are_left_alone(cache: Path) -> None:
    """Another program's database is shared, not taken over: our tables have their prefix and its rows stay."""
    path = cache / "flashbias.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE trials (name TEXT)")
    connection.execute("INSERT INTO trials VALUES ('theirs')")
    connection.commit()
    open_layers(cache).add_trial(examples.trial())
    assert connection.execute("SELECT name FROM trials").fetchall() == [("theirs",)]
    connection.close()
    assert Store.open(path).trials(examples.problem()) == [examples.trial()]


@pytest.mark.parametrize("damage", ["garbage", "cut in the middle"])
def test_eight_processes_finding_damage_at_once_move_it_once(cache: Path, damage: str) -> None:
    """Exactly one moved file, the damaged one, and all eight rows in the fresh database."""
    examples.filled(cache / "flashbias.db")
    bad = DAMAGES[damage]((cache / "flashbias.db").read_bytes())
    (cache / "flashbias.db").write_bytes(bad)
    processes = [
        subprocess.Popen(
            [sys.executable, CHILD, "recover", cache, str(owner)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        )
        for owner in range(8)
    ]
    time.sleep(2.0)
    (cache / "go").touch()
    answers = [process.communicate(timeout=60) for process in processes]
    assert [file.read_bytes() for file in _moved(cache)] == [bad]
    assert [out.strip() for out, _ in answers] == [str(cache / "flashbias.db")] * 8
    assert sum("was moved to" in err for _, err in answers) == 1
    assert len(Store.open(cache / "flashbias.db").trials(examples.problem())) == 8
