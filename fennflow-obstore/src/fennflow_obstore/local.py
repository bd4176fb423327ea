"""Local files, with what obstore does not do for them: metadata, and bytes that outlast a power cut.

What stands beside the bytes is kept in one extended attribute of the file. An object is written
under a name of its own, gets its attribute, is synced, and takes its place by a rename, so that
it is there whole or not at all.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, cast

import obstore
import uuid_utils
from typing_extensions import override

from fennflow.connectors import ObjectAttributes, PendingUpload, StoredObject
from fennflow.exceptions import (
    ConnectorCapabilityException,
    ConnectorUnavailableException,
    KeyException,
)
from fennflow_obstore.beside import written_object
from fennflow_obstore.connector import ObstoreConnector
from fennflow_obstore.errors import translated

if TYPE_CHECKING:
    from obstore import Attributes, GetOptions, GetResult

ATTRIBUTE = "user.fennflow"
MAX_NAME_BYTES = 240  # of 255, since obstore makes names of its own by adding to them
ATTEMPTS_TO_DESCRIBE = 10

_STAGED = re.compile(r"#\d+")


class LocalConnector(ObstoreConnector):
    """Object I/O on a directory."""

    # Of a file obstore makes a second name, and no second file.
    copies_inside = False

    @override
    async def open(self) -> None:
        if not hasattr(os, "setxattr"):
            message = f"{self.store_id} needs extended attributes, which Python has on Linux."
            raise ConnectorCapabilityException(message)

    @override
    def validate(self, namespace: str, key: str, attributes: ObjectAttributes) -> None:
        super().validate(namespace, key, attributes)
        for segment in key.split("/"):
            if len(segment.encode()) > MAX_NAME_BYTES or _STAGED.search(segment):
                message = (
                    f"The segment {segment[:80]!r} of {key[:80]!r} cannot be the name of a local "
                    f"file: it has more than {MAX_NAME_BYTES} bytes, or '#' and a digit, as names "
                    "have that obstore uses while it writes."
                )
                raise KeyException(message)

    @override
    async def _put(
        self,
        namespace: str,
        key: str,
        body: bytes,
        attributes: Attributes,
        *,
        if_none_match: bool,
    ) -> StoredObject:
        return await self._place(namespace, key, body, attributes, if_none_match=if_none_match)

    @override
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
        return await self._place(namespace, key, chunks, attributes, if_none_match=if_none_match)

    async def _place(
        self,
        namespace: str,
        key: str,
        body: bytes | AsyncIterator[bytes],
        attributes: Attributes,
        *,
        if_none_match: bool,
    ) -> StoredObject:
        """Write a local file beside its place, describe it, and move it there."""
        store, root = self._stores.of(namespace, "writing"), self._stores.root(namespace)
        incoming = f"{self._incoming}/{uuid_utils.uuid7()}"
        with translated("put", f"{namespace}/{key}", writes=True):
            answer = await obstore.put_async(store, incoming, body)
            try:
                size = await asyncio.to_thread(describe, root / incoming, attributes)
                await obstore.rename_async(store, incoming, key, overwrite=not if_none_match)
            except BaseException:
                (root / incoming).unlink(missing_ok=True)
                raise
            await asyncio.to_thread(sync_directories, (root / key).parent, root)
        return written_object(key, answer["e_tag"], size, attributes, retried=False)

    @override
    async def _described(
        self, namespace: str, key: str, options: GetOptions
    ) -> tuple[GetResult, Attributes]:
        store, path = self._stores.of(namespace, "reading"), self._stores.root(namespace) / key
        for _ in range(ATTEMPTS_TO_DESCRIBE):
            result = await obstore.get_async(store, key, options=options)
            attributes = await asyncio.to_thread(described, path)
            # It may have been replaced in between: then there is a new one to read.
            after = await obstore.head_async(store, key)
            if after["e_tag"] == result.meta["e_tag"]:
                return result, attributes
        message = f"{namespace}/{key} changes faster than it can be read. Try again later."
        raise ConnectorUnavailableException(message)

    @override
    async def delete_one(self, namespace: str, key: str) -> bool:
        retried = await super().delete_one(namespace, key)
        root = self._stores.root(namespace)
        await asyncio.to_thread(sync_directories, (root / key).parent, root)
        return retried

    @override
    async def list(
        self, namespace: str, prefix: str = "", *, start_after: str = ""
    ) -> AsyncIterator[StoredObject]:
        async for stored in super().list(namespace, prefix, start_after=start_after):
            if not stored.location.key.startswith(f"{self._incoming}/"):
                yield stored

    @override
    async def uploads(self, namespace: str, prefix: str) -> AsyncIterator[PendingUpload]:
        # What a process that died was writing; obstore does not list what it writes.
        directory = self._stores.root(namespace) / self._incoming
        if not self._incoming.startswith(prefix):
            return
        for name, written_at in await asyncio.to_thread(_contents, directory):
            yield PendingUpload(
                key=f"{self._incoming}/{name}", upload_id=name, modified_at=written_at
            )

    @override
    async def abort_upload(self, namespace: str, key: str, upload_id: str) -> None:
        directory = self._stores.root(namespace) / self._incoming
        if key == f"{self._incoming}/{upload_id}" and "/" not in upload_id:
            await asyncio.to_thread((directory / upload_id).unlink, missing_ok=True)

    @property
    def _incoming(self) -> str:
        return f"{self._reserved_prefix}/incoming"


def describe(path: Path, attributes: Mapping[str, str]) -> int:
    """Write what stands beside the bytes, make both durable, and return the size of the file.

    Raises:
        ConnectorCapabilityException: the file system has no extended attributes.
    """
    with path.open("rb") as file:
        try:
            os.setxattr(file.fileno(), ATTRIBUTE, json.dumps(dict(attributes)).encode())
        except OSError as error:
            if error.errno not in {errno.ENOTSUP, errno.ENOSPC, errno.E2BIG}:
                raise
            message = (
                f"{path} cannot have the extended attribute {ATTRIBUTE}, which holds media type and "
                "metadata. Use a file system that has them, as ext4, XFS and Btrfs do."
            )
            raise ConnectorCapabilityException(message) from error
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def described(path: Path) -> dict[str, str]:
    """Return what stands beside the bytes; nothing for a file that others wrote."""
    try:
        found: object = json.loads(os.getxattr(path, ATTRIBUTE))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    pairs = cast("dict[object, object]", found)
    return {str(name): str(value) for name, value in pairs.items()}


def sync_directories(directory: Path, root: Path) -> None:
    """Make the names in a directory durable, and that of the directory, up to the root."""
    for each in (directory, *directory.parents):
        try:
            descriptor = os.open(each, os.O_RDONLY)
        except FileNotFoundError:
            continue  # it became empty, and was removed
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if each == root:
            return


def _contents(directory: Path) -> list[tuple[str, datetime]]:
    """Return names of files, and when they were last written."""
    found: list[tuple[str, datetime]] = []
    with suppress(FileNotFoundError):
        for path in directory.iterdir():
            with suppress(FileNotFoundError):
                found.append((path.name, datetime.fromtimestamp(path.stat().st_mtime, UTC)))
    return found
