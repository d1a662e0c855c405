"""One rank's side of a job's agreement: what it takes over and what it refuses, turns, and which job it is in."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from torch.distributed import HashStore, PrefixStore, TCPStore

import autotune
from autotune import CacheMiss, DeviceInfo, Mode, Settings, kinship, rendezvous, resolve, tuner
from autotune.agreement import Agreed, _variant
from autotune.device import describe
from autotune.job import LONGEST_NAME, Job
from autotune.lease import LEASE_SECONDS, hostname
from autotune.proofs import Rung
from autotune.rendezvous import PREFIX, Rendezvous, Turn, Unreachable
from cache_db import open_layers
from cache_db.address import Address
from cache_db.models import Config, Environment, Problem, Verdict
from tests.autotune.planted_spec import planted_problem
from tests.autotune.softmax_spec import softmax_config
from tests.autotune.test_jobs import filled

DEVICE = describe(-1)
PROBLEM = planted_problem()


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes each test start like a new process."""
    monkeypatch.setattr(tuner._process, "epoch", 0)
    autotune.forget()
    rendezvous.forget()
    yield
    autotune.forget()
    rendezvous.forget()


@pytest.fixture
def store() -> TCPStore:
    """A Store as torchrun's agent keeps it."""
    return TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)


def settings(folder: Path, store: TCPStore, mode: Mode = Mode.TUNE) -> Settings:
    """Returns those of rank 1 of two."""
    return Settings(mode, folder, job=Job(size=2, rank=1, agent=("127.0.0.1", store.port)))


def say(
    store: TCPStore,
    chosen: Settings,
    blocks: list[int],
    *,
    kernels: tuple[str, ...] = ("forward", "backward"),
    rung: Rung = "winner",
    environment: Environment = DEVICE.environment,
    level: int = 2,
    epoch: int = 0,
) -> None:
    """Has rank 0 decide for configs of these ``blocks``."""
    parts = tuple(
        Agreed.Part(kernel=kernel, config=softmax_config(block), rung=rung, level=level, binary="")
        for kernel, block in zip(kernels, blocks, strict=True)
    )
    agreed = Agreed(parts=parts, reason="rank 0 said so", environment=environment, rank=0, host="elsewhere")
    store.set(f"{PREFIX}/0.{epoch}/{_variant(chosen)}/{PROBLEM.hash}", agreed.model_dump_json())


def configs(found: autotune.Resolution) -> dict[str, Config]:
    """Returns what is to run."""
    return {kernel: choice.config for kernel, choice in found.choices.items()}


@pytest.mark.parametrize("mode", [Mode.TUNE, Mode.READ, Mode.RETUNE, Mode.ASSERT])
def test_what_the_job_decided_counts_in_every_mode(tmp_path: Path, store: TCPStore, mode: Mode) -> None:
    """Rank 0's configs run here without a proof or a sweep, with an empty database too, where a miss would raise."""
    chosen = settings(tmp_path, store, mode)
    say(store, chosen, [32, 64])
    found = resolve(PROBLEM, DEVICE, chosen)
    assert configs(found) == {"forward": softmax_config(32), "backward": softmax_config(64)}
    assert (found.won, found.swept) == (True, False)
    assert open_layers(tmp_path).counts()["trials"] == 0


@pytest.mark.parametrize(
    ("blocks", "kernels", "expected"),
    [
        ([8, 32], ("forward", "backward"), "block 8 does not hold a row of 19"),
        ([32], ("forward",), "it names the kernels forward, and forward, backward are needed"),
        ([32, 32, 32], ("forward", "backward", "sideways"), "it names the kernels forward, backward, sideways"),
        ([32, 32], ("backward", "forward"), "backward needs 'forward', which comes later"),
    ],
)
def test_a_rank_that_cannot_run_the_agreement_says_so_once_and_runs_none_of_it(
    tmp_path: Path,
    store: TCPStore,
    caplog: pytest.LogCaptureFixture,
    blocks: list[int],
    kernels: tuple[str, ...],
    expected: str,
) -> None:
    """What this rank's rules refuse, or what is no whole decision, is one error that names both ranks and the cure."""
    chosen = settings(tmp_path, store)
    say(store, chosen, blocks, kernels=kernels)
    assert [resolve(PROBLEM, DEVICE, chosen).choices for _ in range(2)] == [{}, {}]
    (record,) = (record for record in caplog.records if record.levelname == "ERROR")
    for part in ("rank 1", "rank 0 on elsewhere", expected, "flashbias.refresh()"):
        assert part in record.getMessage()


