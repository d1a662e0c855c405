"""autotune.resolve: what each mode and each stored row leads to, with real kernels, children and database files."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import autotune
from autotune import CacheMiss, Choice, Mode, Resolution, Settings, confirm, resolve
from autotune.device import describe
from autotune.messages import remedy
from cache_db import Layers, open_layers
from cache_db.models import Environment, Problem, Verdict, Winner
from tests.autotune.planted_spec import planted_problem
from tests.autotune.softmax_spec import softmax_config

DEVICE = describe(-1)


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    """Makes each test start like a new process."""
    autotune.forget()
    yield
    autotune.forget()


@pytest.fixture(scope="module")
def tuned_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database in which ``planted_problem()`` has been tuned, once for all tests that start from one."""
    folder = tmp_path_factory.mktemp("tuned")
    assert resolve(planted_problem(), DEVICE, Settings(cache_dir=folder)).swept
    return folder / "flashbias.db"


@pytest.fixture
def tuned(tmp_path: Path, tuned_file: Path) -> Settings:
    """The settings of a folder in which ``planted_problem()`` has been tuned."""
    shutil.copy(tuned_file, tmp_path)
    return Settings(cache_dir=tmp_path)


def database(tmp_path: Path) -> Layers:
    """Opens the folder's database as another process would."""
    return open_layers(tmp_path)


def blocks(found: Resolution) -> dict[str, object]:
    """Returns the block size chosen for each kernel."""
    return {kernel: choice.config.params["block"] for kernel, choice in found.choices.items()}


def rungs(found: Resolution) -> set[str]:
    """Returns the ladder rungs in use."""
    return {choice.rung for choice in found.choices.values()}


def test_first_call_tunes_and_stores_a_winner_of_every_kernel(tmp_path: Path) -> None:
    """A miss in mode tune ends with proven winners that the database holds, the backward judged through the forward."""
    found = resolve(planted_problem("32 64"), DEVICE, Settings(cache_dir=tmp_path))
    winners = database(tmp_path).winners(planted_problem("32 64"))
    assert found.swept
    assert rungs(found) == {"winner"}
    assert found.location == str(tmp_path / "flashbias.db")
    assert {kernel: row.config for kernel, row in winners.items()} == {
        kernel: choice.config for kernel, choice in found.choices.items()
    }
    assert all(row.level >= 2 and row.complete for row in winners.values())
    assert winners["backward"].proven_with == {"forward": winners["forward"].config.hash}
    assert database(tmp_path).holder(planted_problem("32 64").hash) is None


def test_hit_writes_nothing(tuned: Settings, tmp_path: Path) -> None:
    """A stored winner is used without a sweep, and the file stays the same to the byte."""
    before = (tmp_path / "flashbias.db").read_bytes()
    found = resolve(planted_problem(), DEVICE, tuned)
    assert rungs(found) == {"winner"}
    assert not found.swept
    assert (tmp_path / "flashbias.db").read_bytes() == before


def test_a_process_decides_a_problem_once(tuned: Settings, tmp_path: Path) -> None:
    """The second call gets the very same answer, even with the database gone."""
    first = resolve(planted_problem(), DEVICE, tuned)
    (tmp_path / "flashbias.db").unlink()
    assert resolve(planted_problem(), DEVICE, replace(tuned, budget_seconds=1)) == first


