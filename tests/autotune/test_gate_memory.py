"""Guard zones, poison and padded inputs, on buffers of every awkward shape."""

from __future__ import annotations

import pytest
import torch

from autotune.gate.memory import (
    FINITE_BYTE,
    NAN_BYTE,
    SMALLEST_GUARD,
    Arena,
    Padded,
    fingerprint,
    guard_bytes,
    nans,
    snapshot,
    untouched,
)
from autotune.spec import TensorSpec

CPU = torch.device("cpu")
GAPPED = TensorSpec((3, 5), (8, 1), torch.float16)


def arena() -> Arena:
    """Three buffers: odd sizes, a gap after each row, two element types."""
    specs = {
        "out": TensorSpec.contiguous((2, 7, 5), torch.bfloat16),
        "gapped": GAPPED,
        "lse": TensorSpec.contiguous((11,), torch.float32),
    }
    return Arena(specs, CPU)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn])
def test_the_first_filling_is_nan_and_the_second_a_number_in_every_dtype(dtype: torch.dtype) -> None:
    """One byte poisons every floating type."""
    buffers = Arena({"x": TensorSpec.contiguous((3,), dtype)}, CPU)
    buffers.fill(NAN_BYTE)
    assert bool(buffers.tensors["x"].float().isnan().all())
    buffers.fill(FINITE_BYTE)
    assert bool(buffers.tensors["x"].float().isfinite().all())


@pytest.mark.parametrize("byte", [NAN_BYTE, FINITE_BYTE])
def test_writing_every_element_of_every_buffer_is_no_trespass(byte: int) -> None:
    """A kernel may write all of its own elements."""
    buffers = arena()
    buffers.fill(byte)
    for tensor in buffers.tensors.values():
        tensor.fill_(1.5)
    assert not bool(buffers.trespassed(byte))


@pytest.mark.parametrize(
    ("name", "offset", "where"),
    [
        ("out", 70, "past the end of 'out', at byte 140 of 140"),
        ("out", -1, "in front of 'out', at byte -2"),
        ("gapped", 5, "between the rows of 'gapped'"),
        ("lse", 11 + SMALLEST_GUARD // 4 - 1, "past the end of 'lse'"),
    ],
)
def test_one_element_outside_is_a_trespass_and_is_located(name: str, offset: int, where: str) -> None:
    """One element before, between or far behind a buffer shows, and the report says where."""
    buffers = arena()
    buffers.fill(FINITE_BYTE)
    inside = buffers.tensors[name]
    stray = torch.empty(0, dtype=inside.dtype)
    stray.set_(inside.untyped_storage(), inside.storage_offset() + offset, (1,)).fill_(1.5)
    assert bool(buffers.trespassed(FINITE_BYTE))
    assert where in buffers.trespass(FINITE_BYTE)


def test_a_guard_zone_holds_a_tile_of_rows() -> None:
    """A kernel that overshoots by 128 rows of a (batch, length, heads, width) buffer stays inside the guard."""
    spec = TensorSpec.contiguous((2, 17, 50, 32), torch.float16)
    assert guard_bytes(spec) >= 128 * 50 * 32 * 2
    assert guard_bytes(TensorSpec.contiguous((), torch.float32)) == SMALLEST_GUARD


def test_elements_nobody_wrote_are_told_from_computed_nan() -> None:
    """Only what held both fillings was never written; a NaN that was computed counts as NaN."""
    buffers = Arena({"x": TensorSpec.contiguous((6,), torch.float32)}, CPU)
    x = buffers.tensors["x"]
    buffers.fill(NAN_BYTE)
    x[:4] = torch.tensor([1.0, 2.0, float("nan"), 4.0])
    first, missing = snapshot(buffers.tensors), int(nans(x))
    buffers.fill(FINITE_BYTE)
    x[:4] = torch.tensor([1.0, 2.0, float("nan"), 4.0])
    assert missing == 3
    assert int(untouched(first["x"], x)) == 2


def test_padded_inputs_keep_values_strides_sharing_and_misalignment() -> None:
    """A kernel sees the same tensors, unaligned and overlapping ones too."""
    packed = torch.arange(60.0).reshape(4, 15)
    tensors = {
        "q": packed[:, 1:6],
        "k": packed[:, 6:11],
        "bias": torch.arange(3.0)[None].expand(5, 3),
        "mask": torch.tensor([True, False]),
        "empty": torch.empty(0, 4),
    }
    padded = Padded(tensors).tensors
    for name, tensor in tensors.items():
        assert torch.equal(padded[name], tensor)
        assert padded[name].stride() == tensor.stride()
        assert (padded[name].data_ptr() - tensor.data_ptr()) % 16 == 0 or not tensor.numel()
    assert padded["k"].data_ptr() - padded["q"].data_ptr() == 5 * 4


def test_a_read_past_an_input_is_nan() -> None:
    """What lies behind an input's storage is NaN, as far as a guard zone goes."""
    x = Padded({"x": torch.ones(10)}).tensors["x"]
    behind = torch.empty(0).set_(x.untyped_storage(), x.storage_offset() + 10, (64,))
    assert bool(behind.isnan().all())


def test_a_write_to_an_input_is_noticed_and_named() -> None:
    """One changed element of one input shows; NaN inputs that did not change do not."""
    padded = Padded({"x": torch.full((4,), float("nan")), "y": torch.zeros(3)})
    assert not bool(padded.changed())
    padded.tensors["y"][1] = -0.0
    assert bool(padded.changed())
    assert padded.culprits() == ["y"]


def test_a_write_beside_an_input_is_noticed() -> None:
    """The memory round an input is nobody's to write."""
    padded = Padded({"x": torch.zeros(3)})
    x = padded.tensors["x"]
    torch.empty(0).set_(x.untyped_storage(), x.storage_offset() - 1, (1,)).fill_(0.0)
    assert bool(padded.changed())
    assert padded.culprits() == []


def test_a_fingerprint_notices_one_bit() -> None:
    """Reference answers that were overwritten are noticed before anyone is judged by them."""
    tensors = [torch.rand(100, dtype=torch.float64), torch.rand(3, 3)]
    before = int(fingerprint(tensors))
    tensors[0].view(torch.int64)[50] ^= 1
    assert int(fingerprint(tensors)) != before
