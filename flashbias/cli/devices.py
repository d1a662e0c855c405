"""The device that a command runs on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flashbias.errors import FlashBiasError

if TYPE_CHECKING:
    from autotune.device import DeviceInfo


def device(index: int | None) -> DeviceInfo:
    """Returns CUDA device ``index`` (None: the current one), or Triton's interpreter where it is switched on.

    Raises FlashBiasError, with what to do, when there is none.
    """
    import torch

    from autotune.device import describe, interpreting

    if interpreting():
        return describe(-1)
    if not torch.cuda.is_available():
        raise FlashBiasError(
            "no CUDA device found; run this where the GPU is, or set TRITON_INTERPRET=1 to try it on the CPU"
        )
    count = torch.cuda.device_count()
    if index is not None and not 0 <= index < count:
        raise FlashBiasError(f"--device: expected 0 to {count - 1}, the CUDA devices seen here, got {index}")
    return describe(torch.cuda.current_device() if index is None else index)
