"""``resolve``: from a problem to the config every kernel of it shall run with.

The order of events is DESIGN.md's "The life of a call": stored pin or winner, or one sweep under a lease, or the ladder.
Each process decides a problem once; the answer is then a dictionary lookup.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from autotune import spaces
from autotune.device import DeviceInfo
from autotune.errors import AutotuneError, CacheMiss, SettingsError
from autotune.lease import claim
from autotune.messages import miss, remedy, summary
from autotune.plan import exhausted
from autotune.proofs import Adoption, Choice, Prover
from autotune.scene import Scene, open_scene
from autotune.search import Sweep
from autotune.settings import Mode, Settings
from cache_db.models import Problem, Verdict, Winner

if TYPE_CHECKING:
    from cache_db import Layers
    from cache_db.address import Address

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resolution:
    """What to run. Empty ``choices``: nothing proven, the caller must use its own fallback; ``reason`` says why.

    ``swept`` is True for the one call that tuned the problem; ``location`` names the database.
    """

    choices: dict[str, Choice]
    reason: str
    swept: bool
    location: str

    @property
    def won(self) -> bool:
        """Whether every kernel runs its winner, or what was pinned in its place, and not a rung below."""
        return bool(self.choices) and all(choice.rung in ("winner", "pinned") for choice in self.choices.values())


class _Process:
    """What one process remembers: decisions, their locks, and the databases opened."""

    def __init__(self) -> None:
        self.decided: dict[object, Resolution] = {}
        self.confirmed: dict[object, bool] = {}
        self.stores: dict[tuple[Path | None, Address | None], Layers] = {}
        self.renew_locks()

    def renew_locks(self) -> None:
        """Makes fresh locks: those inherited by a forked child may be held by threads it does not have."""
        self._guard = threading.RLock()
        self._locks: dict[object, threading.Lock] = {}
        self.sweeping = threading.Lock()

    def lock(self, key: object) -> threading.Lock:
        """Returns the lock under which ``key`` is decided."""
        with self._guard:
            return self._locks.setdefault(key, threading.Lock())

    def store(self, settings: Settings) -> Layers:
        """Returns the database of ``settings``, opened at its first use (importing SQLAlchemy takes 0.2 s)."""
        from cache_db import open_layers

        place = _place(settings)
        with self._guard:
            if place not in self.stores:
                self.stores[place] = open_layers(*place, settings.db_seconds)
            return self.stores[place]


_process = _Process()
os.register_at_fork(after_in_child=_process.renew_locks)


def resolve(problem: Problem, device: DeviceInfo, settings: Settings) -> Resolution:
    """Returns the configs ``problem`` runs with on ``device``, tuning it first if ``settings`` allow and need it.

    Thread-safe; works from any thread. Raises CacheMiss in mode "assert" when nothing stored can be used, SettingsError
    where tuning is allowed and ``settings.space`` offers what is no config. Ctrl-C during a sweep keeps the finished
    trials, frees the lease and is raised again.
    """
    key = (problem, device.index, settings.identity)
    known = _process.decided.get(key)
    if known is not None:
        return known
    with _process.lock(key):
        known = _process.decided.get(key)
        if known is None:
            known = _resolve(problem, device, settings)
            _process.decided[key] = replace(known, swept=False)
        return known


def confirm(problem: Problem, device: DeviceInfo, settings: Settings, kernel: str, choice: Choice, binary: str) -> bool:
    """Returns whether ``choice`` may run although its launch produced ``binary``, not the proven ``choice.binary``.

    The config is proven again (level 2) in a child, which must arrive at the same ``binary``; the proof is stored.
    """
    if binary == choice.binary:
        return True
    key = (problem, device.index, kernel, choice.config, binary)
    with _process.lock(key):
        if key not in _process.confirmed:
            chosen = resolve(problem, device, settings).choices
            _process.confirmed[key] = _reprove(problem, device, settings, kernel, choice, chosen, binary)
        return _process.confirmed[key]


def decided(problem: Problem, device: DeviceInfo, settings: Settings) -> Resolution | None:
    """Returns what this process has decided for ``problem``, None while it has not; decides nothing."""
    return _process.decided.get((problem, device.index, settings.identity))


def opened(settings: Settings) -> Layers | None:
    """Returns the database of ``settings`` if this process has opened it by now; opens nothing."""
    return _process.stores.get(_place(settings))


def _place(settings: Settings) -> tuple[Path | None, Address | None]:
    """Returns the folder and the server of a database; mode off has neither."""
    return (None, None) if settings.mode is Mode.OFF else (settings.cache_dir, settings.db_url)


def forget() -> None:
    """Forgets every decision of this process, so that the next ``resolve`` asks the database again."""
    _process.decided.clear()
    _process.confirmed.clear()
    _process.stores.clear()
    spaces.forget()


def _resolve(problem: Problem, device: DeviceInfo, settings: Settings) -> Resolution:
    store = _process.store(settings)
    with open_scene(problem, device, settings, store) as scene:
        try:
            return _decide_with_pins(scene)
        except (CacheMiss, SettingsError):
            raise
        except AutotuneError as error:
            reason = f"nothing could be proven: {error}"
            cure = remedy(settings)
            logger.warning("%s: %s; running without a tuned kernel. To change that: %s", summary(problem), reason, cure)
            return Resolution({}, reason, False, store.location)


def _decide_with_pins(scene: Scene) -> Resolution:
    """Decides, without pins where what they need cannot be proven: a winner that still holds needs no proof."""
    try:
        return _decide(scene)
    except (CacheMiss, SettingsError):
        raise
    except AutotuneError as error:
        if not scene.pins:
            raise
        for kernel in list(scene.pins):
            scene.drop_pin(kernel, f"nothing can be proven behind it now: {error}")
        return _decide(scene)


def _decide(scene: Scene) -> Resolution:
    """Returns pins and stored winners, or tunes, or takes the ladder."""
    prover = Prover(scene)
    mode = scene.settings.mode
    if scene.settings.space is not None and mode in (Mode.TUNE, Mode.RETUNE):
        spaces.check(scene.settings.space, scene.problem, scene.device)  # its faults show even where a winner is stored
    stored = _stored(scene, prover)
    if _satisfied(scene, stored):
        return _resolution(scene, stored)
    if mode is Mode.ASSERT:
        raise CacheMiss(miss(scene.problem, scene.store, stored.reason))
    tuned = _resolution(scene, stored)
    if mode in (Mode.TUNE, Mode.RETUNE):
        try:
            tuned = _tune(scene, prover)
        except AutotuneError as error:  # the gate's inputs or its children failed, not a candidate
            tuned = _resolution(scene, Adoption({}, f"it cannot be tuned now: {error}"))
            if stored.choices:
                logger.warning("%s: %s; running the stored winner", summary(scene.problem), tuned.reason)
        if tuned.choices:
            return tuned
    if stored.choices:
        return _resolution(scene, stored, swept=tuned.swept)
    return replace(_descend(scene, prover, tuned.reason), swept=tuned.swept)


def _tune(scene: Scene, prover: Prover) -> Resolution:
    """Sweeps under the problem's lease, unless another process did meanwhile; empty when there is no result."""
    scene.sandbox.admit()
    # This process's turn comes first: its threads and GPUs must not meet each other's lease and give up.
    with _process.sweeping:
        held = claim(scene.store, scene.problem, scene.settings.wait_seconds)
        if held is None:
            stored = _stored(scene, prover)  # what the holder has found by now
            return _resolution(scene, stored if stored.choices else Adoption({}, _taken(scene)))
        with held:
            stored = _stored(scene, prover)
            if _satisfied(scene, stored):
                return _resolution(scene, stored)
            return _sweep(scene, prover, stored.reason)


