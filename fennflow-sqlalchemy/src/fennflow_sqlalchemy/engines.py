"""The two kinds of databases: PostgreSQL on asyncpg, and SQLite in threads."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import (
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
    nullcontext,
    suppress,
)
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from time import monotonic
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from sqlalchemy import Connection, create_engine, event
from sqlalchemy.engine import URL, Engine, make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from typing_extensions import override

from fennflow.exceptions import FennFlowException
from fennflow.threads import Threads
from fennflow_sqlalchemy.database import (
    Database,
    LockWaitTimeoutError,
    RetryableError,
    Work,
    locked_out,
)
from fennflow_sqlalchemy.forks import FILES
from fennflow_sqlalchemy.urls import driver_options, without_driver_options

if TYPE_CHECKING:
    from fennflow_sqlalchemy.config import SqlalchemyBackendConfig

R = TypeVar("R")

# The database has definitely rolled back: serialization failure and deadlock.
ROLLED_BACK = {"40001", "40P01"}
# The server is shutting down, starting, full, or timed out: uncommitted work did not happen.
_NOT_NOW = {"57P01", "57P02", "57P03", "53300", "25P03"}
LOCK_NOT_AVAILABLE = "55P03"
FAILED_BEFORE = "25P02"

SHORTEST_LOCK_WAIT = 5.0
"""Seconds that short transactions of others may take together on a busy machine."""

LOCK_SLICE = 0.5
"""Seconds for which a PostgreSQL transaction waits for a lock. Then it is rolled back and tried
again, since while it waits it must not block rows that others need, such as a heartbeat."""

SLICE = 0.1
"""Seconds for which a thread waits for SQLite's write lock before it checks whether it still should."""

MOST_AT_ONCE = 64
"""How many writers share a SQLite transaction."""

TURN_WAIT = 5.0
"""A wait that is long for writers, which take milliseconds each, but short compared with
`busy_timeout`, for which one of them may wait for another process."""


def sqlstate(error: BaseException) -> str | None:
    """Return PostgreSQL's error code."""
    orig = getattr(error, "orig", None)
    return getattr(orig, "sqlstate", None) or getattr(
        orig, "pgcode", None
    )  # psycopg2's name for it


def shown(url: URL) -> str:
    """Return host and database of a URL, without possible parts of a password.

    SQLAlchemy ends a password at its first `@`, so the text before the last `@` is not shown.
    """
    if url.get_backend_name() == "sqlite":
        return url.database or ""
    return f"{url.host or 'local'}/{url.database or ''}".rpartition("@")[2]


def _milliseconds(seconds: float) -> int:
    """Return seconds in milliseconds as both databases accept them: at most 2^31 - 1, about 25 days."""
    return max(1, min(int(seconds * 1000), (1 << 31) - 1))


class Postgresql(Database):
    """A PostgreSQL database.

    Args:
        name: for errors, without credentials.
        engine: its connection pool, of one event loop.
        lock_wait: seconds to wait for locks that other transactions hold.
        pooled: whether there may be a pooler in transaction mode. Outside of a transaction it could
            prepare a statement on one connection and execute it on another.
    """

    dialect = "postgresql"

    def __init__(
        self, name: str, engine: AsyncEngine, lock_wait: float, *, pooled: bool = False
    ) -> None:
        super().__init__(name, lock_wait)
        self.engine = engine
        # Save the round trips of BEGIN and COMMIT. A single statement sees the committed state in
        # either case.
        alone = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._reads = engine if pooled else alone

    @override
    async def _once(self, work: Work[R], *, write: bool, once: bool, lock_wait: float) -> R:
        committing = False
        try:
            async with self._connection(self.engine if write else self._reads) as connection:
                transaction = await connection.begin()
                if write and lock_wait < LOCK_SLICE:
                    limit = f"SET LOCAL lock_timeout = {_milliseconds(lock_wait)}"
                    await connection.exec_driver_sql(limit)
                result = await connection.run_sync(work)
                committing = True
                await transaction.commit()
                return result
        except FennFlowException:
            raise
        except DBAPIError as error:
            if sqlstate(error) == LOCK_NOT_AVAILABLE:
                raise LockWaitTimeoutError from error
            lost = error.connection_invalidated or sqlstate(error) in _NOT_NOW
            if sqlstate(error) in ROLLED_BACK or (lost and not (committing and once)):
                raise RetryableError from error
            raise self.unavailable(error) from error
        except PoolTimeoutError as error:
            raise self.unavailable(error) from error
        except (OSError, TimeoutError) as error:
            if committing and once:
                raise self.unavailable(error) from error
            raise RetryableError from error

    @asynccontextmanager
    async def _connection(self, engine: AsyncEngine) -> AsyncGenerator[AsyncConnection]:
        connection = engine.connect()
        try:
            async with connection:
                yield connection
        finally:
            # SQLAlchemy closes it in a separate task, so that a cancellation does not cut that off.
            # A loop that ends cancels this task, too, perhaps before it has begun.
            if connection.sync_connection is not None and not connection.closed:
                await connection.close()

    @override
    def peek(self, connection: Connection) -> AbstractContextManager[Connection]:
        return nullcontext(connection)

    @override
    async def aclose(self) -> None:
        await self.engine.dispose()


