"""The contract of a connector, and by name the connector configs that plugins bring.

A connector does object I/O and knows nothing of transactions. The engine calls it; it never calls
back, but for `on_upload`. Who calls what, and when:

| method | called | must hold on return |
| --- | --- | --- |
| `open`, `aclose` | once each, first and last, on one event loop | |
| `validate` | before any I/O of a call | |
| `probe` | before the first write to a namespace | nothing is left of what it tried |
| `put`, `copy` | in a session before the pivot; `copy` after it | the object is complete and durable |
| `get`, `head`, `list`, `versions` | at any time | reads see every write that returned before |
| `delete`, `abort_upload` | after the pivot, or to undo | what was named is gone |
| `uploads` | by the sweep (P27) | |

What an exception means: a `BaseConnectorException` says that the request had no effect, save
`ConnectorUnavailableException`, which like any other exception leaves that open (protocol P19).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, Protocol

from fennflow.exceptions import ConnectorCapabilityException

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fennflow.exceptions import BaseConnectorException
    from fennflow_memory import InMemoryConnectorConfig as InMemoryConnectorConfig
    from fennflow_s3 import S3ConnectorConfig as S3ConnectorConfig
else:

    def __getattr__(name: str) -> object:
        from fennflow.plugins import config_class

        return config_class("connector", name, __name__)


__all__ = [
    "Capabilities",
    "Connector",
    "CopySource",
    "Deletion",
    "DeletionReport",
    "InMemoryConnectorConfig",
    "Location",
    "ObjectAttributes",
    "PendingUpload",
    "PresignMethod",
    "ProbeMemory",
    "S3ConnectorConfig",
    "StoredObject",
    "UploadCallback",
]

PresignMethod = Literal["GET", "PUT"]
UploadCallback = Callable[[str], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a namespace was seen, or is documented, to enforce.

    Args:
        conditional_create: a PUT with `if_none_match` fails where an object lies.
        conditional_delete: a deletion with `if_match` spares an object with another ETag, in a
            batch (which implies a single one), in a single request, or not at all.
        conditional_copy: a copy with `if_match` or `if_none_match` minds the target.
        versioned: every write makes a version with an id of its own (S3: versioning `Enabled`).
        keeps_directories: a batch of deletions leaves empty directories behind, which are listed
            as keys that end in `/` (JuiceFS).
    """

    conditional_create: bool = False
    conditional_delete: Literal["batch", "single", "none"] = "none"
    conditional_copy: bool = False
    versioned: bool = False
    keeps_directories: bool = False


class ProbeMemory(Protocol):
    """Where what was probed is kept for other processes: a backend."""

    async def recall(self, name: str) -> str | None:
        """Return what was kept under a name, unless it is too old."""
        ...

    async def remember(self, name: str, value: str) -> None:
        """Keep it."""
        ...


@dataclass(frozen=True, slots=True)
class Location:
    """Where bytes lie: a key, and a version id where the store gave one."""

    key: str
    version_id: str | None = None


