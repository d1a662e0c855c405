"""A binary that is not the proven one: the same config, compiled in another process, is proven again before it runs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from autotune.device import DeviceInfo
from autotune.errors import AutotuneError
from autotune.messages import summary
from autotune.proofs import Choice, Prover
from autotune.scene import open_scene
from autotune.settings import Settings
from cache_db.models import Problem, Verdict

if TYPE_CHECKING:
    from cache_db import Layers

logger = logging.getLogger(__name__)


def reproved(
    problem: Problem,
    device: DeviceInfo,
    settings: Settings,
    store: Layers,
    kernel: str,
    choice: Choice,
    chosen: Mapping[str, Choice],
    binary: str,
) -> bool:
    """Returns whether ``choice``, which compiles to ``binary`` here, passes a gate's proof in a child that compiles the same.

    ``chosen`` are the choices of the problem's kernels. Says why not.
    """
    with open_scene(problem, device, settings, store) as scene:
        try:
            proof = Prover(scene).proof(kernel, choice.config, chosen, 2, binary)
        except AutotuneError as error:
            logger.warning("%s: cannot prove %s again: %s", summary(problem), kernel, error)
            return False
    if proof.verdict is not Verdict.SAFE:
        logger.warning(
            "%s: %s %s fails as compiled here: %s, %s",
            summary(problem),
            kernel,
            choice.config,
            proof.verdict,
            proof.reason,
        )
        return False
    if proof.binary != binary:
        logger.warning(
            "%s: %s %s compiles to %.12s in this process but to %.12s in the one that proves it; not used",
            summary(problem),
            kernel,
            choice.config,
            binary,
            proof.binary,
        )
        return False
    return True
