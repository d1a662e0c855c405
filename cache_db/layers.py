"""What autotune talks to: the user's own database, the one that a cluster shares, and sealed seeds, in this order.

Reads are answered by the user's database. The shared one is asked about a problem that has no winner there, about one that
this process is about to sweep, and once a day about any other; all that it knows of the problem is then kept. Writes go
to both; what the server does not take at once is owed to it, and sent later, by this process or another. Leases are
the server's while it answers. No fault of either leaves this module, and no call waits for the server longer than it may.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cache_db import rules
from cache_db.batch import Batch, Shared
from cache_db.delivery import deliver
from cache_db.errors import CacheError, RowRefused
from cache_db.local import Local
from cache_db.models import Agreement, Lease, Lift, Pin, Problem, Trial, Verification, Winner
from cache_db.origins import Origin, origins
from cache_db.seeds import Seeds

if TYPE_CHECKING:
    from cache_db.address import Address
    from cache_db.remote import Remote
    from cache_db.store import Store

FILE_NAME = "flashbias.db"
SERVER_SECONDS = 2.5
"""How long a call waits for the server, if nobody says otherwise."""

FRESH_SECONDS = 86_400.0
"""How long the user's database answers for a problem that it has a winner for, without asking the server again."""

logger = logging.getLogger(__name__)
T = TypeVar("T")


def open_layers(
    cache_dir: Path | None,
    address: Address | None = None,
    seconds: float = SERVER_SECONDS,
    seeds: Sequence[Path] = (),
) -> Layers:
    """Returns the layers over ``<cache_dir>/flashbias.db``, or memory for None, the database at ``address``, and ``seeds``.

    ``seconds`` is how long a call waits for the server. Never raises for a bad file or a server that is away.
    """
    return Layers(None if cache_dir is None else cache_dir / FILE_NAME, address, seconds, seeds)


