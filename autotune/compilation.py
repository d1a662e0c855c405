"""Compiles the candidates of a whole problem in the background, while earlier kernels are measured and proven."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from typing import Final

from autotune.sandbox import Outcome, Sandbox
from autotune.threads import start
from cache_db.models import FINAL, Config

Item = tuple[str, Config]
Compiled = tuple[Config, Outcome]
POLL_SECONDS: Final = 0.05


class Compilation:
    """One pass over ``items`` (kernel, config) in their order, results kept per kernel until asked for.

    A compile that crashed, hung or was killed is tried once more after all others. Raises NoThread.
    """

    def __init__(self, sandbox: Sandbox, items: Sequence[Item]) -> None:
        self._sandbox = sandbox
        self._results: queue.SimpleQueue[tuple[str, Config, Outcome] | Exception] = queue.SimpleQueue()
        self._waiting: dict[str, list[Compiled]] = {}
        self._open = {kernel: sum(name == kernel for name, _ in items) for kernel, _ in items}
        self._abandoned: set[str] = set()
        self._thread = threading.Thread(target=self._run, args=(list(items),), name="autotune-compile", daemon=True)
        start(self._thread)

    def take(self, kernel: str, seconds: float) -> list[Compiled]:
        """Returns what has been compiled for ``kernel`` since the last call, waiting up to ``seconds`` for something.

        Raises what the sandbox raised.
        """
        until = time.monotonic() + seconds
        while True:
            self._collect(min(POLL_SECONDS, max(until - time.monotonic(), 0.0)))
            ready = self._waiting.pop(kernel, [])
            if ready or self.finished(kernel) or time.monotonic() >= until:
                return ready

    def finished(self, kernel: str) -> bool:
        """Returns whether nothing of ``kernel`` is still to come."""
        return not self._waiting.get(kernel) and self._open.get(kernel, 0) == 0

    def abandon(self, kernel: str) -> None:
        """Compiles no more of ``kernel``; what is ready is dropped. Other compiles lose time only if some are left."""
        if self._open.get(kernel, 0):
            self._abandoned.add(kernel)
        self._waiting.pop(kernel, None)

    def close(self, seconds: float = 5.0) -> None:
        """Abandons everything and waits for the thread, which ends at its next result or when the sandbox closes."""
        self._abandoned.update(self._open)
        self._thread.join(seconds)

    def _collect(self, seconds: float) -> None:
        """Files the results that have come, waiting up to ``seconds`` for the first."""
        try:
            while True:
                result = self._results.get(timeout=seconds) if seconds else self._results.get_nowait()
                if isinstance(result, Exception):
                    raise result
                kernel, config, outcome = result
                self._open[kernel] -= 1
                self._waiting.setdefault(kernel, []).append((config, outcome))
                seconds = 0.0
        except queue.Empty:
            return

    def _run(self, items: list[Item]) -> None:
        try:
            again = self._pass(items, last=False)
            self._pass(again, last=True)
        except Exception as error:  # noqa: BLE001 - the thread has no caller: ``take`` raises it there
            self._results.put(error)

    def _pass(self, items: list[Item], *, last: bool) -> list[Item]:
        """Compiles ``items``, started afresh without a kernel's rest when it is abandoned; returns those to try again."""
        again: list[Item] = []
        while items := [item for item in items if item[0] not in self._abandoned]:
            abandoned = set(self._abandoned)
            for kernel, config, outcome in self._sandbox.compile(items):
                items = [item for item in items if item != (kernel, config)]
                if outcome.verdict in FINAL or last:
                    self._results.put((kernel, config, outcome))
                else:
                    again.append((kernel, config))
                if self._abandoned != abandoned:
                    break
            else:
                break
        return again