@dataclass(eq=False, slots=True)
class _Write(Generic[R]):
    """One write, and its outcome.

    Args:
        work: executes statements.
        lock_wait: seconds to wait for another process.
        turn: set when its turn comes, to whether it has to write by itself and not together with
            others.
        end: set when another writer has written it.
        cancelled: set if one of a group of writers no longer wants to wait.
    """

    work: Work[R]
    lock_wait: float
    turn: asyncio.Future[bool]
    end: asyncio.Future[None]
    cancelled: Event = field(default_factory=Event)
    result: Any = None
    error: BaseException | None = None

    def outcome(self) -> R:
        """Return the result of the work, or raise its error."""
        if self.error is not None:
            raise self.error
        result: R = self.result
        return result


async def _ended(done: asyncio.Future[Any], cancelled: Event) -> asyncio.CancelledError | None:
    """Wait for the work of a thread; return a cancellation that arrived meanwhile."""
    cancellation: asyncio.CancelledError | None = None
    while not done.done():
        try:
            await asyncio.wait({done})
        except asyncio.CancelledError as error:
            cancellation = error
            cancelled.set()
    return cancellation


class Sqlite(Database):
    """One SQLite file. Each transaction is one call in a thread.

    There is one writer at a time. Waiting writes are executed together in one transaction, so that
    they need only one sync of the disk (group commit).

    Args:
        name: its path.
        engine: its connection pool, with one connection for each thread and one for `peek`.
        threads: the threads that do all the work.
        busy_timeout: seconds to wait for another process to release the file.
        lock_wait: seconds to wait for its write lock.
    """

    dialect = "sqlite"

    def __init__(
        self,
        name: str,
        engine: Engine,
        threads: ThreadPoolExecutor,
        *,
        busy_timeout: float,
        lock_wait: float,
    ) -> None:
        super().__init__(name, lock_wait)
        self.engine = engine
        self.turn_wait = TURN_WAIT
        self._threads = threads
        self._busy_timeout = busy_timeout
        # There is one writer at a time; the others wait here in order, without occupying a thread.
        self._writing = False
        self._waiting: deque[_Write[Any]] = deque()

    @override
    async def _once(self, work: Work[R], *, write: bool, once: bool, lock_wait: float) -> R:
        if not write:
            return await self._in_thread(lambda: self._read(work), Event())
        loop = asyncio.get_running_loop()
        mine = _Write(work, lock_wait, loop.create_future(), loop.create_future())
        if self._writing and not await self._turn(mine):
            return mine.outcome()
        self._writing = True
        group: list[_Write[Any]] = [mine]
        while self._waiting and len(group) < MOST_AT_ONCE:
            group.append(self._waiting.popleft())
            group[-1].cancelled = mine.cancelled
            group[-1].turn.set_result(False)
        try:
            await self._in_thread(lambda: self._write(group, mine.cancelled), mine.cancelled)
        except asyncio.CancelledError as error:
            raise error from mine.error
        finally:
            for each in group:
                each.end.set_result(None)
            self._pass_turn_on()
        return mine.outcome()

    async def _in_thread(self, work: Callable[[], R], cancelled: Event) -> R:
        """Run it in a thread to its end; if the caller is cancelled, it stops waiting for locks."""
        done = asyncio.get_running_loop().run_in_executor(self._threads, work)
        cancellation = await _ended(done, cancelled)
        if cancellation is not None:
            raise cancellation from done.exception()
        return done.result()

    async def _turn(self, write: _Write[Any]) -> bool:
        """Wait for the turn to write, or until another writer has written it.

        Returns:
            whether it is this writer's turn.

        Raises:
            LockWaitTimeoutError: the current writer took too long, as when another process holds
                the lock.
        """
        self._waiting.append(write)
        try:
            async with asyncio.timeout(max(self.turn_wait, write.lock_wait)):
                await asyncio.wait({write.turn})
        except (TimeoutError, asyncio.CancelledError) as error:
            if not write.turn.done():
                self._waiting.remove(write)
                if isinstance(error, TimeoutError):
                    raise LockWaitTimeoutError from error
                raise
            if isinstance(error, asyncio.CancelledError):
                if write.turn.result():
                    self._pass_turn_on()
                else:
                    write.cancelled.set()
                    await _ended(write.end, write.cancelled)
                raise error from write.error
        if write.turn.result():
            return True
        cancellation = await _ended(write.end, write.cancelled)
        if cancellation is not None:
            raise cancellation from write.error
        return False

    def _pass_turn_on(self) -> None:
        if self._waiting:
            self._waiting.popleft().turn.set_result(True)
        else:
            self._writing = False

    def _read(self, work: Work[R]) -> R:
        with self._reading() as connection:
            return work(connection)

    @contextmanager
    def _reading(self) -> Generator[Connection]:
        with self._translated(), self._connection() as connection, connection.begin():
            connection.exec_driver_sql("BEGIN")
            yield connection

    def _write(self, group: Sequence[_Write[Any]], cancelled: Event) -> None:
        """Execute all writes of a group in one transaction; each has its own outcome."""
        try:
            with self._connection() as connection, connection.begin():
                lock_wait = min(each.lock_wait for each in group)
                self._begin_to_write(connection, lock_wait, cancelled)
                if len(group) == 1:
                    group[0].result = group[0].work(connection)
                    return
                for each in group:
                    self._write_one(connection, each)
        except BaseException as error:  # noqa: BLE001 - it is the outcome of each write
            for each in group:
                each.error = each.error or self._own(error)

    def _write_one(self, connection: Connection, write: _Write[Any]) -> None:
        """Execute one write of a group; if it fails, only its own statements are undone.

        Raises:
            RetryableError: SQLite has undone the whole transaction, as when the disk is full.
        """
        driver: Any = connection.connection.driver_connection
        driver.execute("SAVEPOINT one")
        try:
            write.result = write.work(connection)
        except BaseException as error:
            write.error = self._own(error)
            if not driver.in_transaction:
                raise RetryableError from error
            driver.execute("ROLLBACK TO one")
        driver.execute("RELEASE one")

    def _own(self, error: BaseException) -> BaseException:
        """Return a separate error for one of several writers with the same failure."""
        own: BaseException = error
        if isinstance(error, (DBAPIError, PoolTimeoutError)):
            own = self.unavailable(error)
        elif isinstance(error, (LockWaitTimeoutError, RetryableError)):
            own = type(error)()
            error = error.__cause__ or error
        if own is not error:
            own.__cause__ = error
        return own

    @contextmanager
    def _connection(self) -> Generator[Connection]:
        with FILES.using():
            try:
                connection = self.engine.connect()
            except DBAPIError as error:
                if locked_out(error):
                    # If two connections switch a new file to WAL, SQLite refuses one of them
                    # instead of waiting.
                    raise RetryableError from error
                raise
            with connection:
                yield connection

    def _begin_to_write(self, connection: Connection, lock_wait: float, cancelled: Event) -> None:
        """Wait for the write lock at the start; later on, it could be refused."""
        deadline = monotonic() + lock_wait
        driver: Any = connection.connection.driver_connection
        driver.execute(f"PRAGMA busy_timeout = {_milliseconds(min(SLICE, lock_wait))}")
        try:
            while True:
                try:
                    connection.exec_driver_sql("BEGIN IMMEDIATE")
                except DBAPIError as error:
                    if not locked_out(error):
                        raise
                    if monotonic() >= deadline or cancelled.is_set():
                        raise LockWaitTimeoutError from error
                else:
                    return
        finally:
            driver.execute(f"PRAGMA busy_timeout = {_milliseconds(self._busy_timeout)}")

    @contextmanager
    def _translated(self) -> Generator[None]:
        try:
            yield
        except DBAPIError as error:
            raise self.unavailable(error) from error
        except PoolTimeoutError as error:
            raise self.unavailable(error) from error

    @override
    def peek(self, connection: Connection) -> AbstractContextManager[Connection]:
        return self._reading()

    @override
    async def aclose(self) -> None:
        # The last connection that closes a file moves the contents of its WAL.
        await self._in_thread(self.engine.dispose, Event())
        self._threads.shutdown(wait=False)


