"""A repository that reads files in chunks, in constant memory."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from fennflow.engine.streaming import Download
from fennflow.exceptions import PathException, TransactionException
from fennflow.paths import PathTemplate
from fennflow.printable import brief
from fennflow.repositories.base import Repository
from fennflow.repositories.reading import info_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fennflow.responses import ObjectInfo


@dataclass(slots=True)
class ObjectStream:
    """The bytes of a file, one chunk after the other; iterate over it once.

    Attributes:
        info: what the catalog says of the file.
    """

    info: ObjectInfo
    _chunks: AsyncGenerator[bytes] | None = field(repr=False)

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Iterate over the chunks, as they arrive.

        Raises:
            TransactionException: the block of `open` has ended.
            ConnectorUnavailableException: the store could not be reached again.
            ObjectChangedException: the file was changed while it was read.
            ChecksumMismatchException: at the end: these are not the bytes that were committed.
        """
        if self._chunks is None:
            message = f"{self.info.path} is closed. Read it inside the block of open()."
            raise TransactionException(message)
        return self._chunks

    def close(self) -> None:
        """Refuse to be read any more."""
        self._chunks = None


class StreamRepository(Repository):
    """Read files in chunks."""

    @asynccontextmanager
    async def open(
        self, path: str | PathTemplate, *, start: int | None = None, end: int | None = None
    ) -> AsyncGenerator[ObjectStream]:
        """Open a file for reading, of any size; the memory that it takes is constant.

        A broken connection is reopened at the byte that was reached, of the same version of
        the file (S3: `If-Match`). Read to its end, a whole file is compared with its SHA-256.

        Args:
            path: of the file.
            start: the first byte wanted, counted from 0; the first of all by default.
            end: the byte before which to stop; the end of the file by default.

        Raises:
            PathException: start and end are not in order.
            NoSuchKeyException: there is no such object.
            ObjectChangedException: the object was changed without FennFlow.

        Example:
            ```python
            import asyncio

            from fennflow import UnitOfWork
            from fennflow.files import TextContent
            from fennflow.repositories import CrudRepository, RepoField, StreamRepository


            class FilmRepository(CrudRepository, StreamRepository):
                pass


            class UOW(UnitOfWork):
                films = RepoField(FilmRepository, namespace="films")


            async def main():
                async with UOW() as uow:
                    await uow.films.put(TextContent.from_content("Hello, world!", filename="a.txt"))
                    async with uow.films.open("a.txt", start=7, end=12) as stream:
                        print(stream.info.size, [chunk async for chunk in stream])
                        #> 13 [b'world']


            asyncio.run(main())
            ```
        """
        first, last = _range(start, end)
        key = self._object_key(path)
        async with self._call("open") as tx:
            connector = tx.connector
        download = Download(connector, partial(self._call, "open"), key, first, last)
        async with aclosing(await download.open()) as chunks:
            stream = ObjectStream(info_of(download.record), chunks)
            try:
                yield stream
            finally:
                stream.close()


def _range(start: object, end: object) -> tuple[int, int | None]:
    first = 0 if start is None else start
    if isinstance(first, int) and first >= 0:
        if end is None:
            return first, None
        if isinstance(end, int) and end >= first:
            return first, end
    message = f"Invalid byte range: start={brief(start)}, end={brief(end)} (counted from 0, end exclusive)."
    raise PathException(message)
