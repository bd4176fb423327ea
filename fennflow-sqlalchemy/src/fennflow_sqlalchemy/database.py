"""Databases: engines, transactions that survive a lost connection, and what dialects differ in."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from zlib import crc32

import stamina
from sqlalchemy import (
    JSON,
    Column,
    ColumnElement,
    Double,
    FromClause,
    Table,
    Text,
    bindparam,
    cast,
    event,
    extract,
    func,
    literal_column,
    select,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from fennflow.exceptions import BackendUnavailableException, FennFlowException
from fennflow_sqlalchemy.tables import catalog_id_of, migrate

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.types import TypeEngine

    from fennflow_sqlalchemy.config import SqlalchemyBackendConfig

R = TypeVar("R")

Dialect = Literal["sqlite", "postgresql"]
Work = Callable[[AsyncConnection], Awaitable[R]]

# Rolled back by the database for sure: serialization failure and deadlock.
ROLLED_BACK = {"40001", "40P01"}
# The server is going away, starting, full, or was kept waiting: what was not committed did not
# happen.
_NOT_NOW = {"57P01", "57P02", "57P03", "53300", "25P03"}
_LOCK_NOT_AVAILABLE = "55P03"

TURN_PATIENCE = 5.0
"""Long for those who write, of whom each takes milliseconds; short beside `busy_timeout`, for which
one of them may be waiting for another process."""


class ImpatientError(Exception):
    """Another transaction held a lock for longer than one was ready to wait; nothing happened."""


class _Again(Exception):  # noqa: N818 - a signal
    """Nothing was committed, or it may be repeated: try once more."""


def sqlstate(error: BaseException) -> str | None:
    """Return PostgreSQL's code of an error."""
    return getattr(getattr(error, "orig", None), "sqlstate", None)


