"""Databases that came with the library or from a colleague: read, never written, and never more than a help.

A seed is a SQLite file in rollback mode that nobody writes any more. It is opened without a lock, so that one on a
network share is fine, and closed after each look. Its rows were proven elsewhere: they fill gaps and outrank nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cache_db.errors import CacheError, Unavailable
from cache_db.models import Problem, Winner

if TYPE_CHECKING:
    from cache_db.store import Store

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Seeds:
    """The winners of some sealed files; of two files the earlier counts. A file that cannot be read is one warning."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._left = list(paths)
        self._stores: dict[Path, Store] = {}

    def winners(self, problem: Problem) -> dict[str, tuple[Path, Winner]]:
        """Returns kernel -> the file that has a winner of it, and the winner."""
        found: dict[str, tuple[Path, Winner]] = {}
        for path, winners in self._each(lambda store: store.winners(problem)):
            for kernel, winner in winners.items():
                found.setdefault(kernel, (path, winner))
        return found

    def neighbours(self, problem: Problem, soft_fields: frozenset[str], limit: int) -> list[dict[str, Winner]]:
        """Returns the winners of the nearest problems that differ in ``soft_fields`` only, each file's nearest first."""
        found = self._each(lambda store: store.neighbours(problem, soft_fields, limit))
        return [group for _, groups in found for group in groups]

    def nearest(self, problem: Problem, limit: int) -> list[Problem]:
        """Returns the other problems with winners that differ in the fewest columns and fields, of each file."""
        return [other for _, others in self._each(lambda store: store.nearest(problem, limit)) for other in others]

    def _each(self, action: Callable[[Store], T]) -> list[tuple[Path, T]]:
        found: list[tuple[Path, T]] = []
        for path in list(self._left):
            try:
                found.append((path, action(self._opened(path))))
            except CacheError as error:
                self._left.remove(path)
                logger.warning("Tuning seeds: %s; the file is not used.", error)
        return found

    def _opened(self, path: Path) -> Store:
        if path not in self._stores:
            try:
                from cache_db.store import Store
            except ImportError as error:
                raise Unavailable(f"{path} cannot be opened without a Python module: {error}") from error
            self._stores[path] = Store.open_sealed(path)
        return self._stores[path]
