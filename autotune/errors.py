"""What autotune raises.

::

    AutotuneError
    ├── CacheMiss      (also LookupError)  mode "assert" and nothing stored can be used
    ├── SettingsError  (also ValueError)   a setting has a value it cannot have
    └── SuspectDevice  the device computed one thing in two ways

A kernel that is wrong, racy, crashes or hangs is never an exception: it is a verdict.
"""

from __future__ import annotations


class AutotuneError(Exception):
    """Base of everything autotune raises on purpose."""


class CacheMiss(AutotuneError, LookupError):
    """Nothing proven is stored for a problem, and mode "assert" forbids to tune it."""


class SuspectDevice(AutotuneError):
    """The device did not repeat a reference computation to the bit, so no verdict of it means anything."""


class SettingsError(AutotuneError, ValueError):
    """A setting has a value it cannot have; the message lists the right ones."""
