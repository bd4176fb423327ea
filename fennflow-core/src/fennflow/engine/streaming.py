"""Streaming uploads and downloads with constant memory."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass, field, replace

from fennflow.backends import ObjectKey, Record
from fennflow.buffers import Share
from fennflow.connectors import Connector
from fennflow.engine.callbacks import notify
from fennflow.engine.details import with_details
from fennflow.engine.transaction import Transaction
from fennflow.exceptions import (
    ChecksumMismatchException,
    ConnectorUnavailableException,
    FileException,
    NoSuchKeyException,
    ObjectChangedException,
    PreconditionFailedException,
    UploadIdleException,
)

READ_ATTEMPTS = 4
"""Of a connection that brings nothing, before a reader gives up."""
FIRST_PAUSE = 0.1
_END = object()
"""Marks the end of a source; a source that yields None has not ended."""
HASH_AT_ONCE = 1 << 20
"""From how many bytes on hashing in a thread is faster."""


class SourceError(Exception):
    """Carries an exception of the user's source through a connector."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(slots=True)
class Source:
    """A body that is read from the user's source while it is sent.

    Args:
        name: the name for errors.
        chunks: opens the source.
        size: in bytes, if the user gave it.
        repeatable: whether it can be opened again, to be sent again.
        on_bytes: called with the number of additional bytes that were read.

    Attributes:
        held: the memory for bytes that were read before a connector reads the source, which then
            has its own share.
        count: bytes read since it was opened last.
        sha256: of all of them, hexadecimal, once they are read.
    """

    name: str
    chunks: Callable[[], AsyncGenerator[bytes]]
    size: int | None = None
    repeatable: bool = False
    on_bytes: Callable[[int], object] | None = None
    held: Share | None = None
    count: int = 0
    sha256: str | None = None
    _reported: int = 0
    _opened: AsyncGenerator[bytes] | None = None
    _begun: list[bytes] = field(default_factory=list[bytes])

    async def whole(self, limit: int, idle: float) -> bytes | None:
        """Return the body if it is shorter than the limit; otherwise keep the bytes that were read.

        Args:
            limit: in bytes.
            idle: seconds for which the source may give nothing.

        Raises:
            UploadIdleException: it gave nothing for longer than that.
            Exception: any exception of the source.
        """
        if self.size is not None and self.size >= limit:
            return None
        self._opened = self.chunks()
        size = 0
        try:
            while (chunk := await self._next(self._opened, idle)) is not None:
                self._begun.append(chunk)
                size += len(self._begun[-1])
                if size >= limit:
                    return None
        except BaseException:
            await self._opened.aclose()
            raise
        self.check_size(size)
        return b"".join(self._begun)

    async def read(self, check: Callable[[], None], idle: float) -> AsyncGenerator[bytes]:
        """Iterate over all of it, from its beginning.

        Args:
            check: called before each chunk is passed on, and at the end.
            idle: seconds for which the source may give nothing.

        Raises:
            SourceError: the source failed, or does not have the declared size.
        """
        begun, self._begun = self._begun, []
        opened, self._opened = self._opened or self.chunks(), None
        digest = Digest()
        self.count, self.sha256 = 0, None
        async with aclosing(opened):
            while True:
                try:
                    chunk = begun.pop(0) if begun else await self._next(opened, idle)
                    if chunk is None:
                        self.check_size(self.count)
                    else:
                        await self._report_progress(len(chunk))
                except Exception as error:
                    raise SourceError(error) from error
                check()
                if chunk is None:
                    break
                await digest.update(chunk)
                if self.held is not None:
                    self.held.give(self.held.held)
                    self.held = None
                yield chunk
        self.sha256 = await digest.hexdigest()

    async def _next(self, opened: AsyncGenerator[bytes], idle: float) -> bytes | None:
        """Return the next bytes; None at the end. The time that a store takes does not count."""
        limit = asyncio.timeout(idle)
        try:
            async with limit:
                while True:
                    chunk: object = await anext(opened, _END)
                    if chunk is _END:
                        return None
                    if checked := self._checked(chunk):
                        return checked
                    await asyncio.sleep(0)  # empty chunks must not block the loop
        except TimeoutError:
            if not limit.expired():
                raise  # raised by the source itself
            message = (
                f"{self.name} produced no bytes for {idle:g} seconds (upload_idle_timeout). The call "
                "was rolled back; send the file again."
            )
            raise UploadIdleException(message) from None

    def check_size(self, size: int) -> None:
        """Refuse a body that does not have the declared size."""
        if self.size is not None and self.size != size:
            message = (
                f"{self.name} has {size} bytes, but size={self.size} was given. The call was rolled "
                "back. Leave out the size, or read from the beginning."
            )
            raise FileException(message)

    async def aclose(self) -> None:
        """Close a source that was not read to its end."""
        if self._opened is not None:
            await self._opened.aclose()

    async def report_all(self) -> None:
        """Report the progress of a body that was sent in one request."""
        await self._report_progress(sum(map(len, self._begun)))

    async def _report_progress(self, more: int) -> None:
        self.count += more
        # Bytes that are sent again do not count as progress.
        news, self._reported = self.count - self._reported, max(self.count, self._reported)
        if news > 0 and self.on_bytes is not None:
            await notify(self.on_bytes, news)

    def _checked(self, chunk: object) -> bytes:
        if not isinstance(chunk, bytes):
            found = "None" if chunk is None else f"a {type(chunk).__name__}"
            message = f"{self.name} produced {found} instead of bytes."
            raise FileException(message)
        return chunk


