"""Stored rows for the tests of ``flashbias report``: a small sweep with every kind of outcome, and strings that attack the page."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, Final

from cache_db.models import Config, Environment, Lift, Pin, Problem, Trial, Verdict, Verification, Winner
from cache_db.store import Store

ENVIRONMENT: Final = Environment(driver="580.1", ptxas="12.9", torch="2.11.0")
FIELDS: Final[dict[str, Any]] = {
    "dtype": "bfloat16",
    "head_dim": 64,
    "value_dim": 64,
    "rank_dim": 16,
    "causal": True,
    "grads": "",
    "seqlen_q": 1024,
    "seqlen_k": 1024,
}
HOSTILE: Final = (
    "</script><script>document.title='broken'</script>",
    "<!--<script>",
    "]]><img src=x onerror=\"document.title='broken'\">",
    "%%DATA%% \\u003c/script>",
    "\u202eeman\u2028\u2029\x1b[2J\x00'\"`${document.title='broken'}",
    "__proto__",
)


def problem(gpu: str = "NVIDIA H200", **fields: Any) -> Problem:
    """Returns an attention problem; ``fields`` are merged over the usual ones."""
    return Problem(
        spec="flashbias.kernels.spec:ATTENTION",
        gpu_name=gpu,
        capability="9.0",
        sm_count=132,
        mig_profile="",
        triton_version="3.6.0",
        source_hash="5" * 64,
        layout="aligned",
        fields={**FIELDS, **fields},
    )


def tile(m: int, n: int, warps: int = 4, stages: int = 2, variant: str = "pointers") -> Config:
    """Returns a config that has a place in the heat map."""
    params: dict[str, Any] = {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
    return Config(implementation="triton", variant=variant, params=params)


FOREIGN: Final = Config(implementation="sdpa", variant="flash", params={"torch": "2.11.0"})


def trial(config: Config, ms: float | None, at: Problem, verdict: Verdict = Verdict.SAFE, **changes: Any) -> Trial:
    """Returns a trial that took ``ms``; a safe one has figures of its errors."""
    safe = verdict is Verdict.SAFE
    figures: dict[str, Any] = (
        {"out_error": 1e-3, "out_ratio": 0.25, "worst_case": "ragged", "repeats": 300} if safe else {}
    )
    base: dict[str, Any] = {
        "problem": at,
        "kernel": "forward",
        "config": config,
        "verdict": verdict,
        "level": 2 if safe else 0,
        "reason": "" if safe else f"it is {verdict}",
        "figures": figures | ({} if ms is None else {"ms": ms}),
        "environment": ENVIRONMENT,
        "gpu_uuid": "GPU-1",
        "host": "secret-host",
        "created_at": 1000.0,
        "seconds": 1.5,
    }
    return Trial(**{**base, **changes})


def winner(of: Trial, **changes: Any) -> Winner:
    """Returns ``of`` as the winner of its key."""
    base: dict[str, Any] = {
        "problem": of.problem,
        "kernel": of.kernel,
        "config": of.config,
        "level": 2,
        "ms": of.figures["ms"],
        "tried": 6,
        "total": 6,
        "complete": True,
        "proven_with": of.proven_with,
        "binary": "b" * 64,
        "environment": of.environment,
        "created_at": 2000.0,
    }
    return Winner(**{**base, **changes})


def proof(of: Trial, verdict: Verdict = Verdict.SAFE, **changes: Any) -> Verification:
    """Returns a later judgement of ``of``'s config."""
    base: dict[str, Any] = {"verdict": verdict, "level": 2 if verdict is Verdict.SAFE else 0, "created_at": 3000.0}
    return Verification.of(of).model_copy(update={**base, **changes})


def lift(of: Trial, created_at: float) -> Lift:
    """Returns leave to try ``of``'s config again."""
    return Lift(problem=of.problem, kernel=of.kernel, config=of.config, lifted_by="x", host="y", created_at=created_at)


def sweep(at: Problem, kernel: str = "forward") -> list[Trial]:
    """Returns six trials of one kernel: a cell of two, a slower one, one unproven, one that failed, and a foreign one."""
    return [
        trial(tile(64, 64), 1.0, at, kernel=kernel),
        trial(tile(64, 64, stages=3), 0.5, at, Verdict.WRONG, kernel=kernel),
        trial(tile(128, 64), 1.25, at, kernel=kernel),
        trial(tile(128, 128, 8), 3.0, at, level=0, reason="timed but not proven", kernel=kernel),
        trial(tile(64, 128, 8), None, at, Verdict.OUT_OF_RESOURCES, kernel=kernel),
        trial(FOREIGN, 1.1, at, kernel=kernel),
    ]


def fill(path: Path, *, backwards: bool = False) -> Store:
    """Stores three problems: two whole ones, one of them pinned, and one without a winner; returns the database."""
    store = Store.open(path)
    first, second, third = problem(), problem(head_dim=128, causal=False), problem("NVIDIA B200", rank_dim=0)
    trials = [
        row
        for at, kernel in ((first, "forward"), (first, "backward_dq"), (second, "forward"))
        for row in sweep(at, kernel)
    ]
    trials.append(trial(tile(64, 64), None, third, Verdict.CRASHED))
    for row in reversed(trials) if backwards else trials:
        store.add_trial(row)
    for row in (trials[0], trials[6], trials[12])[:: -1 if backwards else 1]:
        store.put_winner(winner(row))
    store.put_pin(
        Pin(
            problem=second,
            kernel="forward",
            config=FOREIGN,
            pinned_by="somebody",
            host="z",
            reason="a test",
            created_at=4.0,
        )
    )
    return store


def attack(path: Path) -> Store:
    """Stores rows with a hostile string wherever a row takes any; returns the database."""
    store = Store.open(path)
    for number, text in enumerate(HOSTILE):
        at = problem(text, **{text or "x": text, "dtype": text, "mask": text})
        config = Config(
            implementation=text, variant=text, params={text: text, "BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4}
        )
        other = Config(implementation=text, variant=text, params={"BLOCK_M": text, "num_warps": True})
        figures: dict[str, Any] = {
            "ms": 1.0 + number,
            f"{text}_error": 0.1,
            f"{text}_ratio": 0.5,
            "worst_case": text,
            "registers": text,
        }
        row = trial(config, 1.0, at, kernel=text, figures=figures)
        odd: dict[str, Any] = {"ms": "fast", "repeats": text, "spills": -1}
        bad = trial(other, 1.0, at, Verdict.WRONG, kernel=text, reason=text, figures=odd)
        made = Environment(driver=text, ptxas=text, torch=text)
        store.add_trial(row)
        store.add_trial(bad)
        store.put_winner(winner(row, environment=made))
        store.add_verification(proof(row, reason=text))
        store.put_pin(
            Pin(problem=at, kernel=text, config=other, pinned_by=text, host=text, reason=text, created_at=1.0)
        )
    return store


def many(path: Path, count: int) -> Store:
    """Stores ``count`` problems of a few trials each; returns the database."""
    store = Store.open(path)
    lengths = itertools.islice(itertools.product((32, 64, 96, 128, 256), (0, 16, 32), range(1, count + 1)), count)
    from cache_db.batch import Batch

    rows = [
        row for dim, rank, length in lengths for row in sweep(problem(head_dim=dim, rank_dim=rank, seqlen_q=length))
    ]
    store.merge(Batch.of(rows))
    return store
