"""A column type whose values are files, which are put and deleted together with their rows.

The files to put and delete are determined from the rows at the end of the block: a new file is put
if a row names it then, and an old file is deleted if no row names it any more. So rolled-back
savepoints need no special handling.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any, cast

import uuid_utils
from sqlalchemy import Column, Connection, Dialect, Text, event, inspect, select
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
from sqlalchemy.orm import Mapper, Session, object_session, scoped_session
from sqlalchemy.types import TypeDecorator
from typing_extensions import override

from fennflow.exceptions import FileException, TransactionException
from fennflow.paths import check_key

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from fennflow.files import BaseContent, StreamContent

AT_ONCE = 500
"""How many paths one statement looks up."""


class StoredFile:
    """A file that a row names.

    Args:
        content: the content of a new file, with a filename.
        folder: the folder for the file; by default a new one, so that the path is free.

    Attributes:
        path: the path for the methods of the repository.
        content: the content that was given; None if it was read from the database.

    Raises:
        FileException: the content has no filename.
        KeyException: no file can have this path.
    """

    def __init__(self, content: BaseContent | StreamContent, *, folder: str = "") -> None:
        if not content.filename:
            message = (
                "A stored file needs content with a filename: the row names it before it is put."
            )
            raise FileException(message)
        self.folder = folder or str(uuid_utils.uuid7())
        self.path = check_key(f"{self.folder}/{content.filename}")
        self.content: BaseContent | StreamContent | None = content

    @classmethod
    def at(cls, path: str) -> Self:
        """Return a value that names a file that is already in the store."""
        found = cls.__new__(cls)
        found.folder, _, _ = path.rpartition("/")
        found.path = path
        found.content = None
        return found

    @override
    def __eq__(self, other: object) -> bool:
        return isinstance(other, StoredFile) and other.path == self.path

    @override
    def __hash__(self) -> int:
        return hash(self.path)

    @override
    def __repr__(self) -> str:
        return f"StoredFile.at({self.path!r})"


class StoredFileType(TypeDecorator[StoredFile]):
    """The type of a column with the path of a file: `mapped_column(StoredFileType)`."""

    impl = Text
    cache_ok = True

    @override
    def process_bind_param(self, value: StoredFile | str | None, dialect: Dialect) -> str | None:
        return value.path if isinstance(value, StoredFile) else value

    @override
    def process_result_value(self, value: str | None, dialect: Dialect) -> StoredFile | None:
        return None if value is None else StoredFile.at(value)


_BLOCK = "stored_files of FennFlow's"
"""The key in a session's `info` for the changes of the open block."""


class _Changes:
    """The files that the rows written in the block named before, and name now."""

    def __init__(self) -> None:
        self._new: dict[str, StoredFile] = {}
        self._old: set[str] = set()
        self._columns: set[Column[Any]] = set()

    def note(
        self,
        session: Session,
        mapper: Mapper[Any],
        old: Collection[StoredFile],
        new: Collection[StoredFile],
    ) -> None:
        """Note the files that a row named before, and names now."""
        mappers = mapper.registry.mappers
        self._columns.update(column for each in mappers for _, column in _file_columns(each))
        self._old.update(file.path for file in old)
        unknown = {file.path: file for file in new if file.path not in self._new}
        for path in self._named(session, unknown):  # the file was put with another row
            unknown.pop(path, None)
        self._new |= unknown

    def decide(self, session: Session) -> tuple[list[StoredFile], list[str]]:
        """Return the files to put and the paths to delete, according to the current rows."""
        session.flush()
        named = set(self._named(session, {*self._new, *self._old}))
        put = [file for path, file in self._new.items() if path in named]
        return put, sorted(self._old - named - set(self._new))

    def _named(self, session: Session, paths: Collection[str]) -> Iterator[str]:
        for column in self._columns:
            wanted = sorted(paths)
            for start in range(0, len(wanted), AT_ONCE):
                some = wanted[start : start + AT_ONCE]
                found = session.execute(select(column).where(column.in_(some))).scalars()
                yield from (file.path for file in found)


