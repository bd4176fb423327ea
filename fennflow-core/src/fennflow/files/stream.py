"""Files that are never held in memory as a whole."""

from __future__ import annotations

import asyncio
import inspect
import io
import os
import time
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Protocol, runtime_checkable

from pydantic import Field, PrivateAttr

from fennflow.containing import contained
from fennflow.exceptions import FileException
from fennflow.files import media_types
from fennflow.files.content import FileBase

CHUNK = 1 << 20
"""How many bytes are read at a time."""
CHUNKS_AT_ONCE = 64
"""A synchronous iterable is read in a thread, where it may block."""
TAKEN_FOR = 0.1
"""Seconds after which the bytes collected from a slow iterable are passed on."""


@runtime_checkable
class Readable(Protocol):
    """An object with `read(size)`, plain or async: an open file, or the upload of a web framework."""

    def read(self, size: int, /) -> Any:
        """Return the next bytes, or none at the end."""
        ...


Opener = Callable[[], AsyncGenerator[bytes]]


class StreamContent(FileBase):
    """A file for `put` whose bytes are read while they are sent: any size, in constant memory.

    `get` returns the file as the class of its media type; `open` streams it.

    Args:
        filename: path relative to the scope of the `put`.
        media_type: by default detected from the name's extension, otherwise
            `application/octet-stream`.
        metadata: the user's own, like that of `BaseContent`.
        size: in bytes, if it is known; a body of another size is refused.

    Example:
        ```python
        import asyncio

        from fennflow import UnitOfWork
        from fennflow.files import StreamContent
        from fennflow.repositories import CrudRepository, RepoField, StreamRepository


        class LogRepository(CrudRepository, StreamRepository):
            pass


        class UOW(UnitOfWork):
            logs = RepoField(LogRepository, namespace="logs")


        async def lines():
            for number in range(3):
                yield f"line {number}; ".encode()


        async def main():
            async with UOW() as uow:
                await uow.logs.put(StreamContent.from_iterable(lines(), filename="today.txt"))
                async with uow.logs.open("today.txt", start=7) as stream:
                    print(b"".join([chunk async for chunk in stream]))
                    #> b' line 1; line 2; '


        asyncio.run(main())
        ```
    """

    filename: Annotated[str, Field(min_length=1)]
    media_type: str
    metadata: Mapping[str, str] = Field(default_factory=dict[str, str])
    size: Annotated[int | None, Field(ge=0, lt=1 << 63)] = None

    _open: Opener = PrivateAttr()
    _repeatable: bool = PrivateAttr(default=False)

    @property
    def repeatable(self) -> bool:
        """Whether `chunks` can be called again."""
        return self._repeatable

    def chunks(self) -> AsyncGenerator[bytes]:
        """Iterate over the bytes, from the first one.

        Raises:
            FileException: they were read before, and the source can be read only once; or they
                cannot be read.
        """
        return self._open()

    @classmethod
    def from_iterable(
        cls,
        chunks: AsyncIterable[bytes] | Iterable[bytes] | Readable,
        *,
        filename: str | None = None,
        media_type: str = "",
        size: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> StreamContent:
        """Build it from a source that produces its bytes once.

        Args:
            chunks: an iterable of bytes, async or not, or an object with `read`, such as an open
                file or the `UploadFile` of FastAPI. A source that is not async is called in a
                thread.
            filename: path relative to the scope of the `put`; by default that of an upload, or the
                last part of an open file's name.
            media_type: by default the `content_type` of an upload, or detected from the name.
            size: in bytes, if you know it.
            metadata: your own.

        Raises:
            FileException: there is no name, or the chunks are not bytes.
        """
        if isinstance(chunks, io.TextIOBase):
            message = "The file is open as text. Open it with open(path, 'rb')."
            raise FileException(message)
        name: object = filename or getattr(chunks, "filename", None) or _name_of(chunks)
        if not isinstance(name, str):
            message = (
                "A stream needs a filename: its bytes cannot name it before they are sent. Write "
                "StreamContent.from_iterable(source, filename=...)."
            )
            raise FileException(message)
        if isinstance(chunks, (bytes, bytearray, str)):
            message = f"{name} is not a stream: use BinaryContent or TextContent, or pass a list."
            raise FileException(message)
        kind: object = media_type or getattr(chunks, "content_type", None)
        stated: object = getattr(chunks, "size", None)
        content = cls(
            filename=name,
            media_type=kind if isinstance(kind, str) and kind else _guess(name),
            metadata=metadata or {},
            size=stated if size is None and isinstance(stated, int) else size,
        )
        content._open = _once(name, chunks)
        return content


class FileContent(StreamContent):
    """A local file for `put`, which is read while it is sent."""

    @classmethod
    def from_local_path(
        cls,
        path: str | PathLike[str],
        *,
        filename: str | None = None,
        media_type: str = "",
        metadata: Mapping[str, str] | None = None,
    ) -> FileContent:
        """Build it from the path of a file.

        Args:
            path: of the file; it must keep its size until it is sent.
            filename: path relative to the scope of the `put`; the file's own name by default.
            media_type: by default detected from the name.
            metadata: your own.

        Raises:
            FileException: there is no such file.

        Example:
            ```python
            from pathlib import Path

            from fennflow.files import FileContent

            Path("film.mp4").write_bytes(b"...")
            film = FileContent.from_local_path("film.mp4", filename="2026/film.mp4")
            print(film.media_type, film.size)
            #> video/mp4 3
            ```
        """
        local = Path(path)
        try:
            size = local.stat().st_size
        except OSError as error:
            raise _unreadable(local, error) from error
        except ValueError as error:  # a NUL, or a lone surrogate
            message = f"{os.fspath(path)!a} cannot be the path of a file: {error}."
            raise FileException(message) from error
        if not local.is_file():
            message = f"{local} is not a file."
            raise FileException(message)
        name = local.name if filename is None else filename
        content = cls(
            filename=name,
            media_type=media_type or _guess(name),
            metadata=metadata or {},
            size=size,
        )
        content._open = lambda: _read_local(local)
        content._repeatable = True
        return content


def _name_of(file: object) -> str | None:
    """Return the last part of the name of an open file; None if it is not one, or has none."""
    name: object = getattr(file, "name", None)
    return Path(name).name if isinstance(file, io.IOBase) and isinstance(name, str) else None


def _guess(name: str) -> str:
    return media_types.from_name(name) or media_types.ANY


def _unreadable(path: Path, error: OSError) -> FileException:
    return FileException(f"{path} cannot be read: {error.strerror or error}")


async def _read_local(path: Path) -> AsyncGenerator[bytes]:
    try:
        file = await asyncio.to_thread(path.open, "rb")
        try:
            while chunk := await asyncio.to_thread(file.read, CHUNK):
                yield chunk
        finally:
            await asyncio.to_thread(file.close)
    except OSError as error:
        raise _unreadable(path, error) from error


def _once(name: str, chunks: AsyncIterable[bytes] | Iterable[bytes] | Readable) -> Opener:
    """Return a function that opens a source once, and raises at the second call."""
    opened = False

    def open_() -> AsyncGenerator[bytes]:
        nonlocal opened
        if opened:
            message = (
                f"{name} has already been consumed; create a new StreamContent to send it again."
            )
            raise FileException(message)
        opened = True
        # Files are iterables too, of lines.
        if isinstance(chunks, Readable):
            return _read(chunks)
        return _pass_on(chunks) if isinstance(chunks, AsyncIterable) else _take(iter(chunks))

    return open_


async def _pass_on(chunks: AsyncIterable[bytes]) -> AsyncGenerator[bytes]:
    async for chunk in chunks:
        yield chunk


async def _read(file: Readable) -> AsyncGenerator[bytes]:
    plain = not inspect.iscoroutinefunction(file.read)
    while True:
        chunk = (
            await asyncio.to_thread(contained, partial(file.read, CHUNK))
            if plain
            else file.read(CHUNK)
        )
        if inspect.isawaitable(chunk):
            chunk = await chunk
        if chunk is None:  # this is not the end: no bytes are ready yet
            message = "The file is in non-blocking mode: it produced None instead of bytes."
            raise FileException(message)
        if not chunk:
            break
        yield chunk


async def _take(chunks: Iterator[bytes]) -> AsyncGenerator[bytes]:
    def take() -> list[bytes]:
        taken, until = list[bytes](), time.monotonic() + TAKEN_FOR
        for chunk in islice(chunks, CHUNKS_AT_ONCE):
            taken.append(chunk)
            if time.monotonic() >= until:
                break
        return taken

    while taken := await asyncio.to_thread(contained, take):
        for chunk in taken:
            yield chunk
