"""The hash of what a kernel computes: equal across Python versions, blind to comments and docstrings.

Triton's own ``cache_key`` hashes raw source text, so a comment is a new kernel to it; here a comment is not a new
problem.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

import triton.language as tl


def source_hash(entries: Iterable[Any], constants: Mapping[str, object] | None = None) -> str:
    """Returns the SHA-256 over ``entries`` (jitted or plain functions, classes) and every jitted function they reach.

    Constants that jitted code reads (``tl.constexpr`` globals) are part of it; those that plain functions read are
    if they are named in ``constants``, with a value whose ``repr`` is the same in every process.
    """
    sources = {f"constant {name}": repr(value) for name, value in (constants or {}).items()}
    for entry in entries:
        _collect(entry, sources)
    text = "\n".join(f"{name}\n{source}" for name, source in sorted(sources.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def module_hash(modules: Iterable[ModuleType], facts: Mapping[str, object] | None = None) -> str:
    """Returns the SHA-256 over all code of ``modules``, and ``facts`` whose ``repr`` is the same in every process."""
    sources = {f"fact {name}": repr(value) for name, value in (facts or {}).items()}
    sources |= {module.__name__: ast.unparse(_normalised(module)) for module in modules}
    text = "\n".join(f"{name}\n{source}" for name, source in sorted(sources.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def _collect(function: Any, sources: dict[str, str]) -> None:
    plain: Callable[..., Any] = getattr(function, "fn", function)
    name = f"{plain.__module__}.{plain.__qualname__}"
    if name in sources:
        return
    tree = _normalised(plain)
    sources[name] = ast.unparse(tree)
    scope = getattr(inspect.unwrap(plain), "__globals__", {})  # a class has none of its own
    for identifier in sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}):
        value = scope.get(identifier)
        if _jitted(value):
            _collect(value, sources)
        elif isinstance(value, tl.constexpr):
            sources[f"{plain.__module__}:{identifier}"] = repr(value.value)


def _jitted(value: Any) -> bool:
    return hasattr(value, "fn") and hasattr(value, "arg_names")


def _normalised(source: Callable[..., Any] | ModuleType) -> ast.Module:
    """Returns the tree of a function, class or module without docstrings and decorators of functions and classes."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(source)))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            node.decorator_list = []
            if ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:] or [ast.Pass()]
    return tree
