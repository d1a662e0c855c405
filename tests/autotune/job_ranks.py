"""Ranks of a job, for the tests: one process imports everything once, and each rank is a fork of it.

``python -m tests.autotune.job_ranks`` reads orders, a JSON object a line, and answers each with the number of a process:
``{"environment": {...}, "work": "resolve", "warm" or "store", "answers": path, ...}``. What a rank finds it adds to the file
``answers``, a JSON object a line; what it logs goes to ``answers`` with ".log".
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

import autotune
import cache_db.store  # noqa: F401 - so that no fork has to load SQLAlchemy
from autotune.device import describe
from autotune.job import Job
from autotune.settings import Settings
from cache_db.models import Problem
from flashbias.cli import prewarm
from flashbias.cli.crew import Place

PATIENCE_SECONDS = 60.0


def resolve(order: Mapping[str, Any]) -> None:
    """Decides problem after problem, each once its file ``after`` is there; "refresh" moves on to the next agreement."""
    settings = Settings(
        cache_dir=Path(order["folder"]),
        wait_seconds=order.get("wait", 60.0),
        job=Job.of(os.environ, order.get("name", "")),
    )
    for step in order["steps"]:
        _wait_for(step.get("after"))
        if "refresh" in step:
            autotune.refresh()
            continue
        started = time.monotonic()
        found = autotune.resolve(Problem.model_validate(step["problem"]), describe(-1), settings)
        answer = {
            "swept": found.swept,
            "rungs": {choice.rung for choice in found.choices.values()},
            "blocks": [choice.config.params["block"] for choice in found.choices.values()],
            "reason": found.reason,
            "seconds": time.monotonic() - started,
        }
        _say(order, answer)


def warm(order: Mapping[str, Any]) -> None:
    """Works in a crew on all ``problems``; what it prints is in the log."""
    settings = Settings(cache_dir=Path(order["folder"]), budget_seconds=20, finish=True, alone=True)
    problems = [Problem.model_validate(each) for each in order["problems"]]
    status = prewarm.warm(problems, describe(-1), settings, place=Place.of(os.environ))
    _say(order, {"status": status})


def store(order: Mapping[str, Any]) -> None:
    """Keeps a Store until it is killed."""
    server = TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    _say(order, {"port": server.port})
    time.sleep(600)


def _say(order: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
    with Path(order["answers"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(answer, default=sorted) + "\n")


def _wait_for(path: str | None) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while path is not None and not Path(path).exists():
        assert time.monotonic() < until, path
        time.sleep(0.01)


def _rank(order: Mapping[str, Any]) -> None:
    """A fork's whole life."""
    status = 1
    try:
        log = os.open(f"{order['answers']}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(order["environment"])
        logging.basicConfig(level=logging.INFO)
        {"resolve": resolve, "store": store, "warm": warm}[order["work"]](order)
        status = 0
    finally:
        logging.shutdown()
        os._exit(status)


def main() -> None:
    """Serves until stdin closes; the forks are reaped by the system."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _rank(order)
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
