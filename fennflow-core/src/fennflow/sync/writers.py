"""File objects for writing, whose bytes are sent while they are written."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import TYPE_CHECKING, Any

from typing_extensions import Buffer, override

from fennflow.exceptions import FileException
from fennflow.sync.base import OnPortal

if TYPE_CHECKING:
    from types import TracebackType

    from fennflow.responses import PutResponse
    from fennflow.sync.portal import Portal

BUFFER = 1 << 18
AHEAD = 2
"""How many buffers may be written ahead of sending."""

Put = Callable[[AsyncIterator[bytes]], Coroutine[Any, Any, "PutResponse"]]


class _AbortedError(Exception):
    """An exception has left the block in which the file was open."""


class _Raw(io.RawIOBase, OnPortal):
    """Passes bytes to a put that is in progress."""

    def __init__(self, portal: Callable[[], Portal], put: Put) -> None:
        super().__init__()
        self._portal = portal
        self._queue: asyncio.Queue[bytes | Exception | None] = asyncio.Queue(AHEAD)
        self._aborted = self._interrupted = False

        async def begin() -> asyncio.Task[PutResponse]:
            return asyncio.create_task(put(self._chunks()))

        self._task = self._await(begin)

    @override
    def _portal_in_use(self) -> Portal:
        return self._portal()

    async def _chunks(self) -> AsyncGenerator[bytes]:
        while (item := await self._queue.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item

    async def _hand_on(self, item: bytes | Exception | None) -> None:
        """Pass bytes to the put; if it has ended, raise its exception."""
        handing = asyncio.create_task(self._queue.put(item))
        await asyncio.wait({handing, self._task}, return_when=asyncio.FIRST_COMPLETED)
        if not handing.done():
            handing.cancel()
        if self._task.done():
            self._task.result()

    async def _finish(self) -> None:
        await self._hand_on(None)
        await self._task

    async def _abort(self) -> None:
        while not self._queue.empty():
            self._queue.get_nowait()
        self._queue.put_nowait(_AbortedError("An exception left the block of the file."))
        await asyncio.wait({self._task})
        if not self._task.cancelled():
            self._task.exception()  # otherwise the loop would log it

    @override
    def writable(self) -> bool:
        return True

    @override
    def write(self, data: Buffer, /) -> int:
        chunk = bytes(data)
        if self._aborted:
            return len(chunk)
        self.check_whole()
        try:
            self._await(self._hand_on, chunk)
        except BaseException:
            self._interrupted = not self._task.done()
            raise
        return len(chunk)

    def check_whole(self) -> None:
        """Refuse to continue after an interrupted write: its buffer would be written twice."""
        if self._interrupted and not self._aborted:
            self.abort()
            message = (
                "A write to this file was interrupted, so some bytes may be missing or duplicated. "
                "The file was not stored; open it again."
            )
            raise FileException(message)

    def abort(self) -> None:
        """Put nothing."""
        if not (self._aborted or self.closed):
            self._aborted = True
            self._await(self._abort)

    @override
    def close(self) -> None:
        if not self.closed:
            super().close()
            if not self._aborted:
                self._await(self._abort if self._interrupted else self._finish)

    @override
    def __del__(self) -> None:
        """Do nothing: a file that was not closed is not put."""


class Discardable:
    """A file that is open for writing, and stored only if it is closed.

    If an exception leaves its block, it is closed, and nothing is stored either.
    """

    if TYPE_CHECKING:

        def close(self) -> None:
            """Store the file."""

    def discard(self) -> None:
        """Store nothing: `close()` does nothing then."""
        raise NotImplementedError

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        """Close it, or discard it if an exception leaves the block."""
        if exc_val is not None:
            self.discard()
        self.close()

    def __del__(self) -> None:
        """Do nothing: a file that was not closed is not stored."""


class SyncWriter(Discardable, io.BufferedWriter):
    """A file that is open for writing; returned by `open(path, "wb")` of a repository.

    It is put when it is closed. Close it before the unit of work ends. If an exception leaves its
    block, or it is never closed, nothing is stored.
    """

    def __init__(self, portal: Callable[[], Portal], put: Put) -> None:
        self._file = _Raw(portal, put)
        super().__init__(self._file, BUFFER)

    @override
    def close(self) -> None:
        try:
            self._file.check_whole()
        finally:
            super().close()

    @override
    def discard(self) -> None:
        self._file.abort()
