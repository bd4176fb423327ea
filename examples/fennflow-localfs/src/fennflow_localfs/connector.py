"""Objects in a directory.

An object is a small JSON file, which names the file of its bytes beside it. The bytes are written
first; the JSON file then takes its place in one atomic rename. So an object is there whole or not
at all, whenever the process dies.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import uuid
from collections.abc import AsyncIterator, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from typing_extensions import override

from fennflow.connectors import (
    Capabilities,
    Connector,
    CopySource,
    Deletion,
    DeletionReport,
    Location,
    ObjectAttributes,
    StoredObject,
    UploadCallback,
)
from fennflow.exceptions import (
    AccessDeniedException,
    BaseConnectorException,
    ConnectorCapabilityException,
    ConnectorUnavailableException,
    KeyException,
    NoSuchKeyException,
    PreconditionFailedException,
)
from fennflow_localfs.config import LocalFsConnectorConfig

READ_ATTEMPTS = 10
MAX_NAME_BYTES = 200  # of 255, since a name gets a suffix


class LocalFsConnector(Connector):
    """Objects in a directory; several processes may share it.

    Args:
        config: which directory.
    """

    def __init__(self, config: LocalFsConnectorConfig) -> None:
        super().__init__(config.capabilities)
        self._root = config.root

    @override
    async def open(self) -> None:
        """Do nothing: there is no connection."""

    @override
    async def aclose(self) -> None:
        """Do nothing."""

    @override
    async def probe(self, namespace: str) -> Capabilities:
        # All that changes an object holds the namespace's lock, so every condition is enforced.
        return Capabilities(
            conditional_create=True, conditional_delete="batch", conditional_copy=True
        )

    @override
    def validate(self, namespace: str, key: str, attributes: ObjectAttributes) -> None:
        self._path(namespace, key)
        if attributes.extra:
            message = f"A directory knows no options, and got {', '.join(attributes.extra)}."
            raise ConnectorCapabilityException(message)

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
        def put() -> StoredObject:
            with _translated("put", namespace, key):
                incoming = self._incoming(namespace)
                _write(incoming, body)
                stored = _describe(key, body, attributes)
                with self._locked(namespace):
                    if if_none_match:
                        self._check(namespace, key, None)
                    self._replace(namespace, key, incoming, stored)
                return stored

        return await asyncio.to_thread(put)

    @override
    async def get(
        self, namespace: str, location: Location, *, if_match: str | None = None
    ) -> tuple[StoredObject, bytes]:
        def get() -> tuple[StoredObject, bytes]:
            with _translated("get", namespace, location.key):
                return self._snapshot(namespace, location.key, if_match)

        return await asyncio.to_thread(get)

    @override
    async def head(self, namespace: str, location: Location) -> StoredObject | None:
        def head() -> StoredObject | None:
            with _translated("head", namespace, location.key):
                found = self._read(namespace, location.key)
                return None if found is None else found[0]

        return await asyncio.to_thread(head)

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
        def copy() -> StoredObject:
            with _translated("copy", source.namespace, source.location.key):
                found, body = self._snapshot(source.namespace, source.location.key, source.if_match)
                kept = ObjectAttributes(media_type=found.media_type, metadata=found.metadata)
                stored = _describe(key, body, attributes or kept)
                incoming = self._incoming(namespace)
                _write(incoming, body)
                with self._locked(namespace):
                    if if_none_match or if_match is not None:
                        self._check(namespace, key, if_match)
                    self._replace(namespace, key, incoming, stored)
                return stored

        return await asyncio.to_thread(copy)

    @override
    async def delete(self, namespace: str, deletions: Sequence[Deletion]) -> DeletionReport:
        def delete() -> DeletionReport:
            errors: list[BaseConnectorException | None] = []
            with _translated("delete from", namespace, ""), self._locked(namespace):
                for deletion in deletions:
                    try:
                        self._delete(namespace, deletion)
                    except PreconditionFailedException as error:
                        errors.append(error)
                    else:
                        errors.append(None)
            return DeletionReport(errors=errors)

        return await asyncio.to_thread(delete)

    @override
    async def list(
        self, namespace: str, prefix: str = "", *, start_after: str = ""
    ) -> AsyncIterator[StoredObject]:
        for key in await asyncio.to_thread(self._keys, namespace):
            if key.startswith(prefix) and key > start_after:
                stored = await self.head(namespace, Location(key))
                if stored is not None:
                    yield stored

    @override
    async def versions(self, namespace: str, key: str) -> Sequence[StoredObject]:
        return []  # never called: the capabilities name no versions

    @override
    async def abort_upload(self, namespace: str, key: str, upload_id: str) -> None:
        """Do nothing: every body arrives whole."""

    def _directory(self, namespace: str) -> Path:
        return self._root / _name(namespace)

    def _path(self, namespace: str, key: str) -> Path:
        """Return the JSON file of a key: directories end in `%`, which no quoted name does."""
        *parents, name = map(_name, key.split("/"))
        directories = [f"{parent}%" for parent in parents]
        return self._directory(namespace).joinpath("objects", *directories, f"{name}.json")

    def _incoming(self, namespace: str) -> Path:
        directory = self._directory(namespace) / "incoming"
        directory.mkdir(parents=True, exist_ok=True)
        return directory / uuid.uuid4().hex

    @contextmanager
    def _locked(self, namespace: str) -> Generator[None]:
        """Keep other threads and processes from changing objects of the namespace."""
        directory = self._directory(namespace)
        directory.mkdir(exist_ok=True)
        with (directory / "lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _read(self, namespace: str, key: str) -> tuple[StoredObject, Path] | None:
        path = self._path(namespace, key)
        try:
            row = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        stored = StoredObject(
            location=Location(key),
            etag=row["etag"],
            size=row["size"],
            media_type=row["media_type"],
            metadata=row["metadata"],
            modified_at=datetime.fromisoformat(row["modified_at"]),
        )
        return stored, path.with_name(row["file"])

    def _snapshot(
        self, namespace: str, key: str, if_match: str | None
    ) -> tuple[StoredObject, bytes]:
        for _ in range(READ_ATTEMPTS):
            found = self._read(namespace, key)
            if found is None:
                break
            stored, file = found
            if if_match not in {None, stored.etag}:
                message = f"{namespace}/{key} has another ETag than {if_match}."
                raise PreconditionFailedException(message)
            # The object may be replaced between its two files: then there is a new one to read.
            with suppress(FileNotFoundError):
                return stored, file.read_bytes()
        message = f"Nothing lies under {namespace}/{key}."
        raise NoSuchKeyException(message)

    def _check(self, namespace: str, key: str, etag: str | None) -> None:
        """Check that an object has an ETag, or that there is none."""
        found = self._read(namespace, key)
        there = None if found is None else found[0].etag
        if there != etag:
            message = f"{namespace}/{key} has the ETag {there}, and {etag} was wanted."
            raise PreconditionFailedException(message)

    def _replace(self, namespace: str, key: str, incoming: Path, stored: StoredObject) -> None:
        """Put bytes that have arrived in place, and what replaces them out of the way."""
        path = self._path(namespace, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        before = self._read(namespace, key)
        file = path.with_name(f"{path.stem}.{incoming.name}")
        incoming.rename(file)
        row = {
            "file": file.name,
            "etag": stored.etag,
            "size": stored.size,
            "media_type": stored.media_type,
            "metadata": dict(stored.metadata),
            "modified_at": datetime.now(UTC).isoformat(),
        }
        _write(incoming, json.dumps(row).encode())
        incoming.replace(path)  # from here on the object is the new one
        _sync_directory(path.parent)
        if before is not None:
            before[1].unlink(missing_ok=True)

    def _delete(self, namespace: str, deletion: Deletion) -> None:
        key = deletion.location.key
        found = self._read(namespace, key)
        if found is None:
            return
        if deletion.if_match is not None:
            self._check(namespace, key, deletion.if_match)
        path = self._path(namespace, key)
        path.unlink()
        found[1].unlink(missing_ok=True)
        objects = self._directory(namespace) / "objects"
        for parent in path.parents:
            if parent == objects or any(parent.iterdir()):
                _sync_directory(parent)
                break
            parent.rmdir()

    def _keys(self, namespace: str) -> Sequence[str]:
        """Return all keys; Python's order of strings is that of their UTF-8 bytes."""
        objects = self._directory(namespace) / "objects"
        with _translated("list", namespace, ""), self._locked(namespace):
            names = [path.relative_to(objects).parts for path in objects.rglob("*.json")]
        return sorted(
            "/".join(
                unquote(part) for part in (*(each[:-1] for each in parents), name[: -len(".json")])
            )
            for *parents, name in names
        )


