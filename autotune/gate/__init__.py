"""The gate: what a config must survive before it may run in anybody's process.

``prove`` puts one config through accuracy (:mod:`~autotune.gate.accuracy`), memory (:mod:`~autotune.gate.memory`) and
races (:mod:`~autotune.gate.races`), on inputs and buffers that a :class:`~autotune.gate.rig.Rig` keeps ready.
"""

from __future__ import annotations

from autotune.gate.accuracy import GateFault, Yardstick, yardstick
from autotune.gate.proof import Proof, prove
from autotune.gate.rig import Rig

__all__ = ["GateFault", "Proof", "Rig", "Yardstick", "prove", "yardstick"]
