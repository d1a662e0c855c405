"""Commands whose flags are known only to modules that load torch: those are imported when the command is asked for."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any


class Deferred(argparse.ArgumentParser):
    """A parser that is given its flags the first time it has something to parse."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._fill: Callable[[argparse.ArgumentParser], None] | None = None

    def defer(self, fill: Callable[[argparse.ArgumentParser], None]) -> None:
        """Has ``fill`` add the flags before anything is parsed."""
        self._fill = fill

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Parses as any parser does, with all its flags."""
        fill, self._fill = self._fill, None
        if fill is not None:
            fill(self)
        return super().parse_known_args(args, namespace)
