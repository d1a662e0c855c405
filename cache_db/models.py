"""The rows of the tuning database, as validated, immutable models.

Every row that leaves this package has passed through one of these models, so a damaged or foreign row
is refused here and never reaches a kernel launch. Hashes are SHA-256 over canonical JSON (sorted keys,
no spaces), so two processes that describe the same thing agree on its name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from enum import StrEnum
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

Scalar = bool | int | float | str
Layout = Literal["aligned", "strided"]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=2**31)]


def canonical_json(value: Any) -> str:
    """Returns the one JSON text of ``value``: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """Returns the SHA-256 (64 hex digits) of ``value``'s canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Returns a copy; one with an ``update`` is validated and loses what was computed of the original."""
        if not update:
            return super().model_copy(deep=deep)
        return type(self)(**{name: getattr(self, name) for name in type(self).model_fields} | dict(update))


class Problem(_Row):
    """One situation to be fast at: where it runs (environment columns) and what it computes (``fields``).

    ``spec`` is the ``module:attribute`` of the KernelSpec that understands ``fields``; ``capability`` is
    "9.0"; ``mig_profile`` is "" without MIG; ``layout`` says whether every pointer and stride is 16-byte
    aligned, because the same config compiles to another binary when it is not.
    """

    spec: str = Field(pattern=r"^[\w.]+:[\w.]+$")
    gpu_name: str
    capability: str
    sm_count: Count
    mig_profile: str
    triton_version: str
    source_hash: str
    layout: Layout
    fields: dict[str, Scalar]

    @cached_property
    def hash(self) -> str:
        """The problem's name: SHA-256 of all its columns."""
        return digest(self.model_dump())

    def __hash__(self) -> int:
        return hash(self.hash)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Problem) and self.hash == other.hash

    def key(self, kernel: str) -> str:
        """Returns the primary key of (this problem, ``kernel``)."""
        return digest([self.hash, kernel])


class Config(_Row):
    """One way to run one kernel: who implements it, which variant, and its parameters."""

    implementation: str
    variant: str
    params: dict[str, Scalar]

    @cached_property
    def hash(self) -> str:
        """The config's name: SHA-256 of its contents."""
        return digest(self.model_dump())

    def __hash__(self) -> int:
        return hash(self.hash)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and self.hash == other.hash

    def __str__(self) -> str:
        params = " ".join(f"{name}={value}" for name, value in self.params.items())
        return f"{self.implementation}/{self.variant} {params}"


class Verdict(StrEnum):
    """What a trial found. ``FINAL`` verdicts are shared; the others are tried again in a fresh child."""

    SAFE = "safe"
    WRONG = "wrong"
    RACY = "racy"
    OUT_OF_BOUNDS = "out_of_bounds"
    COMPILE_ERROR = "compile_error"
    OUT_OF_RESOURCES = "out_of_resources"
    CRASHED = "crashed"
    TIMEOUT = "timeout"
    KILLED = "killed"


FINAL = frozenset(
    {
        Verdict.SAFE,
        Verdict.WRONG,
        Verdict.RACY,
        Verdict.OUT_OF_BOUNDS,
        Verdict.COMPILE_ERROR,
        Verdict.OUT_OF_RESOURCES,
    }
)


class Environment(_Row):
    """What a proof depends on beside the problem: if any of these change, the config is proven again."""

    driver: str
    ptxas: str
    torch: str


class Trial(_Row):
    """One config tried for one key.

    ``level`` is the proof reached (0 none, 1 quick, 2 gate, 3 soak); ``figures`` holds measured numbers
    (``ms`` is the median time at the representative size); ``proven_with`` maps each kernel this one was
    judged through to that kernel's config hash; ``binary`` is the SHA-256 of the machine code that ran.
    """

    problem: Problem
    kernel: str
    config: Config
    verdict: Verdict
    level: int = Field(ge=0, le=3)
    reason: str = ""
    figures: dict[str, Scalar] = Field(default_factory=dict)
    seed: int = Field(default=0, ge=-(2**63), lt=2**63)
    proven_with: dict[str, str] = Field(default_factory=dict)
    binary: str = ""
    environment: Environment
    gpu_uuid: str
    host: str
    created_at: Finite
    seconds: Finite


class Verification(_Row):
    """A proof of a config that already has a trial: same judgement, another time, place or binary."""

    problem: Problem
    kernel: str
    config: Config
    verdict: Verdict
    level: int = Field(ge=0, le=3)
    reason: str = ""
    seed: int = Field(default=0, ge=-(2**63), lt=2**63)
    proven_with: dict[str, str] = Field(default_factory=dict)
    binary: str = ""
    environment: Environment
    gpu_uuid: str
    host: str
    created_at: Finite

    @classmethod
    def of(cls, trial: Trial) -> Self:
        """Returns what ``trial`` found as a judgement that no later trial takes the place of."""
        return cls(**{name: getattr(trial, name) for name in cls.model_fields})


class Lift(_Row):
    """Leave to try one config again: what was judged of it up to ``created_at`` neither bars nor proves it any more.

    The judgements stay as they are; those that come later count. ``lifted_by`` is who gave leave, on ``host``.
    """

    problem: Problem
    kernel: str
    config: Config
    lifted_by: str
    host: str
    reason: str = ""
    created_at: Finite


class Pin(_Row):
    """The config that one key runs with instead of its winner, by the wish of ``pinned_by`` on ``host``."""

    problem: Problem
    kernel: str
    config: Config
    pinned_by: str
    host: str
    reason: str = ""
    created_at: Finite


class Winner(_Row):
    """The chosen config of one key. ``complete`` is False when the budget ended the sweep early."""

    problem: Problem
    kernel: str
    config: Config
    level: int = Field(ge=0, le=3)
    ms: Finite
    tried: Count
    total: Count
    complete: bool
    proven_with: dict[str, str] = Field(default_factory=dict)
    binary: str
    environment: Environment
    created_at: Finite


class Lease(_Row):
    """The right to sweep one problem until ``expires_at`` (epoch seconds, the database's clock)."""

    problem_hash: str
    owner: str
    host: str
    acquired_at: Finite
    expires_at: Finite


class Agreement(_Row):
    """What the ranks of job ``job_id`` run for one problem, as ``host`` told first; ``configs`` is autotune's own text."""

    job_id: str = Field(min_length=1, max_length=255)
    problem_hash: str
    configs: str
    host: str
    created_at: Finite