@dataclass(frozen=True, slots=True)
class CopySource:
    """What to copy.

    Args:
        namespace: it may be another one than the target's.
        location: its key and version id.
        if_match: copy only if it has this ETag. A store that cannot check that copies all the
            same; the engine looks afterwards whether the catalog's record was still the same.
    """

    namespace: str
    location: Location
    if_match: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectAttributes:
    """What is stored beside the bytes.

    Args:
        media_type: for instance `text/plain`.
        metadata: any Unicode; the connector encodes it, and decodes it on the way back.
        sha256: hexadecimal, of the body; a connector may have the store verify it.
        extra: what the user passed as `connector_extra`, in the words of the store.
    """

    media_type: str
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    sha256: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredObject:
    """What the store says of an object.

    Args:
        location: its key and version id.
        etag: an opaque word that changes with the bytes; without quotes.
        size: in bytes.
        media_type: as stored.
        metadata: decoded; as `put` got it.
        modified_at: by the store's clock, where it tells.
        retried: whether the request that returned this was sent more than once, so that an
            earlier attempt may still take effect (protocol P20).
    """

    location: Location
    etag: str
    size: int
    media_type: str = "application/octet-stream"
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    modified_at: datetime | None = None
    retried: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingUpload:
    """A multipart upload that was neither completed nor aborted.

    Args:
        key: of the object that it is to become.
        upload_id: what `abort_upload` takes.
        modified_at: when it began, by the store's clock, where it tells.
    """

    key: str
    upload_id: str
    modified_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Deletion:
    """One object to delete.

    Args:
        location: its key; with a version id that version alone, for good.
        if_match: delete only if the object has this ETag. Given only where `Capabilities` says
            that the store enforces it.
    """

    location: Location
    if_match: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeletionReport:
    """How a batch of deletions went.

    Args:
        errors: for each deletion, in order, None if the object is gone (or never was), else what
            prevented that: a PreconditionFailedException where `if_match` did not hold.
        retried: whether a request was sent more than once, so that an earlier attempt may still
            take effect (protocol P20).
    """

    errors: Sequence[BaseConnectorException | None]
    retried: bool = False


