"""The caller's door to children that compile, prove and time kernels, so that no candidate can hurt the caller.

There are two. The *compiler* never sees a GPU and forks one process per candidate; what it makes stays in Triton's
disk cache. The *runner* loads it from there and launches it. Whatever a candidate does to either of them (abort,
hang, a sticky CUDA error, all of the memory), the child is killed, started again, and the candidate has its verdict.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Final, Self

from autotune import room
from autotune.device import DeviceInfo
from autotune.errors import NoRoom
from autotune.gate.accuracy import GateFault
from autotune.outcome import Outcome
from autotune.process import Child, ChildDied, Message, SandboxError
from autotune.surroundings import environment
from cache_db.models import Config, Problem, Scalar

__all__ = ["GateFault", "Limits", "Outcome", "Sandbox", "SandboxError"]

CANCEL_SECONDS: Final = 5.0
SERVER_GRACE_SECONDS: Final = 30.0
Item = tuple[str, Config]


def _workers(cores: int) -> int:
    """Returns twice the cores, at most 16 more than there are: each compile takes memory too."""
    return cores + min(cores, 16)


@dataclass(frozen=True)
class Limits:
    """How long one compile, one trial (from launch to verdict) and the start of a child may take, and how many compile at once.

    More compile than there are cores: a slot that waits for a process to end, or for the last compile, idles no core.
    """

    compile_seconds: float = 60
    trial_seconds: float = 30
    start_seconds: float = 120
    workers: int = field(default_factory=lambda: _workers(len(os.sched_getaffinity(0))))


class Sandbox:
    """Children for one problem on one device. Cheap to construct: they start when first needed.

    ``compile`` may run in another thread than ``prove`` and ``measure``. Every method raises SandboxError when no
    child can be started, NoRoom when too little memory is free, and GateFault when the spec's own answers cannot judge.
    """

    def __init__(self, problem: Problem, device: DeviceInfo, limits: Limits = Limits()) -> None:
        self._device = device
        self._limits = limits
        inner = device if device.interpreted else replace(device, index=0)
        hello: Message = {
            "problem": problem.model_dump(),
            "device": inner.to_json(),
            "workers": max(limits.workers, 1),
            "compile_seconds": limits.compile_seconds,
        }
        start = limits.start_seconds
        self._compiler = Child("compiler", hello, environment(device, gpu=False), start)
        self._runner = Child("runner", hello, environment(device, gpu=not device.interpreted), start, self.admit)
        self._shrunk = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def admit(self) -> None:
        """Raises SandboxError or NoRoom where no child may run beside this process now."""
        room.admit(self._device)

    def close(self) -> None:
        """Kills the children; nothing can be asked afterwards."""
        self._compiler.close()
        self._runner.close()

    def compile(self, items: Sequence[Item]) -> Iterator[tuple[str, Config, Outcome]]:
        """Compiles ``items`` (kernel, config), several at a time, and yields each with its outcome as it is done.

        The work starts with the call and goes on while the caller does something else; one call at a time. Closing
        the iterator early stops what is left. Figures hold the compiler's statistics and ``compile_seconds``.
        """
        if self._device.interpreted:
            return self._compile_interpreted(items)
        self._runner.start()  # its imports and CUDA context cost seconds: let them overlap the compiles
        stream = self._compile_streaming(list(items))
        next(stream)  # the request is on its way when this returns
        return (result for result in stream if result is not None)

    def prove(
        self,
        kernel: str,
        config: Config,
        proven_with: Mapping[str, Config],
        level: int,
        seed: int,
        repeats: int | None = None,
        *,
        detail: bool = False,
    ) -> Outcome:
        """Puts one config through the gate at ``level`` 1, 2 or 3 (a soak's), with ``repeats`` race repeats instead of the level's own.

        ``detail`` asks for the figures of every output, and has a wrong config judged on all cases.

        ``proven_with`` names the config of every kernel that ``kernel`` depends on; those run first, on the same inputs.
        """
        question: Message = {"do": "prove", "kernel": kernel, "config": config.model_dump(), "level": level}
        question |= {"proven_with": _dump(proven_with), "seed": seed, "repeats": repeats, "detail": detail}
        return self._judge(question, seed)

    def fingerprints(self, seed: int) -> list[str]:
        """Returns the SHA-256 of each run of a reference computation that any healthy device repeats to the bit.

        Raises GateFault also when the child dies of it: no candidate is involved.
        """
        try:
            found: list[str] = self._ask({"do": "fingerprints", "seed": seed})["fingerprints"]
        except ChildDied as death:
            raise GateFault(f"a reference computation failed: {death.reason}") from death
        return found

    def measure(
        self, kernel: str, configs: Sequence[Config], proven_with: Mapping[str, Config], rounds: int
    ) -> dict[str, dict[str, Scalar]]:
        """Times ``configs`` in turn for ``rounds`` rounds at the representative size, with a cold L2.

        Returns config hash -> ``ms`` (median), ``p20``, ``p80`` and ``samples``, all times in milliseconds, more of
        :meth:`autotune.timing.Record.figures`, and the statistics of the loaded kernel; a config that is missing failed.
        Where memory is short, smaller sizes are timed: ``timed_at`` names what of them is smaller.
        """
        remaining = list(dict.fromkeys(configs))
        while remaining:
            suspect: list[str] = []
            question: Message = {"do": "measure", "kernel": kernel, "rounds": rounds}
            question |= {"proven_with": _dump(proven_with), "configs": [config.model_dump() for config in remaining]}
            try:
                answer = self._ask(question, lambda event: suspect.append(event.get("config", "")))  # noqa: B023
            except ChildDied:
                culprit = suspect[-1] if suspect else ""
                if not culprit and len(remaining) > 1:  # it died in the interleaved rounds: find out alone who it was
                    return self._measure_alone(kernel, remaining, proven_with, rounds)
                remaining = [config for config in remaining if culprit and config.hash != culprit]
            else:
                figures: dict[str, dict[str, Scalar]] = answer["figures"]
                return figures
        return {}

    def _measure_alone(
        self, kernel: str, configs: Sequence[Config], proven_with: Mapping[str, Config], rounds: int
    ) -> dict[str, dict[str, Scalar]]:
        figures: dict[str, dict[str, Scalar]] = {}
        for config in configs:
            figures |= self.measure(kernel, [config], proven_with, rounds)
        return figures

    def _judge(self, question: Message, seed: int) -> Outcome:
        """Asks the runner for an outcome; its death is one too."""
        started = time.monotonic()
        try:
            outcome = Outcome.from_json(self._ask(question)["outcome"])
        except ChildDied as death:
            outcome = Outcome(death.verdict, reason=death.reason, seed=seed)
        return replace(outcome, seconds=time.monotonic() - started)

    def _ask(self, question: Message, notice: Callable[[Message], None] = lambda _: None) -> Message:
        """Returns the runner's answer, asked once more where memory lacks, with what this process can give back.

        That is nothing where a candidate's own launch alone lacks it. Raises NoRoom where the second answer is no other.
        """
        answer = self._converse({**question, "shrunk": self._shrunk}, notice)
        if "no_room" in answer:
            if not answer["own"]:  # one candidate's appetite is no reason to stop the caller's GPU
                room.release(self._device)
            answer = self._converse({**question, "shrunk": self._shrunk, "again": True}, notice)
        if "no_room" in answer:
            raise NoRoom(answer["no_room"])
        self._shrunk = answer["shrunk"]
        return answer

    def _converse(self, question: Message, notice: Callable[[Message], None]) -> Message:
        """Returns the runner's answer; each event it reports on the way is noticed and restarts the clock.

        Work on the spec's own answers ("reference") has the time of a start, and its failure is the gate's.
        """
        with self._runner.lock:
            self._hand_over(question)
            stage, limit = "trial", self._limits.trial_seconds
            while True:
                try:
                    answer = self._runner.receive(limit)
                except ChildDied as death:
                    if stage == "reference" and not self._runner.closed:
                        raise GateFault(f"the reference answers could not be computed: {death.reason}") from death
                    raise
                if "event" not in answer:
                    break
                notice(answer)
                stage = answer["event"]
                limit = self._limits.start_seconds if stage == "reference" else self._limits.trial_seconds
            if answer.get("sticky"):
                self._runner.kill()
            if "fault" in answer:
                raise GateFault(answer["fault"])
            return answer

    def _hand_over(self, question: Message) -> None:
        """Sends ``question`` and waits until the runner has it. One that died before is not the candidate's doing."""
        self._runner.send(question)
        try:
            self._runner.receive(self._limits.start_seconds)
        except ChildDied:
            if self._runner.closed:
                raise
            self._runner.send(question)
            self._runner.receive(self._limits.start_seconds)

    def _compile_interpreted(self, items: Sequence[Item]) -> Iterator[tuple[str, Config, Outcome]]:
        for kernel, config in items:
            if self._runner.closed:
                return
            question: Message = {"do": "compile", "kernel": kernel, "config": config.model_dump()}
            yield kernel, config, self._judge(question, 0)

    def _compile_streaming(self, items: list[Item]) -> Iterator[tuple[str, Config, Outcome] | None]:
        """Yields None once the compiler has the request, then the results."""
        if not self._compiler.lock.acquire(blocking=False):
            raise SandboxError("a compile is going on already: exhaust or close its iterator first")
        waiting = dict(enumerate(items))
        try:
            self._request(waiting)
            yield None
            lives = 2
            while waiting and not self._compiler.closed:
                try:
                    answer = self._compiler.receive(self._limits.compile_seconds + SERVER_GRACE_SECONDS)
                except ChildDied as death:
                    lives -= 1
                    if lives and not self._compiler.closed:
                        self._request(waiting)
                        continue
                    while waiting and not self._compiler.closed:
                        _, (kernel, config) = waiting.popitem()
                        yield kernel, config, Outcome(death.verdict, reason=death.reason)
                    return
                kernel, config = waiting.pop(answer["item"])
                yield kernel, config, Outcome.from_json(answer["outcome"])
        finally:
            if waiting:
                self._cancel()
            self._compiler.lock.release()

    def _request(self, waiting: Mapping[int, Item]) -> None:
        items = [[number, kernel, config.model_dump()] for number, (kernel, config) in waiting.items()]
        self._compiler.send({"do": "compile", "items": items})

    def _cancel(self) -> None:
        """Empties the compiler's queue, or kills it when it does not answer."""
        if self._compiler.closed or self._compiler.pid is None:
            return
        try:
            self._compiler.send({"do": "cancel"})
            while "cancelled" not in self._compiler.receive(CANCEL_SECONDS):
                pass
        except (ChildDied, SandboxError):
            self._compiler.kill()


def _dump(configs: Mapping[str, Config]) -> Message:
    return {kernel: config.model_dump() for kernel, config in configs.items()}
