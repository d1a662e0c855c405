"""What the ranks of one job launch, problem by problem: the first to decide publishes, all others take that.

No rank waits for another that it does not see working. What is published is a whole decision (configs with their
implementations and versions, rungs, levels, binaries), so that a rank needs nothing of its own database; what a rank
may not run by its own rules and proofs is not run, and said. The place is chosen by what there is, never by what
answers: torch.distributed's Store, else the shared database, else, for a job on one host, the user's. Two ranks that
cannot reach it must not fall back on places that differ: they take what is the same everywhere.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from autotune import kinship, rendezvous
from autotune.job import Job
from autotune.lease import POLL_SECONDS, hostname
from autotune.messages import summary
from autotune.proofs import Choice, Prover, Rung
from autotune.rendezvous import Unreachable
from autotune.resolution import Resolution
from autotune.settings import Mode
from cache_db.models import Agreement, Config, Environment, Verdict, digest

if TYPE_CHECKING:
    from autotune.scene import Scene
    from autotune.settings import Settings
    from cache_db import Layers

LONGEST_PAUSE: Final = 1.0
EMPTY_SECONDS: Final = 10.0
"""How long a rank that found nothing waits for one that finds something, before it binds all to nothing."""
_CURE: Final = "call torch.distributed.init_process_group first, name a shared database, or, if its processes need not agree, FLASHBIAS_JOB=none"

logger = logging.getLogger(__name__)


class Agreed(BaseModel):
    """A decision as it is published. ``environment`` is the one its proofs are of."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    class Part(BaseModel):
        """The choice of one kernel."""

        model_config = ConfigDict(frozen=True, extra="forbid")

        kernel: str
        config: Config
        rung: Rung
        level: int = Field(ge=0, le=3)
        binary: str

    parts: tuple[Part, ...]
    reason: str
    environment: Environment
    rank: int
    host: str

    @classmethod
    def of(cls, found: Resolution, environment: Environment, job: Job) -> Self:
        """Returns ``found`` as rank ``job.rank`` publishes it."""
        parts = tuple(
            cls.Part(kernel=kernel, config=choice.config, rung=choice.rung, level=choice.level, binary=choice.binary)
            for kernel, choice in found.choices.items()
        )
        return cls(parts=parts, reason=found.reason, environment=environment, rank=job.rank, host=hostname())

    @property
    def by(self) -> str:
        """Who decided, for messages."""
        return f"rank {self.rank} on {self.host}" if self.rank >= 0 else f"a process on {self.host}"


class Settled(Exception):
    """The job has decided the problem that this process was about to decide."""

    def __init__(self, agreed: Agreed) -> None:
        super().__init__(agreed.reason)
        self.agreed = agreed


class _Turn(Protocol):
    def take(self, now: float) -> bool: ...

    def release(self) -> None: ...


class _Place(Protocol):
    shown: str

    def read(self, name: str) -> str | None: ...

    def publish(self, name: str, text: str) -> str: ...

    def turn(self, name: str) -> _Turn | None: ...


class _Table:
    """The jobs table of a database as a place to agree; the database's own lease says whose turn it is."""

    def __init__(self, store: Layers, job: Job) -> None:
        self.shown = f"the table of jobs in {store.location}"
        self._store = store
        self._job = job

    def read(self, name: str) -> str | None:
        """Returns what stands under ``name``, None if nothing does. Raises Unreachable."""
        found = self._store.agreed(*self._names(name))
        if found is None:
            raise Unreachable(f"{self.shown} cannot be read")
        return None if found[0] is None else found[0].configs

    def publish(self, name: str, text: str) -> str:
        """Writes ``text`` under ``name`` unless something stands there; returns what does. Raises Unreachable."""
        job_id, problem_hash = self._names(name)
        row = Agreement(job_id=job_id, problem_hash=problem_hash, configs=text, host=hostname(), created_at=time.time())
        found = self._store.agree(row)
        if found is None:
            raise Unreachable(f"{self.shown} cannot be written")
        return found.configs

    def turn(self, _name: str) -> None:
        """Returns that there is none but the lease."""

    def _names(self, name: str) -> tuple[str, str]:
        topic, _, problem_hash = name.rpartition("/")
        return f"{self._job.name}#{topic}", problem_hash


class Bond:
    """What holds one rank to its job for one problem, as long as that is decided. Use in a ``with`` block.

    ``seconds``: how long the rank may wait for others; ``held`` keeps what must not be given back before all is published.
    """

    def __init__(self, job: Job, place: _Place | None, name: str, seconds: float) -> None:
        self.job = job
        self.seconds = seconds
        self.held = ExitStack()
        self._place = place
        self._name = name

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.held.close()

    def check(self) -> None:
        """Raises Settled when the job has decided, Unreachable when that cannot be known."""
        text = self._found().read(self._name)
        if text is not None:
            raise Settled(_parsed(text))

    def publish(self, agreed: Agreed) -> None:
        """Makes ``agreed`` the job's decision. Raises Settled when another came first, and Unreachable."""
        stands = _parsed(self._found().publish(self._name, agreed.model_dump_json()))
        if stands != agreed:
            raise Settled(stands)

    def take_turn(self, until: float) -> bool:
        """Returns whether this rank may sweep; waits for that until ``until`` (monotonic). Raises Settled and Unreachable."""
        turn = self._found().turn(self._name)
        if turn is None:
            return True
        for _ in self._waiting(until):
            if turn.take(time.monotonic()):
                self.held.callback(turn.release)
                self.check()
                return True
        return False

    def linger(self, seconds: float) -> None:
        """Waits up to ``seconds`` for another rank's decision, which raises Settled. Raises Unreachable."""
        for _ in self._waiting(time.monotonic() + seconds):
            pass

    def _waiting(self, until: float) -> Iterator[None]:
        """Yields at least once, again and again until the time is over; checks before each."""
        pause = POLL_SECONDS / 4
        while True:
            self.check()
            yield
            left = until - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(left, random.uniform(pause / 2, pause)))  # noqa: S311 - jitter keeps no secret
            pause = min(2 * pause, LONGEST_PAUSE)

    def _found(self) -> _Place:
        if self._place is None:
            raise Unreachable(f"the ranks of this job have no place in common: {_CURE}")
        return self._place


