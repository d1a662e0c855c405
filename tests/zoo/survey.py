"""How the gate treats candidates that nobody spoilt: how long it takes for each, and whether it rejects good ones.

All candidates of several problems are compiled in parallel and proven as they come, at level 1 and at level 2, behind
the spec's default configs; each kernel's first is timed before, as in a sweep, which compiles what it packs its inputs
with. A rejected one gets a screen of ten times the repeats with other seeds: it counts as good if
that finds nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

from autotune.device import DeviceInfo
from autotune.errors import AutotuneError
from autotune.gate.races import INTERPRETER_REPEATS, REPEATS
from autotune.sandbox import GateFault, Limits, Outcome, Sandbox
from autotune.spec import load
from cache_db.models import Config, Problem, Verdict
from flashbias.kernels.problem import GRADIENTS, Shape, problem
from tests.zoo.keeper import SEED, home

FACTORS: Final = GRADIENTS[:5]
PLAIN: Final = GRADIENTS[:3]
SEEDS: Final = 4
OTHER_SEEDS: Final = (101, 102, 103)
LONGER: Final = 10
# No candidate takes so long unless it hangs, and that is to cost the survey no more.
TRIAL_SECONDS: Final = 10
# Verdicts of a compile or a launch that another screen cannot change: these configs do not exist on this device.
IMPOSSIBLE: Final = frozenset({Verdict.COMPILE_ERROR, Verdict.OUT_OF_RESOURCES})
SIZES: Final[dict[str, Any]] = {"batch": 2, "nheads": 16, "seqlen_q": 2048, "seqlen_k": 2048}
FEW: Final[dict[str, Any]] = {"batch": 2, "nheads": 16, "seqlen_k": 16384}
SHAPES: Final[dict[str, Shape]] = {
    "fp16 D64 R8 causal": Shape(**SIZES, headdim=64, rank=8, causal=True, grads=FACTORS),
    "bf16 D128 R16": Shape(**SIZES, headdim=128, rank=16, dtype="bfloat16", grads=FACTORS),
    "bf16 D64 R8 varlen": Shape(**SIZES, headdim=64, rank=8, varlen=True, dtype="bfloat16", grads=FACTORS),
    "fp16 D64 mask": Shape(**SIZES, headdim=64, mask="float16", grads=(*PLAIN, "mask")),
    "bf16 D64 16 queries": Shape(**FEW, seqlen_q=16, headdim=64, rank=8, dtype="bfloat16", grads=FACTORS),
    "fp16 D32 R2 fp32 factors causal": Shape(
        **SIZES, headdim=32, rank=2, factor_dtype="float32", causal=True, grads=FACTORS
    ),
    "bf16 D64 GQA window": Shape(**SIZES, nheads_kv=4, headdim=64, window=(255, 0), dtype="bfloat16", grads=PLAIN),
    "fp16 D64 R8 strided": Shape(**SIZES, headdim=64, rank=8, layout="strided", grads=FACTORS),
    "fp32 D64 R8 tf32": Shape(**SIZES, headdim=64, rank=8, dtype="float32", precision="tf32", grads=FACTORS),
    "fp16 D96 R8 bool mask": Shape(**SIZES, headdim=96, rank=8, mask="bool", grads=FACTORS),
    "bf16 D256": Shape(**SIZES, headdim=256, dtype="bfloat16", grads=PLAIN),
    "fp16 D64 1 query": Shape(**FEW, seqlen_q=1, headdim=64),
    "fp16 D40 R40 causal": Shape(**SIZES, headdim=40, rank=40, causal=True, grads=FACTORS),
    "bf16 D64 fp32 factors": Shape(
        **SIZES, headdim=64, rank=8, factor_dtype="float32", dtype="bfloat16", grads=FACTORS
    ),
    "fp32 D64 R8 tf32x3": Shape(**SIZES, headdim=64, rank=8, dtype="float32", precision="tf32x3", grads=FACTORS),
}


@dataclass(frozen=True)
class Case:
    """What the gate did with one candidate. ``first``: it was its problem's first, and waited for reference answers."""

    problem: str
    kernel: str
    config: Config
    quick: Outcome
    whole: Outcome
    first: bool
    rejected_wrongly: bool = False

    @property
    def good(self) -> bool:
        """Whether it is a good candidate, whatever the gate said."""
        return self.whole.safe or self.rejected_wrongly


@dataclass
class Survey:
    """All candidates looked at, how many could not be compiled or run here, and why a problem was given up."""

    cases: list[Case] = field(default_factory=list)
    impossible: int = 0
    given_up: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def good(self) -> int:
        """How many good candidates were met."""
        return sum(case.good for case in self.cases)

    @property
    def rejected(self) -> list[Case]:
        """The candidates that the gate refused."""
        return [case for case in self.cases if not case.whole.safe]


def problems(device: DeviceInfo) -> dict[str, Problem]:
    """Returns the problems to survey by name; in the interpreter one small one, with a bad candidate among the good."""
    if device.interpreted:
        return {"fp16 D16 R2, one planted": home(device, grads=(), faults="scaled_lse")}
    return {name: problem(shape, device) for name, shape in SHAPES.items()}


