"""The ranks of a job launch the same configs, whatever their databases say, whoever dies, and whether or not they can talk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from autotune.device import describe
from autotune.scene import hashes
from autotune.surroundings import HOME
from cache_db import open_layers
from cache_db.models import Config, Problem, Verdict, Verification, Winner
from tests.autotune.planted_spec import planted_problem
from tests.autotune.softmax_spec import softmax_config

KERNELS = ("forward", "backward")
Answer = dict[str, Any]


class Rank:
    """One process of the job, and what it has answered so far."""

    def __init__(self, pid: int, answers: Path) -> None:
        self.pid = pid
        self._answers = answers

    @property
    def log(self) -> str:
        """All that the rank has logged."""
        return Path(f"{self._answers}.log").read_text(encoding="utf-8")

    def answer(self, number: int = 0, seconds: float = 60.0) -> Answer:
        """Returns what the rank found for its problem ``number``."""
        until = time.monotonic() + seconds
        while True:
            lines = (
                self._answers.read_text(encoding="utf-8").splitlines(keepends=True) if self._answers.exists() else []
            )
            if len(lines) > number and lines[number].endswith("\n"):
                found: Answer = json.loads(lines[number])
                return found
            assert time.monotonic() < until, self.log
            time.sleep(0.01)


Start = Callable[..., Rank]


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    """The process whose forks are the ranks."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.autotune.job_ranks"],
        cwd=HOME,
        env={**os.environ, "PYTHONPATH": HOME, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        yield process


@pytest.fixture
def start(server: subprocess.Popen[str], tmp_path: Path) -> Iterator[Start]:
    """Returns what starts a rank on an order; every rank is gone when the test is."""
    ranks: list[Rank] = []

    def begin(work: str, environment: dict[str, str] | None = None, **order: Any) -> Rank:
        answers = tmp_path / f"answers-{len(ranks)}"
        whole = {"work": work, "environment": environment or {}, "answers": str(answers), **order}
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(whole) + "\n")
        server.stdin.flush()
        ranks.append(Rank(int(server.stdout.readline()), answers))
        return ranks[-1]

    yield begin
    for rank in ranks:
        try:
            os.kill(rank.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def torchrun(port: int, rank: int, size: int = 3) -> dict[str, str]:
    """Returns what torchrun tells a worker whose agent keeps a Store."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def resolving(*problems: Problem, **more: Any) -> list[dict[str, Any]]:
    """Returns the steps of a rank that decides ``problems``."""
    return [{"problem": each.model_dump(), **more} for each in problems]


def filled(folder: Path, problem: Problem, block: int | None, default: int = 256) -> Path:
    """Returns ``folder`` with a database that has winners of this block size, if any, and proofs of the default."""
    database = open_layers(folder)
    for kernel in KERNELS:
        if block is not None:
            database.put_winner(winner(problem, kernel, softmax_config(block)), replace=True)
        through = {"forward": softmax_config(default)} if kernel == "backward" else {}
        row = Verification(
            problem=problem,
            kernel=kernel,
            config=softmax_config(default),
            verdict=Verdict.SAFE,
            level=2,
            proven_with=hashes(through),
            environment=describe(-1).environment,
            gpu_uuid="",
            host="here",
            created_at=time.time(),
        )
        database.add_verification(row)
    return folder


def winner(problem: Problem, kernel: str, config: Config) -> Winner:
    """Returns a complete winner that was proven in this very environment."""
    through = {"forward": config} if kernel == "backward" else {}
    return Winner(
        problem=problem,
        kernel=kernel,
        config=config,
        level=2,
        ms=1.0,
        tried=1,
        total=1,
        complete=True,
        proven_with=hashes(through),
        binary="",
        environment=describe(-1).environment,
        created_at=time.time(),
    )


def test_ranks_with_other_databases_launch_the_same_until_all_refresh(start: Start, tmp_path: Path) -> None:
    """Two ranks with different winners and a late one with none run one decision, without a sweep; so again after refresh."""
    problem, go = planted_problem(), [tmp_path / f"go-{number}" for number in range(2)]
    port = start("store").answer()["port"]
    folders = [filled(tmp_path / str(rank), problem, block) for rank, block in enumerate((32, 64, None))]
    steps = [*resolving(problem), {"refresh": True, "after": str(go[1])}, *resolving(problem)]
    late = [{**steps[0], "after": str(go[0])}, *steps[1:]]
    ranks = [
        start("resolve", torchrun(port, rank), folder=str(folder), steps=late if rank == 2 else steps)
        for rank, folder in enumerate(folders)
    ]
    first = [rank.answer()["blocks"] for rank in ranks[:2]]
    go[0].touch()
    found = ranks[2].answer()
    assert first[0] == first[1] == found["blocks"]
    assert found["blocks"] in ([32, 32], [64, 64])
    assert not found["swept"]
    assert found["reason"].startswith("agreed on by the job, as rank ")
    for folder in folders:
        filled(folder, problem, 128)
    go[1].touch()
    assert [rank.answer(1)["blocks"] for rank in ranks] == [[128, 128]] * 3


def test_killed_sweeper_is_replaced_and_everyone_runs_what_its_successor_found(start: Start, tmp_path: Path) -> None:
    """One rank sweeps while two wait, each with a database of its own; it is killed; one of the two sweeps, both run that."""
    problem = planted_problem("32 64", "32", slow=0.05)
    port = start("store").answer()["port"]

    def begin(rank: int) -> Rank:
        folder = tmp_path / str(rank)
        return start("resolve", torchrun(port, rank), folder=str(folder), steps=resolving(problem))

    victim = begin(0)
    until = time.monotonic() + 60
    while not open_layers(tmp_path / "0").trials(problem):
        assert time.monotonic() < until, victim.log
        time.sleep(0.02)
    others = [begin(1), begin(2)]
    os.kill(victim.pid, signal.SIGKILL)
    found = [rank.answer() for rank in others]
    assert sorted(each["swept"] for each in found) == [False, True]
    assert found[0]["blocks"] == found[1]["blocks"]
    assert [each["rungs"] for each in found] == [["winner"]] * 2
    assert max(each["seconds"] for each in found) < 25, "a dead rank's turn was waited for"


@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGSTOP])
def test_without_its_store_a_job_runs_the_default_and_sweeps_nothing(
    start: Start, tmp_path: Path, death: signal.Signals
) -> None:
    """A Store that dies, or only stalls, mid-run leaves what was agreed; of other problems every rank runs the default."""
    before, after, go = planted_problem(), planted_problem("64"), tmp_path / "go"
    store = start("store")
    ranks = []
    for rank, block in enumerate((32, 64)):
        folder = filled(filled(tmp_path / str(rank), before, block), after, block)
        steps = resolving(before) + resolving(after, before, after=str(go))
        environment = torchrun(store.answer()["port"], rank, 2)
        ranks.append(start("resolve", environment, folder=str(folder), steps=steps))
    agreed = ranks[0].answer()["blocks"]
    assert ranks[1].answer()["blocks"] == agreed
    os.kill(store.pid, death)
    go.touch()
    for rank in ranks:
        found = rank.answer(1)
        assert (found["rungs"], found["blocks"], found["swept"]) == (["default"], [256, 256], False)
        assert "the job cannot agree: the Store of torchrun's agent" in found["reason"]
        assert rank.answer(2)["blocks"] == agreed
        assert rank.log.count("the job cannot agree") == 1


def test_one_table_serves_one_job_after_another(start: Start, tmp_path: Path) -> None:
    """Without a Store the first rank's row in the file binds its job, whatever is stored later; the next job starts anew."""
    problem = planted_problem()

    def blocks(slurm_job: str, block: int) -> list[int]:
        filled(tmp_path / "shared", problem, block)
        environment = {"WORLD_SIZE": "2", "SLURM_JOB_ID": slurm_job, "SLURM_STEP_NUM_NODES": "1"}
        found = start("resolve", environment, folder=str(tmp_path / "shared"), steps=resolving(problem)).answer()
        return list(found["blocks"])

    assert blocks("7", 32) == [32, 32]
    assert blocks("7", 64) == [32, 32]
    assert blocks("8", 64) == [64, 64]
    assert open_layers(tmp_path / "shared").counts()["jobs"] == 4  # of each job what it runs, and which kernels it has


def test_ranks_with_nowhere_to_agree_are_told_and_run_the_default(start: Start, tmp_path: Path) -> None:
    """On several hosts without a Store and a server each rank runs the default at once, with the cure."""
    problem = planted_problem()
    folder = filled(tmp_path / "own", problem, 32)
    environment = {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "SLURM_JOB_ID": "7"}
    rank = start("resolve", environment, folder=str(folder), steps=resolving(problem))
    assert rank.answer()["blocks"] == [256, 256]
    assert "call torch.distributed.init_process_group first" in rank.log
