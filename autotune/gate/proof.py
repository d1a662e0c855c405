"""One config through the whole gate: every case twice on poisoned, guarded buffers, then the race case many times."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import torch

from autotune import room
from autotune.detail import OutputDetail
from autotune.gate import error_map
from autotune.gate.accuracy import Finding, GateFault
from autotune.gate.memory import FINITE_BYTE, NAN_BYTE, Arena, bits, differing, nans, snapshot, untouched
from autotune.gate.races import INTERPRETER_REPEATS, REPEATS, screen
from autotune.gate.rig import Feed, LaunchOutOfMemoryError, Rig, Stage
from cache_db.models import Config, Scalar, Verdict

QUICK: Final = 1
TIE_BREAKS: Final = 4
# A screen longer than a survivor's is a winner's: it also repeats at the size that is timed, where a grid has many waves.
REPEATS_AT_SCALE: Final = 20


@dataclass
class Proof:
    """What the gate found: the verdict, why, and the figures met on the way (worst over the cases so far).

    ``details`` are those of every output on every case, if they were asked for (None if not).
    """

    verdict: Verdict = Verdict.SAFE
    reason: str = ""
    figures: dict[str, Scalar] = field(default_factory=dict)
    details: list[OutputDetail] | None = None

    def fail(self, verdict: Verdict, reason: str) -> None:
        """Records the first failure."""
        if self.verdict is Verdict.SAFE:
            self.verdict, self.reason = verdict, reason

    def note(self, output: str, case: str, finding: Finding) -> None:
        """Keeps the worst finding of each output, and the case with the worst of all."""
        if finding.ratio >= float(self.figures.get(f"{output}_ratio", -1.0)):
            self.figures[f"{output}_error"] = finding.error
            self.figures[f"{output}_ratio"] = finding.ratio
        worst = max(float(value) for name, value in self.figures.items() if name.endswith("_ratio"))
        if finding.ratio >= worst:
            self.figures["worst_case"] = case


def prove(
    rig: Rig,
    kernel: str,
    config: Config,
    proven_with: Mapping[str, Config],
    *,
    level: int,
    seed: int,
    repeats: int | None = None,
    detail: bool = False,
) -> Proof:
    """Proves ``kernel`` with ``config``: all cases and the race screen, or the first case and 3 repeats at level 1.

    With ``detail`` a wrong config is judged on all cases that can be, and the proof says which rows are wrong.

    Raises what compiling or launching raises, GateFault when the spec's own answers cannot judge, and NoRoom when what
    every candidate needs does not fit into the free memory.
    """
    run = partial(_prove, rig, kernel, config, proven_with, level=level, seed=seed, repeats=repeats, detail=detail)
    proof = run()
    if proof.verdict is Verdict.OUT_OF_BOUNDS:
        # Candidates are timed before they are proven: one of those may have written here. On fresh memory it shows who did.
        rig.forget()
        proof = run()
    if proof.verdict is Verdict.OUT_OF_BOUNDS:
        rig.forget()
    return proof


def _prove(
    rig: Rig,
    kernel: str,
    config: Config,
    proven_with: Mapping[str, Config],
    *,
    level: int,
    seed: int,
    repeats: int | None,
    detail: bool,
) -> Proof:
    proof = Proof(details=[] if detail else None)
    compiled = rig.compiled(kernel, config)
    for case in rig.cases[:1] if level <= QUICK else rig.cases:
        try:
            stage = rig.stage(case, seed)
        except GateFault:
            if proof.verdict is Verdict.SAFE:
                raise
            continue  # the verdict is out: what this case cannot tell in detail is left out
        with rig.room(case):
            _Trial(rig, kernel, config, compiled, stage, proven_with).examine(proof)
        if proof.verdict is not Verdict.SAFE and not (detail and proof.verdict is Verdict.WRONG):
            break
    if proof.verdict is Verdict.SAFE:
        count = REPEATS[min(max(level, QUICK), max(REPEATS))] if repeats is None else repeats
        if rig.device.interpreted and repeats is None:
            count = INTERPRETER_REPEATS
        screens = [(rig.cases[0] if level <= QUICK else rig.race_case, count)]
        if count > REPEATS[max(REPEATS)]:
            screens.append((rig.representative, REPEATS_AT_SCALE))
        for case, times in screens:
            stage = rig.stage(case, seed, judged=False)
            with rig.room(case):
                passed = _Trial(rig, kernel, config, compiled, stage, proven_with).screen(proof, times)
            if not passed:
                break
    return proof


class _Trial:
    """One candidate on one case."""

    def __init__(
        self, rig: Rig, kernel: str, config: Config, compiled: Any, stage: Stage, proven_with: Mapping[str, Config]
    ) -> None:
        self._spec = rig.spec
        self._stage = stage
        self._notice = rig.alive
        self._where = f"on case {stage.case.name!r}"
        self._feed: Feed = rig.feed(kernel, proven_with, stage)
        self._outputs: Arena = rig.outputs(kernel, stage.case)
        with _own_memory():
            self._scratch: Arena = rig.scratch(kernel, config, stage.case)
        inputs, outputs, scratch = self._feed.tensors, self._outputs.tensors, self._scratch.tensors

        def launch() -> None:
            with _own_memory():
                rig.spec.launch(kernel, compiled, rig.problem, inputs, outputs, scratch)

        self._launch: Callable[[], None] = launch

    def examine(self, proof: Proof) -> None:
        """Runs twice, on buffers of NaN and of numbers, and judges; the device is waited for once."""
        outputs = self._outputs.tensors
        self._run(NAN_BYTE)
        trespass = self._trespassed(NAN_BYTE)
        missing = [nans(tensor) for tensor in outputs.values()]
        judged = [self._yardstick(name).judge(tensor) for name, tensor in outputs.items()]
        if proof.details is not None:
            proof.details += [self._describe(name, judged[at]) for at, name in enumerate(outputs)]
        first = snapshot(outputs)
        self._run(FINITE_BYTE)
        checks = [trespass, self._trespassed(FINITE_BYTE), self._feed.changed(), self._stage.damaged()]
        checks.append(differing(outputs, first))
        kept = [untouched(first[name], tensor) for name, tensor in outputs.items()]
        flags, missed, stale, found = _read(checks, missing, kept, judged)
        trespassed, trespassed_again, changed, damaged, unstable = (bool(flag[0]) for flag in flags)
        if trespassed or trespassed_again:
            self._fail_trespass(proof, FINITE_BYTE)
        if changed:
            self._fail_changed(proof)
        if damaged:
            proof.fail(Verdict.OUT_OF_BOUNDS, f"overwrote memory that is not its own {self._where}")
        for name, (absent,), (left,) in zip(outputs, missed, stale, strict=True):
            self._fail_unwritten(proof, name, int(absent), int(left))
        if unstable:
            self._fail_unstable(proof, first)
        for name, values in zip(outputs, found, strict=True):
            self._note(proof, name, self._yardstick(name).finding(values))

    def screen(self, proof: Proof, repeats: int) -> bool:
        """Repeats the launch against itself, then checks that it stayed inside its buffers; returns whether all is well."""
        found, done = screen(self._launch, self._outputs, self._scratch, repeats, self._notice)
        proof.figures["repeats"] = max(done, int(proof.figures.get("repeats", 0)))
        if found:
            proof.fail(Verdict.RACY, f"{found} of {done} repeats differ {self._where}")
        outputs = self._outputs.tensors
        flags = [self._trespassed(NAN_BYTE), self._feed.changed()]
        (trespassed, changed), missed = _read(flags, [nans(tensor) for tensor in outputs.values()])
        if trespassed[0]:
            self._fail_trespass(proof, NAN_BYTE)
        if changed[0]:
            self._fail_changed(proof)
        for name, (absent,) in zip(outputs, missed, strict=True):
            self._fail_unwritten(proof, name, int(absent), 0)
        return proof.verdict is Verdict.SAFE

    def _run(self, byte: int) -> None:
        self._outputs.fill(byte)
        self._scratch.fill(byte)
        self._launch()

    def _trespassed(self, byte: int) -> torch.Tensor:
        return self._outputs.trespassed(byte) | self._scratch.trespassed(byte)

    def _yardstick(self, output: str) -> Any:
        try:
            return self._stage.yardsticks[output]
        except KeyError:
            raise GateFault(f"the oracle has no output {output!r}, only {sorted(self._stage.yardsticks)}") from None

    def _fail_trespass(self, proof: Proof, byte: int) -> None:
        """Says where the write went, if the last run (on a filling of ``byte``) did it again."""
        place = "outside its buffers"
        for arena in (self._outputs, self._scratch):
            if bool(arena.trespassed(byte)):
                place = arena.trespass(byte)
        proof.fail(Verdict.OUT_OF_BOUNDS, f"wrote {place} {self._where}")

    def _fail_changed(self, proof: Proof) -> None:
        names = ", ".join(map(repr, self._feed.culprits())) or "the memory round its inputs"
        proof.fail(Verdict.OUT_OF_BOUNDS, f"modified {names} {self._where}")

    def _fail_unwritten(self, proof: Proof, name: str, absent: int, left: int) -> None:
        size = self._outputs.tensors[name].numel()
        if left:
            proof.fail(Verdict.WRONG, f"never wrote {left} of {size} elements of {name!r} {self._where}")
        elif absent:
            proof.fail(Verdict.WRONG, f"{absent} of {size} elements of {name!r} are NaN {self._where}")

    def _fail_unstable(self, proof: Proof, first: Mapping[str, torch.Tensor]) -> None:
        """Tells a race from a read of uninitialised memory by more runs on each filling: a race may strike the second."""
        for byte, kept in ((NAN_BYTE, first), (FINITE_BYTE, snapshot(self._outputs.tensors))):
            for _ in range(TIE_BREAKS):
                self._run(byte)
                for name, tensor in self._outputs.tensors.items():
                    if not torch.equal(bits(tensor), kept[name]):
                        proof.fail(Verdict.RACY, f"{name!r} differs from run to run {self._where}")
                        return
        proof.fail(Verdict.WRONG, f"depends on what its buffers held before {self._where}")

    def _describe(self, name: str, judged: torch.Tensor) -> OutputDetail:
        """Returns where the output ``name`` is off, of the run just done."""
        yardstick, axes = self._yardstick(name), getattr(self._spec, "axes", None)
        finding = yardstick.finding(judged.tolist())
        named = None if axes is None else axes(name)
        return error_map.describe(name, self._stage.case.name, self._outputs.tensors[name], yardstick, finding, named)

    def _note(self, proof: Proof, name: str, finding: Finding) -> None:
        proof.note(name, self._stage.case.name, finding)
        if finding.ratio > 1:
            proof.fail(
                Verdict.WRONG,
                f"{name!r} is off by {finding.error:.3g} in row {finding.row} ({finding.ratio:.3g} times its budget), "
                f"{finding.bad} of {finding.rows} rows are wrong {self._where}",
            )


@contextmanager
def _own_memory() -> Iterator[None]:
    """Tells memory that the candidate alone asks for from what is needed by all."""
    try:
        yield
    except RuntimeError as error:
        if not room.ran_out(error):
            raise
        raise LaunchOutOfMemoryError(str(error)) from error


def _read(*groups: Sequence[torch.Tensor]) -> list[list[list[float]]]:
    """Brings many small tensors to the host in one transfer, grouped as given."""
    tensors = [tensor for group in groups for tensor in group]
    device = tensors[-1].device
    joined = torch.cat([tensor.reshape(-1).to(device, torch.float64) for tensor in tensors])
    parts = iter(torch.split(joined.cpu(), [tensor.numel() for tensor in tensors]))
    return [[next(parts).tolist() for _ in group] for group in groups]
