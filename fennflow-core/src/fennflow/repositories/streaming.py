"""A repository that reads files in chunks, in constant memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from fennflow.engine.streaming import Download
from fennflow.exceptions import PathException, TransactionException
from fennflow.paths import AnyPath
from fennflow.printable import brief
from fennflow.repositories.base import Repository
from fennflow.repositories.reading import info_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fennflow.responses import ObjectInfo


_NOTHING = memoryview(b"")


@dataclass(slots=True)
class ObjectStream:
    """The bytes of a file, one chunk after the other; iterate over it once.

    Attributes:
        info: the catalog's information about the file.
    """

    info: ObjectInfo
    _chunks: AsyncGenerator[bytes] | None = field(repr=False)
    _rest: memoryview = field(repr=False, default=_NOTHING)
    _under_way: bool = field(repr=False, default=False)

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Iterate over the chunks, as they arrive.

        Raises:
            TransactionException: the block of `open` has ended; or an earlier read was cut off, or
                is still under way in another task.
            ConnectorUnavailableException: the store could not be reached again.
            ObjectChangedException: the file was changed while it was read.
            ChecksumMismatchException: raised at the end: the bytes are not those that were
                committed.
        """
        self._check_open()
        return self

    async def __anext__(self) -> bytes:
        """Return the next chunk; raises what iterating does."""
        chunks = self._check_open()
        if self._rest:
            rest, self._rest = self._rest, _NOTHING
            return bytes(rest)
        if self._under_way:
            # A read that was cut off would otherwise look like the end of the file.
            message = (
                f"{self.info.path} cannot be read further: an earlier read of it failed or was cancelled, "
                "or is under way in another task. Open it again."
            )
            raise TransactionException(message)
        self._under_way = True
        chunk = await anext(chunks, None)
        self._under_way = False
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    def _check_open(self) -> AsyncGenerator[bytes]:
        if self._chunks is None:
            message = f"{self.info.path} is closed. Read it inside the block of open()."
            raise TransactionException(message)
        return self._chunks

    async def read(self, size: int | None = -1) -> bytes:
        """Return the next bytes, or none at the end; raises what iterating does.

        Args:
            size: how many at most; all that are left by default, and if it is None or below 0.

        Raises:
            PathException: the size is not a number.
        """
        size = _size(size)
        self._check_open()
        parts, length = [self._rest], len(self._rest)
        self._rest = _NOTHING
        while size < 0 or length < size:
            chunk = await anext(self, None)
            if chunk is None:
                break
            parts.append(memoryview(chunk))
            length += len(chunk)
        if size < 0 or length <= size:
            return b"".join(parts)
        kept = len(parts[-1]) - (length - size)
        self._rest = parts[-1][kept:]
        parts[-1] = parts[-1][:kept]
        return b"".join(parts)

    async def save_to(self, path: str | PathLike[str]) -> None:
        """Write all bytes that are left to a local file, which is replaced when all have arrived.

        Args:
            path: of the file; its directory must exist.

        Raises:
            OSError: the file cannot be written; an existing one is unchanged.
            BaseConnectorException: as for iteration; an existing file is unchanged.
        """
        target = Path(path)
        part = target.with_name(f".{uuid4().hex}.part")
        try:
            with await asyncio.to_thread(part.open, "xb") as file:
                async for chunk in self:
                    await asyncio.to_thread(file.write, chunk)
            await asyncio.to_thread(part.replace, target)
        finally:
            await asyncio.to_thread(part.unlink, missing_ok=True)

    def close(self) -> None:
        """Refuse further reads."""
        self._chunks = None


class StreamRepository(Repository):
    """Read files in chunks."""

    @asynccontextmanager
    async def open(
        self, path: AnyPath, *, start: int | None = None, end: int | None = None
    ) -> AsyncGenerator[ObjectStream]:
        """Open a file of any size for reading, in constant memory.

        After a broken connection, reading resumes at the byte that was reached, in the same version
        of the file (S3: `If-Match`). A whole file that is read to its end is compared with its
        SHA-256.

        Args:
            path: of the file.
            start: the first byte to read, counted from 0; by default the first byte of the file.
            end: the byte before which to stop; the end of the file by default.

        Raises:
            PathException: start and end are not in order.
            NoSuchKeyException: there is no such object.
            ObjectChangedException: the object was changed outside FennFlow.

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
            stream = ObjectStream(info_of(download.record, self._path(key.key)), chunks)
            try:
                yield stream
            finally:
                stream.close()


def _size(size: object) -> int:
    if size is None:
        return -1
    if isinstance(size, int):
        return size
    message = f"size={brief(size)} is not a number of bytes."
    raise PathException(message)


def _range(start: object, end: object) -> tuple[int, int | None]:
    first = 0 if start is None else start
    if isinstance(first, int) and first >= 0:
        if end is None:
            return first, None
        if isinstance(end, int) and end >= first:
            return first, end
    message = f"Invalid byte range: start={brief(start)}, end={brief(end)} (counted from 0, end exclusive)."
    raise PathException(message)
