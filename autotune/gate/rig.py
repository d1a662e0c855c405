"""What a runner keeps ready between trials of one problem: compiled kernels, inputs, reference answers, buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, Literal

import torch

from autotune import room
from autotune.device import DeviceInfo
from autotune.errors import NoRoom
from autotune.gate.accuracy import GateFault, Yardstick, yardstick
from autotune.gate.memory import Arena, Padded, any_of, fingerprint
from autotune.spec import Case, KernelSpec, Tensors, TensorSpec
from cache_db.models import Config, Problem, canonical_json

# Loaded kernels that are kept: more than a usual sweep has. Each holds its assembly, about a megabyte.
MOST_KERNELS: Final = 256
# Steps to smaller timed sizes; a spec whose steps never end gets no more.
MOST_STEPS: Final = 64
Announce = Callable[[Literal["reference", "trial"]], None]


class LaunchOutOfMemoryError(torch.OutOfMemoryError):
    """A candidate's own launch found no memory, which others may need less of."""


class Stage:
    """One case with its inputs, padded and watched; the reference answers are computed when first asked for."""

    def __init__(self, case: Case, inputs: Padded) -> None:
        self.case = case
        self.inputs = inputs
        self.yardsticks: dict[str, Yardstick] = {}
        self._print: torch.Tensor | None = None

    def seal(self, yardsticks: dict[str, Yardstick]) -> None:
        """Takes the reference answers and remembers their bits."""
        self.yardsticks = yardsticks
        self._print = self._fingerprint()

    def damaged(self) -> torch.Tensor:
        """Returns on the device whether the reference answers are no longer what they were."""
        return self._fingerprint().ne(self._print) if self._print is not None else torch.zeros((), dtype=torch.bool)

    def _fingerprint(self) -> torch.Tensor:
        return fingerprint(tensor for yardstick in self.yardsticks.values() for tensor in yardstick.tensors())


class Feed:
    """All that a kernel reads: the stage's inputs and the outputs of the kernels it depends on."""

    def __init__(self, stage: Stage, produced: Tensors) -> None:
        self._parts = [stage.inputs, Padded(produced)] if produced else [stage.inputs]

    @property
    def tensors(self) -> Tensors:
        """The tensors by name; a produced one hides an input of its name."""
        return {name: tensor for part in self._parts for name, tensor in part.tensors.items()}

    def changed(self) -> torch.Tensor:
        """Returns on the device whether anything wrote to them."""
        return any_of([part.changed() for part in self._parts])

    def culprits(self) -> list[str]:
        """Returns the names of the tensors that changed."""
        return [name for part in self._parts for name in part.culprits()]


