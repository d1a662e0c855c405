"""The file that a version of the library keeps for itself where a newer one has laid out the database."""

from __future__ import annotations

from pathlib import Path

from cache_db import schema
from cache_db.errors import UnknownSchema
from cache_db.store import Store


def own_file(path: Path) -> Path:
    """Returns the name beside ``path`` of the database with the schema of this version."""
    return path.with_name(f"{path.stem}.schema-{schema.SCHEMA_VERSION}{path.suffix}")


def open_own(path: Path) -> Store:
    """Opens the database ``path`` or, where a newer version laid it out, the file beside it if there is one.

    Raises Unavailable, Damaged or UnknownSchema.
    """
    try:
        return Store.open(path)
    except UnknownSchema:
        own = own_file(path)
        if not own.exists():
            raise
        return Store.open(own)