def test_proofs_of_another_environment_do_not_hold_here(
    tmp_path: Path, store: TCPStore, caplog: pytest.LogCaptureFixture
) -> None:
    """What rank 0 proved under another driver runs by this rank's own proof, and not if that failed."""
    chosen = settings(filled(tmp_path, PROBLEM, None), store)
    say(store, chosen, [256, 256], environment=Environment(driver="another", ptxas="", torch=""), level=3)
    found = resolve(PROBLEM, DEVICE, chosen)
    assert {(choice.config, choice.level) for choice in found.choices.values()} == {(softmax_config(256), 2)}
    failed = (
        open_layers(tmp_path)
        .verifications(PROBLEM, "forward")[0]
        .model_copy(update={"verdict": Verdict.WRONG, "created_at": time.time() + 1})
    )
    open_layers(tmp_path).add_verification(failed)
    autotune.forget()
    assert resolve(PROBLEM, DEVICE, chosen).choices == {}
    assert "cannot run what its job has agreed on" in caplog.text


def test_agreement_that_cannot_be_read_counts_as_none_that_can_be_made(
    tmp_path: Path, store: TCPStore, caplog: pytest.LogCaptureFixture
) -> None:
    """Another version's words bind this rank to what is the same everywhere: the default, or in mode assert a miss.

    Neither its own winner nor a neighbour's is, though proofs of both are at hand.
    """
    filled(tmp_path, PROBLEM, 32)
    filled(tmp_path, planted_problem("64"), 64)
    filled(tmp_path, PROBLEM, None, default=64)
    chosen = settings(tmp_path, store)
    store.set(f"{PREFIX}/0.0/{_variant(chosen)}/{PROBLEM.hash}", '{"parts": "of another version"}')
    assert set(configs(resolve(PROBLEM, DEVICE, chosen)).values()) == {softmax_config(256)}
    assert "what the job has agreed on cannot be read" in caplog.text
    with pytest.raises(CacheMiss, match="the job cannot agree"):
        resolve(PROBLEM, DEVICE, settings(tmp_path, store, Mode.ASSERT))


@pytest.mark.parametrize("rung", ["default", None])
def test_what_is_no_winner_is_a_miss_in_mode_assert(tmp_path: Path, store: TCPStore, rung: Rung | None) -> None:
    """A rank that asserts does not run a rung of the ladder, or PyTorch, because another rank had nothing better."""
    chosen = settings(tmp_path, store, Mode.ASSERT)
    say(
        store,
        chosen,
        [256, 256] if rung else [],
        kernels=("forward", "backward") if rung else (),
        rung=rung or "winner",
    )
    with pytest.raises(CacheMiss, match="rank 0 said so"):
        resolve(PROBLEM, DEVICE, chosen)


def test_ranks_with_other_kernels_are_told(tmp_path: Path, store: TCPStore, caplog: pytest.LogCaptureFixture) -> None:
    """Another Triton makes other problems, on which nobody agrees: one error names both ranks, whatever the problem."""
    filled(tmp_path, PROBLEM, 32)
    resolve(PROBLEM, DEVICE, settings(tmp_path, store))
    assert "launch different kernels" not in caplog.text
    place = Rendezvous(lambda: PrefixStore(PREFIX, store), "the Store", store)
    other = Job(size=2, rank=7)
    for columns in (3, 5):
        problem = planted_problem(columns=columns).model_copy(update={"triton_version": "9.9"})
        kinship.compare(place, f"0.0/{_variant(settings(tmp_path, store))}", problem, other)
    (message,) = [each for each in caplog.messages if "launch different kernels" in each]
    assert message.startswith("rank 7")
    assert "Triton 9.9" in message
    assert f"rank 1 on {hostname()} has Triton {PROBLEM.triton_version}" in message


