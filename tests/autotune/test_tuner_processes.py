"""The tuner among processes: the second one's hit, Ctrl-C, SIGKILL and resume, leases of the living and the dead."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import autotune
from autotune import Settings, resolve
from autotune.device import describe
from autotune.lease import claim
from cache_db import Layers, open_layers
from cache_db.models import Problem
from tests.autotune.planted_spec import planted_problem
from tests.warm import Warm

ROOT = Path(__file__).resolve().parents[2]
DEVICE = describe(-1)
STARTED: list[subprocess.Popen[str] | Warm] = []
# A shell has Ctrl-C ignored in its background, whoever runs these tests there too.
RESOLVE = """
import json, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
from autotune import Settings, resolve
from autotune.device import describe
from cache_db.models import Problem
problem = Problem.model_validate_json(sys.argv[1])
found = resolve(problem, describe(-1), Settings(cache_dir=Path(sys.argv[2]), budget_seconds=20))
print(json.dumps({"swept": found.swept, "rungs": [choice.rung for choice in found.choices.values()]}))
"""


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    """Makes each test start like a new process, and leaves none behind."""
    autotune.forget()
    yield
    autotune.forget()
    while STARTED:
        process = STARTED.pop()
        process.kill()
        if not isinstance(process, Warm):
            process.communicate()


def warm(problem: Problem, folder: Path) -> Warm:
    """Runs ``RESOLVE`` on ``problem`` and ``folder`` in a process of its own that has torch already."""
    process = Warm(RESOLVE, [problem.model_dump_json(), str(folder)], dict(os.environ), folder)
    STARTED.append(process)
    return process


def start(problem: Problem, folder: Path, code: str = RESOLVE) -> subprocess.Popen[str]:
    """Runs ``code`` as ``python -c`` on ``problem`` and ``folder``."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, problem.model_dump_json(), str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    STARTED.append(process)
    return process


def finish(process: Warm) -> dict[str, object]:
    """Returns what the process printed at its end."""
    status, output, errors = process.finish()
    assert status == 0, errors
    result: dict[str, object] = json.loads(output)
    return result


