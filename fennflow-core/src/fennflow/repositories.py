"""Repositories: mixins with a method or two each, and the fields that bind them to a bucket.

A repository can do what its class names, and nothing else. Paths are relative to the scope that
`at()` set; a `StoragePath`, which every method returns, is absolute.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from fennflow.engine import reading, writing
from fennflow.engine.writing import Upload, sha256_of
from fennflow.exceptions import FileException, PathException, TransactionException
from fennflow.files import BaseContent
from fennflow.files.media_types import extension
from fennflow.paths import (
    PathTemplate,
    StoragePath,
    check_key,
    decode_token,
    encode_token,
    join_key,
    render_path,
)
from fennflow.plugins import registry
from fennflow.responses import (
    DeleteResponse,
    ListResponse,
    MediaResponse,
    ObjectInfo,
    PutResponse,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
    from typing import Self

    from fennflow.backends import Record
    from fennflow.engine.session import Session
    from fennflow.uow import UnitOfWork

__all__ = [
    "CreateRepository",
    "CrudRepository",
    "DeletePrefixRepository",
    "DeleteRepository",
    "GetPrefixRepository",
    "GetRepository",
    "ListRepository",
    "PutRepository",
    "RepoField",
    "Repository",
    "S3RepoField",
    "StatRepository",
]


PAGE = 1000
"""Keys on a page of a listing, and in a batch of what works on prefixes; S3's own number."""


class Repository:
    """Base of all repositories: a bucket, seen from a scope.

    Args:
        session: what the methods act in.
        namespace: the bucket.
        scope: prefix of all relative paths, without a trailing `/`; empty at the root.
    """

    def __init__(self, session: Session, namespace: str, scope: str = "") -> None:
        self._session = session
        self._namespace = namespace
        self._scope = scope

    def at(self, path: str | PathTemplate) -> Self:
        """Return the same repository in a narrower scope; scopes nest.

        Args:
            path: relative to the scope so far; a trailing `/` may be written or not.

        Raises:
            KeyException: the path breaks the key rules, for instance has a `..` segment.
        """
        rendered = render_path(path)
        bare = rendered.removesuffix("/")
        relative = StoragePath(bare) if isinstance(rendered, StoragePath) else bare
        scope = check_key(join_key(self._scope, relative))
        return type(self)(self._session, self._namespace, scope)

    @property
    def cwd(self) -> StoragePath:
        """The scope, from the root of the bucket."""
        return StoragePath(self._scope)

    def _key(self, path: str | PathTemplate) -> str:
        rendered = render_path(path)
        if not isinstance(rendered, StoragePath):
            check_key(rendered)
        return check_key(join_key(self._scope, rendered))

    def _prefix(self, prefix: str) -> str:
        rendered = render_path(prefix)
        if isinstance(rendered, StoragePath) or not self._scope:
            return str(rendered)
        return f"{self._scope}/{rendered}"

    async def _pages(self, prefix: str) -> AsyncGenerator[Sequence[str]]:
        """Iterate over the keys with a prefix, up to a thousand at a time."""
        start: str | None = ""
        while start is not None:
            async with self._session.call() as tx:
                page = await reading.page(
                    tx,
                    self._namespace,
                    prefix=self._prefix(prefix),
                    start=start,
                    limit=PAGE,
                    delimiter=None,
                )
            yield page.keys
            start = page.start

    async def _write(
        self, files: Sequence[BaseContent], extra: Mapping[str, Any] | None, *, create: bool
    ) -> PutResponse:
        uploads = [await self._upload(file, extra or {}) for file in files]
        async with self._session.call() as tx:
            records = await writing.write(tx, self._namespace, uploads, create=create)
        return PutResponse([StoragePath(record.key) for record in records])

    async def _upload(self, file: object, extra: Mapping[str, Any]) -> Upload:
        if not isinstance(file, BaseContent):
            message = (
                f"put() and create() take files, and this is a {type(file).__name__}. Wrap it, "
                "for instance TextContent.from_content(text)."
            )
            raise FileException(message)
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
        )


