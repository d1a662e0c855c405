"""Triton's interpreter, made to do once a launch what it does again for every device function that a kernel calls.

A launch replaces the functions of ``triton.language`` by interpreted ones and puts them back at its end. Each call of a
device function replaces them anew (Triton 3.6 and 3.9), which finds nothing left to do and takes two fifths of the time.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final

import triton.language as tl

_PATCH: Final = "_patch_lang"


class _Scope:
    """What a launch has replaced, in force until it is restored."""

    def __init__(self, scope: Any, thread: threading.local) -> None:
        self._scope = scope
        self._thread = thread

    def restore(self) -> None:
        """Puts everything back."""
        self._thread.langs = frozenset()
        self._scope.restore()


def hasten() -> None:
    """Has the interpreter of this process replace each module's functions once a launch. Does nothing the second time.

    Another Triton's interpreter, without the function that does it, is left as it is.
    """
    from triton.runtime import interpreter

    patch = getattr(interpreter, _PATCH, None)
    if patch is not None and not hasattr(patch, "__wrapped__"):
        setattr(interpreter, _PATCH, _once_a_launch(patch))


def _once_a_launch(patch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    thread = threading.local()

    @functools.wraps(patch)
    def patched(function: Any) -> Any:
        in_force: frozenset[ModuleType] = getattr(thread, "langs", frozenset())
        langs = _langs(function)
        if in_force:  # a device function: nobody restores what is returned here
            return None if langs <= in_force else patch(function)
        scope = patch(function)
        thread.langs = langs
        return _Scope(scope, thread)

    return patched


@functools.cache
def _langs(function: Any) -> frozenset[ModuleType]:
    """Returns the modules of Triton's language that ``function`` sees."""
    found = (value for value in function.__globals__.values() if inspect.ismodule(value))
    return frozenset(value for value in found if value in (tl, tl.core))