def wait_for_trials(database: Layers, problem: Problem, count: int) -> None:
    """Returns as soon as ``count`` trials are stored."""
    until = time.monotonic() + 60
    while len(database.trials(problem)) < count:
        assert time.monotonic() < until, "the sweep stored no trial in time"
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    """Returns the direct children of process ``pid``."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


def gone(pids: list[int], seconds: float = 10) -> bool:
    """Returns whether none of the processes is left within ``seconds``."""
    until = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def test_second_process_sweeps_nothing_and_writes_nothing(tmp_path: Path) -> None:
    """What one process tuned, the next one only reads."""
    first = finish(warm(planted_problem(), tmp_path))
    before = (tmp_path / "flashbias.db").read_bytes()
    second = finish(warm(planted_problem(), tmp_path))
    assert first == {"swept": True, "rungs": ["winner", "winner"]}
    assert second == {"swept": False, "rungs": ["winner", "winner"]}
    assert (tmp_path / "flashbias.db").read_bytes() == before


def test_process_without_stdin_stdout_and_stderr_tunes(tmp_path: Path) -> None:
    """A daemon that closed all three tunes like anybody else."""
    code = RESOLVE.replace("print(", "Path(sys.argv[3]).write_text(")
    command = [sys.executable, "-c", code, planted_problem().model_dump_json(), str(tmp_path), str(tmp_path / "found")]
    subprocess.run(
        ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        timeout=120,
    )
    assert json.loads((tmp_path / "found").read_text()) == {"swept": True, "rungs": ["winner", "winner"]}


@pytest.mark.parametrize("count", [1, 3])
def test_killed_sweep_goes_on_where_it_was(tmp_path: Path, count: int) -> None:
    """After SIGKILL with k of n trials stored, the next process measures n - k, at once, and nothing twice."""
    problem = planted_problem("32 64 128", "32 64 128", slow=0.02)
    database = open_layers(tmp_path)
    victim = warm(problem, tmp_path)
    wait_for_trials(database, problem, count)
    offspring = children(victim.pid)
    victim.kill()
    assert gone(offspring)
    stored = {(row.kernel, row.config): row.created_at for row in database.trials(problem)}
    assert count <= len(stored) < 6
    started = time.monotonic()
    assert resolve(problem, DEVICE, Settings(cache_dir=tmp_path, budget_seconds=20)).swept
    after = {(row.kernel, row.config): row.created_at for row in database.trials(problem)}
    assert len(after) == 6
    assert {key: after[key] for key in stored} == stored
    assert time.monotonic() - started < 25, "the dead owner's lease was waited for"


def test_ctrl_c_keeps_trials_frees_the_lease_and_is_raised_again(tmp_path: Path) -> None:
    """An interrupted sweep leaves its trials, no lease, no child, and ends its process by KeyboardInterrupt."""
    problem = planted_problem("32 64 128", "32 64 128", slow=0.1)
    database = open_layers(tmp_path)
    process = start(problem, tmp_path)
    wait_for_trials(database, problem, 1)
    offspring = children(process.pid)
    assert database.holder(problem.hash) is not None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in errors
    assert 1 <= len(database.trials(problem)) < 6
    assert database.holder(problem.hash) is None
    assert gone(offspring)


def test_processes_that_meet_a_problem_together_sweep_it_once(tmp_path: Path) -> None:
    """Of four processes started at once exactly one sweeps; nobody fails, everyone gets proven configs."""
    processes = [warm(planted_problem(slow=0.02), tmp_path) for _ in range(4)]
    found = [finish(process) for process in processes]
    assert sum(bool(each["swept"]) for each in found) == 1
    assert all(len(each["rungs"]) == 2 for each in found)  # type: ignore[arg-type]


def test_problem_that_another_process_tunes_runs_down_the_ladder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """While the lease is held elsewhere, the default runs at once, with one warning that says who tunes."""
    problem = planted_problem()
    open_layers(tmp_path).claim(problem.hash, "someone", "another-host", 600)
    found = resolve(problem, DEVICE, Settings(cache_dir=tmp_path))
    assert {choice.rung for choice in found.choices.values()} == {"default"}
    assert not found.swept
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "another-host" in warnings[0]


def test_waiting_for_another_process_ends_with_its_winner(tmp_path: Path) -> None:
    """With ``wait_seconds`` the caller gets the winner that the other process found meanwhile, without a sweep."""
    problem = planted_problem(slow=0.02)
    database = open_layers(tmp_path)
    other = warm(problem, tmp_path)
    until = time.monotonic() + 60
    while database.holder(problem.hash) is None:
        assert time.monotonic() < until
        time.sleep(0.01)
    found = resolve(problem, DEVICE, Settings(cache_dir=tmp_path, wait_seconds=100))
    assert finish(other)["swept"]
    assert not found.swept
    assert {choice.rung for choice in found.choices.values()} == {"winner"}


def test_lease_of_a_living_process_is_respected(tmp_path: Path) -> None:
    """A second claim on this machine waits and gives up while the first owner lives."""
    database = open_layers(tmp_path)
    first = claim(database, planted_problem(), 0)
    assert first is not None
    with first:
        assert claim(open_layers(tmp_path), planted_problem(), 0.3) is None
    again = claim(database, planted_problem(), 0)
    assert again is not None
    with again:
        pass
    assert database.holder(planted_problem().hash) is None


CLAIM = """
import sys, time
from pathlib import Path
from autotune.lease import claim
from cache_db import open_layers
from cache_db.models import Problem
held = claim(open_layers(Path(sys.argv[2])), Problem.model_validate_json(sys.argv[1]), 0)
held.__enter__()
print("held", flush=True)
time.sleep(600)
"""


def test_lease_of_a_killed_process_is_taken_over_at_once(tmp_path: Path) -> None:
    """On the same machine nobody waits for a dead owner's lease to run out."""
    process = start(planted_problem(), tmp_path, CLAIM)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    database = open_layers(tmp_path)
    assert claim(database, planted_problem(), 0) is None
    process.kill()
    process.communicate()
    taken = claim(database, planted_problem(), 0)
    assert taken is not None
    with taken:
        pass


def test_lease_is_renewed_while_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep longer than one lease keeps others out to its end."""
    monkeypatch.setattr("autotune.lease.LEASE_SECONDS", 0.6)
    database = open_layers(tmp_path)
    held = claim(database, planted_problem(), 0)
    assert held is not None
    with held:
        time.sleep(1.5)
        assert database.claim(planted_problem().hash, "another", "elsewhere", 1) is None
    assert database.claim(planted_problem().hash, "another", "elsewhere", 1) is not None


def test_sweep_in_a_thread_works_and_ends_with_no_thread_left(tmp_path: Path) -> None:
    """A problem met first in a background thread is tuned there; lease and compile threads end with it."""
    before = set(threading.enumerate())
    found: list[bool] = []
    thread = threading.Thread(
        target=lambda: found.append(resolve(planted_problem(), DEVICE, Settings(cache_dir=tmp_path)).swept)
    )
    thread.start()
    thread.join()
    time.sleep(0.2)
    assert found == [True]
    assert {each.name for each in set(threading.enumerate()) - before} == set()
