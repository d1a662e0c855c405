"""Lets the tests of this folder, and the processes they start, share ``store_examples``, and one PostgreSQL server."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))

if TYPE_CHECKING:
    from postgres import Cluster, Proxy

    from cache_db.address import Address


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A server of our own, which a test may stop, as long as it starts it again."""
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("no PostgreSQL: psycopg is not installed (pip install '.[dev]')")
    import postgres

    if postgres.binaries() is None:
        pytest.skip(postgres.MISSING)
    found = postgres.Cluster()
    try:
        found.start()
        yield found
    finally:
        found.remove()


@pytest.fixture
def database(request: pytest.FixtureRequest) -> Iterator[Address]:
    """The address of an empty schema on the server that TEST_DB_URL names, else on our own."""
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("no PostgreSQL: psycopg is not installed (pip install '.[dev]')")
    import postgres

    with postgres.fresh_schema(postgres.shared_server() or request.getfixturevalue("cluster").url()) as address:
        yield address


@pytest.fixture
def own(cluster: Cluster) -> Iterator[Address]:
    """The address of an empty schema on our own server."""
    import postgres

    with postgres.fresh_schema(cluster.url()) as address:
        yield address


@pytest.fixture
def proxy(cluster: Cluster) -> Iterator[Proxy]:
    """A proxy in front of our own server."""
    import postgres

    found = postgres.Proxy(cluster.port)
    yield found
    found.close()
