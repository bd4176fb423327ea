"""Units of work that are part of Django's transactions.

A unit of work begins with the first file that a transaction writes. Its outcome is a row that is
written in Django's own transaction just before the COMMIT: files and rows commit or roll back
together. So nothing depends on a hook that has to run after a rollback or a crash.

To act before the COMMIT, and to clean up immediately, the methods that end transactions and
savepoints are replaced on this one connection of Django, from the first file to the end of the
transaction.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from django.db import DatabaseError, connections

from fennflow.exceptions import TransactionException
from fennflow.sync import SyncUnitOfWork
from fennflow_django.database import connect

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

U = TypeVar("U", bound=SyncUnitOfWork)

_OLDER = ""
"""Stands for the names of all savepoints that are older than a part."""

_PLACE = "_fennflow_transaction"
"""The attribute of Django's connection for its transaction, while that has files."""


class _RolledBackError(Exception):
    """Django's transaction was rolled back."""


class _Part(Generic[U]):
    """A unit of work that is part of a transaction.

    Args:
        transaction: the whole transaction.
        uow_class: the class of the unit of work, which is opened.
    """

    def __init__(self, transaction: _Transaction, uow_class: type[U]) -> None:
        self._transaction = transaction
        self._savepoints: list[tuple[str, AbstractContextManager[None]]] = []
        self._then: Callable[[], None] | None = None
        self.ended = False
        self._connection = connect(transaction.wrapper, self)
        try:
            self.uow = uow_class(join=self._connection)
            self.uow.__enter__()
        except BaseException:
            self._connection.close()
            raise
        self.begin_savepoint(_OLDER)

    def commit(self) -> None:
        """Commit, now that the outcome of the files is written; called by SQLAlchemy."""
        then, self._then = self._then, None
        if then is not None:
            try:
                then()
            except BaseException:
                self._transaction.roll_back()  # before the outcome is read
                raise

    def rollback(self) -> None:
        """Roll back unless Django has already done so; called by SQLAlchemy."""
        if self.ended:
            self._transaction.roll_back()

    def end(self, then: Callable[[], None]) -> None:
        """Write the outcome of the files, and commit.

        Args:
            then: commits the transaction.
        """
        self.ended = True
        self._then = then
        with ExitStack() as stack:
            stack.callback(self._connection.close)
            stack.push(self.uow)
            self._leave(0, None)
        self.commit()  # unless that has happened

    def undo(self, error: BaseException) -> None:
        """Undo all files of a transaction that was rolled back."""
        if self.ended:
            return
        with ExitStack() as stack:
            stack.callback(self._connection.close)
            stack.callback(self.uow.__exit__, type(error), error, error.__traceback__)
            self._leave(0, None)  # everything is undone, and the callbacks are called

    def begin_savepoint(self, sid: str) -> None:
        """Begin a savepoint."""
        savepoint = self.uow.savepoint()
        savepoint.__enter__()
        self._savepoints.append((sid, savepoint))

    def end_savepoint(self, sid: str) -> None:
        """Release a savepoint and those inside it."""
        index = self._index(sid)
        if index:
            self._leave(index, None)

    def undo_savepoint(self, sid: str, error: BaseException) -> None:
        """Undo the work since a savepoint: all of this part, if the savepoint is older."""
        index = self._index(sid)
        name, _ = self._savepoints[index]
        self._leave(index, error)
        self.begin_savepoint(name)  # it may be rolled back again

    def _index(self, sid: str) -> int:
        names = [name for name, _ in self._savepoints]
        return names.index(sid) if sid in names else 0

    def _leave(self, index: int, error: BaseException | None) -> None:
        while len(self._savepoints) > index:
            _, savepoint = self._savepoints.pop()
            savepoint.__exit__(type(error) if error else None, error, None)


