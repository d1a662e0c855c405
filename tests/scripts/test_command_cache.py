"""``flashbias cache list``, ``show`` and ``prune``: what they tell, what they leave alone, and what prune must keep."""

from __future__ import annotations

import json
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from autotune.judgements import Judgements
from autotune.place import Place
from cache_db import open_layers
from cache_db.models import Environment, Lift, Pin, Trial, Verdict, Verification, Winner
from cache_db.store import Store
from flashbias.cli.problems import brief
from tests.cache_db.store_examples import ENVIRONMENT, config, problem, trial
from tests.scripts.command_cases import GOOD, KEY, PROBLEM, WRONG, Run, python

DAY = 86_400.0
NOW = time.time()
ATTENTION = problem(
    fields={
        "value_dim": 32,
        "rank_dim": 16,
        "grads": "q,k",
        "window": 0,
        "mask": "bool",
        "gqa_group": 4,
        "varlen": False,
    }
)


def data(run: Run, *arguments: str, **options: Any) -> dict[str, Any]:
    """Returns what a command prints as JSON."""
    code, output, errors = run(*arguments, "--json", **options)
    assert (code, errors) == (0, "")
    found: dict[str, Any] = json.loads(output)
    return found


def test_reading_commands_load_neither_torch_nor_triton(folder: Path) -> None:
    """Who only looks into the database, or clears it up, waits for no GPU library."""
    code = (
        "import sys; from flashbias.cli.main import main; code = main(sys.argv[1:])\n"
        "assert not {'torch', 'triton'} & set(sys.modules); sys.exit(code)"
    )
    for arguments in (["list"], ["show", PROBLEM.hash[:8]], ["prune", "--older-than", "1d", "--dry-run"]):
        done = python("-c", code, "cache", *arguments, FLASHBIAS_CACHE_DIR=str(folder))
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout


@pytest.mark.parametrize("arguments", [["list"], ["show", "00"], ["prune", "--older-than", "1d"]])
@pytest.mark.parametrize("made", ["nothing", "an empty file"])
def test_no_database_is_made(run: Run, tmp_path: Path, arguments: list[str], made: str) -> None:
    """Where there is none, that is said, and there is none afterwards."""
    place = tmp_path / "none"
    if made == "an empty file":
        place.mkdir()
        (place / "flashbias.db").touch()
    code, output, errors = run("cache", *arguments, cache=place)
    assert (code, output) == (2, "")
    assert "expected a folder with a flashbias.db" in errors
    assert not place.exists() or [each.stat().st_size for each in place.iterdir()] == [0]


def test_nothing_is_written_by_looking(run: Run, folder: Path) -> None:
    """List, show and a dry run leave the file as it is, to the byte, and nothing beside it."""
    file = folder / "flashbias.db"
    before = file.read_bytes()
    file.chmod(0o444)
    for arguments in (["list"], ["show", KEY], ["prune", "--older-than", "0h", "--dry-run"]):
        assert run("cache", *arguments)[0] == 0
    assert file.read_bytes() == before
    assert [each.name for each in folder.iterdir()] == ["flashbias.db"]


def test_list_has_a_line_for_each_problem_and_one_for_each_kernel(run: Run, folder: Path) -> None:
    """GPU, what it is, level, time and when, then each kernel's key and config; what was only tried is told too."""
    store = Store.open(folder / "flashbias.db")
    store.add_trial(trial(at=ATTENTION))
    store.add_trial(trial(128, Verdict.WRONG, at=ATTENTION))
    winners = store.winners(PROBLEM)
    code, output, _ = run("cache", "list")
    assert code == 0
    lines = output.splitlines()
    assert lines[0].startswith(f"{ATTENTION.hash[:12]}  NVIDIA H200  bfloat16 1024x1024 D64/32 R16 causal mask bool")
    assert "gradients of q k: no winner, 2 tried, 1970-01-01" in lines[0]
    assert lines[1].endswith("no winner: 1 safe, 1 wrong")
    assert lines[2].startswith(f"{PROBLEM.hash[:12]}  triton-interpreter  ")
    assert f": level 2, {sum(row.ms for row in winners.values()):.4g} ms, 20" in lines[2]
    assert lines[3].split()[:4] == ["forward", KEY[:12], GOOD.hash[:12], "level"]
    assert str(winners["forward"].config) in lines[3]
    assert lines[-1] == f"2 problems in {folder / 'flashbias.db'}"
    assert len(run("cache", "list", "--brief")[1].splitlines()) == 3


