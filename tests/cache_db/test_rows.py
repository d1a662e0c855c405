"""Rows survive the way to SQL and back, whatever they hold, and nothing that was tampered with comes back."""

from __future__ import annotations

import math
import sqlite3
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import store_examples as examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cache_db import open_layers, rows
from cache_db.errors import RowRefused
from cache_db.memory import Memory
from cache_db.models import Config, Environment, Lift, Pin, Problem, Trial, Verdict, Verification, Winner
from cache_db.store import Store

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.booleans() | st.integers() | FINITE | TEXT
FIELDS = st.dictionaries(TEXT, SCALARS, max_size=4)
COUNTS = st.integers(0, 2**31 - 1)
SEEDS = st.integers(-(2**63), 2**63 - 1)
PROBLEMS = st.builds(
    Problem,
    spec=st.just("module.path:NAME"),
    gpu_name=TEXT,
    capability=TEXT,
    sm_count=COUNTS,
    mig_profile=TEXT,
    triton_version=TEXT,
    source_hash=TEXT,
    layout=st.sampled_from(["aligned", "strided"]),
    fields=FIELDS,
)
PROOF: dict[str, st.SearchStrategy[Any]] = {
    "problem": PROBLEMS,
    "kernel": TEXT,
    "config": st.builds(Config, implementation=TEXT, variant=TEXT, params=FIELDS),
    "level": st.integers(0, 3),
    "proven_with": st.dictionaries(TEXT, TEXT, max_size=2),
    "binary": TEXT,
    "environment": st.builds(Environment, driver=TEXT, ptxas=TEXT, torch=TEXT),
    "created_at": FINITE,
}
JUDGED = PROOF | {
    "verdict": st.sampled_from(Verdict),
    "reason": TEXT,
    "seed": SEEDS,
    "gpu_uuid": TEXT,
    "host": TEXT,
}
FIGURES = st.dictionaries(TEXT, SCALARS | st.sampled_from([math.inf, -math.inf]), max_size=4)
TRIALS = st.builds(Trial, **JUDGED, figures=FIGURES, seconds=FINITE)
VERIFICATIONS = st.builds(Verification, **JUDGED)
WINNERS = st.builds(Winner, **PROOF, ms=FINITE, tried=COUNTS, total=COUNTS, complete=st.booleans())


LIFTS = st.builds(
    Lift,
    **{name: PROOF[name] for name in ("problem", "kernel", "config", "created_at")},
    lifted_by=TEXT,
    host=TEXT,
    reason=TEXT,
)


WISH = {name: PROOF[name] for name in ("problem", "kernel", "config", "created_at")}
PINS = st.builds(Pin, **WISH, pinned_by=TEXT, host=TEXT, reason=TEXT)


@given(row=TRIALS | VERIFICATIONS | WINNERS | LIFTS | PINS)
def test_encoded_row_decodes_to_itself(row: Trial | Verification | Winner | Lift | Pin) -> None:
    """Coding loses nothing: not the type of a number, not its last bit, not a character."""
    again = rows.decode(type(row), rows.encode(row))
    assert again == row
    assert repr(again.model_dump()) == repr({**row.model_dump(), **_sorted(row)})


def _sorted(row: Trial | Verification | Winner | Lift | Pin) -> dict[str, Any]:
    """The maps of ``row`` in the order JSON keeps them."""
    dump = row.model_dump()
    ordered: dict[str, Any] = {
        "problem": dump["problem"] | {"fields": dict(sorted(row.problem.fields.items()))},
        "config": dump["config"] | {"params": dict(sorted(row.config.params.items()))},
    }
    if not isinstance(row, Lift | Pin):
        ordered["proven_with"] = dict(sorted(row.proven_with.items()))
    if isinstance(row, Trial):
        ordered["figures"] = dict(sorted(row.figures.items()))
    return ordered


@settings(max_examples=25, deadline=None)
@given(trial=TRIALS, verification=VERIFICATIONS, winner=WINNERS)
def test_row_passes_through_the_file_unchanged(trial: Trial, verification: Verification, winner: Winner) -> None:
    """What any process reads from the file equals what another stored."""
    with TemporaryDirectory() as folder:
        store = Store.open(Path(folder) / "flashbias.db")
        store.add_trial(trial)
        store.add_verification(verification)
        assert store.put_winner(winner) == winner
        again = Store.open(store.path)
        assert again.trials(trial.problem) == [trial]
        assert again.verifications(verification.problem) == [verification]
        assert again.winners(winner.problem) == {winner.kernel: winner}


def test_figures_may_be_nan() -> None:
    """The error of an output full of NaN is a figure like any other, in JSON any tool can read."""
    columns = rows.encode(examples.trial(figures={"error": math.nan, "ms": 1.0}))
    assert columns["figures"] == '{"error":null,"ms":1.0}'
    figures = rows.decode(Trial, columns).figures
    assert isinstance(figures["error"], float)
    assert math.isnan(figures["error"])


