"""A connector that passes every operation to a `Faults`, which decides about it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Mapping,
    Sequence,
)
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from typing_extensions import override

from fennflow.connectors import (
    Capabilities,
    Connector,
    CopyRequest,
    Deletion,
    DeletionReport,
    Location,
    ObjectAttributes,
    PendingUpload,
    PresignedRequest,
    PutRequest,
    StoredObject,
)
from fennflow.exceptions import BaseConnectorException, ConnectorUnavailableException

R = TypeVar("R")

Effect = Callable[[], Awaitable[R]]


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation that is about to happen.

    Args:
        name: the method of the connector or the backend.
        keys: the keys of an operation of a connector.
        part: `connector` or `backend`.
        transaction: the id of the transaction that a backend's operation changes, if any.
    """

    name: str
    keys: tuple[str, ...] = ()
    part: str = "connector"
    transaction: str = ""


class Faults(ABC):
    """Decides about operations."""

    @abstractmethod
    async def around(self, operation: Operation, effect: Effect[R]) -> R:
        """Let an operation take effect now, later or never; return its result, or raise.

        Args:
            operation: the operation.
            effect: performs the operation; call it twice to simulate a repeated request.
        """

    def cut(self, operation: Operation) -> int | None:
        """Return after how many bytes an `upload` or a `stream` breaks off; None if it does not."""
        del operation
        return None

    def spare(
        self, operation: Operation, deletions: Sequence[Deletion]
    ) -> Mapping[int, BaseConnectorException]:
        """Return errors for some deletions of a batch, by index."""
        del operation, deletions
        return {}


class FaultyConnector(Connector):
    """A connector that asks a `Faults` about every operation.

    Args:
        inner: the connector that does the work.
        faults: decides about each operation.
    """

    def __init__(self, inner: Connector, faults: Faults) -> None:
        super().__init__()
        self.inner = inner
        self.max_deletions = inner.max_deletions
        self.at_the_key_only = inner.at_the_key_only
        self.copies_through_client = inner.copies_through_client
        self.incoming = inner.incoming
        self.signs_headers = inner.signs_headers
        self.stream_threshold = inner.stream_threshold
        self.uploads_conditionally = inner.uploads_conditionally
        self.buffers = inner.buffers
        self.faults = faults

    async def _around(self, name: str, key: str, effect: Effect[R]) -> R:
        return await self.faults.around(Operation(name, (key,)), effect)

    @override
    async def open(self) -> None:
        await self.inner.open()

    @override
    async def aclose(self) -> None:
        await self.inner.aclose()

    @override
    async def probe(self, namespace: str) -> Capabilities:
        return await self.inner.capabilities(namespace)

    @override
    def validate(self, namespace: str, key: str, attributes: ObjectAttributes) -> None:
        self.inner.validate(namespace, key, attributes)

    @override
    async def put(self, request: PutRequest, body: bytes) -> StoredObject:
        return await self._around("put", request.key, lambda: self.inner.put(request, body))

    @override
    async def upload(self, request: PutRequest, chunks: AsyncIterator[bytes]) -> StoredObject:
        operation = Operation("upload", (request.key,))
        # The body is collected, so that the operation can take effect later, or twice.
        body = [chunk async for chunk in chunks]
        return await self.faults.around(
            operation,
            lambda: self.inner.upload(
                request, _cut_off(_iterate(body), self.faults.cut(operation))
            ),
        )

    @override
    async def stream(
        self,
        namespace: str,
        location: Location,
        *,
        if_match: str,
        start: int = 0,
        end: int | None = None,
    ) -> AsyncGenerator[bytes]:
        async def nothing() -> None:
            pass

        operation = Operation("stream", (location.key,))
        await self.faults.around(operation, nothing)
        chunks = self.inner.stream(namespace, location, if_match=if_match, start=start, end=end)
        async with aclosing(_cut_off(chunks, self.faults.cut(operation))) as cut:
            async for chunk in cut:
                yield chunk

    @override
    async def get(
        self, namespace: str, location: Location, *, if_match: str | None = None
    ) -> tuple[StoredObject, bytes]:
        return await self._around(
            "get", location.key, lambda: self.inner.get(namespace, location, if_match=if_match)
        )

    @override
    async def head(self, namespace: str, location: Location) -> StoredObject | None:
        return await self._around(
            "head", location.key, lambda: self.inner.head(namespace, location)
        )

    @override
    async def copy(self, request: CopyRequest) -> StoredObject:
        return await self._around("copy", request.key, lambda: self.inner.copy(request))

    @override
    async def delete(self, namespace: str, deletions: Sequence[Deletion]) -> DeletionReport:
        operation = Operation("delete", tuple(each.location.key for each in deletions))
        spared = self.faults.spare(operation, deletions)
        wanted = [each for index, each in enumerate(deletions) if index not in spared]
        report = await self.faults.around(operation, lambda: self.inner.delete(namespace, wanted))
        errors = iter(report.errors)
        merged = [spared[i] if i in spared else next(errors) for i in range(len(deletions))]
        return DeletionReport(errors=merged, retried=report.retried)

    @override
    def list(
        self, namespace: str, prefix: str = "", *, start_after: str = ""
    ) -> AsyncIterator[StoredObject]:
        return self.inner.list(namespace, prefix, start_after=start_after)

    @override
    async def versions(self, namespace: str, key: str) -> Sequence[StoredObject]:
        return await self._around("versions", key, lambda: self.inner.versions(namespace, key))

    @override
    async def presign(self, namespace: str, location: Location, **options: Any) -> PresignedRequest:
        return await self.inner.presign(namespace, location, **options)

    @override
    async def begin_upload(
        self, namespace: str, key: str, attributes: ObjectAttributes, *, expires_in: float
    ) -> str:
        return await self.inner.begin_upload(namespace, key, attributes, expires_in=expires_in)

    @override
    async def presign_part(
        self, namespace: str, key: str, upload_id: str, number: int, *, size: int, expires_in: float
    ) -> PresignedRequest:
        return await self.inner.presign_part(
            namespace, key, upload_id, number, size=size, expires_in=expires_in
        )

    @override
    async def finish_upload(
        self, namespace: str, key: str, upload_id: str, sizes: Sequence[int]
    ) -> None:
        await self.inner.finish_upload(namespace, key, upload_id, sizes)

    @override
    def uploads(self, namespace: str, prefix: str) -> AsyncIterator[PendingUpload]:
        return self.inner.uploads(namespace, prefix)

    @override
    async def abort_upload(self, namespace: str, key: str, upload_id: str) -> None:
        await self._around(
            "abort_upload", key, lambda: self.inner.abort_upload(namespace, key, upload_id)
        )


async def _iterate(chunks: Sequence[bytes]) -> AsyncGenerator[bytes]:
    for chunk in chunks:
        yield chunk


async def _cut_off(chunks: AsyncIterator[bytes], after: int | None) -> AsyncGenerator[bytes]:
    """Pass on a number of bytes, and then break off."""
    left = after
    async for chunk in chunks:
        if left is None:
            yield chunk
            continue
        if chunk[:left]:
            yield chunk[:left]
        left -= len(chunk)
        if left <= 0:
            message = f"The connection broke after {after} bytes."
            raise ConnectorUnavailableException(message)
