"""Objects in the memory of the process."""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from typing_extensions import override

from fennflow.connectors import (
    Capabilities,
    Connector,
    CopyRequest,
    Deletion,
    DeletionReport,
    Location,
    ObjectAttributes,
    PutRequest,
    StoredObject,
    headers_of,
)
from fennflow.exceptions import (
    BaseConnectorException,
    NoSuchKeyException,
    PreconditionFailedException,
)

if TYPE_CHECKING:
    from fennflow.config import ConfigDict
    from fennflow_memory.config import InMemoryConnectorConfig

EVERYTHING = Capabilities(
    conditional_create=True, conditional_delete="batch", conditional_copy=True
)


@dataclass(frozen=True, slots=True)
class _Version:
    """A version of an object; a delete marker has no body."""

    stored: StoredObject
    body: bytes | None


@dataclass(slots=True)
class _Store:
    """The objects of one name: for each namespace and key its versions, oldest first."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    objects: dict[tuple[str, str], list[_Version]] = field(
        default_factory=dict[tuple[str, str], list[_Version]]
    )
    numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))


_stores: dict[str, _Store] = {}
_stores_lock = threading.Lock()


def new_connector(config: InMemoryConnectorConfig, _settings: ConfigDict) -> Connector:
    """Return a connector on the process's store of that name."""
    with _stores_lock:
        store = _stores.setdefault(config.name, _Store())
    return InMemoryConnector(store, config.capabilities or EVERYTHING)


