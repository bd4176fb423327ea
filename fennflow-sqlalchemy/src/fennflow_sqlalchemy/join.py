"""Files and rows in one transaction: the pivot is written in a user's transaction (P5).

If the snapshot of that transaction is older (REPEATABLE READ), it may see none of the journal's
rows, and on SQLite it holds the file's write lock as soon as it has written. So only the outcome
(an insert) and the records are written in it; everything else uses the backend's own connections.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from sqlalchemy import Connection, Table, event, func, select, update
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, SessionTransactionOrigin, scoped_session
from typing_extensions import override

from fennflow.backends import Commit, JoinedTransaction, TransactionToken
from fennflow.exceptions import (
    ConfigException,
    ConflictException,
    RecordLockedException,
    TransactionException,
)
from fennflow.sync.portal import called_by_thread, in_caller
from fennflow_sqlalchemy.database import Database, locked_out
from fennflow_sqlalchemy.engines import (
    FAILED_BEFORE,
    LOCK_NOT_AVAILABLE,
    ROLLED_BACK,
    shown,
    sqlstate,
)
from fennflow_sqlalchemy.tables import catalog_id_of

if TYPE_CHECKING:
    from sqlalchemy import NestedTransaction, RootTransaction

R = TypeVar("R")


class Run(Protocol):
    """Runs work on the connection of a user's transaction."""

    async def __call__(self, work: Callable[[Connection], R], /) -> R:
        """Run it where the transaction is used: in a greenlet, or in the user's thread."""
        ...


Pivot = Callable[[Run, TransactionToken, Commit], Awaitable[None]]

Transaction = AsyncSession | AsyncConnection | Session | Connection

_JOINED = "joined by a unit of work of FennFlow's"
"""The key in the `info` of a session that an open unit of work has joined and will end."""

_SAVEPOINT = re.compile(
    r"\s*(?P<verb>SAVEPOINT|RELEASE(\s+SAVEPOINT)?|ROLLBACK(\s+\w+)?\s+TO(\s+SAVEPOINT)?)\s+"
    r"(?P<name>\S+?)\s*;?\s*",
    re.IGNORECASE,
)
_COMMENTS = re.compile(r"(\s|--[^\n]*|/\*.*?\*/)*", re.DOTALL)
_END = re.compile(r"\s*(?P<verb>COMMIT|END|ROLLBACK|ABORT|PREPARE\s+TRANSACTION)\b", re.IGNORECASE)


