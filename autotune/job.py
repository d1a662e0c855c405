"""Which job a process belongs to, as its launcher tells: torchrun, srun, anything that sets ``WORLD_SIZE``, or the user."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Self

LONGEST_NAME: Final = 160  # a table has room for 255 characters, of which some are the epoch's
_UNNAMED: Final = ("", "none")  # torchrun calls a run "none" that nobody has named


@dataclass(frozen=True)
class Job:
    """Processes that must launch the same configs.

    ``name`` tells the job from all others that ever use the same database, "" where nobody does. ``size`` is the number
    of ranks, 0 where it is unknown, ``rank`` this one's, -1 if unknown. ``one_host`` says that all of them see the same
    files. ``agent`` is the address of the Store that torchrun's agent keeps for its workers, if it does; it may outlast
    them, so ``attempt`` counts their restarts where all ranks count the same.
    """

    name: str = ""
    size: int = 0
    rank: int = -1
    one_host: bool = False
    agent: tuple[str, int] | None = None
    attempt: int = 0

    @classmethod
    def of(cls, environment: Mapping[str, str], name: str = "") -> Self | None:
        """Returns the job that ``environment`` puts a process into, None for a process alone.

        ``name`` is the user's own for it; who gives one is in a job whatever the launcher says.
        """
        size = _number(environment, "WORLD_SIZE", 0)
        if size <= 1 and not name:
            return None
        local = _number(environment, "LOCAL_WORLD_SIZE", 0)
        nodes = _number(environment, "SLURM_STEP_NUM_NODES", 0)
        one_host = local == size > 1 or nodes == 1 or (size <= 1 and nodes == 0)
        port = _number(environment, "MASTER_PORT", 0)
        agent = None
        if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and environment.get("MASTER_ADDR") and port:
            agent = (environment["MASTER_ADDR"], port)
        # torchrun counts restarts on each node for itself: only on one do all ranks read the same.
        attempt = _number(environment, "TORCHELASTIC_RESTART_COUNT", 0) if local == size else 0
        whole = _short(name or _name(environment))
        return cls(whole, size, _number(environment, "RANK", -1), one_host, agent, attempt)

    @classmethod
    def of_process_group(cls) -> Self | None:
        """Returns the job of torch.distributed's default group, None where there is none, or of this process alone."""
        # Settings are read without torch: a process that has not loaded it is in no group.
        distributed = getattr(sys.modules.get("torch"), "distributed", None)
        if (
            distributed is None
            or not (distributed.is_available() and distributed.is_initialized())
            or distributed.get_world_size() <= 1
        ):
            return None
        return cls(size=distributed.get_world_size(), rank=distributed.get_rank())

    @property
    def shown(self) -> str:
        """How messages call this process."""
        return f"rank {self.rank}" if self.rank >= 0 else "a process"


def _name(environment: Mapping[str, str]) -> str:
    """Returns what the launchers call the job, "" where none of them has a name that no other job has."""
    run = environment.get("TORCHELASTIC_RUN_ID", "")
    slurm = environment.get("SLURM_JOB_ID", "")
    parts = [] if run in _UNNAMED else [f"run {run}"]
    if slurm:
        step, restarts = environment.get("SLURM_STEP_ID", ""), environment.get("SLURM_RESTART_COUNT", "0")
        parts.append(f"slurm {environment.get('SLURM_CLUSTER_NAME', '')} {slurm}.{step}.{restarts}")
    if parts and environment.get("MASTER_PORT"):
        parts.append(f"port {environment['MASTER_PORT']}")
    return ", ".join(parts)


def _short(name: str) -> str:
    """Returns ``name``, or as much of it as fits with a hash of the rest; bytes that are no UTF-8 as escapes."""
    name = name.encode("utf-8", "backslashreplace").decode()
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME - 17]} {hashlib.sha256(name.encode()).hexdigest()[:16]}"


def _number(environment: Mapping[str, str], name: str, otherwise: int) -> int:
    text = environment.get(name, "").strip()
    return int(text) if text.isdecimal() and len(text) < 10 else otherwise
