"""Sealed files fill what the other layers lack, are never changed, and do no harm when they are bad."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import store_examples as examples

from cache_db import open_layers
from cache_db.store import Store


@pytest.fixture
def seed(tmp_path: Path) -> Path:
    """A file with one winner, in a folder with an awkward name."""
    path = tmp_path / "seeds #1%20?" / "h200.db"
    Store.open(path).put_winner(examples.winner(16, ms=0.01, level=3))
    return path


def test_seed_fills_a_gap_and_outranks_nothing(seed: Path, tmp_path: Path) -> None:
    """Where nothing else is known the seed's winner is used; one that was proven here counts, however slow."""
    layers = open_layers(tmp_path / "cache", seeds=[seed])
    assert layers.winners(examples.problem()) == {"forward": examples.winner(16, ms=0.01, level=3)}
    assert [(found.layer, found.place, found.counts) for found in layers.origins(examples.problem())] == [
        ("seeds", str(seed), True)
    ]
    layers.put_winner(examples.winner(32, ms=9.0))
    assert layers.winners(examples.problem()) == {"forward": examples.winner(32, ms=9.0)}
    assert [(found.layer, found.counts) for found in layers.origins(examples.problem())] == [
        ("user", True),
        ("seeds", False),
    ]


def test_seeds_are_neighbours_too(seed: Path, tmp_path: Path) -> None:
    """A neighbouring problem of a seed is a rung of the ladder, and the nearest problem in a message."""
    layers = open_layers(tmp_path / "cache", seeds=[seed])
    asked, near = examples.problem(fields={"seqlen_q": 512}), examples.problem(fields={"seqlen_q": 256})
    layers.put_winner(examples.winner(at=near))
    groups = layers.neighbours(asked, examples.SOFT)
    assert {group["forward"].problem for group in groups} == {near, examples.problem()}
    assert set(layers.nearest(asked)) == {near, examples.problem()}


def test_seed_is_never_written_nor_locked(seed: Path, tmp_path: Path) -> None:
    """Not a byte changes, no file appears beside it, and a folder that nobody may write is fine."""
    before = seed.read_bytes(), seed.stat().st_mtime_ns
    seed.chmod(0o444)
    seed.parent.chmod(0o555)
    layers = open_layers(tmp_path / "cache", seeds=[seed])
    assert layers.winners(examples.problem())
    layers.add_trial(examples.trial())
    assert (seed.read_bytes(), seed.stat().st_mtime_ns) == before
    assert list(seed.parent.iterdir()) == [seed]
    seed.parent.chmod(0o755)


@pytest.mark.parametrize("fault", ["missing", "garbage", "empty", "unfinished", "pipe", "folder"])
def test_bad_seed_is_one_warning(seed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str) -> None:
    """A file that is none, or no database, or in the middle of a write, is not used and stays where it is."""
    if fault == "missing":
        seed.unlink()
    elif fault in ("pipe", "folder"):
        seed.unlink()
        os.mkfifo(seed) if fault == "pipe" else seed.mkdir()
    elif fault == "unfinished":
        Path(f"{seed}-journal").touch()
    else:
        seed.write_bytes(b"" if fault == "empty" else b"no database at all" * 100)
    layers = open_layers(tmp_path / "cache", seeds=[seed])
    for _ in range(2):
        assert layers.winners(examples.problem()) == {}
        assert layers.neighbours(examples.problem(), examples.SOFT) == []
    (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert str(seed) in warning.getMessage()
    assert seed.exists() == (fault != "missing")


@pytest.mark.parametrize("name", ["locked/seed.db", "n" * 300])
def test_seed_that_may_not_be_looked_at_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A folder that is closed to this user, or a name that no file can have, ends no call."""
    if name.startswith("locked"):

        def refused(path: Path, **_: object) -> os.stat_result:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(Path, "stat", refused)  # tests may run as root, whom no folder is closed to
    layers = open_layers(None, seeds=[tmp_path / name])
    for _ in range(2):
        assert layers.winners(examples.problem()) == {}
    (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "cannot be read" in warning.getMessage()
