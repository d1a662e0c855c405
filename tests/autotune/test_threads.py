"""A machine that refuses to start threads: reasons and stored winners instead of exceptions."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import autotune
from autotune import Settings, resolve
from autotune.compilation import Compilation
from autotune.device import describe
from autotune.lease import claim
from autotune.nursery import Nursery
from autotune.process import SandboxError
from autotune.sandbox import Sandbox
from autotune.threads import NoThread
from cache_db import open_layers
from tests.autotune.planted_spec import planted_problem
from tests.autotune.softmax_spec import softmax_config

DEVICE = describe(-1)


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    """Makes each test start like a new process, whose first child needs a thread."""
    autotune.forget()
    Nursery.forget()
    yield
    autotune.forget()


@contextmanager
def no_threads() -> Iterator[None]:
    """Has the system refuse every new thread: none finds room for a stack of 128 TiB."""
    before = threading.stack_size(1 << 47)
    try:
        yield
    finally:
        threading.stack_size(before)


def descriptors() -> int:
    """Returns how many files this process has open."""
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


def test_child_without_a_thread_to_keep_it_is_a_sandbox_error() -> None:
    """The error says which thread, and neither pipe nor file stays open."""
    before = descriptors()
    with (
        Sandbox(planted_problem(), DEVICE) as sandbox,
        no_threads(),
        pytest.raises(SandboxError, match="cannot start the runner: cannot start the thread autotune-keeper"),
    ):
        sandbox.prove("forward", softmax_config(32), {}, 1, 0)
    assert descriptors() <= before  # an older one may have closed meanwhile


def test_compiling_without_a_thread_says_so() -> None:
    """The background pass does not begin where it cannot run."""
    with (
        Sandbox(planted_problem(), DEVICE) as sandbox,
        no_threads(),
        pytest.raises(NoThread, match="autotune-compile"),
    ):
        Compilation(sandbox, [("forward", softmax_config(32))])


def test_lease_without_a_thread_to_renew_it_is_given_back(tmp_path: Path) -> None:
    """Nobody is kept out by a lease that nobody keeps."""
    database = open_layers(tmp_path)
    held = claim(database, planted_problem(), 0)
    assert held is not None
    with no_threads(), pytest.raises(NoThread, match="autotune-lease"), held:
        pass
    assert database.holder(planted_problem().hash) is None


def test_call_runs_what_is_stored_or_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An unfinished winner is used as it is, and a miss costs a warning, not a call."""
    problem = planted_problem("32 64 128", "32 64 128")
    resolve(problem, DEVICE, Settings(cache_dir=tmp_path, budget_seconds=0.001))
    autotune.forget()
    Nursery.forget()
    with no_threads():
        stored = resolve(problem, DEVICE, Settings(cache_dir=tmp_path, finish=True))
        missed = resolve(planted_problem("64"), DEVICE, Settings(cache_dir=tmp_path))
    assert {choice.rung for choice in stored.choices.values()} == {"winner"}
    assert missed.choices == {}
    assert "cannot start the thread" in caplog.text
    assert open_layers(tmp_path).counts()["leases"] == 0
