"""File objects for reading."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

from typing_extensions import Buffer, override

from fennflow.exceptions import ObjectChangedException, PathException
from fennflow.repositories.streaming import ObjectStream
from fennflow.sync.base import Block, OnPortal

if TYPE_CHECKING:
    from fennflow.responses import ObjectInfo
    from fennflow.sync.portal import Portal

BUFFER = 1 << 16

Opener = Callable[[int], AbstractAsyncContextManager[ObjectStream]]


class _Raw(io.RawIOBase, OnPortal):
    """The bytes of a file; a seek begins another request, of the same version.

    Args:
        portal: the portal on whose loop it is read.
        open_: opens it at a byte, counted from 0.
        start: the first byte to read.
        end: the byte before which to stop.
    """

    def __init__(
        self, portal: Callable[[], Portal], open_: Opener, start: int | None, end: int | None
    ) -> None:
        super().__init__()
        self._portal = portal
        self._open = open_
        self._first = start or 0
        self._position = self._reached = 0
        self._left = memoryview(b"")
        self._opened, self._chunks, self.info = self._begin(start)
        size = self.info.size if end is None else min(end, self.info.size)
        self._size = max(0, size - self._first)

    @override
    def _portal_in_use(self) -> Portal:
        return self._portal()

    def _begin(
        self, at: int | None
    ) -> tuple[Block[ObjectStream], AsyncIterator[bytes], ObjectInfo]:
        block = self._block_of(at)
        stream = block.__enter__()
        return block, aiter(stream), stream.info

    def _block_of(self, at: int | None) -> Block[ObjectStream]:
        return Block(self._portal_in_use, lambda: self._open(at or 0))

    @override
    def readable(self) -> bool:
        return True

    @override
    def seekable(self) -> bool:
        return True

    @override
    def tell(self) -> int:
        return self._position

    @override
    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}
        if whence not in base or base[whence] + offset < 0:
            message = f"seek({offset}, {whence}) leads outside of {self.info.path}."
            raise PathException(message)
        self._position = base[whence] + offset
        return self._position

    @override
    def readinto(self, buffer: Buffer, /) -> int:
        if self._position != self._reached and not self._reopen():
            return 0
        while not self._left:
            chunk = self._await(self._next)
            if chunk is None:
                return 0
            self._left = memoryview(chunk)
        target = memoryview(buffer).cast("B")
        count = min(len(target), len(self._left))
        target[:count] = self._left[:count]
        self._left = self._left[count:]
        self._position = self._reached = self._position + count
        return count

    async def _next(self) -> bytes | None:
        return await anext(self._chunks, None)

    def _reopen(self) -> bool:
        """Continue at the position of a seek, unless it is beyond the end."""
        if self._position >= self._size:
            return False
        self._release()
        self._opened, self._chunks, now = self._begin(self._first + self._position)
        self._reached = self._position
        if now != self.info:
            message = f"{self.info.path} was changed while it was read. Open it again."
            raise ObjectChangedException(message)
        return True

    def _release(self) -> None:
        self._left = memoryview(b"")
        self._opened.__exit__(None, None, None)

    @override
    def close(self) -> None:
        if not self.closed:
            super().close()
            self._release()

    @override
    def __del__(self) -> None:
        """Do nothing: the event loop closes a stream that was dropped."""


class SyncStream(io.BufferedReader):
    """A file that is open for reading; returned by `open` of a repository without `async`.

    It has the methods of every binary file object: `read`, `readinto`, `seek`, iteration over
    lines. A whole file that is read from beginning to end is compared with its SHA-256.
    """

    def __init__(
        self, portal: Callable[[], Portal], open_: Opener, start: int | None, end: int | None
    ) -> None:
        raw = _Raw(portal, open_, start, end)
        super().__init__(raw, BUFFER)
        self._info = raw.info

    @property
    def info(self) -> ObjectInfo:
        """The catalog's information about the file."""
        return self._info

    @override
    def __del__(self) -> None:
        """Do nothing: the event loop closes a stream that was dropped."""
