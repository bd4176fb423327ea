"""Repositories that write, copy and delete files."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Mapping
from dataclasses import InitVar, dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import accumulate
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, cast, get_args, overload

from pydantic import BaseModel

from fennflow.connectors import UploadMethod, UploadTerms
from fennflow.connectors.values import check_max_size, check_terms
from fennflow.engine import copying, direct_uploads, writing
from fennflow.engine.streaming import Source, sha256_of
from fennflow.engine.writing import Upload
from fennflow.exceptions import (
    ConnectorCapabilityException,
    FileException,
    UploadTicketException,
)
from fennflow.files import BaseContent, FileContent, StreamContent
from fennflow.files.media_types import extension
from fennflow.files.stream import Readable
from fennflow.paths import AnyPath, StoragePath
from fennflow.plugins import registry
from fennflow.repositories.base import Repository
from fennflow.repositories.reading import EXPIRES_IN, info_of
from fennflow.responses import (
    DeleteResponse,
    ObjectInfo,
    PutResponse,
    UploadPart,
    UploadTicket,
)

if TYPE_CHECKING:
    from collections.abc import Sequence


File = BaseContent | StreamContent | PurePath | Readable
"""The types that can be put: a file, the path of a local file, or an open file."""
OnProgress = Callable[[int, int | None], object]


def _options(extra: object) -> dict[str, Any]:
    """Return a copy of `connector_extra`: later changes by the user must not affect the write."""
    if extra is None:
        return {}
    if not isinstance(extra, Mapping):
        message = f"connector_extra is a {type(extra).__name__}, not a mapping of names and values."
        raise ConnectorCapabilityException(message)
    return dict(cast("Mapping[str, Any]", extra))


async def _file_of(file: object) -> BaseContent | StreamContent:
    """Return the argument of a `put` as a file.

    Raises:
        FileException: it cannot be put; the message names a class that can hold it.
    """
    if isinstance(file, (BaseContent, StreamContent)):
        return file
    kind = type(file).__name__
    if isinstance(file, PurePath):
        return await asyncio.to_thread(FileContent.from_local_path, file)
    if isinstance(file, Readable):
        return StreamContent.from_iterable(file)
    if isinstance(file, str):
        hint = "TextContent.from_content(text), or Path(name) for a local file"
    elif isinstance(file, (bytes, bytearray, memoryview)):
        hint = "BinaryContent(data=...)"
    elif isinstance(file, BaseModel):
        hint = f"ModelContent[{type(file).__name__}].from_content(model)"
    elif isinstance(file, dict):
        hint = "JsonContent.from_content(value)"
    elif isinstance(file, (AsyncIterable, Iterable)):
        hint = (
            "put(*files) for several files, JsonContent.from_content(value) for JSON, or "
            "StreamContent.from_iterable(chunks, filename=...) for bytes in chunks"
        )
    else:
        awaited = isinstance(file, Awaitable)
        hint = (
            "await to get what it returns" if awaited else "an object of a class in fennflow.files"
        )
    message = f"put() and create() take files, and this is a {kind}. Use {hint}."
    raise FileException(message)


class _WritingRepository(Repository):
    async def _write(
        self,
        files: Sequence[File],
        extra: Mapping[str, Any] | None,
        on_progress: OnProgress | None,
        *,
        create: bool,
    ) -> PutResponse:
        contents = [await _file_of(file) for file in files]
        progress = None if on_progress is None else _Progress(contents, on_progress)
        options = _options(extra)
        uploads = [await self._upload(file, options, progress) for file in contents]
        async with self._call("create" if create else "put") as tx:
            records = await writing.write(tx, self._namespace, uploads, create=create)
        return PutResponse([self._path(record.key) for record in records])

    async def _upload(
        self,
        file: BaseContent | StreamContent,
        extra: Mapping[str, Any],
        progress: _Progress | None,
    ) -> Upload:
        on_bytes = None if progress is None else progress.add
        if isinstance(file, StreamContent):
            source = Source(
                name=file.filename,
                chunks=file.chunks,
                size=file.size,
                repeatable=file.repeatable,
                on_bytes=on_bytes,
            )
            return Upload(
                key=self._key(file.filename),
                body=source,
                sha256=None,
                media_type=file.media_type,
                content_type=None,
                metadata=dict(file.metadata),
                extra=dict(extra),
            )
        sha256 = await sha256_of(file.data)
        name = file.filename
        if name is None:
            name = sha256 + extension(file.media_type)
        return Upload(
            key=self._key(name),
            body=file.data,
            sha256=sha256,
            media_type=file.media_type,
            content_type=registry().content_tag(type(file)),
            metadata=dict(file.metadata),
            extra=dict(extra),
            on_bytes=on_bytes,
        )


@dataclass(slots=True)
class _Progress:
    """Adds up the progress of all files of a call."""

    files: InitVar[Sequence[BaseContent | StreamContent]]
    on_progress: OnProgress
    done: int = 0
    total: int | None = field(init=False)

    def __post_init__(self, files: Sequence[BaseContent | StreamContent]) -> None:
        sizes = [f.size if isinstance(f, StreamContent) else len(f.data) for f in files]
        self.total = sum(size or 0 for size in sizes) if None not in sizes else None

    def add(self, more: int) -> object:
        self.done += more
        return self.on_progress(self.done, self.total)


class PutRepository(_WritingRepository):
    """Write files."""

    async def put(
        self,
        *files: File,
        connector_extra: Mapping[str, Any] | None = None,
        on_progress: OnProgress | None = None,
    ) -> PutResponse:
        """Write files, replacing existing ones: all files of the call, or none.

        Args:
            files: each is a content object, the `pathlib.Path` of a local file, or a file that is
                open for reading bytes.
            connector_extra: options of the store for all of them, on S3 for instance
                `{"CacheControl": "max-age=3600", "StorageClass": "STANDARD_IA"}`.
            on_progress: plain or async, called with the bytes sent so far, for all files of the
                call together, and the total, or None if a stream's size is unknown. If it raises,
                the call fails.

        Returns:
            their paths, in the order of the files.

        Raises:
            PathException: a name breaks the key rules, or two files have one path.
            MetadataException: metadata that the store cannot hold.
            RecordLockedException: another transaction is writing one of the paths.
            ConnectorCapabilityException: an option that the store does not know.
            ObjectChangedException: another writer replaced the object during a one-shot upload.
            BaseConnectorException: the store refused or cannot be reached.
            Exception: what a stream raises.
        """
        return await self._write(files, connector_extra, on_progress, create=False)


class CreateRepository(_WritingRepository):
    """Write files only under free paths."""

    async def create(
        self,
        *files: File,
        connector_extra: Mapping[str, Any] | None = None,
        on_progress: OnProgress | None = None,
    ) -> PutResponse:
        """Write files under free paths: all files of the call, or none.

        Raises:
            RecordAlreadyExistsException: a path is taken, in the catalog or by an object that
                the catalog does not know.
            Exception: like `put`.
        """
        return await self._write(files, connector_extra, on_progress, create=True)


class AdoptRepository(Repository):
    """Add files that others have uploaded to the catalog, for instance by a presigned URL."""

    @overload
    async def adopt(self, path: AnyPath, /) -> ObjectInfo: ...
    @overload
    async def adopt(self, *paths: AnyPath) -> tuple[ObjectInfo, ...]: ...
    async def adopt(self, *paths: AnyPath) -> ObjectInfo | tuple[ObjectInfo, ...]:
        """Add objects under free paths to the catalog, in this transaction: all of the call, or none.

        It costs a HEAD request for each. A rollback leaves the objects as they are, without a record.
        The metadata of the objects are not trusted: a file is read as the class of its media type,
        and has no checksum. Check the returned values before you commit: the uploader chose size
        and type, unless the URL fixed them.

        Returns:
            the store's information about the file, or about several.

        Raises:
            NoSuchKeyException: some paths have no object; the message names them all.
            RecordAlreadyExistsException: a path is in the catalog already, or the object belongs to
                another application's catalog.
            RecordLockedException: another transaction is writing one of the paths.
            ObjectChangedException: an object was written by a transaction that did not commit.
        """
        keys = [self._key(path) for path in paths]
        async with self._call("adopt") as tx:
            records = await direct_uploads.adopt(tx, self._namespace, keys)
        infos = tuple(info_of(record, self._path(record.key)) for record in records)
        return infos[0] if len(paths) == 1 else infos


class UploadTicketRepository(Repository):
    """Let clients upload files directly to the store, and accept them in a later unit of work."""

    async def upload_ticket(
        self,
        path: AnyPath,
        *,
        max_size: int,
        size: int | None = None,
        media_type: str | None = None,
        checksum: str | None = None,
        expires_in: float = EXPIRES_IN,
        method: UploadMethod = "PUT",
    ) -> UploadTicket:
        """Allow one upload; `accept` turns it into a file under a free path.

        The bytes go to a key under the reserved prefix, and no reader sees them before they are
        accepted. The store enforces what it can; `accept` checks everything. An upload that is not
        accepted is deleted some time after `expires_in`. The ticket is not part of the transaction:
        a rollback does not revoke it.

        Args:
            path: of the file.
            max_size: the largest size in bytes. The store enforces it only for a form (`POST`).
            size: the exact size in bytes, if the client knows it: the store refuses any other.
            media_type: the only media type that is allowed; None for any.
            checksum: the SHA-256, hexadecimal, that the bytes must have; None for any. If it is
                given, `accept` reads the file once.
            expires_in: seconds within which the client may begin to upload; on S3 up to 7 days.
            method: `PUT`, for files of up to 5 GB; `POST`, a form; `MULTIPART`, in parts, for large
                files of a known `size`.

        Raises:
            RecordAlreadyExistsException: the path is taken.
            FileException: a limit, the media type or the checksum is not valid.
            ConnectorCapabilityException: the store has no such uploads, or not for that long.
        """
        key = self._key(path)
        terms = UploadTerms(media_type=media_type, size=size, max_size=max_size, sha256=checksum)
        check_terms(terms)
        check_max_size(max_size, size)
        if method not in get_args(UploadMethod):
            message = f"Uploads are sent by PUT, POST or MULTIPART, not by {method!a}."
            raise ConnectorCapabilityException(message)
        async with self._call("upload_ticket") as tx:
            token, requests, ticket = await direct_uploads.issue(
                tx, self._namespace, key, terms, method=method, expires_in=expires_in
            )
        expires_at = datetime.now(UTC) + timedelta(seconds=expires_in)
        if method == "MULTIPART":
            sizes = ticket.part_sizes
            starts = [0, *accumulate(sizes)]
            parts = tuple(
                UploadPart(url=request.url, start=start, end=start + part)
                for request, start, part in zip(requests, starts, sizes, strict=False)
            )
            return UploadTicket(token=token, parts=parts, expires_at=expires_at)
        return UploadTicket(
            token=token,
            method=method,
            url=requests[0].url,
            headers=dict(requests[0].headers),
            fields=dict(requests[0].fields),
            expires_at=expires_at,
        )

    async def accept(self, ticket: UploadTicket | str) -> ObjectInfo:
        """Turn the upload of a ticket into a file, in this transaction.

        The store copies exactly the bytes that were checked to a key that no URL names. A rollback
        leaves the upload, and the ticket can be accepted again until it expires.

        Args:
            ticket: from `upload_ticket` in any process that uses the catalog, or its `token`.

        Returns:
            the catalog's information about the file.

        Raises:
            UploadTicketException: the ticket is forged, has expired, is for a path outside of this
                repository's scope, or allows another size or media type.
            NoSuchKeyException: nothing was uploaded, or it was accepted before.
            ChecksumMismatchException: the bytes are not those that the ticket allows.
            RecordAlreadyExistsException: the path is taken.
            RecordLockedException: another transaction is writing the path.
            ObjectChangedException: the upload was replaced while it was accepted.
        """
        token = ticket.token if isinstance(ticket, UploadTicket) else ticket
        async with self._call("accept") as tx:
            found = await direct_uploads.read_ticket(tx, token)
            if found.namespace != self._namespace or not found.key.startswith(self._prefix("")):
                message = (
                    f"The ticket is for {found.namespace}/{found.key}, which is not in the scope of "
                    "this repository. Nothing was accepted."
                )
                raise UploadTicketException(message)
            record = await direct_uploads.accept(tx, found)
        return info_of(record, self._path(record.key))


class CopyRepository(Repository):
    """Copy and move files inside the store; the bytes do not pass through the program."""

    async def copy(
        self,
        source: AnyPath,
        target: AnyPath,
        *,
        to: Repository | None = None,
        connector_extra: Mapping[str, Any] | None = None,
    ) -> StoragePath:
        """Copy a file, replacing the target.

        Content type, media type, metadata and, on S3, headers and tags are copied, too. Storage
        class and encryption are the bucket's defaults unless `connector_extra` names them.

        Args:
            source: a path in this repository.
            target: relative to the scope of `to`.
            to: a repository of the same unit of work, for instance on another bucket; this one
                by default.
            connector_extra: options of the store for the target, like those of `put`.

        Returns:
            the full path of the target.

        Raises:
            NoSuchKeyException: the source does not exist.
            FilepathsCollisionError: source and target are one path.
            RecordLockedException: another transaction is writing the target.
            ObjectChangedException: the source was changed outside FennFlow.
        """
        return await self._copy(source, target, to, connector_extra, move=False)

    async def move(
        self,
        source: AnyPath,
        target: AnyPath,
        *,
        to: Repository | None = None,
        connector_extra: Mapping[str, Any] | None = None,
    ) -> StoragePath:
        """Copy a file and delete the source; readers see both changes at one instant.

        Arguments, result and exceptions are those of `copy`; the source is locked, too.
        """
        return await self._copy(source, target, to, connector_extra, move=True)

    async def _copy(
        self,
        source: AnyPath,
        target: AnyPath,
        to: Repository | None,
        extra: Mapping[str, Any] | None,
        *,
        move: bool,
    ) -> StoragePath:
        options = _options(extra)
        source_key, target_key = self._object_key(source), self._object_key(target, to)
        async with self._call("move" if move else "copy") as tx:
            record = await copying.copy(tx, source_key, target_key, options, move=move)
        return (to or self)._path(record.key)  # noqa: SLF001 - of this class


class DeleteRepository(Repository):
    """Delete files."""

    async def delete(self, *paths: AnyPath, missing_ok: bool = True) -> DeleteResponse:
        """Delete files; the objects are deleted after the commit, a thousand per request.

        Returns:
            the paths that existed.

        Raises:
            NoSuchKeyException: some paths do not exist, and `missing_ok` is False; the message
                names them all.
            RecordLockedException: another transaction is writing one of the paths.
        """
        keys = [self._key(path) for path in paths]
        async with self._call("delete") as tx:
            gone = await writing.delete(tx, self._namespace, keys, missing_ok=missing_ok)
        return DeleteResponse([self._path(key) for key in gone])


class DeletePrefixRepository(Repository):
    """Delete all files with a prefix."""

    async def delete_prefix(self, prefix: str = "") -> DeleteResponse:
        """Delete all files with a prefix, however many: all of them, or none.

        Args:
            prefix: relative to the scope; it need not end at a `/`: `a` deletes `ab` too.

        Returns:
            the paths that were deleted.

        Raises:
            KeyException: no key can begin with the prefix.
            RecordLockedException: another transaction is writing one of the paths.
        """
        gone: list[StoragePath] = []
        async with self._call("delete") as tx:
            with tx.whole():
                async for keys in self._pages(tx, prefix):
                    deleted = await writing.delete(tx, self._namespace, keys, missing_ok=True)
                    gone += map(self._path, deleted)
        return DeleteResponse(gone)
