"""Children that are started, crashed, hung, killed and started again, and a caller that feels none of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from autotune.device import DeviceInfo, describe
from autotune.process import ChildDied
from autotune.sandbox import Limits, Sandbox, SandboxError
from autotune.surroundings import HOME, environment, import_path
from cache_db.models import Config, Environment, Verdict
from tests.autotune.softmax_spec import softmax_config, softmax_problem

HOPPER = DeviceInfo(
    index=3,
    name="NVIDIA H200",
    uuid="GPU-00000000-0000-0000-0000-000000000000",
    capability=(9, 0),
    sm_count=132,
    shared_memory=232448,
    mig_profile="",
    triton_version="3.6.0",
    environment=Environment(driver="", ptxas="", torch=str(torch.__version__)),
)
SHORT = Limits(trial_seconds=4)
GOOD = softmax_config()


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    """A sandbox in the interpreter with short limits."""
    with Sandbox(softmax_problem(), describe(-1), SHORT) as sandbox:
        yield sandbox


@pytest.fixture
def compiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    """A sandbox that compiles for a Hopper which need not be there, two at a time, into a cache of its own."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    with Sandbox(softmax_problem(HOPPER), HOPPER, Limits(compile_seconds=6, workers=2)) as sandbox:
        yield sandbox


def runner_pid(sandbox: Sandbox) -> int:
    """Returns the process id of the runner, which must exist."""
    pid = sandbox._runner.pid
    assert pid is not None
    return pid


