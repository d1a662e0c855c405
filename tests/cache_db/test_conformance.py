"""The promises of a store, kept by each of them: SQLite, PostgreSQL, memory, and the layers over any of them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import store_examples as examples

from cache_db import Layers, open_layers
from cache_db.address import Address
from cache_db.memory import Memory
from cache_db.models import FINAL, Verdict
from cache_db.rules import LONGEST_LEASE
from cache_db.store import Store

Storage = Store | Memory | Layers

MAKERS: dict[str, Callable[[Path], Storage]] = {
    "sqlite": lambda path: Store.open(path / "flashbias.db"),
    "memory": lambda _: Memory(),
    "layers": open_layers,
    "layers-without-file": lambda _: open_layers(None),
}
SERVED: dict[str, Callable[[Path, Address], Storage]] = {
    "postgresql": lambda _, address: Store.connect(address),
    "layers-with-server": lambda path, address: open_layers(path, address, 30.0),
    "layers-with-server-without-file": lambda _, address: open_layers(None, address, 30.0),
}


@pytest.fixture(params=[*MAKERS, *SERVED])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param in MAKERS:
        return MAKERS[request.param](tmp_path / "cache")
    return SERVED[request.param](tmp_path / "cache", request.getfixturevalue("database"))


def _set_clocks(monkeypatch: pytest.MonkeyPatch, now: float) -> None:
    """Sets this host's clock and the server's."""
    monkeypatch.setattr("time.time", lambda: now)
    monkeypatch.setattr("cache_db.engines.Server.now", lambda *_: now)


class TestStorage:
    """What every store promises."""

    def test_trial_comes_back_equal(self, storage: Storage) -> None:
        """What is read is what was stored, figures and all."""
        stored = examples.trial(
            figures={"ms": 0.1, "registers": 255, "ragged": True, "worst": "dq", "error": float("inf")}
        )
        storage.add_trial(stored)
        assert storage.trials(stored.problem) == [stored]

    def test_trials_belong_to_their_problem_and_kernel(self, storage: Storage) -> None:
        """Neither another problem's nor another kernel's trials are returned; all kernels' are by default."""
        forward, backward = examples.trial(16), examples.trial(32, kernel="backward_dq")
        elsewhere = examples.trial(64, at=examples.problem(layout="strided"))
        for trial in (backward, forward, elsewhere):
            storage.add_trial(trial)
        assert storage.trials(forward.problem) == [forward, backward]
        assert storage.trials(forward.problem, "backward_dq") == [backward]

    def test_final_verdict_is_never_replaced_by_another_kind(
        self, storage: Storage, request: pytest.FixtureRequest
    ) -> None:
        """Of every pair of verdicts the later stands, unless the earlier is final and the later is not."""
        served = request.node.callspec.params["storage"] in SERVED  # slower: a connection for each call
        some = (Verdict.SAFE, Verdict.WRONG, Verdict.CRASHED, Verdict.TIMEOUT)
        for earlier, later in itertools.product(some if served else Verdict, repeat=2):
            first, second = (
                examples.trial(verdict=verdict, kernel=f"{earlier}-{later}", seed=seed)
                for seed, verdict in enumerate((earlier, later))
            )
            storage.add_trial(first)
            storage.add_trial(second)
            expected = first if earlier in FINAL and later not in FINAL else second
            assert storage.trials(examples.problem(), first.kernel) == [expected]

    def test_first_winner_stays(self, storage: Storage) -> None:
        """A second winner of a key does not take the first one's place, and its finder is told."""
        first, second = examples.winner(16), examples.winner(32)
        assert storage.put_winner(first) == first
        assert storage.put_winner(second) == first
        assert storage.winners(first.problem) == {"forward": first}

    def test_replacing_a_winner_is_explicit(self, storage: Storage) -> None:
        """``replace=True`` puts the new winner in place, with no row in place as well."""
        first, second = examples.winner(16), examples.winner(32)
        assert storage.put_winner(first, replace=True) == first
        assert storage.put_winner(second, replace=True) == second
        assert storage.winners(first.problem) == {"forward": second}

    def test_winners_of_all_kernels_come_together(self, storage: Storage) -> None:
        """One look-up answers for the whole problem, and for no other."""
        forward, backward = examples.winner(16), examples.winner(32, kernel="backward_dq")
        storage.put_winner(forward)
        storage.put_winner(backward)
        assert storage.winners(forward.problem) == {"forward": forward, "backward_dq": backward}
        assert storage.winners(examples.problem(gpu_name="NVIDIA B200")) == {}

    def test_neighbours_differ_in_soft_fields_only_and_nearest_come_first(self, storage: Storage) -> None:
        """Sizes may differ, measured in octaves; the device, the source and every other field may not."""
        far = examples.problem(fields={"seqlen_q": 8192})
        near = examples.problem(fields={"seqlen_q": 512})
        both = examples.problem(fields={"seqlen_q": 2048, "seqlen_k": 2048})
        hard = [
            examples.problem(fields={"seqlen_q": 512, "head_dim": 128}),
            examples.problem(fields={"seqlen_q": 512}, gpu_name="NVIDIA H100"),
            examples.problem(fields={"seqlen_q": 512, "causal": 1}),
            examples.problem(),
        ]
        for other in [far, both, near, *hard]:
            storage.put_winner(examples.winner(at=other))
        storage.put_winner(examples.winner(at=near, kernel="backward_dq"))
        found = storage.neighbours(examples.problem(), examples.SOFT)
        assert [group["forward"].problem for group in found] == [near, both, far]
        assert set(found[0]) == {"forward", "backward_dq"}
        assert storage.neighbours(examples.problem(), examples.SOFT, limit=1) == found[:1]

    def test_nearest_problems_have_the_fewest_differences(self, storage: Storage) -> None:
        """Whatever differs counts once, columns and fields alike; the problem itself is not its own neighbour."""
        one = examples.problem(gpu_name="NVIDIA H100")
        two = examples.problem(fields={"dtype": "float16"}, triton_version="3.7.0")
        three = examples.problem(fields={"dtype": "float16", "head_dim": 32}, layout="strided")
        four = examples.problem(fields={"dtype": "float16", "head_dim": 32, "extra": 1}, layout="strided")
        for other in (four, two, examples.problem(), three, one):
            storage.put_winner(examples.winner(at=other))
        assert storage.nearest(examples.problem()) == [one, two, three]
        assert storage.nearest(examples.problem(), limit=1) == [one]

    def test_same_verification_twice_is_one(self, storage: Storage) -> None:
        """Storing a proof again changes nothing; another time is another proof; oldest first."""
        later, earlier = examples.verification(created_at=8.0), examples.verification(created_at=7.0)
        for proof in (later, earlier, later):
            storage.add_verification(proof)
        assert storage.verifications(later.problem) == [earlier, later]
        assert storage.verifications(later.problem, "backward_dq") == []

    def test_same_lift_twice_is_one(self, storage: Storage) -> None:
        """Storing a lift again changes nothing; another time is another lift; oldest first, of the kernel asked for."""
        later, earlier = examples.lift(created_at=8.0), examples.lift(created_at=7.0)
        for lift in (later, earlier, later):
            storage.add_lift(lift)
        assert storage.lifts(later.problem) == [earlier, later]
        assert storage.lifts(later.problem, "backward_dq") == []
        assert storage.lifts(examples.problem(layout="strided")) == []

    def test_pin_takes_the_place_of_its_keys_earlier_one(self, storage: Storage) -> None:
        """A key has one pin, the latest; another kernel's and another problem's are others."""
        first, second, backward = examples.pin(16), examples.pin(32), examples.pin(16, kernel="backward_dq")
        elsewhere = examples.pin(64, at=examples.problem(layout="strided"))
        for pin in (first, backward, second, elsewhere):
            storage.put_pin(pin)
        assert storage.pins(first.problem) == {"forward": second, "backward_dq": backward}
        assert storage.pins(elsewhere.problem) == {"forward": elsewhere}
        assert storage.counts()["pins"] == 3

    def test_removed_pin_is_gone_and_nothing_else_is(self, storage: Storage) -> None:
        """Removing says whether there was one; winners, trials and other pins stay."""
        forward, backward = examples.pin(16), examples.pin(32, kernel="backward_dq")
        assert not storage.remove_pin(forward.problem.key("forward"))
        storage.put_winner(examples.winner(16))
        storage.add_trial(examples.trial(16))
        for pin in (forward, backward):
            storage.put_pin(pin)
        assert storage.remove_pin(forward.problem.key("forward"))
        assert not storage.remove_pin(forward.problem.key("forward"))
        assert storage.pins(forward.problem) == {"backward_dq": backward}
        counts = storage.counts()
        assert (counts["winners"], counts["trials"], counts["pins"]) == (1, 1, 1)

    def test_lease_keeps_others_out_until_released(self, storage: Storage) -> None:
        """One owner at a time; the owner may claim again; after release anyone may."""
        lease = storage.claim("p" * 64, "me", "host", 60.0)
        assert lease is not None
        assert storage.claim("p" * 64, "you", "host", 60.0) is None
        assert storage.claim("q" * 64, "you", "host", 60.0) is not None
        again = storage.claim("p" * 64, "me", "host", 60.0)
        assert again is not None
        assert storage.holder("p" * 64) == again
        storage.release(again)
        assert storage.holder("p" * 64) is None
        assert storage.claim("p" * 64, "you", "host", 60.0) is not None

    def test_lease_expires(self, storage: Storage) -> None:
        """An owner that stopped renewing holds nobody up, and learns that the lease is gone."""
        stale = storage.claim("p" * 64, "dead", "host", -1.0)
        assert stale is not None
        assert storage.holder("p" * 64) is None
        taken = storage.claim("p" * 64, "me", "host", 60.0)
        assert taken is not None
        assert storage.renew(stale, 60.0) is None
        storage.release(stale)
        assert storage.holder("p" * 64) == taken

    def test_renewed_lease_lives_on(self, storage: Storage) -> None:
        """Renewal moves the end, not the beginning; one that ran out but was taken by nobody is renewed too."""
        lease = storage.claim("p" * 64, "me", "host", -1.0)
        assert lease is not None
        renewed = storage.renew(lease, 60.0)
        assert renewed is not None
        assert renewed.acquired_at == lease.acquired_at
        assert renewed.expires_at > lease.expires_at + 60.0
        assert storage.claim("p" * 64, "you", "host", 60.0) is None

    def test_lease_from_the_future_is_void(self, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
        """A clock set back by a day leaves no problem locked for a day, and a living owner can mend its lease."""
        now = 1_800_000_000.0
        _set_clocks(monkeypatch, now + 86_400.0)
        dead, alive = (storage.claim(name * 64, "old", "host", 30.0) for name in "pq")
        _set_clocks(monkeypatch, now)
        assert dead is not None
        assert alive is not None
        assert storage.holder("p" * 64) is None
        assert storage.claim("p" * 64, "me", "host", 30.0) is not None
        assert storage.renew(alive, 30.0) is not None
        assert storage.claim("q" * 64, "me", "host", 30.0) is None

    def test_lease_that_ends_absurdly_late_is_void(self, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
        """No lease is granted for longer than the limit, and one that says otherwise binds nobody."""
        longest = storage.claim("p" * 64, "me", "host", 1e300)
        assert longest is not None
        assert longest.expires_at - longest.acquired_at == pytest.approx(LONGEST_LEASE)
        assert storage.holder("p" * 64) == longest
        renewed = storage.renew(longest, 1e300)
        assert renewed is not None
        assert renewed.expires_at < time.time() + LONGEST_LEASE + 1
        monkeypatch.setattr("cache_db.rules.LONGEST_LEASE", 1e301)
        endless = storage.claim("q" * 64, "dead", "host", 1e300)
        monkeypatch.undo()
        assert endless is not None
        assert endless.expires_at == 1e300
        assert storage.holder("q" * 64) is None
        assert storage.claim("q" * 64, "me", "host", 60.0) is not None

    def test_counts_every_table(self, storage: Storage) -> None:
        """Each kind of row is counted under its table's name."""
        empty = {"trials": 0, "verifications": 0, "lifts": 0, "pins": 0, "winners": 0, "leases": 0, "jobs": 0}
        assert storage.counts() == empty
        storage.add_trial(examples.trial(16))
        storage.add_trial(examples.trial(32))
        storage.add_verification(examples.verification())
        storage.add_lift(examples.lift())
        storage.put_pin(examples.pin())
        storage.put_winner(examples.winner())
        storage.claim("p" * 64, "me", "host", 60.0)
        counts = {"trials": 2, "verifications": 1, "lifts": 1, "pins": 1, "winners": 1, "leases": 1, "jobs": 0}
        assert storage.counts() == counts
