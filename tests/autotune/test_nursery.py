"""Children are forks of one process: born fast, with their own environment, and gone with it or with the caller."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from autotune import nursery
from autotune.device import describe
from autotune.nursery import ALLOCATION, Nursery
from autotune.process import SandboxError
from autotune.sandbox import Sandbox
from autotune.surroundings import HOME
from cache_db.models import Verdict
from tests.autotune.planted_spec import planted_problem
from tests.autotune.softmax_spec import softmax_config

DEVICE = describe(-1)
GOOD = softmax_config(32)
# A caller that says which processes it has, and does nothing then.
CALLER = """
import time
from autotune.device import describe
from autotune.sandbox import Sandbox
from tests.autotune.planted_spec import planted_problem
sandbox = Sandbox(planted_problem(), describe(-1))
sandbox.fingerprints(0)
runner = sandbox._runner.pid
print(runner, open(f"/proc/{runner}/stat").read().split()[3], flush=True)
time.sleep(600)
"""
# What a caller of its own begins with.
SETUP = """
from autotune.device import describe
from autotune.sandbox import Sandbox
from tests.autotune.planted_spec import planted_problem
from tests.autotune.softmax_spec import softmax_config
sandbox = Sandbox(planted_problem(), describe(-1))
def prove(name):
    return sandbox.prove("forward", softmax_config(32, name) if name != "fine" else softmax_config(32), {}, 1, 0)
"""


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    """A sandbox whose child is born in a nursery of this test's own."""
    Nursery.forget()
    with Sandbox(planted_problem(), DEVICE) as found:
        yield found
    Nursery.forget()


def proven(sandbox: Sandbox) -> bool:
    """Returns whether a good config is found safe."""
    return sandbox.prove("forward", GOOD, {}, 1, 0).safe


def mother(sandbox: Sandbox) -> int:
    """Returns the process that the sandbox's runner is a fork of."""
    return parent_of(sandbox._runner.pid)


def parent_of(pid: int | None) -> int:
    """Returns the process id of the parent."""
    return int(Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[1])


def environment_of(pid: int) -> dict[str, str]:
    """Returns what a process was started with."""
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def gone(pid: int, seconds: float = 20.0) -> bool:
    """Returns whether the process ends within ``seconds``."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if ") Z " in Path(f"/proc/{pid}/stat").read_text(encoding="ascii"):
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_children_of_all_sandboxes_are_forks_of_one_process(sandbox: Sandbox) -> None:
    """The second is born without importing anything, in another sandbox and after a crash alike."""
    assert proven(sandbox)
    with Sandbox(planted_problem(), DEVICE) as other:
        assert proven(other)
        assert mother(other) == mother(sandbox)
        assert parent_of(mother(other)) == os.getpid()
        first = other._runner.pid
        assert other.prove("forward", softmax_config(32, "killed_at_launch"), {}, 1, 0).verdict is Verdict.KILLED
        assert proven(other)
        assert other._runner.pid != first
        assert mother(other) == mother(sandbox)


def test_what_imports_read_is_the_same_in_a_nursery_and_its_children(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variable that an import may have read makes another nursery; those that are read late do not."""
    assert proven(sandbox)
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    with Sandbox(planted_problem(), DEVICE) as same:
        assert proven(same)
        assert mother(same) == mother(sandbox)
    monkeypatch.setenv("SOME_LIBRARY_READS", "this")
    with Sandbox(planted_problem(), DEVICE) as different:
        assert proven(different)
        assert mother(different) != mother(sandbox)
        assert environment_of(mother(different))["SOME_LIBRARY_READS"] == "this"
    assert proven(sandbox)


def test_the_nursery_sees_no_gpu(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own environment names none, whatever the caller's does."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert proven(sandbox)
    assert environment_of(mother(sandbox))["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize("given", [None, "glibc.malloc.check=0"])
def test_where_gpus_are_compiled_for_memory_comes_in_huge_pages(given: str | None) -> None:
    """Unless the user has said how to allocate."""
    variables = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "GLIBC_TUNABLES")
    }
    variables |= {"PYTHONPATH": HOME} | ({} if given is None else {"GLIBC_TUNABLES": given})
    Nursery.forget()
    with Path(os.devnull).open("r+b") as nothing:
        newborn = nursery.bear("runner", variables, nothing.fileno(), nothing.fileno())
        pid = newborn.pid
    mothers = [
        int(each) for task in Path("/proc/self/task").iterdir() for each in (task / "children").read_text().split()
    ]
    # The C library cuts the list into pieces where it stands.
    expected = (given or ALLOCATION).partition(":")[0]
    assert expected in {environment_of(each).get("GLIBC_TUNABLES") for each in mothers if each != pid}
    newborn.wait(60)
    assert newborn.status == 0  # nobody greeted it
    Nursery.forget()


def test_a_nursery_that_is_killed_takes_its_children_along_and_is_replaced(sandbox: Sandbox) -> None:
    """Its children are told to be killed, not crashed, and the next question finds others."""
    assert proven(sandbox)
    runner, nurse = sandbox._runner.pid, mother(sandbox)
    assert runner is not None
    os.kill(nurse, signal.SIGKILL)
    assert gone(runner)
    assert proven(sandbox)
    assert mother(sandbox) != nurse


