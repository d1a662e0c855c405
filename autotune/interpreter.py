"""Triton's interpreter, made to do once what it does again for every operation of a kernel.

A launch replaces the functions of ``triton.language`` by interpreted ones and puts them back at its end. Each call of a
device function replaces them anew (Triton 3.6 and 3.9), which finds nothing left to do. Each operation makes the types of
its operands and results anew, several objects for each dimension of a shape, though a kernel has a few dozen of them.
Together that is four fifths of the time; what is computed, and every check, is the same without.
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
_NUMPY_TYPE: Final = "_get_np_dtype"
_TUPLE_TYPE: Final = "_type_for_tuple_values"
# Shapes and types a process has met: far more than any kernel's, so that nothing grows for ever.
_MOST: Final = 4096
_WHOLE: Final = frozenset({int})


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
    """Has the interpreter of this process replace each module's functions once a launch, and make each type once.

    Does nothing the second time. What another Triton's interpreter does not have, or has in another form, is left as it is.
    """
    from triton.runtime import interpreter

    _wrap(interpreter, _PATCH, _once_a_launch)
    _wrap(interpreter, _NUMPY_TYPE, _once_a_scalar)
    _wrap(tl.core, _TUPLE_TYPE, _once_a_tuple)
    if set(vars(tl.core.block_type(tl.int32, [1]))) == {"element_ty", "shape", "numel", "name"}:
        _wrap(tl.core.block_type, "__init__", _once_a_block)
    if set(vars(tl.core.tensor(None, tl.int32))) == {"handle", "type", "dtype", "shape", "numel"}:
        _wrap(tl.core.tensor, "__init__", _once_a_shape)


def _wrap(owner: Any, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replaces a function of ``owner`` by what ``wrapper`` makes of it, unless it is not there or has been replaced."""
    found = getattr(owner, name, None)
    if found is not None and not hasattr(found, "__wrapped__"):
        setattr(owner, name, wrapper(found))


def _once_a_launch(patch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    thread = threading.local()

    @functools.wraps(patch)
    def patched(function: Any) -> Any:
        in_force: frozenset[ModuleType] = getattr(thread, "langs", frozenset())
        langs = _langs(function)
        if in_force:  # a device function: nobody restores what is returned here
            if not langs <= in_force:
                patch(function)
                thread.langs = in_force | langs
            return None
        scope = patch(function)
        thread.langs = langs
        return _Scope(scope, thread)

    return patched


@functools.cache
def _langs(function: Any) -> frozenset[ModuleType]:
    """Returns the modules of Triton's language that ``function`` sees."""
    found = (value for value in function.__globals__.values() if inspect.ismodule(value))
    return frozenset(value for value in found if value in (tl, tl.core))


def _once_a_scalar(numpy_type: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Returns ``numpy_type`` (Triton's type -> NumPy's), asked once for each scalar type: a block's is that of its elements."""
    known: dict[str, Any] = {}

    @functools.wraps(numpy_type)
    def remembered(found: Any) -> Any:
        name = found.scalar.name
        if name not in known:
            known[name] = numpy_type(found)
        return known[name]

    return remembered


def _plain(values: Any) -> tuple[int, ...] | None:
    """Returns the values as Python's own whole numbers, None if one of them is anything else."""
    found = tuple([value.value if type(value) is tl.constexpr else value for value in values])
    return found if set(map(type, found)) <= _WHOLE else None


def _once_a_tuple(type_of: Callable[..., Any]) -> Callable[..., Any]:
    """Returns ``type_of`` (values -> the type of a tuple of them), asked once for each tuple of whole numbers."""
    known = functools.lru_cache(_MOST)(type_of)

    @functools.wraps(type_of)
    def remembered(values: Any, *fields: Any) -> Any:
        plain = None if fields else _plain(values)
        return type_of(values, *fields) if plain is None else known(plain)

    return remembered


def _once_a_block(initialise: Callable[..., None]) -> Callable[..., None]:
    """Returns the constructor of block types, which checks and describes each shape of each element type once."""
    known: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}

    @functools.wraps(initialise)
    def remembered(self: Any, element_ty: Any, shape: Any) -> None:
        plain = _plain(shape)
        if plain is None:
            initialise(self, element_ty, shape)
        elif (found := known.get((element_ty.name, plain))) is not None:
            vars(self).update(found, element_ty=element_ty)
        else:
            initialise(self, element_ty, shape)
            if len(known) < _MOST:
                known[element_ty.name, plain] = dict(vars(self))

    return remembered


def _once_a_shape(initialise: Callable[..., None]) -> Callable[..., None]:
    """Returns the constructor of tensors, which makes the constants of each shape once."""

    @functools.lru_cache(_MOST)
    def known(shape: tuple[int, ...]) -> tuple[Any, Any]:
        made = object.__new__(tl.core.tensor)
        initialise(made, None, tl.core.block_type(tl.int32, list(shape)) if shape else tl.int32)
        return made.shape, made.numel

    @functools.wraps(initialise)
    def remembered(self: Any, handle: Any, type: Any) -> None:  # noqa: A002  # Triton's own name, and a keyword
        plain = _plain(type.shape) if type.is_block() else ()
        if plain is None:
            initialise(self, handle, type)
        else:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = known(plain)

    return remembered