TAMPERED = {
    "another parameter": {"params": '{"BLOCK_M":128,"num_warps":4}'},
    "another device": {"gpu_name": "NVIDIA B200"},
    "code for data": {"params": "__import__('os').abort()"},
    "pickle for data": {"params": b"\x80\x04."},
    "list for a map": {"params": "[]"},
    "nested map": {"params": '{"BLOCK_M":{"a":1}}'},
    "endless nesting": {"params": "[" * 100_000},
    "infinite field": {"fields": '{"seqlen_q":1e999}'},
    "null": {"gpu_name": None},
    "text for a number": {"level": "2"},
    "unknown level": {"level": 4},
    "neither true nor false": {"complete": 7},
    "unknown layout": {"layout": "diagonal"},
    "text for milliseconds": {"ms": "fast"},
}


@pytest.mark.parametrize("change", TAMPERED.values(), ids=TAMPERED)
def test_tampered_row_is_refused(change: dict[str, Any]) -> None:
    """A row whose contents are not what its hashes and models promise never leaves the package."""
    with pytest.raises(RowRefused):
        rows.decode(Winner, rows.encode(examples.winner()) | change)


def test_unknown_verdict_is_refused() -> None:
    """A verdict of a version yet to come is not taken for one of ours."""
    with pytest.raises(RowRefused, match="excellent"):
        rows.decode(Trial, rows.encode(examples.trial()) | {"verdict": "excellent"})


def _change(path: Path, statement: str, *values: object) -> None:
    connection = sqlite3.connect(path)
    connection.execute(statement, values)
    connection.commit()
    connection.close()


def test_refused_rows_are_skipped_counted_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Good rows are returned beside bad ones; one warning says how many and why; nothing is deleted."""
    store = examples.filled(tmp_path / "flashbias.db", rows=5)
    _change(store.path, "UPDATE flashbias_trials SET verdict = 'excellent' WHERE created_at < 1002")
    _change(store.path, "UPDATE flashbias_trials SET reason = CAST(x'ff' AS TEXT) WHERE created_at = 1004")
    _change(store.path, "UPDATE flashbias_winners SET params = '{}'")
    found = store.trials(examples.problem())
    assert [trial.config for trial in found] == [examples.config(block) for block in (2, 3, 4)]
    assert store.winners(examples.problem()) == {}
    assert [record.args[0] for record in caplog.records if isinstance(record.args, tuple)] == [2, 1]
    assert store.counts()["trials"] == 5
    assert store.counts()["winners"] == 1
    assert store.neighbours(examples.problem(fields={"seqlen_q": 64}), examples.SOFT) == []


@pytest.mark.parametrize(
    "damage", ["params = '{}'", "params = '[1]'", "kernel = 'backward_dq'", "created_at = 'abc'", "host = x'ff'"]
)
def test_edited_pin_is_skipped_with_a_warning_and_can_be_removed(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What is no whole pin pins nothing, leaves the others of its problem alone, and goes when its key is unpinned."""
    store = Store.open(tmp_path / "flashbias.db")
    other = examples.pin(16, kernel="backward_dkdv")
    for pin in (examples.pin(), other):
        store.put_pin(pin)
    _change(store.path, f"UPDATE flashbias_pins SET {damage} WHERE kernel = 'forward'")
    assert store.pins(examples.problem()) == {"backward_dkdv": other}
    assert "1 stored Pin row(s) ignored" in caplog.text
    assert store.remove_pin(examples.problem().key("forward"))
    assert store.counts()["pins"] == 1


def test_unusable_winner_does_not_block_its_key(tmp_path: Path) -> None:
    """A stored winner that is refused counts as none, so that a proven one can take its place."""
    store = examples.filled(tmp_path / "flashbias.db", rows=1)
    _change(store.path, "UPDATE flashbias_winners SET params = '{}'")
    assert store.put_winner(examples.winner(32)) == examples.winner(32)
    assert store.winners(examples.problem()) == {"forward": examples.winner(32)}


