"""Leases that others left: damaged owners, holders that go away while they are looked at, winners found meanwhile."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import autotune
from autotune import Settings, resolve
from autotune.device import describe
from autotune.lease import _start_time, address, claim, hostname, is_dead
from autotune.proofs import Prover
from autotune.sandbox import Sandbox
from autotune.scene import Scene
from autotune.tuner import _taken, _tune
from cache_db import open_layers
from tests.autotune.planted_spec import PLANTED, planted_problem

DEVICE = describe(-1)


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    """Makes each test start like a new process."""
    autotune.forget()
    yield
    autotune.forget()


def test_owner_with_an_endless_process_number_is_respected(tmp_path: Path) -> None:
    """A damaged owner that no integer can hold is nobody known to be dead, and no error."""
    database = open_layers(tmp_path)
    owner = address().rpartition("/")[0] + "/" + "9" * 5000 + "-1:x"
    database.claim(planted_problem().hash, owner, hostname(), 60)
    assert claim(database, planted_problem(), 0) is None


def test_process_that_another_user_hides_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where /proc does not show other users' processes, one that may not be signalled is alive; one of ours is dead."""
    machine, number = address().rpartition("/")[0], 4_194_304  # above every process number that Linux gives
    owner = f"{machine}/{number}-1:x"
    assert is_dead(owner, hostname())

    def refused(pid: int, sign: int) -> None:
        raise PermissionError(pid, sign)

    monkeypatch.setattr(os, "kill", refused)
    assert not is_dead(owner, hostname())
    assert is_dead(f"{machine}/{os.getpid()}-1:x", hostname())


@pytest.mark.parametrize("stat", ["", "7 (python", "7 (a) b) Z 1 2", "7 (python) S 1 2", "no brackets"])
def test_process_table_entry_that_says_too_little_is_no_birth(stat: str) -> None:
    """An entry read while its process goes away may be cut short anywhere."""
    assert _start_time(stat) == ""


def test_birth_is_field_22_of_the_process_table() -> None:
    """Names may hold brackets and blanks; what follows the last bracket is counted."""
    assert _start_time("7 (a) b) S " + " ".join(map(str, range(4, 53)))) == "22"


def test_lease_that_ends_under_our_eyes_is_told_as_such(tmp_path: Path) -> None:
    """A holder that is gone by the time it is named is not said to be tuning."""
    open_layers(tmp_path).claim(planted_problem().hash, "boot/ns/7-1:x", "elsewhere", 60)
    settings = Settings(cache_dir=tmp_path)
    with Sandbox(planted_problem(), DEVICE) as sandbox:
        scene = Scene(planted_problem(), DEVICE, settings, PLANTED, open_layers(tmp_path), sandbox)
        assert _taken(scene) == "another process is tuning it (owner 7 on elsewhere)"
        holder = scene.store.holder(planted_problem().hash)
        assert holder is not None
        scene.store.release(holder)
        assert _taken(scene) == "another process was tuning it and ended a moment ago"


def test_winner_found_while_the_lease_was_taken_is_used(tmp_path: Path) -> None:
    """Who comes to tune, finds the lease taken and a winner stored by then, runs the winner."""
    settings = Settings(cache_dir=tmp_path)
    resolve(planted_problem(), DEVICE, settings)
    open_layers(tmp_path).claim(planted_problem().hash, "another", "elsewhere", 60)
    with Sandbox(planted_problem(), DEVICE) as sandbox:
        scene = Scene(planted_problem(), DEVICE, settings, PLANTED, open_layers(tmp_path), sandbox)
        found = _tune(scene, Prover(scene))
    assert {choice.rung for choice in found.choices.values()} == {"winner"}
    assert not found.swept
