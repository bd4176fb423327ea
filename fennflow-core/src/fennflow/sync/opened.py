"""The base of units of work without `async`; their methods are generated."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import AbstractAsyncContextManager
from inspect import getattr_static
from typing import TYPE_CHECKING, Any, ClassVar, ParamSpec, TypeVar, cast

from typing_extensions import override

from fennflow.config import ConfigDict
from fennflow.exceptions import TransactionException
from fennflow.jobs import Registering
from fennflow.repositories.fields import check_fields, fields_of, without_attribute
from fennflow.sync import portal
from fennflow.sync.base import Block, OnPortal, wait
from fennflow.sync.repositories import SyncRepository
from fennflow.uow import UnitOfWork

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

P = ParamSpec("P")
T = TypeVar("T")


class Opened(OnPortal, Registering):
    """A unit of work that runs on the portal's loop, with its repositories."""

    config: ClassVar[ConfigDict] = cast("ConfigDict", getattr_static(UnitOfWork, "config"))
    _asynchronous: ClassVar[type[UnitOfWork]] = UnitOfWork

    @override
    def __init_subclass__(cls, *, of: type[UnitOfWork] | None = None, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        check_fields(cls)
        fields: dict[str, Any] = dict(fields_of(cls))
        config = getattr_static(cls, "config")
        if of is None:
            made = type(cls.__name__, (UnitOfWork,), {**fields, "config": config})
            of = cast("type[UnitOfWork]", made)
        cls._asynchronous = of

    def __init__(
        self,
        *,
        auto_commit: bool = True,
        join: object | None = None,
        timeout: float | None = None,
    ) -> None:
        self._uow = self._asynchronous(auto_commit=auto_commit, join=join, timeout=timeout)
        self._portal: portal.Portal | None = None
        self._open = False

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> object:
            raise without_attribute(self, name)

    @override
    def _portal_in_use(self) -> portal.Portal:
        if self._portal is None:
            message = "Open the unit of work first: with UOW.sync() as uow."
            raise TransactionException(message)
        return self._portal

    @classmethod
    def _await_now(
        cls, function: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Call an asynchronous function on the current loop, outside of any unit of work."""
        return wait(portal.current(), function, *args, **kwargs)

    @classmethod
    def _iterate_now(cls, items: AsyncIterator[T]) -> Generator[T]:
        """Iterate on the current loop; each item is passed on as it arrives."""
        current = portal.current()

        async def following() -> list[T]:
            async for item in items:
                return [item]
            return []

        while taken := wait(current, following):
            yield from taken

    @classmethod
    def _block_now(cls, block: Callable[[], AbstractAsyncContextManager[T]]) -> Block[T]:
        return Block(portal.current, block)

    def __enter__(self) -> Self:
        """Open it; nothing is sent before the first call."""
        if self._portal is not None:
            message = "This unit of work is already open or was used before. Construct a new one."
            raise TransactionException(message)
        self._portal = portal.current()
        self._portal.blocks[self] = threading.current_thread()

        async def enter() -> None:
            await self._uow.__aenter__()
            self._open = True

        try:
            self._await(enter)
            for name in fields_of(type(self._uow)):
                repository = getattr(self._uow, name)
                self.__dict__[name] = SyncRepository(self._portal_in_use, repository)
        except BaseException as error:
            # It was interrupted while it was opened, so it has to be left.
            if self._open:
                self.__exit__(type(error), error, error.__traceback__)
            self._portal.blocks.pop(self, None)
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Commit, or undo what was done since the last `commit()`."""
        try:
            self._leave(self._uow.__aexit__, exc)
        finally:
            self._portal_in_use().blocks.pop(self, None)
