"""What runs in a child, the compiler or the runner of a sandbox: born by :mod:`autotune.nurse`, asked by :mod:`autotune.process`.

Messages are JSON on an inherited descriptor. The first one received is the greeting (problem, device, limits),
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
import traceback
from collections.abc import Mapping
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import torch

from autotune import health, interpreter, room, timing
from autotune.device import DeviceInfo, uuid_of
from autotune.errors import NoRoom
from autotune.forks import ForkServer
from autotune.gate.accuracy import GateFault
from autotune.gate.proof import prove
from autotune.gate.rig import Rig, allocate
from autotune.gate.steadiness import fingerprints
from autotune.process import Message
from autotune.spec import KernelSpec, load
from autotune.turns import turn
from autotune.verdicts import compile_one, summarize, verdict_of
from cache_db.models import Config, Problem, Scalar, Verdict

PR_SET_PDEATHSIG: Final = 1
POISONED: Final = 70
# A measurement of so many rounds decides something: the GPU's temperature is noted with it.
LONG_ROUNDS: Final = 20


def prepare() -> None:
    """Does what every child would do first, before any is born; touches no GPU."""
    with contextlib.suppress(ImportError):  # a private function of Triton: without it compiles are slower, not wrong
        from triton.runtime.cache import triton_key

        if "TRITON_INTERPRET" not in os.environ:
            triton_key()  # hashing Triton's own files takes half a second


def live(role: str, descriptor: int, parent: int) -> None:
    """Serves one role on ``descriptor`` until the caller closes it or ``parent`` ends. Does not return."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's to handle: it kills this process
    die_with(parent)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _volunteer_for_the_oom_killer()
    connection: Connection[Any, Any] = Connection(descriptor)
    status = 1
    try:
        greeting = json.loads(connection.recv_bytes())
        _serve(role, connection, greeting)
        status = 0
    except (EOFError, BrokenPipeError):
        status = 0
    except BaseException:  # noqa: BLE001  # ``_exit`` would hide it; the caller reports the last line
        traceback.print_exc()
    finally:
        os._exit(status)  # tearing down a CUDA context may hang


