"""What the tests of the command ``flashbias`` share: one small tuned problem, and ways to look at its rows."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from autotune.device import describe
from cache_db import open_layers
from cache_db.models import Config, Problem, Trial, Verification
from tests.autotune.planted_spec import planted_problem
from tests.autotune.softmax_spec import softmax_config

ROOT = Path(__file__).resolve().parents[2]
DEVICE = describe(-1)
PROBLEM = planted_problem("32 64:zeroed_row", "32")
KEY = PROBLEM.key("forward")
IMPORTING = ("verify", "ptx", "run", "pin")  # the commands that import the spec of a row
GOOD, WRONG = softmax_config(32), softmax_config(64, "zeroed_row")

Run = Callable[..., tuple[int, str, str]]


def trial(folder: Path, config: Config, problem: Problem = PROBLEM) -> Trial:
    """Returns the stored forward trial of ``config``."""
    (found,) = (row for row in open_layers(folder).trials(problem, "forward") if row.config == config)
    return found


def proofs(folder: Path) -> list[Verification]:
    """Returns what was judged of ``PROBLEM`` since its sweep, oldest first."""
    store = open_layers(folder)
    swept = {row.created_at for row in store.trials(PROBLEM)}
    return [row for row in store.verifications(PROBLEM) if row.created_at not in swept]


def python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs Python as a user's shell would."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, **variables}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
