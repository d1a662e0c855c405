"""What a compiled Triton kernel takes of a multiprocessor, and how many of its warps one can hold at a time.

The compiler knows shared memory and warps; registers and spills are known once the machine code has been loaded, and the
driver then says how many blocks fit. What nobody can say is left out: a figure is never worth a failure.
"""

from __future__ import annotations

from typing import Any, Final

from autotune import driver
from autotune.driver import Driver
from cache_db.models import Scalar

WARP: Final = 32


def figures(kernel: Any) -> dict[str, Scalar]:
    """Returns the figures of ``kernel``, what ``triton.compile`` returned: those that are known by now.

    ``shared`` is the shared memory of a block in bytes and ``num_warps`` its warps. Once the kernel has been loaded on
    the current device: ``registers`` and ``spills``, both 32-bit words of a thread (all of its local memory counts as
    spilled), and ``occupancy``, the warps that can be resident by the most a multiprocessor can hold, 0 to 1.
    """
    metadata = getattr(kernel, "metadata", None)
    named = {
        "shared": getattr(metadata, "shared", None),
        "num_warps": getattr(metadata, "num_warps", None),
        "registers": getattr(kernel, "n_regs", None),
        "spills": getattr(kernel, "n_spills", None),
    }
    found: dict[str, Scalar] = {name: value for name, value in named.items() if isinstance(value, int)}
    function = getattr(kernel, "function", None)
    if isinstance(function, int) and function and {"shared", "num_warps"} <= found.keys():
        part = occupancy(function, int(found["num_warps"]), int(found["shared"]))
        if part is not None:
            found["occupancy"] = part
    return found


def occupancy(function: int, num_warps: int, shared: int, asked: Driver | None = None) -> float | None:
    """Returns resident warps by the most a multiprocessor of the current device holds, None where the driver cannot say.

    ``function`` is the handle (CUfunction) of a kernel that is loaded there, ``shared`` its dynamic shared memory in
    bytes, and ``asked`` the driver (by default this process's own, whoever made the context).
    """
    asked = asked or driver.loaded()
    if asked is None:
        return None
    blocks, threads = asked.resident_blocks(function, WARP * num_warps, shared), asked.resident_threads()
    return None if blocks is None or not threads or threads < 0 else WARP * num_warps * blocks / threads
