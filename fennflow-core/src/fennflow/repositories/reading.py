"""Repositories that read files, list them, and ask the catalog about them."""

from __future__ import annotations

from typing import TYPE_CHECKING, overload

from fennflow.engine import reading
from fennflow.exceptions import PathException
from fennflow.files import BaseContent
from fennflow.paths import PathTemplate, StoragePath, decode_token, encode_token
from fennflow.plugins import registry
from fennflow.repositories.base import PAGE, Repository
from fennflow.responses import ListResponse, MediaResponse, ObjectInfo

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fennflow.backends import Record


class GetRepository(Repository):
    """Read files."""

    async def get(self, *paths: str | PathTemplate, missing_ok: bool = False) -> MediaResponse:
        """Read files whole, all as they were at one moment.

        Args:
            paths: what to read; the answer is in their order.
            missing_ok: leave out what does not exist.

        Raises:
            NoSuchKeyException: names every path that does not exist.
            ObjectChangedException: an object was changed without FennFlow.
            ChecksumMismatchException: the bytes are not those that were committed.
        """
        keys = [self._key(path) for path in paths]
        async with self._session.call() as tx:
            found = await reading.read(tx, self._namespace, keys, missing_ok=missing_ok)
        return MediaResponse([_content(record, body) for record, body in found])


class GetPrefixRepository(Repository):
    """Read all files with a prefix."""

    async def get_prefix(self, prefix: str = "") -> MediaResponse:
        """Read all files with a prefix, in key order, a thousand at a time.

        Each thousand is as it was at one moment; what is deleted meanwhile is left out.

        Args:
            prefix: relative to the scope; it need not end at a `/`.

        Raises:
            ObjectChangedException: an object was changed without FennFlow.
        """
        files: list[BaseContent] = []
        async for keys in self._pages(prefix):
            async with self._session.call() as tx:
                found = await reading.read(tx, self._namespace, keys, missing_ok=True)
            files += [_content(record, body) for record, body in found]
        return MediaResponse(files)


class ListRepository(Repository):
    """List paths, from the catalog: no object request is made."""

    async def list(
        self,
        prefix: str = "",
        *,
        limit: int = PAGE,
        continuation_token: str | None = None,
        delimiter: str | None = None,
    ) -> ListResponse:
        """Return a page of paths in the order of their UTF-8 bytes, as S3 lists.

        Args:
            prefix: relative to the scope; it need not end at a `/`.
            limit: paths and rolled-up prefixes on the page, at least 1.
            continuation_token: of the page before.
            delimiter: roll up what has it beyond the prefix, for instance `/`.

        Raises:
            ContinuationTokenException: the token is not one of `list`.
            PathException: a limit below 1, or an empty delimiter.
        """
        if limit < 1 or delimiter == "":
            message = f"limit={limit} must be at least 1, and a delimiter cannot be empty."
            raise PathException(message)
        start = "" if continuation_token is None else decode_token(continuation_token)
        async with self._session.call() as tx:
            page = await reading.page(
                tx,
                self._namespace,
                prefix=self._prefix(prefix),
                start=start,
                limit=limit,
                delimiter=delimiter,
            )
        return ListResponse(
            [StoragePath(key) for key in page.keys],
            prefixes=[StoragePath(each) for each in page.prefixes],
            continuation_token=None if page.start is None else encode_token(page.start),
        )

    async def iter(self, prefix: str = "") -> AsyncIterator[StoragePath]:
        """Iterate over all paths with a prefix, a page at a time."""
        async for keys in self._pages(prefix):
            for key in keys:
                yield StoragePath(key)


class StatRepository(Repository):
    """Ask the catalog about files: no object request is made."""

    @overload
    async def stat(self, path: str | PathTemplate, /) -> ObjectInfo: ...
    @overload
    async def stat(self, *paths: str | PathTemplate) -> tuple[ObjectInfo, ...]: ...
    async def stat(self, *paths: str | PathTemplate) -> ObjectInfo | tuple[ObjectInfo, ...]:
        """Return what the catalog says of a file, or of several at one moment.

        Raises:
            NoSuchKeyException: names every path that does not exist.
        """
        keys = [self._key(path) for path in paths]
        async with self._session.call() as tx:
            records = await tx.view(self._namespace, keys, missing_ok=False)
        infos = tuple(_info(record) for record in records if record is not None)
        return infos[0] if len(paths) == 1 else infos

    async def exists(self, path: str | PathTemplate) -> bool:
        """Return whether a file exists."""
        keys = [self._key(path)]
        async with self._session.call() as tx:
            return await tx.view(self._namespace, keys, missing_ok=True) != [None]


def _info(record: Record) -> ObjectInfo:
    return ObjectInfo(
        path=StoragePath(record.key),
        size=record.size,
        media_type=record.media_type,
        etag=record.etag,
        sha256=record.sha256,
        created_at=record.created_at,
        modified_at=record.modified_at,
        metadata=record.metadata,
        version_id=record.location.version_id,
    )


def _content(record: Record, body: bytes) -> BaseContent:
    info = _info(record)
    content = registry().content_class(record.content_type, record.media_type)
    return content.from_stored(body, filename=info.path.name, info=info)