class Connector(ABC):
    """Object I/O on one store.

    Args:
        capabilities: what the user's config claims the store to enforce, in place of a probe.
    """

    max_deletions: int = 1000
    """How many objects one request of `delete` can take; the engine sends batches of this size."""

    def __init__(self, capabilities: Capabilities | None = None) -> None:
        self._claimed = capabilities
        self._probed: dict[str, Capabilities] = {}
        self._probing = asyncio.Lock()
        self._memory: ProbeMemory | None = None

    @property
    def store_id(self) -> str:
        """What tells this store from others of its kind, for instance its URL without secrets.

        What was probed is kept under it; not abstract: the name of the class, where there is one.
        """
        return type(self).__qualname__

    def remember_in(self, memory: ProbeMemory) -> None:
        """Share what is probed with other processes (P15); the engine says where."""
        self._memory = memory

    async def capabilities(self, namespace: str, *, anew: bool = False) -> Capabilities:
        """Return what the namespace enforces: claimed, else probed, by others maybe (P15).

        Args:
            namespace: which one.
            anew: probe although it is known already.
        """
        if self._claimed is not None:
            return self._claimed
        if anew or namespace not in self._probed:
            async with self._probing:
                if anew or namespace not in self._probed:
                    self._probed[namespace] = await self._find_out(namespace, anew=anew)
        return self._probed[namespace]

    async def _find_out(self, namespace: str, *, anew: bool) -> Capabilities:
        digest = hashlib.sha256(f"{self.store_id}\n{namespace}".encode()).hexdigest()
        name = f"probe:{digest[:32]}"
        kept = None if anew or self._memory is None else await self._memory.recall(name)
        if kept is not None:
            try:
                return Capabilities(**json.loads(kept))
            except TypeError:
                pass  # another version of FennFlow kept it
        found = await self.probe(namespace)
        if self._memory is not None:
            await self._memory.remember(name, json.dumps(asdict(found)))
        return found

    @abstractmethod
    async def open(self) -> None:
        """Acquire what requests need, such as a client pool, on the running event loop.

        Keep no asynchronous generator open (`asynccontextmanager` is one): at its end the loop
        closes all of them at once, in no order.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Release it; nothing is called afterwards."""

    @abstractmethod
    async def probe(self, namespace: str) -> Capabilities:
        """Try what the namespace enforces, on keys under the reserved prefix, and clean up."""

    @abstractmethod
    def validate(self, namespace: str, key: str, attributes: ObjectAttributes) -> None:
        """Raise for what this store cannot hold. Does no I/O.

        Raises:
            MetadataException: metadata over the store's limit.
            ConnectorCapabilityException: an `extra` that the store does not know.
            KeyException: a key that the store cannot hold.
        """

    @abstractmethod
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
        """Write an object; it appears whole or not at all.

        Args:
            namespace: bucket, container or directory.
            key: where.
            body: the bytes.
            attributes: stored with them.
            if_none_match: only if no object lies there.
            on_upload: awaited with the id of a multipart upload before its first part is sent,
                so that it can be journaled (P13). A failed upload is left to `abort_upload`.

        Raises:
            PreconditionFailedException: `if_none_match`, and an object lies there.
            BaseConnectorException: see the module's docstring.
        """

    @abstractmethod
    async def get(
        self, namespace: str, location: Location, *, if_match: str | None = None
    ) -> tuple[StoredObject, bytes]:
        """Read an object whole.

        Raises:
            NoSuchKeyException: nothing lies there.
            PreconditionFailedException: `if_match`, and its ETag is another one.
        """

    @abstractmethod
    async def head(self, namespace: str, location: Location) -> StoredObject | None:
        """Return what the store says of an object; None if nothing lies there."""

    @abstractmethod
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
    ) -> StoredObject:
        """Copy an object inside the store, with all that is stored beside its bytes.

        Args:
            namespace: of the target.
            key: the target.
            source: what to copy.
            attributes: media type and metadata of the target in place of the source's, and
                options that win over the source's; its `sha256` tells what the source holds.
            extra: what the source was put with, for what a copy does not keep by itself; not
                together with `attributes`.
            if_match: only if the object at the target has this ETag.
            if_none_match: only if no object lies at the target. Both are given only where
                `Capabilities.conditional_copy` says so.

        Returns:
            location, ETag and `retried` of the target; the rest need not be filled.

        Raises:
            NoSuchKeyException: the source is gone.
            PreconditionFailedException: a condition does not hold, of the source or the target.
        """

    @abstractmethod
    async def delete(self, namespace: str, deletions: Sequence[Deletion]) -> DeletionReport:
        """Delete at most `max_deletions` objects in as few requests as possible.

        Raises:
            BaseConnectorException: the request as a whole failed.
        """

    @abstractmethod
    def list(
        self, namespace: str, prefix: str = "", *, start_after: str = ""
    ) -> AsyncIterator[StoredObject]:
        """Iterate over all objects under a prefix in the order of their keys' UTF-8 bytes.

        Metadata and media type need not be filled: listings seldom hold them.
        """

    @abstractmethod
    async def versions(self, namespace: str, key: str) -> Sequence[StoredObject]:
        """Return the versions of one key, newest first, without delete markers.

        Called only where `Capabilities.versioned`. Metadata need not be filled.
        """

    async def uploads(self, namespace: str, prefix: str) -> AsyncIterator[PendingUpload]:
        """Iterate over unfinished multipart uploads under a prefix.

        Not abstract: most stores have no such thing, and then there are none.
        """
        del namespace, prefix
        nothing: tuple[PendingUpload, ...] = ()
        for upload in nothing:
            yield upload

    async def presign(
        self, namespace: str, location: Location, *, method: PresignMethod, expires_in: float
    ) -> str:
        """Return a URL by which whoever has it may read or write one object for a while.

        Not abstract: most stores have no such thing.

        Args:
            namespace: of the object.
            location: its key, and for reading maybe a version id, which the URL then names.
            method: `GET` or `PUT`.
            expires_in: seconds from now.

        Raises:
            ConnectorCapabilityException: the store has no such URLs, or not for so long.
        """
        del method, expires_in
        message = (
            f"{type(self).__name__} has no presigned URLs, asked for {namespace}/{location.key}. "
            "Use a connector that has them, for instance S3."
        )
        raise ConnectorCapabilityException(message)

    @abstractmethod
    async def abort_upload(self, namespace: str, key: str, upload_id: str) -> None:
        """End an unfinished multipart upload and free its parts; nothing if there is none."""
