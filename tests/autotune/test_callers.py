"""Where a sweep may be started from: a notebook, and every rank of a job."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from autotune.surroundings import HOME
from cache_db import open_layers
from tests.autotune.planted_spec import planted_problem
from tests.autotune.test_sandbox import SCRIPT

# What a notebook's kernel does: cells come in over a pipe and run inside the event loop that reads them.
NOTEBOOK = """
import asyncio, sys, types
main = sys.modules["__main__"] = types.ModuleType("__main__")

async def kernel():
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    cell = (await reader.read()).decode()
    exec(compile(cell, "<cell>", "exec"), main.__dict__)
    assert not hasattr(main, "__file__")

asyncio.run(kernel())
"""
RANK = """
import sys
from pathlib import Path
import torch.distributed as distributed
from autotune import Settings, resolve
from autotune.device import describe
from tests.autotune.planted_spec import planted_problem

distributed.init_process_group("gloo")
rank = distributed.get_rank()
distributed.barrier()
found = resolve(planted_problem(), describe(-1), Settings(cache_dir=Path(sys.argv[1]), group_wait_seconds=120))
distributed.barrier()
told = " ".join(sorted(f"{kernel}={choice.config.hash}" for kernel, choice in found.choices.items()))
Path(sys.argv[1], f"rank{rank}").write_text(f"{int(found.swept)} {told}")
distributed.destroy_process_group()
"""


def environment() -> dict[str, str]:
    """Returns that of a user in the interpreter."""
    return {**os.environ, "PYTHONPATH": HOME, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}


def test_it_works_inside_the_event_loop_of_a_notebook(tmp_path: Path) -> None:
    """With a loop running, stdin a pipe that the loop reads and a main module without a file, children start and answer."""
    process = subprocess.run(
        [sys.executable, "-c", NOTEBOOK],
        cwd=tmp_path,
        env=environment(),
        input=SCRIPT,
        text=True,
        capture_output=True,
        timeout=90,
        check=False,
    )
    assert process.stdout.split() == ["safe"], process.stderr


@pytest.mark.timeout(170)
def test_both_ranks_of_a_job_tune_one_problem_and_one_of_them_sweeps(tmp_path: Path) -> None:
    """Under torchrun nobody hangs, one rank sweeps while the other waits, and both run the same winners."""
    (tmp_path / "rank.py").write_text(RANK, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = subprocess.run(
        [*command, "rank.py", str(tmp_path)],
        cwd=tmp_path,
        env=environment(),
        text=True,
        capture_output=True,
        timeout=150,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    swept, told = zip(*((tmp_path / f"rank{rank}").read_text().split(" ", 1) for rank in range(2)), strict=True)
    assert sorted(swept) == ["0", "1"]
    assert told[0] == told[1]
    winners = open_layers(tmp_path).winners(planted_problem())
    assert told[0] == " ".join(sorted(f"{kernel}={row.config.hash}" for kernel, row in winners.items()))
