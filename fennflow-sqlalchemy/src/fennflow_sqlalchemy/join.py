"""Files and rows in one transaction: the pivot is written in a transaction of the user's (P5).

The transaction may see none of the journal's rows, if its snapshot is older (REPEATABLE READ), and
on SQLite it holds the file's one write lock as soon as it has written. So it gets the decision, an
insert, and the records; everything else happens on connections of the backend's own.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import Connection, Table, func, select, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
from sqlalchemy.orm import SessionTransactionOrigin
from typing_extensions import override

from fennflow.backends import Commit, JoinedTransaction, SessionToken
from fennflow.exceptions import ConfigException, ConflictException, TransactionException
from fennflow_sqlalchemy.database import Database
from fennflow_sqlalchemy.engines import ROLLED_BACK, shown, sqlstate
from fennflow_sqlalchemy.tables import catalog_id_of

if TYPE_CHECKING:
    from sqlalchemy import RootTransaction

Pivot = Callable[[AsyncConnection, SessionToken, Commit], Awaitable[None]]


class UserTransaction(JoinedTransaction):
    """The transaction of a session or connection of SQLAlchemy's.

    Args:
        transaction: what the user joined.
        catalog: the database that it has to be on.
        meta: a table of the catalog.
        pivot: what writes decision and records on a connection.

    Raises:
        ConfigException: it is neither a session nor a connection.
    """

    def __init__(self, transaction: object, catalog: Database, meta: Table, pivot: Pivot) -> None:
        if isinstance(transaction, async_scoped_session):
            transaction = cast("async_scoped_session[AsyncSession]", transaction)()
        if not isinstance(transaction, (AsyncSession, AsyncConnection)):
            message = (
                f"join= takes an AsyncSession or an AsyncConnection of SQLAlchemy, and this is a "
                f"{type(transaction).__name__}."
            )
            raise ConfigException(message)
        self._transaction = transaction
        self._catalog = catalog
        self._meta = meta
        self._pivot = pivot
        self._surrounds = _has_begun(transaction)
        self._root: RootTransaction | None = None

    @property
    @override
    def surrounds(self) -> bool:
        return self._surrounds

    @property
    @override
    def ended(self) -> bool:
        return self._root is None or not self._root.is_active or self._root.connection.invalidated

    async def check(self, catalog_id: str) -> None:
        """Refuse a database that is not the catalog's.

        Raises:
            ConfigException: it is another one.
        """
        connection = await self._connection()
        found = None
        if connection.dialect.name == self._catalog.dialect:
            found = await connection.run_sync(lambda sync: catalog_id_of(sync, self._meta))
        if found != catalog_id:
            message = (
                f"The joined transaction is on {shown(connection.engine.url)}, and the catalog is in "
                f"{self._catalog.name}: one transaction cannot commit in two databases. Give "
                "SqlalchemyBackendConfig and your engine the same url (and schema)."
            )
            raise ConfigException(message)
        if self._surrounds:
            self._root = _root_of(connection)

    @override
    async def commit(self, session: SessionToken, commit: Commit | None) -> None:
        if commit is not None:
            if self._surrounds and self.ended:
                message = (
                    "The transaction that this unit of work joined has ended before its block did."
                )
                raise TransactionException(message)
            connection = await self._connection()
            self._root = _root_of(connection)
            await self._check_atomic(connection)
            try:
                await self._pivot(connection, session, commit)
            except DBAPIError as error:
                await self._abandon(error)
                raise self._translated(error) from error
            except BaseException as error:
                await self._abandon(error)
                raise
        if not self._surrounds:
            try:
                await self._transaction.commit()
            except BaseException as error:
                await self._abandon(error)
                raise

    @override
    async def rollback(self) -> None:
        if not self._surrounds:
            await self._transaction.rollback()

    async def _abandon(self, cause: BaseException) -> None:
        """Roll back whoever is to end it: half a pivot must not be committed."""
        try:
            await self._transaction.rollback()
        except Exception as error:  # noqa: BLE001 - told with what led here
            cause.add_note(f"The joined transaction could not be rolled back: {error!r}")

    async def _connection(self) -> AsyncConnection:
        if isinstance(self._transaction, AsyncConnection):
            return self._transaction
        # A session may have several databases, told apart by what a statement names.
        return await self._transaction.connection(bind_arguments={"clause": select(self._meta)})

    async def _check_atomic(self, connection: AsyncConnection) -> None:
        """Refuse a connection on which every statement commits by itself.

        Raises:
            TransactionException: it is one.
        """
        if self._catalog.dialect == "postgresql":
            xid = select(func.pg_current_xact_id().cast(self._meta.c.value.type))
            atomic = await connection.scalar(xid) == await connection.scalar(xid)
        else:
            # It changes nothing, but the driver begins a transaction for it, if at all.
            nothing = update(self._meta).where(self._meta.c.name == "").values(value="")
            await connection.execute(nothing)
            driver: Any = (await connection.get_raw_connection()).driver_connection
            atomic = bool(driver.in_transaction)
        if not atomic:
            message = (
                "The joined connection is in AUTOCOMMIT mode, so nothing on it can commit together "
                "with the files. Join one with another isolation level."
            )
            raise TransactionException(message)

    def _translated(self, error: DBAPIError) -> Exception:
        if sqlstate(error) not in ROLLED_BACK:
            return self._catalog.unavailable(error)
        message = (
            "The database rolled the joined transaction back, since others have committed what it "
            f"could not see: {error.orig}. Nothing was committed; run the unit of work again."
        )
        return ConflictException(message)


def _has_begun(transaction: AsyncSession | AsyncConnection) -> bool:
    if isinstance(transaction, AsyncConnection):
        return transaction.in_transaction()
    root = transaction.sync_session.get_transaction()
    return root is not None and root.origin is SessionTransactionOrigin.BEGIN


def _root_of(connection: AsyncConnection) -> RootTransaction | None:
    sync: Connection | None = connection.sync_connection
    return None if sync is None else sync.get_transaction()
