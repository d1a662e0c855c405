"""Candidates of the caller's own: what is accepted, what is refused and how, and what the sweep makes of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

import autotune
from autotune import CacheMiss, Mode, Settings, SettingsError, resolve, spaces
from autotune.device import describe
from autotune.plan import Plan
from autotune.sandbox import Sandbox
from autotune.scene import Scene
from autotune.spec import load
from cache_db import open_layers
from cache_db.models import Config, Problem, Verdict
from tests.autotune.planted_spec import planted_problem
from tests.autotune.softmax_spec import softmax_config

DEVICE = describe(-1)
HERE = "tests.autotune.space_examples"


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    """Makes each test start like a new process."""
    autotune.forget()
    yield
    autotune.forget()


def offered(attribute: str, kernel: str = "forward") -> tuple[Config, ...]:
    """Returns the configs that a space of ``space_examples`` has for ``kernel``."""
    return spaces.offer(f"{HERE}:{attribute}", kernel, planted_problem(), DEVICE).configs


def tried(folder: Path, problem: Problem, kernel: str = "forward") -> dict[Config, Verdict]:
    """Returns the verdict of every stored trial."""
    return {row.config: row.verdict for row in open_layers(folder).trials(problem, kernel)}


def test_callable_and_list_offer_each_config_once_for_its_own_kernel() -> None:
    """Both forms mean the same, and a generator may be asked for one kernel after the other."""
    assert offered("forward") == (softmax_config(64), softmax_config(32), softmax_config(64, "zeroed_row"))
    assert offered("forward", "backward") == ()
    assert offered("listed") == (softmax_config(64), softmax_config(256))
    assert offered("listed", "backward") == (softmax_config(128),)
    assert (offered("generated"), offered("generated", "backward")) == ((softmax_config(64),), ())
    assert offered("empty") == ()


def test_config_that_the_rules_refuse_is_told_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    """A refused config is not offered; it is counted, and named in the log of level debug."""
    with caplog.at_level(logging.DEBUG, logger="autotune"):
        found = spaces.offer(f"{HERE}:forward", "forward", planted_problem(), DEVICE)
    assert found.refused == ((softmax_config(8), "block 8 does not hold a row of 19"),)
    assert f"forward {softmax_config(8)} is refused: block 8 does not hold a row of 19" in caplog.text


@pytest.mark.parametrize(
    ("attribute", "expected", "got"),
    [
        ("nowhere", "a module that this process can import, with that attribute", "AttributeError"),
        ("number", "a callable (kernel, problem, device) or an iterable", "7 (int)"),
        ("text", "a callable (kernel, problem, device) or an iterable", "'forward' (str)"),
        ("endless", "10000 configs at most", "more"),
        ("failing", "configs", "KeyError: 'planted'"),
        ("untold", "an iterable of Config for kernel 'forward'", "Untold, which has no text"),
        ("at_import", "a module that this process can import, with that attribute", "SystemExit: 3"),
        ("leaving", "an iterable of Config for kernel 'forward'", "SystemExit: 3"),
        ("leaving_late", "configs", "SystemExit: 3"),
        ("one_argument", "an iterable of Config for kernel 'forward'", "TypeError"),
        ("returns_nothing", "an iterable of Config for kernel 'forward'", "TypeError"),
        ("returns_dicts", "a Config(", "{'block': 64} (dict)"),
        ("returns_pairs", "a Config(", "(tuple)"),
        ("unspeakable", "a Config(", "a Unspeakable"),
        ("configs_alone", "pairs (kernel, Config)", "(Config)"),
        ("unknown_kernel", "a kernel among forward, backward", "'sideways'"),
        ("kernel_is_no_text", "a kernel among forward, backward", "3 (int)"),
        ("other_implementation", "configs of implementation triton", "'cuda'"),
        ("list_for_a_number", "a Config(", "params.block"),
        ("no_params", "a Config(", "params"),
        ("not_finite", "a Config(", "ValueError: Out of range float"),
        ("too_long_to_print", "a Config(", "ValueError"),
        ("half_a_config", "a Config(", "AttributeError"),
    ],
)
def test_what_is_no_space_is_refused_by_name(tmp_path: Path, attribute: str, expected: str, got: str) -> None:
    """Whatever a space gives instead of configs, the first call says which space, what was expected and what came."""
    chosen = Settings(cache_dir=tmp_path, space=f"{HERE}:{attribute}")
    with pytest.raises(SettingsError) as caught:
        resolve(planted_problem(), DEVICE, chosen)
    assert str(caught.value).startswith(f"space '{HERE}:{attribute}': expected {expected}")
    assert got in str(caught.value).partition(", got ")[2]
    assert open_layers(tmp_path).counts()["trials"] == 0


def test_space_cannot_change_the_callers_problem() -> None:
    """It is handed a copy: what it does to that is nobody else's."""
    problem = planted_problem()
    spaces.offer(f"{HERE}:spoiling", "forward", problem, DEVICE)
    assert problem.fields == planted_problem().fields


