"""The race screen: the same launch on the same bits must give the same bits, every time.

Buffers are poisoned before each repeat, scratch too: what an earlier run left there is the right answer, and would
hide a missing barrier or a store that was never done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch

from autotune.gate.memory import NAN_BYTE, Arena

# Repeats of the two levels of proof, and of both in the interpreter, which runs programs one after another.
REPEATS: Final = {1: 3, 2: 300}
INTERPRETER_REPEATS: Final = 2
# A long screen looks at its count now and then, so that a racer does not run all of it.
REPEATS_A_LOOK: Final = 1000


def screen(
    launch: Callable[[], None], outputs: Arena, scratch: Arena, repeats: int, notice: Callable[[], None] = lambda: None
) -> tuple[int, int]:
    """Runs ``launch`` once for the expected bits and ``repeats`` times against them, compared on the device.

    Returns (repeats that differed, repeats done). Waits for the device once per ``REPEATS_A_LOOK`` repeats, and calls
    ``notice`` then: a long screen is no hang.
    """
    _run(launch, outputs, scratch)
    expected = outputs.words.clone()
    differed = torch.zeros((), dtype=torch.int64, device=expected.device)
    done = found = 0
    while done < repeats and not found:
        count = min(repeats - done, REPEATS_A_LOOK)
        for _ in range(count):
            _run(launch, outputs, scratch)
            differed += outputs.words.ne(expected).any()
        done += count
        found = int(differed)
        notice()
    return found, done


def _run(launch: Callable[[], None], outputs: Arena, scratch: Arena) -> None:
    outputs.fill(NAN_BYTE)
    scratch.fill(NAN_BYTE)
    launch()