def test_list_as_json_holds_winners_pins_and_verdicts(run: Run, folder: Path) -> None:
    """A program gets the rows as they are, without parsing words."""
    pin(folder)
    (row,) = data(run, "cache", "list")["rows"]
    assert row["problem"] == {"hash": PROBLEM.hash, **PROBLEM.model_dump()}
    assert row["level"] == 2
    forward = row["kernels"]["forward"]
    assert forward["key"] == KEY
    assert forward["verdicts"] == {"safe": 1, "wrong": 1}
    assert (forward["winner"]["config_hash"], forward["pin"]["pinned_by"]) == (GOOD.hash, "me")
    assert row["kernels"]["backward"]["pin"] is None


def pin(folder: Path) -> None:
    """Pins the wrong config."""
    wish = {"pinned_by": "me", "host": "here", "reason": "for a test", "created_at": NOW}
    open_layers(folder).put_pin(Pin(problem=PROBLEM, kernel="forward", config=WRONG, **wish))


@pytest.mark.parametrize("name", [PROBLEM.hash[:10], KEY[:10], PROBLEM.key("backward")])
def test_show_tells_all_of_one_problem(run: Run, folder: Path, name: str) -> None:
    """By the hash of the problem or of a key: winners with errors and origin, trials, proofs, lifts, pin and lease."""
    pin(folder)
    store = open_layers(folder)
    assert run("cache", "quarantine", "lift", "--key", KEY)[0] == 0
    lease = store.claim(PROBLEM.hash, "boot/ns/7-1:x", "node-7", 60.0)
    code, output, _ = run("cache", "show", name)
    assert code == 0
    (row,) = (each for each in store.trials(PROBLEM, "forward") if each.config == GOOD)
    for part in (
        f"problem   {PROBLEM.hash}",
        f"kernel    forward, key {KEY[:12]}",
        f"winner    {GOOD.hash[:12]}  {GOOD}",
        "level 2 (gate)",
        f"tuned on {row.host}",
        "% of its budget)",
        f"pin       {WRONG.hash[:12]}  {WRONG}",
        "by me on here, ",
        "trials    2: 1 safe, 1 wrong",
        f"proof     {WRONG.hash[:12]}  wrong, level 0, ",
        f"lift      {WRONG.hash[:12]}  by ",
        "proven behind forward",
        "lease     boot/ns/7-1:x on node-7",
    ):
        assert part in output, part
    found = data(run, "cache", "show", name)
    assert lease is not None
    assert found["lease"]["owner"] == lease.owner
    told = {each["config_hash"]: each for each in found["kernels"]["forward"]["trials"]}
    assert {name: each["verdict"] for name, each in told.items()} == {GOOD.hash: "safe", WRONG.hash: "wrong"}
    assert told[GOOD.hash]["figures"] == row.figures
    assert [each["lifted_by"] for each in found["kernels"]["forward"]["lifts"]] != []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["show", "0" * 64], f"There are:\n  {PROBLEM.hash[:12]}  planted"),
        (["show", "xyz"], "hexadecimal"),
        (["show"], "KEY"),
        (["prune"], "expected --older-than, --driver or --version, got none of them"),
        (["prune", "--older-than", "yesterday"], "expected hours, days or weeks as 12h, 30d or 8w"),
        (["prune", "--older-than", "-1d"], "--older-than"),
    ],
)
def test_wrong_usage_ends_with_2_and_says_what_was_expected(run: Run, arguments: list[str], expected: str) -> None:
    """Nothing is on stdout, and the message names the choices."""
    code, output, errors = run("cache", *arguments)
    assert (code, output) == (2, "")
    assert expected in errors


def test_one_name_for_several_problems_is_refused(run: Run, folder: Path) -> None:
    """Digits that begin two hashes ask for more digits."""
    store, seen = Store.open(folder / "flashbias.db"), {PROBLEM.hash[0]}
    for number in range(64):  # of so many hashes two begin alike
        other = problem(fields={"head_dim": number})
        store.add_trial(trial(at=other))
        if other.hash[0] in seen:
            break
        seen.add(other.hash[0])
    code, _, errors = run("cache", "show", other.hash[0])
    assert code == 2
    assert "more than one begin. Give more digits. There are:" in errors


def test_rows_cannot_steer_the_terminal(run: Run, folder: Path) -> None:
    """What rows say comes out with control characters escaped, in list and show."""
    row = trial(at=problem(gpu_name="\x1b[2JGPU"), verdict=Verdict.WRONG, reason="a\nforged line")
    Store.open(folder / "flashbias.db").add_trial(row)
    for arguments in (["list"], ["show", row.problem.hash]):
        output = run("cache", *arguments)[1]
        assert "\\x1b[2JGPU" in output
        assert "\x1b" not in output
        assert "\nforged" not in output


