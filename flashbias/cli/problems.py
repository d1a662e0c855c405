"""How problems are told in one line, and found by the beginning of their hash or of a key's; without torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from autotune.messages import summary
from cache_db.models import Problem
from flashbias.cli.database import LISTED, WrongUsage, short
from flashbias.cli.text import printable

_OURS: Final = frozenset({"dtype", "head_dim", "value_dim", "rank_dim", "seqlen_q", "seqlen_k", "causal", "grads"})


def brief(problem: Problem) -> str:
    """Returns what ``problem`` computes, in few words: of attention what its shapes file would say."""
    fields = problem.fields
    if not fields.keys() >= _OURS:
        return summary(problem)
    dims = f"D{fields['head_dim']}"
    if fields["value_dim"] != fields["head_dim"]:
        dims += f"/{fields['value_dim']}"
    parts = [str(fields["dtype"]), f"{fields['seqlen_q']}x{fields['seqlen_k']}", dims]
    parts += [f"R{fields['rank_dim']}"] if fields["rank_dim"] else ["no bias"]
    parts += [name for name in ("causal", "varlen") if fields.get(name)]
    parts += [f"{name} {fields[name]}" for name, usual in _USUAL.items() if fields.get(name, usual) != usual]
    parts += ["strided"] if problem.layout == "strided" else []
    grads = str(fields["grads"]).replace(",", " ")
    return f"{' '.join(parts)}, {f'gradients of {grads}' if grads else 'forward only'}"


_USUAL: Final = {"window": 0, "mask": "none", "gqa_group": 1, "precision": "default", "occupancy": ""}


def place(problem: Problem) -> str:
    """Returns the device that ``problem`` was tuned for."""
    return f"{problem.gpu_name}{f' ({problem.mig_profile})' if problem.mig_profile else ''}"


def one_problem(found: Iterable[tuple[Problem, str]], text: str) -> Problem:
    """Returns the only problem whose hash, or that of one of its keys (problem, kernel), begins with ``text``.

    Raises WrongUsage when there is none, or more than one, and names what there is.
    """
    everything = {problem.hash: problem for problem, _ in found}
    hits = {
        problem.hash: problem
        for problem, kernel in found
        if problem.hash.startswith(text) or problem.key(kernel).startswith(text)
    }
    if len(hits) == 1:
        return next(iter(hits.values()))
    known = hits or everything
    lines = [f"  {short(name)}  {printable(brief(known[name]))}" for name in sorted(known)[:LISTED]]
    if len(known) > LISTED:
        lines.append(f"  … and {len(known) - LISTED} more")
    listed = "There are:\n" + "\n".join(lines) if lines else "There are none at all: tune something first"
    raise WrongUsage.explain(
        "KEY",
        expected="the beginning of the hash of exactly one stored problem, or of one of its keys",
        got=f"{text!r}, with which {'more than one begin' if hits else 'none begins'}",
        cure=f"{'Give more digits. ' if hits else ''}{listed}",
    )
