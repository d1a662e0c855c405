"""Whether the device can be believed: the same reference computation, before and after, must give the same bits.

A GPU that is about to fail finds good configs wrong, and in a shared database its verdicts would be everybody's. What
it judged in between is therefore retracted. Trials are stored as they end, so that a killed sweep goes on where it
was; retracting leaves the rows where they are and takes their force.
"""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Self

from autotune import room
from autotune.errors import AutotuneError, NoRoom, SuspectDevice
from autotune.sandbox import GateFault
from autotune.scene import Scene

logger = logging.getLogger(__name__)


class Watch:
    """Looks at the device of ``scene`` when a ``with`` block begins and when it ends.

    Raises SuspectDevice where the bits differ; the trials committed in between have then been retracted. A look that is
    given up for want of memory is warned of, unless the block raises or ``quiet`` is set in it: then what became of the
    trials has a warning of its own.
    """

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._seed = scene.seed
        self._seen: set[str] = set()
        self.quiet = False

    def __enter__(self) -> Self:
        try:
            self._look("before anything was tried")
        except GateFault as fault:  # these inputs cannot be judged, which says nothing of the device
            logger.debug("the device cannot be watched with seed %d: %s", self._seed, fault)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._seen or (kind is not None and not issubclass(kind, AutotuneError)):
            return
        try:
            self._look("after the trials")
        except SuspectDevice:
            raise
        except AutotuneError as failure:
            # The caller's tensors may have come meanwhile: a full device is no sick one.
            if isinstance(failure, NoRoom) or room.tells_of_no_memory(str(failure)):
                level = logging.DEBUG if self.quiet or error is not None else logging.WARNING
                logger.log(level, "the device could not be watched after the trials: %s", failure)
                return
            self._suspect(f"it cannot do again what it did before the trials: {failure}")

    def _look(self, when: str) -> None:
        self._seen.update(self._scene.sandbox.fingerprints(self._seed))
        if len(self._seen) > 1:
            self._suspect(f"{when} the same reference computation gave {len(self._seen)} different results")

    def _suspect(self, what: str) -> None:
        device = self._scene.device
        reason = f"{device.uuid or device.name} is suspect: {what}"
        self._scene.retract(reason)
        raise SuspectDevice(f"{reason}; nothing found on it is kept. Have its memory and temperature checked")