def test_a_broken_row_is_skipped_and_a_damaged_file_left_where_it_is(run: Run, folder: Path) -> None:
    """Nothing is mended by looking: an edited row is left out, garbage is an error, and both stay."""
    with sqlite3.connect(folder / "flashbias.db") as connection:
        connection.execute("UPDATE flashbias_trials SET params = '{}' WHERE verdict = 'wrong'")
    connection.close()
    assert data(run, "cache", "list")["rows"][0]["kernels"]["forward"]["verdicts"] == {"safe": 1}
    (folder / "flashbias.db").write_bytes(b"garbage" * 1000)
    code, output, errors = run("cache", "list")
    assert (code, output) == (1, "")
    assert "damaged" in errors
    assert [each.name for each in folder.iterdir()] == ["flashbias.db"]


class TestPrune:
    """What may go, what must stay, and that nothing is proven or let out of quarantine by it."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        """An empty database in a folder of its own."""
        return Store.open(tmp_path / "pruned" / "flashbias.db")

    def prune(self, run: Run, store: Store, *arguments: str) -> dict[str, Any]:
        """Prunes ``store`` and returns what was printed."""
        return data(run, "cache", "prune", *arguments, cache=store.path.parent)

    def test_old_rows_go_and_young_ones_stay(self, run: Run, store: Store) -> None:
        """Age is counted from when a row was stored; the counts say what went."""
        for block, age in ((16, 40), (32, 31), (64, 29)):
            store.add_trial(trial(block, created_at=NOW - age * DAY))
        assert self.prune(run, store, "--older-than", "30d", "--dry-run")["rows"] == 2
        assert store.counts()["trials"] == 3
        found = self.prune(run, store, "--older-than", "30d")
        assert (found["rows"], found["tables"], found["dry_run"]) == (2, {"trials": 2}, False)
        assert [row.config for row in store.find(Trial)] == [config(64)]

    def test_several_choices_choose_what_all_of_them_do(self, run: Run, store: Store) -> None:
        """A driver and a version together mean rows of both; each may have several values."""
        old = Environment(driver="550.1", ptxas="12.4", torch="2.11.0")
        store.add_trial(trial(16, environment=old))
        store.add_trial(trial(32, at=problem(triton_version="3.5.0"), environment=old))
        store.add_trial(trial(64, at=problem(triton_version="3.5.0")))
        assert self.prune(run, store, "--driver", "550.1", "--version", "3.5.0")["rows"] == 1
        assert self.prune(run, store, "--version", "3.4.0", "3.5.0")["rows"] == 1
        assert self.prune(run, store, "--driver", "1.0")["rows"] == 0
        assert self.prune(run, store, "--driver", "550.1", ENVIRONMENT.driver)["rows"] == 1
        assert store.counts()["trials"] == 0

    @pytest.mark.parametrize("flag", ["", "--keep-quarantine", "--no-keep-quarantine"])
    def test_quarantine_stays_unless_it_may_go(self, run: Run, store: Store, flag: str) -> None:
        """What is wrong is kept with all that was judged of its config; on request it goes as a whole."""
        store.add_trial(trial(16, Verdict.WRONG))
        store.add_trial(trial(32))
        racy = {"verdict": Verdict.RACY, "level": 0}
        store.add_verification(Verification.of(trial(32)).model_copy(update=racy))
        store.add_trial(trial(64))
        found = self.prune(run, store, "--older-than", "1d", *([flag] if flag else []))
        kept = flag != "--no-keep-quarantine"
        assert (found["rows"], found["kept_in_quarantine"]) == ((1, 3) if kept else (4, 0))
        assert {row.config for row in store.find(Trial)} == ({config(16), config(32)} if kept else set())

    @pytest.mark.parametrize("flag", ["--keep-quarantine", "--no-keep-quarantine"])
    def test_no_failure_goes_while_a_proof_of_its_config_stays(self, run: Run, store: Store, flag: str) -> None:
        """An old finding that a config is racy outlives its young proof, which would have it run again."""
        store.add_trial(trial(32, created_at=NOW))
        racy = {"verdict": Verdict.RACY, "level": 0, "created_at": NOW - 2 * DAY}
        store.add_verification(Verification.of(trial(32)).model_copy(update=racy))
        assert self.prune(run, store, "--older-than", "1d", flag)["rows"] == 0
        judgements = Judgements(Place("", frozenset()), store.find(Trial), store.find(Verification), [])
        assert judgements.bar(config(32), {}) is not None

    def test_no_lift_goes_while_what_it_lifted_stays(self, run: Run, store: Store) -> None:
        """A lift goes with all it speaks of, else the quarantine would be back."""
        old = NOW - 9 * DAY
        for block, verdict, created in ((16, Verdict.WRONG, NOW), (32, Verdict.WRONG, old), (64, Verdict.SAFE, old)):
            store.add_trial(trial(block, verdict, created_at=created))
            lift = {"lifted_by": "me", "host": "here", "created_at": created + 1}
            store.add_lift(Lift(problem=problem(), kernel="forward", config=config(block), **lift))
        assert self.prune(run, store, "--older-than", "1d")["tables"] == {"trials": 2, "lifts": 2}
        assert [row.config for row in store.find(Lift)] == [config(16)] == [row.config for row in store.find(Trial)]

    def test_what_a_winner_or_pin_runs_with_stays(self, run: Run, store: Store) -> None:
        """The trials of a young winner, of what it was proven behind and of a pin stay, however old; other trials go."""
        for block in (16, 32, 64, 128):
            store.add_trial(trial(block))
        store.put_winner(winner("forward", 16, NOW - 9 * DAY))
        store.put_winner(winner("backward", 64, NOW, proven_with={"forward": config(32).hash}))
        wish = {"pinned_by": "me", "host": "here", "created_at": 0.0}
        store.put_pin(Pin(problem=problem(), kernel="forward", config=config(64), **wish))
        found = self.prune(run, store, "--older-than", "1d")
        # The old winner stays beside the young one: half a problem's winners serve nobody.
        assert (found["tables"], found["kept_behind_winners"]) == ({"trials": 1}, 3)
        assert {row.config for row in store.find(Trial)} == {config(16), config(32), config(64)}
        assert (store.counts()["winners"], store.counts()["pins"]) == (2, 1)

    def test_a_problem_whose_winners_are_all_old_is_gone(self, run: Run, store: Store) -> None:
        """Winners and trials go together, and other problems are not touched."""
        other = problem(fields={"head_dim": 128})
        for at, created in ((problem(), NOW - 9 * DAY), (other, NOW)):
            store.add_trial(trial(16, at=at, created_at=created))
            store.put_winner(winner("forward", 16, created).model_copy(update={"problem": at}))
        found = self.prune(run, store, "--older-than", "1w")
        assert found["problems"] == [{"problem_hash": problem().hash, "winners": 1, "trials": 1}]
        assert {row.problem for row in store.find(Winner)} == {other}

    def test_a_row_that_was_written_anew_meanwhile_stays(self, store: Store) -> None:
        """Only the very rows that were looked at are deleted."""
        seen = trial(16)
        store.add_trial(seen.model_copy(update={"created_at": NOW}))
        assert store.remove([seen]) == 0
        assert store.remove(store.find(Trial)) == 1
        assert store.counts()["trials"] == 0

    def test_people_are_told_what_went_and_what_stayed(self, run: Run, store: Store) -> None:
        """A line for each problem, then how much stayed and why, then the sum."""
        store.add_trial(trial(16))
        store.add_trial(trial(32, Verdict.WRONG))
        lines = run("cache", "prune", "--older-than", "1d", cache=store.path.parent)[1].splitlines()
        assert lines[0].startswith(f"deleted  {problem().hash[:12]}  NVIDIA H200  ")
        assert lines[0].endswith(": 1 trials")
        assert lines[1:] == ["kept 1 rows in quarantine", f"1 rows deleted from {store.path}"]


def winner(kernel: str, block: int, created: float, proven_with: dict[str, str] | None = None) -> Winner:
    """Returns a winner row."""
    row = trial(block)
    figures = {"ms": 0.1, "tried": 3, "total": 3, "complete": True, "binary": "", "level": 2}
    return Winner(
        problem=row.problem,
        kernel=kernel,
        config=row.config,
        environment=row.environment,
        created_at=created,
        proven_with=proven_with or {},
        **figures,
    )


def test_trials_take_the_flag_that_every_reading_command_takes(run: Run) -> None:
    """``--json`` means JSON lines there."""
    assert run("trials", "--json") == run("trials", "--format", "jsonl")


def test_foreign_problems_are_told_by_all_their_fields() -> None:
    """What is not attention has no short form, and attention without a bias or gradients says so."""
    assert brief(problem()) == "softmax aligned causal=True dtype=bfloat16 head_dim=64 seqlen_k=1024 seqlen_q=1024"
    plain = ATTENTION.model_copy(
        update={"fields": {**ATTENTION.fields, "rank_dim": 0, "grads": ""}, "layout": "strided"}
    )
    assert brief(plain) == "bfloat16 1024x1024 D64/32 no bias causal mask bool gqa_group 4 strided, forward only"


def test_prune_deletes_no_lift_that_nothing_was_asked_of(run: Run, folder: Path) -> None:
    """A lift whose judgements are not there, or cannot be read, is of no age, driver or version that was named."""
    store = Store.open(folder / "flashbias.db")
    alone = config(31)
    store.add_lift(
        Lift(problem=PROBLEM, kernel="forward", config=alone, lifted_by="me", host="here", created_at=NOW, reason="")
    )
    assert run("cache", "prune", "--driver", "no such driver")[0] == 0
    assert [row for row in store.find(Lift) if row.config == alone]
