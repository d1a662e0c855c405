"""What is timed where memory is short: half as much each time, and still the same problem."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest

from autotune.device import describe
from autotune.spec import Case
from flashbias.kernels.cases import SHORTEST
from flashbias.kernels.problem import Shape, problem
from flashbias.kernels.spec import ATTENTION

DEVICE = replace(describe(-1), name="NVIDIA H200", sm_count=132, capability=(9, 0))
SHAPES = {
    "large": Shape(batch=8, nheads=32, seqlen_q=2048, seqlen_k=2048, headdim=64, rank=8, grads=("q", "k", "v")),
    "grouped": Shape(batch=4, nheads=24, nheads_kv=8, seqlen_q=1024, seqlen_k=4096, headdim=128, mask="bool"),
    "few queries": Shape(batch=2, nheads=32, seqlen_q=1, seqlen_k=8192, headdim=64, rank=8),
    "packed": Shape(batch=16, nheads=16, seqlen_q=1024, seqlen_k=1024, headdim=64, rank=8, varlen=True, causal=True),
}


def steps(shape: Shape) -> list[Case]:
    """Returns the timed case and all that it shrinks to."""
    found = problem(shape, DEVICE)
    made = [ATTENTION.representative(found, DEVICE)]
    while (smaller := ATTENTION.smaller(found, made[-1])) is not None:
        made.append(smaller)
    return made


def elements(shape: Shape, case: Case) -> int:
    """Returns how many elements inputs, results and buffers of a case have together."""
    found = problem(shape, DEVICE)
    total = 0
    for kernel in ATTENTION.kernels(found):
        config = ATTENTION.default(kernel, found, DEVICE)
        specs = [
            *ATTENTION.outputs(kernel, found, case).values(),
            *ATTENTION.scratch(kernel, found, config, case).values(),
        ]
        total += sum(math.prod(spec.shape) for spec in specs)
    return total


def tiles(case: Case) -> int:
    """Returns how many 128-row query tiles a case has."""
    lengths = str(case.sizes.get("lengths_q", case.sizes["seqlen_q"])).split(",")
    rows = sum(-(-int(each) // 128) for each in lengths)
    return int(case.sizes["batch"]) * int(case.sizes["nheads"]) * rows


@pytest.mark.parametrize("name", SHAPES)
def test_each_step_takes_less_and_the_last_is_small(name: str) -> None:
    """No step takes more than the one before, few lead from the whole to a sixteenth or less, and none changes the name."""
    made = steps(SHAPES[name])
    sizes = [elements(SHAPES[name], case) for case in made]
    assert all(after <= before for before, after in pairwise(sizes))
    assert sizes[-1] <= sizes[0] / 16
    assert len(made) < 24
    assert {case.name for case in made} == {"representative"}
    assert len({tuple(case.sizes.values()) for case in made}) == len(made)


@pytest.mark.parametrize("name", SHAPES)
def test_what_the_fields_fix_stays(name: str) -> None:
    """Query heads stay in whole groups, and no length falls under the least that a bucket means."""
    shape = SHAPES[name]
    for case in steps(shape):
        assert int(case.sizes["nheads"]) == int(case.sizes["nheads_kv"]) * (shape.nheads // shape.kv_heads)
        for side in "qk":
            lengths = {
                int(each) for each in str(case.sizes.get(f"lengths_{side}", case.sizes[f"seqlen_{side}"])).split(",")
            }
            assert len(lengths) == 1
            least = SHORTEST if (shape.seqlen_q if side == "q" else shape.seqlen_k) > 64 else 1
            assert min(lengths) >= least


@pytest.mark.parametrize("name", ["large", "grouped", "packed"])
def test_a_wave_of_the_device_stays_as_long_as_it_can(name: str) -> None:
    """Until keys alone can be fewer, every multiprocessor has a tile of queries."""
    made = steps(SHAPES[name])
    assert tiles(made[0]) >= DEVICE.sm_count
    first_below = next(number for number, case in enumerate(made) if tiles(case) < DEVICE.sm_count)
    longest = [max(map(int, str(case.sizes.get("lengths_k", case.sizes["seqlen_k"])).split(","))) for case in made]
    assert longest[first_below - 1] == SHORTEST
    assert first_below >= 3