def test_sixteen_threads_sweep_once(tmp_path: Path) -> None:
    """Threads that meet a problem together share one sweep and one answer, even where each alone would sweep."""
    found: list[Resolution] = []
    settings = Settings(mode=Mode.RETUNE, cache_dir=tmp_path)
    threads = [
        threading.Thread(target=lambda: found.append(resolve(planted_problem(), DEVICE, settings))) for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(each.swept for each in found) == 1
    assert len({tuple(sorted(blocks(each).items())) for each in found}) == 1
    assert len(found) == 16


def test_mode_read_takes_the_default_after_a_quick_proof(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without any winner the default runs, proven at level 1, with one warning that names rung and cure."""
    settings = Settings(mode=Mode.READ, cache_dir=tmp_path, remedy="turn the handle")
    found = resolve(planted_problem(), DEVICE, settings)
    assert blocks(found) == {"forward": 256, "backward": 256}
    assert rungs(found) == {"default"}
    assert {choice.level for choice in found.choices.values()} == {1}
    assert not found.swept
    counts = database(tmp_path).counts()
    assert (counts["trials"], counts["winners"]) == (0, 0)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "default" in warnings[0]
    assert warnings[0].endswith('To change that: turn the handle, or use mode "tune"')


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (Mode.TUNE, "turn the handle"),
        (Mode.RETUNE, "turn the handle"),
        (Mode.READ, 'turn the handle, or use mode "tune"'),
        (Mode.OFF, 'turn the handle, and use mode "tune" or "read": mode "off" reads no database'),
    ],
)
def test_remedy_for_a_lower_rung_is_one_in_the_mode_at_hand(mode: Mode, expected: str) -> None:
    """No mode is told to do what it does already."""
    assert remedy(Settings(mode=mode, cure="set mode read", remedy="turn the handle")) == expected


def test_quick_proofs_are_shared_by_processes(tmp_path: Path) -> None:
    """A second process in mode read takes the first one's quick proofs from the database and adds none."""
    settings = Settings(mode=Mode.READ, cache_dir=tmp_path)
    resolve(planted_problem(), DEVICE, settings)
    proofs = database(tmp_path).counts()["verifications"]
    autotune.forget()
    resolve(planted_problem(), DEVICE, settings)
    assert proofs == 2
    assert database(tmp_path).counts()["verifications"] == proofs


def test_neighbour_comes_before_the_default(tuned: Settings) -> None:
    """A problem that differs only in sizes runs with its neighbour's winner, proven on this problem first."""
    found = resolve(planted_problem(columns=21), DEVICE, replace(tuned, mode=Mode.READ))
    assert blocks(found) == {"forward": 32, "backward": 32}
    assert rungs(found) == {"neighbour"}


def test_neighbour_that_may_not_run_here_is_passed_over(tuned: Settings) -> None:
    """A neighbour's config that the rules refuse for this problem is never tried."""
    found = resolve(planted_problem(columns=50), DEVICE, replace(tuned, mode=Mode.READ))
    assert rungs(found) == {"default"}


def test_default_that_fails_its_proof_never_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """When the ladder's last Triton rung is wrong too, the caller gets nothing to run and the reason."""
    found = resolve(planted_problem(default="256:zeroed_row"), DEVICE, Settings(mode=Mode.READ, cache_dir=tmp_path))
    assert found.choices == {}
    assert "wrong" in found.reason
    assert "without a tuned kernel" in caplog.text


def test_proof_that_crashed_once_gets_a_second_chance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash that does not repeat in a fresh child does not cost the default its rung."""
    monkeypatch.setenv("SOFTMAX_MARKER", str(tmp_path / "crashed"))
    problem = planted_problem(default="256:crashes_once")
    found = resolve(problem, DEVICE, Settings(mode=Mode.READ, cache_dir=tmp_path))
    assert rungs(found) == {"default"}
    assert (tmp_path / "crashed").exists()


def test_mode_assert_explains_a_miss_field_by_field(tuned: Settings) -> None:
    """The error of a miss names what differs from the nearest stored problem, and nothing that does not."""
    with pytest.raises(CacheMiss) as caught:
        resolve(planted_problem(columns=50), DEVICE, replace(tuned, mode=Mode.ASSERT))
    assert "columns is 19 there, 50 wanted" in str(caught.value)
    assert "dtype is" not in str(caught.value)


def test_mode_assert_runs_a_stored_winner(tuned: Settings) -> None:
    """A hit is a hit in mode assert."""
    assert rungs(resolve(planted_problem(), DEVICE, replace(tuned, mode=Mode.ASSERT))) == {"winner"}


def test_mode_off_touches_no_file(tuned: Settings, tmp_path: Path) -> None:
    """Mode off neither reads nor makes a database."""
    folder = tmp_path / "never"
    found = resolve(planted_problem(), DEVICE, Settings(mode=Mode.OFF, cache_dir=folder))
    assert (found.location, rungs(found)) == ("memory", {"default"})
    assert not folder.exists()
    assert rungs(resolve(planted_problem(), DEVICE, replace(tuned, mode=Mode.OFF))) == {"default"}


def test_mode_retune_replaces_the_winner(tuned: Settings, tmp_path: Path) -> None:
    """Retuning sweeps although a winner is stored, and stores the new one."""
    before = database(tmp_path).winners(planted_problem())
    found = resolve(planted_problem(), DEVICE, replace(tuned, mode=Mode.RETUNE))
    after = database(tmp_path).winners(planted_problem())
    assert found.swept
    assert all(after[kernel].created_at > before[kernel].created_at for kernel in before)


def test_mode_retune_keeps_the_quarantine(tmp_path: Path) -> None:
    """A config found wrong once is not run again by a retune, the good ones are."""
    problem = planted_problem("32 64:zeroed_row")
    resolve(problem, DEVICE, Settings(cache_dir=tmp_path))
    before = {trial.config: trial.created_at for trial in database(tmp_path).trials(problem, "forward")}
    resolve(problem, DEVICE, Settings(mode=Mode.RETUNE, cache_dir=tmp_path))
    after = {trial.config: trial.created_at for trial in database(tmp_path).trials(problem, "forward")}
    wrong, good = softmax_config(64, "zeroed_row"), softmax_config(32)
    assert after[wrong] == before[wrong]
    assert after[good] > before[good]


def test_new_driver_has_the_winner_proven_again_once(tuned: Settings, tmp_path: Path) -> None:
    """On another driver the winner is used after a new proof, which the next process takes from the database."""
    other = replace(DEVICE, environment=Environment(driver="999.1", ptxas="", torch=DEVICE.environment.torch))
    found = resolve(planted_problem(), other, tuned)
    proofs = database(tmp_path).verifications(planted_problem())
    assert rungs(found) == {"winner"}
    assert not found.swept
    assert [(row.kernel, row.verdict, row.level) for row in proofs] == [
        ("forward", Verdict.SAFE, 2),
        ("backward", Verdict.SAFE, 2),
    ]
    autotune.forget()
    assert rungs(resolve(planted_problem(), other, tuned)) == {"winner"}
    assert len(database(tmp_path).verifications(planted_problem())) == 2


ELSEWHERE = Environment(driver="elsewhere", ptxas="", torch="")


def store_foreign_winner(
    folder: Path, problem: Problem, fault: str, level: int = 2, environment: Environment = ELSEWHERE
) -> None:
    """Stores winners as if another machine had found them, ``fault`` planted in the forward."""
    for kernel in ("forward", "backward"):
        config = softmax_config(32, fault if kernel == "forward" else "")
        through = {} if kernel == "forward" else {"forward": softmax_config(32, fault).hash}
        winner = Winner(
            problem=problem,
            kernel=kernel,
            config=config,
            level=level,
            ms=0.1,
            tried=1,
            total=1,
            complete=True,
            proven_with=through,
            binary="",
            environment=environment,
            created_at=time.time(),
        )
        database(folder).put_winner(winner)


def test_stored_winner_that_fails_here_is_swept_over(tmp_path: Path) -> None:
    """A stored winner that is wrong in this environment is refused, recorded, and replaced by a sweep."""
    problem = planted_problem("64")
    store_foreign_winner(tmp_path, problem, "zeroed_row")
    found = resolve(problem, DEVICE, Settings(cache_dir=tmp_path))
    assert found.swept
    assert blocks(found) == {"forward": 64, "backward": 32}
    assert database(tmp_path).winners(problem)["forward"].config == softmax_config(64)
    assert Verdict.WRONG in {row.verdict for row in database(tmp_path).verifications(problem, "forward")}


def test_winner_without_a_full_proof_is_proven_before_use(tmp_path: Path) -> None:
    """A row of level 0 (imported, seeded) is only a hint."""
    store_foreign_winner(tmp_path, planted_problem(), "", level=0, environment=DEVICE.environment)
    found = resolve(planted_problem(), DEVICE, Settings(mode=Mode.ASSERT, cache_dir=tmp_path))
    assert {choice.level for choice in found.choices.values()} == {2}


def test_winner_that_the_rules_refuse_now_is_a_miss(tmp_path: Path) -> None:
    """A row that no longer satisfies the candidate rules is never used."""
    problem = planted_problem("64", columns=40)
    store_foreign_winner(tmp_path, problem, "")
    with pytest.raises(CacheMiss, match="block 32 does not hold a row of 40"):
        resolve(problem, DEVICE, Settings(mode=Mode.ASSERT, cache_dir=tmp_path))


def test_winner_of_another_implementation_is_left_stored_but_not_used(tuned: Settings, tmp_path: Path) -> None:
    """A restriction to other implementations neither uses nor replaces what is stored."""
    before = database(tmp_path).winners(planted_problem())
    found = resolve(planted_problem(), DEVICE, replace(tuned, implementations=("cute",)))
    assert found.choices == {}
    assert database(tmp_path).winners(planted_problem()) == before


def test_launch_of_the_proven_binary_needs_no_further_proof(tuned: Settings, tmp_path: Path) -> None:
    """The same machine code as proven is confirmed without a child or a row."""
    choice = resolve(planted_problem(), DEVICE, tuned).choices["forward"]
    before = database(tmp_path).counts()
    assert confirm(planted_problem(), DEVICE, tuned, "forward", choice, choice.binary)
    assert database(tmp_path).counts() == before


def test_launch_of_other_machine_code_than_the_child_proves_is_refused(
    tuned: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A binary that no proof covers may not run, even when the config passes as the child compiles it."""
    choice = resolve(planted_problem(), DEVICE, tuned).choices["backward"]
    assert not confirm(planted_problem(), DEVICE, tuned, "backward", choice, "ab" * 32)
    assert "not used" in caplog.text
    assert [row.kernel for row in database(tmp_path).verifications(planted_problem())] == ["backward"]


def test_launch_of_a_wrong_config_is_refused(tuned: Settings, caplog: pytest.LogCaptureFixture) -> None:
    """A config that fails when proven again is not confirmed."""
    wrong = Choice(softmax_config(64, "zeroed_row"), "winner", 2, "cd" * 32)
    assert not confirm(planted_problem(), DEVICE, tuned, "forward", wrong, "")
    assert "wrong" in caplog.text


def test_folder_that_cannot_be_used_costs_a_warning_not_a_call(tmp_path: Path) -> None:
    """With a database that cannot be opened the problem is tuned into memory."""
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    found = resolve(planted_problem(), DEVICE, Settings(cache_dir=blocked))
    assert (found.location, rungs(found), found.swept) == ("memory", {"winner"}, True)


def test_a_winner_that_was_found_racy_later_is_never_used_again(tmp_path: Path) -> None:
    """A final failure outweighs the winner row: the problem is tuned again and another config wins."""
    problem = planted_problem("32 64")
    first = resolve(problem, DEVICE, Settings(cache_dir=tmp_path)).choices["forward"]
    store = open_layers(tmp_path)
    trial = next(row for row in store.trials(problem, "forward") if row.config == first.config)
    store.add_trial(trial.model_copy(update={"verdict": Verdict.RACY, "level": 0, "reason": "planted"}))
    autotune.forget()
    again = resolve(problem, DEVICE, Settings(cache_dir=tmp_path)).choices["forward"]
    assert again.rung == "winner"
    assert again.config != first.config


def test_threads_with_different_settings_share_one_sweep_and_none_takes_the_ladder(tmp_path: Path) -> None:
    """Two threads of one process that decide apart do not take each other's lease for another process's."""
    problem = planted_problem("32 64")
    found: list[autotune.Resolution] = []
    chosen = [Settings(cache_dir=tmp_path), Settings(cache_dir=tmp_path, implementations=("triton",))]
    threads = [
        threading.Thread(target=lambda each=each: found.append(resolve(problem, DEVICE, each))) for each in chosen
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [resolution.choices["forward"].rung for resolution in found] == ["winner", "winner"]
    assert sorted(resolution.swept for resolution in found) == [False, True]
