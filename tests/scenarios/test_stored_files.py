"""Columns whose values are files: they are put and deleted with their rows."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, ForeignKey, create_engine, select
from sqlalchemy.engine import make_url
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    relationship,
    scoped_session,
    sessionmaker,
)

from fennflow.backends import SqlalchemyBackendConfig
from fennflow.connectors import InMemoryConnectorConfig
from fennflow.exceptions import FileException, KeyException, TransactionException
from fennflow.files import TextContent
from fennflow.sync.portal import close
from fennflow.testing import PostgresqlServer
from fennflow_sqlalchemy import StoredFile, StoredFileType, stored_files
from stores import FullUOW, Store

numbers = itertools.count()


class Base(DeclarativeBase):
    pass


class Letter(Base):
    __tablename__ = "scanned_letters"
    name: Mapped[str] = mapped_column(primary_key=True)
    scan: Mapped[StoredFile | None] = mapped_column(StoredFileType)


class Archived(Base):
    __tablename__ = "archived_letters"
    id: Mapped[int] = mapped_column(primary_key=True)
    scan: Mapped[StoredFile | None] = mapped_column(StoredFileType)


class Part(Base):
    __tablename__ = "parts"
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "part"}  # noqa: RUF012
    name: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    book_name: Mapped[str | None] = mapped_column(ForeignKey("books.name"))


class Page(Part):
    __tablename__ = "pages"
    __mapper_args__ = {"polymorphic_identity": "page"}  # noqa: RUF012
    name: Mapped[str] = mapped_column(ForeignKey("parts.name"), primary_key=True)
    scan: Mapped[StoredFile | None] = mapped_column(StoredFileType)


class Book(Base):
    __tablename__ = "books"
    name: Mapped[str] = mapped_column(primary_key=True)
    pages: Mapped[list[Page]] = relationship(cascade="all, delete-orphan")


class StopError(Exception):
    """Leaves a block."""


def stored(text: str, name: str = "a.txt") -> StoredFile:
    return StoredFile(TextContent.from_content(text, filename=name))


@dataclass
class Site:
    """A database with rows and catalog, and a store in memory."""

    store: Store
    url: str
    engine: Engine
    uow_class: type[FullUOW]

    def check(self, *names: str) -> None:
        """Check that these rows are left, and that exactly their files are there."""
        with Session(self.engine) as session:
            rows = session.execute(select(Letter)).scalars().all()
            assert sorted(row.name for row in rows) == sorted(names)
            paths = {row.scan.path for row in rows if row.scan is not None}
        assert set(asyncio.run(self.store.objects())) == paths
        with self.uow_class.sync() as uow:
            assert set(map(str, uow.files.list())) == paths


@pytest.fixture(params=["sqlite", "postgresql"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[Site]:
    url = f"sqlite:///{tmp_path / 'app.db'}"
    if request.param == "postgresql":
        server: PostgresqlServer = request.getfixturevalue("postgresql")
        url = (
            make_url(server.url)
            .set(drivername="postgresql+psycopg")
            .render_as_string(hide_password=False)
        )
    number = next(numbers)
    store = Store(InMemoryConnectorConfig(name=f"stored{number}"), "files")
    backend = SqlalchemyBackendConfig(url=url, table_prefix=f"stored{number}_")
    engine = create_engine(url)
    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    uow_class = store.uow(backend=backend)
    with uow_class.sync().lifespan():
        yield Site(store, url, engine, uow_class)
    engine.dispose()
    close()


def test_files_are_put_and_deleted_with_their_rows(site: Site) -> None:
    with Session(site.engine) as session:
        with site.uow_class.sync(join=session) as uow, stored_files(session, uow.files):
            session.add_all(
                [Letter(name="a", scan=stored("1")), Letter(name="b", scan=stored("2"))]
            )
            session.add(Letter(name="c"))
        site.check("a", "b", "c")
        with site.uow_class.sync(join=session) as uow, stored_files(session, uow.files):
            letter = session.get_one(Letter, "a")
            assert letter.scan is not None
            assert uow.files.read_text(letter.scan.path) == "1"
            letter.scan = stored("new")
            session.delete(session.get_one(Letter, "b"))
        site.check("a", "c")
        with site.uow_class.sync(join=session) as uow, stored_files(session, uow.files):
            session.get_one(Letter, "a").name = "d"
        site.check("c", "d")
        with site.uow_class.sync(join=session) as uow, stored_files(session, uow.files):
            session.get_one(Letter, "d").scan = None
        site.check("c", "d")


def test_what_is_rolled_back_changes_no_file(site: Site) -> None:
    with Session(site.engine) as session:
        with site.uow_class.sync(join=session) as uow, stored_files(session, uow.files):
            session.add(Letter(name="a", scan=stored("1")))
        with pytest.raises(StopError), site.uow_class.sync(join=session) as uow:
            with stored_files(session, uow.files):
                session.delete(session.get_one(Letter, "a"))
                session.add(Letter(name="b", scan=stored("2")))
                session.flush()
                raise StopError
        site.check("a")
        with site.uow_class.sync(join=session) as uow, stored_files(session, uow.files):
            with pytest.raises(StopError), session.begin_nested():
                session.delete(session.get_one(Letter, "a"))
                session.flush()
                raise StopError
            with pytest.raises(IntegrityError), session.begin_nested():
                session.add_all(
                    [Letter(name="c", scan=stored("3")), Letter(name="a", scan=stored("4"))]
                )
            session.add(Letter(name="d", scan=stored("5")))
        site.check("a", "d")


def test_a_file_that_another_row_names_stays(site: Site) -> None:
    with Session(site.engine) as session:
        with site.uow_class.sync(join=session) as uow, stored_files(session, uow.files):
            one = stored("1")
            session.add_all([Letter(name="a", scan=one), Letter(name="b", scan=one)])
        with site.uow_class.sync(join=session) as uow, stored_files(session, uow.files):
            session.delete(session.get_one(Letter, "a"))
        site.check("b")


def test_a_file_that_a_row_of_another_table_names_stays(site: Site) -> None:
    with Session(site.engine) as session:
        with site.uow_class.sync(join=session) as uow, stored_files(session, uow.files):
            session.add(Letter(name="a", scan=stored("1")))
        with site.uow_class.sync(join=session) as uow, stored_files(session, uow.files):
            scan = session.get_one(Letter, "a").scan
            session.add(Archived(scan=scan))
        with site.uow_class.sync(join=session) as uow, stored_files(session, uow.files):
            session.delete(session.get_one(Letter, "a"))
        with site.uow_class.sync(join=session) as uow, stored_files(session, uow.files):
            [archived] = session.scalars(select(Archived))
            assert archived.scan is not None
            assert uow.files.read_text(archived.scan.path) == "1"
            session.delete(archived)
        site.check()


def test_a_file_that_was_put_is_named_by_another_row(site: Site) -> None:
    one = stored("1")
    with Session(site.engine, expire_on_commit=False) as session:
        for name in ("a", "b"):
            with pytest.raises(StopError), site.uow_class.sync(join=session) as uow:
                with stored_files(session, uow.files):
                    session.add(Letter(name=name, scan=one))
                raise StopError
            with site.uow_class.sync(join=session) as uow, stored_files(session, uow.files):
                session.add(Letter(name=name, scan=one))
        site.check("a", "b")


def test_a_row_is_refused_whose_file_nothing_puts(site: Site) -> None:
    with Session(site.engine) as session:
        session.add(Letter(name="a", scan=stored("1")))
        with pytest.raises(TransactionException, match=r"put .*a\.txt.* Letter"):
            session.flush()
    site.check()


def test_files_go_with_orphans_and_rows_of_subclasses(site: Site) -> None:
    with Session(site.engine) as session:
        with site.uow_class.sync(join=session) as uow, stored_files(session, uow.files):
            pages = [Page(name=f"p{number}", scan=stored("1")) for number in range(2)]
            session.add(Book(name="book", pages=pages))
        with site.uow_class.sync(join=session) as uow, stored_files(session, uow.files):
            book = session.get_one(Book, "book")
            book.pages = book.pages[:1]
            left = book.pages[0].scan
            assert left is not None
        with site.uow_class.sync() as uow:
            assert list(uow.files.list()) == [left.path]
        with site.uow_class.sync(join=session) as uow, stored_files(session, uow.files):
            session.delete(session.get_one(Book, "book"))
        site.check()


def test_a_scoped_session_is_that_of_the_thread(site: Site) -> None:
    scoped = scoped_session(sessionmaker(site.engine))
    with site.uow_class.sync(join=scoped) as uow, stored_files(scoped, uow.files):
        scoped.add(Letter(name="a", scan=stored("1")))
        refused: list[TransactionException] = []

        def other() -> None:
            scoped.add(Letter(name="b", scan=stored("2")))
            try:
                scoped.flush()
            except TransactionException as error:
                refused.append(error)
            scoped.remove()

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    scoped.remove()
    assert len(refused) == 1
    site.check("a")


def test_it_works_with_async(site: Site) -> None:
    async def run() -> None:
        driver = "aiosqlite" if site.url.startswith("sqlite") else "asyncpg"
        url = make_url(site.url)
        engine = create_async_engine(url.set(drivername=f"{url.get_backend_name()}+{driver}"))
        async with AsyncSession(engine) as session:
            with pytest.raises(TransactionException, match="async with"):
                stored_files(session, None).__enter__()
            async with site.uow_class(join=session) as uow, stored_files(session, uow.files):
                session.add_all(
                    [Letter(name="a", scan=stored("1")), Letter(name="b", scan=stored("2"))]
                )
            async with site.uow_class(join=session) as uow, stored_files(session, uow.files):
                (await session.get_one(Letter, "a")).scan = stored("3")
                await session.delete(await session.get_one(Letter, "b"))
        with Session(site.engine) as plain:
            wrong: Any = stored_files(plain, None)
            with pytest.raises(TransactionException, match="use `with"):
                await wrong.__aenter__()
        await engine.dispose()

    asyncio.run(run())
    site.check("a")


def test_a_stored_file_is_its_path() -> None:
    file = StoredFile(TextContent.from_content("1", filename="a.txt"), folder="scans/1")
    assert file == StoredFile.at("scans/1/a.txt")
    assert len({file, StoredFile.at("scans/1/a.txt"), StoredFile.at("x")}) == 2
    assert repr(file) == "StoredFile.at('scans/1/a.txt')"
    with pytest.raises(FileException, match="filename"):
        StoredFile(TextContent.from_content("1"))
    for name in ("../b.txt", "/b.txt", "a\0b"):
        with pytest.raises(KeyException):
            StoredFile(TextContent.from_content("1", filename=name), folder="scans/1")
