"""The base of repositories without `async`; their methods are generated."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from typing_extensions import override

from fennflow.exceptions import PathException
from fennflow.files import StreamContent
from fennflow.paths import AnyPath, StoragePath, render_path
from fennflow.repositories.base import Repository
from fennflow.repositories.streaming import ObjectStream
from fennflow.responses import PutResponse
from fennflow.sync.base import OnPortal
from fennflow.sync.streams import SyncStream
from fennflow.sync.writers import SyncWriter

if TYPE_CHECKING:
    from fennflow.sync.portal import Portal
    from fennflow.sync.repositories import SyncRepository

R_co = TypeVar("R_co", bound=Repository, covariant=True)
R = TypeVar("R", bound=Repository)


class _Open(Protocol):
    def __call__(
        self, path: AnyPath, *, start: int | None = None, end: int | None = None
    ) -> AbstractAsyncContextManager[ObjectStream]: ...


class OnRepository(OnPortal, Generic[R_co]):
    """Wraps an asynchronous repository on the portal's loop.

    Args:
        portal: the portal on whose loop it acts.
        repository: an asynchronous one.
    """

    def __init__(self, portal: Callable[[], Portal], repository: R_co) -> None:
        self._portal = portal
        self._repository = repository

    @override
    def _portal_in_use(self) -> Portal:
        return self._portal()

    def _scoped(self, repository: R) -> SyncRepository[R]:
        from fennflow.sync.repositories import SyncRepository

        return SyncRepository(self._portal, repository)

    @staticmethod
    def _asynchronous_of(other: OnRepository[Any] | None) -> Any:
        # An object of another kind is refused like a repository of another unit of work.
        return getattr(other, "_repository", other)

    def _read(
        self, path: AnyPath, mode: object, *, start: int | None, end: int | None
    ) -> SyncStream:
        if mode != "rb":
            message = (
                f"mode={mode!a} is neither rb nor wb. Wrap the file in io.TextIOWrapper for text."
            )
            raise PathException(message)
        repository: Any = self._repository
        open_: _Open = repository.open
        return SyncStream(
            self._portal_in_use, lambda at: open_(path, start=at, end=end), start, end
        )

    def _written(
        self,
        path: AnyPath,
        media_type: str,
        metadata: Mapping[str, str] | None,
        extra: Mapping[str, Any] | None,
    ) -> SyncWriter:
        repository: Any = self._repository
        name = render_path(path)
        if isinstance(name, StoragePath) and repository.cwd:
            if not name.startswith(f"{repository.cwd}/"):
                message = (
                    f"{name} is outside {repository.cwd}: write it from a scope that contains it."
                )
                raise PathException(message)
            name = name.removeprefix(f"{repository.cwd}/")

        async def put(chunks: AsyncIterator[bytes]) -> PutResponse:
            content = StreamContent.from_iterable(
                chunks, filename=str(name), media_type=media_type, metadata=metadata
            )
            with repository._session.writes(str(name)):  # noqa: SLF001 - of the repository that it wraps
                response: PutResponse = await repository.put(content, connector_extra=extra)
            return response

        return SyncWriter(self._portal_in_use, put)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Return a method of a repository class of the user's own, which waits for its result."""
            if name.startswith("_"):
                raise AttributeError(name)
            found = getattr(self._repository, name)
            if not callable(found):
                return found

            def call(*args: Any, **kwargs: Any) -> Any:
                act = self._await if iscoroutinefunction(found) else self._call
                result = act(found, *args, **kwargs)
                if isinstance(result, Repository):
                    return self._scoped(result)
                if isinstance(result, AbstractAsyncContextManager):
                    return self._block(lambda: result)
                return self._iterate(result) if isinstance(result, AsyncIterator) else result

            return call
