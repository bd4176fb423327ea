"""Objects in a directory.

An object is a small JSON file, which names the file of its bytes next to it. The bytes are written
first; the JSON file then takes its place in one atomic rename. So an object is there whole or not
at all, whenever the process dies.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import logging
import os
import stat
import uuid
from collections.abc import AsyncIterator, Generator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote, unquote

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

logger = logging.getLogger("fennflow")

READ_ATTEMPTS = 10
MAX_NAME_BYTES = 200  # of 255, since a name gets a suffix
SIZES = range(1 << 63)  # what a database holds
# What reading the JSON of others may raise: RecursionError is that of one which nests deeply.
NOT_OURS = (ArithmeticError, AttributeError, KeyError, RecursionError, TypeError, ValueError)


class LocalFsConnector(Connector):
    """Objects in a directory; several processes may share it.

    Args:
        config: which directory.
    """

    def __init__(self, config: LocalFsConnectorConfig) -> None:
        super().__init__(config.capabilities)
        self._config = config
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
        try:
            self._check_no_link(self._path(namespace, key))
        except AccessDeniedException as error:
            raise KeyException(str(error)) from error
        if attributes.extra:
            message = f"A directory knows no options, and got {', '.join(attributes.extra)}."
            raise ConnectorCapabilityException(message)

    @override
    async def put(self, request: PutRequest, body: bytes) -> StoredObject:
        namespace, key = request.namespace, request.key

        def put() -> StoredObject:
            with _translated("put", namespace, key):
                incoming = self._incoming(namespace)
                self._write(incoming, body)
                stored = _describe(key, body, request.attributes)
                with self._locked(namespace):
                    if request.if_none_match:
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
    async def copy(self, request: CopyRequest) -> StoredObject:
        namespace, key, source = request.namespace, request.key, request.source

        def copy() -> StoredObject:
            with _translated("copy", source.namespace, source.location.key):
                found, body = self._snapshot(source.namespace, source.location.key, source.if_match)
                kept = ObjectAttributes(media_type=found.media_type, metadata=found.metadata)
                stored = _describe(key, body, request.attributes or kept)
                incoming = self._incoming(namespace)
                self._write(incoming, body)
                with self._locked(namespace):
                    if request.if_none_match or request.if_match is not None:
                        self._check(namespace, key, request.if_match)
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
                    except (PreconditionFailedException, AccessDeniedException) as error:
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
                try:
                    stored = await self.head(namespace, Location(key))
                except AccessDeniedException as error:
                    # One file that others have put there does not end the listing of all.
                    logger.warning("%s is left out of a listing", error)
                    continue
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
        self._make(directory)
        return directory / uuid.uuid4().hex

    def _check_no_link(self, path: Path) -> None:
        """Refuse a path that leads through a symbolic link, or is neither file nor directory."""
        for each in (*reversed(path.relative_to(self._root).parents), path.relative_to(self._root)):
            try:
                mode = (self._root / each).lstat().st_mode
            except (FileNotFoundError, NotADirectoryError):
                return
            if each != Path() and not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                message = f"{self._root / each} is a symbolic link or not a file; it is not used."
                raise AccessDeniedException(message)

    def _make(self, directory: Path) -> None:
        """Make a directory and those above it, none of which may be a link."""
        self._check_no_link(directory)
        above = directory.relative_to(self._root).parents
        for each in (*(self._root / parent for parent in reversed(above)), directory):
            with suppress(FileExistsError):
                each.mkdir()
                each.chmod(self._config.directory_mode)  # whatever the umask

    def _write(self, path: Path, data: bytes) -> None:
        with path.open("xb") as file:
            os.fchmod(file.fileno(), self._config.file_mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def _locked(self, namespace: str) -> Generator[None]:
        """Keep other threads and processes from changing objects of the namespace."""
        lock = self._directory(namespace) / "lock"
        self._make(lock.parent)
        self._check_no_link(lock)
        with lock.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _read(self, namespace: str, key: str) -> tuple[StoredObject, Path] | None:
        path = self._path(namespace, key)
        self._check_no_link(path)
        try:
            row = json.loads(path.read_bytes())
            stored = StoredObject(
                location=Location(key),
                etag=str(row["etag"]),
                size=int(row["size"]),
                media_type=str(row["media_type"]),
                metadata={str(name): str(value) for name, value in row["metadata"].items()},
                modified_at=datetime.fromisoformat(row["modified_at"]).astimezone(UTC),
            )
            if stored.size not in SIZES or not stored.etag.isalnum():
                raise ValueError(stored.size, stored.etag)
            file = path.with_name(row["file"])  # a name alone: it leads nowhere else
            self._check_no_link(file)
        except FileNotFoundError:
            return None
        except NOT_OURS as error:
            message = f"{path} was not written by this connector, and is not used: {error!r}"
            raise AccessDeniedException(message) from error
        return stored, file

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
        message = f"No such object: {namespace}/{key}"
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
        self._make(path.parent)
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
        self._write(incoming, json.dumps(row).encode())
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
        keys: list[str] = []
        with _translated("list", namespace, ""), self._locked(namespace):
            self._check_no_link(objects)
            for folder, directories, files in os.walk(objects):  # which follows no links
                directories.sort()
                for path in (Path(folder, name) for name in files if name.endswith(".json")):
                    *parents, name = path.relative_to(objects).parts
                    parts = (*(each[:-1] for each in parents), name[: -len(".json")])
                    key = "/".join(map(unquote, parts))
                    try:
                        if self._path(namespace, key) == path:
                            keys.append(key)
                    except (KeyException, ValueError):  # no key has this name
                        logger.warning("%r is left out of a listing", str(path))
        return sorted(keys)


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
