"""What flashbias raises.

::

    FlashBiasError
      ArgumentError     (ValueError)           a wrong shape, dtype, device or value: the call can never work
      UnsupportedError  (NotImplementedError)  a sensible wish that this version does not fulfil
"""

from __future__ import annotations

from typing import Self


class FlashBiasError(Exception):
    """Base of everything flashbias raises on purpose."""

    @classmethod
    def explain(cls, what: str, *, expected: str, got: str, cure: str = "") -> Self:
        """Returns the error as one message: what is meant, what was expected, what came and what to do."""
        message = f"{what}: expected {expected}, got {got}."
        return cls(f"{message} {cure}" if cure else message)


class ArgumentError(FlashBiasError, ValueError):
    """An argument has a wrong type, shape, dtype, device or value."""


class UnsupportedError(FlashBiasError, NotImplementedError):
    """The arguments make sense, but this version has no way to compute the result."""
