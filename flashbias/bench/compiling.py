"""Compiles rows of the matrix, each in a fork of its own: a compiler that aborts is a row's reason, not the end.

The forks are those of the tuner's sandbox (:mod:`autotune.forks`), made by one process that has imported everything.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from typing import Any, Final

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.errors import CompilationError

from autotune.device import ptxas_version
from autotune.forks import ForkServer
from autotune.process import Message
from autotune.verdicts import summarize, verdict_of
from autotune.worker import die_with
from cache_db.models import FINAL, Config, Scalar, Verdict
from flashbias.bench import machine_code
from flashbias.bench.matrix import AMD, PROBLEMS, Row, device, judged
from flashbias.kernels import arguments
from flashbias.kernels.problem import problem
from flashbias.kernels.spec import source

# What the assembly of each kind of tensor core's products has in it, the newest first.
_TENSOR_CORES: Final = {"tcgen05": "tcgen05.mma", "wgmma": "wgmma.mma_async", "mma": "mma.sync", "mfma": "v_mfma"}
_BULK_COPIES: Final = "cp.async.bulk.tensor"
_LONGEST: Final = 300
_AMD_TARGET: Final = GPUTarget("hip", AMD, 64)


class _MadeForAmd(Exception):
    """What Triton compiled, on its way out of a binding that knows NVIDIA's GPUs alone."""

    def __init__(self, compiled: Any) -> None:
        super().__init__()
        self.compiled = compiled


def compiled(rows: Sequence[Row], jobs: int, row_seconds: float, seconds: float | None = None) -> Iterator[Row]:
    """Yields ``rows`` judged, as they are done, ``jobs`` of them compiled at a time.

    One that takes more than ``row_seconds`` has failed. After ``seconds`` no more are begun, and those under way are
    dropped. Raises OSError where there can be no process.
    """
    until = None if seconds is None else time.monotonic() + seconds
    ours, theirs = Pipe()
    folder = tempfile.mkdtemp(prefix="flashbias-matrix-")
    # A fork: what this process imported is there at once. It has no thread, and no GPU was touched.
    server = get_context("fork").Process(target=_serve, args=(theirs, ours, folder, jobs, row_seconds, os.getpid()))
    server.start()
    theirs.close()
    try:
        waiting = dict(enumerate(rows))
        items = [[number, row.kernel, _question(row)] for number, row in waiting.items()]
        ours.send_bytes(json.dumps({"do": "compile", "items": items}).encode())
        while waiting and (until is None or ours.poll(max(until - time.monotonic(), 0))):
            try:
                answer = json.loads(ours.recv_bytes())
            except EOFError:
                raise OSError(
                    "the process that starts the compilers ended; what is done is kept: start again"
                ) from None
            yield _told(waiting.pop(answer["item"]), answer["outcome"])
    finally:
        ours.close()  # the server ends all forks when it sees this
        server.join(10)
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)


def made(assembly: Mapping[str, Any], shared: int) -> dict[str, Scalar]:
    """Returns what is known of a compiled kernel.

    ``shared`` memory of a block in bytes; ``registers`` and ``spills`` of a thread, in 32-bit words; its
    ``tensor_cores`` ("tcgen05", "wgmma", "mma", "mfma" or ""), and whether ``bulk_copies`` fetch its tiles.
    """
    text = str(assembly.get("ptx") or assembly.get("amdgcn") or "")
    resources = machine_code.of_cubin(assembly["cubin"]) if "cubin" in assembly else machine_code.of_amdgcn(text)
    cores = next((name for name, sign in _TENSOR_CORES.items() if sign in text), "")
    return {"shared": shared, **resources, "tensor_cores": cores, "bulk_copies": _BULK_COPIES in text}