class Rig:
    """Runs the kernels of one problem on one device.

    ``announce`` is told when work on the reference answers begins and when the candidate's own time goes on.
    """

    def __init__(
        self, spec: KernelSpec, problem: Problem, device: DeviceInfo, announce: Announce = lambda _: None
    ) -> None:
        self.spec = spec
        self.problem = problem
        self.device = device
        self.cases = tuple(spec.cases(problem, device))
        self.race_case = spec.race_case(problem, device)
        self.representative = self._whole = spec.representative(problem, device)
        self.shrunk = 0
        self._announce = announce
        self._compiled: dict[tuple[str, str], Any] = {}
        self._stages: dict[str, Stage] = {}
        self._seed = 0
        self._arenas: dict[tuple[str, str], Arena] = {}

    @property
    def torch_device(self) -> torch.device:
        """Where inputs and outputs live."""
        return self.device.torch_device

    def compiled(self, kernel: str, config: Config) -> Any:
        """Returns ``kernel`` compiled with ``config``, from memory, else from the disk cache. Raises what the spec raises."""
        key = (kernel, config.hash)
        found = self._compiled.pop(key, None)
        if found is None:
            found = self.spec.compile(kernel, config, self.problem, self.device)
        self._compiled[key] = found  # the latest stands last
        if len(self._compiled) > MOST_KERNELS:
            del self._compiled[next(iter(self._compiled))]
        return found

    def stage(self, case: Case, seed: int, *, judged: bool = True) -> Stage:
        """Returns ``case`` with inputs from ``seed`` and, if ``judged``, its reference answers; one seed is kept."""
        if seed != self._seed:
            self._stages.clear()
            self._seed = seed
        key = _key(case)
        if key not in self._stages or (judged and not self._stages[key].yardsticks):
            with self.reference_time(), self.room(case):
                if key not in self._stages:
                    inputs = self.spec.inputs(self.problem, case, seed, self.torch_device)
                    self._stages[key] = Stage(case, Padded(inputs))
                if judged:
                    self._stages[key].seal(self._reference(self._stages[key]))
                self.wait()
        return self._stages[key]

    def feed(self, kernel: str, proven_with: Mapping[str, Config], stage: Stage) -> Feed:
        """Runs what ``kernel`` depends on, in order and with the configs of ``proven_with``, on the stage's inputs."""
        with self.room(stage.case):
            return Feed(stage, self.produced(kernel, proven_with, stage.case, stage.inputs.tensors))

    def produced(
        self, kernel: str, proven_with: Mapping[str, Config], case: Case, inputs: Mapping[str, torch.Tensor]
    ) -> Tensors:
        """Returns the outputs of all kernels that ``kernel`` depends on, for ``inputs``.

        Raises GateFault where one of them does not compile or run: ``kernel`` has no part in that. What was launched
        before this call is waited for first, so that its errors come out as they are.
        """
        produced: Tensors = {}
        self.wait()
        for name in self.requirements(kernel):
            if name not in proven_with:
                raise GateFault(f"{kernel} is judged through {name}, but no config of {name} was given")
            config = proven_with[name]
            try:
                compiled = self.compiled(name, config)
            except Exception as error:
                raise GateFault(f"{name} does not compile as {config}: {error}") from error
            buffers = allocate(self.spec.outputs(name, self.problem, case), self.torch_device)
            scratch = allocate(self.spec.scratch(name, self.problem, config, case), self.torch_device)
            try:
                self.spec.launch(name, compiled, self.problem, {**inputs, **produced}, buffers, scratch)
                self.wait()
            except Exception as error:
                if room.ran_out(error):  # that is the device's affair
                    raise
                raise GateFault(f"{name} does not run as {config}: {error}") from error
            produced |= buffers
        return produced

    def requirements(self, kernel: str) -> tuple[str, ...]:
        """Returns every kernel that must have run before ``kernel``, in running order."""
        needed: set[str] = set()
        open_ = list(self.spec.depends_on(kernel, self.problem))
        while open_:
            name = open_.pop()
            if name not in needed:
                needed.add(name)
                open_ += self.spec.depends_on(name, self.problem)
        return tuple(name for name in self.spec.kernels(self.problem) if name in needed)

    def outputs(self, kernel: str, case: Case) -> Arena:
        """Returns the guarded outputs of ``kernel`` on ``case``, the same ones for every candidate."""
        key = (kernel, _key(case))
        if key not in self._arenas:
            with self.room(case):
                self._arenas[key] = Arena(self.spec.outputs(kernel, self.problem, case), self.torch_device)
        return self._arenas[key]

    def scratch(self, kernel: str, config: Config, case: Case) -> Arena:
        """Returns guarded scratch for one candidate."""
        return Arena(self.spec.scratch(kernel, self.problem, config, case), self.torch_device)

    def alive(self) -> None:
        """Says that the candidate under trial is making progress."""
        self._announce("trial")

    def wait(self) -> None:
        """Waits for all work of this process's GPU; errors of earlier launches come out here."""
        if self.torch_device.type == "cuda":
            torch.cuda.synchronize(self.torch_device)

    def forget(self) -> None:
        """Drops inputs, answers and buffers: a candidate wrote where it liked, or their memory is needed."""
        self._stages.clear()
        self._arenas.clear()

    @property
    def timed_at(self) -> str:
        """What of the timed sizes is smaller than it should be, as "batch=1 nheads=8"; "" if nothing is."""
        sizes, whole = self.representative.sizes, self._whole.sizes
        return " ".join(f"{name}={value}" for name, value in sizes.items() if value != whole.get(name))

    def shrink(self, steps: int = 1) -> bool:
        """Makes the sizes that are timed smaller, ``steps`` times; returns whether the spec could."""
        smaller = getattr(self.spec, "smaller", None)
        for _ in range(steps):
            found = smaller(self.problem, self.representative) if smaller and self.shrunk < MOST_STEPS else None
            if found is None:
                return False
            self.representative = found
            self.shrunk += 1
        return True

    def restore(self, steps: int) -> None:
        """Goes back to the timed sizes as they were after ``steps`` steps."""
        self.representative, self.shrunk = self._whole, 0
        self.shrink(steps)

    @contextmanager
    def room(self, case: Case) -> Iterator[None]:
        """Raises NoRoom where memory runs out in here: what is done on ``case`` is the same for every candidate.

        A launch that finds none is the candidate's affair, unless smaller sizes may do.
        """
        try:
            yield
        except RuntimeError as error:
            if not room.ran_out(error):
                raise
            timed, own = case is self.representative, isinstance(error, LaunchOutOfMemoryError)
            if own and not (timed and hasattr(self.spec, "smaller")):
                raise
            reason = room.lack(f"case {case.name!r}", error, self.torch_device)
            raise NoRoom(reason, shrinkable=timed, own=own) from error

    def _reference(self, stage: Stage) -> dict[str, Yardstick]:
        inputs = stage.inputs.tensors
        oracle, ideal = self.spec.oracle(self.problem, dict(inputs)), self.spec.ideal(self.problem, dict(inputs))
        if missing := oracle.keys() ^ ideal.keys():
            raise GateFault(f"oracle and ideal must know the same outputs; only one of them has {sorted(missing)}")
        floor = self.spec.floor_dtype(self.problem)
        try:
            return {name: yardstick(name, self.spec.rule(name), oracle[name], ideal[name], floor) for name in oracle}
        except GateFault as fault:
            raise GateFault(f"case {stage.case.name!r}, seed {self._seed}: {fault}") from fault

    @contextmanager
    def reference_time(self) -> Iterator[None]:
        """Whatever fails in here is the spec's, not the candidate's."""
        self._announce("reference")
        try:
            yield
        except (GateFault, NoRoom):
            raise
        except Exception as error:
            raise GateFault(f"the reference answers could not be computed: {error!r}") from error
        self._announce("trial")


def _key(case: Case) -> str:
    return canonical_json([case.name, dict(case.sizes)])


def allocate(specs: Mapping[str, TensorSpec], device: torch.device) -> Tensors:
    """Returns plain buffers, neither poisoned nor guarded."""
    return {
        name: torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device=device)
        for name, spec in specs.items()
    }
