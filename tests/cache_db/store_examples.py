"""Rows to store: small, whole, and different wherever a test says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cache_db.models import Config, Environment, Lift, Pin, Problem, Scalar, Trial, Verdict, Verification, Winner
from cache_db.store import Store

ENVIRONMENT = Environment(driver="580.1", ptxas="12.9", torch="2.13.0")
SOFT = frozenset({"seqlen_q", "seqlen_k"})


def problem(*, fields: dict[str, Scalar] | None = None, **columns: Any) -> Problem:
    """Returns a problem; ``fields`` are merged over the usual ones."""
    base: dict[str, Any] = {
        "spec": "softmax_spec:SOFTMAX",
        "gpu_name": "NVIDIA H200",
        "capability": "9.0",
        "sm_count": 132,
        "mig_profile": "",
        "triton_version": "3.6.0",
        "source_hash": "5" * 64,
        "layout": "aligned",
    }
    usual: dict[str, Scalar] = {"seqlen_q": 1024, "seqlen_k": 1024, "head_dim": 64, "causal": True, "dtype": "bfloat16"}
    return Problem(**{**base, **columns}, fields={**usual, **(fields or {})})


def config(block: int = 64) -> Config:
    """Returns a config; another ``block`` is another config."""
    return Config(implementation="triton", variant="pointer", params={"BLOCK_M": block, "num_warps": 4})


def trial(block: int = 64, verdict: Verdict = Verdict.SAFE, at: Problem | None = None, **changes: Any) -> Trial:
    """Returns a trial of ``config(block)``."""
    base: dict[str, Any] = {
        "problem": at or problem(),
        "kernel": "forward",
        "config": config(block),
        "verdict": verdict,
        "level": 2,
        "reason": "",
        "figures": {"ms": 0.125, "registers": 168, "case": "ragged"},
        "seed": 17,
        "proven_with": {},
        "binary": "b" * 64,
        "environment": ENVIRONMENT,
        "gpu_uuid": "GPU-1",
        "host": "node-1",
        "created_at": 1000.0 + block,
        "seconds": 0.5,
    }
    return Trial(**{**base, **changes})


def verification(block: int = 64, **changes: Any) -> Verification:
    """Returns a later proof of ``config(block)``."""
    base = {name: getattr(trial(block), name) for name in Verification.model_fields}
    return Verification(**{**base, **changes})


def lift(block: int = 64, at: Problem | None = None, **changes: Any) -> Lift:
    """Returns leave to try ``config(block)`` again."""
    base: dict[str, Any] = {
        "problem": at or problem(),
        "kernel": "forward",
        "config": config(block),
        "lifted_by": "somebody",
        "host": "node-1",
        "reason": "a new driver",
        "created_at": 3000.0,
    }
    return Lift(**{**base, **changes})


def pin(block: int = 64, at: Problem | None = None, **changes: Any) -> Pin:
    """Returns the wish that one key runs with ``config(block)``."""
    base: dict[str, Any] = {
        "problem": at or problem(),
        "kernel": "forward",
        "config": config(block),
        "pinned_by": "somebody",
        "host": "node-1",
        "reason": "to compare",
        "created_at": 4000.0,
    }
    return Pin(**{**base, **changes})


def winner(block: int = 64, at: Problem | None = None, **changes: Any) -> Winner:
    """Returns ``config(block)`` as the winner of one key."""
    base: dict[str, Any] = {
        "problem": at or problem(),
        "kernel": "forward",
        "config": config(block),
        "level": 2,
        "ms": 0.125,
        "tried": 12,
        "total": 40,
        "complete": False,
        "proven_with": {"forward": "f" * 64},
        "binary": "b" * 64,
        "environment": ENVIRONMENT,
        "created_at": 2000.0,
    }
    return Winner(**{**base, **changes})


def filled(path: Path, rows: int = 60) -> Store:
    """Returns a store of several pages: ``rows`` trials and one winner."""
    store = Store.open(path)
    for block in range(rows):
        store.add_trial(trial(block))
    store.put_winner(winner())
    return store
