"""Packs: what is written is read back, what meets agrees whatever the order, what is hostile is refused line by line."""

from __future__ import annotations

import io
import itertools
import json
import sqlite3
import tempfile
import tracemalloc
from collections.abc import Iterable
from pathlib import Path

import pytest
import store_examples as examples
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_db import intake, packs, snapshot
from cache_db.batch import Batch, Shared
from cache_db.errors import Damaged, PackRefused, Unavailable
from cache_db.models import Lift, Trial, Verdict, Verification
from cache_db.store import Store

PROBLEMS = [examples.problem(fields={"number": number}) for number in range(2)]
VERDICTS = [Verdict.SAFE, Verdict.WRONG, Verdict.CRASHED]
ODD = st.one_of(st.floats(), st.booleans(), st.integers(-(10**20), 10**20), st.text(max_size=5))

blocks, at, few = st.integers(1, 2), st.sampled_from(PROBLEMS), st.integers(0, 2).map(float)
trials = st.builds(
    lambda block, verdict, where, level, time, seed, host: examples.trial(
        block, verdict, where, level=level, created_at=time, seed=seed, host=host
    ),
    blocks, st.sampled_from(VERDICTS), at, st.integers(0, 2), few, st.integers(0, 1), st.sampled_from("ab"),
)  # fmt: skip
winners = st.builds(
    lambda block, where, level, ms, time, tried: examples.winner(
        block, where, level=level, ms=ms, created_at=time, tried=tried
    ),
    blocks, at, st.integers(0, 2), few, few, st.integers(0, 1),
)  # fmt: skip
verifications = st.builds(
    lambda block, verdict, where, level, time: examples.verification(
        block, verdict=verdict, problem=where, level=level, created_at=time
    ),
    blocks, st.sampled_from(VERDICTS), at, st.integers(0, 2), few,
)  # fmt: skip
lifts = st.builds(lambda block, where, time: examples.lift(block, where, created_at=time), blocks, at, few)
contents = st.lists(st.one_of(trials, winners, verifications, lifts), max_size=8)


def text(store: Store) -> str:
    """Returns all of ``store`` as a pack."""
    stream = io.StringIO()
    packs.write(store.by_problem(), stream)
    return stream.getvalue()


def parts(pack: str | bytes) -> tuple[list[Shared], list[packs.Refusal]]:
    """Returns the rows of a pack, and what was refused of it."""
    found = list(packs.read(io.BytesIO(pack.encode() if isinstance(pack, str) else pack)))
    return [row for row in found if not isinstance(row, packs.Refusal)], [
        row for row in found if isinstance(row, packs.Refusal)
    ]