def test_refresh_counts_for_what_is_being_decided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that was deciding while another refreshed decides again, and does not bring back what was forgotten."""
    filled(tmp_path, PROBLEM, 32)
    decide = tuner._resolve
    epochs: list[int] = []

    def deciding(problem: Problem, device: DeviceInfo, chosen: Settings) -> autotune.Resolution:
        found = decide(problem, device, chosen)
        epochs.append(tuner._process.epoch)
        if len(epochs) == 1:
            filled(tmp_path, PROBLEM, 64)
            autotune.refresh()
        return found

    monkeypatch.setattr(tuner, "_resolve", deciding)
    for _ in range(2):
        assert configs(resolve(PROBLEM, DEVICE, Settings(cache_dir=tmp_path)))["forward"] == softmax_config(64)
    assert epochs == [0, 1]


def test_first_rank_publishes_what_it_runs(tmp_path: Path, store: TCPStore) -> None:
    """A stored winner is what the job hears of first, with all that a launch needs; refresh begins another agreement."""
    filled(tmp_path, PROBLEM, 32)
    chosen = settings(tmp_path, store)
    found = resolve(PROBLEM, DEVICE, chosen)
    stored = store.get(f"{PREFIX}/0.0/{_variant(chosen)}/{PROBLEM.hash}")
    agreed = Agreed.model_validate_json(str(stored, "utf-8"))
    assert {part.kernel: part.config for part in agreed.parts} == configs(found)
    assert [(part.rung, part.level) for part in agreed.parts] == [("winner", 2)] * 2
    assert (agreed.rank, agreed.environment) == (1, DEVICE.environment)
    autotune.refresh()
    say(store, chosen, [64, 64], epoch=1)
    assert set(configs(resolve(PROBLEM, DEVICE, chosen)).values()) == {softmax_config(64)}


def test_a_process_that_left_its_job_agrees_with_nobody(tmp_path: Path, store: TCPStore) -> None:
    """With ``alone`` the job's decision is neither asked for nor made."""
    filled(tmp_path, PROBLEM, 32)
    chosen = settings(tmp_path, store)
    say(store, chosen, [64, 64])
    own = Settings(cache_dir=tmp_path, job=chosen.job, alone=True)
    assert set(configs(resolve(PROBLEM, DEVICE, own)).values()) == {softmax_config(32)}


def test_restarted_workers_agree_anew(tmp_path: Path, store: TCPStore) -> None:
    """The agent's Store may outlast its workers; what they had agreed on does not bind those that it starts in their place."""
    chosen = settings(filled(tmp_path, PROBLEM, 32), store)
    say(store, chosen, [64, 64])
    assert chosen.job is not None
    restarted = replace(chosen, job=replace(chosen.job, attempt=1))
    assert set(configs(resolve(PROBLEM, DEVICE, restarted)).values()) == {softmax_config(32)}


