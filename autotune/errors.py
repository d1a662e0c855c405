"""What autotune raises.

::

    AutotuneError
    ├── CacheMiss      (also LookupError)  mode "assert" and nothing stored can be used
    └── SettingsError  (also ValueError)   a setting has a value it cannot have

A kernel that is wrong, racy, crashes or hangs is never an exception: it is a verdict.
"""

from __future__ import annotations


class AutotuneError(Exception):
    """Base of everything autotune raises on purpose."""


class CacheMiss(AutotuneError, LookupError):
    """Nothing proven is stored for a problem, and mode "assert" forbids to tune it."""


class SettingsError(AutotuneError, ValueError):
    """A setting has a value it cannot have; the message lists the right ones."""