def gone(pid: int) -> bool:
    """Returns whether process ``pid`` ends within ten seconds (a zombie has ended)."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


def python(arguments: list[str], cwd: Path, **options: object) -> subprocess.Popen[str]:
    """Starts a user's Python in ``cwd`` that finds the packages by its PYTHONPATH."""
    variables = {**os.environ, "PYTHONPATH": HOME, "TRITON_INTERPRET": "1"}
    return subprocess.Popen(  # type: ignore[call-overload,no-any-return]
        [sys.executable, *arguments],
        cwd=cwd,
        env=variables,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def test_a_hang_is_a_timeout_and_its_process_is_gone(sandbox: Sandbox) -> None:
    """A kernel that never ends is killed at its limit, and the next candidate is judged by a fresh child."""
    assert sandbox.prove("forward", GOOD, {}, 1, 0).safe
    hung = runner_pid(sandbox)
    outcome = sandbox.prove("forward", softmax_config(fault="hangs_at_launch"), {}, 1, 0)
    assert outcome.verdict is Verdict.TIMEOUT
    assert "4 s" in outcome.reason
    assert gone(hung)
    assert sandbox.prove("forward", GOOD, {}, 1, 0).safe


def test_a_crash_that_does_not_repeat_is_forgiven_in_a_fresh_child(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same config, asked for again after its crash, gets a new process."""
    monkeypatch.setenv("SOFTMAX_MARKER", str(tmp_path / "crashed"))
    with Sandbox(softmax_problem(), describe(-1), SHORT) as fresh:
        crashing = softmax_config(fault="crashes_once")
        assert fresh.prove("forward", crashing, {}, 1, 0).verdict is Verdict.CRASHED
        assert fresh.prove("forward", crashing, {}, 1, 0).safe


def test_a_worker_that_fails_for_itself_says_of_what(sandbox: Sandbox) -> None:
    """A fault of the worker's own is no quiet exit: its status says that it failed, and its last line why."""
    with pytest.raises(ChildDied, match=r"exit status 1: AttributeError: .*_answer_dance"):
        sandbox._converse({"do": "dance", "shrunk": 0}, lambda _: None)
    assert sandbox.prove("forward", GOOD, {}, 1, 0).safe


def test_a_child_that_was_killed_between_two_questions_is_replaced(sandbox: Sandbox) -> None:
    """Whoever ended the idle child, the next question is answered."""
    assert sandbox.prove("forward", GOOD, {}, 1, 0).safe
    idle = runner_pid(sandbox)
    os.kill(idle, signal.SIGKILL)
    assert gone(idle)
    assert sandbox.prove("forward", GOOD, {}, 1, 0).safe


def test_measuring_leaves_out_only_what_failed(sandbox: Sandbox) -> None:
    """Configs that crash, hang or raise are missing from the figures; all others have theirs."""
    good = [GOOD, softmax_config(64), softmax_config(128)]
    bad = [softmax_config(fault=fault) for fault in ("aborts_at_launch", "hangs_at_launch", "raises_at_launch")]
    figures = sandbox.measure("forward", [good[0], bad[0], good[1], bad[1], bad[2], good[2]], {}, 2)
    assert figures.keys() == {config.hash for config in good}
    for numbers in figures.values():
        assert 0 < float(numbers["p20"]) <= float(numbers["ms"]) <= float(numbers["p80"])


def test_a_dependent_kernel_is_measured_behind_its_forward(sandbox: Sandbox) -> None:
    """The backward's inputs at the timed size come from the forward it will run with."""
    figures = sandbox.measure("backward", [GOOD], {"forward": softmax_config(64)}, 2)
    assert figures[GOOD.hash]["samples"] == 2


def test_the_interpreter_compiles_in_the_runner(sandbox: Sandbox) -> None:
    """Without a GPU compiling is checked too, one config after another."""
    items = [("forward", GOOD), ("backward", softmax_config(fault="raises_at_compile")), ("backward", GOOD)]
    outcomes = list(sandbox.compile(items))
    assert [(kernel, config) for kernel, config, _ in outcomes] == items
    verdicts = [outcome.verdict for _, _, outcome in outcomes]
    assert verdicts == [Verdict.SAFE, Verdict.COMPILE_ERROR, Verdict.SAFE]


def test_compiles_for_a_gpu_stream_from_forks_and_failures_stay_in_theirs(compiling: Sandbox) -> None:
    """A compile that raises, aborts or hangs has its verdict while the others are really compiled."""
    faults = {
        "raises_at_compile": (Verdict.COMPILE_ERROR, "ValueError: planted: this config does not compile ... and says"),
        "aborts_at_compile": (Verdict.CRASHED, "SIGABRT"),
        "hangs_at_compile": (Verdict.TIMEOUT, "still compiling after 6 s"),
    }
    items = [("forward", softmax_config(fault=fault)) for fault in faults]
    items += [(kernel, softmax_config(block)) for kernel in ("forward", "backward") for block in (32, 64)]
    outcomes = {(kernel, config): outcome for kernel, config, outcome in compiling.compile(items)}
    assert outcomes.keys() == set(items)
    for fault, (verdict, reason) in faults.items():
        outcome = outcomes["forward", softmax_config(fault=fault)]
        assert outcome.verdict is verdict
        assert reason in outcome.reason
    good = [outcomes[item] for item in items[3:]]
    assert all(outcome.safe and outcome.level == 0 for outcome in good)
    assert len({outcome.binary for outcome in good}) == 4
    assert all(float(outcome.figures["compile_seconds"]) > 0 for outcome in good)


def test_compiles_run_side_by_side_and_start_with_the_call(compiling: Sandbox) -> None:
    """Two compiles that take six seconds each end together, six seconds after the call that asked for them."""
    list(compiling.compile([("forward", GOOD)]))
    items = [("forward", softmax_config(fault="hangs_at_compile", number=number)) for number in range(2)]
    started = time.monotonic()
    results = compiling.compile(items)
    time.sleep(4)
    assert [outcome.verdict for _, _, outcome in results] == [Verdict.TIMEOUT] * 2
    assert time.monotonic() - started < 9


def test_closing_the_results_stops_the_compiles_and_the_compiler_goes_on(compiling: Sandbox) -> None:
    """What nobody waits for any more is not compiled, and the next request is answered at once."""
    items = [("forward", softmax_config(fault="hangs_at_compile", number=number)) for number in range(8)]
    results = compiling.compile([("forward", GOOD), *items])
    assert next(results)[2].safe
    compiler = compiling._compiler.pid
    del results
    started = time.monotonic()
    assert [outcome.safe for _, _, outcome in compiling.compile([("backward", GOOD)])] == [True]
    assert compiling._compiler.pid == compiler
    assert time.monotonic() - started < 5


def test_a_second_compile_at_the_same_time_is_refused(compiling: Sandbox) -> None:
    """Two streams would steal each other's results."""
    results = compiling.compile([("forward", GOOD)])
    with pytest.raises(SandboxError, match="a compile is going on already"):
        compiling.compile([("backward", GOOD)])
    assert [outcome.safe for _, _, outcome in results] == [True]


def test_a_spec_that_cannot_be_imported_is_told_with_its_reason() -> None:
    """Nothing starts without the spec, and the error says why."""
    problem = softmax_problem().model_copy(update={"spec": "tests.autotune.softmax_spec:NO_SUCH_SPEC"})
    with Sandbox(problem, describe(-1)) as sandbox, pytest.raises(SandboxError, match="NO_SUCH_SPEC"):
        sandbox.prove("forward", GOOD, {}, 1, 0)


def test_a_gpu_that_is_not_there_is_told_with_its_reason() -> None:
    """A runner that cannot take its device ends the matter with an error, not with a verdict."""
    with Sandbox(softmax_problem(HOPPER), HOPPER) as sandbox, pytest.raises(SandboxError, match="did not start"):
        sandbox.prove("forward", GOOD, {}, 1, 0)


def test_a_closed_sandbox_has_no_children_and_starts_none(sandbox: Sandbox) -> None:
    """After close nothing runs and nothing can be asked."""
    assert sandbox.prove("forward", GOOD, {}, 1, 0).safe
    pid = runner_pid(sandbox)
    sandbox.close()
    assert gone(pid)
    with pytest.raises(SandboxError, match="closed"):
        sandbox.prove("forward", GOOD, {}, 1, 0)


def test_children_outlive_the_thread_that_started_them(sandbox: Sandbox) -> None:
    """The system's parent-death signal follows a thread; no thread of the caller's is that one."""
    outcomes: list[bool] = []
    for _ in range(2):
        thread = threading.Thread(target=lambda: outcomes.append(sandbox.prove("forward", GOOD, {}, 1, 0).safe))
        thread.start()
        thread.join()
    first = runner_pid(sandbox)
    time.sleep(0.5)
    assert outcomes == [True, True]
    assert sandbox.prove("forward", GOOD, {}, 1, 0).safe
    assert runner_pid(sandbox) == first


SCRIPT = """
from autotune.device import describe
from autotune.sandbox import Limits, Sandbox
from tests.autotune.softmax_spec import softmax_config, softmax_problem
with Sandbox(softmax_problem(), describe(-1), Limits(trial_seconds=60)) as sandbox:
    print(sandbox.prove("forward", softmax_config(), {}, 1, 0).verdict)

"""
# A shell has Ctrl-C ignored in its background, whoever runs these tests there too.
HANGING = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from autotune.device import describe
from autotune.sandbox import Limits, Sandbox
from tests.autotune.softmax_spec import softmax_config, softmax_problem
with Sandbox(softmax_problem(), describe(-1), Limits(trial_seconds=600)) as sandbox:
    sandbox.prove("forward", softmax_config(), {}, 1, 0)
    print(sandbox._runner.pid, flush=True)
    sandbox.prove("forward", softmax_config(fault="hangs_at_launch"), {}, 1, 0)
"""


@pytest.mark.parametrize("way", ["script", "-c", "repl"])
def test_it_works_from_a_script_without_guard_from_dash_c_and_from_a_repl(way: str, tmp_path: Path) -> None:
    """The caller's main module is never imported again, whatever it is."""
    (tmp_path / "user.py").write_text(SCRIPT, encoding="utf-8")
    arguments = {"script": ["user.py"], "-c": ["-c", SCRIPT], "repl": ["-i"]}[way]
    process = python(arguments, tmp_path, stdin=subprocess.PIPE)
    said, trouble = process.communicate(SCRIPT if way == "repl" else None, timeout=90)
    assert said.split() == ["safe"], trouble


def test_a_shadowing_module_in_the_working_directory_reaches_no_child(tmp_path: Path) -> None:
    """A caller who moves to a folder with an autotune.py of its own after the import still gets our worker."""
    (tmp_path / "autotune.py").write_text("raise RuntimeError('shadowed')", encoding="utf-8")
    preparation = f"import sys, os, autotune.sandbox\nsys.path.insert(0, '')\nos.chdir({str(tmp_path)!r})\n"
    process = python(["-c", preparation + SCRIPT], Path(HOME))
    said, trouble = process.communicate(timeout=90)
    assert said.split() == ["safe"], trouble


def test_a_caller_without_stdio_has_children_all_the_same(tmp_path: Path) -> None:
    """Where stdin, stdout and stderr are closed the line to the child gets one of their numbers, and still holds."""
    code = "from pathlib import Path" + SCRIPT.replace("print(", "Path('said').write_text(")
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", code]
    variables = {**os.environ, "PYTHONPATH": HOME, "TRITON_INTERPRET": "1"}
    subprocess.run(command, cwd=tmp_path, env=variables, timeout=90, check=True)
    assert (tmp_path / "said").read_text() == "safe"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_hanging_child_dies_with_its_parent(number: signal.Signals, tmp_path: Path) -> None:
    """However the caller's process ends, no child is left, not even one that hangs."""
    process = python(["-c", HANGING], tmp_path)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    time.sleep(0.5)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert gone(child)


def test_ctrl_c_is_the_callers_and_leaves_no_child(tmp_path: Path) -> None:
    """An interrupt raises KeyboardInterrupt in the caller at once, and the hanging child is gone."""
    process = python(["-c", HANGING], tmp_path, start_new_session=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    _, trouble = process.communicate(timeout=30)
    assert trouble.rstrip().endswith("KeyboardInterrupt")
    assert gone(child)


def test_a_child_sees_one_gpu_and_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner sees its GPU by UUID, the compiler none; neither believes to be a rank of the caller's job."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "of the job")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", "kept")
    runner, compiler = environment(HOPPER, gpu=True), environment(HOPPER, gpu=False)
    assert runner["CUDA_VISIBLE_DEVICES"] == HOPPER.uuid
    assert compiler["CUDA_VISIBLE_DEVICES"] == ""
    assert "of the job" not in runner.values()
    assert "TRITON_INTERPRET" not in runner
    assert runner["TRITON_CACHE_DIR"] == "kept"
    assert environment(describe(-1), gpu=False)["TRITON_INTERPRET"] == "1"


def test_the_childs_path_is_the_callers_with_shadows_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of the caller's sys.path is kept, but for folders that hold another autotune."""
    shadow, plain = tmp_path / "shadow", tmp_path / "plain"
    (shadow / "autotune").mkdir(parents=True)
    (shadow / "autotune" / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(shadow), str(plain), "", HOME])
    monkeypatch.chdir(tmp_path)
    assert import_path() == [str(plain), str(tmp_path), HOME, str(shadow)]


def test_outcomes_of_different_configs_do_not_mix(sandbox: Sandbox) -> None:
    """Two threads that ask at once each get the answer to their own question."""
    configs: list[Config] = [GOOD, softmax_config(fault="zeroed_row")] * 2
    verdicts: dict[int, Verdict] = {}

    def ask(number: int) -> None:
        verdicts[number] = sandbox.prove("forward", configs[number], {}, 1, 0).verdict

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(configs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [verdicts[number] for number in range(4)] == [Verdict.SAFE, Verdict.WRONG] * 2
