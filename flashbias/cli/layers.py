"""What the shared database and the seeds have beside the user's: the origins of a problem's winners; nothing is written."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from autotune.evidence import when
from cache_db.errors import CacheError
from cache_db.models import Problem, Trial, Verification, Winner
from cache_db.origins import Origin, origins
from cache_db.seeds import Seeds
from flashbias.cli.database import short
from flashbias.cli.text import printable
from flashbias.settings import current

if TYPE_CHECKING:
    from cache_db.store import Store


def origins_of(problem: Problem, store: Store) -> list[Origin]:
    """Returns the winners of ``problem`` in every layer of the settings; a server that is away is told on stderr."""
    settings = current()
    shared = _shared(problem)
    judged: list[Trial | Verification] = [*store.trials(problem), *store.verifications(problem)]
    mine, theirs = (str(store.path), store.winners(problem)), (str(settings.db_url), shared)
    return origins(mine, theirs, Seeds(settings.seeds).winners(problem), judged)


def lines(found: Sequence[Origin]) -> Iterator[str]:
    """Yields who has which winner, and which one counts; nothing where there is one database only."""
    if all(each.layer == "user" for each in found):
        return
    yield ""
    for each in found:
        row, kernels = each.winner, [other.winner for other in found if other.winner.kernel == each.winner.kernel]
        conflict = ", in conflict" if any(other.config != row.config for other in kernels) else ""
        counts = "counts" if each.counts else "does not count"
        yield f"{row.kernel:14}{each.layer:7} {short(row.config.hash)}  level {row.level}  {row.ms:.4g} ms, {counts}{conflict}"
        yield f"{'':22}{when(row.created_at)}, {each.place}"


def as_json(each: Origin) -> dict[str, Any]:
    """Returns an origin as plain data."""
    row = each.winner
    return {
        "kernel": row.kernel,
        "layer": each.layer,
        "place": each.place,
        "config_hash": row.config.hash,
        "level": row.level,
        "ms": row.ms,
        "created_at": row.created_at,
        "counts": each.counts,
    }


def _shared(problem: Problem) -> dict[str, Winner]:
    address, seconds = current().db_url, current().db_seconds
    if address is None:
        return {}
    from cache_db import deadline
    from cache_db.store import Store

    try:
        return deadline.within(seconds, lambda: Store.connect(address, seconds).winners(problem))
    except CacheError as error:
        print(printable(f"flashbias: what the shared database has is not told: {error}"), file=sys.stderr)
        return {}
