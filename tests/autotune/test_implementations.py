"""Several implementations of one problem: the fastest safe one runs, and where it may not, the next."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import autotune
from autotune import Mode, Settings, resolve, timing
from autotune.candidate import Candidate, cost, hosts, ranked
from autotune.device import describe
from autotune.errors import AutotuneError
from autotune.reproof import reprove, rerun
from autotune.scene import open_scene
from autotune.soak import soak
from autotune.standing import faster
from cache_db import open_layers
from cache_db.models import Config, Pin, Problem, Verdict
from tests.autotune.guest_spec import guest, guest_problem, own

DEVICE = describe(-1)
ALL = ("own", "guest")
QUICK, SLOW = "guest 1 0", "guest 60 0"
PROBLEM = guest_problem(QUICK, QUICK)


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    """Makes each test start like a new process."""
    autotune.forget()
    yield
    autotune.forget()


@pytest.fixture(scope="module", autouse=True)
def version_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Says where the guest's version is to be found, to this process and its children."""
    path = tmp_path_factory.mktemp("guest") / "version"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GUEST_VERSION", str(path))
        path.write_text("1", encoding="utf-8")
        yield path


@pytest.fixture(autouse=True)
def version(version_file: Path) -> Path:
    """Installs version 1 of the guest; the file says which is there."""
    version_file.write_text("1", encoding="utf-8")
    return version_file


@pytest.fixture(scope="module")
def tuned_file(tmp_path_factory: pytest.TempPathFactory, version_file: Path) -> Path:
    """A database in which ``PROBLEM`` has been tuned, for its guests to win."""
    folder = tmp_path_factory.mktemp("tuned")
    assert set(chosen(folder, PROBLEM)) == {"first", "both"}
    return folder / "flashbias.db"


@pytest.fixture
def tuned(tmp_path: Path, tuned_file: Path) -> Path:
    """A folder with a copy of that database."""
    shutil.copy(tuned_file, tmp_path)
    return tmp_path


def chosen(folder: Path, problem: Problem, names: tuple[str, ...] = ALL, mode: Mode = Mode.TUNE) -> dict[str, Config]:
    """Returns the config of each kernel as a fresh process decides it."""
    autotune.forget()
    found = resolve(problem, DEVICE, Settings(mode=mode, cache_dir=folder, implementations=names))
    return {kernel: choice.config for kernel, choice in found.choices.items()}


def test_the_fastest_safe_implementation_wins(tmp_path: Path) -> None:
    """A guest that is faster runs; one that is faster still and wrong gets its verdict."""
    problem = guest_problem(first="guest 1 0,guest 0 0.5")
    assert chosen(tmp_path, problem)["first"] == guest(1)
    verdicts = {row.config: row.verdict for row in open_layers(tmp_path).trials(problem, "first")}
    assert verdicts == {guest(1): Verdict.SAFE, guest(0, 0.5): Verdict.WRONG, own(20): Verdict.SAFE}


def test_in_the_interpreter_a_guest_is_tried_only_if_it_is_named(tmp_path: Path) -> None:
    """Without a setting the interpreter's candidates are our own, and all of them count."""
    problem = guest_problem(QUICK, QUICK)
    assert set(chosen(tmp_path, problem, ()).values()) == {own(20)}
    assert open_layers(tmp_path).winners(problem)["first"].complete


def test_a_guest_that_comes_later_is_tried_where_sweeps_are_finished(tmp_path: Path) -> None:
    """A complete sweep without it stands in calls; whoever finishes sweeps, as prewarming does, has it compete once."""
    chosen(tmp_path, PROBLEM, ())
    store = open_layers(tmp_path)
    assert all(row.complete for row in store.winners(PROBLEM).values())
    assert set(chosen(tmp_path, PROBLEM).values()) == {own(20)}
    counts = []
    for _ in range(2):
        autotune.forget()
        how = Settings(cache_dir=tmp_path, implementations=ALL, finish=True)
        resolve(PROBLEM, DEVICE, how)
        counts.append(store.counts()["trials"])
    tried = {row.config for kernel in ("first", "both") for row in store.trials(PROBLEM, kernel)}
    assert guest(1) in tried
    assert counts[0] == counts[1]