def open_databases(
    config: SqlalchemyBackendConfig, *, lease_ttl: float, lock_timeout: float = SHORTEST_LOCK_WAIT
) -> tuple[Database, Database]:
    """Return the databases of catalog and journal; on PostgreSQL they are the same.

    Args:
        config: the config of the backend.
        lease_ttl: seconds for which PostgreSQL keeps the locks of an unresponsive client.
        lock_timeout: seconds to wait for locks that users' transactions hold.
    """
    lock_wait = max(lock_timeout, SHORTEST_LOCK_WAIT)
    url = make_url(config.url.get_secret_value())
    if url.get_backend_name() == "postgresql":
        engine = _postgresql_engine(url, config, lease_ttl)
        pooled = driver_options(url.query).get("prepared_statement_cache_size") == 0
        database = Postgresql(shown(url), engine, lock_wait, pooled=pooled)
        return database, database
    # The pool opens files later: fix the path relative to the current directory now.
    path = Path(url.database or "").absolute()
    journal = config.journal or path.with_name(f"{path.stem}.journal{path.suffix}")
    # The driver that the URL names is for users' own transactions.
    url = url.set(drivername="sqlite")
    # Users' transactions write to the first file; only FennFlow's short transactions write to the
    # other one.
    shorter = min(lock_wait, config.busy_timeout)
    catalog = _sqlite(url.set(database=str(path)), config, shorter)
    return catalog, _sqlite(url.set(database=str(journal)), config, config.busy_timeout)


