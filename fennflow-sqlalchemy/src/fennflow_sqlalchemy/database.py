"""A database: transactions with retries, and the differences between the dialects."""

from __future__ import annotations

import logging
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from zlib import crc32

import uuid_utils
from sqlalchemy import (
    JSON,
    Column,
    ColumnElement,
    Connection,
    Double,
    FromClause,
    Select,
    Table,
    Text,
    any_,
    bindparam,
    cast,
    extract,
    func,
    literal_column,
    select,
)
from sqlalchemy.dialects import postgresql, sqlite

from fennflow.exceptions import BackendUnavailableException, RecordLockedException
from fennflow.retries import repeat
from fennflow_sqlalchemy.tables import catalog_id_of, make_tables, migrate

if TYPE_CHECKING:
    from sqlalchemy import Executable
    from sqlalchemy.types import TypeEngine

    from fennflow_sqlalchemy.config import SqlalchemyBackendConfig


R = TypeVar("R")

Dialect = Literal["sqlite", "postgresql"]
Work = Callable[[Connection], R]


class LockWaitTimeoutError(Exception):
    """Another transaction held a lock for longer than the wait; nothing happened."""


class RetryableError(Exception):
    """Nothing was committed, or the work may be repeated: try again."""


class Database(ABC):
    """One database: PostgreSQL, or one SQLite file.

    Args:
        name: the name for errors, without credentials.
        lock_wait: seconds to wait for locks that other transactions hold.
    """

    dialect: Dialect

    def __init__(self, name: str, lock_wait: float) -> None:
        self.name = name
        self.lock_wait = lock_wait

    async def run(
        self,
        work: Work[R],
        *,
        write: bool = True,
        once: bool = False,
        lock_wait: float | None = None,
    ) -> R:
        """Run work in a transaction; retry if the connection was lost or another transaction won a race.

        Args:
            work: executes statements; called once or more, on SQLite in another thread.
            write: whether it writes.
            once: whether a COMMIT whose answer was lost must not be repeated, as for the pivot.
            lock_wait: seconds to wait for another transaction; None for the database's default.

        Raises:
            LockWaitTimeoutError: another transaction did not end within the `lock_wait` that was given.
            RecordLockedException: it did not end within the database's default wait.
            BackendUnavailableException: the database cannot be reached, is locked or full.
            Exception: any exception of `work`.
        """
        left = self.lock_wait if lock_wait is None else lock_wait
        deadline = monotonic() + left
        while True:
            try:
                return await self._repeat(work, write=write, once=once, lock_wait=left)
            except LockWaitTimeoutError as error:
                left = deadline - monotonic()
                if left > 0:
                    continue
                if lock_wait is not None:
                    raise
                message = (
                    f"Another transaction of the database {self.name} held a required lock for longer than "
                    f"{self.lock_wait} s, so nothing was changed. Retry when it has ended. If it is "
                    "your own transaction around this call, end it first, or join it."
                )
                raise RecordLockedException(message) from error

    async def read(
        self, statement: Executable, parameters: Mapping[str, Any] | None = None
    ) -> list[Any]:
        """Return the rows of one read-only statement; see `run`.

        Args:
            statement: what to execute.
            parameters: its values.
        """
        return await self.run(lambda each: _rows(each, statement, parameters), write=False)

    async def write(
        self,
        statement: Executable,
        parameters: Mapping[str, Any] | None = None,
        *,
        lock_wait: float | None = None,
    ) -> list[Any]:
        """Execute one writing statement, and return the rows of its RETURNING; see `run`.

        Args:
            statement: what to execute.
            parameters: its values.
            lock_wait: like that of `run`.
        """
        return await self.run(lambda each: _rows(each, statement, parameters), lock_wait=lock_wait)

    async def _repeat(self, work: Work[R], *, write: bool, once: bool, lock_wait: float) -> R:
        try:
            return await repeat(
                lambda: self._once(work, write=write, once=once, lock_wait=lock_wait),
                on=lambda error: isinstance(error, RetryableError),
                attempts=7,
                what=f"A transaction of {self.name}",
                wait_initial=0.05,
                wait_max=1.0,
                level=logging.INFO,
            )
        except RetryableError as error:
            raise self.unavailable(error.__cause__ or error) from error.__cause__

    @abstractmethod
    async def _once(self, work: Work[R], *, write: bool, once: bool, lock_wait: float) -> R:
        """Try it once.

        Raises:
            RetryableError: nothing was committed, or the work may be repeated.
            LockWaitTimeoutError: another transaction held a lock, for `lock_wait` or a part of it.
        """

    @abstractmethod
    def peek(self, connection: Connection) -> AbstractContextManager[Connection]:
        """Return a connection for reads here, within the work of a transaction on another database.

        Args:
            connection: the connection of the transaction, which may be on this database.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Close all connections."""

    def unavailable(self, error: BaseException) -> BackendUnavailableException:
        """Return the error for an exception of a driver."""
        # The driver's message, without the statement and its parameters.
        reason = getattr(error, "orig", None) or error
        then = "The current operation may or may not have been applied."
        if _sqlite_code(error) in {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY}:
            then = (
                "Its directory must exist, and this process must be able to write the file and in the "
                "directory, even to read: SQLite writes files next to it."
            )
        message = f"Database {self.name} is unavailable: {type(reason).__name__}: {reason}. {then}"
        return BackendUnavailableException(message)

    # --- differences between the dialects ----------------------------------------------------

    def now(self) -> ColumnElement[float]:
        """Return the time of the database's clock, in seconds since the epoch (P22)."""
        if self.dialect == "sqlite":
            return (func.julianday("now") - 2440587.5) * 86400.0
        return cast(extract("epoch", func.clock_timestamp()), Double)

    def insert(self, table: Table) -> sqlite.Insert | postgresql.Insert:
        """Return an insert with support for `ON CONFLICT`."""
        return sqlite.insert(table) if self.dialect == "sqlite" else postgresql.insert(table)

    def among(self, column: Column[str], values: Select[Any]) -> ColumnElement[bool]:
        """Return a condition that a column has one of a few values, each looked up in the index.

        With a join both databases may scan the whole table.
        """
        if self.dialect == "sqlite":
            return column.in_(values)
        array: ColumnElement[Any] = func.array(
            values.scalar_subquery(), type_=postgresql.ARRAY(Text)
        )
        return column == any_(array)

    def rows(self, parameter: str, columns: Sequence[Column[Any]]) -> FromClause:
        """Return a table of the contents of a JSON parameter, which is a list of objects.

        Args:
            parameter: its name.
            columns: the names and types of the objects' members.
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


def _rows(
    connection: Connection, statement: Executable, parameters: Mapping[str, Any] | None
) -> list[Any]:
    result = connection.execute(statement, parameters)
    return list(result) if result.returns_rows else []


def _bare(kind: TypeEngine[Any]) -> TypeEngine[Any]:
    return Text(collation="C") if isinstance(kind, Text) else kind


def locked_out(error: BaseException | None) -> bool:
    """Return whether SQLite refused because another transaction holds the file's lock."""
    return _sqlite_code(error) == sqlite3.SQLITE_BUSY


