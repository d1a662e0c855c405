"""What :func:`flashbias.explain` returns: the answer as an object, in words and as plain data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from autotune import explanation
from autotune.evidence import level, margins, plain, proof_lines, when
from autotune.explanation import Answer, Doing
from autotune.messages import summary
from cache_db.models import Lease, Trial, Winner

RUNGS: Final = ("eager", "default", "neighbour", "winner", "pinned")
_DIGITS: Final = 12  # of a hash that people are shown
_FIRST: Final = frozenset({Doing.TUNE, Doing.WAIT, Doing.RAISE})  # a call does this before anything runs


@dataclass(frozen=True)
class Explanation:
    """What a call runs and why; ``str`` of it is for people, :meth:`to_json` for programs.

    ``reason`` says why there is no kernel where ``found`` is None; otherwise ``found`` is what the tuner answers.
    """

    reason: str
    found: explanation.Explanation | None = None

    @property
    def rung(self) -> str:
        """The lowest rung of the ladder that a kernel of the call stands on: pinned, winner, neighbour, default or eager.

        "none" where a call first tunes, waits for another process that does, or raises.
        """
        if self.found is None:
            return RUNGS[0]
        return "none" if self.found.doing in _FIRST else _lowest(self.found)

    @property
    def proven(self) -> bool:
        """Whether every kernel of the call has a proven winner, or pin, that runs here (proofs that are due passing)."""
        return self.found is not None and self.found.won

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> Iterator[str]:
        """Yields what a person reads."""
        if self.found is None:
            yield "answer    eager: PyTorch in chunks"
            yield f"because   {self.reason}"
            return
        yield from _lines(self.found, self.rung)

    def to_json(self) -> dict[str, Any]:
        """Returns the same as plain data."""
        head = {"rung": self.rung, "proven": self.proven, "reason": self.reason}
        found: dict[str, Any] = plain(head if self.found is None else {**head, **_data(self.found)})
        return found


def _lowest(found: explanation.Explanation) -> str:
    return min((each.choice.rung for each in found.answers), key=RUNGS.index, default=RUNGS[0])


def _lines(found: explanation.Explanation, rung: str) -> Iterator[str]:
    device, environment = found.device, found.device.environment
    yield f"problem   {found.problem.hash[:_DIGITS]}  {summary(found.problem)}"
    where = f"{device.name}, Triton {device.triton_version}, torch {environment.torch}"
    drivers = f", driver {environment.driver}, ptxas {environment.ptxas}" if environment.driver else ""
    yield f"on        {where}{drivers}"
    yield f"database  {found.location}"
    yield f"answer    {_ANSWERS[rung]}"
    if found.reason:
        yield f"because   {found.reason}"
    yield f"now       {_now(found)}"
    for each in found.answers:
        yield from _answer_lines(each, found.problem.key(each.kernel))
    if found.lease is not None:
        yield f"lease     {_holder(found.lease)} since {when(found.lease.acquired_at)}"
    for other, differences in found.nearest:
        told = "; ".join(map(str, differences)) or "the same"
        yield f"nearest   {other.hash[:_DIGITS]}  {told}"
    if not found.won and not found.nearest:
        yield "nearest   none: the database holds no winner at all"
    if found.cure:
        yield f"cure      {found.cure}"


_ANSWERS: Final = {
    "pinned": "pinned: a config that a person chose, proven here, for at least one kernel; winners for the others",
    "winner": "winner: the fastest config that was proven right, for every kernel",
    "neighbour": "neighbour: what won for other lengths, after a quick proof on this problem",
    "default": "default: the spec's default config, after a quick proof on this problem",
    "eager": "eager: PyTorch in chunks",
    "none": "none yet: nothing that may run as it is has been stored",
}


def _now(found: explanation.Explanation) -> str:
    """Returns what a call does at this moment, in words."""
    mode, seconds = found.settings.mode, found.settings.wait_seconds
    fallback = _ANSWERS[_lowest(found)].partition(":")[0]
    due = ", ".join(f"{each.kernel} ({level(each.due)})" for each in found.answers if each.due)
    if found.doing is Doing.DECIDED:
        return f"this process has decided so, and keeps to it: a call runs {'them' if found.answers else 'it'} at once"
    if found.doing is Doing.PROVE:
        return f"a call first proves again, in seconds: {due}; one that fails is not run"
    if found.doing is Doing.TUNE:
        sizes = ", ".join(f"{count} {kernel}" for kernel, count in found.sizes.items())
        return (
            f'mode "{mode}": a call tunes it first, {sizes} candidates, at most {found.seconds:g} s; '
            f"if that finds nothing it runs: {fallback}"
        )
    if found.doing is Doing.WAIT:
        wait = f"waits up to {seconds:g} s for it, then runs" if seconds else "does not wait, and runs"
        return f'mode "{mode}": another process is tuning it; a call {wait}: {fallback}'
    if found.doing is Doing.RAISE:
        return f'mode "{mode}": a call raises CacheMiss'
    return f'mode "{mode}": a call runs {"them at once" if found.answers else "PyTorch in chunks"}'


def _answer_lines(each: Answer, key: str) -> Iterator[str]:
    """Yields what is known of one kernel: config, level, time, errors with margins, who tuned it and when."""
    choice, trial, winner = each.choice, each.trial, each.winner
    yield f"kernel    {each.kernel}: {choice.rung}"
    yield f"  config    {choice.config.hash[:_DIGITS]}  {choice.config}, of key {key[:_DIGITS]}"
    proof = f"{level(each.due)} is due before it runs" if each.due else f"{level(choice.level)}, holds here"
    yield f"  proof     {proof}{f', of binary {choice.binary[:_DIGITS]}' if choice.binary else ''}"
    if each.neighbour is not None:
        yield f"  from      problem {each.neighbour.hash[:_DIGITS]}  {summary(each.neighbour)}"
    if winner is not None:
        rest = "" if winner.complete else ": the sweep ended early, or timed smaller sizes"
        yield f"  time      {winner.ms:.4g} ms at the representative size; {winner.tried} of {winner.total} tried{rest}"
    if trial is not None:
        yield from (f"  {line}" for line in proof_lines(trial.figures))
        yield f"  tuned     {tuned(trial, winner)}"
    if each.pin is not None:
        pin = each.pin
        yield f"  pinned    by {pin.pinned_by} on {pin.host}, {when(pin.created_at)}: {pin.reason or 'no reason given'}"


def tuned(trial: Trial, winner: Winner | None) -> str:
    """Returns who tuned a config, where, when and with what."""
    made = trial.environment
    tools = ", ".join(
        f"{name} {value}"
        for name, value in (("driver", made.driver), ("ptxas", made.ptxas), ("torch", made.torch))
        if value
    )
    at = when(trial.created_at if winner is None else winner.created_at)
    return f"on {trial.host}{f', {trial.gpu_uuid}' if trial.gpu_uuid else ''}, {at}; {tools}"


def _holder(lease: Lease) -> str:
    process = lease.owner.rpartition("/")[2].partition("-")[0]
    return f"process {process} on {lease.host} is tuning it"


def _data(found: explanation.Explanation) -> dict[str, Any]:
    lease = found.lease
    return {
        "problem": {"hash": found.problem.hash, **found.problem.model_dump()},
        "environment": found.device.environment.model_dump(),
        "gpu_uuid": found.device.uuid,
        "database": found.location,
        "mode": str(found.settings.mode),
        "doing": str(found.doing),
        "budget_seconds": found.settings.budget_seconds,
        "wait_seconds": found.settings.wait_seconds,
        "candidates": dict(found.sizes),
        "sweep_seconds": found.seconds or None,
        "kernels": [_answer_data(each, found.problem.key(each.kernel)) for each in found.answers],
        "lease": None if lease is None else lease.model_dump(),
        "nearest": list(_near_data(found)),
        "cure": found.cure,
    }


def _answer_data(each: Answer, key: str) -> dict[str, Any]:
    trial, winner, pin = each.trial, each.winner, each.pin
    return {
        "kernel": each.kernel,
        "key": key,
        "rung": each.choice.rung,
        "config_hash": each.choice.config.hash,
        "config": each.choice.config.model_dump(),
        "level": each.choice.level,
        "due_level": each.due,
        "binary": each.choice.binary,
        "ms": None if winner is None else winner.ms,
        "tried": None if winner is None else winner.tried,
        "total": None if winner is None else winner.total,
        "complete": None if winner is None else winner.complete,
        "margins": {} if trial is None else margins_data(trial),
        "tuned": None if trial is None else _tuned_data(trial),
        "pinned": None if pin is None else pin.model_dump(exclude={"problem", "kernel", "config"}),
        "neighbour": None if each.neighbour is None else each.neighbour.hash,
    }


def margins_data(trial: Trial) -> dict[str, Any]:
    """Returns output -> worst error and its part of the budget."""
    return {each.output: {"error": each.error, "budget_part": each.ratio} for each in margins(trial.figures)}


def _tuned_data(trial: Trial) -> dict[str, Any]:
    names = ("host", "gpu_uuid", "created_at", "seconds", "seed")
    return {**{name: getattr(trial, name) for name in names}, "environment": trial.environment.model_dump()}


def _near_data(found: explanation.Explanation) -> Iterable[dict[str, Any]]:
    for other, differences in found.nearest:
        yield {
            "problem_hash": other.hash,
            "differs": {each.name: {"there": each.there, "wanted": each.wanted} for each in differences},
        }
