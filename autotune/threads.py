"""Starting a thread where the machine may refuse one (a limit on processes, no memory for another stack)."""

from __future__ import annotations

import threading

from autotune.errors import AutotuneError


class NoThread(AutotuneError):
    """No thread could be started, so nothing can be tuned here and now."""


def start(thread: threading.Thread) -> None:
    """Starts ``thread``. Raises NoThread, which names it, when the machine refuses."""
    try:
        thread.start()
    except RuntimeError as error:
        raise NoThread(f"cannot start the thread {thread.name}: {error}") from error
