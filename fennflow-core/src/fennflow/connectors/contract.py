"""The contract of a connector; `fennflow.connectors` lists which method is called when."""

from __future__ import annotations

import asyncio
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, Literal, Protocol

from fennflow.buffers import Buffers
from fennflow.connectors.headers import UNKNOWN_MEDIA_TYPE
from fennflow.connectors.values import (
    Capabilities,
    CopyRequest,
    Deletion,
    DeletionReport,
    LifecycleRules,
    Location,
    ObjectAttributes,
    PendingUpload,
    PresignedRequest,
    PutRequest,
    StoredObject,
    UploadTerms,
)
from fennflow.exceptions import (
    BaseConnectorException,
    ConfigException,
    ConnectorCapabilityException,
    PreconditionFailedException,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from datetime import datetime

PresignMethod = Literal["GET", "PUT"]
UploadMethod = Literal["PUT", "POST", "MULTIPART"]


class ProbeMemory(Protocol):
    """Stores the results of probes for other processes: a backend."""

    async def recall(self, name: str) -> str | None:
        """Return the text that was stored under a name, unless it is too old."""
        ...

    async def remember(self, name: str, value: str) -> None:
        """Store a text under a name."""
        ...


def check_etag(namespace: str, stored: StoredObject, etag: str) -> None:
    """Refuse the answer of a store that ignores `If-Match`.

    Raises:
        PreconditionFailedException: it has another ETag.
    """
    if stored.etag != etag:
        message = f"{namespace}/{stored.location.key} has the ETag {stored.etag}, not {etag}."
        raise PreconditionFailedException(message)


class Connector(ABC):
    """Object I/O on one store.

    Args:
        capabilities: what the store enforces according to the user's config, in place of a probe.
    """

    max_deletions: int = 1000
    """How many objects one request of `delete` can take; the engine sends batches of this size."""
    at_the_key_only: frozenset[str] = frozenset()
    """Options that staged bytes must not have, since they could not be copied or deleted then;
    the copy to their key names them again (S3: archive classes, Object Lock)."""
    copies_through_client: bool = False
    """Whether a copy is a GET and a PUT by this process. Deleting the source does not stop a PUT
    that arrives late, so the key stays locked after an ambiguous one (protocol P20 c)."""
    signs_headers: bool = True
    """Whether presigned URLs cover headers: those of an upload, and those of the response to a download.
    If not, there are no URLs for uploads, and URLs for downloads only of files that no browser
    runs."""
    incoming: frozenset[str] = frozenset()
    """Directories below the reserved prefix for bytes that have not reached their key yet.
    The sweep deletes old objects there (P27)."""
    stream_threshold: int = 8 << 20
    """The size in bytes from which on a stream goes to `upload`; a shorter one goes whole to `put`."""
    uploads_conditionally: bool = True
    """Whether `upload` has the condition `if_none_match` without collecting the bytes in memory. If not, a
    stream for a new key goes to a staging key, and is copied at the commit."""

    def __init__(self, capabilities: Capabilities | None = None) -> None:
        self._claimed = capabilities
        self._probed: dict[str, Capabilities] = {}
        self._probing = asyncio.Lock()
        self._memory: ProbeMemory | None = None
        self._options_taken = set[tuple[str, frozenset[tuple[str, Any]]]]()
        self._trying = asyncio.Lock()
        self.buffers = Buffers()
        """The memory for parts of files in transfer, for a whole engine."""

    @property
    def store_id(self) -> str:
        """Identifies this store among others of its kind, for instance by its URL without secrets.

        Results of probes are stored under it. Not abstract: by default the name of the class.
        """
        return type(self).__qualname__

    def remember_in(self, memory: ProbeMemory) -> None:
        """Share results of probes with other processes (P15); called by the engine."""
        self._memory = memory

    async def capabilities(self, namespace: str, *, refresh: bool = False) -> Capabilities:
        """Return what the namespace enforces: configured, or probed by any process (P15).

        Args:
            namespace: which one.
            refresh: probe even if it is known.
        """
        if self._claimed is not None:
            return self._claimed
        if refresh or namespace not in self._probed:
            async with self._probing:
                if refresh or namespace not in self._probed:
                    self._probed[namespace] = await self._find_out(namespace, refresh=refresh)
        return self._probed[namespace]

    async def _find_out(self, namespace: str, *, refresh: bool) -> Capabilities:
        digest = hashlib.sha256(f"{self.store_id}\n{namespace}".encode()).hexdigest()
        name = f"probe:{digest[:32]}"
        kept = None if refresh or self._memory is None else await self._memory.recall(name)
        if kept is not None:
            with suppress(ConfigException, RecursionError, TypeError, ValueError):
                known: dict[str, Any] = dict(json.loads(kept))
                if known.keys() == {each.name for each in fields(Capabilities)}:
                    return Capabilities(**known)
            # Another version of FennFlow, or another program, stored it in another form.
        found = await self.probe(namespace)
        if self._memory is not None:
            await self._memory.remember(name, json.dumps(asdict(found)))
        return found

    async def try_options(self, namespace: str, key: str, extra: Mapping[str, Any]) -> None:
        """Find out whether the store accepts options that staged bytes do not have (P2).

        If it refused them at the copy to the key, the commit could never be applied. So an empty
        object is written with them once, and deleted.

        Args:
            namespace: bucket, container or directory.
            key: of the empty object, under the reserved prefix.
            extra: all options of a write.

        Raises:
            BaseConnectorException: the store refuses them, or cannot be reached.
        """
        final = {name: extra[name] for name in self.at_the_key_only & extra.keys()}
        tried = namespace, frozenset(final.items())
        async with self._trying:
            if not final or tried in self._options_taken:
                return
            attributes = ObjectAttributes(media_type=UNKNOWN_MEDIA_TYPE, extra=final)
            try:
                stored = await self.put(PutRequest(namespace, key, attributes), b"")
            except BaseConnectorException as error:
                error.add_note(
                    f"It was a trial of {', '.join(sorted(final))}, which the file gets at its "
                    "key after the commit. The call was rolled back."
                )
                raise
            await self.delete(namespace, [Deletion(location=stored.location)])
            self._options_taken.add(tried)

    @abstractmethod
    async def open(self) -> None:
        """Acquire resources for requests, such as a client pool, on the running event loop.

        Keep no asynchronous generator open (`asynccontextmanager` is one): the loop closes them all
        at its end, in no particular order.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Release the resources; nothing is called afterwards."""

    @abstractmethod
    async def probe(self, namespace: str) -> Capabilities:
        """Test what the namespace enforces, on keys under the reserved prefix, and clean up."""

    @abstractmethod
    def validate(self, namespace: str, key: str, attributes: ObjectAttributes) -> None:
        """Raise if this store cannot hold an object. Does no I/O.

        Raises:
            MetadataException: metadata over the store's limit.
            ConnectorCapabilityException: an `extra` that the store does not know.
            KeyException: a key that the store cannot hold.
        """

    @abstractmethod
    async def put(self, request: PutRequest, body: bytes) -> StoredObject:
        """Write an object; it appears whole or not at all.

        Raises:
            PreconditionFailedException: `if_none_match`, and the key has an object.
            BaseConnectorException: see the docstring of `fennflow.connectors`.
        """

    async def upload(self, request: PutRequest, chunks: AsyncIterator[bytes]) -> StoredObject:
        """Write an object whose bytes arrive in chunks; it appears whole or not at all.

        Not abstract: this implementation collects the bytes in memory and calls `put`.

        Args:
            request: what to write.
            chunks: the bytes; read them to the end, even beyond the stated size. Their exceptions
                propagate unchanged, and no object appears then.

        Raises:
            Exception: like `put`.
        """
        return await self.put(request, b"".join([chunk async for chunk in chunks]))

    @abstractmethod
    async def get(
        self, namespace: str, location: Location, *, if_match: str | None = None
    ) -> tuple[StoredObject, bytes]:
        """Read a whole object.

        Raises:
            NoSuchKeyException: there is no such object.
            PreconditionFailedException: `if_match`, and its ETag is another one.
        """

    async def stream(
        self,
        namespace: str,
        location: Location,
        *,
        if_match: str,
        start: int = 0,
        end: int | None = None,
    ) -> AsyncGenerator[bytes]:
        """Read an object in chunks; the engine resumes after a broken connection.

        Not abstract: this implementation calls `get`, which takes memory.

        Args:
            namespace: of the object.
            location: its key and version id.
            if_match: its ETag, which must be compared even if the store does not compare it.
            start: the first byte to read, counted from 0.
            end: the byte before which to stop; None for the end of the object.

        Raises:
            NoSuchKeyException: there is no such object.
            PreconditionFailedException: its ETag is another one.
        """
        stored, body = await self.get(namespace, location, if_match=if_match)
        check_etag(namespace, stored, if_match)
        yield body[start:end]

    @abstractmethod
    async def head(self, namespace: str, location: Location) -> StoredObject | None:
        """Return the store's description of an object; None if there is no such object."""

    @abstractmethod
    async def copy(self, request: CopyRequest) -> StoredObject:
        """Copy an object inside the store, with its metadata and headers.

        Returns:
            location, ETag and `retried` of the target; other fields may be empty.

        Raises:
            NoSuchKeyException: the source is gone.
            PreconditionFailedException: a condition on the source or the target does not hold.
        """

    @abstractmethod
    async def delete(self, namespace: str, deletions: Sequence[Deletion]) -> DeletionReport:
        """Delete at most `max_deletions` objects in as few requests as possible.

        The engine repeats deletions (P7). So a deletion has succeeded if there is no object any
        more, or never was one, whatever its `if_match` is and whatever the store answers. If a
        refusal may mean either a missing object or another ETag, the connector must find out, for
        instance by a `head`: only an object with another ETag is a `PreconditionFailedException`.

        Returns:
            for each deletion, None or what prevented it.

        Raises:
            BaseConnectorException: the request as a whole failed.
        """

    @abstractmethod
    def list(
        self, namespace: str, prefix: str = "", *, start_after: str = ""
    ) -> AsyncIterator[StoredObject]:
        """Iterate over all objects under a prefix, each once.

        The order is the store's own: of UTF-8 bytes in S3, by directory in SeaweedFS (`a/1` before
        `a-`). Nothing may depend on a particular order. An object that is written or deleted during
        the listing may be in it or not; every other object is in it. Metadata and media type may be
        empty: listings rarely contain them.

        Args:
            namespace: bucket, container or directory.
            prefix: of the keys; it need not end with a segment.
            start_after: leave out this key, and those before it in the store's order. It saves
                requests. Since the order is the store's own, nothing that has to be complete may
                depend on it.

        Raises:
            IncompleteListingException: a key that others chose keeps the client from listing its
                neighbours. Everything that can be listed was yielded before, some of it perhaps
                twice.
        """

    @abstractmethod
    async def versions(self, namespace: str, key: str) -> Sequence[StoredObject]:
        """Return the versions of one key, newest first, without delete markers.

        Called only if `Capabilities.versioned` is true. Metadata may be empty.
        """

    async def recent_versions(
        self, namespace: str, key: str, *, since: datetime
    ) -> Sequence[StoredObject]:
        """Return the versions of one key that are not older than a time, newest first.

        Not abstract: a store that lists the newest versions first can stop listing early.

        Args:
            namespace: of the object.
            key: the key.
            since: by the store's clock. A version without a time counts as new.
        """
        found = await self.versions(namespace, key)
        return [each for each in found if each.modified_at is None or each.modified_at >= since]

    async def uploads(self, namespace: str, prefix: str) -> AsyncIterator[PendingUpload]:
        """Iterate over unfinished multipart uploads under a prefix.

        Not abstract: most stores have none; by default nothing is yielded.
        """
        del namespace, prefix
        nothing: tuple[PendingUpload, ...] = ()
        for upload in nothing:
            yield upload

    async def rules_on(self, namespace: str, prefix: str) -> LifecycleRules | None:
        """Return what the lifecycle rules of the bucket do under a prefix; used by `doctor`.

        Not abstract: most connectors cannot read such rules, and return None.

        Raises:
            BaseConnectorException: the store has such rules, but they cannot be read.
        """
        del namespace, prefix
        return None

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
        """Return a request with which its holder can read or write one object for a limited time.

        Not abstract: most stores do not support this.

        Args:
            namespace: of the object.
            location: its key and, for reading, an optional version id, which the URL then names.
            method: `GET` or `PUT`; or `POST` for a form, the only one that can enforce `max_size`,
                but not `if_none_match`.
            expires_in: seconds from now.
            terms: of an upload; the signature covers them. Given only if `signs_headers` is true.
            response_headers: for a `GET`: `Content-Type` and `Content-Disposition` of the response,
                in place of the stored ones. Given only if `signs_headers` is true.

        Raises:
            ConnectorCapabilityException: the store has no such URLs, or not for that long.
        """
        del method, expires_in, terms, response_headers
        message = (
            f"{type(self).__name__} cannot presign a URL for {namespace}/{location.key}. "
            "Use a connector that can, for instance S3."
        )
        raise ConnectorCapabilityException(message)

    async def begin_upload(
        self, namespace: str, key: str, attributes: ObjectAttributes, *, expires_in: float
    ) -> str:
        """Begin a multipart upload whose parts others send by presigned requests; return its id.

        Not abstract: only connectors with presigned requests can support this.

        Args:
            namespace: of the object.
            key: of the object.
            attributes: stored with it.
            expires_in: seconds for which requests will be signed; checked before anything is sent.

        Raises:
            ConnectorCapabilityException: the store does not support this, or not for that long.
        """
        del attributes, expires_in
        raise self._without_parts(namespace, key)

    async def presign_part(
        self, namespace: str, key: str, upload_id: str, number: int, *, size: int, expires_in: float
    ) -> PresignedRequest:
        """Return a request with which its holder can send one part of an upload, of exactly this size.

        Args:
            namespace: of the object.
            key: of the object.
            upload_id: from `begin_upload`.
            number: of the part, from 1.
            size: of the part in bytes.
            expires_in: seconds from now.
        """
        del upload_id, number, size, expires_in
        raise self._without_parts(namespace, key)

    async def finish_upload(
        self, namespace: str, key: str, upload_id: str, sizes: Sequence[int]
    ) -> None:
        """Create the object from the parts that have arrived, which must have exactly these sizes.

        Raises:
            NoSuchKeyException: there is no such upload: it was finished or aborted before.
            PreconditionFailedException: the parts have other sizes, or some are missing.
        """
        del upload_id, sizes
        raise self._without_parts(namespace, key)

    def _without_parts(self, namespace: str, key: str) -> ConnectorCapabilityException:
        message = (
            f"{type(self).__name__} cannot presign the parts of an upload to {namespace}/{key}. "
            "Use a connector that can, for instance S3."
        )
        return ConnectorCapabilityException(message)

    @abstractmethod
    async def abort_upload(self, namespace: str, key: str, upload_id: str) -> None:
        """End an unfinished multipart upload and free its parts; nothing if there is none."""