def test_job_whose_server_is_away_runs_the_default(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The user's file does not decide in the server's place, although it has a winner."""
    pytest.importorskip("psycopg")
    away = Address.parse("postgresql://me@127.0.0.1:1/none")
    job = Job("mine", size=2, rank=1, one_host=True)
    chosen = Settings(cache_dir=filled(tmp_path, PROBLEM, 32), db_url=away, db_seconds=0.5, job=job)
    found = resolve(PROBLEM, DEVICE, chosen)
    assert set(configs(found).values()) == {softmax_config(256)}
    assert "the job cannot agree: the table of jobs in" in caplog.text


class TestTurn:
    """One rank at a time has the turn, and no dead one keeps it."""

    @pytest.fixture
    def turns(self) -> tuple[Turn, Turn]:
        """Those of two ranks."""
        shared = HashStore()
        first, second = (Rendezvous(lambda: shared, "a Store", object()) for _ in range(2))
        return first.turn("p"), second.turn("p")

    def test_the_second_waits_until_the_first_gives_back(self, turns: tuple[Turn, Turn]) -> None:
        """Given back it is free for anybody."""
        first, second = turns
        assert first.take(0.0)
        assert not second.take(0.0)
        first.release()
        assert second.take(0.1)
        second.release()

    def test_silence_for_as_long_as_a_lease_ends_it(
        self, turns: tuple[Turn, Turn], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A holder on another host that shows no beat is replaced; its own beat then finds that out and stops."""
        first, second = turns
        monkeypatch.setattr("autotune.lease.hostname", lambda: "another host")
        assert first.take(0.0)
        assert not second.take(1000.0)
        assert not second.take(1000.0 + LEASE_SECONDS - 1)
        assert second.take(1000.0 + LEASE_SECONDS)
        first.release()
        assert not first.take(2000.0)
        second.release()

    def test_beats_keep_it(self, turns: tuple[Turn, Turn], monkeypatch: pytest.MonkeyPatch) -> None:
        """A holder whose thread beats has it for as long as it likes."""
        first, second = turns
        monkeypatch.setattr("autotune.lease.LEASE_SECONDS", 0.3)
        assert first.take(time.monotonic())
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            assert not second.take(time.monotonic())
            time.sleep(0.02)
        first.release()


def test_a_store_that_failed_is_left_alone() -> None:
    """After one failure every question fails at once, until the process moves on."""
    asked = []

    def opened() -> object:
        asked.append(1)
        raise RuntimeError("no route to host\nand a stack of C++ frames")

    broken = Rendezvous(opened, "a Store", object())
    for _ in range(3):
        with pytest.raises(Unreachable, match=r"^a Store: no route to host$"):
            broken.read("p")
    assert asked == [1]


TORCHRUN = {
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "4",
    "RANK": "3",
    "MASTER_ADDR": "node-1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "mine",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}


@pytest.mark.parametrize(
    ("changes", "name", "expected"),
    [
        ({}, "", Job("run mine, port 29500", 4, 3, one_host=True, agent=("node-1", 29500))),
        ({"TORCHELASTIC_RUN_ID": "none"}, "", Job("", 4, 3, one_host=True, agent=("node-1", 29500))),
        ({"TORCHELASTIC_RESTART_COUNT": "2"}, "", Job("run mine, port 29500", 4, 3, True, ("node-1", 29500), 2)),
        (
            {"TORCHELASTIC_RESTART_COUNT": "2", "LOCAL_WORLD_SIZE": "2"},
            "",
            Job("run mine, port 29500", 4, 3, False, ("node-1", 29500)),
        ),
        ({"TORCHELASTIC_USE_AGENT_STORE": "False"}, "", Job("run mine, port 29500", 4, 3, True)),
        ({"WORLD_SIZE": "1"}, "", None),
        ({"WORLD_SIZE": "several"}, "", None),
        ({"WORLD_SIZE": ""}, "own", Job("own", 0, 3, True, ("node-1", 29500))),
    ],
)
def test_launchers_name_the_job(changes: dict[str, str], name: str, expected: Job | None) -> None:
    """Torchrun's run and, where all ranks read the same, its restart tell one job from another; the user's name counts more."""
    assert Job.of({**TORCHRUN, **changes}, name) == expected


def test_slurm_names_job_step_and_restart() -> None:
    """Two steps of an allocation are two jobs, and so is a requeued one; steps on one node share their files."""
    step = {"WORLD_SIZE": "8", "SLURM_CLUSTER_NAME": "big", "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0"}
    found = [
        Job.of(step | more)
        for more in ({}, {"SLURM_STEP_ID": "1"}, {"SLURM_RESTART_COUNT": "1"}, {"SLURM_STEP_NUM_NODES": "1"})
    ]
    names = ["slurm big 77.0.0", "slurm big 77.1.0", "slurm big 77.0.1", "slurm big 77.0.0"]
    assert [each.name for each in found if each] == names
    assert [each.one_host for each in found if each] == [False, False, False, True]


def test_long_names_stay_apart_and_fit_the_table() -> None:
    """Two that differ at their end are two jobs."""
    names = [job.name for job in (Job.of({}, "x" * 300 + end) for end in "ab") if job]
    assert len(set(names)) == 2
    assert max(map(len, names)) <= LONGEST_NAME


def test_named_job_on_several_nodes_shares_no_file() -> None:
    """Where Slurm tells of another node, a name of the user's own is no sign of one host."""
    found = [Job.of({"SLURM_STEP_NUM_NODES": nodes} if nodes else {}, "mine") for nodes in ("", "1", "2")]
    assert [each.one_host for each in found if each] == [True, True, False]


def test_name_of_a_job_may_be_any_bytes(tmp_path: Path) -> None:
    """What the environment holds beyond UTF-8 makes a name that a database can store, and that no other bytes make."""
    names = [os.fsdecode(text) for text in (b"a\xff", b"a\xfe", b"\xff" * 300)]
    found = [job for job in (Job.of({}, name) for name in names) if job]
    assert len({job.name.encode() for job in found}) == 3
    filled(tmp_path, PROBLEM, 32)
    assert resolve(PROBLEM, DEVICE, Settings(cache_dir=tmp_path, job=found[0])).won
