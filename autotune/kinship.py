"""Whether the ranks of a job have the same Triton and kernels: those of others are other problems, agreed on apart.

The name of a problem holds both, so two such ranks would never meet where either agrees on anything: each launches its
own without a word. So each rank that begins to agree says what it has, and one that has something else complains.
"""

from __future__ import annotations

import logging
from typing import Final, Protocol

from pydantic import BaseModel, ConfigDict, ValidationError

from autotune.job import Job
from autotune.lease import hostname
from autotune.rendezvous import Unreachable
from cache_db.models import Problem, digest

logger = logging.getLogger(__name__)
_compared: Final[set[tuple[Job, str]]] = set()


class Place(Protocol):
    """Where the first text under a name stays."""

    def publish(self, name: str, text: str) -> str:
        """Writes ``text`` under ``name`` unless something stands there; returns what does. Raises Unreachable."""


class _Kin(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    triton: str
    kernels: str
    rank: int
    host: str


def compare(place: Place | None, topic: str, problem: Problem, job: Job) -> None:
    """Logs one error where another rank, under ``topic``, has other kernels or another Triton for ``problem``'s spec.

    Asks once for each spec; a place that does not answer is left to whoever agrees on the problem.
    """
    name = f"{topic}/{digest(['kin', problem.spec])}"
    if place is None or (job, name) in _compared:
        return
    _compared.add((job, name))
    mine = _Kin(triton=problem.triton_version, kernels=problem.source_hash, rank=job.rank, host=hostname())
    try:
        first = _Kin.model_validate_json(place.publish(name, mine.model_dump_json()))
    except (Unreachable, ValidationError):
        return
    if (first.triton, first.kernels) != (mine.triton, mine.kernels):
        logger.error(
            "%s (%s) has Triton %s and kernels %.12s of %s, rank %d on %s has Triton %s and kernels %.12s: such ranks agree "
            "on nothing and launch different kernels. Give all ranks the same packages",
            job.shown,
            mine.host,
            mine.triton,
            mine.kernels,
            problem.spec,
            first.rank,
            first.host,
            first.triton,
            first.kernels,
        )