@dataclass(slots=True)
class Database:
    """One database: PostgreSQL, or one SQLite file.

    Args:
        name: for errors, without credentials.
        engine: its pool, of one event loop.
        dialect: which of the two.
        busy_timeout: seconds to wait for another process to release a SQLite file.
        turn_patience: seconds that one who is impatient waits for writers of this process.
    """

    name: str
    engine: AsyncEngine
    dialect: Dialect
    busy_timeout: float = 30.0
    turn_patience: float = TURN_PATIENCE
    # SQLite has one writer at a time; who waits here waits in order, and without polling.
    _writing: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def run(
        self,
        work: Work[R],
        *,
        write: bool = True,
        once: bool = False,
        patience: float | None = None,
    ) -> R:
        """Run work in a transaction, again if the connection or the race was lost.

        Args:
            work: executes statements; called once or more.
            write: whether it writes.
            once: whether a COMMIT whose answer was lost is not to be repeated: the pivot.
            patience: seconds to wait for another transaction; None for as long as it takes, on
                SQLite `busy_timeout`.

        Raises:
            ImpatientError: another transaction did not end within `patience`.
            BackendUnavailableException: the database cannot be reached, is locked or full.
            Exception: what `work` raises.
        """
        try:
            async for attempt in stamina.retry_context(
                on=_Again, attempts=7, wait_initial=0.05, wait_max=1.0, timeout=None
            ):
                with attempt:
                    return await self._once(work, write=write, once=once, patience=patience)
        except _Again as error:
            raise self.unavailable(error.__cause__ or error) from error.__cause__
        message = "unreachable: retry_context raises when it gives up"
        raise AssertionError(message)

    async def _once(self, work: Work[R], *, write: bool, once: bool, patience: float | None) -> R:
        connected = committing = False
        exclusive = self._turn(patience) if write and self.dialect == "sqlite" else nullcontext()
        try:
            async with exclusive, self._connection() as connection:
                connected = True
                await connection.execution_options(fennflow_write=write)
                async with self._waiting(connection, patience):
                    transaction = await connection.begin()
                    if patience is not None and self.dialect == "postgresql":
                        limit = f"SET LOCAL lock_timeout = {_milliseconds(patience)}"
                        await connection.exec_driver_sql(limit)
                result = await work(connection)
                committing = True
                await transaction.commit()
                return result
        except FennFlowException:
            raise
        except DBAPIError as error:
            if not connected and _locked_out(error):
                # Of two who switch a new SQLite file to WAL one is refused, and not made to wait.
                raise _Again from error
            if patience is not None and _locked_out(error):
                raise ImpatientError from error
            lost = error.connection_invalidated or sqlstate(error) in _NOT_NOW
            if sqlstate(error) in ROLLED_BACK or (lost and not (committing and once)):
                raise _Again from error
            raise self.unavailable(error) from error
        except PoolTimeoutError as error:
            raise self.unavailable(error) from error
        except (OSError, TimeoutError) as error:
            if committing and once:
                raise self.unavailable(error) from error
            raise _Again from error

    @asynccontextmanager
    async def _connection(self) -> AsyncGenerator[AsyncConnection]:
        connection = self.engine.connect()
        try:
            async with connection:
                yield connection
        finally:
            # SQLAlchemy closes it in a task of its own, so that a cancellation does not cut that
            # off. A loop that ends cancels this one, too, maybe before it has begun.
            if connection.sync_connection is not None and not connection.closed:
                await connection.close()

    @asynccontextmanager
    async def _turn(self, patience: float | None) -> AsyncGenerator[None]:
        """Write when nobody else of this process does, who may be waiting for another process."""
        # What runs in no task, as in the model, cannot be timed, and has nobody beside it.
        timed = patience is not None and asyncio.current_task() is not None
        try:
            async with asyncio.timeout(self.turn_patience) if timed else nullcontext():
                await self._writing.acquire()
        except TimeoutError as error:
            raise ImpatientError from error
        try:
            yield
        finally:
            self._writing.release()

    @asynccontextmanager
    async def _waiting(
        self, connection: AsyncConnection, patience: float | None
    ) -> AsyncGenerator[None]:
        """Let SQLite wait for its one write lock as long as somebody is ready to."""
        if patience is None or self.dialect == "postgresql":
            yield
            return
        driver: Any = (await connection.get_raw_connection()).driver_connection
        await driver.execute(f"PRAGMA busy_timeout = {_milliseconds(patience)}")
        try:
            yield
        finally:
            await driver.execute(f"PRAGMA busy_timeout = {_milliseconds(self.busy_timeout)}")

    def unavailable(self, error: BaseException) -> BackendUnavailableException:
        """Return the error for what a driver raised."""
        # The driver's words, without the statement and its parameters.
        reason = getattr(error, "orig", None) or error
        message = (
            f"The database {self.name} cannot serve now: {type(reason).__name__}: {reason}. What "
            "was under way may or may not have been done."
        )
        return BackendUnavailableException(message)

    # --- what the dialects differ in -----------------------------------------------------------

    def now(self) -> ColumnElement[float]:
        """Return the database's clock, in seconds since the epoch (P22)."""
        if self.dialect == "sqlite":
            return (func.julianday("now") - 2440587.5) * 86400.0
        return cast(extract("epoch", func.clock_timestamp()), Double)

    def insert(self, table: Table) -> sqlite.Insert | postgresql.Insert:
        """Return an insert that knows `ON CONFLICT`."""
        return sqlite.insert(table) if self.dialect == "sqlite" else postgresql.insert(table)

    def rows(self, parameter: str, columns: Sequence[Column[Any]]) -> FromClause:
        """Return a table of what one JSON parameter holds: a list of objects.

        Args:
            parameter: its name.
            columns: names and types of what the objects hold.
        """
        if self.dialect == "sqlite":
            each = func.json_each(bindparam(parameter, type_=Text())).table_valued(
                "value", name=f"{parameter}_each"
            )
            values = [
                func.json_extract(each.c.value, f"$.{column.name}", type_=column.type).label(
                    column.name
                )
                for column in columns
            ]
            return select(*values).subquery(parameter)
        typed = [Column(column.name, _bare(column.type)) for column in columns]
        source = cast(bindparam(parameter, type_=Text()), JSON)
        return (
            func.json_to_recordset(source)
            .table_valued(*typed, name=parameter)
            .render_derived(name=parameter, with_types=True)
        )


