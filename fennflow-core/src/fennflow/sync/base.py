"""The building blocks of the generated interface: calls, iterations and blocks on the portal's loop."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, cast, overload

from typing_extensions import override

from fennflow.exceptions import TransactionException
from fennflow.jobs import JobCall
from fennflow.sync.portal import Portal, on_caller

if TYPE_CHECKING:
    from types import TracebackType

P = ParamSpec("P")
T = TypeVar("T")

Leave = Callable[
    [type[BaseException] | None, BaseException | None, "TracebackType | None"], Awaitable[T]
]

AT_ONCE = 1000
"""How many items an iteration fetches per round trip to the loop."""


def wait(
    portal: Portal, function: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs
) -> T:
    """Call an asynchronous function on the loop, and wait for it."""

    async def work() -> T:
        return await function(*args, **kwargs)

    return portal.call(work)


class OnPortal:
    """Base class of objects that act on a portal's loop."""

    def _portal_in_use(self) -> Portal:
        raise NotImplementedError

    def _await(self, function: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call an asynchronous function on the loop, and wait for it."""
        return wait(self._portal_in_use(), function, *args, **kwargs)

    def _call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a plain function on the loop."""

        async def work() -> T:
            return function(*args, **kwargs)

        return self._portal_in_use().call(work)

    def _iterate(self, items: AsyncIterator[T]) -> Generator[T]:
        """Iterate over an asynchronous iterator that runs on the loop."""

        async def some() -> list[T]:
            taken: list[T] = []
            async for item in items:
                taken.append(item)
                if len(taken) == AT_ONCE:
                    break
            return taken

        while taken := self._await(some):
            yield from taken

    def _leave(self, leave: Leave[T], error: BaseException | None) -> T:
        """Leave an asynchronous block, even if a signal handler raises at any moment.

        Args:
            leave: `__aexit__` of the block.
            error: the exception that leaves it.
        """
        began = False
        interruption: BaseException | None = None

        async def work() -> T:
            nonlocal began
            began = True
            return await leave(type(error) if error else None, error, None)

        while True:
            try:
                result = self._await(work)
            except BaseException as raised:
                if began or isinstance(raised, TransactionException):
                    raise
                # It was interrupted before it began, so the interruption leaves the block.
                interruption = error = raised
            else:
                if interruption is not None:
                    raise interruption
                return result

    def _block(self, block: Callable[[], AbstractAsyncContextManager[T]]) -> Block[T]:
        """Return a context manager whose block is entered and left on the loop."""
        return Block(self._portal_in_use, block)


class Block(OnPortal, AbstractContextManager[T], Generic[T]):
    """An asynchronous context manager that is used with `with`.

    Args:
        portal: the portal on whose loop it runs.
        block: creates the asynchronous context manager.
    """

    def __init__(
        self, portal: Callable[[], Portal], block: Callable[[], AbstractAsyncContextManager[T]]
    ) -> None:
        self._portal = portal
        self._make = block
        self._entered: AbstractAsyncContextManager[T] | None = None

    @override
    def _portal_in_use(self) -> Portal:
        return self._portal()

    @override
    def __enter__(self) -> T:
        async def enter() -> T:
            block = self._make()
            result = await block.__aenter__()
            self._entered = block
            return result

        try:
            return self._await(enter)
        except BaseException as error:
            # It was interrupted while it was entered, so it has to be left.
            if self._entered is not None:
                self.__exit__(type(error), error, error.__traceback__)
            raise

    @override
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        assert self._entered is not None  # noqa: S101 - by __enter__
        return self._leave(self._entered.__aexit__, exc)


@overload
def here(function: JobCall) -> JobCall: ...
@overload
def here(function: Callable[P, T]) -> Callable[P, Coroutine[Any, Any, T]]: ...
@overload
def here(function: Callable[P, T] | None) -> Callable[P, Coroutine[Any, Any, T]] | None: ...
def here(
    function: Callable[P, T] | JobCall | None,
) -> Callable[P, Coroutine[Any, Any, T]] | JobCall | None:
    """Return a callback that runs in the thread of the caller; a journaled call is returned unchanged."""
    if function is None or isinstance(function, JobCall):
        return function
    if not callable(cast("object", function)):
        return cast("None", function)  # the unit of work refuses it
    return on_caller(function)