def _name(segment: str) -> str:
    """Return a segment of a key as a file name that leads nowhere else."""
    quoted = quote(segment, safe=" ").replace("~", "%7E")
    if segment in {".", ".."}:
        quoted = quoted.replace(".", "%2E")
    if not segment or len(quoted) > MAX_NAME_BYTES:
        message = f"The segment {segment[:80]!r} cannot be a file name: empty, or too long."
        raise KeyException(message)
    return quoted


def _describe(key: str, body: bytes, attributes: ObjectAttributes) -> StoredObject:
    return StoredObject(
        location=Location(key),
        etag=hashlib.sha256(body).hexdigest(),
        size=len(body),
        media_type=attributes.media_type,
        metadata=dict(attributes.metadata),
    )


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    """Make names durable: a rename is not before its directory is synced."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _translated(verb: str, namespace: str, key: str) -> Generator[None]:
    """Turn errors of the system into FennFlow's."""
    try:
        yield
    except PermissionError as error:
        message = f"Could not {verb} {namespace}/{key}: {error}"
        raise AccessDeniedException(message) from error
    except OSError as error:
        # It may have happened after the rename: this exception leaves the effect open.
        message = f"Could not {verb} {namespace}/{key}: {error}"
        raise ConnectorUnavailableException(message) from error