class Watch:
    """Observes the end of a transaction that a unit of work has joined.

    The transaction ends with the first commit or rollback, with the end of a savepoint that was
    open when the watch began, or with its connection.

    Args:
        connection: the connection of the transaction.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._root = connection.get_transaction()
        self._savepoints: set[str] = set()
        self._end: str | None = None
        self._listeners: tuple[tuple[str, Any], ...] = (
            ("commit", self._on_commit),
            ("rollback", self._on_rollback),
            ("commit_twophase", self._on_commit),
            ("prepare_twophase", self._on_commit),
            ("rollback_twophase", self._on_rollback),
            ("before_cursor_execute", self._on_statement),
        )
        for name, listener in self._listeners:
            event.listen(connection, name, listener)

    @property
    def end(self) -> str | None:
        """How it ended, "committed" or "rolled back"; None while it is open."""
        if self._end is not None:
            return self._end
        root = self._root
        lost = self._connection.closed or self._connection.invalidated
        return "rolled back" if lost or root is None or not root.is_active else None

    def stop(self) -> None:
        """Stop watching."""
        for name, listener in self._listeners:
            event.remove(self._connection, name, listener)

    def _on_commit(self, *_: object) -> None:
        self._end = self._end or "committed"

    def _on_rollback(self, *_: object) -> None:
        self._end = self._end or "rolled back"

    def _on_statement(self, _connection: object, cursor: Any, statement: str, *_: object) -> None:
        comments = _COMMENTS.match(statement)
        statement = statement[comments.end() :] if comments else statement
        savepoint = _SAVEPOINT.fullmatch(statement)
        if savepoint is None:
            end = _END.match(statement)
            if end is not None:
                back = end["verb"].upper() in {"ROLLBACK", "ABORT"}
                (self._on_rollback if back else self._on_commit)()
            return
        verb, name = savepoint["verb"].upper(), savepoint["name"]
        if verb == "SAVEPOINT":
            self._savepoints.add(name)
            if self._connection.dialect.name == "sqlite":
                self._begin_on_sqlite(cursor)
        elif name not in self._savepoints:
            (self._on_commit if verb.startswith("RELEASE") else self._on_rollback)()

    def _begin_on_sqlite(self, cursor: Any) -> None:
        """Begin the transaction before its first savepoint, whose release would otherwise commit it.

        The driver begins a transaction only before a statement that changes rows.
        """
        driver: Any = self._connection.connection.driver_connection
        if not driver.in_transaction:
            cursor.execute("BEGIN")


class UserTransaction(JoinedTransaction):
    """The transaction of an SQLAlchemy session or connection.

    Args:
        transaction: the session or connection that the user joined.
        catalog: the database on which it has to be.
        meta: a table of the catalog.
        pivot: writes the outcome and the records on a connection.
    """

    def __init__(
        self, transaction: Transaction, catalog: Database, meta: Table, pivot: Pivot
    ) -> None:
        self._transaction = transaction
        self._catalog = catalog
        self._meta = meta
        self._pivot = pivot
        self._managed_by_caller = _has_begun(_sync(transaction))
        self._root: RootTransaction | None = None
        self._savepoint: NestedTransaction | None = None
        self._watch: Watch | None = None
        self._begins: Callable[[], None] = _nothing

    @property
    @override
    def managed_by_caller(self) -> bool:
        return self._managed_by_caller

    @property
    @override
    def ended(self) -> bool:
        return self._root is None or not self._root.is_active or self._root.connection.invalidated

    async def open(self, catalog_id: str) -> None:
        """Check that the transaction is on the catalog's database, and watch it from now on.

        Raises:
            ConfigException: it is on another database.
            TransactionException: it has failed or is closed.
        """
        try:
            connection = await self._run(_itself)
            found = None
            if connection.dialect.name == self._catalog.dialect:
                found = await self._run(partial(catalog_id_of, meta=self._meta))
        except InvalidRequestError as error:
            message = f"The transaction cannot be joined: {error}"
            raise TransactionException(message) from error
        if found != catalog_id:
            message = (
                f"The joined transaction is on {shown(connection.engine.url)}, but the catalog is "
                f"in {self._catalog.name}: one transaction cannot commit in two databases. Give "
                "SqlalchemyBackendConfig and your engine the same url (and schema)."
            )
            raise ConfigException(message)
        target = _sync(self._transaction)
        if self._managed_by_caller:
            self._root = connection.get_transaction()
            self._savepoint = connection.get_nested_transaction()
        elif isinstance(target, Session):
            target.info[_JOINED] = True
        self._watch_from(connection)
        self._listen(connection, target)

    def _listen(self, connection: Connection, target: Session | Connection) -> None:
        """Watch each following transaction, since another one begins after `commit()`."""
        name, engine = "begin", connection.engine
        if isinstance(target, Session):
            name = "after_begin"

        def on_begin(*arguments: Any) -> None:
            begun: Connection = arguments[-1]
            if self._watch is None and begun.engine is engine:
                self._watch_from(begun)

        event.listen(target, name, on_begin)
        self._begins = lambda: event.remove(target, name, on_begin)

    def _watch_from(self, connection: Connection) -> None:
        self._watch = Watch(connection)

    @override
    def close(self) -> None:
        self._unwatch()
        self._begins()
        self._begins = _nothing
        target = _sync(self._transaction)
        if isinstance(target, Session) and not self._managed_by_caller:
            target.info.pop(_JOINED, None)

    def _unwatch(self) -> str | None:
        """Stop watching, and return how the transaction has ended, if it has."""
        watch, self._watch = self._watch, None
        if watch is None:
            return None
        watch.stop()
        return watch.end

    @override
    async def commit(self, token: TransactionToken, commit: Commit | None) -> None:
        if self._watch is not None and self._watch.end is not None:
            error = _ended(self._watch.end)
            if self._managed_by_caller:
                self._unwatch()
            else:
                await self._abandon(error)  # work in the next transaction belongs to the block, too
            raise error
        if commit is not None:
            connection = await self._run(_itself)
            self._root = connection.get_transaction()
            if self._managed_by_caller:
                self._check_savepoints(connection)
            try:
                before = await self._run(self._check_atomic)
                await self._pivot(self._run, token, commit)
                if before is not None and self._managed_by_caller:
                    again = select(_set_lock_timeout(before))
                    await self._run(lambda connection: connection.execute(again).close())
            except DBAPIError as error:
                await self._abandon(error)
                raise self._translated(error) from error
            except BaseException as error:
                await self._abandon(error)
                raise
        self._unwatch()
        if not self._managed_by_caller:
            try:
                await self._do(lambda target: target.commit())
            except BaseException as error:
                await self._abandon(error)
                raise

    @override
    async def rollback(self) -> None:
        end = self._unwatch()
        if not self._managed_by_caller:
            await self._do(lambda target: target.rollback())
        if end == "committed":
            raise _ended(end)

    def _check_savepoints(self, connection: Connection) -> None:
        """Refuse an open savepoint that was begun inside the block: it could be rolled back separately.

        Raises:
            TransactionException: there is such a savepoint.
        """
        savepoint = connection.get_nested_transaction()
        if savepoint is not None and savepoint is not self._savepoint:
            self._unwatch()
            message = (
                "A savepoint that was begun inside the block (begin_nested()) is still open at its end. "
                "If it were rolled back later, the files would be undone without the rows before it. "
                "None of the files is committed. End the savepoint inside the block: async with "
                "session.begin_nested()."
            )
            raise TransactionException(message)

    async def _abandon(self, cause: BaseException) -> None:
        """Roll back in any case: a partial pivot must not be committed."""
        self._unwatch()
        try:
            await self._do(lambda target: target.rollback())
        except Exception as error:  # noqa: BLE001 - added to the first error
            cause.add_note(f"The joined transaction could not be rolled back: {error!r}")

    async def _do(self, work: Callable[[Session | Connection], R]) -> R:
        """Run work on the user's session or connection, where it is used."""
        if isinstance(self._transaction, AsyncSession):
            return await self._transaction.run_sync(work)
        if isinstance(self._transaction, AsyncConnection):
            return await self._transaction.run_sync(work)
        return await in_caller(partial(work, self._transaction))

    async def _run(self, work: Callable[[Connection], R], /) -> R:
        """Run work on its connection."""

        def on_connection(target: Session | Connection) -> R:
            if isinstance(target, Session):
                # A session may have several databases; the tables of a statement determine which
                # one.
                target = target.connection(bind_arguments={"clause": select(self._meta)})
            return work(target)

        return await self._do(on_connection)

    def _check_atomic(self, connection: Connection) -> str | None:
        """Refuse a connection on which every statement commits by itself; limit its lock waits.

        Returns:
            the user's own `lock_timeout` on PostgreSQL, to be restored.

        Raises:
            TransactionException: it is in AUTOCOMMIT mode.
        """
        before: str | None = None
        if self._catalog.dialect == "postgresql":
            xid = func.pg_current_xact_id().cast(self._meta.c.value.type)
            settings = connection.execute(select(xid, func.current_setting("lock_timeout")))
            first, before = settings.one()
            limit = str(int(self._catalog.lock_wait * 1000))
            second, _ = connection.execute(select(xid, _set_lock_timeout(limit))).one()
            atomic = first == second
        else:
            # It changes nothing, but makes the driver begin a transaction, if it ever does.
            nothing = update(self._meta).where(self._meta.c.name == "").values(value="")
            connection.execute(nothing)
            driver: Any = connection.connection.driver_connection
            atomic = bool(driver.in_transaction)
        if not atomic:
            message = (
                "The joined connection is in AUTOCOMMIT mode, so nothing on it can commit together "
                "with the files. Join one with another isolation level."
            )
            raise TransactionException(message)
        return before

    def _translated(self, error: DBAPIError) -> Exception:
        if sqlstate(error) == LOCK_NOT_AVAILABLE or locked_out(error):
            message = (
                f"Another transaction of the database {self._catalog.name} held a lock that the joined one "
                "needs for too long. It was rolled back: nothing was committed. Run the unit of "
                "work again."
            )
            return RecordLockedException(message)
        if sqlstate(error) == FAILED_BEFORE:
            message = (
                "A statement in the joined transaction failed before, so the database refuses to "
                "commit it; it was rolled back, and nothing was committed. Put what may fail into "
                "a savepoint (begin_nested()), or let the exception leave the block."
            )
            return TransactionException(message)
        if sqlstate(error) not in ROLLED_BACK:
            return self._catalog.unavailable(error)
        message = (
            "The database rolled the joined transaction back because of a serialization conflict: "
            f"{error.orig}. Nothing was committed; run the unit of work again."
        )
        return ConflictException(message)


