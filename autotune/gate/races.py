"""The race screen: the same launch on the same bits must give the same bits, every time.

Buffers are poisoned before each repeat, scratch too: what an earlier run left there is the right answer, and would
hide a missing barrier or a store that was never done. On a GPU the repeats take turns: alone on a warm L2, on a cold
one, and beside a stream that keeps multiprocessors and memory busy. Each shifts when programs start and loads arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from typing import Final

import torch

from autotune.gate.memory import NAN_BYTE, Arena

# Repeats of the two levels of proof, and of both in the interpreter, which runs programs one after another.
REPEATS: Final = {1: 3, 2: 300}
INTERPRETER_REPEATS: Final = 2
# A long screen looks at its count now and then, so that a racer does not run all of it.
REPEATS_A_LOOK: Final = 1000
SMALLEST_FLUSH: Final = 64 << 20


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
    with _surroundings(expected.device) as turns:
        while done < repeats and not found:
            count = min(repeats - done, REPEATS_A_LOOK)
            for _ in range(count):
                _run(launch, outputs, scratch, next(turns))
                differed += outputs.words.ne(expected).any()
            done += count
            found = int(differed)
            notice()
    return found, done


def _run(
    launch: Callable[[], None], outputs: Arena, scratch: Arena, surround: Callable[[], None] = lambda: None
) -> None:
    outputs.fill(NAN_BYTE)
    scratch.fill(NAN_BYTE)
    surround()
    launch()


@contextmanager
def _surroundings(device: torch.device) -> Iterator[Iterator[Callable[[], None]]]:
    """Gives what is done just before a launch, in turn: nothing, the L2 emptied, work started on another stream."""
    if device.type != "cuda":
        yield cycle([lambda: None])
        return
    l2_bytes = int(torch.cuda.get_device_properties(device).L2_cache_size)
    buffer = torch.empty(max(2 * l2_bytes, SMALLEST_FLUSH), dtype=torch.uint8, device=device)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))  # what had this memory before may still be at work

    def alone() -> None:
        return

    def cold() -> None:
        buffer.zero_()

    def busy() -> None:
        with torch.cuda.stream(stream):
            buffer.zero_()

    yield cycle([alone, cold, busy])
    stream.synchronize()  # the memory goes back to a stream that knows nothing of the other one
