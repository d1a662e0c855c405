"""Triton's interpreter replaces the language once a launch, and computes what it computed before."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter

from autotune import interpreter
from autotune.device import interpreting

pytestmark = pytest.mark.skipif(not interpreting(), reason="kernels are compiled here")

BLOCK = 8
PROGRAMS = 5


@triton.jit
def doubled(x):  # noqa: ANN201
    return x + x


@triton.jit
def double_all(x_ptr, BLOCK: tl.constexpr):  # noqa: ANN201
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + offsets, doubled(doubled(tl.load(x_ptr + offsets))))


@triton.jit
def refuse(x_ptr):  # noqa: ANN201
    tl.static_assert(doubled(1) == 3)


@pytest.fixture
def patches(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What Triton looks through for functions to replace, in order."""
    seen: list[object] = []
    whole = triton_interpreter._patch_builtin

    def counted(package: object, *rest: Any) -> None:
        seen.append(package)
        whole(package, *rest)

    monkeypatch.setattr(triton_interpreter, "_patch_builtin", counted)
    return seen


def launched(programs: int) -> torch.Tensor:
    """Returns the numbers from 0 on, quadrupled by as many programs."""
    x = torch.arange(programs * BLOCK, dtype=torch.float32)
    double_all[(programs,)](x, BLOCK=BLOCK)
    return x


def test_device_functions_replace_nothing_again(patches: list[object]) -> None:
    """One program with two calls looks through as much as five with ten, and the result is right."""
    interpreter.hasten()
    assert torch.equal(launched(1), 4 * torch.arange(BLOCK))
    once = len(patches)
    assert torch.equal(launched(PROGRAMS), 4 * torch.arange(PROGRAMS * BLOCK))
    assert 0 < once == len(patches) - once


def test_the_language_is_put_back_after_every_launch() -> None:
    """After a launch, and after one that fails, Triton's functions are the builtins that a compiler expects."""
    interpreter.hasten()
    before = tl.load, tl.arange, tl.tensor.__add__
    launched(1)
    with pytest.raises(triton_interpreter.InterpreterError):
        refuse[(1,)](torch.zeros(1))
    assert (tl.load, tl.arange, tl.tensor.__add__) == before
    assert torch.equal(launched(PROGRAMS), 4 * torch.arange(PROGRAMS * BLOCK))


def test_hastening_twice_changes_nothing() -> None:
    interpreter.hasten()
    patch = triton_interpreter._patch_lang
    interpreter.hasten()
    assert triton_interpreter._patch_lang is patch


def test_another_thread_replaces_for_itself(patches: list[object]) -> None:
    """What one thread's launch has replaced is not taken for another's."""
    interpreter.hasten()
    launched(1)
    once, results = len(patches), []
    thread = threading.Thread(target=lambda: results.append(launched(PROGRAMS)))
    thread.start()
    thread.join()
    assert torch.equal(results[0], 4 * torch.arange(PROGRAMS * BLOCK))
    assert len(patches) == 2 * once


def test_an_interpreter_without_the_function_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(triton_interpreter, "_patch_lang")
    interpreter.hasten()
    assert not hasattr(triton_interpreter, "_patch_lang")
