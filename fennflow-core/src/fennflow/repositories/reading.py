"""Repositories that read files, list them, and return the catalog's information about them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

from fennflow.connectors import PresignMethod, UploadTerms
from fennflow.connectors.values import check_terms
from fennflow.engine import reading
from fennflow.engine.details import with_details
from fennflow.engine.presigning import presign_downloads, presign_uploads
from fennflow.exceptions import ConnectorCapabilityException, PathException
from fennflow.files import BaseContent, BinaryContent
from fennflow.paths import AnyPath, StoragePath, check_delimiter, decode_token, encode_token
from fennflow.plugins import registry
from fennflow.printable import brief
from fennflow.repositories.base import PAGE, Repository
from fennflow.responses import ListResponse, MediaResponse, ObjectInfo, PresignedUrlResponse

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fennflow.backends import Record

EXPIRES_IN = 3600.0
"""Seconds."""
MAX_LIMIT = 1_000_000
"""Paths on a page, which is held in memory."""


class GetRepository(Repository):
    """Read files."""

    async def get(self, *paths: AnyPath, missing_ok: bool = False) -> MediaResponse:
        """Read whole files, all as of one moment.

        Args:
            paths: what to read; the files are returned in this order.
            missing_ok: skip paths that do not exist.

        Raises:
            NoSuchKeyException: some paths do not exist; the message names them all.
            ObjectChangedException: an object was changed outside FennFlow.
            ChecksumMismatchException: the bytes are not those that were committed.
        """
        keys = [self._key(path) for path in paths]
        async with self._call("get") as tx:
            found = await reading.read(tx, self._namespace, keys, missing_ok=missing_ok)
        return MediaResponse(
            [_content(record, self._path(record.key), body) for record, body in found]
        )

    async def read_bytes(self, path: AnyPath) -> bytes:
        """Read the bytes of one file; raises what `get` does."""
        return (await self.get(path)).one().data

    async def read_text(self, path: AnyPath) -> str:
        """Read one file as text: UTF-8, or the charset that its media type names.

        Raises:
            FileException: the bytes are not text of the charset, or it is not known.
            BaseConnectorException: like `get`.
        """
        return (await self.get(path)).one().as_text()

    async def read_json(self, path: AnyPath) -> Any:
        """Read one file as JSON, whatever its media type.

        Raises:
            FileException: the bytes are not JSON.
            BaseConnectorException: like `get`.
        """
        return (await self.get(path)).one().as_json()


class GetPrefixRepository(Repository):
    """Read all files with a prefix."""

    async def get_prefix(self, prefix: str = "") -> MediaResponse:
        """Read all files with a prefix, in key order, a thousand at a time.

        Each thousand is as of one moment; files that are deleted meanwhile are left out.

        Args:
            prefix: relative to the scope; it need not end at a `/`.

        Raises:
            KeyException: no key can begin with the prefix.
            ObjectChangedException: an object was changed outside FennFlow.
        """
        files: list[BaseContent] = []
        async with self._call("get") as tx:
            async for keys in self._pages(tx, prefix):
                found = await reading.read(tx, self._namespace, keys, missing_ok=True)
                files += [_content(record, self._path(record.key), body) for record, body in found]
        return MediaResponse(files)


class ListRepository(Repository):
    """List paths, from the catalog: no object request is made."""

    async def list(
        self,
        prefix: str = "",
        *,
        limit: int | None = None,
        continuation_token: str | None = None,
        delimiter: str | None = None,
    ) -> ListResponse:
        """Return all paths, or a page of them, in the order of their UTF-8 bytes, as S3 lists.

        Args:
            prefix: relative to the scope; it need not end at a `/`.
            limit: paths and rolled-up prefixes on the page, 1 to 1,000,000. Without it all of
                them are returned, read a thousand at a time.
            continuation_token: of the page before.
            delimiter: roll up the paths that have it after the prefix, for instance `/`.

        Raises:
            ContinuationTokenException: the token is not one of `list`.
            KeyException: no key can begin with the prefix or have the delimiter, for instance a NUL.
            PathException: a limit out of range, or an empty delimiter.
        """
        whole = self._prefix(prefix)
        _check_page(limit, delimiter)
        start = "" if continuation_token is None else decode_token(continuation_token)
        records: list[Record] = []
        prefixes: list[str] = []
        following: str | None = start
        async with self._call("list") as tx:
            while following is not None:
                page = await reading.page(
                    tx,
                    self._namespace,
                    prefix=whole,
                    start=following,
                    limit=PAGE if limit is None else limit,
                    delimiter=delimiter,
                )
                records += page.records
                prefixes += page.prefixes
                following = page.start
                if limit is not None:
                    break
        return ListResponse(
            [self._path(record.key) for record in records],
            prefixes=[self._path(each) for each in prefixes],
            describe=lambda: [info_of(record, self._path(record.key)) for record in records],
            continuation_token=None if following is None else encode_token(following),
        )

    async def iter(self, prefix: str = "") -> AsyncIterator[StoragePath]:
        """Iterate over all paths with a prefix, a page at a time.

        Raises:
            KeyException: no key can begin with the prefix.
        """
        start: str | None = ""
        while start is not None:
            async with self._call("list") as tx:
                page = await self._page(tx, prefix, start)
            for key in page.keys:
                yield self._path(key)
            start = page.start


class StatRepository(Repository):
    """Return information about files; an adopted file costs one HEAD request at its first use."""

    @overload
    async def stat(self, path: AnyPath, /) -> ObjectInfo: ...
    @overload
    async def stat(self, *paths: AnyPath) -> tuple[ObjectInfo, ...]: ...
    async def stat(self, *paths: AnyPath) -> ObjectInfo | tuple[ObjectInfo, ...]:
        """Return the catalog's information about a file, or about several as of one moment.

        Raises:
            NoSuchKeyException: some paths do not exist; the message names them all.
            ObjectChangedException: an adopted file was changed outside FennFlow before its first use.
        """
        keys = [self._key(path) for path in paths]
        async with self._call("stat") as tx:
            view = await tx.read_records(self._namespace, keys, missing_ok=False)
            records = await with_details(tx, [each for each in view if each is not None])
        infos = tuple(info_of(record, self._path(record.key)) for record in records)
        return infos[0] if len(paths) == 1 else infos

    async def exists(self, path: AnyPath) -> bool:
        """Return whether a file exists."""
        keys = [self._key(path)]
        async with self._call("exists") as tx:
            return await tx.read_records(self._namespace, keys, missing_ok=True) != [None]


class GeneratePresignedUrlRepository(Repository):
    """Create URLs with which others read or upload files without credentials of their own."""

    async def generate_presigned_url(
        self,
        *paths: AnyPath,
        expires_in: float = EXPIRES_IN,
        method: PresignMethod = "GET",
        media_type: str | None = None,
        download_as: str | None = None,
        inline: bool = False,
        size: int | None = None,
        checksum: str | None = None,
    ) -> PresignedUrlResponse:
        """Return a URL for every path.

        A URL for `GET` leads to the file that is committed now: in a versioned bucket always to
        that version, otherwise to the object under the path when the URL is used. As in
        `answer_for`, browsers save files that they could run (HTML, SVG, and any type not known to
        be passive) and do not show them.

        An upload by a URL for `PUT` is not part of the transaction: `adopt` or reconciliation adds
        it to the catalog. The URL replaces nothing, if the store enforces the condition, and the
        upload cannot have a stamp of FennFlow.

        Args:
            paths: the files that the URLs lead to.
            expires_in: seconds until they expire; on S3 up to 7 days, and no longer than
                the credentials that sign them.
            method: `GET`, or `PUT` for an upload to a path that is free.
            media_type: `PUT`: the only media type that an upload may have; `GET`: the media type of
                the response.
            download_as: `GET`: a file name; browsers then save the file and do not show it.
            inline: `GET`: show files of any type; safe only if no stranger chooses their bytes or
                type.
            size: `PUT`: the only number of bytes that an upload may have.
            checksum: `PUT`: the SHA-256, hexadecimal, of the only bytes that an upload may have.

        Returns:
            the URLs, in the order of the paths. Its `headers` have to be sent with the request.

        Raises:
            NoSuchKeyException: `GET`, and some paths do not exist; the message names them all.
            RecordAlreadyExistsException: `PUT`, and a path is taken.
            TransactionException: this unit of work has uncommitted changes of a path.
            FileException: `media_type`, `size` or `checksum` is not valid.
            ConnectorCapabilityException: the store has no such URLs, or not for that long, or
                cannot enforce an option; or an option belongs to the other method.
        """
        keys = [self._key(path) for path in paths]
        own = {"GET": (size, checksum), "PUT": (download_as, inline or None)}
        if method not in own:
            message = f"There are presigned URLs for GET and PUT, not for {method!a}."
            raise ConnectorCapabilityException(message)
        if any(value is not None for value in own[method]):
            names = "size and checksum" if method == "GET" else "download_as and inline"
            message = f"A URL for {method} does not accept {names.replace(' and ', ' or ')}."
            raise ConnectorCapabilityException(message)
        terms = UploadTerms(media_type=media_type, size=size, sha256=checksum)
        check_terms(terms)
        async with self._call("presign") as tx:
            if method == "PUT":
                requests = await presign_uploads(
                    tx, self._namespace, keys, terms, expires_in=expires_in
                )
            else:
                requests = await presign_downloads(
                    tx,
                    self._namespace,
                    keys,
                    expires_in=expires_in,
                    media_type=media_type,
                    download_as=download_as,
                    inline=inline,
                )
        return PresignedUrlResponse(
            [each.url for each in requests],
            paths=[self._path(key) for key in keys],
            headers=requests[0].headers if requests else None,
        )


class GeneratePresignedUrlPrefixRepository(Repository):
    """Create URLs for all files with a prefix."""

    async def generate_presigned_url_prefix(
        self, prefix: str = "", *, expires_in: float = EXPIRES_IN, inline: bool = False
    ) -> PresignedUrlResponse:
        """Return a URL for `GET` of every file with a prefix; `paths` has their paths, in the same order.

        Args:
            prefix: relative to the scope; it need not end at a `/`.
            expires_in: like that of `generate_presigned_url`.
            inline: like that of `generate_presigned_url`.

        Raises:
            KeyException: no key can begin with the prefix.
            TransactionException: this unit of work has uncommitted changes under the prefix.
            ConnectorCapabilityException: the store has no such URLs, or not for that long.
        """
        urls: list[str] = []
        paths: list[StoragePath] = []
        async with self._call("presign") as tx:
            async for keys in self._pages(tx, prefix):
                found = await presign_downloads(
                    tx, self._namespace, keys, expires_in=expires_in, inline=inline
                )
                urls += [each.url for each in found]
                paths += map(self._path, keys)
        return PresignedUrlResponse(urls, paths=paths)


def _check_page(limit: object, delimiter: object) -> None:
    if limit is not None and (not isinstance(limit, int) or not 1 <= limit <= MAX_LIMIT):
        message = f"limit={brief(limit)} is not a number from 1 to {MAX_LIMIT}."
        raise PathException(message)
    if delimiter is not None:
        check_delimiter(delimiter)


def info_of(record: Record, path: StoragePath) -> ObjectInfo:
    """Return the public description of a record."""
    return ObjectInfo(
        path=path,
        size=record.size,
        media_type=record.media_type,
        etag=record.etag,
        sha256=record.sha256,
        created_at=record.created_at,
        modified_at=record.modified_at,
        metadata=record.metadata,
        version_id=record.location.version_id,
        headers=record.headers,
    )


def _content(record: Record, path: StoragePath, body: bytes) -> BaseContent:
    content = registry().content_class(record.content_type, record.media_type)
    return (content or BinaryContent).from_stored(
        body, filename=path.name, info=info_of(record, path)
    )