def test_module_that_cannot_be_imported_is_told_with_the_cure(tmp_path: Path) -> None:
    """A module that is not found, or fails, is an error that says where modules are looked for."""
    with pytest.raises(SettingsError, match=r"no_such_module.*PYTHONPATH") as caught:
        resolve(planted_problem(), DEVICE, Settings(cache_dir=tmp_path, space="no_such_module:x"))
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_space_is_not_even_imported_where_nothing_is_tuned(tmp_path: Path) -> None:
    """In modes that never sweep a space has no effect."""
    with pytest.raises(CacheMiss):
        resolve(planted_problem(), DEVICE, Settings(mode=Mode.ASSERT, cache_dir=tmp_path, space="no_such_module:x"))


def test_sweep_tries_a_spaces_configs_beside_the_specs_own(tmp_path: Path) -> None:
    """New ones are tried, the spec's own and those named twice once, refused ones never; the gate judges them all."""
    problem = planted_problem("32")
    resolve(problem, DEVICE, Settings(cache_dir=tmp_path, space=f"{HERE}:forward"))
    assert tried(tmp_path, problem) == {
        softmax_config(32): Verdict.SAFE,
        softmax_config(64): Verdict.SAFE,
        softmax_config(64, "zeroed_row"): Verdict.WRONG,
    }
    assert tried(tmp_path, problem, "backward") == {softmax_config(32): Verdict.SAFE}
    winner = open_layers(tmp_path).winners(problem)["forward"]
    assert (winner.tried, winner.total, winner.complete) == (3, 3, True)


def test_interpreter_tries_three_configs_of_a_space_beside_three_of_the_spec() -> None:
    """The cut for slow interpretation does not leave out what the caller asked for."""
    problem, chosen = planted_problem("32 33 34 35"), Settings(space=f"{HERE}:many")
    scene = Scene(problem, DEVICE, chosen, load(problem.spec), open_layers(None), Sandbox(problem, DEVICE))
    expected = [softmax_config(block) for block in (32, 33, 34, 64, 128, 256)]
    assert list(Plan.of(scene, "forward").candidates) == expected


def test_forbidden_implementation_is_counted_and_not_tried() -> None:
    """A restriction to other implementations holds for a space too, and such a sweep never passes for a whole one."""
    problem, chosen = planted_problem("32"), Settings(space=f"{HERE}:listed", implementations=("cute",))
    scene = Scene(problem, DEVICE, chosen, load(problem.spec), open_layers(None), Sandbox(problem, DEVICE))
    plan = Plan.of(scene, "forward")
    assert (plan.candidates, plan.total) == ((), 3)


def test_stored_winner_is_a_hit_unless_the_sweep_is_to_be_finished(tmp_path: Path) -> None:
    """Prewarming tries what a space adds to a tuned problem, once; a plain call takes the winner that is there."""
    problem = planted_problem("32")
    plain = Settings(cache_dir=tmp_path)
    resolve(problem, DEVICE, plain)
    swept = []
    for chosen in (
        Settings(cache_dir=tmp_path, space=f"{HERE}:forward"),
        Settings(cache_dir=tmp_path, space=f"{HERE}:forward", finish=True),
        Settings(cache_dir=tmp_path, space=f"{HERE}:forward", finish=True),
        Settings(cache_dir=tmp_path, finish=True),
    ):
        autotune.forget()
        swept.append(resolve(problem, DEVICE, chosen).swept)
    assert swept == [False, True, False, False]
    assert softmax_config(64) in tried(tmp_path, problem)
    assert open_layers(tmp_path).winners(problem)["forward"].total == 3
