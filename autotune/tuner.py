"""``resolve``: from a problem to the config every kernel of it shall run with.

The order of events is DESIGN.md's "The life of a call": stored pin or winner, or one sweep under a lease, or the ladder.
Each process decides a problem once; the answer is then a dictionary lookup.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from autotune import agreement, rendezvous, spaces
from autotune.confirmation import reproved
from autotune.device import DeviceInfo
from autotune.errors import AutotuneError, CacheMiss, SettingsError, Taken
from autotune.lease import claim
from autotune.messages import miss, remedy, summary
from autotune.plan import exhausted
from autotune.process_memory import Process, place
from autotune.proofs import Adoption, Choice, Prover
from autotune.resolution import Resolution
from autotune.scene import Scene, open_scene
from autotune.search import Sweep
from autotune.settings import Mode, Settings
from cache_db.models import Problem, Winner

if TYPE_CHECKING:
    from cache_db import Layers

logger = logging.getLogger(__name__)

_process = Process()
os.register_at_fork(after_in_child=_process.renew_locks)


def resolve(problem: Problem, device: DeviceInfo, settings: Settings) -> Resolution:
    """Returns the configs ``problem`` runs with on ``device``, tuning it first if ``settings`` allow and need it.

    Thread-safe; works from any thread. Raises CacheMiss in mode "assert" when nothing stored can be used, SettingsError
    where tuning is allowed and ``settings.space`` offers what is no config, Taken where ``settings.leave`` says so. Ctrl-C during a sweep keeps the finished
    trials, frees the lease and is raised again.
    """
    key = (problem, device.index, settings.identity)
    known = _process.decided.get(key)
    if known is not None:
        return known
    with _process.lock(key):
        known, epoch = _process.decided.get(key), _process.epoch
        while known is None or epoch != _process.epoch:  # another thread refreshed meanwhile
            epoch = _process.epoch
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
            store = _process.store(settings)
            _process.confirmed[key] = reproved(problem, device, settings, store, kernel, choice, chosen, binary)
        return _process.confirmed[key]


def decided(problem: Problem, device: DeviceInfo, settings: Settings) -> Resolution | None:
    """Returns what this process has decided for ``problem``, None while it has not; decides nothing."""
    return _process.decided.get((problem, device.index, settings.identity))


def opened(settings: Settings) -> Layers | None:
    """Returns the database of ``settings`` if this process has opened it by now; opens nothing."""
    return _process.stores.get(place(settings))


def forget() -> None:
    """Forgets every decision of this process, so that the next ``resolve`` asks the database again."""
    _process.decided.clear()
    _process.confirmed.clear()
    _process.stores.clear()
    spaces.forget()


def refresh() -> None:
    """Forgets every decision, so that the next ``resolve`` decides anew; the ranks of a job agree anew.

    What is stored stays, databases stay open, and what the shared one knows is asked for again.
    """
    _process.epoch += 1
    _process.decided.clear()
    _process.confirmed.clear()
    for store in list(_process.stores.values()):
        store.renew_knowledge()
    rendezvous.forget()


def _resolve(problem: Problem, device: DeviceInfo, settings: Settings) -> Resolution:
    with open_scene(problem, device, settings, _process.store(settings)) as scene:
        scene.bond = agreement.bond(scene, _process.epoch)
        if scene.bond is None:
            return _secured(scene, lambda: _decide_with_pins(scene))
        with scene.bond:
            found = agreement.decide(
                scene,
                scene.bond,
                lambda: _secured(scene, lambda: _decide_with_pins(scene)),
                lambda reason: _secured(scene, lambda: _decide_alike(scene, reason)),
            )
        if settings.mode is Mode.ASSERT and not found.won:
            raise CacheMiss(miss(problem, scene.store, found.reason))
        return found


def _secured(scene: Scene, decide: Callable[[], Resolution]) -> Resolution:
    """Returns what ``decide`` does, or no choices, with one warning, when nothing can be proven."""
    try:
        return decide()
    except (CacheMiss, SettingsError):
        raise
    except AutotuneError as error:
        reason = f"nothing could be proven: {error}"
        cure = remedy(scene.settings)
        logger.warning(
            "%s: %s; running without a tuned kernel. To change that: %s", summary(scene.problem), reason, cure
        )
        return Resolution({}, reason, False, scene.store.location)


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


def _decide_alike(scene: Scene, reason: str) -> Resolution:
    """Returns what every rank finds for itself: the shipped seeds' winner or the default. Nothing is swept, no pin holds."""
    reason = f"the job cannot agree: {reason}"
    for kernel in list(scene.pins):
        scene.drop_pin(kernel, reason)
    found = Prover(scene).descend(scene.store.seeded(scene.problem), near=False)
    if scene.settings.mode is Mode.ASSERT and any(choice.rung != "winner" for choice in found.choices.values()):
        raise CacheMiss(miss(scene.problem, scene.store, reason))
    return _told(scene, found, reason)


def _tune(scene: Scene, prover: Prover) -> Resolution:
    """Sweeps under the problem's lease, unless another process did meanwhile; empty when there is no result.

    In a job one rank comes to the lease, and keeps it until its decision is published.
    """
    scene.sandbox.admit()
    bond = scene.bond
    until = time.monotonic() + (bond.seconds if bond else 0.0)
    # This process's turn comes first: its threads and GPUs must not meet each other's lease and give up.
    with _process.sweeping, ExitStack() as own:
        if bond is None:
            held = claim(scene.store, scene.problem, scene.settings.wait_seconds)
        else:
            mine = bond.take_turn(until)
            held = claim(scene.store, scene.problem, until - time.monotonic(), bond.check) if mine else None
        if held is None and scene.settings.leave:
            raise Taken(_taken(scene))
        if held is None:
            stored = _stored(scene, prover)  # what the holder has found by now
            return _resolution(scene, stored if stored.choices else Adoption({}, _taken(scene)))
        (bond.held if bond else own).enter_context(held)
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
    return _told(scene, prover.descend(scene.store.winners(scene.problem)), reason)


def _told(scene: Scene, found: Adoption, reason: str) -> Resolution:
    """Returns ``found``, what the ladder has, and warns of it and of the ``reason`` for taking it."""
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


def _taken(scene: Scene) -> str:
    """Returns who keeps this process from tuning."""
    holder = scene.store.holder(scene.problem.hash)
    if holder is None:
        return "another process was tuning it and ended a moment ago"
    return f"another process is tuning it (owner {holder.owner.rpartition('/')[2].partition('-')[0]} on {holder.host})"
