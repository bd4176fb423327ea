"""A type of columns whose values are files: they are put and deleted with their rows.

What is to be put and deleted is found out at the end of the block, from the rows themselves: a new
file is put if a row names it by then, and an old one is deleted if no row names it any more. So
savepoints that were rolled back need no attention.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import uuid_utils
from sqlalchemy import Column, Dialect, Text, event, inspect, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapper, Session
from sqlalchemy.types import TypeDecorator
from typing_extensions import override

from fennflow.exceptions import FileException, TransactionException

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from fennflow.files import BaseContent, StreamContent

AT_ONCE = 500
"""Paths that one statement asks for."""


class StoredFile:
    """A file that a row names.

    Args:
        content: of a new file, with a filename.
        folder: in which it is put; by default one of its own, so that its path is free.

    Attributes:
        path: for the methods of the repository.
        content: what it was made of; None if it was read from the database.

    Raises:
        FileException: the content has no filename.
    """

    def __init__(self, content: BaseContent | StreamContent, *, folder: str = "") -> None:
        if not content.filename:
            message = (
                "A stored file needs content with a filename: the row names it before it is put."
            )
            raise FileException(message)
        self.folder = folder or str(uuid_utils.uuid7())
        self.path = f"{self.folder}/{content.filename}"
        self.content: BaseContent | StreamContent | None = content

    @classmethod
    def at(cls, path: str) -> Self:
        """Return what names a file that is in the store already."""
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


class stored_files:  # noqa: N801 - it is called like a function
    """Put and delete files with the rows that name them, at the end of the block.

    Open it inside the unit of work that has joined the session, with `with` or `async with`. What
    statements of SQL change without objects (`session.execute(delete(...))`) is not seen: such
    files stay. Whether other rows name a file is looked up in the columns that the block changes.

    Args:
        session: that the unit of work has joined.
        repository: one of its repositories, with `CreateRepository` and `DeleteRepository`.
    """

    def __init__(self, session: Session | AsyncSession, repository: Any) -> None:
        self._session = session
        self._repository = repository
        self._new: dict[str, StoredFile] = {}
        self._old: set[str] = set()
        self._columns: set[Column[Any]] = set()

    @property
    def _sync_session(self) -> Session:
        session = self._session
        return session.sync_session if isinstance(session, AsyncSession) else session

    def __enter__(self) -> Self:
        """Watch the session."""
        if isinstance(self._session, AsyncSession):
            message = "For an AsyncSession there is `async with stored_files(...)`."
            raise TransactionException(message)
        event.listen(self._session, "before_flush", self._look)
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
                put, gone = self._decide(self._sync_session)
                for file in put:
                    self._repository.at(file.folder).create(file.content)
                if gone:
                    self._repository.delete(*gone)
        finally:
            event.remove(self._sync_session, "before_flush", self._look)

    async def __aenter__(self) -> Self:
        """Watch the session."""
        if not isinstance(self._session, AsyncSession):
            message = "For a Session there is `with stored_files(...)`."
            raise TransactionException(message)
        event.listen(self._session.sync_session, "before_flush", self._look)
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
                put, gone = await session.run_sync(self._decide)
                for file in put:
                    await self._repository.at(file.folder).create(file.content)
                if gone:
                    await self._repository.delete(*gone)
        finally:
            event.remove(self._sync_session, "before_flush", self._look)

    def _look(self, session: Session, *_: object) -> None:
        """Note which files the rows that change have named, and will name."""
        with session.no_autoflush:
            for row in [*session.new, *session.dirty, *session.deleted]:
                mapper: Mapper[Any] = inspect(row).mapper
                for key, column in _file_columns(mapper):
                    self._columns.add(column)
                    if row not in session.deleted:
                        self._note_new(inspect(row).attrs[key].history.added)
                    if row not in session.new:
                        self._note_old(session, mapper, row, key)

    def _note_new(self, values: Sequence[object] | None) -> None:
        for value in values or ():
            if isinstance(value, StoredFile) and value.content is not None:
                self._new.setdefault(value.path, value)

    def _note_old(self, session: Session, mapper: Mapper[Any], row: Any, key: str) -> None:
        # What the row says, since the object may not have loaded the value that was replaced.
        identity = inspect(row).identity
        columns = zip(mapper.primary_key, identity or (), strict=True)
        query = select(mapper.columns[key]).where(*(column == value for column, value in columns))
        old: StoredFile | None = session.execute(query).scalar()
        if old is not None:
            self._old.add(old.path)

    def _decide(self, session: Session) -> tuple[list[StoredFile], list[str]]:
        """Return the files to put and the paths to delete, by what the rows name now."""
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


def _file_columns(mapper: Mapper[Any]) -> Iterator[tuple[str, Column[Any]]]:
    for attribute in mapper.column_attrs:
        [column, *_] = attribute.columns
        if isinstance(column.type, StoredFileType) and isinstance(column, Column):
            yield attribute.key, column
