"""No database fault leaves the layers: one warning, then memory, over whatever can still be read."""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import store_examples as examples
from sqlalchemy import event

from cache_db import open_layers
from cache_db.models import Verdict
from cache_db.store import Store

ROOT = Path(__file__).parents[2]
CHILD = Path(__file__).with_name("store_child.py")


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder every user may enter (pytest's own are closed to others)."""
    folder = Path(tempfile.mkdtemp(prefix="flashbias-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def _child(action: str, folder: Path) -> tuple[str, list[str]]:
    """Runs ``action`` in a process of its own; returns what it printed and its warnings."""
    done = subprocess.run(
        [sys.executable, CHILD, action, folder],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr.strip().splitlines()


def _works_in_memory(cache: Path, caplog: pytest.LogCaptureFixture) -> str:
    """Uses layers that have no file, checks that they work all the same, and returns their only warning."""
    layers = open_layers(cache)
    layers.add_trial(examples.trial())
    layers.put_winner(examples.winner())
    assert layers.trials(examples.problem()) == [examples.trial()]
    assert layers.winners(examples.problem()) == {"forward": examples.winner()}
    assert layers.location == "memory"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.name.startswith("cache_db")
    return record.getMessage()


def test_no_folder_means_memory_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    """Memory that was asked for is no fault, and two of them share nothing."""
    layers = open_layers(None)
    layers.put_winner(examples.winner())
    assert layers.location == "memory"
    assert open_layers(None).winners(examples.problem()) == {}
    assert caplog.records == []


def test_missing_folders_are_made(tmp_path: Path) -> None:
    """A cache folder that does not exist yet is made with its parents."""
    layers = open_layers(tmp_path / "not" / "yet" / "there")
    layers.add_trial(examples.trial())
    assert layers.location == str(tmp_path / "not" / "yet" / "there" / "flashbias.db")
    assert Path(layers.location).is_file()


def test_path_below_a_file_means_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A cache folder that cannot be made costs one warning that names it and what is in the way."""
    (tmp_path / "file").touch()
    message = _works_in_memory(tmp_path / "file" / "cache", caplog)
    assert str(tmp_path / "file" / "cache") in message
    assert f"{tmp_path / 'file'} is a file, not a folder" in message


def test_file_in_the_folders_place_means_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Who names a file as cache folder is told that it is one; the file stays as it is."""
    (tmp_path / "file").write_text("mine")
    assert f"{tmp_path / 'file'} is a file, not a folder" in _works_in_memory(tmp_path / "file", caplog)
    assert (tmp_path / "file").read_text() == "mine"


def test_folder_in_the_files_place_means_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A directory called flashbias.db cannot be opened and is not touched."""
    (tmp_path / "flashbias.db").mkdir()
    assert "unable to open database file" in _works_in_memory(tmp_path, caplog)
    assert (tmp_path / "flashbias.db").is_dir()


def test_newer_schema_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A newer version's database is neither read nor written nor moved; one of our own beside it is used, and kept."""
    examples.filled(tmp_path / "flashbias.db")
    with sqlite3.connect(tmp_path / "flashbias.db") as connection:
        connection.execute("UPDATE flashbias_meta SET schema_version = 2")
    connection.close()
    before = (tmp_path / "flashbias.db").read_bytes()
    layers = open_layers(tmp_path)
    layers.add_trial(examples.trial())
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "upgrade flashbias" in record.getMessage()
    assert layers.location == str(tmp_path / "flashbias.schema-1.db")
    assert open_layers(tmp_path).trials(examples.problem()) == [examples.trial()]
    assert (tmp_path / "flashbias.db").read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == {"flashbias.db", "flashbias.schema-1.db"}


def test_read_only_folder_is_read_and_new_rows_stay_in_memory(open_folder: Path) -> None:
    """Stored rows are used, new ones overlay them, the stored winner stays, all for one warning."""
    examples.filled(open_folder / "flashbias.db")
    (open_folder / "flashbias.db").chmod(0o444)
    open_folder.chmod(0o555)
    printed, warnings = _child("use_as_nobody", open_folder)
    assert printed == "60 62 64 True memory"
    assert len(warnings) == 1
    assert "readonly database" in warnings[0]
    assert len(Store.open(open_folder / "flashbias.db").trials(examples.problem())) == 60


def test_full_disk_keeps_what_was_stored(open_folder: Path) -> None:
    """A file that cannot grow is still read, nothing in it is lost, and new rows stay in memory."""
    examples.filled(open_folder / "flashbias.db")
    printed, warnings = _child("use_without_space", open_folder)
    assert printed == "60 62 64 True memory"
    assert len(warnings) == 1
    assert "lost when this process ends" in warnings[0]
    store = Store.open(open_folder / "flashbias.db")
    assert len(store.trials(examples.problem())) == 60
    store.add_trial(examples.trial(9003))


def test_hit_writes_nothing(tmp_path: Path) -> None:
    """Opening and reading leave every byte and the file's time as they were, and no file beside it."""
    examples.filled(tmp_path / "flashbias.db")
    before = (tmp_path / "flashbias.db").stat(), (tmp_path / "flashbias.db").read_bytes()
    layers = open_layers(tmp_path)
    assert layers.winners(examples.problem())
    layers.trials(examples.problem())
    layers.neighbours(examples.problem(fields={"seqlen_q": 64}), examples.SOFT)
    layers.verifications(examples.problem())
    layers.holder("p" * 64)
    after = (tmp_path / "flashbias.db").stat(), (tmp_path / "flashbias.db").read_bytes()
    assert (after[0].st_mtime_ns, after[0].st_ino, after[1]) == (before[0].st_mtime_ns, before[0].st_ino, before[1])
    assert [file.name for file in tmp_path.iterdir()] == ["flashbias.db"]


def test_file_deleted_meanwhile_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Who empties the cache folder of a running process gets a new database there, not a warning."""
    layers = open_layers(tmp_path / "cache")
    layers.add_trial(examples.trial(16))
    shutil.rmtree(tmp_path / "cache")
    assert layers.trials(examples.problem()) == []
    layers.add_trial(examples.trial(32))
    assert Store.open(tmp_path / "cache" / "flashbias.db").trials(examples.problem()) == [examples.trial(32)]
    assert caplog.records == []


def test_file_moved_between_look_and_use_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A call whose file another process moves aside at that very moment is repeated on the fresh one."""
    path = tmp_path / "flashbias.db"
    layers = open_layers(tmp_path)
    layers.add_trial(examples.trial(16))
    assert layers._local._store is not None

    @event.listens_for(layers._local._store._reader, "do_connect")
    def _move(*_: object) -> None:
        if not (tmp_path / "moved").exists():
            path.rename(tmp_path / "moved")

    assert layers.trials(examples.problem()) == []
    layers.add_trial(examples.trial(32))
    assert layers.location == str(path)
    assert caplog.records == []
    assert Store.open(path).trials(examples.problem()) == [examples.trial(32)]
    assert Store.open(tmp_path / "moved").trials(examples.problem()) == [examples.trial(16)]


def test_fault_in_the_middle_of_the_work_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A place that stops working after a good start costs one warning; what comes later is kept in memory."""
    layers = open_layers(tmp_path / "cache")
    layers.add_trial(examples.trial(16))
    lease = layers.claim("p" * 64, "me", "host", 60.0)
    assert lease is not None
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").touch()
    layers.add_trial(examples.trial(32))
    renewed = layers.renew(lease, 60.0)
    assert renewed is not None
    assert layers.claim("p" * 64, "you", "host", 60.0) is None
    layers.release(renewed)
    assert layers.trials(examples.problem()) == [examples.trial(32)]
    assert layers.neighbours(examples.problem(), examples.SOFT) == []
    assert layers.location == "memory"
    assert [record.levelno for record in caplog.records if record.levelno >= logging.WARNING] == [logging.WARNING]


def test_stored_rows_keep_their_rights_over_memory(tmp_path: Path) -> None:
    """Over a file that can only be read, the store's rules hold: final verdicts and winners stay, counts add up."""
    store = examples.filled(tmp_path / "flashbias.db", rows=2)
    near, far = examples.problem(fields={"seqlen_q": 512}), examples.problem(fields={"seqlen_q": 8192})
    store.put_winner(examples.winner(at=far))
    layers = open_layers(tmp_path)
    layers._local._writable = False
    layers.add_trial(examples.trial(0, Verdict.CRASHED))
    layers.add_trial(examples.trial(1, Verdict.WRONG))
    layers.put_winner(examples.winner(at=near))
    assert layers.put_winner(examples.winner(32)) == examples.winner()
    assert [trial.verdict for trial in layers.trials(examples.problem())] == [Verdict.SAFE, Verdict.WRONG]
    groups = layers.neighbours(examples.problem(), examples.SOFT)
    assert [group["forward"].problem for group in groups] == [near, far]
    assert layers.nearest(examples.problem(), limit=5) == sorted([near, far], key=lambda problem: problem.hash)
    replaced = layers.put_winner(examples.winner(32), replace=True)
    assert layers.winners(examples.problem()) == {"forward": replaced} == {"forward": examples.winner(32)}
    assert Store.open(tmp_path / "flashbias.db").winners(examples.problem()) == {"forward": examples.winner()}
    assert layers.counts()["winners"] == 4


def test_locked_file_is_one_wait_and_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that stopped inside a transaction holds a call up for the busy time-out once, never an exception."""
    monkeypatch.setattr("cache_db.engines.BUSY_SECONDS", 0.2)
    layers = open_layers(tmp_path)
    connection = sqlite3.connect(tmp_path / "flashbias.db", isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    layers.add_trial(examples.trial())
    layers.add_trial(examples.trial(32))
    assert [trial.config for trial in layers.trials(examples.problem())] == [examples.config(32), examples.config(64)]
    connection.close()
    assert "locked" in caplog.records[0].getMessage()
    assert [record.levelno for record in caplog.records if record.levelno >= logging.WARNING] == [logging.WARNING]


def test_importing_the_package_loads_no_database() -> None:
    """The door is light: SQLAlchemy (0.2 s) is loaded when a file is opened, torch and triton never."""
    code = (
        "import sys, cache_db, pathlib; heavy = {'sqlalchemy', 'sqlite3', 'torch', 'triton'} & set(sys.modules);"
        "cache_db.open_layers(None).counts(); assert not heavy, heavy;"
        "import cache_db.store; assert not {'torch', 'triton'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60)


def test_python_without_sqlite_works_in_memory(tmp_path: Path) -> None:
    """A Python built without its sqlite3 module tunes all the same, for this process."""
    code = (
        "import sys, pathlib; sys.modules['_sqlite3'] = None; import cache_db;"
        "layers = cache_db.open_layers(pathlib.Path(sys.argv[1])); layers.counts(); print(layers.location)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=60,
    )
    assert done.stdout == "memory\n"
    assert "cannot be opened without a Python module" in done.stderr
