"""A reference computation to be repeated: whether this device still gives the same bits for the same question.

Only what every healthy device repeats is asked: the spec's own ideal answers to its cheapest case, and dense products
and reductions of torch, which on one device and with one library give the same bits in every process.
"""

from __future__ import annotations

import hashlib
from typing import Final

import torch

from autotune.gate.memory import bits
from autotune.gate.rig import Rig
from autotune.spec import Tensors

REPEATS: Final = 4
SIZE: Final = 1024
INTERPRETER_SIZE: Final = 64


def fingerprints(rig: Rig, seed: int) -> list[str]:
    """Returns the SHA-256 of each of ``REPEATS`` runs of the reference computation on inputs of ``seed``.

    Raises GateFault when the spec cannot answer on them, NoRoom when they do not fit into the device's free memory.
    """
    with rig.reference_time(), rig.room(rig.cases[0]):
        inputs = rig.spec.inputs(rig.problem, rig.cases[0], seed, rig.torch_device)
        size = INTERPRETER_SIZE if rig.device.interpreted else SIZE
        matrix = torch.randn((size, size), generator=torch.Generator().manual_seed(seed)).to(rig.torch_device)
        return [_digest(_dense(matrix) | rig.spec.ideal(rig.problem, dict(inputs))) for _ in range(REPEATS)]


def _dense(matrix: torch.Tensor) -> Tensors:
    """Returns a product of ``matrix`` in each precision the device has units for, and a softmax of one."""
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    products = {f"product in {dtype}": matrix.to(dtype) @ matrix.to(dtype).mT for dtype in dtypes}
    return products | {"softmax": torch.softmax(products["product in torch.float32"], -1)}


def _digest(tensors: Tensors) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode())
        found.update(bits(tensor.contiguous()).cpu().numpy().tobytes())
    return found.hexdigest()