class Layers:
    """The methods of ``Store``, without its errors."""

    def __init__(
        self,
        path: Path | None,
        address: Address | None = None,
        seconds: float = SERVER_SECONDS,
        seeds: Sequence[Path] = (),
    ) -> None:
        self._target = "" if address is None else address.target
        self._local = Local(path, self._target)
        self._seeds = Seeds(seeds)
        self._remote: Remote | None = None
        self._asked: set[str] = set()  # problems whose shared rows this process has
        self._stale: set[str] = set()  # problems about which the server must be asked again
        self._leased: set[tuple[str, str]] = set()  # problems and owners of leases that the server granted
        self._renewed_at = 0.0  # what was learned of the server before counts no more (epoch seconds)
        if address is not None:
            from cache_db.remote import Remote

            self._remote = Remote(address, seconds, partial(deliver, self._local))
            if self._local.debts(1):
                self._remote.send_later()

    @property
    def location(self) -> str:
        """Where new rows go, for messages: the file's path, or "memory", and the server's address."""
        return self._local.location + (f" and {self._remote.address}" if self._remote is not None else "")

    @property
    def server(self) -> str:
        """What is known of the server without asking it: "none" is named, "ready", "read-only" or "away"."""
        return "none" if self._remote is None else self._remote.state

    @property
    def reachable(self) -> bool | None:
        """Whether the server answers, None where none is named. It is asked once, and again only after it was away."""
        if self._remote is not None and self._remote.state == "ready" and not self._remote.met:
            self._ask(lambda store: store.url)
        return None if self._remote is None else self._remote.state != "away"

    def close(self) -> None:
        """Ends the thread that waits for a server to come back; what is owed to it is sent by a later process."""
        if self._remote is not None:
            self._remote.close()

    def add_trial(self, trial: Trial) -> None:
        """Stores a trial; a final verdict only gives way to a final one."""
        self._local.add_trial(trial)
        self._send(trial, lambda store: store.add_trial(trial))

    def trials(self, problem: Problem, kernel: str | None = None) -> list[Trial]:
        """Returns the trials of a problem, or of one of its kernels, oldest first."""
        self._refresh(problem)
        return self._local.trials(problem, kernel)

    def winners(self, problem: Problem) -> dict[str, Winner]:
        """Returns kernel -> winner; a row that fails validation is skipped with a warning."""
        found = self._local.winners(problem)
        if self._remote is not None and not (found and self._is_fresh(problem)):
            self._learn(problem)
            found = self._local.winners(problem)
        return {kernel: winner for kernel, (_, winner) in self._seeds.winners(problem).items()} | found

    def origins(self, problem: Problem) -> list[Origin]:
        """Returns every layer's winners of a problem, by kernel, the one that counts first: conflicts show."""
        self._learn(problem)
        shared = self._ask(lambda store: store.winners(problem)) or {}
        judged: list[Trial | Verification] = [*self._local.trials(problem), *self._local.verifications(problem)]
        return origins(
            (self._local.location, self._local.winners(problem)),
            (str(self._remote and self._remote.address), shared),
            self._seeds.winners(problem),
            judged,
        )

    def put_winner(self, winner: Winner, *, replace: bool = False) -> Winner:
        """Stores a winner if its key has none, or in any case with ``replace``; returns the stored one, re-read."""
        stored = self._ask(lambda store: store.put_winner(winner, replace=replace), writes=True)
        if stored is None:
            return self._local.put_winner(winner, replace=replace)
        self._local.merge(Batch(winners=(stored,), forced=frozenset({stored.problem.key(stored.kernel)})))
        return stored

    def neighbours(
        self, problem: Problem, soft_fields: frozenset[str], limit: int = rules.NEIGHBOURS
    ) -> list[dict[str, Winner]]:
        """Returns the winners of the nearest problems that differ in ``soft_fields`` only, nearest first."""
        groups = self._ask(lambda store: store.neighbours(problem, soft_fields, limit)) or []
        if groups:
            self._local.merge(Batch(winners=tuple(winner for group in groups for winner in group.values())))
        merged: dict[Problem, dict[str, Winner]] = {}
        own = self._local.neighbours(problem, soft_fields, limit)
        for group in [*own, *self._seeds.neighbours(problem, soft_fields, limit)]:
            at = next(iter(group.values())).problem
            merged[at] = group | merged.get(at, {})
        return [merged[at] for at in rules.neighbours(problem, merged, soft_fields)[:limit]]

    def nearest(self, problem: Problem, limit: int = 3) -> list[Problem]:
        """Returns the other problems with winners that differ in the fewest columns and fields."""
        found = self._ask(lambda store: store.nearest(problem, limit)) or []
        found += [*self._local.nearest(problem, limit), *self._seeds.nearest(problem, limit)]
        return rules.nearest(problem, set(found), limit)

    def add_verification(self, verification: Verification) -> None:
        """Stores a proof; the same one twice is stored once."""
        self._local.add_verification(verification)
        self._send(verification, lambda store: store.add_verification(verification))

    def verifications(self, problem: Problem, kernel: str | None = None) -> list[Verification]:
        """Returns the proofs of a problem, or of one of its kernels, oldest first."""
        self._refresh(problem)
        return self._local.verifications(problem, kernel)

    def add_lift(self, lift: Lift) -> None:
        """Stores leave to try a config again; the same one twice is stored once."""
        self._local.add_lift(lift)
        self._send(lift, lambda store: store.add_lift(lift))

    def lifts(self, problem: Problem, kernel: str | None = None) -> list[Lift]:
        """Returns the lifts of a problem, or of one of its kernels, oldest first."""
        self._refresh(problem)
        return self._local.lifts(problem, kernel)

    def put_pin(self, pin: Pin) -> None:
        """Stores a pin in place of its key's earlier one; it is this user's wish, and nobody else's."""
        self._local.put_pin(pin)

    def pins(self, problem: Problem) -> dict[str, Pin]:
        """Returns kernel -> pin; a row that fails validation is skipped with a warning."""
        return self._local.pins(problem)

    def remove_pin(self, key: str) -> bool:
        """Deletes the pin of the key with this hash; returns whether there was one, valid or not."""
        return self._local.remove_pin(key)

    def claim(self, problem_hash: str, owner: str, host: str, seconds: float) -> Lease | None:
        """Takes the lease of a problem; None while someone else's stands.

        It binds all who use the server. While that is away it binds the user's processes, without a file this process only.
        """
        self._stale.add(problem_hash)
        granted = self._ask(lambda store: (store.claim(problem_hash, owner, host, seconds),), writes=True)
        if granted is None:
            return self._local.claim(problem_hash, owner, host, seconds)
        if granted[0] is not None:
            self._leased.add((problem_hash, owner))
        return granted[0]

    def renew(self, lease: Lease, seconds: float) -> Lease | None:
        """Moves the end of a lease; None if it was lost. One that cannot be asked about now is taken to stand."""
        if (lease.problem_hash, lease.owner) not in self._leased:
            return self._local.renew(lease, seconds)
        renewed = self._ask(lambda store: (store.renew(lease, seconds),), writes=True)
        return lease if renewed is None else renewed[0]

    def release(self, lease: Lease) -> None:
        """Gives a lease back; one that was lost meanwhile stays with its new owner."""
        self._leased.discard((lease.problem_hash, lease.owner))
        self._ask(lambda store: store.release(lease), writes=True)
        self._local.release(lease)

    def holder(self, problem_hash: str) -> Lease | None:
        """Returns the standing lease of a problem."""
        found = self._ask(lambda store: (store.holder(problem_hash),))
        return self._local.holder(problem_hash) if found is None or found[0] is None else found[0]

    def agree(self, wanted: Agreement) -> Agreement | None:
        """Stores what a job runs for a problem unless it has agreed before; returns what is stored.

        The server decides where one is named, else the user's file. None when that cannot be asked, or read: then
        nothing is agreed on.
        """
        found = (
            self._ask(lambda store: (store.agree(wanted),), writes=True) if self._remote else self._local.agree(wanted)
        )
        return None if found is None else found[0]

    def agreed(self, job_id: str, problem_hash: str) -> tuple[Agreement | None] | None:
        """Returns, in a tuple, what a job has agreed on for a problem; None where that cannot be known."""
        if self._remote is None:
            return self._local.agreed(job_id, problem_hash)
        if self._remote.state == "read-only":  # what cannot be stored there cannot be agreed on
            return None
        return self._ask(lambda store: (store.agreed(job_id, problem_hash),))

    def seeded(self, problem: Problem) -> dict[str, Winner]:
        """Returns kernel -> winner of the shipped seeds alone, which are the same for every process that has them."""
        return {kernel: winner for kernel, (_, winner) in self._seeds.winners(problem).items()}

    def renew_knowledge(self) -> None:
        """Has the server asked again about every problem, whatever was learned of it before."""
        self._asked.clear()
        self._renewed_at = time.time()

    def counts(self) -> dict[str, int]:
        """Returns the number of rows of each table of the user's database, with those in memory and the leases we hold."""
        counts = self._local.counts()
        return counts | {"leases": counts["leases"] + len(self._leased)}

    def _ask(self, action: Callable[[Store], T], *, writes: bool = False) -> T | None:
        """Returns what the server answers, None where there is none or it is away."""
        if self._remote is None:
            return None
        try:
            return self._remote.write(action) if writes else self._remote.read(action)
        except RowRefused as error:
            logger.warning("Tuning server: %s; this result stays in the user's database.", error)
        except CacheError as error:
            logger.debug("Tuning server: %s", error)
        return None

    def _send(self, row: Shared, action: Callable[[Store], None]) -> None:
        """Sends a row that is marked as owed, and takes the mark back once it is on the server."""
        if self._remote is None:
            return
        from cache_db.outbox import debt

        def send(store: Store) -> bool:
            action(store)
            return True

        if self._ask(send, writes=True):
            self._local.settle([debt(row)])

    def _refresh(self, problem: Problem) -> None:
        if self._remote is not None and not self._is_fresh(problem):
            self._learn(problem)

    def _is_fresh(self, problem: Problem) -> bool:
        """Whether the user's database may answer for ``problem`` alone."""
        if problem.hash in self._stale or problem.hash in self._asked:
            return problem.hash not in self._stale
        synced_at = self._local.synced_at(problem)
        age = time.time() - synced_at
        return self._renewed_at <= synced_at and 0 <= age < FRESH_SECONDS and bool(self._local.winners(problem))

    def _learn(self, problem: Problem) -> None:
        """Keeps all that the server knows of ``problem``."""
        known = self._ask(lambda store: store.everything(problem))
        if known is None:
            return
        own = self._local.winners(problem)
        judged: list[Trial | Verification] = [*known.trials, *known.verifications]
        judged += self._local.trials(problem)
        judged += self._local.verifications(problem)
        bad = {kernel for kernel, winner in own.items() if rules.condemned(winner, judged)}
        good = [winner for winner in known.winners if winner.kernel in bad or not rules.condemned(winner, judged)]
        forced = frozenset(problem.key(winner.kernel) for winner in good if winner.kernel in bad)
        # An unsafe winner is no better for being fast; where there is no other, it is left to whoever proves it.
        winners = [winner for winner in known.winners if winner in good or winner.kernel not in own]
        self._local.merge(replace(known, winners=tuple(winners), forced=forced), synced=(self._target, problem))
        self._stale.discard(problem.hash)
        self._asked.add(problem.hash)
