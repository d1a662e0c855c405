"""Registers and local memory of a kernel, read from its machine code: without a GPU nobody else tells them."""

from __future__ import annotations

import re
import struct
from typing import Final

# Attributes of the section .nv.info, which ptxas writes and ``cuobjdump --dump-resource-usage`` prints: pairs of 32-bit
# words, a symbol and a number. Each attribute begins with its form, its name and two bytes: a value, or in the form with
# a payload how many bytes follow.
_WITH_PAYLOAD: Final = 4
_REGISTERS: Final = 0x2F
_STACK: Final = 0x11
_WORD: Final = 4


def of_cubin(cubin: bytes) -> dict[str, int]:
    """Returns ``registers`` of a thread and ``spills``, its local memory in 32-bit words; what is not told is left out."""
    found: dict[str, int] = {}
    info, place = _section(cubin, b".nv.info"), 0
    while place + _WORD <= len(info):
        form, name, value = struct.unpack_from("<BBH", info, place)
        place += _WORD
        if form != _WITH_PAYLOAD:
            continue
        if name in (_REGISTERS, _STACK) and value == 2 * _WORD and place + value <= len(info):
            (number,) = struct.unpack_from("<I", info, place + _WORD)
            label = "registers" if name == _REGISTERS else "spills"
            found[label] = max(found.get(label, 0), number if name == _REGISTERS else number // _WORD)
        place += value
    return found


def of_amdgcn(assembly: str) -> dict[str, int]:
    """Returns ``registers`` (vector ones, accumulators too) and ``spills`` as AMD's assembly states them at its end."""
    stated = {"registers": r"\.vgpr_count:\s*(\d+)", "spills": r"\.vgpr_spill_count:\s*(\d+)"}
    found = {label: re.search(pattern, assembly) for label, pattern in stated.items()}
    return {label: int(match[1]) for label, match in found.items() if match}


def _section(elf: bytes, wanted: bytes) -> bytes:
    """Returns the content of the section called ``wanted`` of a 64-bit ELF file, b"" where there is none."""
    (table,), (entry_size, entries, names) = struct.unpack_from("<Q", elf, 40), struct.unpack_from("<HHH", elf, 58)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + entry_size * index) for index in range(entries)]
    for name_at, _, _, _, offset, size in headers:
        start = headers[names][4] + name_at
        if elf[start : elf.index(b"\0", start)] == wanted:
            return elf[offset : offset + size]
    return b""