async def sha256_of(body: bytes) -> str:
    """Return the hexadecimal SHA-256 of bytes; for large ones it is computed in a thread."""
    if len(body) < HASH_AT_ONCE:
        return hashlib.sha256(body).hexdigest()
    digest = await asyncio.to_thread(hashlib.sha256, body)
    return digest.hexdigest()


class Digest:
    """A SHA-256 that is computed in a thread while the next bytes are transferred."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._chunks: list[bytes] = []
        self._size = 0
        self._busy: asyncio.Future[None] | None = None

    async def update(self, chunk: bytes) -> None:
        """Add bytes; this may wait for earlier ones."""
        self._chunks.append(chunk)
        self._size += len(chunk)
        if self._size >= HASH_AT_ONCE:
            if self._busy is not None:
                await self._busy
            chunks, self._chunks, self._size = self._chunks, [], 0
            loop = asyncio.get_running_loop()
            self._busy = loop.run_in_executor(None, self._take, chunks)

    async def hexdigest(self) -> str:
        """Return the digest of all bytes."""
        if self._busy is not None:
            await self._busy
        self._take(self._chunks)
        return self._hash.hexdigest()

    def _take(self, chunks: list[bytes]) -> None:
        for chunk in chunks:
            self._hash.update(chunk)


@dataclass(slots=True)
class Download:
    """A download of the bytes of one record, of one version from beginning to end (P29).

    Args:
        connector: where they are stored.
        call: begins a call of the session, in which it reads the catalog.
        key: of the object.
        start: the first byte to read.
        end: the byte before which to stop; None for all.

    Attributes:
        record: the record of the bytes; known once the download is open.
        position: of the next byte.
    """

    connector: Connector
    call: Callable[[], AbstractAsyncContextManager[Transaction]]
    key: ObjectKey
    start: int
    end: int | None
    record: Record = field(init=False)
    position: int = 0

    async def open(self) -> AsyncGenerator[bytes]:
        """Connect, so that a missing file raises now, and return an iterator over the bytes.

        Raises:
            NoSuchKeyException: there is no such file.
            ObjectChangedException: the object was changed outside FennFlow.
        """
        self.record = await self._look()
        self.position = min(self.start, self.record.size)
        chunks = self._chunks()
        try:
            first = await anext(chunks, b"")
        except BaseException:
            await chunks.aclose()
            raise
        return _after(first, chunks)

    async def _look(self) -> Record:
        async with self.call() as tx:
            view = await tx.read_records(self.key.namespace, [self.key.key], missing_ok=False)
            [record] = await with_details(tx, [each for each in view if each is not None])
        return record

    def _end(self) -> int:
        return self.record.size if self.end is None else min(self.end, self.record.size)

    async def _chunks(self) -> AsyncGenerator[bytes]:
        begin = self.position
        digest = Digest()
        failures = moves = 0
        while self.position < self._end():
            reached = self.position
            try:
                async with aclosing(self._request()) as chunks:
                    async for chunk in chunks:
                        self.position += len(chunk)
                        await digest.update(chunk)
                        yield chunk
                self._check_complete()
            except (NoSuchKeyException, PreconditionFailedException) as error:
                moves = moves + 1 if self.position == reached else 1
                await self._follow(error, begin, last=moves == READ_ATTEMPTS)
            except ConnectorUnavailableException:
                failures = failures + 1 if self.position == reached else 1
                if failures == READ_ATTEMPTS:
                    raise
                await asyncio.sleep(FIRST_PAUSE * 2**failures)
        whole = begin == 0 and self.position == self.record.size
        if whole and self.record.sha256 not in {None, await digest.hexdigest()}:
            message = (
                f"{self.key.namespace}/{self.key.key} differs from what was committed: its SHA-256 is "
                f"not {self.record.sha256}. Discard what was read; restore the file from a backup, "
                "or put it again."
            )
            raise ChecksumMismatchException(message)

    def _request(self) -> AsyncGenerator[bytes]:
        end = self._end()
        return self.connector.stream(
            self.key.namespace,
            self.record.location,
            if_match=self.record.etag,
            start=self.position,
            end=None if end == self.record.size else end,
        )

    def _check_complete(self) -> None:
        if self.position < self._end():
            message = (
                f"{self.key.namespace}/{self.key.key}: connection lost at byte {self.position}."
            )
            raise ConnectorUnavailableException(message)

    async def _follow(self, error: Exception, begin: int, *, last: bool) -> None:
        """Continue at the current location of the bytes: apply may have moved them (P28)."""
        now = await self._look()
        same = replace(self.record, location=now.location, etag=now.etag) == now
        unmoved = now == self.record
        if last or unmoved or not (same or self.position == begin):
            what = "was changed while it was read"
            then = "Read it again."
            if unmoved:  # the object is not the one that the catalog has recorded
                what = "was changed or deleted outside FennFlow"
                then = "Put it again, or reconcile the catalog with the bucket."
            message = f"{self.key.namespace}/{self.key.key} {what}, noticed at byte {self.position}. {then}"
            raise ObjectChangedException(message) from error
        self.record = now
        if self.position == begin:
            self.position = min(begin, now.size)


async def _after(first: bytes, chunks: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """Iterate over a first chunk and what follows it."""
    async with aclosing(chunks):
        if first:
            yield first
        async for chunk in chunks:
            yield chunk
