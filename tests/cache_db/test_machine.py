"""Whatever is done in whatever order: each store holds what a dict would, and databases that meet agree."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
import store_examples as examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from cache_db import Layers, open_layers
from cache_db.address import Address
from cache_db.batch import Batch
from cache_db.memory import Memory
from cache_db.models import FINAL, Problem, Trial, Verdict, Verification, Winner
from cache_db.store import Store

PROBLEMS = [examples.problem(fields={"number": number}) for number in range(2)]
KERNELS = ("forward", "backward_dq")
at = st.sampled_from(PROBLEMS)
kernels = st.sampled_from(KERNELS)
blocks = st.integers(1, 3)
times = st.integers(0, 5).map(float)

trials = st.builds(
    lambda block, verdict, where, kernel, time: examples.trial(
        block, verdict, where, kernel=kernel, created_at=time, seed=len(verdict)
    ),
    blocks,
    st.sampled_from([Verdict.SAFE, Verdict.WRONG, Verdict.CRASHED, Verdict.KILLED]),
    at,
    kernels,
    times,
)
winners = st.builds(
    lambda block, where, kernel, level, ms, time: examples.winner(
        block, where, kernel=kernel, level=level, ms=ms, created_at=time
    ),
    blocks,
    at,
    kernels,
    st.integers(1, 3),
    st.sampled_from([0.1, 0.2, 0.3]),
    times,
)
verifications = st.builds(
    lambda block, where, time: examples.verification(block, problem=where, created_at=time), blocks, at, times
)


class Machine(RuleBasedStateMachine):
    """One store against dicts."""

    address: Address | None = None

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.storage = self.opened()
        self.trials: dict[tuple[str, str], Trial] = {}
        self.winners: dict[str, Winner] = {}
        self.verifications: set[tuple[str, float, str]] = set()
        self.owners: dict[str, str] = {}

    def opened(self) -> Store | Layers:
        """Opens the store, as a new process would."""
        return Store.open(self.folder / "flashbias.db")

    def teardown(self) -> None:
        """Deletes what was stored."""
        shutil.rmtree(self.folder)

    @rule(trial=trials)
    def add_trial(self, trial: Trial) -> None:
        """Stores a trial."""
        self.storage.add_trial(trial)
        name = (trial.problem.key(trial.kernel), trial.config.hash)
        if name not in self.trials or trial.verdict in FINAL or self.trials[name].verdict not in FINAL:
            self.trials[name] = trial

    @rule(winner=winners, replace=st.booleans())
    def put_winner(self, winner: Winner, replace: bool) -> None:
        """Stores a winner, and learns which one stands."""
        key = winner.problem.key(winner.kernel)
        if replace or key not in self.winners:
            self.winners[key] = winner
        assert self.storage.put_winner(winner, replace=replace) == self.winners[key]

    @rule(verification=verifications)
    def add_verification(self, verification: Verification) -> None:
        """Stores a proof."""
        self.storage.add_verification(verification)
        self.verifications.add((verification.problem.hash, verification.created_at, verification.config.hash))

    @rule(where=at, owner=st.sampled_from(["a", "b"]))
    def claim(self, where: Problem, owner: str) -> None:
        """Claims a lease."""
        lease = self.storage.claim(where.hash, owner, "host", 300.0)
        assert (lease is not None) == (self.owners.get(where.hash, owner) == owner)
        self.owners.setdefault(where.hash, owner)

    @precondition(lambda self: self.owners)
    @rule(where=at)
    def release(self, where: Problem) -> None:
        """Gives the lease that stands back, whoever holds it."""
        lease = self.storage.holder(where.hash)
        assert (lease.owner if lease else None) == self.owners.pop(where.hash, None)
        if lease is not None:
            self.storage.release(lease)

    @rule()
    def reopen(self) -> None:
        """Goes on in another process."""
        if isinstance(self.storage, Layers):
            self.storage.close()
        self.storage = self.opened()

    @invariant()
    def holds_what_the_dicts_hold(self) -> None:
        """Reads all of it."""
        for where in PROBLEMS:
            found = {(row.problem.key(row.kernel), row.config.hash): row for row in self.storage.trials(where)}
            assert found == {name: row for name, row in self.trials.items() if row.problem == where}
            won = {where.key(kernel): row for kernel, row in self.storage.winners(where).items()}
            assert won == {key: row for key, row in self.winners.items() if row.problem == where}
            proofs = {(row.problem.hash, row.created_at, row.config.hash) for row in self.storage.verifications(where)}
            assert proofs == {name for name in self.verifications if name[0] == where.hash}


def _run(machine: type[Machine], examples_: int, steps: int) -> None:
    chosen = settings(
        max_examples=examples_, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(machine, settings=chosen)


def test_file_agrees_with_dicts() -> None:
    """Trials, winners, proofs and leases in a SQLite file are those of the dicts after every step."""
    _run(Machine, 6, 15)


def test_server_agrees_with_dicts(database: Address) -> None:
    """So they are in PostgreSQL."""

    class Served(Machine):
        def opened(self) -> Store:
            return Store.connect(database)

        def teardown(self) -> None:
            with Store.connect(database)._writing() as connection:
                connection.exec_driver_sql("TRUNCATE flashbias_trials, flashbias_winners, flashbias_verifications")
                connection.exec_driver_sql("TRUNCATE flashbias_leases")
            super().teardown()

    _run(Served, 2, 8)


def test_layers_agree_with_dicts(database: Address) -> None:
    """So they are in the layers, whose user's file is a new one for each process."""

    class Layered(Machine):
        processes = 0

        def opened(self) -> Layers:
            self.processes += 1
            return open_layers(self.folder / str(self.processes), database, 30.0)

        def teardown(self) -> None:
            assert isinstance(self.storage, Layers)
            self.storage.close()
            with Store.connect(database)._writing() as connection:
                connection.exec_driver_sql("TRUNCATE flashbias_trials, flashbias_winners, flashbias_verifications")
                connection.exec_driver_sql("TRUNCATE flashbias_leases")
            super().teardown()

    _run(Layered, 2, 8)


