"""The address of a shared database: ``postgresql+psycopg://user:password@host:port/database``.

An address never shows its password: not as text, not in its repr, not in an error of this module, and
``Address.clean`` takes it out of what a driver says.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Self
from urllib.parse import quote, quote_plus

from cache_db.errors import BadAddress

FORM = "postgresql+psycopg://user@host:5432/database"
_SCHEMES = ("postgresql", "postgresql+psycopg")
_SECRETS = ("password", "sslpassword")
_INSTALL = "pip install 'flashbias[postgres]'"


@dataclass(frozen=True, repr=False)
class Address:
    """Where a shared database is. ``url`` is the whole text, password and all; everything else may be shown.

    ``shown`` names account, host and database; ``target`` is the database's name among others, the same for every account.
    """

    url: str
    shown: str
    target: str
    secrets: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Returns the address that ``text`` is. Raises BadAddress, which says what was expected, never what came."""
        try:
            import psycopg  # noqa: F401 - its libpq may be missing although the package is there
            from sqlalchemy.engine import URL, make_url
            from sqlalchemy.exc import ArgumentError
        except ImportError as error:
            raise BadAddress(f"a shared database needs the driver psycopg ({error}): {_INSTALL}") from None
        try:
            url = make_url(text.strip())
        except (ArgumentError, ValueError):
            raise BadAddress(f"expected {FORM}, got something else (not repeated: it may hold a password)") from None
        if url.drivername not in _SCHEMES:
            raise BadAddress(f"expected {FORM}, got an address that begins with {url.drivername!r}")
        query = {name: value for name, value in url.query.items() if name not in _SECRETS}
        scheme, where = "postgresql+psycopg", (url.host, url.port, url.database)
        place = URL.create(scheme, None, None, *where, query).render_as_string()
        values = [url.password, *(url.query.get(name) for name in _SECRETS)]
        plain = {value for value in values if isinstance(value, str) and value}
        secrets = {form for value in plain for form in (value, quote(value), quote(value, safe=""), quote_plus(value))}
        return cls(
            url=url.set(drivername=scheme).render_as_string(hide_password=False),
            shown=URL.create(scheme, url.username, None, *where).render_as_string(),
            target=hashlib.sha256(place.encode()).hexdigest(),
            secrets=tuple(sorted(secrets, key=len, reverse=True)),
        )

    def clean(self, text: object) -> str:
        """Returns ``text`` in one line, without this address's password in any of its forms."""
        line = " ".join(str(text).split())
        for secret in self.secrets:
            line = line.replace(secret, "***")
        return line

    def __str__(self) -> str:
        return self.shown

    def __repr__(self) -> str:
        return f"Address({self.shown!r})"