def die_with(parent: int) -> None:
    """Has this process killed when ``parent`` (the process that started it) ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(0)


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
                answer = self._answer(question)
            except GateFault as fault:
                answer = {"fault": str(fault), "sticky": self._poisoned()}
            if answer.get("outcome", {}).get("verdict") == Verdict.KILLED and not answer.get("sticky"):
                self._give_back()  # what it took until nothing was left: the caller may need it now
            self._send(answer)
            if answer.get("sticky"):
                os._exit(POISONED)

    def _answer(self, question: Message) -> Message:
        """Returns the answer, or that there is no room for it.

        Where memory runs out, all that is kept here makes room first. Asked ``again``, when the caller has given back
        what it can, the timed sizes shrink as far as they must and may.
        """
        self._rig.shrink(question["shrunk"] - self._rig.shrunk)
        before = self._rig.shrunk
        work, tidy = getattr(self, f"_answer_{question['do']}"), False
        while True:
            try:
                return {**work(question), "shrunk": self._rig.shrunk}
            except NoRoom as lack:  # its traceback holds on to tensors: it must be gone before memory is given back
                reason, shrinkable, own = str(lack), lack.shrinkable, lack.own
            self._make_room()
            again = question.get("again", False)
            if tidy and not (again and shrinkable and self._rig.shrink()):
                break
            tidy = True
        if not (again and own):
            return {"no_room": reason, "own": own}
        self._rig.restore(before)  # no size helps this one candidate, and the others need no smaller ones
        failed = {"verdict": Verdict.KILLED, "reason": reason, "seed": question.get("seed", 0)}
        return {"shrunk": before, **({"figures": {}} if question["do"] == "measure" else {"outcome": failed})}

    def _make_room(self) -> None:
        """Gives back what is kept for the next question, and takes a new look at what is free."""
        self._sample = None
        self._rig.forget()
        self._give_back()
        room.confine(self._rig.torch_device)

    def _give_back(self) -> None:
        """Gives the device what nothing here needs; an exception and its frames, which hold tensors, may hold each other."""
        gc.collect()
        torch.cuda.empty_cache()

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
        except (GateFault, NoRoom):
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
        kernel, rig, case = question["kernel"], self._rig, self._rig.representative
        with rig.room(case):
            inputs = self._representative(kernel, _configs(question["proven_with"]))
            outputs = allocate(rig.spec.outputs(kernel, rig.problem, case), rig.torch_device)
        launches: dict[str, timing.Launch] = {}
        stats: dict[str, Mapping[str, Scalar]] = {}
        hosts: dict[str, Mapping[str, Scalar]] = {}
        starved, pool = False, timing.pool(rig.torch_device)
        for config in (Config(**data) for data in question["configs"]):
            self._send({"event": "trial", "config": config.hash})
            try:
                launch = self._launch(kernel, config, case, inputs, outputs)
                launch()
                rig.wait()
                hosts[config.hash] = {} if pool is None else {"host_ms": timing.host_ms(launch, rig.wait)}
                launch = timing.replay(launch, pool)
            except Exception as error:  # noqa: BLE001  # missing from the answer says that it failed; its proof says why
                starved |= room.ran_out(error)
                if self._poisoned():
                    os._exit(POISONED)
                continue
            launches[config.hash] = launch
            stats[config.hash] = rig.compiled(kernel, config).stats
        if len(launches) < len(question["configs"]):
            self._give_back()  # one of those that failed may have taken all there was
        if starved and not launches and hasattr(rig.spec, "smaller"):
            raise NoRoom(f"no room for any launch of {kernel}; {room.CURE}", shrinkable=True, own=True)

        def notice() -> None:
            self._send({"event": "round"})

        with turn("" if rig.device.interpreted else rig.device.uuid, notice), rig.room(case):
            record = timing.interleaved(launches, question["rounds"], rig.torch_device, notice)
        state = health.read(rig.device.uuid) if question["rounds"] >= LONG_ROUNDS else {}
        if rig.timed_at:
            state["timed_at"] = rig.timed_at
        found = record.figures().items()
        return {"figures": {name: {**stats[name], **hosts[name], **each, **state} for name, each in found}}

    def _launch(self, kernel: str, config: Config, case: Any, inputs: Any, outputs: Any) -> timing.Launch:
        """Returns one run of ``config``, with scratch from the allocator's cache, so that configs share it."""
        rig, compiled = self._rig, self._rig.compiled(kernel, config)
        scratch = rig.spec.scratch(kernel, rig.problem, config, case)
        enqueue = getattr(rig.spec, "enqueue", rig.spec.launch)

        def launch() -> None:
            buffers = allocate(scratch, rig.torch_device)
            enqueue(kernel, compiled, rig.problem, inputs, outputs, buffers)

        return launch

    def _representative(self, kernel: str, proven_with: Mapping[str, Config]) -> Any:
        """Returns all that ``kernel`` reads at the timed sizes; the last ones are kept."""
        rig = self._rig
        key = {name: proven_with[name].hash for name in rig.requirements(kernel) if name in proven_with}
        case = rig.representative
        if self._sample is None or self._sample[:2] != (key, case):
            self._sample = None  # the old tensors make room before the new ones come
            self._send({"event": "reference"})
            inputs = rig.spec.inputs(rig.problem, case, 0, rig.torch_device)
            inputs |= rig.produced(kernel, proven_with, case, inputs)
            rig.wait()
            self._sample = (key, case, inputs)
        return self._sample[2]

    def _poisoned(self) -> bool:
        """Returns whether the device no longer works for this process: a CUDA error that stays."""
        if self._rig.torch_device.type != "cuda":
            return False
        try:
            torch.cuda.synchronize()
            return float(torch.ones(1, device="cuda").sum()) != 1.0
        except RuntimeError as error:
            return not room.ran_out(error)

    def _send(self, message: Mapping[str, Any]) -> None:
        self._connection.send_bytes(json.dumps(message).encode())


def _serve(role: str, connection: Connection[Any, Any], greeting: Message) -> None:
    try:
        problem, device = Problem(**greeting["problem"]), DeviceInfo.from_json(greeting["device"])
        spec = load(problem.spec)
        if device.interpreted:
            interpreter.hasten()
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
    gc.freeze()  # a collection in a fork would touch, and so copy, every page of the imports
    work = partial(compile_one, spec, problem, device)
    in_fork = partial(die_with, os.getpid())
    ForkServer(connection, work, in_fork, greeting["workers"], greeting["compile_seconds"]).serve()


def _take_device(device: DeviceInfo) -> None:
    """Makes the CUDA context on the one visible GPU and checks that it is the one that was meant."""
    if device.index < 0:
        return
    torch.cuda.set_device(device.index)
    torch.ones(1, device=device.torch_device)
    found = uuid_of(device.index)
    if device.uuid != found:
        raise RuntimeError(f"expected {device.uuid}, got {found}; was CUDA_VISIBLE_DEVICES changed after CUDA started?")
    room.confine(device.torch_device)
    torch.set_float32_matmul_precision("highest")


def _configs(data: Mapping[str, dict[str, Scalar]]) -> dict[str, Config]:
    return {kernel: Config(**config) for kernel, config in data.items()}  # type: ignore[arg-type]


def _volunteer_for_the_oom_killer() -> None:
    """Asks the system to end this process before the caller's when memory runs out."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500", encoding="ascii")
