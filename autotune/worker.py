"""What runs in a child: ``python -P -m autotune.worker compiler|runner FD PARENT``, started by :mod:`autotune.process`.

Messages are JSON on the inherited descriptor FD. The first one received is the greeting (problem, device, limits),
answered with ``{"ready": true}`` or ``{"fault": why}``; then come questions until the connection closes.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Mapping
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import torch
from triton.runtime.errors import OutOfResources

from autotune import health, timing
from autotune.device import DeviceInfo
from autotune.forks import ForkServer
from autotune.gate.accuracy import GateFault
from autotune.gate.proof import prove
from autotune.gate.rig import Rig, allocate
from autotune.gate.steadiness import fingerprints
from autotune.process import Message
from autotune.spec import KernelSpec, load
from autotune.turns import turn
from cache_db.models import Config, Problem, Scalar, Verdict

PR_SET_PDEATHSIG: Final = 1
POISONED: Final = 70
LONGEST_REASON: Final = 400
# A measurement of so many rounds decides something: the GPU's temperature is noted with it.
LONG_ROUNDS: Final = 20


def main() -> None:
    """Serves one role until the parent closes the connection or ends."""
    role, descriptor, parent = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle: it kills this process
    die_with(int(parent))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _volunteer_for_the_oom_killer()
    connection: Connection[Any, Any] = Connection(int(descriptor))
    try:
        greeting = json.loads(connection.recv_bytes())
        _serve(role, connection, greeting)
    except (EOFError, BrokenPipeError):
        pass
    finally:
        os._exit(0)  # tearing down a CUDA context may hang


def die_with(parent: int) -> None:
    """Has this process killed when ``parent`` (the process that started it) ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(0)


