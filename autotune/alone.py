"""Runs one stored config alone, in this process, in the view of a profiler.

Nothing is judged or stored here, and nothing protects this process: who asks for a config that is not proven may lose it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Final

import torch

from autotune import timing
from autotune.candidate import told
from autotune.device import DeviceInfo
from autotune.errors import AutotuneError
from autotune.gate.rig import Rig, allocate
from autotune.judgements import GATE_LEVEL, Judgements
from autotune.lease import hostname
from autotune.place import Place
from autotune.remake import permit, reported
from autotune.spec import Case, Compiled, load
from autotune.turns import turn
from cache_db.models import Config, Scalar, Trial, Verdict

if TYPE_CHECKING:
    from cache_db import Layers

REPRESENTATIVE: Final = "representative"


class Alone:
    """The config of one trial on ``device``, behind the configs ``through`` that it was judged through.

    Raises AutotuneError when the rules refuse one of them.
    """

    def __init__(self, trial: Trial, through: Mapping[str, Config], device: DeviceInfo) -> None:
        self._trial = trial
        spec, problem = load(trial.problem.spec), trial.problem
        for kernel, config in {**through, trial.kernel: trial.config}.items():
            permit(spec, kernel, config, problem, device)
        with reported(f"the spec {problem.spec}"):
            self._rig = Rig(spec, problem, device)
        needed = self._rig.requirements(trial.kernel)
        if missing := [name for name in needed if name not in through]:
            raise AutotuneError(f"the trial does not say which config of {missing[0]} it was judged through")
        self._running = {name: through[name] for name in needed} | {trial.kernel: trial.config}

    @property
    def cases(self) -> dict[str, Case]:
        """The cases by name: the sizes that are timed ("representative"), those of the proof and of the race screen."""
        rig = self._rig
        found = {REPRESENTATIVE: rig.spec.representative(rig.problem, rig.device)}
        for case in (*rig.cases, rig.race_case):
            found.setdefault(case.name, case)
        return found

    def doubt(self, store: Layers) -> str:
        """Returns why what would run is not known to be safe on this device, "" if it is.

        Raises AutotuneError when something does not compile: a proof speaks of one binary.
        """
        trial, device = self._trial, self._rig.device
        if trial.verdict is not Verdict.SAFE or trial.level < GATE_LEVEL:
            found = "proven at level 1 only" if trial.verdict is Verdict.SAFE and trial.level else told(trial)
            return f"the trial of {trial.kernel} {trial.config} is {found} ({trial.reason or 'no reason given'})"
        place, problem = Place(hostname(), frozenset({device.uuid})), trial.problem
        for kernel, config in self._running.items():
            stored = (store.trials(problem, kernel), store.verifications(problem, kernel), store.lifts(problem, kernel))
            judgements = Judgements(place, *stored)
            behind = {name: self._running[name].hash for name in self._rig.requirements(kernel)}
            bar = judgements.bar(config, behind)
            if bar is not None:
                return f"{kernel} {config} was found {bar.verdict.value} ({bar.reason or 'no reason given'})"
            proofs = judgements.proofs(config, device.environment, behind)
            binaries = {row.binary for row in proofs if row.level >= GATE_LEVEL}
            if not binaries:
                return f"{kernel} {config} is not proven with this driver, assembler and torch, or was lifted since"
            if self._compiled(kernel, config).binary not in binaries:
                return f"{kernel} {config} compiles here to another binary than the one that was proven"
        return ""

    def run(self, case: Case, seed: int, iterations: int) -> dict[str, Scalar]:
        """Runs what the config needs once, times ``iterations`` launches as a sweep does, and repeats them for a profiler.

        A profiler that was told to wait (``ncu --profile-from-start off``) sees that many launches and nothing else.
        Returns the times in ms and the statistics of the loaded kernel. Raises AutotuneError when a launch fails.
        """
        rig, trial = self._rig, self._trial
        device = rig.torch_device
        compiled = self._compiled(trial.kernel, trial.config)
        with reported(f"{trial.kernel} {trial.config}"):
            if device.type == "cuda":
                torch.cuda.set_device(device)
            inputs = rig.spec.inputs(rig.problem, case, seed, device)
            inputs |= rig.produced(trial.kernel, self._running, case, inputs)
            launch = self._launch(compiled, case, inputs)
            launch()
            rig.wait()
            with turn("" if rig.device.interpreted else rig.device.uuid):
                replay = timing.replay(launch, timing.pool(device))
                record = timing.interleaved({"": replay}, iterations, device)
                if device.type == "cuda":
                    with _profiled(f"flashbias {trial.kernel} {trial.config.hash[:12]}"):
                        for _ in range(iterations):
                            launch()
            return {**compiled.stats, **record.figures()[""]}

    def _compiled(self, kernel: str, config: Config) -> Compiled:
        with reported(f"{kernel} {config}"):
            found: Compiled = self._rig.compiled(kernel, config)
            return found

    def _launch(self, compiled: Compiled, case: Case, inputs: Mapping[str, torch.Tensor]) -> Callable[[], None]:
        """Returns one run of the config on ``inputs``."""
        rig, kernel, config = self._rig, self._trial.kernel, self._trial.config
        outputs = allocate(rig.spec.outputs(kernel, rig.problem, case), rig.torch_device)
        scratch = allocate(rig.spec.scratch(kernel, rig.problem, config, case), rig.torch_device)
        enqueue = getattr(rig.spec, "enqueue", rig.spec.launch)

        def launch() -> None:
            enqueue(kernel, compiled, rig.problem, dict(inputs), outputs, scratch)

        return launch


@contextlib.contextmanager
def _profiled(name: str) -> Iterator[None]:
    """Has a profiler look at what the current device is given in here, as a range called ``name``."""
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    with contextlib.ExitStack() as after:
        after.callback(torch.cuda.profiler.stop)
        with contextlib.suppress(RuntimeError):  # a torch that was built without NVTX
            torch.cuda.nvtx.range_push(name)
            after.callback(torch.cuda.nvtx.range_pop)
        after.callback(torch.cuda.synchronize)
        yield
