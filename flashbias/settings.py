"""FlashBias's settings: the only reader of ``FLASHBIAS_*``, and the same choices as a context manager.

The environment is read at the first call, not at import, so that a program can set it after ``import flashbias``.
Settings entered with :func:`settings` hold in the current thread and its asyncio tasks. Autograd runs backward in
threads that see no context; nothing is decided there, because a forward that needs gradients decides for both.

``flashbias.settings`` names this module once it is imported and the function before; so the module is callable too.
"""

from __future__ import annotations

import difflib
import logging
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypedDict, Unpack

from autotune.errors import SettingsError
from autotune.job import Job
from autotune.settings import Mode, Settings
from cache_db.address import Address
from cache_db.errors import BadAddress

IMPLEMENTATIONS: Final = ("triton", "sdpa", "flash4")
CURE: Final = "set FLASHBIAS_MODE=read, or tune beforehand with scripts/prewarm.py"
REMEDY: Final = "tune beforehand with scripts/prewarm.py"
JOB_WAIT_SECONDS: Final = 120.0

_PREFIX: Final = "FLASHBIAS_"
_JOB: Final = "FLASHBIAS_JOB"
_ALONE: Final = "none"  # what FLASHBIAS_JOB says for a process that agrees with nobody
_LOGGERS: Final = ("flashbias", "autotune", "cache_db")
_LEVELS: Final = {"quiet": logging.WARNING, "info": logging.INFO, "debug": logging.DEBUG}

logger = logging.getLogger(__name__)


class Changes(TypedDict, total=False):
    """What :func:`settings` accepts."""

    mode: Mode | str
    cache_dir: Path | str | None
    db_url: Address | str | None
    db_seconds: float
    seeds: Sequence[Path | str]
    budget_seconds: float
    wait_seconds: float
    implementations: Sequence[str]
    log: str
    finish: bool
    space: str | None


def current() -> Settings:
    """Returns the settings in force here.

    Raises SettingsError when a ``FLASHBIAS_*`` variable has a value it cannot have.
    """
    return _override.get() or _environment()


def settings(**changes: Unpack[Changes]) -> AbstractContextManager[Settings]:
    """Changes settings inside a ``with`` block, for this thread; what is not named stays as it is outside.

    ``mode``: tune, read, assert, retune or off. ``cache_dir``: folder of the database, None for memory only.
    ``db_url``: the shared database behind it, None for none; ``db_seconds``: the longest wait for it (docs/database.md).
    ``seeds``: sealed databases whose winners fill gaps, () for none.
    ``budget_seconds``: the longest sweep of one problem. ``wait_seconds``: how long to wait for another process that
    tunes the same problem. ``implementations``: the only ones allowed, () for all. ``log``: quiet, info or debug (loggers
    belong to the process, so this one setting is seen by every thread). ``finish``: tune on where an earlier sweep ran
    out of budget, or has not tried all of ``space``. ``space``: "module:attribute" of candidates of your own, which sweeps
    try beside the library's; None for none (docs/research.md).

    Raises SettingsError (a ValueError) for an unknown name or a wrong value.

    >>> with settings(mode="read") as inside:
    ...     inside.mode.value
    'read'
    """
    for name in changes:
        if name not in Changes.__annotations__:
            known = list(Changes.__annotations__)
            raise SettingsError(f"settings: expected some of {', '.join(known)}, got {name!r}{_nearest(name, known)}")
    values: dict[str, Any] = dict(changes)
    if isinstance(values.get("cache_dir"), str | Path):
        values["cache_dir"] = _folder(str(values["cache_dir"]))
    if isinstance(values.get("db_url"), str):
        values["db_url"] = _address(values["db_url"])
    if "wait_seconds" in values:
        values["group_wait_seconds"] = None
    if "seeds" in values:
        named = values["seeds"]
        values["seeds"] = _seeds(os.pathsep.join([named] if isinstance(named, str) else map(str, named)))
    if "implementations" in values:
        values["implementations"] = _implementations(values["implementations"])
    return _inside(replace(current(), **values), relog="log" in values)


def read(environment: Mapping[str, str]) -> Settings:
    """Returns the settings that ``environment`` asks for; an unknown ``FLASHBIAS_*`` is warned about.

    So is a cache folder in the home of a user who does not exist: results are then kept in memory.

    Raises SettingsError, naming the variable and the right values, for a value that cannot be.
    """
    _warn_unknown(environment)
    values: dict[str, Any] = {"cache_dir": _default_folder(environment)}
    values |= _in_job(environment)
    for variable, (field, parse) in _VARIABLES.items():
        text = environment.get(variable, "").strip()
        if text and variable != _JOB:
            try:
                values[field] = parse(text)
                Settings(**{field: values[field]})
            except SettingsError as error:
                raise SettingsError(f"environment variable {variable}: {error}") from None
    return Settings(**values, cure=CURE, remedy=REMEDY)


def reread() -> None:
    """Has the environment read again at the next call (for tests and notebooks that change it)."""
    global _read  # noqa: PLW0603 - a process has one environment
    with _lock:
        _read = None


@contextmanager
def _inside(changed: Settings, *, relog: bool) -> Iterator[Settings]:
    token = _override.set(changed)
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    try:
        if relog:
            _set_levels(dict.fromkeys(_LOGGERS, _LEVELS[changed.log]))
        yield changed
    finally:
        _override.reset(token)
        if relog:
            _set_levels(levels)


def _environment() -> Settings:
    """Reads the process's environment once, and lets the loggers speak as it asks."""
    global _read  # noqa: PLW0603 - a process has one environment
    with _lock:
        if _read is None:
            _read = read(os.environ)
            _listen(_read.log)
        return _read


