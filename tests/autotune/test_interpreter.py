"""Triton's interpreter does once what it did for every call, and computes what it computed before."""

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


@triton.jit
def total(x_ptr, out_ptr, BLOCK: tl.constexpr):  # noqa: ANN201
    offsets = tl.arange(0, BLOCK)
    tl.store(out_ptr, tl.sum(doubled(tl.load(x_ptr + offsets)), 0) + tl.max(tl.load(x_ptr + offsets), 0))


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


def test_functions_of_tritons_own_library_replace_once_too(patches: list[object]) -> None:
    """They see another module of the language than a kernel does, and a program's second sum finds it replaced."""
    interpreter.hasten()
    x, out = torch.arange(BLOCK, dtype=torch.float32), torch.zeros(1)
    total[(1,)](x, out, BLOCK=BLOCK)  # the first call of a function of theirs has it rewritten, with more in its sight
    before = len(patches)
    total[(1,)](x, out, BLOCK=BLOCK)
    once = len(patches) - before
    total[(1, PROGRAMS)](x, out, BLOCK=BLOCK)
    assert len(patches) == before + 2 * once
    assert out.item() == 2 * x.sum() + x.max()


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


SCALARS = [tl.int1, tl.int32, tl.uint64, tl.float16, tl.bfloat16, tl.float32, tl.pointer_type(tl.float16)]


def unhastened(owner: Any, name: str) -> Any:
    """Returns the function as Triton has it."""
    interpreter.hasten()
    return getattr(owner, name).__wrapped__


@pytest.mark.parametrize(
    "shape", [[1], [8], [8, 16], [tl.constexpr(4), 2], tl.tuple([tl.constexpr(2), tl.constexpr(4)])], ids=str
)
@pytest.mark.parametrize("scalar", SCALARS, ids=str)
def test_types_and_tensors_are_what_triton_makes(scalar: Any, shape: Any) -> None:
    """A second block type and a second tensor have every attribute that the first, made by Triton itself, has."""
    own, own_tensor = object.__new__(tl.block_type), object.__new__(tl.tensor)
    unhastened(tl.block_type, "__init__")(own, scalar, shape)
    unhastened(tl.tensor, "__init__")(own_tensor, "handle", own)
    for _ in range(2):
        block = tl.block_type(scalar, shape)
        tensor = tl.tensor("handle", block)
        for made, expected in ((block, own), (tensor, own_tensor)):
            assert {name: repr(value) for name, value in vars(made).items()} == {
                name: repr(value) for name, value in vars(expected).items()
            }
        assert (block, tensor.shape, tensor.shape.type) == (own, own_tensor.shape, own_tensor.shape.type)
        assert (block.shape.type, tensor.type, tensor.dtype) == (own.shape.type, block, scalar)
        assert block.element_ty is scalar
        assert tl.block_type(scalar, shape).shape is block.shape, "it was made again"
        assert tl.tensor("other", block).shape is tensor.shape, "it was made again"
        assert triton_interpreter._get_np_dtype(block) == unhastened(triton_interpreter, "_get_np_dtype")(block)
        assert triton_interpreter._get_np_dtype(scalar) == unhastened(triton_interpreter, "_get_np_dtype")(scalar)


def test_two_pointers_of_one_name_stay_two() -> None:
    """A block's elements are its own, though Triton names pointers of two address spaces alike."""
    interpreter.hasten()
    for space in (1, 3):
        assert tl.block_type(tl.pointer_type(tl.float16, space), [8]).element_ty.address_space == space


@pytest.mark.parametrize("shape", [[], [3], [-4], [2.0]], ids=str)
def test_shapes_that_triton_refuses_are_refused_each_time(shape: list[Any]) -> None:
    """Nothing wrong is remembered as right."""
    with pytest.raises((TypeError, ValueError)) as expected:
        unhastened(tl.block_type, "__init__")(object.__new__(tl.block_type), tl.int32, shape)
    for _ in range(2):
        with pytest.raises(expected.type) as caught:
            tl.block_type(tl.int32, shape)
        assert str(caught.value) == str(expected.value)


@pytest.mark.parametrize(
    "values", [(), (1, 2), (tl.constexpr(1), 2), (1, 2.0), (tl.constexpr(True), 1), (tl.float16, 1)]
)
def test_tuples_have_the_types_of_their_values(values: tuple[Any, ...]) -> None:
    """Whole numbers, written either way, share a type; a truth value or a fraction that equals one does not."""
    original = unhastened(tl.core, "_type_for_tuple_values")
    for fields in ([], [[f"f{number}" for number in range(len(values))]]):
        for _ in range(2):
            found, expected = tl.core._type_for_tuple_values(values, *fields), original(values, *fields)
            assert (found, str(found)) == (expected, str(expected))
    assert str(tl.tuple(values).type) == str(original(values))


def test_another_tritons_types_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor or block type with an attribute more than we know of is made by Triton every time."""
    made = unhastened(tl.block_type, "__init__"), unhastened(tl.tensor, "__init__")

    def with_layout(number: int) -> Any:
        def initialise(self: Any, *arguments: Any) -> None:
            made[number](self, *arguments)
            self.layout = "new"

        return initialise

    foreign = with_layout(0), with_layout(1)
    monkeypatch.setattr(tl.block_type, "__init__", foreign[0])
    monkeypatch.setattr(tl.tensor, "__init__", foreign[1])
    interpreter.hasten()
    assert (tl.block_type.__init__, tl.tensor.__init__) == foreign