class _Transaction:
    """A Django transaction that has files.

    Args:
        wrapper: Django's connection.
    """

    def __init__(self, wrapper: BaseDatabaseWrapper) -> None:
        self.wrapper = wrapper
        self._parts: dict[type[SyncUnitOfWork], _Part[Any]] = {}
        self._over = self._ending = False
        self._before: dict[str, object] = {}
        """The instance attributes of the connection that were replaced."""
        self._methods: dict[str, Callable[..., Any]] = {}

    def part(self, uow_class: type[U]) -> U:
        """Return the unit of work of a class; the first call opens it."""
        if self._ending:
            message = (
                "The transaction has ended, so a callback of its unit of work cannot store a file in "
                "it. Do that by transaction.on_commit(), or after the block."
            )
            raise TransactionException(message)
        found = self._parts.get(uow_class)
        if found is None:
            found = _Part(self, uow_class)
            if not self._parts:
                self._take_over()
            self._parts[uow_class] = found
        return cast("U", found.uow)

    def opened(self, uow_class: type[U]) -> U | None:
        """Return the unit of work of a class, if it is open."""
        found = self._parts.get(uow_class)
        return None if found is None else cast("U", found.uow)

    def roll_back(self) -> None:
        """Roll back a transaction that could not be committed, so that Django commits none of it."""
        if self._over:
            return
        self._over = True
        try:
            self._methods["rollback"]()
        except DatabaseError:
            self._methods["close"]()

    def _take_over(self) -> None:
        wrapper = self.wrapper
        for name in _REPLACED:
            self._methods[name] = getattr(wrapper, name)
            if name in vars(wrapper):
                self._before[name] = vars(wrapper)[name]
            setattr(wrapper, name, getattr(self, f"_{name}"))
        setattr(wrapper, _PLACE, self)

    @contextmanager
    def _handing_back(self) -> Generator[list[_Part[Any]]]:
        """End the yielded parts: callbacks run meanwhile, and Django is not in autocommit mode yet."""
        wrapper, parts = self.wrapper, list(self._parts.values())
        if not parts:  # it has ended before
            yield parts
            return
        for name in _REPLACED:
            if vars(wrapper).get(name) != getattr(self, f"_{name}"):
                continue  # another library replaced it again, and calls the replaced method
            if name in self._before:
                setattr(wrapper, name, self._before[name])
            else:
                delattr(wrapper, name)
        self._parts, self._ending = {}, True
        try:
            yield parts
        finally:
            delattr(wrapper, _PLACE)

    # --- in place of the methods of Django's connection -------------------------------------------

    def _commit(self) -> None:
        with self._handing_back() as parts:

            def end(index: int) -> None:
                if index < len(parts):
                    parts[index].end(partial(end, index + 1))
                    return
                self._methods["commit"]()
                self._over = True

            try:
                end(0)
            except BaseException as error:
                with ExitStack() as stack:
                    for part in parts:
                        stack.callback(part.undo, error)
                    # Before Django turns on autocommit again, which would commit it.
                    self.roll_back()
                raise

    def _rollback(self) -> None:
        try:
            self._methods["rollback"]()
        finally:
            self._undo()

    def _close(self) -> None:
        try:
            self._methods["close"]()
        finally:
            if self.wrapper.connection is None or self.wrapper.closed_in_transaction:
                self._undo()

    def _undo(self) -> None:
        with self._handing_back() as parts, ExitStack() as stack:
            for part in parts:
                stack.callback(part.undo, _cause())

    def _savepoint(self) -> str | None:
        sid = cast("str | None", self._methods["savepoint"]())
        if sid is not None:
            for part in self._parts.values():
                part.begin_savepoint(sid)
        return sid

    def _savepoint_commit(self, sid: str) -> None:
        self._methods["savepoint_commit"](sid)
        for part in self._parts.values():
            part.end_savepoint(sid)

    def _savepoint_rollback(self, sid: str) -> None:
        try:
            self._methods["savepoint_rollback"](sid)
        finally:
            error = _cause()
            for part in self._parts.values():
                part.undo_savepoint(sid, error)


_REPLACED = ("commit", "rollback", "close", "savepoint", "savepoint_commit", "savepoint_rollback")


def _cause() -> BaseException:
    """Return the exception that ends a transaction; failures of the undo are added to it as notes."""
    return sys.exc_info()[1] or _RolledBackError("The transaction was rolled back.")


def _transaction_of(using: str) -> _Transaction | None:
    """Return the open transaction of this thread, if there is one."""
    wrapper = connections[using]
    if not wrapper.in_atomic_block and wrapper.get_autocommit():
        return None
    wrapper.validate_no_broken_transaction()
    found: _Transaction | None = getattr(wrapper, _PLACE, None)
    return found or _Transaction(wrapper)


def unit_of_work(uow_class: type[U], using: str = "default") -> U:
    """Return a unit of work that is part of Django's transaction, and ends with it.

    Within one transaction it is always the same one. Its savepoints are those of nested `atomic()`
    blocks. Do not close it, and do not call `commit()` or `rollback()`.

    Args:
        uow_class: the class; its backend is `backend_config(using)`.
        using: alias of the database.

    Raises:
        TransactionException: no transaction is open: call it inside `transaction.atomic()`.
        ConfigException: the catalog is in another database.
    """
    transaction = _transaction_of(using)
    if transaction is None:
        message = (
            f"No transaction of the database {using!a} is open. Call unit_of_work() inside "
            "transaction.atomic(), or use `with UOW() as uow` for files only."
        )
        raise TransactionException(message)
    return transaction.part(uow_class)


@contextmanager
def acting(uow_class: type[U], using: str, *, writes: bool) -> Generator[U]:
    """Use the unit of work of the open transaction, or else one that ends with the block.

    Args:
        uow_class: the class.
        using: alias of the database.
        writes: whether the block writes; a block that only reads opens none in a transaction.
    """
    transaction = _transaction_of(using)
    joined: U | None = None
    if transaction is not None:
        joined = transaction.part(uow_class) if writes else transaction.opened(uow_class)
    if joined is not None:
        yield joined
    else:
        with uow_class() as uow:
            yield uow
