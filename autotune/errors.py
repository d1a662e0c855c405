"""What autotune raises.

::

    AutotuneError
    ├── CacheMiss      (also LookupError)  mode "assert" and nothing stored can be used
    ├── NoRoom                             too little memory is free on the device
    ├── SettingsError  (also ValueError)   a setting has a value it cannot have
    └── SuspectDevice  the device computed one thing in two ways

    Taken              (no error, only with ``Settings.leave``)  another process tunes the problem

A kernel that is wrong, racy, crashes or hangs is never an exception: it is a verdict.
"""

from __future__ import annotations


class AutotuneError(Exception):
    """Base of everything autotune raises on purpose."""


class CacheMiss(AutotuneError, LookupError):
    """Nothing proven is stored for a problem, and mode "assert" forbids to tune it."""


class NoRoom(AutotuneError):
    """Too little memory is free on the device to tune or prove anything now.

    ``shrinkable`` says that it was wanted for the sizes that are timed, which may be smaller; ``own`` that it was
    wanted by one candidate's launch, and perhaps by no other's.
    """

    def __init__(self, reason: str, *, shrinkable: bool = False, own: bool = False) -> None:
        super().__init__(reason)
        self.shrinkable = shrinkable
        self.own = own


class SuspectDevice(AutotuneError):
    """The device did not repeat a reference computation to the bit, so no verdict of it means anything."""


class SettingsError(AutotuneError, ValueError):
    """A setting has a value it cannot have; the message lists the right ones."""


class Taken(Exception):
    """Another process tunes the problem, and the settings leave it to that; the message says who."""
