"""PostgreSQL for a simulated world: each transaction of the backend's is one instant of it.

The database lives on a loop of its own in a thread, like the server of `remote.py`: a process asks, and
blocks for the answer, so the clock stands still meanwhile. What is simulated is the order of these
transactions, their faults, and the database's clock. How transactions that overlap act on each other
is tested elsewhere (`tests/contract`, `tests/faults`, `tests/scenarios`).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import Connection, Double, bindparam, cast
from sqlalchemy.engine import make_url
from sqlalchemy.sql import ColumnElement
from typing_extensions import override

from controlled_loop import START, ControlledLoop
from fennflow.backends import SqlalchemyBackendConfig
from fennflow.testing import PostgresqlServer
from fennflow_sqlalchemy import engines, journal
from fennflow_sqlalchemy.database import Database, Work
from fennflow_sqlalchemy.engines import Postgresql

T = TypeVar("T")
R = TypeVar("R")

PREFIX = "world_"
_TABLES = "SELECT tablename FROM pg_tables WHERE starts_with(tablename, 'world_')"


@dataclass(eq=False)
class RemoteDatabase:
    """A database on a server, for one world at a time.

    Args:
        server: a real one.
        loop: on which its connections live, in a thread of its own.
        world: the loop of the world, whose clock is the database's.
    """

    server: PostgresqlServer
    loop: asyncio.AbstractEventLoop
    world: ControlledLoop | None = None

    def __post_init__(self) -> None:
        url = make_url(self.config.url.get_secret_value())
        engine = engines._postgresql_engine(url, self.config, lease_ttl=60.0)
        self.database = RemotePostgresql(self, engine)

    @property
    def config(self) -> SqlalchemyBackendConfig:
        """That of all processes."""
        return SqlalchemyBackendConfig(url=self.server.url, table_prefix=PREFIX, pool_size=1)

    def now(self) -> float:
        """Return the time of the simulation."""
        return START if self.world is None else self.world.now

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """Do it now, whatever the loop of the caller thinks of time."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout=60)

    def patches(self) -> Iterable[tuple[object, str, object]]:
        """Return what backends have to use."""

        def open_databases(*_: object, **__: object) -> tuple[Database, Database]:
            return self.database, self.database

        return [(journal, "open_databases", open_databases)]

    def retained(self) -> tuple[set[str], int]:
        """Return the keys that wait for late writes, and how many locks are kept for some."""

        def work(connection: Connection) -> tuple[set[str], int]:
            late = connection.exec_driver_sql(f"SELECT key FROM {PREFIX}late_writes").scalars()
            kept = connection.exec_driver_sql(f"SELECT count(kept_until) FROM {PREFIX}locks")
            return set(late), int(kept.scalar_one())

        return self._run(work)

    def clear(self) -> None:
        """Forget what a world has left."""

        def work(connection: Connection) -> None:
            tables = list(connection.exec_driver_sql(_TABLES).scalars())
            if tables:
                connection.exec_driver_sql(f"TRUNCATE {', '.join(tables)}")

        self._run(work)

    def _run(self, work: Work[R]) -> R:
        once = Postgresql._once(self.database, work, write=True, once=True, lock_wait=5.0)
        return self.do(once)


class RemotePostgresql(Postgresql):
    """Runs each transaction to its end while the caller blocks."""

    def __init__(self, remote: RemoteDatabase, engine: Any) -> None:
        super().__init__("world", engine, lock_wait=5.0)
        self._remote = remote

    @override
    async def _once(self, work: Work[R], *, write: bool, once: bool, lock_wait: float) -> R:
        transaction = super()._once(work, write=write, once=once, lock_wait=lock_wait)
        return self._remote.do(transaction)

    @override
    def now(self) -> ColumnElement[float]:
        return cast(bindparam(None, callable_=self._remote.now, type_=Double()), Double)

    @override
    async def aclose(self) -> None:
        """Nothing: others use it."""


@contextmanager
def remote_database(server: PostgresqlServer) -> Generator[RemoteDatabase]:
    """Open connections in a thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    found = RemoteDatabase(server, loop)
    try:
        yield found
        found.do(found.database.engine.dispose())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
