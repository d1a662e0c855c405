"""Python processes that begin with torch imported: forks of one server, which cost a tenth of what importing does.

What a process of its own is to show (that it finds, waits for and outlives what another did) it shows all the same; a test
of how a process starts starts a real one.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
# Nothing that reads TRITON_INTERPRET while it is imported: a process may set it.
CONTEXT.set_forkserver_preload(["torch", "pydantic", "sqlalchemy"])


class Warm:
    """One process that runs ``code`` as ``python -c`` would, with torch in its memory already."""

    def __init__(self, code: str, arguments: Sequence[str], variables: Mapping[str, str], folder: Path) -> None:
        self._printed = folder / f"printed.{os.getpid()}.{id(self)}"
        self._process = CONTEXT.Process(
            target=_live, args=(code, list(arguments), dict(variables), str(folder), str(self._printed))
        )
        self._process.start()

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process.pid is not None
        return self._process.pid

    def kill(self) -> None:
        """Kills it and waits for its end."""
        self._process.kill()
        self._process.join()

    def finish(self, seconds: float = 120.0) -> tuple[int, str, str]:
        """Returns exit status, stdout and stderr at its end. Raises TimeoutError, and kills it, where that is too far."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            self.kill()
            raise TimeoutError(f"it was still running after {seconds:g} s")
        return self._process.exitcode, *(_text(f"{self._printed}.{number}") for number in (1, 2))


def _text(path: str) -> str:
    return Path(path).read_text(encoding="utf-8", errors="replace")


def _live(code: str, arguments: list[str], variables: dict[str, str], folder: str, printed: str) -> None:
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    for number in (1, 2):
        descriptor = os.open(f"{printed}.{number}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.argv = ["-c", *arguments]
    sys.path.insert(0, "")
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(code, "<string>", "exec"), vars(main))  # what the tests wrote
