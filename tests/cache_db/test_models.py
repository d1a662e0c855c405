"""What names a problem and a config, and what the models refuse."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import store_examples as examples
from pydantic import ValidationError

from cache_db.models import Config, Problem, Trial, canonical_json, digest


def test_names_do_not_depend_on_order_process_or_hash_seed() -> None:
    """Two processes that describe the same thing in another order agree on its name."""
    code = (
        "import store_examples as e; from cache_db.models import Config, Problem; p = e.problem();"
        "q = Problem(**{**p.model_dump(), 'fields': dict(reversed(p.fields.items()))}); assert q == p;"
        "print(q.hash, q.key('forward'), e.config().hash)"
    )
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parents[1])])
    answers = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
            env=os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": seed},
        ).stdout.split()[0]
        for seed in ("0", "1")
    }
    assert answers == {examples.problem().hash}


def test_names_are_those_of_the_first_release() -> None:
    """A stored row of today must be found by every later version: the way names are made is frozen here."""
    assert canonical_json({"b": [1, 1.5, True], "a": "ü"}) == '{"a":"\\u00fc","b":[1,1.5,true]}'
    assert digest({"a": 1}) == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"
    assert examples.problem().key("forward") == digest([examples.problem().hash, "forward"])
    assert examples.config().hash == digest(examples.config().model_dump())


@pytest.mark.parametrize("column", [name for name in Problem.model_fields if name not in {"fields", "layout", "spec"}])
def test_every_column_is_part_of_the_name(column: str) -> None:
    """Problems that differ anywhere are different problems."""
    changed = 7 if column == "sm_count" else "other"
    assert examples.problem(**{column: changed}).hash != examples.problem().hash


@pytest.mark.parametrize(("left", "right"), [(1, True), (1, 1.0), (0, False), ("1", 1)])
def test_types_are_part_of_the_name(left: Any, right: Any) -> None:
    """A size of 1 is not the flag True, although Python says they are equal."""
    problems = [examples.problem(fields={"head_dim": value}) for value in (left, right)]
    configs = [Config(implementation="triton", variant="", params={"a": value}) for value in (left, right)]
    assert problems[0] != problems[1]
    assert configs[0] != configs[1]
    assert len({*problems}) == len({*configs}) == 2


def test_changed_copy_has_a_name_of_its_own() -> None:
    """A copy with other contents does not inherit the name computed for the original, and is validated."""
    config, problem = examples.config(), examples.problem()
    names = {config.hash, problem.hash}
    assert config.model_copy(update={"variant": "descriptor"}).hash not in names
    assert problem.model_copy(update={"layout": "strided"}).hash not in names
    assert config.model_copy() == config
    with pytest.raises(ValidationError):
        problem.model_copy(update={"layout": "diagonal"})


def test_computed_names_stay_out_of_dumps() -> None:
    """Looking at a hash changes neither what is stored nor what another process unpickles."""
    problem = examples.problem()
    before = problem.model_dump_json()
    assert problem.hash
    assert problem.model_dump_json() == before
    assert Problem.model_validate_json(before) == problem
    assert pickle.loads(pickle.dumps(problem)) == problem


@pytest.mark.parametrize(
    "change",
    [
        {"level": 4},
        {"level": "2"},
        {"verdict": "safe-ish"},
        {"seed": 2**63},
        {"created_at": float("nan")},
        {"seconds": float("inf")},
        {"figures": {"error": [1, 2]}},
        {"reason": None},
        {"note": "a field of a version to come"},
    ],
    ids=str,
)
def test_models_refuse_what_no_table_can_hold(change: dict[str, Any]) -> None:
    """A wrong row is refused where it is made, not where it is stored."""
    with pytest.raises(ValidationError):
        Trial(**{name: getattr(examples.trial(), name) for name in Trial.model_fields} | change)


def test_rows_cannot_be_changed() -> None:
    """A row is a fact: nobody changes it after it was made."""
    with pytest.raises(ValidationError, match="frozen"):
        examples.config().variant = "other"


def test_config_reads_well() -> None:
    """In messages a config is one line of words."""
    assert str(examples.config()) == "triton/pointer BLOCK_M=64 num_warps=4"
