"""``flashbias report``: what its page says of the rows, and that no row can break out of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cache_db.models import Verdict
from cache_db.store import Store
from flashbias.cli.reporting import keys, page
from flashbias.cli.reporting.standing import LIFTED, runner_up, standings
from flashbias.cli.stored import everything
from tests.scripts.command_cases import PROBLEM, Run, python
from tests.scripts.report_pages import Elements, pages, write
from tests.scripts.report_rows import FOREIGN, HOSTILE, fill, lift, problem, proof, sweep, tile, trial, winner


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small database and one full of attacks, each with its page."""
    return pages(tmp_path_factory.mktemp("report"))


def test_the_page_loads_nothing_and_runs_only_its_own_script(place: Path) -> None:
    """No element names a source, the only link is to a part of the page, and the policy forbids the rest."""
    text = (place / "usual.html").read_text(encoding="utf-8")
    found = Elements(text)
    assert not [attributes for _, attributes in found.tags if {"src", "srcset", "data", "action"} & set(attributes)]
    assert [attributes["href"] for _, attributes in found.tags if "href" in attributes] == ["#problems"]
    assert not [word for word in ("url(", "@import", "fetch(", "innerHTML", "eval(", "://") if word in text]
    (policy,) = (each["content"] for _, each in found.tags if each.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    style, _, script = found.inside
    for part, content in (("style-src", style), ("script-src", script)):
        assert f"{part} '{page._hash(content)}'" in policy
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert text.isascii(), "whatever encoding stdout has, the bytes are the same"


def test_no_string_of_a_row_breaks_out_of_its_element(place: Path) -> None:
    """The markup is the same whatever the rows hold, and every string comes back as it was, control characters escaped."""
    usual, hostile = (Elements((place / f"{name}.html").read_text(encoding="utf-8")) for name in ("usual", "hostile"))
    assert [name for name, _ in hostile.tags] == [name for name, _ in usual.tags]
    assert (hostile.inside[0], hostile.inside[2]) == (usual.inside[0], usual.inside[2])
    assert not set("<>&\n") & set(hostile.inside[1])
    kernels = [kernel for each in hostile.data["problems"] for kernel in each["kernels"]]
    assert {kernel["name"] for kernel in kernels} == {keys.clean(text) for text in HOSTILE}
    assert {kernel["pin"]["reason"] for kernel in kernels} == {keys.clean(text) for text in HOSTILE}
    assert keys.clean("\x1b[2J\u202e</p>\nline") == "\\x1b[2J\\u202e</p>\nline"


def test_the_same_rows_make_the_same_page(place: Path, tmp_path: Path) -> None:
    """Neither the time, nor the database's path, nor the order in which rows were stored changes a byte."""
    fill(tmp_path / "flashbias.db", backwards=True)
    assert write(tmp_path, tmp_path / "again.html") == (place / "usual.html").read_text(encoding="utf-8")


def test_the_page_names_no_host_user_or_path(place: Path) -> None:
    """A page may be handed on: what only concerns who tuned is left out."""
    text = (place / "usual.html").read_text(encoding="utf-8")
    assert not [word for word in ("secret-host", "somebody", "GPU-1", str(place)) if word in text]


def test_a_file_is_written_whole_and_stdout_gets_the_same(run: Run, folder: Path, tmp_path: Path) -> None:
    """The file is replaced, nothing is left beside it, and with - only the page is on stdout."""
    output = tmp_path / "page.html"
    output.write_text("old", encoding="utf-8")
    before = {each.name for each in tmp_path.iterdir()}
    code, said, errors = run("report", "--output", str(output))
    assert (code, errors) == (0, "")
    assert said == f"1 problems of {folder / 'flashbias.db'} in {output}\n"
    assert {each.name for each in tmp_path.iterdir()} == before
    assert run("report", "--output", "-") == (0, output.read_text(encoding="utf-8"), "")
    (each,) = Elements(output.read_text(encoding="utf-8")).data["problems"]
    assert each["hash"] == PROBLEM.hash


@pytest.mark.parametrize(
    ("output", "cache", "code", "expected"),
    [
        ("flashbias.db", "", 2, "which is the database"),
        ("none/page.html", "", 1, "No such file"),
        ("page.html", "none", 2, "expected a folder with a flashbias.db"),
    ],
)
def test_what_cannot_be_done_is_said(run: Run, folder: Path, output: str, cache: str, code: int, expected: str) -> None:
    """The database is not overwritten, and what is not there is neither read nor made."""
    found, said, errors = run("report", "--output", str(folder / output), cache=folder / cache)
    assert (found, said) == (code, "")
    assert expected in errors
    assert [each.name for each in folder.iterdir()] == ["flashbias.db"]


def test_it_loads_neither_torch_nor_triton(place: Path, tmp_path: Path) -> None:
    """The page can be made where no GPU library is, and lands in the working folder by default."""
    code = (
        "import sys, os; from flashbias.cli.main import main; os.chdir(sys.argv[1]); code = main(['report', '--cache-dir', sys.argv[2]])\n"
        "assert not {'torch', 'triton'} & set(sys.modules); sys.exit(code)"
    )
    done = python("-c", code, str(tmp_path), str(place / "usual"))
    assert (done.returncode, done.stderr) == (0, "")
    assert [each.name for each in tmp_path.iterdir()] == ["report.html"]


class TestStanding:
    """What is said of a config by all that was found of it."""

    def state(self, verifications: Any = (), lifts: Any = (), won: Any = None, first: Any = None) -> str:
        """Returns the state of one config with these rows, its trial ``first`` a safe one unless given."""
        first = first or trial(tile(64, 64), 1.0, problem())
        (found,) = standings([first], verifications, lifts, won, [])
        return found.state

    def test_later_findings_count(self) -> None:
        """A proof at any time that fails takes the word safe away, also from a winner."""
        first = trial(tile(64, 64), 1.0, problem())
        for won in (None, winner(first)):
            assert self.state([proof(first)], won=won) == "safe"
            assert self.state([proof(first, Verdict.RACY)], won=won) == "racy"

    def test_a_lift_takes_the_force_of_what_came_before(self) -> None:
        """What failed may be tried again, and is neither safe nor unsafe until it was."""
        bad = trial(tile(64, 64), 1.0, problem(), Verdict.WRONG)
        assert self.state(first=bad, lifts=[lift(bad, 999.0)]) == "wrong"
        assert self.state(first=bad, lifts=[lift(bad, 2000.0)]) == LIFTED
        assert self.state([proof(bad)], [lift(bad, 2000.0)], first=bad) == "safe"

    def test_a_crash_is_answered_by_a_later_proof_and_a_wrong_result_is_not(self) -> None:
        """The machine's faults pass, the config's stay."""
        for verdict, state in ((Verdict.CRASHED, "safe"), (Verdict.WRONG, "wrong")):
            bad = trial(tile(64, 64), 1.0, problem(), verdict)
            assert self.state([proof(bad)], first=bad) == state

    def test_wrong_behind_another_forward_is_not_wrong_behind_this_one(self) -> None:
        """A later judgement through other upstream configs does not count."""
        first = trial(tile(64, 64), 1.0, problem(), proven_with={"forward": "a"})
        assert self.state([proof(first, Verdict.WRONG, proven_with={"forward": "b"})], first=first) == "safe"
        assert self.state([proof(first, Verdict.WRONG)], first=first) == "wrong"

    def test_a_time_at_other_sizes_or_of_no_kind_is_none(self) -> None:
        """Times that do not compare are not compared, and an edited row's may be anything."""
        for figures in ({"ms": 1.0, "timed_at": "smaller"}, {"ms": "fast"}, {"ms": -1.0}, {}):
            (found,) = standings([trial(tile(64, 64), 1.0, problem(), figures=figures)], [], [], None, [])
            assert found.ms is None

    def test_the_runner_up_is_the_fastest_other_safe_config(self) -> None:
        """Neither a faster wrong one nor one without a proof is second."""
        rows = sweep(problem())
        found = standings(rows, [], [], winner(rows[0]), [])
        second = runner_up(found, rows[0].config)
        assert second is not None
        assert second.config == FOREIGN


def test_a_cell_holds_its_stages_and_variants_the_best_first() -> None:
    """Safe ones lead, failed ones come last however fast, and what has no tile stands outside."""
    at = problem()
    extra = [trial(tile(64, 64, variant="descriptors"), 0.9, at), trial(tile(64, 64, stages=4), 0.1, at, level=0)]
    found = standings([*sweep(at), *extra], [], [], None, [])
    cells, rest = keys.folded(found)
    (cell,) = (each for each in cells if (each["m"], each["n"], each["warps"]) == (64, 64, 4))
    assert [(found[number].ms, found[number].state) for number in cell["configs"]] == [
        (0.9, "safe"),
        (1.0, "safe"),
        (0.1, "timed only"),
        (0.5, "wrong"),
    ]
    assert [found[number].config for number in rest] == [FOREIGN]
    assert [(each["warps"], each["m"], each["n"]) for each in cells] == [
        (4, 64, 64),
        (4, 128, 64),
        (8, 64, 128),
        (8, 128, 128),
    ]


def test_a_map_that_could_not_be_drawn_is_none() -> None:
    """Tiles without end, which only a strange database has, become rows instead of millions of places."""
    found = standings(
        [trial(tile(number, number, number), 1.0, problem()) for number in range(1, 20)], [], [], None, []
    )
    assert keys.folded(found) == ([], list(range(19)))


def test_a_kernel_tells_winner_margins_and_cost(place: Path) -> None:
    """The figures of the page are those of the rows."""
    data = Elements((place / "usual.html").read_text(encoding="utf-8")).data
    by_hash = {each["hash"]: each for each in data["problems"]}
    first, third = by_hash[problem().hash], by_hash[problem("NVIDIA B200", rank_dim=0).hash]
    kernel = first["kernels"][0]
    found = kernel["winner"]
    assert kernel["configs"][found["config"]]["hash"] == tile(64, 64).hash
    assert kernel["configs"][found["second"]]["implementation"] == "sdpa"
    assert found["behind"] == pytest.approx(0.1)
    assert found["margins"] == [["out", 1e-3, 0.25]]
    assert kernel["cost"] == {
        "seconds": 9.0,
        "tried": 6,
        "total": 6,
        "states": [["safe", 3], ["out_of_resources", 1], ["timed only", 1], ["wrong", 1]],
    }
    assert (third["ms"], third["level"], third["kernels"][0]["winner"]) == (None, None, None)
    assert first["facets"] == {
        "gpu": "NVIDIA H200",
        "dtype": "bfloat16",
        "head_dim": "64",
        "rank": "16",
        "causal": "yes",
    }


def test_every_stored_problem_is_on_the_page(place: Path) -> None:
    """What ``cache list`` counts and what the page holds are the same problems."""
    stored = everything(Store.open(place / "usual" / "flashbias.db"))
    data = Elements((place / "usual.html").read_text(encoding="utf-8")).data
    assert {each["hash"] for each in data["problems"]} == set(stored)