def bond(scene: Scene, epoch: int) -> Bond | None:
    """Returns what holds this process to its job in deciding ``scene``'s problem, None for a process alone."""
    settings = scene.settings
    job = None if settings.alone else settings.job or Job.of_process_group()
    if job is None:
        return None
    topic, place = f"{job.attempt}.{epoch}/{_variant(settings)}", _place(job, scene.store, settings)
    kinship.compare(place, topic, scene.problem, job)
    grouped = settings.job is None and settings.group_wait_seconds is not None
    seconds = settings.group_wait_seconds if grouped else settings.wait_seconds
    return Bond(job, place, f"{topic}/{scene.problem.hash}", seconds or 0.0)


def decide(scene: Scene, held: Bond, alone: Callable[[], Resolution], alike: Callable[[str], Resolution]) -> Resolution:
    """Returns what the job runs: what it has agreed on, else what ``alone`` finds, if that becomes the agreement.

    ``alike`` finds what is the same for every rank, and is told why that is needed.
    """
    found = None
    try:
        held.check()
        found = alone()
        if not found.choices:
            held.linger(min(EMPTY_SECONDS, held.seconds))
        held.publish(Agreed.of(found, scene.device.environment, held.job))
    except Settled as settled:
        taken = adopted(scene, settled.agreed, held.job)
        return replace(taken, swept=found is not None and found.swept)
    except Unreachable as error:
        return replace(alike(str(error)), swept=found is not None and found.swept)
    return found


def adopted(scene: Scene, agreed: Agreed, job: Job) -> Resolution:
    """Returns ``agreed`` as this rank runs it: proven here where its proofs are of another environment, or not at all."""
    reason = f"agreed on by the job, as {agreed.by} found it: {agreed.reason}"
    fault, choices = _accepted(scene, agreed)
    if fault:
        logger.error(
            "%s: %s (%s) cannot run what its job has agreed on (%s): %s; running without a tuned kernel, so that this rank's "
            "results are its own. Give all ranks the same packages and drivers, then call flashbias.refresh() or start anew",
            summary(scene.problem),
            job.shown,
            hostname(),
            agreed.by,
            fault,
        )
        return Resolution({}, f"{reason}; not run here: {fault}", False, scene.store.location)
    found = Resolution(choices, reason, False, scene.store.location)
    level = logging.WARNING if job.rank <= 0 and not found.won else logging.INFO
    logger.log(level, "%s: %s", summary(scene.problem), reason)
    return found


def _accepted(scene: Scene, agreed: Agreed) -> tuple[str, dict[str, Choice]]:
    """Returns why this rank cannot run ``agreed``, "" if it can, and the choices."""
    prover = Prover(scene)
    choices: dict[str, Choice] = {}
    names = [part.kernel for part in agreed.parts]
    covered = {*names, *(place for name in names for place in scene.alternatives.get(name, ()))}
    if names and (not covered.issuperset(scene.kernels) or not set(scene.every_kernel).issuperset(names)):
        return f"it names the kernels {', '.join(names)}, and {', '.join(scene.kernels)} are needed", {}
    for part in agreed.parts:
        refusal = scene.refuses(part.kernel, part.config)
        if refusal is not None:
            return f"{part.kernel} {part.config}: {refusal}", {}
        needed = 2 if part.rung in ("winner", "pinned") else 1
        try:
            proof = prover.accept(
                part.kernel, part.config, choices, needed, part.level, agreed.environment, part.binary
            )
        except KeyError as error:
            return f"{part.kernel} needs {error}, which comes later", {}
        if proof.verdict is not Verdict.SAFE:
            return f"{part.kernel} {part.config}: {proof.verdict}, {proof.reason}", {}
        choices[part.kernel] = Choice(part.config, part.rung, proof.level, proof.binary)
    return "", choices


def _place(job: Job, store: Layers, settings: Settings) -> _Place | None:
    if (found := rendezvous.find(job)) is not None:
        return found
    shared = settings.db_url is not None or (job.one_host and settings.cache_dir is not None)
    return _Table(store, job) if job.name and shared and settings.mode is not Mode.OFF else None


def _variant(settings: Settings) -> str:
    """Returns what of the settings makes another decision on purpose; databases and modes may differ between ranks."""
    return digest([settings.implementations, settings.space, settings.mode is Mode.OFF])[:12]


def _parsed(text: str) -> Agreed:
    """Returns the decision in ``text``. Raises Unreachable for what is none: another version of the library wrote it."""
    try:
        return Agreed.model_validate_json(text)
    except ValidationError as error:
        raise Unreachable(f"what the job has agreed on cannot be read ({error.error_count()} faults)") from None