@pytest.mark.parametrize(
    "damage",
    [
        "expires_at = 'abc'",
        "acquired_at = 'abc'",
        "acquired_at = -1e999",
        "expires_at = 1e999",
        "owner = x'ff'",
        "host = x'ff'",
    ],
)
def test_unreadable_lease_counts_as_none(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    """A damaged lease keeps nobody out, is written over by the next claim, and costs no layer its file."""
    layers = open_layers(tmp_path)
    assert layers.claim("p" * 64, "other", "host", 60.0) is not None
    _change(tmp_path / "flashbias.db", f"UPDATE flashbias_leases SET {damage}")
    assert layers.holder("p" * 64) is None
    mine = layers.claim("p" * 64, "me", "host", 60.0)
    assert mine is not None
    assert layers.holder("p" * 64) == mine
    layers.add_trial(examples.trial())
    assert layers.location == str(tmp_path / "flashbias.db")
    assert Store.open(tmp_path / "flashbias.db").trials(examples.problem()) == [examples.trial()]
    assert all("kept in memory" not in message for message in caplog.messages)


def test_own_lease_that_was_damaged_is_mended_by_its_renewal(tmp_path: Path) -> None:
    """The living owner of an unreadable row makes it whole again."""
    store = Store.open(tmp_path / "flashbias.db")
    lease = store.claim("p" * 64, "me", "host", 60.0)
    assert lease is not None
    _change(store.path, "UPDATE flashbias_leases SET host = x'ff', acquired_at = 'abc', expires_at = 'abc'")
    renewed = store.renew(lease, 60.0)
    assert renewed is not None
    assert store.holder("p" * 64) == renewed


def test_row_that_is_refused_costs_no_layer_its_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A winner that a trigger spoils on its way in is kept in memory; all else goes on in the file."""
    layers = open_layers(tmp_path)
    spoil = "UPDATE flashbias_winners SET params = '{}' WHERE key_hash = NEW.key_hash"
    for event in ("INSERT", "UPDATE OF ms"):
        _change(
            tmp_path / "flashbias.db",
            f"CREATE TRIGGER spoil_{event[:6]} AFTER {event} ON flashbias_winners BEGIN {spoil}; END",
        )
    assert layers.put_winner(examples.winner()) == examples.winner()
    assert layers.winners(examples.problem()) == {"forward": examples.winner()}
    layers.add_trial(examples.trial())
    assert Store.open(tmp_path / "flashbias.db").trials(examples.problem()) == [examples.trial()]
    assert any("could not be read back; this result is kept in memory" in message for message in caplog.messages)


class StoreAgainstMemory(RuleBasedStateMachine):
    """A file and a set of dicts are told the same and must answer the same."""

    problems = st.builds(
        lambda length, dim: examples.problem(fields={"seqlen_q": length, "head_dim": dim}),
        st.sampled_from([128, 512, 4096]),
        st.sampled_from([32, 64]),
    )
    kernels = st.sampled_from(["forward", "backward_dq"])
    blocks = st.sampled_from([16, 32])

    @initialize()
    def open_both(self) -> None:
        """Begins with nothing on either side."""
        self.folder = TemporaryDirectory()
        self.memory = Memory()
        self.store = Store.open(Path(self.folder.name) / "flashbias.db")

    def teardown(self) -> None:
        """Removes the file."""
        if hasattr(self, "folder"):
            self.folder.cleanup()

    @rule()
    def reopen(self) -> None:
        """What is stored does not depend on who opened the file."""
        self.store = Store.open(self.store.path)

    @rule(at=problems, kernel=kernels, block=blocks, verdict=st.sampled_from(Verdict), seed=st.integers(0, 3))
    def add_trial(self, at: Problem, kernel: str, block: int, verdict: Verdict, seed: int) -> None:
        """Stores the same trial on both sides."""
        trial = examples.trial(block, verdict, at, kernel=kernel, seed=seed)
        self.store.add_trial(trial)
        self.memory.add_trial(trial)

    @rule(at=problems, kernel=kernels, block=blocks, replace=st.booleans())
    def put_winner(self, at: Problem, kernel: str, block: int, replace: bool) -> None:
        """Both sides answer with the same winner."""
        winner = examples.winner(block, at, kernel=kernel)
        assert self.store.put_winner(winner, replace=replace) == self.memory.put_winner(winner, replace=replace)

    @rule(at=problems, block=blocks)
    def add_verification(self, at: Problem, block: int) -> None:
        """Stores the same proof on both sides."""
        proof = examples.verification(block, problem=at)
        self.store.add_verification(proof)
        self.memory.add_verification(proof)

    @rule(at=problems, kernel=kernels, block=blocks, kept=st.booleans())
    def pin(self, at: Problem, kernel: str, block: int, kept: bool) -> None:
        """Both sides pin alike, and say alike whether there was a pin to remove."""
        pin = examples.pin(block, at, kernel=kernel)
        if kept:
            self.store.put_pin(pin)
            self.memory.put_pin(pin)
        else:
            assert self.store.remove_pin(at.key(kernel)) == self.memory.remove_pin(at.key(kernel))

    @rule(owner=st.sampled_from(["me", "you"]), seconds=st.sampled_from([-1.0, 60.0]), end=st.booleans())
    def lease(self, owner: str, seconds: float, end: bool) -> None:
        """Both sides grant and refuse alike."""
        taken = [side.claim("p" * 64, owner, "host", seconds) for side in (self.store, self.memory)]
        assert (taken[0] is None) == (taken[1] is None)
        for side, lease in zip((self.store, self.memory), taken, strict=True):
            if lease is not None and end:
                side.release(lease)

    @rule(at=problems)
    def look_around(self, at: Problem) -> None:
        """Every question has the same answer."""
        assert self.store.winners(at) == self.memory.winners(at)
        assert self.store.neighbours(at, examples.SOFT) == self.memory.neighbours(at, examples.SOFT)
        assert self.store.nearest(at) == self.memory.nearest(at)
        assert self.store.trials(at) == self.memory.trials(at)
        assert self.store.pins(at) == self.memory.pins(at)
        assert self.store.verifications(at) == self.memory.verifications(at)

    @invariant()
    def counts_agree(self) -> None:
        """At all times both hold as many rows of each kind."""
        if hasattr(self, "store"):
            assert self.store.counts() == self.memory.counts()


TestStoreAgainstMemory = StoreAgainstMemory.TestCase
TestStoreAgainstMemory.settings = settings(
    max_examples=15, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