def summarize(error: BaseException) -> str:
    """Returns an exception as one line: its type and first line, and the last where there are more.

    Triton's compile errors name the place first and the trouble last, with the source between.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ... ".join(dict.fromkeys(lines[:1] + lines[-1:]))
    return f"{type(error).__name__}: {text}"[:LONGEST_REASON]


def verdict_of(error: BaseException, *, compiling: bool) -> Verdict:
    """Returns what an exception raised by a candidate makes of it."""
    if isinstance(error, OutOfResources):
        return Verdict.OUT_OF_RESOURCES
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return Verdict.KILLED  # the device may just be full today
    if compiling and not _passing(error):
        return Verdict.COMPILE_ERROR
    return Verdict.CRASHED


def _passing(error: BaseException) -> bool:
    """Returns whether a compile failed for want of disk, memory or an assembler, which is no candidate's fault.

    Triton reports an assembler that was killed or could not write as an error of its own.
    """
    text = str(error)
    return isinstance(error, OSError) or any(sign in text for sign in ("No space left", "Cannot find", "error code -"))


def compile_one(spec: KernelSpec, problem: Problem, device: DeviceInfo, question: Message) -> Message:
    """Compiles one config and returns the outcome; raises nothing."""
    started = time.monotonic()
    try:
        compiled = spec.compile(question["kernel"], Config(**question["config"]), problem, device)
    except Exception as error:  # noqa: BLE001  # a candidate may raise anything; all of it is a verdict
        verdict = verdict_of(error, compiling=True)
        return {"verdict": verdict, "reason": summarize(error), "seconds": time.monotonic() - started}
    seconds = time.monotonic() - started
    figures = {**compiled.stats, "compile_seconds": seconds}
    return {"verdict": Verdict.SAFE, "figures": figures, "binary": compiled.binary, "seconds": seconds}


class Runner:
    """Answers the questions that need the device: compile (interpreter only), prove, measure."""

    def __init__(
        self, spec: KernelSpec, problem: Problem, device: DeviceInfo, connection: Connection[Any, Any]
    ) -> None:
        self._connection = connection
        self._compile = partial(compile_one, spec, problem, device)
        self._rig = Rig(spec, problem, device, announce=lambda stage: self._send({"event": stage}))
        self._sample: tuple[Any, ...] | None = None

    def serve(self) -> None:
        """Answers until the connection closes."""
        while True:
            question = json.loads(self._connection.recv_bytes())
            self._send({"event": "taken"})
            try:
                answer = getattr(self, f"_answer_{question['do']}")(question)
            except GateFault as fault:
                answer = {"fault": str(fault), "sticky": self._poisoned()}
            if answer.get("outcome", {}).get("verdict") == Verdict.KILLED and not answer.get("sticky"):
                torch.cuda.empty_cache()  # what it took until nothing was left: the caller may need it now
            self._send(answer)
            if answer.get("sticky"):
                os._exit(POISONED)

    def _answer_compile(self, question: Message) -> Message:
        return {"outcome": self._compile(question)}

    def _answer_prove(self, question: Message) -> Message:
        kernel, config, seed = question["kernel"], Config(**question["config"]), question["seed"]
        outcome: Message = {"seed": seed}
        try:
            compiled = self._rig.compiled(kernel, config)
        except Exception as error:  # noqa: BLE001  # a candidate may raise anything; all of it is a verdict
            return {"outcome": outcome | {"verdict": verdict_of(error, compiling=True), "reason": summarize(error)}}
        outcome["binary"] = compiled.binary
        try:
            proof = prove(
                self._rig,
                kernel,
                config,
                _configs(question["proven_with"]),
                level=question["level"],
                seed=seed,
                repeats=question["repeats"],
                detail=question["detail"],
            )
            self._rig.wait()
        except GateFault:
            raise
        except Exception as error:  # noqa: BLE001  # as above
            outcome |= {"verdict": verdict_of(error, compiling=False), "reason": summarize(error)}
            return {"outcome": outcome | {"figures": dict(compiled.stats)}, "sticky": self._poisoned()}
        # Registers and spills are known once the kernel has been loaded, so statistics are read last.
        outcome |= {"verdict": proof.verdict, "reason": proof.reason, "figures": {**compiled.stats, **proof.figures}}
        outcome["level"] = question["level"] if proof.verdict is Verdict.SAFE else 0
        if proof.details is not None:
            outcome["details"] = [each.model_dump() for each in proof.details]
        return {"outcome": outcome}

    def _answer_fingerprints(self, question: Message) -> Message:
        return {"fingerprints": fingerprints(self._rig, question["seed"])}

    def _answer_measure(self, question: Message) -> Message:
        kernel, rig = question["kernel"], self._rig
        case, inputs = self._representative(kernel, _configs(question["proven_with"]))
        outputs = allocate(rig.spec.outputs(kernel, rig.problem, case), rig.torch_device)
        launches: dict[str, timing.Launch] = {}
        stats: dict[str, Mapping[str, Scalar]] = {}
        for config in (Config(**data) for data in question["configs"]):
            self._send({"event": "trial", "config": config.hash})
            try:
                launch = self._launch(kernel, config, case, inputs, outputs)
                launch()
                rig.wait()
            except Exception:  # noqa: BLE001  # missing from the answer says that it failed; its proof says why
                if self._poisoned():
                    os._exit(POISONED)
                continue
            launches[config.hash] = launch
            stats[config.hash] = rig.compiled(kernel, config).stats
        if len(launches) < len(question["configs"]):
            torch.cuda.empty_cache()  # one of those that failed may have taken all there was

        def notice() -> None:
            self._send({"event": "round"})

        with turn("" if rig.device.interpreted else rig.device.uuid, notice):
            record = timing.interleaved(launches, question["rounds"], rig.torch_device, notice)
            state = health.read(rig.device.uuid) if question["rounds"] >= LONG_ROUNDS else {}
        return {"figures": {name: {**stats[name], **each, **state} for name, each in record.figures().items()}}

    def _launch(self, kernel: str, config: Config, case: Any, inputs: Any, outputs: Any) -> timing.Launch:
        """Returns one run of ``config``, with scratch from the allocator's cache, so that configs share it."""
        rig, compiled = self._rig, self._rig.compiled(kernel, config)
        scratch = rig.spec.scratch(kernel, rig.problem, config, case)

        def launch() -> None:
            buffers = allocate(scratch, rig.torch_device)
            rig.spec.launch(kernel, compiled, rig.problem, inputs, outputs, buffers)

        return launch

    def _representative(self, kernel: str, proven_with: Mapping[str, Config]) -> tuple[Any, Any]:
        """Returns the timed case and all that ``kernel`` reads there; the last ones are kept."""
        rig = self._rig
        key = {name: proven_with[name].hash for name in rig.requirements(kernel) if name in proven_with}
        if self._sample is None or self._sample[0] != key:
            self._sample = None  # the old tensors make room before the new ones come
            case = rig.spec.representative(rig.problem, rig.device)
            self._send({"event": "reference"})
            inputs = rig.spec.inputs(rig.problem, case, 0, rig.torch_device)
            inputs |= rig.produced(kernel, proven_with, case, inputs)
            rig.wait()
            self._sample = (key, case, inputs)
        return self._sample[1], self._sample[2]

    def _poisoned(self) -> bool:
        """Returns whether the device no longer works for this process: a CUDA error that stays."""
        if self._rig.torch_device.type != "cuda":
            return False
        try:
            torch.cuda.synchronize()
            return float(torch.ones(1, device="cuda").sum()) != 1.0
        except RuntimeError:
            return True

    def _send(self, message: Mapping[str, Any]) -> None:
        self._connection.send_bytes(json.dumps(message).encode())