class InMemoryConnector(Connector):
    """A store that enforces the conditions in its capabilities, and ignores others.

    Args:
        store: the objects.
        capabilities: the conditions that it enforces.
    """

    def __init__(self, store: _Store, capabilities: Capabilities) -> None:
        super().__init__(capabilities)
        self._store = store
        self._enforced = capabilities

    @override
    async def open(self) -> None:
        """Do nothing: the store exists."""

    @override
    async def aclose(self) -> None:
        """Do nothing: the store stays for the process."""

    @override
    async def probe(self, namespace: str) -> Capabilities:
        return self._enforced

    @override
    def validate(self, namespace: str, key: str, attributes: ObjectAttributes) -> None:
        """Accept every key that the key rules accept, and ignore options of other stores."""

    @override
    async def put(self, request: PutRequest, body: bytes) -> StoredObject:
        with self._store.lock:
            if request.if_none_match and self._enforced.conditional_create:
                self._check(request.namespace, request.key, if_match=None)
            return self._add(request.namespace, request.key, bytes(body), request.attributes)

    @override
    async def get(
        self, namespace: str, location: Location, *, if_match: str | None = None
    ) -> tuple[StoredObject, bytes]:
        with self._store.lock:
            found = self._found(namespace, location, if_match=if_match)
        return found.stored, found.body or b""

    @override
    async def head(self, namespace: str, location: Location) -> StoredObject | None:
        with self._store.lock:
            found = self._find(namespace, location)
        return None if found is None else found.stored

    @override
    async def copy(self, request: CopyRequest) -> StoredObject:
        namespace, key, source = request.namespace, request.key, request.source
        conditional = request.if_none_match or request.if_match is not None
        with self._store.lock:
            found = self._found(source.namespace, source.location, if_match=source.if_match)
            if self._enforced.conditional_copy and conditional:
                self._check(namespace, key, if_match=request.if_match)
            taken_over = found.stored
            attributes = request.attributes or ObjectAttributes(
                media_type=taken_over.media_type,
                metadata=taken_over.metadata,
                extra=request.extra,
            )
            return self._add(
                namespace, key, found.body or b"", attributes, headers=taken_over.headers
            )

    @override
    async def delete(self, namespace: str, deletions: Sequence[Deletion]) -> DeletionReport:
        conditional = self._enforced.conditional_delete
        enforced = conditional == "batch" or (conditional == "single" and len(deletions) == 1)
        errors: list[BaseConnectorException | None] = []
        with self._store.lock:
            for deletion in deletions:
                try:
                    if enforced and deletion.if_match is not None:
                        self._check(
                            namespace, deletion.location.key, if_match=deletion.if_match, gone=True
                        )
                except PreconditionFailedException as error:
                    errors.append(error)
                    continue
                self._remove(namespace, deletion.location)
                errors.append(None)
        return DeletionReport(errors=errors)

    @override
    async def list(
        self, namespace: str, prefix: str = "", *, start_after: str = ""
    ) -> AsyncIterator[StoredObject]:
        with self._store.lock:
            keys = sorted(
                key
                for bucket, key in self._store.objects
                if bucket == namespace and key.startswith(prefix) and key > start_after
            )
        for key in keys:
            stored = await self.head(namespace, Location(key))
            if stored is not None:
                yield stored

    @override
    async def versions(self, namespace: str, key: str) -> Sequence[StoredObject]:
        with self._store.lock:
            versions = self._store.objects.get((namespace, key), [])
            return [each.stored for each in reversed(versions) if each.body is not None]

    @override
    async def abort_upload(self, namespace: str, key: str, upload_id: str) -> None:
        """Do nothing: every body is written in one piece."""

    def _find(self, namespace: str, location: Location) -> _Version | None:
        for version in reversed(self._store.objects.get((namespace, location.key), [])):
            if location.version_id is None:
                return None if version.body is None else version
            if version.stored.location.version_id == location.version_id:
                return version
        return None

    def _found(self, namespace: str, location: Location, *, if_match: str | None) -> _Version:
        found = self._find(namespace, location)
        if found is None or found.body is None:
            message = f"No such object: {namespace}/{location.key}"
            raise NoSuchKeyException(message)
        if if_match is not None and found.stored.etag != if_match:
            message = f"{namespace}/{location.key} has another ETag than {if_match}."
            raise PreconditionFailedException(message)
        return found

    def _check(self, namespace: str, key: str, *, if_match: str | None, gone: bool = False) -> None:
        """Check that a key has an ETag, or no object if `if_match` is None."""
        found = self._find(namespace, Location(key))
        there = None if found is None else found.stored.etag
        if there == if_match or (gone and there is None):
            return
        message = f"{namespace}/{key} has the ETag {there}; {if_match} was required."
        raise PreconditionFailedException(message)

    def _check_directories(self, namespace: str, key: str) -> None:
        """Refuse a key below or above another one, like a file system."""
        for bucket, other in self._store.objects:
            near = other.startswith(f"{key}/") or key.startswith(f"{other}/")
            if bucket == namespace and near and self._find(namespace, Location(other)):
                message = f"Could not put {namespace}/{key}: {namespace}/{other} exists."
                raise BaseConnectorException(message)

    def _add(
        self,
        namespace: str,
        key: str,
        body: bytes,
        attributes: ObjectAttributes,
        *,
        headers: Mapping[str, str] | None = None,
    ) -> StoredObject:
        if self._enforced.hierarchical:
            self._check_directories(namespace, key)
        versioned = self._enforced.versioned
        version_id = f"v{next(self._store.numbers)}" if versioned else None
        stored = StoredObject(
            location=Location(key, version_id),
            etag=hashlib.md5(body, usedforsecurity=False).hexdigest(),
            size=len(body),
            media_type=attributes.media_type,
            metadata=dict(attributes.metadata),
            headers={**(headers or {}), **headers_of(attributes.extra)},
            modified_at=datetime.now(UTC),
        )
        versions = self._store.objects.setdefault((namespace, key), [])
        if not versioned:
            versions.clear()
        versions.append(_Version(stored, body))
        return stored

    def _remove(self, namespace: str, location: Location) -> None:
        versions = self._store.objects.get((namespace, location.key), [])
        if location.version_id is not None:
            versions[:] = [
                each for each in versions if each.stored.location.version_id != location.version_id
            ]
        elif not self._enforced.versioned:
            versions.clear()
        elif versions:
            marker = Location(location.key, f"v{next(self._store.numbers)}")
            versions.append(_Version(replace(versions[-1].stored, location=marker), None))
        if not versions:
            self._store.objects.pop((namespace, location.key), None)