def _milliseconds(seconds: float) -> int:
    return max(1, int(seconds * 1000))


def _locked_out(error: DBAPIError) -> bool:
    busy = getattr(error.orig, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY
    return busy or sqlstate(error) == _LOCK_NOT_AVAILABLE


def _bare(kind: TypeEngine[Any]) -> TypeEngine[Any]:
    return Text(collation="C") if isinstance(kind, Text) else kind


def open_databases(
    config: SqlalchemyBackendConfig, *, lease_ttl: float
) -> tuple[Database, Database]:
    """Return the databases of catalog and journal; one and the same on PostgreSQL.

    Args:
        config: which ones.
        lease_ttl: seconds for which PostgreSQL keeps the locks of a client that fell silent.
    """
    url = make_url(config.url.get_secret_value())
    if url.get_backend_name() == "postgresql":
        engine = create_async_engine(
            url,
            pool_size=config.pool_size,
            max_overflow=0,
            isolation_level="READ COMMITTED",
            hide_parameters=True,
        )

        def on_connect_postgresql(connection: Any, _record: object) -> None:
            # Who is stopped in the middle of a transaction must not stop recovery, too.
            cursor = connection.cursor()
            patience = int(lease_ttl * 1000)
            cursor.execute(f"SET idle_in_transaction_session_timeout = {patience}")
            cursor.close()
            connection.commit()

        event.listen(engine.sync_engine, "connect", on_connect_postgresql)
        database = Database(f"{url.host or 'local'}/{url.database}", engine, "postgresql")
        return database, database
    # The pool opens files whenever it needs one more: in the directory of this moment.
    path = Path(url.database or "").absolute()
    journal = config.journal or path.with_name(f"{path.stem}.journal{path.suffix}")
    files = [
        Database(
            str(each),
            _sqlite_engine(str(url.set(database=str(each))), config),
            "sqlite",
            config.busy_timeout,
        )
        for each in (path, journal)
    ]
    return files[0], files[1]


def _sqlite_engine(url: str, config: SqlalchemyBackendConfig) -> AsyncEngine:
    engine = create_async_engine(
        url, pool_size=config.pool_size, max_overflow=0, hide_parameters=True
    )

    def on_connect(connection: Any, _record: object) -> None:
        # The driver must not begin transactions by itself: on_begin does.
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {_milliseconds(config.busy_timeout)}")
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.close()

    def on_begin(connection: Connection) -> None:
        write = connection.get_execution_options().get("fennflow_write", True)
        # A write lock that is asked for in the middle of a transaction can be refused (BUSY).
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    event.listen(engine.sync_engine, "connect", on_connect)
    event.listen(engine.sync_engine, "begin", on_begin)
    return engine


async def create_tables(
    database: Database, tables: Sequence[Table], catalog_id: str, *, create: bool
) -> str:
    """Create or migrate tables under a lock, and return the id of the catalog they belong to.

    Args:
        database: where.
        tables: of one file, that of names and values first.
        catalog_id: to give, if there is none yet.
        create: whether tables may be created and changed.

    Raises:
        ConfigException: see `tables.migrate`.
    """
    meta = tables[0]

    async def read(connection: AsyncConnection) -> str | None:
        return await connection.run_sync(lambda sync: catalog_id_of(sync, meta))

    async def work(connection: AsyncConnection) -> str:
        if database.dialect == "postgresql":
            lock = crc32(f"fennflow {meta.schema}.{meta.name}".encode())
            await connection.execute(select(func.pg_advisory_xact_lock(literal_column(str(lock)))))
        await connection.run_sync(lambda sync: migrate(sync, tables, create=create))
        insert = database.insert(meta).values(name="catalog_id", value=catalog_id)
        await connection.execute(insert.on_conflict_do_nothing())
        found = await connection.execute(select(meta.c.value).where(meta.c.name == "catalog_id"))
        return str(found.scalar_one())

    # Where nothing is to be done nobody is waited for: a user's transaction may hold SQLite's lock.
    found = await database.run(read, write=False)
    return await database.run(work) if found is None else found