def _serve(role: str, connection: Connection[Any, Any], greeting: Message) -> None:
    try:
        problem, device = Problem(**greeting["problem"]), DeviceInfo.from_json(greeting["device"])
        spec = load(problem.spec)
        if role == "runner":
            _take_device(device)
            runner = Runner(spec, problem, device, connection)
    except Exception as error:  # noqa: BLE001  # whatever it is, the parent shall hear it rather than see an exit
        connection.send_bytes(json.dumps({"fault": summarize(error)}).encode())
        return
    connection.send_bytes(json.dumps({"ready": True}).encode())
    if role == "runner":
        runner.serve()
        return
    _warm_compiler()
    work = partial(compile_one, spec, problem, device)
    in_fork = partial(die_with, os.getpid())
    ForkServer(connection, work, in_fork, greeting["workers"], greeting["compile_seconds"]).serve()


def _warm_compiler() -> None:
    """Does once what every fork would do again: hashing Triton's own files takes longer than a small compile."""
    with contextlib.suppress(ImportError):  # a private function of Triton: without it forks are slower, not wrong
        from triton.runtime.cache import triton_key

        triton_key()
    gc.freeze()  # a collection in a fork would touch, and so copy, every page of the imports


def _take_device(device: DeviceInfo) -> None:
    """Makes the CUDA context on the one visible GPU and checks that it is the one that was meant."""
    if device.index < 0:
        return
    torch.cuda.set_device(device.index)
    torch.ones(1, device=device.torch_device)
    found = str(torch.cuda.get_device_properties(device.index).uuid)
    if device.uuid.startswith("GPU-") and not device.uuid.endswith(found):  # a MIG slice has another UUID than its GPU
        raise RuntimeError(f"expected GPU {device.uuid}, got {found}")
    torch.set_float32_matmul_precision("highest")


def _configs(data: Mapping[str, dict[str, Scalar]]) -> dict[str, Config]:
    return {kernel: Config(**config) for kernel, config in data.items()}  # type: ignore[arg-type]


def _volunteer_for_the_oom_killer() -> None:
    """Asks the system to end this process before the caller's when memory runs out."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500", encoding="ascii")


if __name__ == "__main__":
    main()
