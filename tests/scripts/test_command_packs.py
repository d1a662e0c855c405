"""``flashbias cache export``, ``import`` and ``merge``: files that are whole or not there, and rows that have to be proven."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import autotune
from autotune import Mode, Settings, resolve
from autotune.device import DeviceInfo
from autotune.remake import target
from cache_db import packs
from cache_db.batch import Batch
from cache_db.intake import take
from cache_db.models import Config, Environment, Trial, Verdict, Verification, Winner
from cache_db.store import Store
from flashbias.cli.main import main
from flashbias.kernels import space
from flashbias.kernels.problem import Shape
from flashbias.kernels.problem import problem as problem_of
from flashbias.settings import read, settings
from tests.cache_db.store_examples import lift, trial
from tests.scripts.command_cases import DEVICE, Run
from tests.scripts.command_cases import PROBLEM as TUNED

SHAPE = Shape(batch=2, nheads=16, seqlen_q=2048, seqlen_k=2048, headdim=64, rank=8, dtype="bfloat16", grads=())
HERE = Environment(driver="580.1", ptxas="12.8", torch="2.11.0")
H200 = DeviceInfo(0, "NVIDIA H200", "GPU-1", (9, 0), 132, 232448, "", "3.6.0", HERE)
PROBLEM = problem_of(SHAPE, H200)
LEGAL = [each for each in space.candidates(PROBLEM, H200) if not space.rejects("forward", each, PROBLEM, H200)]
FAST, SLOW, WRONG = LEGAL[0], LEGAL[1], LEGAL[2]
ILLEGAL = Config(implementation="triton", variant="pointers", params={"BLOCK_M": 7})


def row(config: Config, verdict: Verdict = Verdict.SAFE, **changes: Any) -> Trial:
    """Returns a trial of attention on an H200."""
    return trial(64, verdict, PROBLEM, **{"config": config, "environment": HERE, "created_at": time.time(), **changes})


def winner(config: Config = FAST, **changes: Any) -> Winner:
    """Returns a winner of the same problem."""
    found = row(config, **changes)
    figures = {"ms": 0.1, "tried": 3, "total": 3, "complete": True}
    return Winner(**{name: getattr(found, name) for name in Winner.model_fields if name not in figures}, **figures)


@pytest.fixture
def there(tmp_path: Path) -> Store:
    """A database as a colleague has it: a winner, a config that passed, one that is wrong, and a lift."""
    store = Store.open(tmp_path / "there" / "flashbias.db")
    bad = row(WRONG, Verdict.WRONG, level=0, reason="rows 3-4 of O are zero")
    store.merge(Batch.of([row(FAST), row(SLOW), bad, winner(), Verification.of(bad), Verification.of(row(FAST))]))
    store.add_lift(lift(at=PROBLEM, config=WRONG, created_at=1.0))
    return store


@pytest.fixture
def pack(there: Store, run: Run, tmp_path: Path) -> Path:
    """What the colleague exported."""
    path = tmp_path / "pack.jsonl"
    assert run("cache", "export", "--output", str(path), cache=there.path.parent)[0] == 0
    return path


def test_export_is_a_text_for_reviewers_and_the_same_each_time(run: Run, there: Store, pack: Path) -> None:
    """A header, then rows in order; stdout by default; nothing but the pack is on it."""
    code, output, errors = run("cache", "export", cache=there.path.parent)
    assert (code, errors) == (0, f"flashbias: 7 rows of {there.path} exported\n")
    assert output == pack.read_text(encoding="utf-8")
    lines = [json.loads(line) for line in output.splitlines()]
    assert lines[0] == {"pack": "flashbias", "schema_version": 1}
    assert [line["kind"] for line in lines[1:]] == [
        "winner",
        *["trial"] * 3,
        *["verification"] * 2,
        "lift",
    ]
    assert {line.get("host") for line in lines if line.get("kind") == "trial"} == {"node-1"}
    brief = run("cache", "export", "--winners", cache=there.path.parent)[1]
    assert brief.count("\n") == 7
    assert SLOW.hash not in {
        each.config.hash for each in packs.read(io.BytesIO(brief.encode())) if isinstance(each, Trial)
    }


def test_rows_of_the_interpreter_stay_at_home(run: Run, folder: Path, tmp_path: Path) -> None:
    """They say nothing of any GPU: they are neither exported nor taken in."""
    assert Store.open(folder / "flashbias.db").counts()["trials"] > 0
    code, output, _ = run("cache", "export")
    assert (code, len(output.splitlines())) == (0, 1)
    store = Store.open(folder / "flashbias.db")
    path = tmp_path / "forged.jsonl"
    with path.open("w", encoding="utf-8") as stream:
        packs.write(store.by_problem(), stream)
    code, output, _ = run("cache", "import", str(path), cache=tmp_path / "new")
    assert code == 1
    assert "made in Triton's interpreter" in output
    assert Store.open(tmp_path / "new" / "flashbias.db").counts()["trials"] == 0


def test_imported_rows_start_at_level_0_and_bars_stay(run: Run, pack: Path, tmp_path: Path) -> None:
    """What is called safe is unproven here, what is unsafe counts, lifts are left out; a second time changes nothing."""
    code, output, _ = run("cache", "import", str(pack), cache=tmp_path / "new")
    assert (code, output) == (0, f"{pack}: 7 rows, 6 stored, 0 known already, 0 refused, 1 lifts left out\n")
    store = Store.open(tmp_path / "new" / "flashbias.db")
    assert {each.level for each in (*store.find(Trial), *store.find(Winner), *store.find(Verification))} == {0}
    assert {each.config for each in store.find(Trial) if each.verdict is Verdict.WRONG} == {WRONG}
    before = store.path.read_bytes()
    assert "0 stored, 6 known already" in run("cache", "import", str(pack), cache=tmp_path / "new")[1]
    assert store.path.read_bytes() == before


def test_nothing_imported_counts_as_proven(run: Run, pack: Path, tmp_path: Path) -> None:
    """The rules that decide what may run without a proof find none in what was imported, in the very same environment."""
    from autotune.judgements import Judgements
    from autotune.place import Place

    run("cache", "import", str(pack), cache=tmp_path / "new")
    store = Store.open(tmp_path / "new" / "flashbias.db")
    rows = store.trials(PROBLEM), store.verifications(PROBLEM), store.lifts(PROBLEM)
    judgements = Judgements(Place("", frozenset()), *rows)
    assert [each.level for each in judgements.proofs(FAST, HERE, {})] == [0, 0]
    assert judgements.bar(WRONG, {}) is not None


def test_what_no_rule_allows_is_refused_and_the_rest_taken(run: Run, pack: Path, tmp_path: Path) -> None:
    """An illegal config, an unknown kernel, a foreign spec and a row from the future each say why; the exit code is 1."""
    alien = PROBLEM.model_copy(update={"spec": "os:system"})
    rows = [
        row(ILLEGAL),
        row(FAST, kernel="sideways"),
        row(FAST, problem=alien),
        row(FAST, created_at=time.time() + 1e7, seed=5),
        row(FAST, problem=PROBLEM.model_copy(update={"fields": {"head_dim": "wide"}})),
        row(FAST, problem=PROBLEM.model_copy(update={"capability": "../../etc"})),
    ]
    with pack.open("a", encoding="utf-8") as stream:
        stream.writelines(f"{packs.line(each)}\n" for each in rows)
        stream.write("garbage\n")
    code, output, _ = run("cache", "import", str(pack), "--json", cache=tmp_path / "new")
    assert code == 1
    (found,) = json.loads(output)["packs"]
    assert (found["stored"], found["refused"]) == (6, 7)
    reasons = [each["reason"] for each in found["refusals"]]
    for reason, part in zip(
        reasons,
        (
            "BLOCK_M must be one of",
            "no such kernel",
            "--spec os:system",
            "in the future",
            "failed",
            "no GPU",
            "JSONDecodeError",
        ),
        strict=True,
    ):
        assert part in reason
    assert found["refusals"][-1]["where"] == "line 15"


def test_a_row_that_bars_a_winner_here_is_told(run: Run, tmp_path: Path) -> None:
    """Who imports learns which of the winners at hand will not run any more; a dry run tells it and stores nothing."""
    store = Store.open(tmp_path / "mine" / "flashbias.db")
    store.put_winner(winner())
    path = tmp_path / "bad.jsonl"
    with path.open("w", encoding="utf-8") as stream:
        packs.write([Batch.of([row(FAST, Verdict.RACY, level=0)])], stream)
    code, output, _ = run("cache", "import", str(path), "--dry-run", cache=store.path.parent)
    assert code == 0
    assert f"bars      the winner of key {PROBLEM.key('forward')[:12]}" in output
    assert "1 would be taken" in output
    assert store.counts()["trials"] == 0


def test_merge_makes_one_pack_whatever_the_order(
    run: Run, there: Store, pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Text and databases alike, levels kept, no database of ours touched; a bad line is refused and told."""
    other = tmp_path / "other.sqlite"
    store = Store.open(tmp_path / "theirs" / "flashbias.db")
    store.put_winner(winner(SLOW, level=3))
    assert run("cache", "export", "--format", "sqlite", "--output", str(other), cache=store.path.parent)[0] == 0
    results = set()
    for order in ((pack, other), (other, pack, other)):
        assert main(["cache", "merge", *map(str, order)]) == 0
        results.add(capsys.readouterr().out)
    (merged,) = results
    assert [each.config for each in packs.read(io.BytesIO(merged.encode())) if isinstance(each, Winner)] == [SLOW]
    whole = tmp_path / "whole.sqlite"
    assert main(["cache", "merge", str(pack), str(other), "--format", "sqlite", "--output", str(whole)]) == 0
    assert Store.open_sealed(whole).winners(PROBLEM) == {
        "forward": winner(SLOW, level=3, created_at=store.find(Winner)[0].created_at)
    }
    pack.write_text(f"{pack.read_text(encoding='utf-8')}garbage\n", encoding="utf-8")
    capsys.readouterr()
    assert main(["cache", "merge", str(pack), str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl, which is not there" in capsys.readouterr().err
    assert main(["cache", "merge", str(pack), "--output", str(tmp_path / "out.jsonl")]) == 1
    assert "line 9 refused" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").is_file()


def test_a_failed_export_leaves_what_was_there(run: Run, there: Store, tmp_path: Path) -> None:
    """A file is replaced once all is written; the database itself and its own file are not overwritten."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "pack").write_text("mine")
    assert run("cache", "export", "--format", "sqlite", cache=there.path.parent)[0] == 2
    code, _, errors = run("cache", "export", "--output", str(there.path), cache=there.path.parent)
    assert (code, "which is the database" in errors) == (2, True)
    assert run("cache", "export", "--output", str(out / "none" / "pack"), cache=there.path.parent)[0] == 1
    there.path.write_bytes(there.path.read_bytes()[:5000])
    assert run("cache", "export", "--output", str(out / "pack"), cache=there.path.parent)[0] == 1
    assert [each.name for each in out.iterdir()] == ["pack"]
    assert (out / "pack").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["import", "nowhere.jsonl"], 2, "nowhere.jsonl, which is not there"),
        (["import"], 2, "PACK"),
        (["export", "--format", "xml"], 2, "--format"),
    ],
)
def test_wrong_usage_says_what_was_expected(run: Run, arguments: list[str], code: int, said: str) -> None:
    """Nothing is on stdout."""
    assert run("cache", *arguments)[:2] == (code, "")
    assert said in run("cache", *arguments)[2]


def test_a_pack_comes_from_stdin_too(run: Run, pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``-`` reads it, so that an export can be piped."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(pack.read_bytes())))
    code, output, _ = run("cache", "import", "-", cache=tmp_path / "new")
    assert (code, output.startswith("-: 7 rows, 6 stored")) == (0, True)


def test_the_device_of_a_problem_is_known_without_it() -> None:
    """Rules are asked for the GPU a row is for, not for the one that is here."""
    assert (target(PROBLEM).capability, target(PROBLEM).name) == ((9, 0), "NVIDIA H200")


def test_sweeps_tell_who_tuned_what_and_how_long(run: Run, tmp_path: Path) -> None:
    """Trials of one GPU without a long pause are one sweep; another host, or an hour later, is another."""
    store, start = Store.open(tmp_path / "swept" / "flashbias.db"), 1_700_000_000.0
    for config, host, after in (
        (FAST, "node-1", 5.0),
        (SLOW, "node-1", 9.0),
        (WRONG, "node-1", 3600.0),
        (FAST, "node-2", 7.0),
    ):
        kernel = "forward" if host == "node-1" else "backward_dq"
        store.add_trial(row(config, host=host, kernel=kernel, created_at=start + after, seconds=2.0))
    code, output, _ = run("cache", "sweeps", "--json", cache=store.path.parent)
    found = json.loads(output)["rows"]
    assert code == 0
    assert [(each["host"], each["tried"], each["ended"] - each["began"]) for each in found] == [
        ("node-1", 2, 6.0), ("node-2", 1, 2.0), ("node-1", 1, 2.0),
    ]  # fmt: skip
    lines = run("cache", "sweeps", cache=store.path.parent)[1].splitlines()
    assert lines[1].startswith("    on node-1, GPU-1, 2023-11-14")
    assert lines[1].endswith("2 tried (2 safe) in 6.0 s, 4.0 s of them judging")
    assert lines[-1] == f"3 sweeps, 10.0 s in all, in {store.path}"


def test_an_imported_winner_is_proven_before_it_runs_and_not_tuned_again(folder: Path, tmp_path: Path) -> None:
    """The other machine's proof is worth nothing here, its choice is: one proof of each kernel, no sweep, then a hit."""
    store = Store.open(tmp_path / "new" / "flashbias.db")
    for batch in Store.open(folder / "flashbias.db").by_problem():
        take(store, [*batch.winners, *batch.trials, *batch.verifications])
    assert {each.level for each in store.find(Winner)} == {0}
    before = {each.created_at for each in store.find(Verification)}
    found = resolve(TUNED, DEVICE, Settings(cache_dir=tmp_path / "new"))
    assert not found.swept
    assert {(each.rung, each.level) for each in found.choices.values()} == {("winner", 2)}
    fresh = [each for each in store.find(Verification) if each.created_at not in before]
    assert {(each.kernel, each.level, each.verdict) for each in fresh} == {
        (kernel, 2, Verdict.SAFE) for kernel in found.choices
    }
    autotune.forget()
    again = resolve(TUNED, DEVICE, Settings(cache_dir=tmp_path / "new", mode=Mode.READ))
    assert again.won
    assert len(store.find(Verification)) == len(before) + len(fresh)


def test_show_tells_the_layers_apart(run: Run, there: Store, tmp_path: Path) -> None:
    """Seeds that the settings name are told with what counts, and where they disagree; without them nothing is."""
    assert "in conflict" not in run("cache", "show", PROBLEM.hash, cache=there.path.parent)[1]
    seed = Store.open(tmp_path / "seed.db")
    seed.put_winner(winner(SLOW, level=3))
    with settings(seeds=[seed.path]):
        output = run("cache", "show", PROBLEM.hash, cache=there.path.parent)[1]
        found = json.loads(run("cache", "show", PROBLEM.hash, "--json", cache=there.path.parent)[1])["origins"]
    assert f"user    {FAST.hash[:12]}  level 2" in output
    assert f"seeds   {SLOW.hash[:12]}  level 3" in output
    assert output.count("in conflict") == 2
    assert [(each["layer"], each["counts"]) for each in found] == [("user", True), ("seeds", False)]


def test_commands_owe_the_server_what_they_write(
    run: Run, pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is away makes no command fail: stderr says that it is owed, and the marks are in the file."""
    pytest.importorskip("psycopg", reason="no PostgreSQL: psycopg is not installed (pip install '.[dev]')")
    monkeypatch.setattr("flashbias.cli.owed.WAIT_SECONDS", 5.0)
    with settings(db_url="postgresql+psycopg://me:s3cret@127.0.0.1:9/tuning") as inside:
        code, _, errors = run("cache", "import", str(pack), cache=tmp_path / "new")
        assert code == 0
        assert "it is owed to postgresql+psycopg://me@127.0.0.1:9/tuning" in errors
        assert "s3cret" not in errors
        store = Store.open(tmp_path / "new" / "flashbias.db")
        assert inside.db_url is not None
        assert len(store.debts(inside.db_url.target, 20)) == 6
        assert run("cache", "prune", "--older-than", "0h", "--no-keep-quarantine", cache=tmp_path / "new")[0] == 0
        assert {debt.kind for debt in store.debts(inside.db_url.target, 20)} == {"gone"}


def test_seeds_of_the_settings_serve_calls(folder: Path, tmp_path: Path) -> None:
    """A sealed file that the settings name answers where nothing else is known: no sweep, and nothing is written to it."""
    seed = folder / "flashbias.db"
    before = seed.read_bytes()
    found = resolve(TUNED, DEVICE, Settings(cache_dir=tmp_path / "empty", seeds=(seed,)))
    assert (found.won, found.swept) == (True, False)
    assert seed.read_bytes() == before
    inside = read(
        {"FLASHBIAS_SEEDS": f"{seed}{os.pathsep}{os.pathsep}relative.db", "FLASHBIAS_CACHE_DIR": str(tmp_path)}
    )
    assert inside.seeds == (seed, Path.cwd() / "relative.db")
    with settings(seeds=str(seed)) as one:
        assert one.seeds == (seed,)


def test_merge_does_not_write_over_the_database(
    tmp_path: Path, pack: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--output`` with the database that jobs use is a slip, and would cost all that was ever tuned."""
    store = Store.open(tmp_path / "mine" / "flashbias.db")
    store.add_trial(row(FAST))
    before = store.path.read_bytes()
    with settings(cache_dir=tmp_path / "mine"):
        for form in ("jsonl", "sqlite"):
            assert main(["cache", "merge", str(pack), "--format", form, "--output", str(store.path)]) == 2
    assert store.path.read_bytes() == before
    assert "which is the database" in capsys.readouterr().err