class PutRepository(Repository):
    """Write files."""

    async def put(
        self, *files: BaseContent, connector_extra: Mapping[str, Any] | None = None
    ) -> PutResponse:
        """Write files, replacing what lies under their paths; all or none of the call.

        Args:
            files: what to write.
            connector_extra: options of the store for all of them, on S3 for instance
                `{"CacheControl": "max-age=3600", "StorageClass": "STANDARD_IA"}`.

        Returns:
            their paths, in the order of the files.

        Raises:
            PathException: a name breaks the key rules, or two files have one path.
            MetadataException: metadata that the store cannot hold.
            RecordLockedException: another session is writing one of the paths.
            ConnectorCapabilityException: an option that the store does not know.
            BaseConnectorException: the store refused or cannot be reached.
        """
        return await self._write(files, connector_extra, create=False)


class CreateRepository(Repository):
    """Write files where none are."""

    async def create(
        self, *files: BaseContent, connector_extra: Mapping[str, Any] | None = None
    ) -> PutResponse:
        """Write files under paths that are free; all or none of the call.

        Raises:
            RecordAlreadyExistsException: a path is taken, in the catalog or by an object that
                the catalog does not know.
            Exception: like `put`.
        """
        return await self._write(files, connector_extra, create=True)


class GetRepository(Repository):
    """Read files."""

    async def get(self, *paths: str | PathTemplate, missing_ok: bool = False) -> MediaResponse:
        """Read files whole, all as they were at one moment.

        Args:
            paths: what to read; the answer is in their order.
            missing_ok: leave out what does not exist.

        Raises:
            NoSuchKeyException: names every path that does not exist.
            ObjectChangedException: an object was changed without FennFlow.
            ChecksumMismatchException: the bytes are not those that were committed.
        """
        keys = [self._key(path) for path in paths]
        async with self._session.call() as tx:
            found = await reading.read(tx, self._namespace, keys, missing_ok=missing_ok)
        return MediaResponse([_content(record, body) for record, body in found])


class ListRepository(Repository):
    """List paths, from the catalog: no object request is made."""

    async def list(
        self,
        prefix: str = "",
        *,
        limit: int = PAGE,
        continuation_token: str | None = None,
        delimiter: str | None = None,
    ) -> ListResponse:
        """Return a page of paths in the order of their UTF-8 bytes, as S3 lists.

        Args:
            prefix: relative to the scope; it need not end at a `/`.
            limit: paths and rolled-up prefixes on the page, at least 1.
            continuation_token: of the page before.
            delimiter: roll up what has it beyond the prefix, for instance `/`.

        Raises:
            ContinuationTokenException: the token is not one of `list`.
            PathException: a limit below 1, or an empty delimiter.
        """
        if limit < 1 or delimiter == "":
            message = f"limit={limit} must be at least 1, and a delimiter cannot be empty."
            raise PathException(message)
        start = "" if continuation_token is None else decode_token(continuation_token)
        async with self._session.call() as tx:
            page = await reading.page(
                tx,
                self._namespace,
                prefix=self._prefix(prefix),
                start=start,
                limit=limit,
                delimiter=delimiter,
            )
        return ListResponse(
            [StoragePath(key) for key in page.keys],
            prefixes=[StoragePath(each) for each in page.prefixes],
            continuation_token=None if page.start is None else encode_token(page.start),
        )

    async def iter(self, prefix: str = "") -> AsyncIterator[StoragePath]:
        """Iterate over all paths with a prefix, a page at a time."""
        async for keys in self._pages(prefix):
            for key in keys:
                yield StoragePath(key)


class DeleteRepository(Repository):
    """Delete files."""

    async def delete(self, *paths: str | PathTemplate, missing_ok: bool = True) -> DeleteResponse:
        """Delete files; the objects go after the commit, a thousand a request.

        Returns:
            the paths that existed.

        Raises:
            NoSuchKeyException: not `missing_ok`, and some paths do not exist; names them all.
            RecordLockedException: another session is writing one of the paths.
        """
        keys = [self._key(path) for path in paths]
        async with self._session.call() as tx:
            gone = await writing.delete(tx, self._namespace, keys, missing_ok=missing_ok)
        return DeleteResponse([StoragePath(key) for key in gone])


