"""Ranges of one object that are read in parallel, ahead of its reader."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass, field
from functools import partial

from fennflow.buffers import Buffers, Share
from fennflow_s3.downloads import Downloads

RANGE = 8 << 20
"""The size of a range in bytes."""
RANGES_AT_ONCE = 8
ALONE = 2 * RANGE
"""How many bytes the first request delivers before others are sent."""
WORTH_IT = 4 * RANGE
"""How many bytes must be left for other requests to start."""
PATIENCE = 1.0
"""Seconds that a reader may take for a range; a slower reader is served by one request."""


def reader_waits(kept: float, elapsed: float) -> bool:
    """Return whether a reader waits for its connection most of the time.

    Args:
        kept: seconds that the reader spent on the data it got.
        elapsed: seconds since the connection began.
    """
    return kept < elapsed / 2


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a GET.

    Args:
        size: the size of the requested bytes.
        is_range: whether the server has sent only a range.
        chunks: the bytes.
    """

    size: int
    is_range: bool
    chunks: AsyncIterator[bytes]


Request = Callable[[int, int | None], AbstractAsyncContextManager[Answer]]


class Rest:
    """The bytes of an object from a start on, read with one request, or with several if that is faster.

    Args:
        request: requests a range, or everything from a byte on.
        start: the first byte.
        buffers: provides the memory for ranges.
        downloads: provides the turns for requests; the caller already has one.
    """

    def __init__(
        self, request: Request, start: int, buffers: Buffers, downloads: Downloads
    ) -> None:
        self._request = request
        self._position = self._end = start
        self._buffers = buffers
        self._downloads = downloads

    async def chunks(self) -> AsyncGenerator[bytes]:
        """Iterate over the bytes, in order."""
        for part in (self._first, self._ahead, self._last):
            async with aclosing(part()) as chunks:
                async for chunk in chunks:
                    self._position += len(chunk)
                    yield chunk
            if self._position >= self._end:
                break

    async def _first(self) -> AsyncGenerator[bytes]:
        """Request everything, and stop when ranges would be faster."""
        clock = asyncio.get_running_loop().time
        began, kept, enough = clock(), 0.0, self._position + ALONE
        async with self._request(self._position, None) as answer:
            self._end = self._position + answer.size
            last = self._end - WORTH_IT
            async for chunk in answer.chunks:
                since = clock()
                yield chunk
                kept += clock() - since
                worth_it = enough <= self._position <= last and self._downloads.has_ranges
                if worth_it and reader_waits(kept, clock() - began):
                    break

    def _ahead(self) -> AsyncGenerator[bytes]:
        return Ahead(
            self._fetch, self._position, self._end, self._buffers, self._downloads
        ).chunks()

    async def _fetch(self, start: int, end: int) -> AsyncGenerator[bytes]:
        async with self._request(start, end) as answer:
            self._downloads.has_ranges = answer.is_range
            if answer.is_range:
                async for chunk in answer.chunks:
                    yield chunk

    async def _last(self) -> AsyncGenerator[bytes]:
        async with self._request(self._position, None) as answer:
            async for chunk in answer.chunks:
                yield chunk


@dataclass(slots=True, eq=False)
class _Range:
    """A range that is being read.

    Attributes:
        left: the number of bytes that have not arrived yet.
        chunks: the chunks that have arrived and were not read yet.
        changed: set when a chunk has arrived, or no more will come.
        ended: whether no more chunks will come.
        failure: the error, if the range failed.
    """

    left: int
    chunks: deque[bytes] = field(default_factory=deque[bytes])
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    ended: bool = False
    failure: Exception | None = None


class Ahead:
    """Reads an object in concurrent ranges, adding one whenever its reader has to wait.

    Args:
        fetch: reads one range.
        start: the first byte.
        end: the byte before which to stop.
        buffers: provides the memory for the ranges.
        downloads: provides the turns for their requests; the first one uses the caller's.
    """

    def __init__(
        self,
        fetch: Callable[[int, int], AsyncGenerator[bytes]],
        start: int,
        end: int,
        buffers: Buffers,
        downloads: Downloads,
    ) -> None:
        self._fetch = fetch
        self._next = start
        self._end = end
        self._share = Share(buffers)
        self._downloads = downloads
        self._ranges: deque[_Range] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._at_once = 2
        self._dropped = False

    async def chunks(self) -> AsyncGenerator[bytes]:
        """Iterate over the bytes, in order.

        It ends early if the reader is slow, or a server does not answer with the range.

        Raises:
            BaseConnectorException: a range failed; the bytes before it were yielded.
        """
        loop = asyncio.get_running_loop()
        try:
            while await self._begin():
                first, kept = self._ranges[0], 0.0
                while first.chunks or not first.ended:
                    if not first.chunks:
                        await self._wait_for(first)
                        continue
                    since = loop.time()
                    timer = loop.call_later(PATIENCE - kept, self._drop)
                    try:
                        yield first.chunks.popleft()
                    finally:
                        timer.cancel()
                    kept += loop.time() - since
                    if self._dropped or kept >= PATIENCE:
                        return
                if first.failure is not None:
                    raise first.failure
                if first.left:
                    return
                self._ranges.popleft()
                self._share.give(RANGE)
        finally:
            self._drop()
            if self._tasks:
                await asyncio.wait(self._tasks)

    async def _begin(self) -> bool:
        """Start as many ranges as allowed; return whether there is one to read."""
        while self._next < self._end and len(self._ranges) < self._at_once:
            turn = bool(self._ranges)
            if not turn:
                await self._share.take(RANGE)
            elif not self._share.try_take(RANGE):
                break
            elif not await self._downloads.begin_if_free():
                self._share.give(RANGE)
                break
            start, self._next = self._next, min(self._next + RANGE, self._end)
            one = _Range(self._next - start)
            self._ranges.append(one)
            task = asyncio.create_task(self._fill(one, start, self._next))
            self._tasks.add(task)
            task.add_done_callback(partial(self._ended, one, turn))
        return bool(self._ranges)

    async def _wait_for(self, first: _Range) -> None:
        """Wait for bytes, and start one more range."""
        first.changed.clear()
        if self._at_once < RANGES_AT_ONCE:
            self._at_once += 1
            await self._begin()
        await first.changed.wait()

    async def _fill(self, one: _Range, start: int, end: int) -> None:
        try:
            async with aclosing(self._fetch(start, end)) as chunks:
                async for chunk in chunks:
                    one.left -= len(chunk)
                    one.chunks.append(chunk)
                    one.changed.set()
        except Exception as error:  # noqa: BLE001 - raised after the bytes before it
            one.failure = error

    def _ended(self, one: _Range, turn: bool, task: asyncio.Task[None]) -> None:  # noqa: FBT001
        self._tasks.discard(task)
        if turn:
            self._downloads.end()
        one.ended = True
        one.changed.set()

    def _drop(self) -> None:
        """Release all requests and memory."""
        self._dropped = True
        for task in self._tasks:
            task.cancel()
        for one in self._ranges:
            one.chunks.clear()
        self._share.give(self._share.held)
