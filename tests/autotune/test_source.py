"""The source hash names what a kernel computes, not how its file is written."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

from autotune.source import module_hash, source_hash

KERNEL = '''
import triton
import triton.language as tl

SCALE = tl.constexpr(2.0)


@triton.jit
def helper(x):
    return x * SCALE


@triton.jit
def entry(x_ptr, BLOCK: tl.constexpr):
    """Doubles a block."""
    offsets = tl.arange(0, BLOCK)
    tl.store(x_ptr + offsets, helper(tl.load(x_ptr + offsets)))
'''


def load(path: Path, text: str) -> ModuleType:
    """Writes ``text`` to ``path`` and imports it under one and the same name."""
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("kernel_under_test", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hash_of(tmp_path: Path, name: str, text: str) -> str:
    return source_hash([load(tmp_path / f"{name}.py", text).entry])


def test_comments_docstrings_and_blank_lines_do_not_change_the_hash(tmp_path: Path) -> None:
    """A stored proof outlives an edit that changes no code."""
    edited = KERNEL.replace('"""Doubles a block."""', '"""Says something else."""\n\n    # and comments')
    assert hash_of(tmp_path, "one", KERNEL) == hash_of(tmp_path, "two", edited)


def test_a_change_in_a_function_the_kernel_calls_changes_the_hash(tmp_path: Path) -> None:
    """A proof does not outlive a change in a helper."""
    assert hash_of(tmp_path, "one", KERNEL) != hash_of(tmp_path, "two", KERNEL.replace("x * SCALE", "x + SCALE"))


def test_a_change_of_a_constant_the_kernel_reads_changes_the_hash(tmp_path: Path) -> None:
    """A proof does not outlive a change of a compile-time constant two calls away."""
    assert hash_of(tmp_path, "one", KERNEL) != hash_of(tmp_path, "two", KERNEL.replace("(2.0)", "(3.0)"))


def test_a_modules_hash_sees_all_its_code_and_the_facts_beside_it(tmp_path: Path) -> None:
    """Helpers, constants and facts count, wherever they stand; docstrings of functions and comments do not."""

    def hashed(name: str, text: str, **facts: object) -> str:
        return module_hash([load(tmp_path / f"{name}.py", text)], facts)

    whole = hashed("one", KERNEL, multiple=8)
    assert hashed("two", KERNEL.replace('"""Doubles a block."""', '"""Else."""  # and a comment'), multiple=8) == whole
    for edited in (KERNEL.replace("(2.0)", "(3.0)"), KERNEL.replace("x * SCALE", "x + SCALE"), KERNEL + "\nNEW = 1\n"):
        assert hashed("three", edited, multiple=8) != whole
    assert hashed("one", KERNEL, multiple=32) != whole
