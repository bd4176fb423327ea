"""Local files, with metadata and durable writes, which obstore does not support for them.

Metadata and headers are kept in one extended attribute of the file. An object is written under a
temporary name, gets its attribute and its mode, is synced, and is renamed to its path, so that it
appears whole or not at all. Symbolic links are not followed (see `beneath`).
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import stat
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, cast

import obstore
import uuid_utils
from typing_extensions import override

from fennflow.connectors import (
    Capabilities,
    Location,
    ObjectAttributes,
    PendingUpload,
    StoredObject,
)
from fennflow.exceptions import (
    AccessDeniedException,
    BaseConnectorException,
    ConnectorCapabilityException,
    ConnectorUnavailableException,
    IncompleteListingException,
    KeyException,
    PreconditionFailedException,
)
from fennflow.printable import printable
from fennflow_obstore import beneath
from fennflow_obstore.attributes import stored_object, written_object
from fennflow_obstore.connector import ObstoreConnector
from fennflow_obstore.errors import translated

if TYPE_CHECKING:
    from obstore import Attributes, GetOptions, GetResult, ObjectMeta
    from obstore.store import ObjectStore

ATTRIBUTE = "user.fennflow"
MAX_NAME_BYTES = 240  # not 255, since obstore appends to names
ATTEMPTS_TO_DESCRIBE = 10
SHOWN_LEFT_OUT = 5
NO_TIME = "has a modification time that is out of range"

_STAGED = re.compile(r"#\d+")

_INCOMING = "incoming"
"""The directory below the reserved prefix where files are written before they are renamed."""


class LocalConnector(ObstoreConnector):
    """Object I/O on a directory."""

    # obstore copies a file by a hard link, not as a second file.
    copies_inside = False
    uploads_conditionally = True
    incoming = frozenset({_INCOMING})

    @override
    async def open(self) -> None:
        if not hasattr(os, "setxattr"):
            message = f"{self.store_id} needs extended attributes, which Python has on Linux."
            raise ConnectorCapabilityException(message)

    @override
    async def capabilities(self, namespace: str, *, refresh: bool = False) -> Capabilities:
        # This does not depend on the user's config.
        return replace(await super().capabilities(namespace, refresh=refresh), hierarchical=True)

    @override
    def validate(self, namespace: str, key: str, attributes: ObjectAttributes) -> None:
        super().validate(namespace, key, attributes)
        for segment in key.split("/"):
            if len(segment.encode()) > MAX_NAME_BYTES or _STAGED.search(segment):
                message = (
                    f"The segment {segment[:80]!r} of {key[:80]!r} cannot be the name of a local "
                    f"file: it has more than {MAX_NAME_BYTES} bytes, or '#' and a digit, like the "
                    "names that obstore uses while it writes."
                )
                raise KeyException(message)
        blocked = beneath.obstacle(self._stores.root(namespace), key)
        if blocked:
            message = f"{namespace}/{key} cannot be a key: {blocked}. Nothing was written."
            raise KeyException(message)

    async def _check(self, namespace: str, key: str) -> None:
        """Refuse to follow a link.

        Raises:
            AccessDeniedException: there is a link on the path to the file.
        """
        with translated("examine", f"{namespace}/{key}"):
            blocked = await asyncio.to_thread(beneath.obstacle, self._stores.root(namespace), key)
        if blocked:
            message = f"{namespace}/{key} is not accessed: {blocked}. Remove it from the directory."
            raise AccessDeniedException(message)

    async def _check_time(self, namespace: str, key: str) -> None:
        """Refuse to read a file with a time at which obstore would fail.

        Raises:
            BaseConnectorException: the time is out of range.
        """
        path = self._stores.root(namespace) / key
        with suppress(OSError):  # reading the file will raise the error
            if await asyncio.to_thread(beneath.written_at, path) is None:
                message = f"{namespace}/{key} cannot be read: it {NO_TIME}. Set another (touch)."
                raise BaseConnectorException(message)

    @override
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
        del attempts  # there is only one attempt
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
        """Write a temporary file next to the target, set its attributes, and move it there."""
        store, root = self._stores.of(namespace, "writing"), self._stores.root(namespace)
        incoming = f"{self._incoming}/{uuid_utils.uuid7()}"

        def prepare() -> None:
            with beneath.opened(root, self._incoming.split("/"), mode=self._config.directory_mode):
                pass  # they are created, and none of them is a link

        def finish() -> int:
            size = describe(root / incoming, attributes, mode=self._config.file_mode)
            beneath.place(
                root,
                incoming,
                key,
                replace=not if_none_match,
                mode=self._config.directory_mode,
            )
            return size

        await self._check(namespace, key)
        with translated("put", f"{namespace}/{key}", writes=True):
            try:
                await asyncio.to_thread(prepare)
            except NotADirectoryError as error:
                message = (
                    f"{namespace}/{key} was not written: {root / self._incoming} cannot be made, as a "
                    "file or a link has its name. FennFlow keeps its own files there: move that "
                    "one, or choose another reserved_prefix."
                )
                raise BaseConnectorException(message) from error
            answer = await obstore.put_async(store, incoming, body)
            try:
                size = await asyncio.to_thread(finish)
            except BaseException as error:
                (root / incoming).unlink(missing_ok=True)
                if isinstance(error, FileExistsError):
                    message = f"{namespace}/{key} exists, and was not replaced."
                    raise PreconditionFailedException(message) from error
                if isinstance(error, (NotADirectoryError, IsADirectoryError)):
                    message = (
                        f"{namespace}/{key} was not written: the path or a part of it is a directory "
                        "where a file is needed, or the other way round. Delete one of them, or "
                        "choose another key."
                    )
                    raise BaseConnectorException(message) from error
                raise
        return written_object(key, answer["e_tag"], size, attributes, retried=False)

    @override
    async def _described(
        self, namespace: str, key: str, options: GetOptions
    ) -> tuple[GetResult, Attributes]:
        store, path = self._stores.of(namespace, "reading"), self._stores.root(namespace) / key
        await self._check(namespace, key)
        await self._check_time(namespace, key)
        for _ in range(ATTEMPTS_TO_DESCRIBE):
            result = await obstore.get_async(store, key, options=options)
            attributes = await asyncio.to_thread(described, path)
            # It may have been replaced in between; then read the new one.
            after = await obstore.head_async(store, key)
            if after["e_tag"] == result.meta["e_tag"]:
                return result, attributes
        message = f"{namespace}/{key} changes faster than it can be read. Try again later."
        raise ConnectorUnavailableException(message)

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
        await self._check(namespace, location.key)
        await self._check_time(namespace, location.key)
        inner = super().stream(namespace, location, if_match=if_match, start=start, end=end)
        async with aclosing(inner) as chunks:
            async for chunk in chunks:
                yield chunk

    @override
    async def delete_one(self, namespace: str, key: str) -> bool:
        await self._check(namespace, key)
        with translated("delete", f"{namespace}/{key}", writes=True):
            await asyncio.to_thread(beneath.remove, self._stores.root(namespace), key)
        return False

    @override
    async def list(
        self, namespace: str, prefix: str = "", *, start_after: str = ""
    ) -> AsyncIterator[StoredObject]:
        store, root = self._stores.of(namespace, "reading"), self._stores.root(namespace)
        left_out: dict[str, str] = {}

        def report(path: str, reason: str) -> None:
            left_out[path] = printable(f"{path} {reason}")

        def listed() -> list[ObjectMeta]:
            directory = prefix.rpartition("/")[0]
            keys: list[tuple[bytes, str]] = []
            for path in beneath.walk(root, directory, self._incoming, report):
                try:
                    encoded = path.encode()
                except UnicodeEncodeError:
                    report(path, "is not UTF-8")
                    continue
                if path.startswith(prefix) and encoded > start_after.encode():
                    keys.append((encoded, path))
            metas = (meta_of(store, root, key, report) for _, key in sorted(keys))
            return [meta for meta in metas if meta is not None]

        # A directory is read in arbitrary order, so all of it is read before the first entry is
        # yielded.
        with translated("list", f"{namespace}/{prefix}"):
            metas = await asyncio.to_thread(listed)
        for meta in metas:
            yield stored_object(meta["path"], meta, {})
        if left_out:
            shown = "; ".join([*left_out.values()][:SHOWN_LEFT_OUT])
            more = len(left_out) - SHOWN_LEFT_OUT
            message = (
                f"{len(left_out)} files of {namespace} cannot have a key and are left out: {shown}"
                f"{f'; and {more} more' if more > 0 else ''}. Rename or remove them."
            )
            raise IncompleteListingException(message, prefixes=tuple(left_out))

    @override
    async def uploads(self, namespace: str, prefix: str) -> AsyncIterator[PendingUpload]:
        # Files of processes that died while writing; obstore does not list them.
        root = self._stores.root(namespace)
        if not self._incoming.startswith(prefix) or beneath.obstacle(root, self._incoming):
            return
        with translated("list", f"{namespace}/{self._incoming}"):
            found = await asyncio.to_thread(_contents, root / self._incoming)
        for name, written_at in found:
            yield PendingUpload(
                key=f"{self._incoming}/{name}", upload_id=name, modified_at=written_at
            )

    @override
    async def abort_upload(self, namespace: str, key: str, upload_id: str) -> None:
        root, directory = self._stores.root(namespace), self._incoming.split("/")

        def unlink() -> None:
            with suppress(FileNotFoundError), beneath.opened(root, directory) as found:
                os.unlink(upload_id, dir_fd=found[-1])

        if key == f"{self._incoming}/{upload_id}" and "/" not in upload_id:
            with translated("delete", f"{namespace}/{key}", writes=True):
                await asyncio.to_thread(unlink)

    @property
    def _incoming(self) -> str:
        return f"{self._reserved_prefix}/{_INCOMING}"


def describe(path: Path, attributes: Mapping[str, str], *, mode: int) -> int:
    """Write the attributes, make file and attributes durable, and return the size of the file.

    Args:
        path: of the file.
        attributes: its metadata and headers.
        mode: the mode of the file.

    Raises:
        ConnectorCapabilityException: the file system has no extended attributes.
    """
    with path.open("rb") as file:
        os.fchmod(file.fileno(), mode)
        try:
            os.setxattr(file.fileno(), ATTRIBUTE, json.dumps(dict(attributes)).encode())
        except OSError as error:
            if error.errno not in {errno.ENOTSUP, errno.ENOSPC, errno.E2BIG}:
                raise
            message = (
                f"{path} cannot have the extended attribute {ATTRIBUTE}, which holds media type and "
                "metadata. Use a file system that supports it, such as ext4, XFS or Btrfs."
            )
            raise ConnectorCapabilityException(message) from error
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def described(path: Path) -> dict[str, str]:
    """Return the attributes of a file; empty for a file that others wrote."""
    try:
        found: object = json.loads(os.getxattr(path, ATTRIBUTE))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    pairs = cast("dict[object, object]", found)
    return {str(name): str(value) for name, value in pairs.items()}


def meta_of(
    store: ObjectStore, root: Path, key: str, report: Callable[[str, str], None]
) -> ObjectMeta | None:
    """Return a file's entry in a listing; None if it is gone or cannot be an object."""
    if _STAGED.search(key):
        report(key, "has a name that obstore uses while it writes")
        return None
    try:
        if beneath.written_at(root / key) is None:
            report(key, NO_TIME)
            return None
        return obstore.head(store, key)
    except FileNotFoundError:
        return None
    except ValueError:
        report(key, "has a character that no key can have")
        return None


def _contents(directory: Path) -> list[tuple[str, datetime | None]]:
    """Return the names of files, and when they were last written; ignore everything else."""
    found: list[tuple[str, datetime | None]] = []
    with suppress(FileNotFoundError, NotADirectoryError):
        for path in directory.iterdir():
            with suppress(FileNotFoundError):
                if stat.S_ISREG(path.lstat().st_mode):
                    found.append((path.name, beneath.written_at(path)))
    return found
