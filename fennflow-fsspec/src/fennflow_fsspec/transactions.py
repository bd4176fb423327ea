"""The transactions of a filesystem: units of work, and savepoints inside them."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from threading import get_ident, local
from typing import TYPE_CHECKING

from fennflow.exceptions import TransactionException
from fennflow.sync import SyncUnitOfWork

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from types import TracebackType


class Level:
    """A transaction, or one inside it.

    Args:
        outer: the transaction in which it was begun.

    Attributes:
        undone: whether it was rolled back.
        over: whether it has ended.
    """

    def __init__(self, outer: Level | None) -> None:
        self._outer = outer
        self.undone = False
        self.over = False

    @property
    def usable(self) -> bool:
        """Whether files that were opened in it can still become part of the unit of work."""
        level = self
        while level._outer is not None:
            if level.undone:
                return False
            level = level._outer
        return not level.over


class Transactions:
    """The open transactions of one filesystem: `with fs.transaction` nests.

    All threads share them, since libraries write from their own threads. A call with several steps
    is a unit of work by itself, in its own thread.

    Args:
        make: returns a unit of work.
    """

    def __init__(self, make: Callable[[], SyncUnitOfWork]) -> None:
        self._make = make
        self._stacks: list[tuple[Level, ExitStack]] = []
        self._uow: SyncUnitOfWork | None = None
        self._thread = 0
        self._local = local()

    @property
    def level(self) -> Level | None:
        """The innermost open transaction."""
        return self._stacks[-1][0] if self._stacks else None

    def begin(self) -> None:
        """Begin a transaction, or a savepoint in the open one.

        Raises:
            TransactionException: another thread has one open.
        """
        if self._stacks and self._thread != get_ident():
            message = (
                "Another thread has a transaction of this filesystem open. Make one for each thread: "
                'fsspec.filesystem("fennflow", uow=...).'
            )
            raise TransactionException(message)
        stack = ExitStack()
        if self._uow is None:
            self._uow = stack.enter_context(self._make())
            self._thread = get_ident()
        else:
            stack.enter_context(self._uow.savepoint())
        self._stacks.append((Level(self.level), stack))

    def end(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        """Commit the innermost transaction, or undo it because of an exception.

        Raises:
            TransactionException: none is open.
        """
        if not self._stacks:
            message = "No transaction of this filesystem is open."
            raise TransactionException(message)
        level, stack = self._stacks.pop()
        level.over, level.undone = True, error is not None
        if not self._stacks:
            self._uow = None
        stack.__exit__(kind, error, traceback)

    @contextmanager
    def acting(self) -> Generator[SyncUnitOfWork]:
        """Use the open unit of work, or else one that ends with the block."""
        open_: SyncUnitOfWork | None = getattr(self._local, "uow", None) or self._uow
        if open_ is not None:
            yield open_
        else:
            with self._make() as uow:
                yield uow

    @contextmanager
    def together(self) -> Generator[None]:
        """Make the block atomic."""
        if getattr(self._local, "uow", None) is not None:
            yield
        elif self._uow is not None:
            with self._uow.savepoint():
                yield
        else:
            with self._make() as uow:
                self._local.uow = uow
                try:
                    yield
                finally:
                    self._local.uow = None