@pytest.mark.parametrize("other", ["2", ""])
def test_a_winner_of_another_version_is_passed_over_for_the_next_safe_row(
    tuned: Path, version: Path, other: str
) -> None:
    """With another version of it, or none, our own runs without a sweep; with the first again, the guest does."""
    before = open_layers(tuned).counts()
    version.write_text(other, encoding="utf-8")
    assert chosen(tuned, PROBLEM, mode=Mode.ASSERT) == dict.fromkeys(("first", "left", "right"), own(20))
    found = resolve(PROBLEM, DEVICE, Settings(mode=Mode.ASSERT, cache_dir=tuned, implementations=ALL))
    assert "first: passed over guest/plain" in found.reason
    assert f"here {other}" in found.reason
    version.write_text("1", encoding="utf-8")
    assert chosen(tuned, PROBLEM, mode=Mode.ASSERT) == dict.fromkeys(("first", "both"), guest(1))
    # Behind another forward the pair was proven again; nothing was swept.
    after = open_layers(tuned).counts()
    assert (after["trials"], after["winners"]) == (before["trials"], before["winners"])


def test_a_restriction_takes_the_next_safe_row_and_leaves_the_winner(tuned: Path) -> None:
    """Where the winner's implementation is not allowed nothing is swept again."""
    winners = open_layers(tuned).winners(PROBLEM)
    found = chosen(tuned, PROBLEM, ("own",), Mode.ASSERT)
    assert found == dict.fromkeys(("first", "left", "right"), own(20))
    assert open_layers(tuned).winners(PROBLEM) == winners


@pytest.mark.parametrize(
    ("both", "runs"),
    [("guest 30 0", {"both"}), (SLOW, {"left", "right"}), ("guest 0 0.5", {"left", "right"})],
)
def test_an_alternative_runs_where_it_is_faster_than_the_sum(tmp_path: Path, both: str, runs: set[str]) -> None:
    """One kernel for two runs if it takes less time than both together, and is right; a stored decision is the same."""
    problem = guest_problem(both)
    assert set(chosen(tmp_path, problem)) == {"first"} | runs
    assert set(chosen(tmp_path, problem, mode=Mode.ASSERT)) == {"first"} | runs


def test_an_alternative_alone_will_do(tmp_path: Path) -> None:
    """Where the two kernels have no candidate that passes, the one that stands for them is enough."""
    problem = guest_problem(QUICK, QUICK, pair="own 0 0.5")
    assert chosen(tmp_path, problem) == {"first": guest(1), "both": guest(1)}


def test_without_any_of_them_there_is_nothing(tmp_path: Path) -> None:
    """Where neither passes, the sweep says which kernel has no candidate."""
    problem = guest_problem("guest 0 0.5", QUICK, pair="own 0 0.5")
    found = resolve(problem, DEVICE, Settings(cache_dir=tmp_path, implementations=ALL))
    assert "no candidate of left passed" in found.reason


def test_a_pinned_kernel_runs_instead_of_an_alternative_to_it(tuned: Path) -> None:
    """Whoever pins one of the two wants it to run; a pin of the alternative outweighs that."""
    store = open_layers(tuned)
    store.put_pin(Pin(problem=PROBLEM, kernel="left", config=own(20), pinned_by="me", host="here", created_at=1.0))
    assert set(chosen(tuned, PROBLEM)) == {"first", "left", "right"}
    store.put_pin(Pin(problem=PROBLEM, kernel="both", config=guest(1), pinned_by="me", host="here", created_at=1.0))
    autotune.forget()
    found = resolve(PROBLEM, DEVICE, Settings(cache_dir=tuned, implementations=ALL))
    assert found.choices["both"].rung == "pinned"
    assert set(found.choices) == {"first", "both"}