class stored_files:  # noqa: N801 - it is called like a function
    """Put and delete files with the rows that name them, at the end of the block.

    Open it inside the unit of work that has joined the session, with `with` or `async with`.
    Changes by bulk statements (`session.execute(delete(...))`) are not noticed: their files are
    kept. A file is also kept if another row of any mapped class of the registry names it.

    Args:
        session: the session that the unit of work has joined.
        repository: one of its repositories, with `CreateRepository` and `DeleteRepository`.
    """

    def __init__(
        self,
        session: Session
        | AsyncSession
        | scoped_session[Session]
        | async_scoped_session[AsyncSession],
        repository: Any,
    ) -> None:
        # The current session: the registry has one for each thread or task.
        self._session: Session | AsyncSession = (
            session() if isinstance(session, (scoped_session, async_scoped_session)) else session
        )
        self._repository = repository
        self._changes = _Changes()
        self._outer: object = None

    def __enter__(self) -> Self:
        """Start watching the session."""
        if isinstance(self._session, AsyncSession):
            message = "For an AsyncSession use `async with stored_files(...)`."
            raise TransactionException(message)
        self._begin()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Put and delete files, unless an exception leaves the block."""
        try:
            if exc is None:
                put, gone = self._changes.decide(cast("Session", self._session))
                for file in put:
                    self._repository.at(file.folder).create(file.content)
                if gone:
                    self._repository.delete(*gone)
        finally:
            self._end()

    async def __aenter__(self) -> Self:
        """Start watching the session."""
        if not isinstance(self._session, AsyncSession):
            message = "For a Session use `with stored_files(...)`."
            raise TransactionException(message)
        self._begin()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Put and delete files, unless an exception leaves the block."""
        try:
            if exc is None:
                session = cast("AsyncSession", self._session)
                put, gone = await session.run_sync(self._changes.decide)
                for file in put:
                    await self._repository.at(file.folder).create(file.content)
                if gone:
                    await self._repository.delete(*gone)
        finally:
            self._end()

    def _begin(self) -> None:
        self._outer = self._session.info.get(_BLOCK)
        self._session.info[_BLOCK] = self._changes

    def _end(self) -> None:
        self._session.info[_BLOCK] = self._outer


@event.listens_for(Mapper, "mapper_configured")
def _watch(mapper: Mapper[Any], kind: type[Any]) -> None:
    """Watch the rows of a class with files as they are written, including orphans."""
    if next(_file_columns(mapper), None) is not None:
        event.listen(kind, "before_insert", _look)
        event.listen(kind, "before_update", _look)
        event.listen(kind, "before_delete", _look_at_deleted)


def _look(mapper: Mapper[Any], connection: Connection, row: object) -> None:
    session = cast("Session", object_session(row))
    block: _Changes | None = session.info.get(_BLOCK)
    state = inspect(row)
    for key, _ in _file_columns(mapper):
        history = state.attrs[key].history
        new = [
            value
            for value in history.added or ()
            if isinstance(value, StoredFile) and value.content is not None
        ]
        if block is not None and history.has_changes():
            block.note(session, mapper, _old(mapper, connection, row, key), new)
        elif new:
            message = (
                f"Nothing would put {new[0].path}, which a row of {mapper.class_.__name__} names. Flush "
                "it inside stored_files(session, repository), or name an existing file by "
                "StoredFile.at(path)."
            )
            raise TransactionException(message)


def _look_at_deleted(mapper: Mapper[Any], connection: Connection, row: object) -> None:
    session = cast("Session", object_session(row))
    block: _Changes | None = session.info.get(_BLOCK)
    if block is not None:
        for key, _ in _file_columns(mapper):
            block.note(session, mapper, _old(mapper, connection, row, key), ())


def _old(mapper: Mapper[Any], connection: Connection, row: object, key: str) -> list[StoredFile]:
    """Return the stored value of the row: the object may not have loaded the replaced value."""
    identity = inspect(row).identity
    if identity is None:
        return []
    columns = zip(mapper.primary_key, identity, strict=True)
    query = (
        select(mapper.columns[key])
        .select_from(mapper.selectable)
        .where(*(column == value for column, value in columns))
    )
    found: StoredFile | None = connection.execute(query).scalar()
    return [] if found is None else [found]


def _file_columns(mapper: Mapper[Any]) -> Iterator[tuple[str, Column[Any]]]:
    for attribute in mapper.column_attrs:
        [column, *_] = attribute.columns
        if isinstance(column.type, StoredFileType) and isinstance(column, Column):
            yield attribute.key, column