async def what_to_join(given: object) -> Transaction:
    """Return the session or connection that `join=` names, with or without `async`.

    Raises:
        ConfigException: it is neither, or it is of the other kind.
        TransactionException: it is not open yet.
    """
    by_thread, kind = called_by_thread(), type(given).__name__
    if isinstance(given, async_scoped_session) and not by_thread:
        given = cast("async_scoped_session[AsyncSession]", given)()
    if isinstance(given, scoped_session) and by_thread:
        # A scoped_session has a session for each thread.
        given = await in_caller(cast("scoped_session[Session]", given))
    if isinstance(given, AsyncConnection) and given.sync_connection is None:
        message = "The AsyncConnection to join has not been started: await it first."
        raise TransactionException(message)
    if isinstance(given, (Session, Connection) if by_thread else (AsyncSession, AsyncConnection)):
        return given
    takes, other = "an AsyncSession or an AsyncConnection", "with UOW.sync(join=...)"
    if by_thread:
        takes, other = "a Session or a Connection", "async with UOW(join=...)"
    message = f"join= takes {takes} of SQLAlchemy here, not a {kind}."
    if isinstance(given, (Session, Connection, AsyncSession, AsyncConnection)):
        message += f" For this one use {other}."
    raise ConfigException(message)


def _has_begun(target: Session | Connection) -> bool:
    if isinstance(target, Connection):
        return target.in_transaction()
    if target.in_nested_transaction() or _JOINED in target.info:
        return True  # the block of the savepoint, or of the outer unit of work, ends it
    root = target.get_transaction()
    return root is not None and root.origin is SessionTransactionOrigin.BEGIN


def _sync(transaction: Transaction) -> Session | Connection:
    """Return the synchronous session or connection of an asynchronous one."""
    if isinstance(transaction, AsyncSession):
        return transaction.sync_session
    if isinstance(transaction, AsyncConnection):
        return cast("Connection", transaction.sync_connection)
    return transaction


def _itself(connection: Connection) -> Connection:
    return connection


def _set_lock_timeout(value: str) -> Any:
    return func.set_config("lock_timeout", value, True)  # noqa: FBT003 - only in this transaction


def _nothing() -> None:
    """Do nothing."""


def _ended(how: str) -> TransactionException:
    rows = (
        "Its rows are kept if that commit succeeded; no file of this unit of work was part of "
        "it, and all files are undone. Leave the commit to the end of the block, or call uow.commit()"
        if how == "committed"
        else "Neither its rows nor the files of this unit of work are committed. Put what may fail "
        "into a savepoint (begin_nested()), or let the exception leave the block"
    )
    message = (
        f"The transaction that this unit of work joined was {how} inside the block, which has to "
        f"end in the same transaction in which it began. {rows}."
    )
    return TransactionException(message)