batches = st.builds(
    Batch,
    st.lists(trials, max_size=4).map(tuple),
    st.lists(verifications, max_size=2).map(tuple),
    st.just(()),
    st.lists(winners, max_size=4).map(tuple),
)


def _rows(store: Store | Memory) -> object:
    return [
        (
            store.trials(where),
            sorted(store.verifications(where), key=lambda row: (row.created_at, row.config.hash)),
            store.winners(where),
        )
        for where in PROBLEMS
    ]


@settings(max_examples=20, deadline=None)
@given(st.lists(batches, min_size=1, max_size=3))
def test_memory_merges_as_a_database_does(found: list[Batch]) -> None:
    """The rules are written twice, in Python and in SQL: they mean the same."""
    with tempfile.TemporaryDirectory() as folder:
        store, memory = Store.open(Path(folder) / "flashbias.db"), Memory()
        for batch in found:
            store.merge(batch)
            memory.merge(batch)
        assert _rows(store) == _rows(memory)


@settings(max_examples=60, deadline=None)
@given(st.lists(batches, min_size=2, max_size=3), st.randoms(use_true_random=False))
def test_merging_knows_no_order_and_no_number(found: list[Batch], random: object) -> None:
    """Whichever database comes first, and however often: the outcome is the same."""
    first, second = Memory(), Memory()
    shuffled = [*found, *found]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    for batch in found:
        first.merge(batch)
    for batch in shuffled:
        second.merge(batch)
    assert _rows(first) == _rows(second)


@pytest.mark.parametrize("renewed", [True, False])
def test_database_merges_renewed_and_forced_winners_as_memory_does(tmp_path: Path, renewed: bool) -> None:
    """A renewed winner goes over older ones only, a forced one over any."""
    store, memory = Store.open(tmp_path / "flashbias.db"), Memory()
    for winner in (examples.winner(1, ms=0.2, created_at=5.0), examples.winner(2, ms=0.3, created_at=4.0)):
        key = frozenset({winner.problem.key(winner.kernel)})
        batch = Batch(winners=(winner,), renewed=key) if renewed else Batch(winners=(winner,), forced=key)
        store.merge(batch)
        memory.merge(batch)
    expected = examples.winner(1, ms=0.2, created_at=5.0) if renewed else examples.winner(2, ms=0.3, created_at=4.0)
    assert store.winners(examples.problem()) == memory.winners(examples.problem()) == {"forward": expected}
