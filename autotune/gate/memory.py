"""Buffers that notice: poisoned before a run, with guard zones all round, on one allocation that is compared whole.

One byte fills everything. 0xFF is NaN in every floating dtype, so an element nobody wrote, and whatever was computed
from memory nobody owns, shows; the second filling is an ordinary number, so that a result which depends on what its
buffers held before differs between the two runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import torch

from autotune.spec import Tensors, TensorSpec

NAN_BYTE: Final = 0xFF
FINITE_BYTE: Final = 0x3C
SMALLEST_GUARD: Final = 64 * 1024
LARGEST_GUARD: Final = 16 * 1024 * 1024
# A tile that overshoots the last row stays inside the guard if it has at most this many rows.
GUARD_ROWS: Final = 256
ALIGNMENT: Final = 512
_INTEGERS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


class Arena:
    """Buffers for ``specs`` on one allocation: ``tensors`` by name, guard zones between and round them.

    ``guards`` gives the size of a zone in bytes (a multiple of ``ALIGNMENT``) where ``guard_bytes`` cannot know it.
    """

    def __init__(
        self, specs: Mapping[str, TensorSpec], device: torch.device, guards: Mapping[str, int] | None = None
    ) -> None:
        sizes = {name: guard_bytes(spec) for name, spec in specs.items()} | dict(guards or {})
        starts: dict[str, int] = {}
        end = 0
        for name, spec in specs.items():
            starts[name] = end + sizes[name]
            end = _aligned(starts[name] + span_bytes(spec)) + sizes[name]
        self.memory = torch.empty(max(end, ALIGNMENT), dtype=torch.uint8, device=device)
        self.tensors = {name: _place(self.memory, starts[name], spec) for name, spec in specs.items()}
        self._specs = dict(specs)
        self._starts = starts
        self._sizes = sizes
        self._guards: torch.Tensor | None = None

    @property
    def words(self) -> torch.Tensor:
        """The whole allocation as 64-bit words."""
        return self.memory.view(torch.int64)

    def fill(self, byte: int) -> None:
        """Fills buffers and guard zones with ``byte``."""
        self.memory.fill_(byte)

    def trespassed(self, byte: int) -> torch.Tensor:
        """Returns on the device whether any byte outside the buffers is no longer ``byte``."""
        if self._guards is None:
            self._guards = self._map_guards()
        return ((self.memory ^ byte) & self._guards).any()

    def trespass(self, byte: int) -> str:
        """Returns where a write went that ``trespassed`` found: buffer, side and distance in bytes (one sync)."""
        guards = self._guards if self._guards is not None else self._map_guards()
        at = int(((self.memory ^ byte) & guards).ne(0).nonzero()[0])
        for name, spec in self._specs.items():
            start, end = self._starts[name], self._starts[name] + span_bytes(spec)
            if start - self._sizes[name] <= at < start:
                return f"in front of {name!r}, at byte -{start - at}"
            if start <= at < end:
                return f"between the rows of {name!r}"
            if end <= at < _aligned(end) + self._sizes[name]:
                return f"past the end of {name!r}, at byte {at - start} of {end - start}"
        return "outside every buffer"

    def _map_guards(self) -> torch.Tensor:
        """Returns 0xFF for every byte that belongs to no element of a buffer, 0 elsewhere."""
        guards = torch.full_like(self.memory, 0xFF)
        for name, spec in self._specs.items():
            bits(_place(guards, self._starts[name], spec)).zero_()
        return guards


class Padded:
    """Copies of ``tensors`` (strides, offsets and sharing kept) between zones of NaN, and what they held.

    Reads past an input show as NaN in what is computed from it; ``changed`` tells whether anything wrote to one.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        storages = {_address(tensor): tensor for tensor in tensors.values()}
        specs = {
            address: TensorSpec.contiguous((tensor.untyped_storage().nbytes(),), torch.uint8)
            for address, tensor in storages.items()
        }
        guards = dict.fromkeys(specs, SMALLEST_GUARD)
        for tensor in tensors.values():
            rows = TensorSpec(tuple(tensor.shape), tensor.stride(), tensor.dtype)
            guards[_address(tensor)] = max(guards[_address(tensor)], guard_bytes(rows))
        device = next(iter(tensors.values())).device if tensors else torch.device("cpu")
        self._arena = Arena(specs, device, guards)
        self._arena.fill(NAN_BYTE)
        for address, tensor in storages.items():
            self._arena.tensors[address].copy_(_storage_bytes(tensor))
        self.tensors: Tensors = {name: self._rebuild(tensor) for name, tensor in tensors.items()}
        self._kept = self._arena.memory.clone()

    def changed(self) -> torch.Tensor:
        """Returns on the device whether any byte of the inputs, or round them, is not what it was."""
        return self._arena.words.ne(self._kept.view(torch.int64)).any()

    def culprits(self) -> list[str]:
        """Returns the names of the inputs that changed (one sync each)."""
        return [
            name
            for name, tensor in self.tensors.items()
            if not torch.equal(bits(tensor), bits(_alike(tensor, self._kept, int(tensor.storage_offset()))))
        ]

    def _rebuild(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns ``tensor`` in the arena; a storage starts aligned there, so views keep their (mis)alignment."""
        start = int(self._arena.tensors[_address(tensor)].storage_offset())
        return _alike(tensor, self._arena.memory, start // tensor.element_size() + int(tensor.storage_offset()))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Returns ``tensor``'s elements as integers of the same width, so that NaN compares equal to itself."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.view(_INTEGERS[tensor.element_size()])


def snapshot(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Returns copies of ``tensors``' bits."""
    return {name: bits(tensor).clone() for name, tensor in tensors.items()}


def differing(tensors: Mapping[str, torch.Tensor], kept: Tensors) -> torch.Tensor:
    """Returns on the device whether any of ``tensors`` differs in a bit from its ``snapshot``."""
    return any_of([bits(tensor).ne(kept[name]).any() for name, tensor in tensors.items()])


def nans(tensor: torch.Tensor) -> torch.Tensor:
    """Returns on the device how many elements of ``tensor`` are NaN."""
    return (tensor.isnan() if tensor.is_floating_point() else torch.zeros_like(tensor, dtype=torch.bool)).sum()


def untouched(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Returns on the device how many elements still held the filling after a run on each of the two.

    ``first`` is the ``snapshot`` of the run on ``NAN_BYTE``, ``second`` the tensor after the run on ``FINITE_BYTE``.
    """
    width = second.element_size()
    kept = int.from_bytes(bytes([FINITE_BYTE]) * min(width, 8), "little")
    return (first.eq(255 if width == 1 else -1) & bits(second).eq(kept)).sum()


def fingerprint(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Returns on the device a sum over all bits, to notice a stray write into memory that is only ever read."""
    sums = [bits(tensor).sum(dtype=torch.int64) for tensor in tensors]
    return torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.int64)


def any_of(flags: list[torch.Tensor]) -> torch.Tensor:
    """Returns whether any of ``flags`` (0-dim, on one device) is set."""
    return torch.stack(flags).any() if flags else torch.zeros((), dtype=torch.bool)


def span_bytes(spec: TensorSpec) -> int:
    """Returns how many bytes lie from the first to the end of the last element."""
    if 0 in spec.shape:
        return 0
    last = sum((size - 1) * step for size, step in zip(spec.shape, spec.stride, strict=True))
    return (last + 1) * spec.dtype.itemsize


def guard_bytes(spec: TensorSpec) -> int:
    """Returns the size of the guard zones on both sides of a buffer: room for a tile of rows, at least 64 KiB.

    Rows are taken along the second dimension of (batch, row, ...), along the first of anything flatter.
    """
    steps = sorted(spec.stride, reverse=True)
    row = steps[1] if len(steps) > 2 else (steps[0] if steps else 1)
    return _aligned(min(max(GUARD_ROWS * row * spec.dtype.itemsize, SMALLEST_GUARD), LARGEST_GUARD))


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


def _place(memory: torch.Tensor, start: int, spec: TensorSpec) -> torch.Tensor:
    whole = memory[start : start + span_bytes(spec)].view(spec.dtype)
    return whole.as_strided(spec.shape, spec.stride)


def _address(tensor: torch.Tensor) -> str:
    return str(tensor.untyped_storage().data_ptr())


def _alike(tensor: torch.Tensor, memory: torch.Tensor, offset: int) -> torch.Tensor:
    """Returns the tensor of ``tensor``'s dtype, shape and strides that starts ``offset`` elements into ``memory``."""
    empty = torch.empty(0, dtype=tensor.dtype, device=memory.device)
    return empty.set_(memory.untyped_storage(), offset, tensor.shape, tensor.stride())


def _storage_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
