"""Object I/O on the stores that obstore supports."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import obstore
from obstore.exceptions import GenericError, PreconditionError
from obstore.store import AzureStore, GCSStore, MemoryStore, S3Store
from typing_extensions import override

from fennflow.buffers import Share
from fennflow.connectors import (
    Capabilities,
    Connector,
    CopyRequest,
    Deletion,
    DeletionReport,
    Location,
    ObjectAttributes,
    PresignedRequest,
    PresignMethod,
    PutRequest,
    StoredObject,
    UploadTerms,
    check_etag,
)
from fennflow.exceptions import (
    BaseConnectorException,
    ConnectorCapabilityException,
    NoSuchKeyException,
    PreconditionFailedException,
)
from fennflow.printable import without_credentials
from fennflow_obstore.attributes import (
    EXTRA,
    Counted,
    attributes_of,
    stored_object,
    taken_along,
    written_object,
)
from fennflow_obstore.errors import sent, translated
from fennflow_obstore.listing import listed
from fennflow_obstore.probe import probe
from fennflow_obstore.stores import Stores, check_process, check_signable

if TYPE_CHECKING:
    from obstore import Attributes, GetOptions, GetResult

    from fennflow_obstore.config import ObstoreConnectorConfig

R = TypeVar("R")

CHUNK = 1 << 18
"""The least number of bytes that a reader gets at a time."""
DELETED_AT_ONCE = 10
"""Concurrent requests of a batch, on stores that delete one by one."""
READ_WHOLE = 8 << 20
"""The size in bytes up to which a copy passes through this process, which makes it exact."""
MAX_PARTS = 10_000
PARTS_AT_ONCE = 4
MOST_COPIED_INSIDE = 5 << 30
"""The largest size in bytes that S3 copies in one request."""


class ObstoreConnector(Connector):
    """Object I/O on one obstore store.

    Args:
        config: the config of the store.
        reserved_prefix: the prefix under which the probe may write.
    """

    at_the_key_only = frozenset({"Storage-Class"})
    copies_through_client = True  # the store's own copy has no conditions, and not all options
    uploads_conditionally = False
    signs_headers = False
    copies_inside = True
    """Whether the store itself copies large objects."""

    def __init__(self, config: ObstoreConnectorConfig, *, reserved_prefix: str) -> None:
        super().__init__(config.capabilities)
        self._config = config
        self._reserved_prefix = reserved_prefix
        self._stores = Stores(config)
        self.stream_threshold = config.max_collected
        # The limit of a batch on Azure; S3 allows more.
        self.max_deletions = 256 if not config.speaks_s3 else 1000

    @property
    @override
    def store_id(self) -> str:
        endpoint = self._config.options.get("endpoint")
        at = "" if endpoint is None else f" at {endpoint.get_secret_value()}"
        return without_credentials(f"obstore {self._config.url}{at}")

    @override
    async def open(self) -> None:
        """Check that the options are valid; the stores of namespaces are opened at first use.

        Raises:
            ConnectorCapabilityException: the process was forked from one that had used obstore.
        """
        check_process()
        if self._config.scheme not in {"file", "memory"}:
            self._stores.of("options", "writing")

    @override
    async def aclose(self) -> None:
        self._stores.close()

    async def _sent(
        self,
        verb: str,
        name: str,
        request: Callable[[], Awaitable[R]],
        *,
        writes: bool = False,
        attempts: int | None = None,
    ) -> tuple[R, bool]:
        """Send a request with the configured number of attempts; see `sent`."""
        if attempts is None:
            attempts = 1 if self._config.scheme in {"file", "memory"} else self._config.max_attempts
        return await sent(verb, name, request, writes=writes, attempts=attempts)

    @override
    async def probe(self, namespace: str) -> Capabilities:
        return await probe(self, namespace, self._reserved_prefix)

    @override
    def validate(self, namespace: str, key: str, attributes: ObjectAttributes) -> None:
        attributes_of(attributes)
        wrong = [
            name
            for name, value in attributes.extra.items()
            if name not in EXTRA or not (isinstance(value, str) and value.isascii())
        ]
        if wrong:
            message = (
                f"connector_extra {', '.join(sorted(wrong))} cannot be used for "
                f"{namespace}/{key}. obstore accepts printable ASCII for {', '.join(sorted(EXTRA))}."
            )
            raise ConnectorCapabilityException(message)

    @override
    async def put(self, request: PutRequest, body: bytes) -> StoredObject:
        return await self._put(
            request.namespace,
            request.key,
            body,
            attributes_of(request.attributes),
            if_none_match=request.if_none_match,
        )

    async def put_once(
        self, namespace: str, key: str, body: bytes, attributes: ObjectAttributes
    ) -> StoredObject:
        """Write an object, or fail at the first attempt."""
        described = attributes_of(attributes)
        return await self._put(namespace, key, body, described, if_none_match=False, attempts=1)

    async def _put(
        self,
        namespace: str,
        key: str,
        body: bytes,
        attributes: Attributes,
        *,
        if_none_match: bool,
        attempts: int | None = None,
    ) -> StoredObject:
        store = self._stores.of(namespace, "writing")

        async def put() -> Any:
            return await obstore.put_async(
                store,
                key,
                body,
                attributes=attributes,
                mode="create" if if_none_match else "overwrite",
                use_multipart=False,
            )

        name = f"{namespace}/{key}"
        answer, retried = await self._sent("put", name, put, writes=True, attempts=attempts)
        return written_object(key, answer["e_tag"], len(body), attributes, retried=retried)

    @override
    async def upload(self, request: PutRequest, chunks: AsyncIterator[bytes]) -> StoredObject:
        return await self._upload(
            request.namespace,
            request.key,
            chunks,
            attributes_of(request.attributes),
            size=request.size,
            if_none_match=request.if_none_match,
        )

    async def _upload(
        self,
        namespace: str,
        key: str,
        chunks: AsyncIterator[bytes],
        attributes: Attributes,
        *,
        size: int | None,
        if_none_match: bool,
    ) -> StoredObject:
        if if_none_match:
            body = b"".join([chunk async for chunk in chunks])
            return await self._put(namespace, key, body, attributes, if_none_match=True)
        source = Counted(chunks)
        part_size = max(self._config.part_size, -(-(size or 0) // MAX_PARTS))
        try:
            # The source cannot be read again, so this is sent only once.
            with Share(self.buffers) as share, translated("put", f"{namespace}/{key}", writes=True):
                await share.take(part_size)
                while share.held < PARTS_AT_ONCE * part_size and share.try_take(part_size):
                    pass
                answer = await obstore.put_async(
                    self._stores.of(namespace, "writing"),
                    key,
                    source.chunks(),
                    attributes=attributes,
                    chunk_size=part_size,
                    max_concurrency=share.held // part_size,
                )
        except Exception:
            if source.failure is not None:
                raise source.failure from None
            raise
        return written_object(key, answer["e_tag"], source.size, attributes, retried=False)

    @override
    async def get(
        self, namespace: str, location: Location, *, if_match: str | None = None
    ) -> tuple[StoredObject, bytes]:
        return (await self._read(namespace, location.key, if_match))[:2]

    async def _read(
        self, namespace: str, key: str, if_match: str | None
    ) -> tuple[StoredObject, bytes, Attributes]:
        async def read() -> tuple[StoredObject, bytes, Attributes]:
            options: GetOptions = {} if if_match is None else {"if_match": f'"{if_match}"'}
            result, attributes = await self._described(namespace, key, options)
            stored = stored_object(key, result.meta, attributes)
            check_etag(namespace, stored, if_match or stored.etag)  # some servers do not
            return stored, bytes(await result.bytes_async()), attributes

        try:
            return (await self._sent("get", f"{namespace}/{key}", read))[0]
        except PreconditionFailedException:
            await self._look(namespace, key)  # Azure reports a missing object as changed
            raise

    async def _described(
        self, namespace: str, key: str, options: GetOptions
    ) -> tuple[GetResult, Attributes]:
        """Start reading an object, together with the attributes of exactly these bytes."""
        result = await obstore.get_async(
            self._stores.of(namespace, "reading"), key, options=options
        )
        return result, result.attributes

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
        options: GetOptions = {"if_match": f'"{if_match}"'}
        if end is not None:
            options["range"] = (start, end)
        elif start:
            options["range"] = {"offset": start}
        store, key, skip = self._stores.of(namespace, "reading"), location.key, 0
        with translated("get", f"{namespace}/{key}"):
            try:
                result = await obstore.get_async(store, key, options=options)
            except PreconditionError:
                await self._look(namespace, key)  # Azure reports a missing object as changed
                raise
            except GenericError as error:
                if "range" not in options or "non-partial" not in str(error):
                    raise
                # The server ignores ranges, and sends everything.
                skip = start
                result = await obstore.get_async(store, key, options={"if_match": f'"{if_match}"'})
            check_etag(namespace, stored_object(key, result.meta, {}), if_match)
            left = (result.meta["size"] if end is None else end) - start
            async for chunk in result.stream(min_chunk_size=CHUNK):
                wanted = bytes(chunk)[skip : skip + left]
                skip, left = max(0, skip - len(chunk)), left - len(wanted)
                if wanted:
                    yield wanted
                if left <= 0:
                    break

    @override
    async def head(self, namespace: str, location: Location) -> StoredObject | None:
        try:
            return (await self._look(namespace, location.key))[0]
        except NoSuchKeyException:
            return None

    async def _look(self, namespace: str, key: str) -> tuple[StoredObject, Attributes]:
        async def look() -> tuple[StoredObject, Attributes]:
            result, attributes = await self._described(namespace, key, {"head": True})
            return stored_object(key, result.meta, attributes), attributes

        return (await self._sent("head", f"{namespace}/{key}", look))[0]

    @override
    async def copy(self, request: CopyRequest) -> StoredObject:
        namespace, key, source = request.namespace, request.key, request.source
        source_key = source.location.key
        if source.size is None or source.size <= READ_WHOLE:
            # obstore's copy has no conditions, and does not describe the copy.
            _, body, found = await self._read(source.namespace, source_key, source.if_match)
            kept = taken_along(found, request.attributes, request.extra)
            return await self._put(namespace, key, body, kept, if_none_match=request.if_none_match)
        before, found = await self._look(source.namespace, source_key)
        if source.if_match is not None:
            check_etag(source.namespace, before, source.if_match)
        kept = taken_along(found, request.attributes, request.extra)
        inside = self.copies_inside and source.namespace == namespace and kept == found
        if not inside or (self._config.speaks_s3 and source.size > MOST_COPIED_INSIDE):
            chunks = self.stream(source.namespace, source.location, if_match=before.etag)
            return await self._upload(
                namespace, key, chunks, kept, size=source.size, if_none_match=request.if_none_match
            )
        store = self._stores.of(namespace, "writing")

        async def copy() -> None:
            await obstore.copy_async(store, source_key, key)

        _, retried = await self._sent("copy", str(request), copy, writes=True)
        after, _ = await self._look(namespace, key)
        return replace(after, retried=retried)

    @override
    async def delete(self, namespace: str, deletions: Sequence[Deletion]) -> DeletionReport:
        keys = [deletion.location.key for deletion in deletions]
        store = self._stores.of(namespace, "writing")
        batches, lost = isinstance(store, (S3Store, AzureStore, MemoryStore)), False
        if batches and not (await self.capabilities(namespace)).keeps_directories:
            try:
                retried = await self.delete_batch(namespace, keys)
                return DeletionReport(errors=[None] * len(keys), retried=retried)
            except BaseConnectorException as error:
                lost = error.ambiguous  # it is not known which were deleted: retry each by itself
        limit = asyncio.Semaphore(DELETED_AT_ONCE)

        async def attempt(key: str) -> tuple[BaseConnectorException | None, bool]:
            async with limit:
                try:
                    return None, await self.delete_one(namespace, key)
                except BaseConnectorException as error:
                    return error, error.ambiguous

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(attempt(key)) for key in keys]
        results = [task.result() for task in tasks]
        return DeletionReport(
            errors=[error for error, _ in results],
            retried=lost or any(again for _, again in results),
        )

    async def delete_batch(
        self, namespace: str, keys: Sequence[str], *, attempts: int | None = None
    ) -> bool:
        """Delete several objects in one request, if the store supports it; see `delete_one`."""
        store = self._stores.of(namespace, "writing")

        async def delete() -> None:
            await obstore.delete_async(store, keys)

        verb = f"delete {len(keys)} objects of"
        return (await self._sent(verb, namespace, delete, writes=True, attempts=attempts))[1]

    async def delete_one(self, namespace: str, key: str) -> bool:
        """Delete one object; return whether the answer to an attempt was lost."""
        store = self._stores.of(namespace, "deleting singly")

        async def delete() -> None:
            # Some stores answer that there was no object, which is fine.
            with suppress(FileNotFoundError):
                await obstore.delete_async(store, key)

        return (await self._sent("delete", f"{namespace}/{key}", delete, writes=True))[1]

    @override
    async def list(
        self, namespace: str, prefix: str = "", *, start_after: str = ""
    ) -> AsyncIterator[StoredObject]:
        store = self._stores.of(namespace, "reading")
        with translated("list", f"{namespace}/{prefix}"):
            async for key, meta in listed(store, prefix, start_after):
                yield stored_object(key, meta, {})

    @override
    async def versions(self, namespace: str, key: str) -> Sequence[StoredObject]:
        return []  # never called: the capabilities name no versions

    @override
    async def presign(
        self,
        namespace: str,
        location: Location,
        *,
        method: PresignMethod | Literal["POST"],
        expires_in: float,
        terms: UploadTerms | None = None,
        response_headers: Mapping[str, str] | None = None,
    ) -> PresignedRequest:
        store = self._stores.of(namespace, "reading")
        if method == "POST" or not isinstance(store, (S3Store, GCSStore, AzureStore)):
            return await super().presign(namespace, location, method=method, expires_in=expires_in)
        check_signable(expires_in)
        with translated("sign a URL of", f"{namespace}/{location.key}"):
            url = await obstore.sign_async(
                store, method, location.key, timedelta(seconds=int(expires_in))
            )
        return PresignedRequest(url=url)

    @override
    async def abort_upload(self, namespace: str, key: str, upload_id: str) -> None:
        """Do nothing: obstore returns no ids of uploads, and aborts those that fail."""