def test_an_alternative_is_proven_again_and_soaked_like_any_winner(tuned: Path) -> None:
    """Its row is one of the winners that a re-proof and a soak go through."""
    settings, store = Settings(cache_dir=tuned, implementations=ALL), open_layers(tuned)
    rows = store.winners(PROBLEM)
    found = {each.winner.kernel: each.safe for each in reprove(PROBLEM, rows, DEVICE, settings, store)}
    assert found == dict.fromkeys(("first", "left", "right", "both"), True)
    soaked = soak(PROBLEM, DEVICE, settings, store, 4)
    assert [(each.kernel, each.passed) for each in soaked] == [("first", True), ("both", True)]
    assert store.winners(PROBLEM)["both"].level == 3


def test_a_trial_of_another_version_is_not_repeated(tuned: Path, version: Path) -> None:
    """What is here is another: to verify its row would put that one's verdict on record."""
    settings, store = Settings(cache_dir=tuned, implementations=ALL), open_layers(tuned)
    (trial,) = (row for row in store.trials(PROBLEM, "first") if row.config == guest(1))
    version.write_text("2", encoding="utf-8")
    before = store.counts()
    with pytest.raises(AutotuneError, match="cannot be repeated here: it is of version"):
        rerun(trial, {}, DEVICE, settings, store, trial.seed)
    assert store.counts() == before


def test_host_time_is_that_of_queueing_and_not_of_waiting() -> None:
    """A device that takes long adds nothing, and is not asked seven times."""
    waits: list[float] = []

    def wait() -> None:
        waits.append(0.0)
        time.sleep(2 * timing.BUSY_SECONDS)

    assert timing.host_ms(lambda: time.sleep(1e-3), wait) < 1e3 * timing.BUSY_SECONDS
    assert len(waits) == 1
    assert timing.host_ms(lambda: time.sleep(1e-3), lambda: waits.append(0.0)) >= 1.0
    assert len(waits) == 1 + timing.HOST_LAUNCHES


def timed(config: Config, ms: float, paired: float, host: float | None = None) -> Candidate:
    """Returns a candidate with these times."""
    return Candidate(config, figures={"ms": ms, "paired": paired} | ({} if host is None else {"host_ms": host}))


def test_the_host_decides_between_implementations_where_it_is_slower() -> None:
    """A guest whose device time is longer wins if it is queued sooner than ours."""
    ours, other = timed(own(0), 0.010, 1.0, 0.060), timed(guest(0), 0.020, 2.0, 0.030)
    assert ranked([ours, other]) == [other, ours]
    assert cost(other, hosts([ours, other])) == 0.030
    long, longer = timed(own(0), 1.0, 1.0, 0.060), timed(guest(0), 1.2, 1.2, 0.030)
    assert ranked([longer, long]) == [long, longer]


def test_the_host_never_decides_within_an_implementation() -> None:
    """Its noise is no reason to prefer one config: among those of one implementation the device's time counts."""
    quick, slow = timed(own(1), 0.010, 1.0, 0.070), timed(own(2), 0.011, 1.1, 0.050)
    assert ranked([slow, quick]) == [quick, slow]
    assert hosts([quick, slow]) == {}
    other = timed(guest(0), 0.005, 0.5, 0.090)
    assert ranked([slow, other, quick]) == [quick, slow, other]
    assert hosts([quick, slow, other]) == {"own": 0.050, "guest": 0.090}


def test_unknown_host_times_change_nothing() -> None:
    """Rows from before, which tell none, are compared by the device's time alone."""
    ours, other = timed(own(0), 0.010, 1.0), timed(guest(0), 0.020, 2.0, 0.001)
    assert ranked([other, ours]) == [ours, other]
    assert hosts([ours, other]) == {}


def test_an_alternative_that_takes_the_host_longer_loses(tuned: Path) -> None:
    """Stored host times count in the comparison with the sum."""
    store = open_layers(tuned)
    winners = store.winners(PROBLEM)
    pair = [winners["left"], winners["right"]]
    with open_scene(PROBLEM, DEVICE, Settings(cache_dir=tuned, implementations=ALL), store) as scene:
        assert faster(scene, winners["both"], pair)
        (trial,) = store.trials(PROBLEM, "both")
        store.add_trial(trial.model_copy(update={"figures": {**trial.figures, "host_ms": 500.0}}))
        assert not faster(scene, winners["both"], pair)