def _serve(
    connection: Connection[Any, Any],
    parents: Connection[Any, Any],
    folder: str,
    jobs: int,
    row_seconds: float,
    parent: int,
) -> None:
    """Is the life of the process that forks: it compiles nothing itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    die_with(parent)
    parents.close()
    silent = os.open(os.devnull, os.O_RDWR)
    os.dup2(silent, 1)  # Triton prints the whole PTX of what does not assemble
    with contextlib.suppress(ImportError):  # each fork would hash Triton's own files again
        from triton.runtime.cache import triton_key

        triton_key()
    for function in arguments.FUNCTIONS.values():
        _ = function.cache_key
    gc.freeze()
    ForkServer(connection, partial(_work, folder), partial(die_with, os.getpid()), jobs, row_seconds).serve()


def _question(row: Row) -> Message:
    return {"arch": row.arch, "problem": row.problem, "config": row.config.model_dump()}


def _told(row: Row, outcome: Message) -> Row:
    """Returns ``row`` with what its fork, or for a dead one its server, said."""
    verdict, figures = Verdict(outcome["verdict"]), dict(outcome.get("figures", {}))
    figures["seconds"] = round(float(outcome["seconds"]), 2)
    reason = "" if verdict is Verdict.SAFE else f"{verdict.value}: {outcome['reason']}"
    return judged(row, reason, figures, final=verdict is Verdict.SAFE or verdict in FINAL)


def _work(folder: str, message: Message) -> Message:
    """Compiles one row in a fork, with a cache of its own that is gone afterwards: all of them are gigabytes."""
    kernel, asked = message["kernel"], message["config"]
    started = time.monotonic()
    cache = tempfile.mkdtemp(dir=folder)
    triton.knobs.cache.dir = cache
    os.environ["TMPDIR"] = tempfile.tempdir = cache  # where the assembler's files go
    try:
        figures = _compile(kernel, asked["arch"], asked["problem"], Config(**asked["config"]))
        outcome: Message = {"verdict": Verdict.SAFE, "figures": figures}
    except Exception as error:  # noqa: BLE001  # a candidate may raise anything; all of it is a row
        outcome = {"verdict": verdict_of(error, compiling=True), "reason": _reason(error)}
    finally:
        shutil.rmtree(cache, ignore_errors=True)
    return {**outcome, "seconds": time.monotonic() - started}


def _compile(kernel: str, arch: str, name: str, config: Config) -> dict[str, Scalar]:
    target = device(arch)
    found = problem(PROBLEMS[name], target)
    if arch == AMD:
        _retarget()
    try:
        binary = arguments.compile_kernel(kernel, config, found, target)
    except _MadeForAmd as amd:
        return made(amd.compiled.asm, amd.compiled.metadata.shared)
    columns = int(getattr(binary.compiled.metadata, "tmem_size", 0) or 0)
    return {**made(binary.assembly, int(binary.stats["shared"])), "tensor_memory": columns}


def _retarget() -> None:
    """Has Triton compile for AMD in this fork, which ends after it: the kernels' own binding is NVIDIA's to the last step."""
    compile_for_nvidia: Any = triton.compile

    def compile_for_amd(source: Any, target: GPUTarget, options: Mapping[str, Any]) -> None:
        del target
        raise _MadeForAmd(compile_for_nvidia(source, target=_AMD_TARGET, options=dict(options)))

    setattr(triton, "compile", compile_for_amd)  # noqa: B010  # not an assignment: its type is NVIDIA's and AMD's alike


def _reason(error: BaseException) -> str:
    """Returns an exception as one line: of an assembler's report the first line that is an error."""
    said = re.search(r"^.*\b(?:error|fatal)\s*:.*$", str(error), re.MULTILINE)
    while isinstance(error, CompilationError) and error.__cause__ is not None:  # itself it shows the place alone
        error = error.__cause__
    text = f"{type(error).__name__}: {said[0].strip()}" if said else summarize(error)
    return re.sub(r"(/[\w.+-]+)+/", "", text)[:_LONGEST]  # folders say where it was compiled, not why it failed


def environment() -> dict[str, str]:
    """Returns what rows of one file must have in common: Triton, its assemblers and the kernels' source."""
    return {
        "triton": triton.__version__,
        "ptxas": ptxas_version(90),
        "ptxas_blackwell": ptxas_version(100),
        "source_hash": source(),
    }
