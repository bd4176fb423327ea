"""A connector and a backend that hand every operation to a `Faults`, which decides about it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Mapping,
    Sequence,
)
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from typing_extensions import override

from fennflow.backends import (
    Backend,
    Commit,
    Decision,
    Guarantees,
    JoinedTransaction,
    JournaledTransaction,
    LateWrite,
    ObjectKey,
    Plan,
    Record,
    TransactionToken,
)
from fennflow.connectors import (
    Capabilities,
    Connector,
    CopySource,
    Deletion,
    DeletionReport,
    Location,
    ObjectAttributes,
    PendingUpload,
    StoredObject,
    UploadCallback,
)
from fennflow.exceptions import BaseConnectorException, ConnectorUnavailableException

R = TypeVar("R")

Effect = Callable[[], Awaitable[R]]


@dataclass(frozen=True, slots=True)
class Operation:
    """What is about to happen.

    Args:
        name: the method of the connector or the backend.
        keys: what it is about, of a connector's.
        part: `connector` or `backend`.
        transaction: the id of the transaction that the backend is to change, if it is one.
    """

    name: str
    keys: tuple[str, ...] = ()
    part: str = "connector"
    transaction: str = ""


class Faults(ABC):
    """Decides about operations."""

    @abstractmethod
    async def around(self, operation: Operation, effect: Effect[R]) -> R:
        """Let an operation take effect, or not, or later; return its answer, or raise.

        Args:
            operation: what is asked for.
            effect: call it to make it happen; twice, as if a client had sent it again.
        """

    def cut(self, operation: Operation) -> int | None:
        """Return after how many bytes the stream of an `upload` or a `stream` breaks off, if so."""
        del operation
        return None

    def spare(
        self, operation: Operation, deletions: Sequence[Deletion]
    ) -> Mapping[int, BaseConnectorException]:
        """Return the errors by which a batch of deletions leaves out some of them, by index."""
        del operation, deletions
        return {}


class FaultyConnector(Connector):
    """A connector that asks before it acts.

    Args:
        inner: what does the work.
        faults: what decides.
    """

    def __init__(self, inner: Connector, faults: Faults) -> None:
        super().__init__()
        self.inner = inner
        self.max_deletions = inner.max_deletions
        self.at_the_key_only = inner.at_the_key_only
        self.copies_through_client = inner.copies_through_client
        self.stream_threshold = inner.stream_threshold
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
    async def put(
        self,
        namespace: str,
        key: str,
        body: bytes,
        attributes: ObjectAttributes,
        *,
        if_none_match: bool = False,
        on_upload: UploadCallback | None = None,
    ) -> StoredObject:
        return await self._around(
            "put",
            key,
            lambda: self.inner.put(
                namespace,
                key,
                body,
                attributes,
                if_none_match=if_none_match,
                on_upload=on_upload,
            ),
        )

    @override
    async def upload(
        self,
        namespace: str,
        key: str,
        chunks: AsyncIterator[bytes],
        attributes: ObjectAttributes,
        *,
        size: int | None = None,
        if_none_match: bool = False,
        on_upload: UploadCallback | None = None,
    ) -> StoredObject:
        operation = Operation("upload", (key,))
        # Collected, so that it can take effect later, or twice.
        body = [chunk async for chunk in chunks]
        return await self.faults.around(
            operation,
            lambda: self.inner.upload(
                namespace,
                key,
                _cut_off(_iterate(body), self.faults.cut(operation)),
                attributes,
                size=size,
                if_none_match=if_none_match,
                on_upload=on_upload,
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
    async def copy(
        self,
        namespace: str,
        key: str,
        source: CopySource,
        *,
        attributes: ObjectAttributes | None = None,
        extra: Mapping[str, Any] | None = None,
        if_match: str | None = None,
        if_none_match: bool = False,
        on_upload: UploadCallback | None = None,
    ) -> StoredObject:
        return await self._around(
            "copy",
            key,
            lambda: self.inner.copy(
                namespace,
                key,
                source,
                attributes=attributes,
                extra=extra,
                if_match=if_match,
                if_none_match=if_none_match,
                on_upload=on_upload,
            ),
        )

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
    async def presign(self, namespace: str, location: Location, **options: Any) -> str:
        return await self.inner.presign(namespace, location, **options)

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
    """Pass on as many bytes, and break off then."""
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


class FaultyBackend(Backend):
    """A backend that asks before it acts; like `FaultyConnector`."""

    def __init__(self, inner: Backend, faults: Faults) -> None:
        self.inner = inner
        self.faults = faults

    async def _around(self, name: str, effect: Effect[R], transaction: str = "") -> R:
        return await self.faults.around(
            Operation(name, part="backend", transaction=transaction), effect
        )

    @property
    @override
    def catalog_id(self) -> str:
        return self.inner.catalog_id

    @override
    async def open(self) -> None:
        await self.inner.open()

    @override
    async def aclose(self) -> None:
        await self.inner.aclose()

    @property
    @override
    def guarantees(self) -> Guarantees:
        return self.inner.guarantees

    @override
    async def recall(self, name: str) -> str | None:
        return await self.inner.recall(name)

    @override
    async def remember(self, name: str, value: str) -> None:
        await self.inner.remember(name, value)

    @override
    async def records(self, keys: Collection[ObjectKey]) -> Mapping[ObjectKey, Record]:
        return await self._around("records", lambda: self.inner.records(keys))

    @override
    async def scan(
        self, namespace: str, *, prefix: str, start: str, limit: int
    ) -> Sequence[Record]:
        return await self._around(
            "scan",
            lambda: self.inner.scan(namespace, prefix=prefix, start=start, limit=limit),
        )

    @override
    async def begin_writes(
        self,
        token: TransactionToken,
        keys: Collection[ObjectKey],
        plan: Plan,
        *,
        begins: bool = True,
    ) -> Mapping[ObjectKey, Record]:
        return await self._around(
            "begin_writes",
            lambda: self.inner.begin_writes(token, keys, plan, begins=begins),
            token.transaction_id,
        )

    @override
    async def note_upload(self, token: TransactionToken, seq: int, upload_id: str) -> None:
        await self._around(
            "note_upload",
            lambda: self.inner.note_upload(token, seq, upload_id),
            token.transaction_id,
        )

    @override
    async def commit(self, token: TransactionToken, commit: Commit) -> None:
        await self._around("commit", lambda: self.inner.commit(token, commit), token.transaction_id)

    @override
    async def abort(self, token: TransactionToken, *, lock_wait: float | None = None) -> Decision:
        return await self._around(
            "abort", lambda: self.inner.abort(token, lock_wait=lock_wait), token.transaction_id
        )

    @override
    async def join(self, transaction: object) -> JoinedTransaction:
        return await self.inner.join(transaction)

    @override
    async def relocate(self, token: TransactionToken, records: Sequence[Record]) -> None:
        await self._around(
            "relocate", lambda: self.inner.relocate(token, records), token.transaction_id
        )

    @override
    async def settle(
        self,
        token: TransactionToken,
        *,
        keys: Collection[ObjectKey] | None = None,
        late_writes: Collection[LateWrite] = (),
        keep_locked: Collection[ObjectKey] = (),
        late_writes_checked: Collection[LateWrite] = (),
    ) -> None:
        await self._around(
            "settle",
            lambda: self.inner.settle(
                token,
                keys=keys,
                late_writes=late_writes,
                keep_locked=keep_locked,
                late_writes_checked=late_writes_checked,
            ),
            token.transaction_id,
        )

    @override
    async def late_writes(self, keys: Collection[ObjectKey]) -> Collection[LateWrite]:
        return await self._around("late_writes", lambda: self.inner.late_writes(keys))

    @override
    async def due_late_writes(self, *, after: LateWrite | None, limit: int) -> Sequence[LateWrite]:
        return await self._around(
            "due_late_writes", lambda: self.inner.due_late_writes(after=after, limit=limit)
        )

    @override
    async def heartbeat(
        self, transactions: Collection[TransactionToken]
    ) -> Collection[TransactionToken]:
        return await self._around("heartbeat", lambda: self.inner.heartbeat(transactions))

    @override
    async def claim(self, limit: int) -> Sequence[JournaledTransaction]:
        return await self._around("claim", lambda: self.inner.claim(limit))

    @override
    async def transactions(self, *, after: str, limit: int) -> Sequence[JournaledTransaction]:
        return await self._around(
            "transactions", lambda: self.inner.transactions(after=after, limit=limit)
        )

    @override
    async def known(self, transaction_ids: Collection[str]) -> Collection[str]:
        return await self._around("known", lambda: self.inner.known(transaction_ids))