def merged(sources: Iterable[Iterable[Shared]]) -> str:
    """Returns the pack that the ``sources`` make in this order."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store.open(Path(folder) / "merged.db")
        for source in sources:
            snapshot.fill(store, source)
        return text(store)


@settings(max_examples=5, deadline=None)
@given(st.lists(contents, min_size=3, max_size=3))
def test_merging_is_idempotent_commutative_and_associative(found: list[list[Shared]]) -> None:
    """Packs that meet in whatever order, number and grouping give the same bytes."""
    first, second, third = found
    whole = merged(found)
    assert merged([third, second, first, second, third]) == whole
    assert merged([parts(merged([first, second]))[0], third]) == whole
    assert merged([first, parts(merged([third, second]))[0]]) == whole
    assert merged([parts(whole)[0], parts(whole)[0]]) == whole


@settings(max_examples=5, deadline=None)
@given(contents, contents, contents)
def test_imports_know_no_order_and_let_nothing_out_of_quarantine(
    here: list[Shared], first: list[Shared], second: list[Shared]
) -> None:
    """Two packs may come in either order, twice; whatever barred a config here, or a row in its place, does so after."""
    outcomes = set()
    for order in ((first, second), (second, first, first)):
        with tempfile.TemporaryDirectory() as folder:
            store = Store.open(Path(folder) / "flashbias.db")
            snapshot.fill(store, here)
            before, lifted = barred(store), store.find(Lift)
            for pack in order:
                intake.take(store, pack)
            outcomes.add(text(store))
            assert before <= barred(store)
            assert store.find(Lift) == lifted
    assert len(outcomes) == 1


def barred(store: Store) -> set[tuple[str, str, str]]:
    """Returns which kind of row keeps which config from running, as no lift took its force."""
    lifted: dict[tuple[str, str], float] = {}
    for lift in store.find(Lift):
        lifted[lift.problem.hash, lift.config.hash] = lift.created_at  # oldest first
    rows: list[Trial | Verification] = [*store.find(Trial), *store.find(Verification)]
    return {
        (type(row).__name__, row.problem.hash, row.config.hash)
        for row in rows
        if row.verdict is not Verdict.SAFE and row.created_at > lifted.get((row.problem.hash, row.config.hash), -1.0)
    }


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text(max_size=5), ODD, max_size=4), st.text(max_size=20))
def test_a_line_holds_all_of_a_row(figures: dict[str, bool | float | str], reason: str) -> None:
    """Any figures and any words come back as they were, in one line of printable ASCII."""
    reason = reason.encode("utf-8", "replace").decode()
    figures = {name.encode("utf-8", "replace").decode(): value for name, value in figures.items() if clean(value)}
    row = examples.trial(figures=figures, reason=reason)
    line = packs.line(row)
    assert line.isascii()
    assert line.isprintable()
    found = packs.parse(line.encode())
    assert isinstance(found, Trial)
    assert packs.line(found) == line
    for name, value in figures.items():
        assert type(found.figures[name]) is type(value)
        assert found.figures[name] == value or value != value  # noqa: PLR0124 - NaN


def clean(value: object) -> bool:
    """Returns whether a text can be stored at all."""
    return not isinstance(value, str) or value.encode("utf-8", "replace").decode() == value


def test_export_and_import_keep_all_but_the_level(tmp_path: Path) -> None:
    """An empty database that takes a pack in has its rows, unproven; what was unsafe is the same to the byte."""
    there, here = Store.open(tmp_path / "there.db"), Store.open(tmp_path / "here.db")
    rows: list[Shared] = [
        examples.trial(16), examples.trial(32, Verdict.WRONG, level=0), examples.winner(16), examples.verification(16),
    ]  # fmt: skip
    snapshot.fill(there, rows)
    found, refused = parts(text(there))
    assert not refused
    assert intake.take(here, found) == intake.Taken(stored=4)
    assert intake.take(here, found) == intake.Taken(known=4)
    kept = [line for line in text(there).splitlines() if '"wrong"' in line]
    assert kept == [line for line in text(here).splitlines() if '"wrong"' in line]
    assert text(here) == text(there).replace('"level": 2', '"level": 0')


def test_what_was_proven_here_stays_so(tmp_path: Path) -> None:
    """One's own rows that come back change nothing; another's winner, however fast, takes the place of none proven here."""
    store = Store.open(tmp_path / "flashbias.db")
    snapshot.fill(store, [examples.trial(16), examples.winner(16), examples.verification(16)])
    before = text(store)
    assert intake.take(store, parts(before)[0]).stored == 0
    faster = examples.winner(32, level=3, ms=0.001, created_at=9e9)
    later = examples.trial(16, level=3, created_at=9e9)
    assert intake.take(store, [faster, later]).stored == 0
    assert text(store) == before
    bad = examples.verification(16, verdict=Verdict.RACY, level=0, created_at=9e9)
    assert intake.take(store, [bad], dry=True) == intake.Taken(known=1, barred=(faster.problem.key("forward"),))
    assert text(store) == before
    assert intake.take(store, [bad]) == intake.Taken(stored=1, barred=(faster.problem.key("forward"),))


def test_an_old_failure_takes_no_place_of_one_that_bars(tmp_path: Path) -> None:
    """What was lifted here has no force: such a row from elsewhere must not stand where a later failure does."""
    store = Store.open(tmp_path / "flashbias.db")
    crashed = examples.trial(16, Verdict.CRASHED, level=0, created_at=10.0)
    snapshot.fill(store, [crashed, examples.lift(16, created_at=8.0)])
    assert intake.take(store, [examples.trial(16, Verdict.WRONG, level=0, created_at=5.0)]).stored == 0
    assert store.find(Trial) == [crashed]
    wrong = examples.trial(16, Verdict.WRONG, level=0, created_at=9.0)
    assert intake.take(store, [wrong]).stored == 1
    assert store.find(Trial) == [wrong]


def test_a_database_as_a_pack_holds_the_same_rows(tmp_path: Path) -> None:
    """Text and database say the same; the database is one file, good as a seed, without pins, leases or what others keep."""
    store = examples.filled(tmp_path / "flashbias.db")
    store.put_pin(examples.pin())
    store.add_lift(examples.lift())
    copy = Store.open(tmp_path / "copy.db")
    snapshot.fill(copy, parts(text(store))[0])
    snapshot.write(copy, tmp_path / "pack.sqlite")
    rows = list(snapshot.read(tmp_path / "pack.sqlite"))
    assert merged([[row for row in rows if not isinstance(row, packs.Refusal)]]) == text(store)
    assert Store.open_sealed(tmp_path / "pack.sqlite").winners(examples.problem()) == {"forward": examples.winner()}
    assert Store.open_sealed(tmp_path / "pack.sqlite").counts()["pins"] == 0


GOOD = packs.line(examples.winner())
DATA = json.loads(GOOD)


def changed(**changes: object) -> str:
    """Returns a winner's line with some of its fields changed."""
    return json.dumps({**DATA, **changes})


