"""Workers that tune one list of problems together: those of torchrun or srun, or any processes with one database.

No worker knows of another. Each takes what nobody has the lease of, leaves what somebody living tunes, comes back for
what a dead one left, and ends when all is decided; so workers may join and leave at any time. One of them, who has the
speaker's lease, shows the progress of all.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from autotune import Resolution
from autotune.errors import Taken
from autotune.lease import address, claim, holder_of
from autotune.progress import remaining
from autotune.spec import load
from cache_db.models import Problem, digest

if TYPE_CHECKING:
    from cache_db import Layers

POLL_SECONDS: Final = 1.0
REPORT_SECONDS: Final = 5.0


@dataclass(frozen=True)
class Place:
    """Where a worker stands: ``rank`` of ``size``, and ``local_rank`` of ``local_size`` on its node."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Self:
        """Returns the place that torchrun, or else srun, gave this process; the only one where neither started it."""
        torchrun = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        srun = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
        for names in (torchrun, srun):
            # "2,4(x2)" is what Slurm says for a node with two tasks and two with four: a share is that of the fullest.
            texts = [[each.partition("(")[0] for each in environment.get(name, "").split(",")] for name in names]
            if all(each.isdecimal() for text in texts for each in text):
                rank, size, local_rank, local_size = (max(map(int, text)) for text in texts)
                if rank < size and local_rank < local_size:
                    return cls(rank, size, local_rank, local_size)
        return cls()

    def device(self, count: int) -> int | None:
        """Returns the CUDA device of this worker among ``count`` it sees, None for whichever is current."""
        return self.local_rank % count if self.local_size > 1 and count > 1 else None

    def cores(self, allowed: Sequence[int]) -> list[int]:
        """Returns this worker's equal share of the ``allowed`` cores of its node, all where there are fewer than workers."""
        share = len(allowed) // self.local_size
        return sorted(allowed)[self.local_rank * share : (self.local_rank + 1) * share] if share else sorted(allowed)

    def keep_to_share(self) -> None:
        """Limits this process, and all that it starts, to its share, unless its launcher has bound it to as few cores."""
        if self.local_size > 1:
            allowed = sorted(os.sched_getaffinity(0))
            if len(allowed) * self.local_size > (os.cpu_count() or 1):
                os.sched_setaffinity(0, self.cores(allowed))

    def first(self, problems: Sequence[Problem]) -> list[Problem]:
        """Returns ``problems`` from where this worker begins, so that not all begin with the same."""
        start = self.rank * len(problems) // self.size
        return [*problems[start:], *problems[:start]]


def shared_out(
    problems: Sequence[Problem], store: Layers, tune: Callable[[Problem, bool], Resolution], patience: float
) -> Iterator[tuple[Problem, Resolution]]:
    """Yields each of ``problems`` with what ``tune`` found for it, once, as soon as nobody else is at it.

    ``tune`` may raise Taken for one that somebody else has taken meanwhile, unless it is told that this is the last
    chance: who has kept a problem for ``patience`` seconds is waited for no longer.
    """
    left = list(problems)
    owners: set[str] = set()
    changed = time.monotonic()
    while left:
        busy = {each.hash: lease for each in left if (lease := holder_of(store, each)) is not None}
        found = {f"{name} {lease.owner}" for name, lease in busy.items()}
        if found != owners:
            owners, changed = found, time.monotonic()
        last = time.monotonic() - changed >= patience
        ready = [each for each in left if last or each.hash not in busy]
        if not ready:
            time.sleep(min(POLL_SECONDS, patience))
        for each in ready:
            if not last and holder_of(store, each) is not None:
                continue
            try:
                outcome = tune(each, last)
            except Taken:
                continue
            left.remove(each)
            changed = time.monotonic()
            yield each, outcome


def has_winners(problem: Problem, store: Layers, since: float = 0.0) -> bool:
    """Returns whether every kernel of ``problem``, or what takes its place, has a winner that was chosen after ``since``."""
    spec = load(problem.spec)
    found = [name for name, row in store.winners(problem).items() if row.created_at >= since]
    alternatives = getattr(spec, "alternatives", None)
    covered = alternatives(problem) if alternatives else {}
    return {*found, *(place for name in found for place in covered.get(name, ()))}.issuperset(spec.kernels(problem))


class Speaker:
    """The one worker of a crew that shows progress; another takes over when it is gone. Use in a ``with`` block."""

    def __init__(self, problems: Sequence[Problem], store: Layers, size: int, since: float) -> None:
        self._problems = list(problems)
        self._store = store
        self._size = size
        self._since = since
        self._name = digest(["prewarm", sorted(each.hash for each in problems)])
        self._held = ExitStack()
        self._over = threading.Event()
        self.speaking = False

    def __enter__(self) -> Self:
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._held.close()

    def listen(self) -> None:
        """Becomes the speaker if there is none. A process alone that has nothing to tune writes no lease."""
        if self.speaking:
            return
        if self._size == 1 and self._done() == len(self._problems):
            self.speaking = True
            return
        lease = claim(self._store, self._name, 0.0)
        if lease is None:
            return
        self._held.enter_context(lease)
        self.speaking = True
        self._held.enter_context(self._reporting())

    def say(self, text: str) -> None:
        """Prints ``text`` if this is the speaker."""
        if self.speaking:
            print(text, flush=True)

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        thread = threading.Thread(target=self._report, name="prewarm-report", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def _report(self) -> None:
        """Says on stderr how far the whole crew is, whenever that has changed."""
        start, total, others = time.monotonic(), len(self._problems), False
        first = told = self._done()
        while not self._over.wait(REPORT_SECONDS):
            busy = [lease for each in self._problems if (lease := holder_of(self._store, each)) is not None]
            others |= any(lease.owner.partition(":")[0] != address() for lease in busy)
            done = self._done()
            if done == told or not others:  # a process alone shows its own progress
                continue
            told = done
            hosts = ", ".join(sorted({lease.host for lease in busy})) or "nobody"
            left = remaining(done - first, total - first, time.monotonic() - start)
            text = f"{done} of {total} problems have winners, {len(busy)} are being tuned by {hosts}, {left} left"
            print(f"prewarm: {text}", file=sys.stderr, flush=True)

    def _done(self) -> int:
        return sum(has_winners(each, self._store, self._since) for each in self._problems)