def survey(device: DeviceInfo, good: int, deadline: float) -> Survey:
    """Looks at candidates until ``good`` of them were good, no problem is left, or the monotonic ``deadline`` is over."""
    found = Survey()
    started = time.monotonic()
    with ThreadPoolExecutor(1) as ahead:
        waiting: Iterator[tuple[str, Problem]] = iter(problems(device).items())
        following = _open(ahead, waiting, device) if _wanted(found, good, deadline) else None
        while following is not None:
            name, future = following
            try:
                page = future.result()
            except AutotuneError as error:
                found.given_up[name] = str(error)
                page = None
            # The next one's children start, and compile, while this one is proven.
            following = _open(ahead, waiting, device) if _wanted(found, good, deadline) else None
            if page is not None:
                _read(page, found, good, deadline)
    found.seconds = time.monotonic() - started
    return found


class _Page:
    """One problem with its sandbox, in which the compiles of all its candidates have begun."""

    def __init__(self, name: str, problem_: Problem, device: DeviceInfo) -> None:
        self.name = name
        self.problem = problem_
        self.device = device
        self.spec = load(problem_.spec)
        self.sandbox = Sandbox(problem_, device, Limits(trial_seconds=60 if device.interpreted else TRIAL_SECONDS))
        items = [
            (kernel, config)
            for kernel in self.spec.kernels(problem_)
            for config in self.spec.candidates(kernel, problem_, device)
            if self.spec.rejects(kernel, config, problem_, device) is None
        ]
        self.compiled = self.sandbox.compile(items)
        self.seed = SEED

    def close(self) -> None:
        """Ends the children; what is left is not compiled."""
        self.sandbox.close()

    def through(self, kernel: str) -> dict[str, Config]:
        """Returns the default configs of what ``kernel`` depends on."""
        needed = self.spec.depends_on(kernel, self.problem)
        ordered = [name for name in self.spec.kernels(self.problem) if name in needed]
        return {name: self.spec.default(name, self.problem, self.device) for name in ordered}

    def behind_compiled_defaults(self) -> Iterator[tuple[str, Config, Outcome]]:
        """Yields each candidate once it is compiled, and what it is proven through: no proof's seconds hold a compile."""
        waiting: list[tuple[str, Config, Outcome]] = []
        done: set[tuple[str, str]] = set()
        for kernel, config, outcome in self.compiled:
            done.add((kernel, config.hash))
            waiting.append((kernel, config, outcome))
            ready = [each for each in waiting if done >= self._needed(each[0])]
            waiting = [each for each in waiting if each not in ready]
            yield from ready
        yield from waiting  # behind a default that is no candidate: the first of these compiles it

    def _needed(self, kernel: str) -> set[tuple[str, str]]:
        return {(name, config.hash) for name, config in self.through(kernel).items()}

    def prove(self, kernel: str, config: Config, level: int) -> Outcome:
        """Returns the gate's outcome, on the next seed's inputs where one's prove nothing. Raises GateFault."""
        for _ in range(SEEDS - 1):
            try:
                return self.sandbox.prove(kernel, config, self.through(kernel), level, self.seed)
            except GateFault:
                self.seed += 1
        return self.sandbox.prove(kernel, config, self.through(kernel), level, self.seed)

    def nothing_found(self, kernel: str, config: Config) -> bool:
        """Returns whether screens of ten times the repeats, with other seeds, find nothing wrong with ``config``."""
        repeats = LONGER * (INTERPRETER_REPEATS if self.device.interpreted else REPEATS[2])
        for seed in OTHER_SEEDS:
            try:
                if not self.sandbox.prove(kernel, config, self.through(kernel), 2, seed, repeats).safe:
                    return False
            except GateFault:  # this seed's inputs tell nothing
                continue
        return True


def _open(
    ahead: ThreadPoolExecutor, waiting: Iterator[tuple[str, Problem]], device: DeviceInfo
) -> tuple[str, Future[_Page]] | None:
    """Returns the next problem's name and, when it has come, its page; None where no problem is left."""
    following = next(waiting, None)
    return None if following is None else (following[0], ahead.submit(_Page, *following, device))


def _wanted(found: Survey, good: int, deadline: float) -> bool:
    return found.good < good and time.monotonic() < deadline


def _read(page: _Page, found: Survey, good: int, deadline: float) -> None:
    """Adds the cases of one problem as they are compiled, and closes its sandbox."""
    try:
        cases = _cases(page, found)
        while _wanted(found, good, deadline) and (case := next(cases, None)) is not None:
            found.cases.append(case)
    except AutotuneError as error:  # no child, or inputs that cannot be judged: the other problems go on
        found.given_up[page.name] = str(error)
    finally:
        page.close()


def _cases(page: _Page, found: Survey) -> Iterator[Case]:
    first, timed = True, set[str]()
    for kernel, config, compiled in page.behind_compiled_defaults():
        if not compiled.safe:
            found.impossible += 1
            continue
        if kernel not in timed:
            timed.add(kernel)
            page.sandbox.measure(kernel, [config], page.through(kernel), 1)
        quick, whole = (page.prove(kernel, config, level) for level in (1, 2))
        if whole.verdict in IMPOSSIBLE:
            found.impossible += 1
            continue
        wrongly = not whole.safe and page.nothing_found(kernel, config)
        yield Case(page.name, kernel, config, quick, whole, first, wrongly)
        first = False


def quantile(values: Sequence[float], part: float) -> float:
    """Returns the smallest of ``values`` that at least ``part`` of them do not exceed; 0 if there are none."""
    ordered = sorted(values)
    return ordered[max(-(-int(part * 1000) * len(ordered) // 1000) - 1, 0)] if ordered else 0.0