def _sweep(scene: Scene, prover: Prover, reason: str) -> Resolution:
    """Tunes all kernels, stores the winners, and returns them as read back."""
    sweep = Sweep(scene)
    logger.info(
        "%s: %s in %s; tuning in a child process: %s candidates, about %.0f s at most. To avoid this: %s",
        summary(scene.problem),
        reason,
        scene.store.location,
        ", ".join(f"{total} {kernel}" for kernel, total in sweep.sizes.items()),
        sweep.seconds,
        scene.settings.cure,
    )
    start = time.monotonic()
    winners = sweep.run()
    while not winners and sweep.failed in scene.pins:
        scene.drop_pin(sweep.failed, sweep.failure)
        sweep = Sweep(scene)
        winners = sweep.run()
    seconds = time.monotonic() - start
    if not winners:
        return _resolution(scene, Adoption({}, f"{sweep.failure} within {seconds:.0f} s"), swept=True)
    logger.info("%s: tuned in %.1f s", summary(scene.problem), seconds)
    return _resolution(scene, _keep(scene, prover, winners), swept=True)


def _keep(scene: Scene, prover: Prover, winners: Mapping[str, Winner]) -> Adoption:
    """Stores ``winners`` and returns them as read back, or as found when another process's rows may not be used here.

    A sweep restricted to some implementations, or to a kernel's pin, never replaces a winner of the full list.
    """
    before = scene.store.winners(scene.problem)
    restricted = bool(scene.settings.implementations)
    for kernel, winner in winners.items():
        replaces = kernel in before and not restricted and kernel not in scene.pins
        scene.store.put_winner(winner, replace=replaces)
    stored = prover.adopt(scene.store.winners(scene.problem))
    return stored if stored.choices else prover.adopt(winners)


def _descend(scene: Scene, prover: Prover, reason: str) -> Resolution:
    """Takes the ladder and says so once."""
    found = prover.descend(scene.store.winners(scene.problem))
    rung = f"running {found.reason}" if found.choices else f"{found.reason}; running without a tuned kernel"
    logger.warning("%s: %s; %s. To change that: %s", summary(scene.problem), reason, rung, remedy(scene.settings))
    return _resolution(scene, replace(found, reason=f"{reason}; {found.reason}"))


def _stored(scene: Scene, prover: Prover) -> Adoption:
    """Returns what the database offers to begin with: in mode "retune" pins alone."""
    if scene.settings.mode is Mode.RETUNE:
        pinned = prover.adopt({})
        return pinned if pinned.choices else Adoption({}, 'mode "retune" ignores what is stored')
    return prover.adopt(scene.store.winners(scene.problem))


def _satisfied(scene: Scene, stored: Adoption) -> bool:
    if not stored.choices or not scene.settings.finish:
        return bool(stored.choices)
    return stored.complete and exhausted(scene)


def _resolution(scene: Scene, found: Adoption, *, swept: bool = False) -> Resolution:
    return Resolution(found.choices, found.reason, swept, scene.store.location)


def _reprove(
    problem: Problem,
    device: DeviceInfo,
    settings: Settings,
    kernel: str,
    choice: Choice,
    chosen: Mapping[str, Choice],
    binary: str,
) -> bool:
    with open_scene(problem, device, settings, _process.store(settings)) as scene:
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


def _taken(scene: Scene) -> str:
    """Returns who keeps this process from tuning."""
    holder = scene.store.holder(scene.problem.hash)
    if holder is None:
        return "another process was tuning it and ended a moment ago"
    return f"another process is tuning it (owner {holder.owner.rpartition('/')[2].partition('-')[0]} on {holder.host})"