def test_a_nursery_without_children_ends_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """It lasts as long as a child, then lingers, and a later child has another."""
    monkeypatch.setattr(nursery, "LINGER_SECONDS", 0.3)
    Nursery.forget()
    with Sandbox(planted_problem(), DEVICE) as sandbox:
        assert proven(sandbox)
        nurse = mother(sandbox)
        time.sleep(1.0)
        assert Path(f"/proc/{nurse}").exists()
    assert gone(nurse)
    with Sandbox(planted_problem(), DEVICE) as later:
        assert proven(later)
        assert mother(later) != nurse
    Nursery.forget()


def test_the_caller_takes_nursery_and_children_along(tmp_path: Path) -> None:
    """Nothing is left of a caller that was killed."""
    command = [sys.executable, "-c", CALLER]
    with subprocess.Popen(command, cwd=HOME, stdout=subprocess.PIPE, text=True, start_new_session=True) as caller:
        assert caller.stdout is not None
        runner, nurse = map(int, caller.stdout.readline().split())
        caller.kill()
    assert gone(runner)
    assert gone(nurse)


def test_a_fork_of_the_caller_has_a_nursery_of_its_own(sandbox: Sandbox) -> None:
    """A process that torch's own loaders fork may tune, and what the parent has stays alive."""
    assert proven(sandbox)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            del sandbox
            gc.collect()
            with Sandbox(planted_problem(), DEVICE) as own:
                status = 0 if proven(own) and parent_of(mother(own)) == os.getpid() else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    before = sandbox._runner.pid
    assert proven(sandbox)
    assert sandbox._runner.pid == before


def test_a_nursery_that_cannot_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last words are the reason."""
    (tmp_path / "sitecustomize.py").write_text("raise SystemExit('planted: nothing starts here')", encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    Nursery.forget()
    with (
        Sandbox(planted_problem(), DEVICE) as sandbox,
        pytest.raises(SandboxError, match=r"the runner did not start: .*planted: nothing starts here"),
    ):
        sandbox.prove("forward", GOOD, {}, 1, 0)
    Nursery.forget()


def outcome_of(program: str, timeout: float = 60.0) -> list[str]:
    """Returns the lines that a caller of its own prints, which has a ``sandbox`` and does what ``program`` says."""
    finished = subprocess.run(
        [sys.executable, "-c", SETUP + program], cwd=HOME, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.splitlines()


def test_deaths_are_seen_where_the_caller_blocks_signals_and_has_many_descriptors() -> None:
    """A nursery inherits the blocked SIGCHLD, and a line with a number that ``select`` does not take."""
    program = """
import os, resource, signal
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 2000), most))
many = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
print(*(prove(name).verdict for name in ("killed_at_launch", "fine")))
"""
    assert outcome_of(program) == ["killed safe"]


def test_an_environment_may_hold_what_nobody_can_set(tmp_path: Path) -> None:
    """Entries without a name, bytes that are no text and long values reach a child, or are left out."""
    program = f"""
import os, subprocess, sys
if "PLANTED" not in os.environ:
    planted = os.environ | {{"": "nameless", "PLANTED": "\\udcff", "LONG": 100_000 * "x"}}
    sys.exit(subprocess.call([sys.executable, *sys.orig_argv[1:]], env=planted))
folder = os.path.join(os.fsencode({str(tmp_path)!r}), b"\\xff")
os.mkdir(folder)
os.chdir(folder)
print(prove("fine").verdict, os.readlink(f"/proc/{{sandbox._runner.pid}}/cwd".encode()) == folder)
"""
    assert outcome_of(program) == ["safe True"]


def test_what_cannot_be_started_or_asked_for_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Python has no executable the reason comes at once, and a descriptor that is closed makes no new nurseries."""
    Nursery.forget()
    monkeypatch.setattr(sys, "executable", None)
    with Sandbox(planted_problem(), DEVICE) as sandbox, pytest.raises(SandboxError, match="NoneType"):
        sandbox.prove("forward", GOOD, {}, 1, 0)
    with pytest.raises(OSError, match="Bad file descriptor"):
        nursery.bear("runner", {}, 987_654, 2)
    Nursery.forget()


def test_a_nursery_that_hears_no_more_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped one is killed with its children once it has ignored a kill for a while."""
    monkeypatch.setattr(nursery, "LINGER_SECONDS", 0.3)
    Nursery.forget()
    with Sandbox(planted_problem(), DEVICE) as sandbox:
        assert proven(sandbox)
        runner, nurse = sandbox._runner.pid, mother(sandbox)
        assert runner is not None
        os.kill(nurse, signal.SIGSTOP)
        started = time.monotonic()
        sandbox.close()
        assert time.monotonic() - started < 10.0
    assert gone(nurse)
    assert gone(runner)
    with Sandbox(planted_problem(), DEVICE) as later:
        assert proven(later)
    Nursery.forget()