class StatRepository(Repository):
    """Ask the catalog about files: no object request is made."""

    @overload
    async def stat(self, path: str | PathTemplate, /) -> ObjectInfo: ...
    @overload
    async def stat(self, *paths: str | PathTemplate) -> tuple[ObjectInfo, ...]: ...
    async def stat(self, *paths: str | PathTemplate) -> ObjectInfo | tuple[ObjectInfo, ...]:
        """Return what the catalog says of a file, or of several at one moment.

        Raises:
            NoSuchKeyException: names every path that does not exist.
        """
        keys = [self._key(path) for path in paths]
        async with self._session.call() as tx:
            records = await tx.view(self._namespace, keys, missing_ok=False)
        infos = tuple(_info(record) for record in records if record is not None)
        return infos[0] if len(paths) == 1 else infos

    async def exists(self, path: str | PathTemplate) -> bool:
        """Return whether a file exists."""
        keys = [self._key(path)]
        async with self._session.call() as tx:
            return await tx.view(self._namespace, keys, missing_ok=True) != [None]


class GetPrefixRepository(Repository):
    """Read all files with a prefix."""

    async def get_prefix(self, prefix: str = "") -> MediaResponse:
        """Read all files with a prefix, in key order, a thousand at a time.

        Each thousand is as it was at one moment; what is deleted meanwhile is left out.

        Args:
            prefix: relative to the scope; it need not end at a `/`.

        Raises:
            ObjectChangedException: an object was changed without FennFlow.
        """
        files: list[BaseContent] = []
        async for keys in self._pages(prefix):
            async with self._session.call() as tx:
                found = await reading.read(tx, self._namespace, keys, missing_ok=True)
            files += [_content(record, body) for record, body in found]
        return MediaResponse(files)


class DeletePrefixRepository(Repository):
    """Delete all files with a prefix."""

    async def delete_prefix(self, prefix: str = "") -> DeleteResponse:
        """Delete all files with a prefix, however many; all or none of the call.

        Args:
            prefix: relative to the scope; it need not end at a `/`: `a` deletes `ab` too.

        Returns:
            the paths that were deleted.

        Raises:
            RecordLockedException: another session is writing one of the paths.
        """
        gone: list[StoragePath] = []
        async with self._session.savepoint():
            async for keys in self._pages(prefix):
                async with self._session.call() as tx:
                    deleted = await writing.delete(tx, self._namespace, keys, missing_ok=True)
                gone += [StoragePath(key) for key in deleted]
        return DeleteResponse(gone)


class CrudRepository(PutRepository, GetRepository, ListRepository, DeleteRepository):
    """Put, get, list and delete."""


def _info(record: Record) -> ObjectInfo:
    return ObjectInfo(
        path=StoragePath(record.key),
        size=record.size,
        media_type=record.media_type,
        etag=record.etag,
        sha256=record.sha256,
        created_at=record.created_at,
        modified_at=record.modified_at,
        metadata=record.metadata,
        version_id=record.location.version_id,
    )


def _content(record: Record, body: bytes) -> BaseContent:
    info = _info(record)
    content = registry().content_class(record.content_type, record.media_type)
    return content.from_stored(body, filename=info.path.name, info=info)


R_co = TypeVar("R_co", bound=Repository, covariant=True)


class RepoField(Generic[R_co]):
    """A field of a unit of work: a repository on a namespace of the connector.

    Args:
        repository: its class.
        namespace: the bucket, container or directory.

    Example:
        ```python
        from fennflow import UnitOfWork
        from fennflow.repositories import CrudRepository, RepoField


        class UOW(UnitOfWork):
            reports = RepoField(CrudRepository, namespace="reports")
        ```
    """

    def __init__(self, repository: type[R_co], *, namespace: str) -> None:
        self._repository = repository
        self._namespace = namespace

    def bind(self, session: Session) -> R_co:
        """Return the repository, acting in a session."""
        return self._repository(session, self._namespace)

    @overload
    def __get__(self, instance: None, owner: type[UnitOfWork]) -> Self: ...
    @overload
    def __get__(self, instance: UnitOfWork, owner: type[UnitOfWork]) -> R_co: ...
    def __get__(self, instance: UnitOfWork | None, owner: type[UnitOfWork]) -> Any:
        """Return the field of a class; an instance has the repository itself once it is open."""
        if instance is None:
            return self
        message = f"Open it first: async with {owner.__name__}() as uow."
        raise TransactionException(message)


class S3RepoField(RepoField[R_co]):
    """A `RepoField` in the words of S3.

    Args:
        repository: its class.
        bucket_name: the bucket, which must exist.
    """

    def __init__(self, repository: type[R_co], *, bucket_name: str) -> None:
        super().__init__(repository, namespace=bucket_name)