def _postgresql_engine(url: URL, config: SqlalchemyBackendConfig, lease_ttl: float) -> AsyncEngine:
    engine = create_async_engine(
        without_driver_options(url),
        connect_args=driver_options(url.query),
        pool_size=config.pool_size,
        max_overflow=0,
        isolation_level="READ COMMITTED",
        hide_parameters=True,
    )

    def on_connect(connection: Any, _record: object) -> None:
        # A process that is stopped in the middle of a transaction must not block recovery.
        cursor = connection.cursor()
        cursor.execute(f"SET idle_in_transaction_session_timeout = {_milliseconds(lease_ttl)}")
        cursor.execute(f"SET lock_timeout = {_milliseconds(LOCK_SLICE)}")
        cursor.close()
        connection.commit()

    event.listen(engine.sync_engine, "connect", on_connect)
    return engine


def _sqlite(url: URL, config: SqlalchemyBackendConfig, lock_wait: float) -> Sqlite:
    # One more than the number of threads, for the other file's writer, which reads here.
    engine = create_engine(url, pool_size=config.pool_size, max_overflow=1, hide_parameters=True)

    def on_connect(connection: sqlite3.Connection, _record: object) -> None:
        # The driver must not begin transactions by itself.
        connection.isolation_level = None
        connection.execute(f"PRAGMA busy_timeout = {_milliseconds(config.busy_timeout)}")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")

    def create(_dialect: object, _record: object, arguments: list[Any], _options: object) -> None:
        # SQLite gives its journal files the mode of this file.
        with suppress(OSError):  # it exists, or the driver reports the error
            os.close(os.open(arguments[0], os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            Path(arguments[0]).chmod(config.file_mode)

    FILES.engines.add(engine)
    event.listen(engine, "do_connect", create)
    event.listen(engine, "connect", on_connect)
    threads = Threads(config.pool_size, thread_name_prefix="fennflow-sqlite")
    return Sqlite(
        str(url.database), engine, threads, busy_timeout=config.busy_timeout, lock_wait=lock_wait
    )