HOSTILE = {
    "no JSON": "DROP TABLE flashbias_winners; --",
    "a list": "[1, 2]",
    "deep": "[" * 100_000,
    "deep inside": '{"kind": ' + '{"a":' * 50_000 + "1" + "}" * 50_001,
    "NaN": GOOD.replace("0.125", "NaN"),
    "infinite time": GOOD.replace("0.125", "1e999"),
    "a number of a million digits": GOOD.replace("0.125", "9" * 1_000_00),
    "an unknown kind": changed(kind="pin"),
    "no kind": json.dumps({name: value for name, value in DATA.items() if name != "kind"}),
    "a kind that is a list": changed(kind=["winner"]),
    "an unknown field": changed(command="rm -rf /"),
    "a level too high": changed(level=9),
    "a level as text": changed(level="2"),
    "a flag as a number": changed(complete=1),
    "a config that is a path": changed(config="/etc/passwd"),
    "params within params": changed(config={**DATA["config"], "params": {"BLOCK_M": {"a": 1}}}),
    "a param that has no name": changed(config={**DATA["config"], "params": {"BLOCK_M": None}}),
    "a spec that is none": changed(problem={**DATA["problem"], "spec": "os; import os"}),
    "a name twice": GOOD.replace('"level": 2', '"level": 2, "level": 3'),
    "half a surrogate": GOOD.replace('"forward"', '"\\ud800"'),
    "no UTF-8": "\udcff",
    "a verdict": changed(verdict="fine"),
    "a seed of 80 bits": packs.line(examples.trial()).replace('"seed": 17', f'"seed": {2**80}'),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_line_is_refused_and_its_neighbours_are_read(name: str) -> None:
    """Whatever a line holds, it is data at most: it is refused with its number and a short reason."""
    header = json.dumps({"pack": "flashbias", "schema_version": 1})
    pack = "\n".join([header, GOOD, HOSTILE[name], GOOD, ""]).encode("utf-8", "surrogateescape")
    rows, refused = parts(pack)
    assert rows == [examples.winner()] * 2
    assert [each.where for each in refused] == ["line 3"]
    assert 0 < len(refused[0].reason) <= 400


def test_sql_in_a_row_stays_text(tmp_path: Path) -> None:
    """A legal row may say anything; it is stored as said."""
    row = examples.trial(reason="'); DROP TABLE flashbias_trials; --", host="../../etc/passwd", gpu_uuid="$(reboot)")
    store = Store.open(tmp_path / "flashbias.db")
    intake.take(store, [packs.parse(packs.line(row).encode())])
    assert store.find(Trial) == [intake.demoted(row)]


def test_a_huge_line_costs_no_memory() -> None:
    """A line of 16 MiB is stepped over in pieces; the next one is read."""

    class Endless(io.RawIOBase):
        """A pack whose second line does not end for long."""

        def __init__(self) -> None:
            self.left = [text(None).encode(), *([b"x" * (1 << 20)] * 16), f"\n{GOOD}\n".encode()]

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
            if not self.left:
                return 0
            piece = self.left.pop(0)
            count = min(len(buffer), len(piece))
            buffer[:count] = piece[:count]
            if piece[count:]:
                self.left.insert(0, piece[count:])
            return count

    def text(_: None) -> str:
        return json.dumps({"pack": "flashbias", "schema_version": 1}) + "\n"

    tracemalloc.start()
    found = list(packs.read(io.BufferedReader(Endless())))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [type(each).__name__ for each in found] == ["Refusal", "Winner"]
    assert peak < 12 << 20


@pytest.mark.parametrize(
    ("pack", "said"),
    [
        (b"", ""),
        (b"no pack\n", "no pack"),
        (b'{"pack": "other", "schema_version": 1}\n', "no pack"),
        (b"x" * (2 << 20), "no pack"),
        (b'{"pack": "flashbias", "schema_version": 2}\n', "upgrade flashbias"),
        (b'{"pack": "flashbias"}\n', "None"),
    ],
)
def test_what_is_no_pack_is_refused_as_a_whole(pack: bytes, said: str) -> None:
    """Without our header nothing is taken for a row; nothing at all is an empty pack."""
    if not said:
        assert list(packs.read(io.BytesIO(pack))) == []
        return
    with pytest.raises(PackRefused, match=said):
        list(packs.read(io.BytesIO(pack)))


def test_a_hostile_database_is_read_row_by_row_and_runs_nothing(tmp_path: Path) -> None:
    """Views, huge values and edited rows are refused or not seen; the rest is read."""
    path = examples.filled(tmp_path / "pack.sqlite", rows=3).path
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE flashbias_trials SET reason = printf('%.*c', 2000000, 'x') WHERE rowid = 2")
        connection.execute("UPDATE flashbias_trials SET params = '{}' WHERE rowid = 3")
        connection.execute("DROP TABLE flashbias_verifications")
        connection.execute("CREATE VIEW flashbias_verifications AS SELECT * FROM flashbias_trials")
    connection.close()
    found = list(snapshot.read(path))
    refused = [each for each in found if isinstance(each, packs.Refusal)]
    assert {each.where for each in refused} == {"trial 2", "trial 3"}
    assert [type(each).__name__ for each in found if each not in refused] == ["Winner", "Trial"]


@pytest.mark.parametrize("virtual", [False, True])
def test_a_database_that_would_compute_is_not_let(tmp_path: Path, *, virtual: bool) -> None:
    """A computed column, which may take hours, is refused; a virtual table, whose module would run, is not seen."""
    path = examples.filled(tmp_path / "pack.sqlite", rows=3).path
    with sqlite3.connect(path) as connection:
        names = [column[1] for column in connection.execute("PRAGMA table_info(flashbias_trials)")]
        connection.execute("DROP TABLE flashbias_trials")
        if virtual:
            connection.execute(f"CREATE VIRTUAL TABLE flashbias_trials USING fts5({', '.join(names)})")
        else:
            computed = [f"{name} AS (hex(zeroblob(9)))" if name == "reason" else name for name in names]
            connection.execute(f"CREATE TABLE flashbias_trials({', '.join(computed)})")
    connection.close()
    if virtual:
        assert not [each for each in snapshot.read(path) if isinstance(each, Trial)]
        return
    with pytest.raises(PackRefused, match="computes columns of flashbias_trials"):
        list(snapshot.read(path))


def test_pages_that_form_a_ring_end(tmp_path: Path) -> None:
    """Where every branch of a table leads to the same page, each of its rows is read once at most."""
    store = examples.filled(tmp_path / "pack.sqlite", rows=300)
    with sqlite3.connect(store.path) as connection:
        (size,) = connection.execute("PRAGMA page_size").fetchone()
        (root,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'flashbias_trials'").fetchone()
    connection.close()
    data = bytearray(store.path.read_bytes())
    start = (root - 1) * size
    assert data[start] == 5, "a page with branches"
    count = int.from_bytes(data[start + 3 : start + 5], "big")
    cells = [int.from_bytes(data[start + at : start + at + 2], "big") for at in range(12, 12 + 2 * count, 2)]
    first = bytes(data[start + cells[0] : start + cells[0] + 4])
    for cell in cells:
        data[start + cell : start + cell + 4] = first
    data[start + 8 : start + 12] = first
    store.path.write_bytes(data)
    found: list[Shared | packs.Refusal] = []
    with pytest.raises(Damaged):
        found.extend(snapshot.read(store.path))
    assert len(found) < 300


def test_a_stream_without_lines_is_given_up() -> None:
    """What has no end of its own, as /dev/zero, is no pack after its first mebibyte."""
    with Path("/dev/zero").open("rb") as stream, pytest.raises(PackRefused, match="no pack"):
        list(packs.read(stream))


def test_a_database_that_is_none_or_in_use_is_refused(tmp_path: Path) -> None:
    """Garbage, another program's database, a newer schema, and one in the middle of a write."""
    path = tmp_path / "pack.sqlite"
    path.write_bytes(snapshot.MAGIC + b"\xa5" * 5000)
    with pytest.raises(Damaged):
        list(snapshot.read(path))
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE other (name TEXT)")
    connection.close()
    with pytest.raises(PackRefused, match="not a tuning database"):
        list(snapshot.read(path))
    path.unlink()
    examples.filled(path)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE flashbias_meta SET schema_version = 7")
    connection.close()
    with pytest.raises(PackRefused, match="schema version 7"):
        list(snapshot.read(path))
    Path(f"{path}-journal").touch()
    with pytest.raises(Unavailable, match="being written"):
        list(snapshot.read(path))


def test_order_of_a_pack_is_that_of_its_rows_not_of_their_coming(tmp_path: Path) -> None:
    """By GPU, then problem, kernel and kind; winners first. Two packs joined by hand are one."""
    rows: list[Shared] = [
        examples.trial(16, at=at, kernel=kernel)
        for at, kernel in itertools.product([examples.problem(gpu_name="A"), examples.problem(gpu_name="B")], "fb")
    ]
    rows.append(examples.winner(16, at=examples.problem(gpu_name="B"), kernel="f"))
    store = Store.open(tmp_path / "flashbias.db")
    for row in reversed(rows):
        store.merge(Batch.of([row]))
    found = parts(text(store) + text(store))[0][:5]
    order = [(row.problem.gpu_name, row.kernel, type(row).__name__) for row in found]
    assert order == [
        ("A", "b", "Trial"),
        ("A", "f", "Trial"),
        ("B", "b", "Trial"),
        ("B", "f", "Winner"),
        ("B", "f", "Trial"),
    ]