def _sqlite_code(error: BaseException | None) -> int:
    """Return SQLite's primary error code, without the bits of the extended code; 0 if there is none."""
    code: int = getattr(getattr(error, "orig", None), "sqlite_errorcode", 0)
    return code & 0xFF


async def create_tables(
    database: Database, tables: Sequence[Table], catalog_id: str, *, create: bool
) -> str:
    """Create or migrate tables under a lock, and return the id of the catalog they belong to.

    Args:
        database: the database.
        tables: the tables of one file, first the one with names and values.
        catalog_id: the id to store, if there is none yet.
        create: whether tables may be created and changed.

    Raises:
        ConfigException: see `tables.migrate`.
    """
    meta = tables[0]

    def read(connection: Connection) -> str | None:
        return catalog_id_of(connection, meta)

    def work(connection: Connection) -> str:
        return create_tables_on(connection, tables, catalog_id, create=create)

    try:
        # If there is nothing to do, do not wait for a lock, which a user's transaction may hold.
        found = await database.run(read, write=False)
        return await database.run(work) if found is None else found
    except (RecordLockedException, BackendUnavailableException) as error:
        if isinstance(error, RecordLockedException) or locked_out(error.__cause__):
            error.add_note(
                f"This happened while {database.name} was opened. On SQLite your own transaction keeps "
                "others from creating the tables. With Django, run manage.py migrate. Otherwise hold "
                "UOW.lifespan() from the start of the program: then it happens there."
            )
        raise


def create_tables_on(
    connection: Connection, tables: Sequence[Table], catalog_id: str, *, create: bool
) -> str:
    """Implement `create_tables`, in a transaction that may write.

    Args:
        connection: a connection in that transaction.
        tables: as for `create_tables`.
        catalog_id: as for `create_tables`.
        create: as for `create_tables`.
    """
    meta = tables[0]
    insert: sqlite.Insert | postgresql.Insert = sqlite.insert(meta)
    if connection.dialect.name == "postgresql":
        insert = postgresql.insert(meta)
        lock = crc32(f"fennflow {meta.schema}.{meta.name}".encode())
        connection.execute(select(func.pg_advisory_xact_lock(literal_column(str(lock)))))
    migrate(connection, tables, create=create)
    values = insert.values(name="catalog_id", value=catalog_id)
    connection.execute(values.on_conflict_do_nothing())
    found = connection.execute(select(meta.c.value).where(meta.c.name == "catalog_id"))
    return str(found.scalar_one())


def has_catalog(connection: Connection, config: SqlalchemyBackendConfig) -> bool:
    """Return whether the tables of a catalog exist in this version.

    Args:
        connection: to the database.
        config: the config of the backend that will use it.
    """
    meta = make_tables(config.table_prefix, config.schema_name)[1].meta
    return catalog_id_of(connection, meta) is not None


def create_catalog(connection: Connection, config: SqlalchemyBackendConfig) -> None:
    """Create missing tables of a catalog, in a user's transaction such as a migration.

    On SQLite its journal is in another file: it is created when the catalog is first used.

    Args:
        connection: a connection in that transaction.
        config: the config of the backend that will use it.
    """
    tables = make_tables(config.table_prefix, config.schema_name)[1]
    wanted = list(tables.catalog)
    if connection.dialect.name == "postgresql":
        wanted += tables.journal
    create_tables_on(connection, wanted, str(uuid_utils.uuid7()), create=True)