def _warn_unknown(environment: Mapping[str, str]) -> None:
    for name in sorted(environment):
        if name.startswith(_PREFIX) and name not in _VARIABLES:
            nearest = _nearest(name, [*_VARIABLES]) or f"; the variables are {', '.join(_VARIABLES)}"
            logger.warning("environment variable %s is not one of FlashBias's and has no effect%s", name, nearest)


def _nearest(name: str, known: Sequence[str]) -> str:
    words = {each.removeprefix(_PREFIX): each for each in known}
    found = [words[word] for word in difflib.get_close_matches(name.removeprefix(_PREFIX), words, n=1)]
    return f"; did you mean {found[0]}?" if found else ""


def _default_folder(environment: Mapping[str, str]) -> Path | None:
    """Returns the XDG cache folder; None, with a warning, where there is no home (results then stay in memory)."""
    root = Path(environment.get("XDG_CACHE_HOME", ""))
    if root.is_absolute():
        return root / "flashbias"
    try:
        return Path.home() / ".cache" / "flashbias"
    except RuntimeError:
        logger.warning("no home folder to keep tuning results in; set FLASHBIAS_CACHE_DIR")
        return None


def _in_job(environment: Mapping[str, str]) -> dict[str, Any]:
    """Returns the settings of a process that belongs to a job, by its launcher or by ``FLASHBIAS_JOB``, or may come to."""
    name = environment.get(_JOB, "").strip()
    if name.lower() == _ALONE:
        return {"alone": True}
    job = Job.of(environment, name)
    if job is not None:
        return {"job": job, "wait_seconds": JOB_WAIT_SECONDS}
    explicit = environment.get("FLASHBIAS_WAIT_SECONDS", "").strip()
    return {} if explicit else {"group_wait_seconds": JOB_WAIT_SECONDS}  # a process group may be made later


def _folder(text: str, expected: str = "cache_dir: expected a folder") -> Path:
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError:
        raise SettingsError(f"{expected}, got {text!r}: there is no such home folder") from None


def _folder_if_any(text: str) -> Path | None:
    """Returns the folder ``text`` names, None with a warning where it names none: a job must not end for its cache."""
    try:
        return _folder(text)
    except SettingsError as error:
        logger.warning("environment variable FLASHBIAS_CACHE_DIR: %s; tuning results are kept in memory", error)
        return None


def _shapes_file(text: str) -> Path:
    if not text.endswith(".toml"):
        raise SettingsError(f"record: expected a file that ends in .toml, got {text!r}")
    return _folder(text)


def _address(text: str) -> Address:
    try:
        return Address.parse(text)
    except BadAddress as error:
        raise SettingsError(f"db_url: {error}") from None


def _seeds(text: str) -> tuple[Path, ...]:
    """Returns the files that ``text`` names, as PATH names folders; a file that cannot be read is a warning at its use."""
    return tuple(_folder(part, "seeds: expected files") for part in text.split(os.pathsep) if part.strip())


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise SettingsError(f"expected a number of seconds, got {text!r}") from None


def _implementations(names: Sequence[str]) -> tuple[str, ...]:
    listed = names.split(",") if isinstance(names, str) else names
    found = tuple(dict.fromkeys(name.strip() for name in listed if name.strip()))
    for name in found:
        if name not in IMPLEMENTATIONS:
            raise SettingsError(f"implementations: expected some of {', '.join(IMPLEMENTATIONS)}, got {name!r}")
    return found


class _Handler(logging.StreamHandler[Any]):
    """Writes to stderr as long as the application has set up no logging of its own, whenever it does so.

    A process whose stderr is missing (a daemon's) or closed has nobody to tell, and runs on.
    """

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr
        if logging.getLogger().handlers or stream is None or getattr(stream, "closed", False):
            return
        self.stream = stream  # not setStream, which flushes the stream before: that one may be closed by now
        super().emit(record)


def _listen(log: str) -> None:
    """Gives our loggers a handler on stderr and a level where the application has set up no logging."""
    handler = _Handler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    silent = [name for name in _LOGGERS if not logging.getLogger(name).hasHandlers()]
    for name in silent:
        logging.getLogger(name).addHandler(handler)
    _set_levels(dict.fromkeys(silent, _LEVELS[log]))


def _set_levels(levels: Mapping[str, int]) -> None:
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def _renew_lock() -> None:
    """Makes a fresh lock: the one a forked child inherits may be held by a thread it does not have."""
    global _lock  # noqa: PLW0603 - a process has one environment
    _lock = threading.Lock()


class _CallableModule(types.ModuleType):
    def __call__(self, **changes: Unpack[Changes]) -> AbstractContextManager[Settings]:
        return settings(**changes)


_VARIABLES: Final[Mapping[str, tuple[str, Callable[[str], Any]]]] = {
    "FLASHBIAS_MODE": ("mode", str),
    "FLASHBIAS_CACHE_DIR": ("cache_dir", _folder_if_any),
    "FLASHBIAS_DB_URL": ("db_url", _address),
    "FLASHBIAS_DB_SECONDS": ("db_seconds", _number),
    "FLASHBIAS_SEEDS": ("seeds", _seeds),
    "FLASHBIAS_BUDGET_SECONDS": ("budget_seconds", _number),
    "FLASHBIAS_WAIT_SECONDS": ("wait_seconds", _number),
    "FLASHBIAS_IMPLEMENTATIONS": ("implementations", _implementations),
    "FLASHBIAS_JOB": ("job", str),
    "FLASHBIAS_RECORD": ("record", _shapes_file),
    "FLASHBIAS_LOG": ("log", str),
}
_override: ContextVar[Settings | None] = ContextVar("flashbias_settings", default=None)
_lock = threading.Lock()
_read: Settings | None = None
os.register_at_fork(after_in_child=_renew_lock)
sys.modules[__name__].__class__ = _CallableModule
