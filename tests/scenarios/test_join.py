"""Files and rows that commit in one transaction of the database (P5)."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, closing, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import pytest
from sqlalchemy import create_engine, event, update
from sqlalchemy import text as sql
from sqlalchemy.exc import DBAPIError, IntegrityError, InvalidRequestError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from crashing import Site, make_site, text
from fennflow import UnitOfWork
from fennflow.exceptions import (
    BackendUnavailableException,
    ConfigException,
    ConflictException,
    RecordLockedException,
    TransactionException,
)
from fennflow.sync.portal import close
from fennflow.testing import S3Server
from fennflow.testing.backend_values import opened
from fennflow_sqlalchemy.tables import make_tables
from stores import FullUOW, raw_client
from threads import Threaded, ThreadedUnits, bare


class Base(DeclarativeBase):
    pass


class Letter(Base):
    __tablename__ = "letters"
    name: Mapped[str] = mapped_column(primary_key=True)


@dataclass
class Joint:
    """A store, a database with FennFlow's tables and the user's, and the user's engine."""

    site: Site
    engine: AsyncEngine
    uow_class: type[FullUOW]

    @property
    def by_thread(self) -> bool:
        """Whether the session and what joins it are used without `async`."""
        return isinstance(self.engine, Threaded)

    @property
    def session(self) -> Callable[..., AsyncSession]:
        return partial(self.new_session, self.engine, expire_on_commit=False)

    def new_session(self, bind: Any, **options: Any) -> AsyncSession:
        if self.by_thread:
            return cast("AsyncSession", Threaded(Session(bare(bind), **options)))
        return AsyncSession(bind, **options)

    def units(self, site: Site) -> type[FullUOW]:
        """Return the class of units of work of a site, to be joined by sessions of this one."""
        if self.by_thread:
            return cast("type[FullUOW]", ThreadedUnits(site.uow_class))
        return site.uow_class

    async def rows(self) -> set[str]:
        async with self.engine.connect() as connection:
            return set((await connection.execute(sql("SELECT name FROM letters"))).scalars())

    async def files(self) -> set[str]:
        """Return the objects in the bucket, once the journal is empty."""
        await self.finished()
        return set(await self.site.store.objects())

    async def finished(self) -> None:
        for _ in range(1200):
            if not await self.uow_class.transactions():
                return
            await asyncio.sleep(0.05)
        pytest.fail(f"not finished: {await self.uow_class.transactions()}")

    async def check(self, *names: str) -> None:
        assert await self.files() == set(names)
        assert await self.rows() == set(names)
        async with self.uow_class() as uow:
            assert set(map(str, await uow.files.list())) == set(names)


@asynccontextmanager
async def jointly(
    database: str, request: pytest.FixtureRequest, *, store: str = "strict"
) -> AsyncGenerator[Joint]:
    site = await make_site(store, database, request)
    # So that no turn of recovery comes by itself, however long a test waits.
    site = replace(site, settings={**site.settings, "recovery_interval": 3600.0})
    engine = create_async_engine(site.backend.url.get_secret_value())
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)
        await connection.run_sync(Base.metadata.create_all)
    uow_class = site.uow_class
    try:
        async with uow_class.lifespan():
            # SQLite refuses a transaction that has read, and begins to write while the engine does.
            await uow_class.recover()  # what an engine does at first use is over
            yield Joint(site, engine, uow_class)
    finally:
        await engine.dispose()


@asynccontextmanager
async def jointly_by_thread(driver: str, request: pytest.FixtureRequest) -> AsyncGenerator[Joint]:
    """Join sessions that are used without `async`, on drivers of their own."""
    database = "sqlite" if driver == "pysqlite" else "postgresql"
    async with jointly(database, request, store="memory") as joint:
        url = joint.engine.url
        engine = create_engine(url.set(drivername=f"{url.get_backend_name()}+{driver}"))
        uow_class = cast("type[FullUOW]", ThreadedUnits(joint.uow_class))

        def begin() -> None:
            with joint.uow_class.sync().lifespan():
                pass
            joint.uow_class.sync().recover()

        try:
            await asyncio.to_thread(begin)
            yield Joint(joint.site, cast("AsyncEngine", Threaded(engine)), uow_class)
        finally:
            await asyncio.to_thread(engine.dispose)
            await asyncio.to_thread(close)


@pytest.fixture(params=["sqlite", "postgresql", "pysqlite", "psycopg"])
async def joint(request: pytest.FixtureRequest, strict: S3Server) -> AsyncGenerator[Joint]:
    del strict
    kind = jointly if request.param in {"sqlite", "postgresql"} else jointly_by_thread
    async with kind(request.param, request) as joint:
        yield joint


@pytest.fixture(params=["sqlite", "postgresql"])
async def async_joint(request: pytest.FixtureRequest, strict: S3Server) -> AsyncGenerator[Joint]:
    del strict
    async with jointly(request.param, request) as joint:
        yield joint


async def test_rows_and_files_commit_with_the_block(joint: Joint) -> None:
    async with joint.session() as session:
        async with joint.uow_class(join=session) as uow:
            session.add(Letter(name="a"))
            await uow.files.put(text("Dear Ann", "a"))
            assert await joint.rows() == set()
        assert not session.in_transaction()
        async with joint.uow_class() as uow:
            assert (await uow.files.get("a")).one().data == b"Dear Ann"
    await joint.check("a")


async def test_the_first_write_may_be_a_row(joint: Joint) -> None:
    """On SQLite it takes the file's write lock before any intent is journaled."""
    async with joint.session() as session, joint.uow_class(join=session) as uow:
        session.add(Letter(name="a"))
        await session.flush()
        await uow.files.put(text("Dear Ann", "a"))
        await uow.files.put(text("Dear Ann!", "a"))
    await joint.check("a")


async def test_an_exception_undoes_rows_and_files(joint: Joint) -> None:
    async with joint.session() as session:
        with pytest.raises(ZeroDivisionError) as caught:
            async with joint.uow_class(join=session) as uow:
                session.add(Letter(name="a"))
                await session.flush()
                await uow.files.put(text("Dear Ann", "a"))
                raise ZeroDivisionError
        assert not session.in_transaction()
    assert not hasattr(caught.value, "__notes__")
    await joint.check()


async def test_a_row_that_the_database_refuses_undoes_the_files(joint: Joint) -> None:
    """It is refused at the commit, after the pivot was written; the exception is the user's own."""
    async with joint.session() as session, session.begin():
        session.add(Letter(name="a"))
    async with joint.session() as session:
        with pytest.raises(IntegrityError):
            async with joint.uow_class(join=session) as uow:
                session.add(Letter(name="a"))
                await uow.files.put(text("Dear Ann", "b"))
    assert await joint.files() == set()
    assert await joint.rows() == {"a"}


async def test_a_block_of_rows_alone_commits_them(joint: Joint) -> None:
    async with joint.session() as session, joint.uow_class(join=session):
        session.add(Letter(name="a"))
    assert await joint.rows() == {"a"}
    with pytest.raises(ZeroDivisionError):
        async with joint.session() as session, joint.uow_class(join=session):
            session.add(Letter(name="b"))
            raise ZeroDivisionError
    assert await joint.rows() == {"a"}


async def test_commit_and_rollback_end_both_and_more_work_may_follow(joint: Joint) -> None:
    async with joint.session() as session, joint.uow_class(join=session, auto_commit=False) as uow:
        session.add(Letter(name="a"))
        await uow.files.put(text("1", "a"))
        await uow.commit()
        assert await joint.rows() == {"a"}
        session.add(Letter(name="b"))
        await uow.files.put(text("2", "b"))
        await uow.rollback()
        session.add(Letter(name="c"))
        await uow.files.put(text("3", "c"))
    await joint.check("a")


async def test_a_block_that_has_ended_leaves_alone_what_follows_in_its_session(
    joint: Joint,
) -> None:
    async with joint.session() as session:
        async with joint.uow_class(join=session) as uow:
            session.add(Letter(name="a"))
            await uow.files.put(text("1", "a"))
        for late in (uow.commit, uow.rollback):
            session.add(Letter(name="b"))
            await session.flush()
            with pytest.raises(TransactionException, match="has ended"):
                await late()
            assert session.in_transaction()
            await session.rollback()
    await joint.check("a")


async def test_a_surrounding_transaction_commits_both(joint: Joint) -> None:
    outcomes: list[str] = []
    async with joint.session() as session, session.begin():
        session.add(Letter(name="a"))
        await session.flush()
        async with joint.uow_class(join=session) as uow:
            await uow.files.put(text("Dear Ann", "a"))
            uow.on_commit(lambda: outcomes.append("committed"))
            uow.on_rollback(lambda: outcomes.append("rolled back"))
        async with joint.uow_class(join=session) as uow:
            session.add(Letter(name="b"))
            await uow.files.put(text("Dear Bob", "b"))
        async with joint.uow_class() as other:
            assert list(await other.files.list()) == []
        assert outcomes == []
    async with joint.uow_class() as uow:
        assert (await uow.files.get("a")).one().data == b"Dear Ann"
    await joint.check("a", "b")
    assert outcomes == ["committed"]


async def test_what_a_surrounding_transaction_rolls_back_is_undone(joint: Joint) -> None:
    outcomes: list[str] = []

    async def do() -> None:
        outcomes.append("done")

    async def undo() -> None:
        outcomes.append("undone")

    with pytest.raises(ZeroDivisionError):
        async with joint.session() as session, session.begin():
            session.add(Letter(name="a"))
            async with joint.uow_class(join=session) as uow:
                await uow.step(do, undo)
                await uow.files.put(text("Dear Ann", "a"))
                uow.on_rollback(lambda: outcomes.append("rolled back"))
            raise ZeroDivisionError
    await joint.check()
    assert outcomes == ["done", "undone", "rolled back"]


@pytest.mark.parametrize("writes_first", [True, False])
async def test_an_exception_inside_a_surrounding_transaction_undoes_both(
    joint: Joint, *, writes_first: bool
) -> None:
    # Not after SQLite's `busy_timeout` of 30 s, for which recovery would hold the writer's turn.
    with pytest.raises(ZeroDivisionError) as caught:
        async with asyncio.timeout(20), joint.session() as session, session.begin():
            if writes_first:
                session.add(Letter(name="a"))
                await session.flush()
            async with joint.uow_class(join=session) as uow:
                await uow.files.put(text("Dear Ann", "a"))
                raise ZeroDivisionError
    assert not hasattr(caught.value, "__notes__")
    await joint.check()


async def test_callbacks_of_a_block_without_files_know_the_outcome(joint: Joint) -> None:
    outcomes: list[str] = []

    async def run(*, fails: bool) -> None:
        async with joint.session() as session, session.begin():
            async with joint.uow_class(join=session) as uow:
                uow.on_commit(lambda: outcomes.append("committed"))
                uow.on_rollback(lambda: outcomes.append("rolled back"))
            if fails:
                raise ZeroDivisionError

    await run(fails=False)
    await until(lambda: outcomes == ["committed"])
    with pytest.raises(ZeroDivisionError):
        await run(fails=True)
    await until(lambda: outcomes == ["committed", "rolled back"])


async def test_a_decision_that_another_transaction_holds_up_is_looked_for_again_soon(
    request: pytest.FixtureRequest,
    strict: S3Server,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """P5, P26: not only after `recovery_interval`; on SQLite, one writer blocks all others."""
    del strict
    caplog.set_level(logging.INFO, "fennflow")
    outcomes: list[str] = []
    async with AsyncExitStack() as stack:
        joint = await stack.enter_async_context(jointly("sqlite", request))
        other = sqlite3.connect(str(joint.engine.url.database), timeout=60, isolation_level=None)
        stack.enter_context(closing(other))
        async with joint.session() as session:

            @event.listens_for(session.sync_session, "after_commit")
            def _(_session: Session) -> None:
                # Before anything else of this loop runs, as recovery does.
                other.execute("BEGIN IMMEDIATE")

            async with session.begin():
                async with joint.uow_class(join=session) as uow:
                    await uow.files.put(text("Dear Ann", "a"))
                    uow.on_commit(lambda: outcomes.append("committed"))
                session.add(Letter(name="a"))
        await until(lambda: "could not be finished yet" in caplog.text)
        assert outcomes == []
        other.execute("ROLLBACK")
        await until(lambda: outcomes == ["committed"])
        await joint.check("a")


async def until(holds: Callable[[], bool]) -> None:
    for _ in range(1200):
        if holds():
            return
        await asyncio.sleep(0.05)
    pytest.fail("it did not come to that")


async def test_a_surrounding_transaction_decides_alone(joint: Joint) -> None:
    with pytest.raises(TransactionException, match="surrounds"):
        async with joint.session() as session, session.begin():
            async with joint.uow_class(join=session) as uow:
                await uow.commit()
    with pytest.raises(TransactionException, match="surrounds"):
        async with joint.session() as session, session.begin():
            async with joint.uow_class(join=session) as uow:
                await uow.rollback()
    with pytest.raises(TransactionException, match="auto_commit"):
        async with joint.session() as session, session.begin():
            async with joint.uow_class(join=session, auto_commit=False):
                pytest.fail("it must not open")


async def test_a_connection_can_be_joined_too(joint: Joint) -> None:
    insert = sql("INSERT INTO letters VALUES (:name)")
    async with joint.engine.connect() as connection:
        async with joint.uow_class(join=connection) as uow:
            await connection.execute(insert, {"name": "a"})
            await uow.files.put(text("Dear Ann", "a"))
        with pytest.raises(ZeroDivisionError):
            async with joint.uow_class(join=connection) as uow:
                await connection.execute(insert, {"name": "b"})
                await uow.files.put(text("Dear Bob", "b"))
                raise ZeroDivisionError
    async with joint.engine.begin() as connection, joint.uow_class(join=connection) as uow:
        await connection.execute(insert, {"name": "c"})
        await uow.files.put(text("Dear Cleo", "c"))
    await joint.check("a", "c")


async def test_a_scoped_session_can_be_joined_too(async_joint: Joint) -> None:
    joint = async_joint
    sessions = async_sessionmaker(joint.engine, expire_on_commit=False)
    scoped = async_scoped_session(sessions, scopefunc=asyncio.current_task)
    async with joint.uow_class(join=scoped) as uow:
        scoped.add(Letter(name="a"))
        await uow.files.put(text("Dear Ann", "a"))
    await scoped.remove()
    await joint.check("a")


async def test_a_savepoint_that_is_rolled_back_takes_the_files_with_it(joint: Joint) -> None:
    if joint.engine.dialect.name == "sqlite":
        begins_itself(joint.engine)
    async with joint.session() as session, session.begin():
        session.add(Letter(name="a"))
        with pytest.raises(ZeroDivisionError):
            async with session.begin_nested():
                session.add(Letter(name="b"))
                async with joint.uow_class(join=session) as uow:
                    await uow.files.put(text("Dear Bob", "b"))
                raise ZeroDivisionError
    assert await joint.files() == set()
    assert await joint.rows() == {"a"}


def begins_itself(engine: AsyncEngine) -> None:
    """Set transactions up as documented by SQLAlchemy for savepoints on SQLite."""

    sync_engine: Any = bare(engine) if isinstance(engine, Threaded) else engine.sync_engine

    @event.listens_for(sync_engine, "connect")
    def _(connection: Any, _record: object) -> None:
        connection.isolation_level = None

    @event.listens_for(sync_engine, "begin")
    def _(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN")


async def commits(session: AsyncSession) -> None:
    await session.commit()


async def commits_and_goes_on(session: AsyncSession) -> None:
    await session.commit()
    session.add(Letter(name="later"))
    await session.flush()


async def commits_by_hand(session: AsyncSession) -> None:
    await session.execute(sql("COMMIT"))


async def commits_behind_comments(session: AsyncSession) -> None:
    await session.execute(sql("-- the end\n /* of it */ COMMIT"))


async def rolls_back(session: AsyncSession) -> None:
    await session.rollback()


async def rolls_back_by_hand(session: AsyncSession) -> None:
    await session.execute(sql("ROLLBACK"))


async def rolls_back_after_an_error(session: AsyncSession) -> None:
    session.add(Letter(name="taken"))
    try:
        await session.flush()
    except IntegrityError:
        await session.rollback()


async def swallows_an_error(session: AsyncSession) -> None:
    session.add(Letter(name="taken"))
    with suppress(IntegrityError):
        await session.flush()


async def closes(session: AsyncSession) -> None:
    await session.close()


async def begins_another(session: AsyncSession) -> None:
    await session.rollback()
    await session.begin()
    session.add(Letter(name="later"))


async def loses_the_connection(session: AsyncSession) -> None:
    await session.invalidate()


COMMITTING = [commits, commits_and_goes_on, commits_by_hand, commits_behind_comments]
ROLLING_BACK = [
    rolls_back,
    rolls_back_by_hand,
    rolls_back_after_an_error,
    swallows_an_error,
    closes,
    begins_another,
    loses_the_connection,
]


async def test_a_block_whose_session_ends_inside_it_raises_and_undoes_its_files(
    joint: Joint,
) -> None:
    async with joint.session() as session, session.begin():
        session.add(Letter(name="taken"))
    rows = {"taken"}
    for end in [*COMMITTING, *ROLLING_BACK]:
        name = end.__name__
        how = "committed" if end in COMMITTING else "rolled back"
        async with joint.session() as session:
            with pytest.raises(TransactionException, match=f"was {how} inside the block"):
                async with joint.uow_class(join=session) as uow:
                    session.add(Letter(name=name))
                    await session.flush()
                    await uow.files.put(text("Dear Ann", name))
                    await end(session)
        if end in COMMITTING:
            rows.add(name)
        assert await joint.rows() == rows, name
        assert await joint.files() == set(), name


async def test_an_exception_after_a_commit_inside_the_block_says_what_stands(joint: Joint) -> None:
    async with joint.session() as session:
        with pytest.raises(ZeroDivisionError) as caught:
            async with joint.uow_class(join=session) as uow:
                session.add(Letter(name="a"))
                await uow.files.put(text("Dear Ann", "a"))
                await session.commit()
                raise ZeroDivisionError
    assert "was committed inside the block" in caught.value.__notes__[0]
    assert await joint.rows() == {"a"}
    assert await joint.files() == set()


async def test_a_block_whose_connection_ends_inside_it_raises_and_undoes_its_files(
    joint: Joint,
) -> None:
    insert = sql("INSERT INTO letters VALUES (:name)")
    rows: set[str] = set()
    for begun in (False, True):
        for end in ("commit", "rollback", "close", "invalidate"):
            name = f"{end}{begun}"
            async with joint.engine.connect() as connection:
                if begun:
                    await connection.execute(insert, {"name": name})
                with pytest.raises(TransactionException, match="inside the block"):
                    async with joint.uow_class(join=connection) as uow:
                        if not begun:
                            await connection.execute(insert, {"name": name})
                        await uow.files.put(text("Dear Ann", name))
                        await getattr(connection, end)()
            if end == "commit":
                rows.add(name)
            assert await joint.rows() == rows, name
            assert await joint.files() == set(), name


async def test_a_savepoint_of_a_session_that_began_by_itself_surrounds(joint: Joint) -> None:
    if joint.engine.dialect.name == "sqlite":
        begins_itself(joint.engine)
    async with joint.session() as session:
        session.add(Letter(name="a"))
        with pytest.raises(ZeroDivisionError):
            async with session.begin_nested():
                session.add(Letter(name="b"))
                async with joint.uow_class(join=session) as uow:
                    await uow.files.put(text("Dear Bob", "b"))
                raise ZeroDivisionError
        async with session.begin_nested(), joint.uow_class(join=session) as uow:
            await uow.files.put(text("Dear Ann", "a"))
        await session.commit()
    await joint.check("a")


async def test_the_end_of_a_savepoint_around_the_block_is_not_missed(joint: Joint) -> None:
    if joint.engine.dialect.name == "sqlite":
        begins_itself(joint.engine)
    async with joint.session() as session, session.begin():
        session.add(Letter(name="a"))
        with pytest.raises(TransactionException, match="was rolled back inside the block"):
            async with session.begin_nested() as nested:
                session.add(Letter(name="b"))
                await session.flush()
                async with joint.uow_class(join=session) as uow:
                    await uow.files.put(text("Dear Bob", "b"))
                    await nested.rollback()
    assert await joint.files() == set()
    assert await joint.rows() == {"a"}


@pytest.mark.parametrize("fails", [False, True])
async def test_a_unit_of_work_inside_another_one_of_the_same_session_ends_with_it(
    joint: Joint, *, fails: bool
) -> None:
    """For instance if a function that joins the caller's session is called inside the caller's block."""
    names = () if fails else ("a", "b")
    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        async with joint.session() as session, joint.uow_class(join=session) as outer:
            session.add(Letter(name="a"))
            await outer.files.put(text("Dear Ann", "a"))
            async with joint.uow_class(join=session) as inner:
                session.add(Letter(name="b"))
                await inner.files.put(text("Dear Bob", "b"))
            assert await joint.rows() == set()
            if fails:
                raise ZeroDivisionError
    await joint.check(*names)


async def test_a_savepoint_inside_the_block_may_be_rolled_back(joint: Joint) -> None:
    if joint.engine.dialect.name == "sqlite":
        begins_itself(joint.engine)
    async with joint.session() as session, session.begin():
        session.add(Letter(name="b"))
    async with joint.session() as session, joint.uow_class(join=session) as uow:
        session.add(Letter(name="a"))
        await uow.files.put(text("Dear Ann", "a"), text("Dear Bob", "b"))
        with pytest.raises(IntegrityError):
            async with session.begin_nested():
                session.add(Letter(name="b"))
    await joint.check("a", "b")


async def test_a_savepoint_that_the_block_leaves_open_is_refused(joint: Joint) -> None:
    """It could be rolled back later, together with the files but without the earlier rows."""
    if joint.engine.dialect.name == "sqlite":
        begins_itself(joint.engine)
    async with joint.session() as session, session.begin():
        session.add(Letter(name="a"))
        await session.flush()
        with pytest.raises(TransactionException, match="is still open at its end"):
            async with joint.uow_class(join=session) as uow:
                nested = await session.begin_nested()
                await uow.files.put(text("Dear Bob", "b"))
        await nested.rollback()
    assert await joint.rows() == {"a"}
    assert await joint.files() == set()


async def test_a_savepoint_may_be_what_a_block_begins_with(joint: Joint) -> None:
    """Without a transaction around it the release of a savepoint is a commit on SQLite."""
    async with joint.session() as session:
        with pytest.raises(ZeroDivisionError):
            async with joint.uow_class(join=session) as uow:
                async with session.begin_nested():
                    session.add(Letter(name="a"))
                await uow.files.put(text("Dear Ann", "a"))
                raise ZeroDivisionError
    await joint.check()


async def test_the_transaction_after_a_commit_is_watched_too(joint: Joint) -> None:
    async with joint.session() as session:
        with pytest.raises(TransactionException, match="was rolled back inside the block"):
            async with joint.uow_class(join=session, auto_commit=False) as uow:
                session.add(Letter(name="a"))
                await uow.files.put(text("Dear Ann", "a"))
                await uow.commit()
                session.add(Letter(name="b"))
                await session.flush()
                await session.rollback()
                await uow.files.put(text("Dear Bob", "b"))
                await uow.commit()
        await session.rollback()  # without effect any more
    await joint.check("a")


async def test_what_cannot_begin_is_refused(joint: Joint) -> None:
    session = joint.new_session(joint.engine, autobegin=False)
    with pytest.raises(TransactionException, match="cannot be joined"):
        async with joint.uow_class(join=session):
            pytest.fail("it must not open")
    connection = await joint.engine.connect()
    await connection.close()
    with pytest.raises(TransactionException, match="cannot be joined"):
        async with joint.uow_class(join=connection):
            pytest.fail("it must not open")


@pytest.mark.parametrize("written_before", [False, True])
async def test_a_catalog_is_filled_before_a_joined_block_writes_to_the_database(
    request: pytest.FixtureRequest, strict: S3Server, *, written_before: bool
) -> None:
    """SQLite has one writer: once the user's own transaction has written, it cannot be filled."""
    site = await make_site("strict", "sqlite", request)
    async with raw_client(strict) as client:
        await client.put_object(Bucket=site.store.namespace, Key="old", Body=b"old")
    engine = create_async_engine(site.backend.url.get_secret_value())
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    uow_class = site.uow_class
    async with AsyncExitStack() as stack, asyncio.timeout(60):
        if written_before:  # then the lifespan has done it
            await stack.enter_async_context(uow_class.lifespan())
        async with AsyncSession(engine) as session:
            if written_before:
                await session.begin()
                session.add(Letter(name="b"))
                await session.flush()
            async with uow_class(join=session) as uow:
                session.add(Letter(name="a"))
                await session.flush()
                await uow.files.put(text("Dear Ann", "a"))
                assert await uow.files.list() == ["a", "old"]
            await session.commit()
    await engine.dispose()


@pytest.mark.parametrize("tables", [False, True])
async def test_a_catalog_that_waits_for_the_users_own_transaction_names_the_way_out(
    request: pytest.FixtureRequest,
    strict: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    *,
    tables: bool,
) -> None:
    monkeypatch.setattr("fennflow_sqlalchemy.engines.SHORTEST_LOCK_WAIT", 0.3)
    site = await make_site("strict", "sqlite", request)
    site = replace(site, settings={**site.settings, "lock_timeout": 0.3})
    async with raw_client(strict) as client:
        await client.put_object(Bucket=site.store.namespace, Key="old", Body=b"old")
    engine = create_async_engine(site.backend.url.get_secret_value())
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    if tables:
        async with opened(site.backend):
            pass
    async with asyncio.timeout(60), AsyncSession(engine) as session, session.begin():
        session.add(Letter(name="a"))
        await session.flush()
        refused = RecordLockedException if tables else BackendUnavailableException
        with pytest.raises(refused) as caught:
            async with site.uow_class(join=session):
                pytest.fail("it must not open")
    assert "UOW.lifespan()" in "".join(caught.value.__notes__)
    async with site.uow_class() as uow:
        assert await uow.files.list() == ["old"]
    await engine.dispose()


async def test_a_session_inside_a_transaction_of_a_test_waits_for_it(joint: Joint) -> None:
    """Test suites join sessions to a transaction that they roll back: a commit ends a savepoint."""
    if joint.engine.dialect.name == "sqlite":
        begins_itself(joint.engine)
    async with joint.engine.connect() as connection:
        transaction = await connection.begin()
        session = joint.new_session(connection, join_transaction_mode="create_savepoint")
        async with joint.uow_class(join=session) as uow:
            session.add(Letter(name="a"))
            await uow.files.put(text("Dear Ann", "a"))
        await session.close()
        await transaction.rollback()
    await joint.check()


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
async def test_a_snapshot_from_before_the_journal_rows_does_not_matter(
    level: str, joint: Joint
) -> None:
    if joint.engine.dialect.name == "sqlite":
        level = "SERIALIZABLE"
    async with joint.session() as session:
        await session.connection(execution_options={"isolation_level": level})
        await session.execute(sql("SELECT * FROM letters"))
        async with joint.uow_class() as uow:
            await uow.files.put(text("of others", "b"))
        async with joint.uow_class(join=session) as uow:
            session.add(Letter(name="a"))
            await uow.files.put(text("Dear Ann", "a"))
            assert set(await uow.files.list()) == {"a", "b"}
    assert await joint.files() == {"a", "b"}
    assert await joint.rows() == {"a"}


async def test_an_overwrite_that_a_snapshot_cannot_see_is_a_conflict(
    request: pytest.FixtureRequest, strict: S3Server
) -> None:
    del strict
    async with jointly("postgresql", request) as joint:
        async with joint.uow_class() as uow:
            await uow.files.put(text("1", "a"))
        async with joint.session() as session:
            await session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
            await session.execute(sql("SELECT * FROM letters"))
            async with joint.uow_class() as uow:
                await uow.files.put(text("2", "a"))
            await joint.finished()
            with pytest.raises(ConflictException, match="again"):
                async with joint.uow_class(join=session) as uow:
                    session.add(Letter(name="a"))
                    await uow.files.put(text("3", "a"))
        assert await joint.rows() == set()
        assert await joint.files() == {"a"}
        async with joint.uow_class() as uow:
            assert (await uow.files.get("a")).one().data == b"2"


@pytest.mark.parametrize("managed_by_caller", [False, True])
async def test_reads_are_validated_beyond_the_snapshot(
    joint: Joint, *, managed_by_caller: bool
) -> None:
    strict = replace(joint.site, settings={**joint.site.settings, "validate_reads": True})
    async with joint.uow_class() as uow:
        await uow.files.put(text("1", "a"))
    await joint.finished()
    level = "SERIALIZABLE" if joint.engine.dialect.name == "sqlite" else "REPEATABLE READ"

    async def run(session: AsyncSession) -> None:
        await session.execute(sql("SELECT * FROM letters"))
        async with joint.units(strict)(join=session) as uow:
            await uow.files.get("a")
            async with joint.uow_class() as other:
                await other.files.put(text("2", "a"))
            session.add(Letter(name="b"))

    async with joint.session() as session:
        await session.connection(execution_options={"isolation_level": level})
        with pytest.raises(ConflictException):
            if managed_by_caller:
                await session.rollback()
                async with session.begin():
                    await run(session)
            else:
                await run(session)
    assert await joint.rows() == set()


async def test_what_cannot_be_joined_is_refused_at_once(
    async_joint: Joint, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(ConfigException, match="AsyncSession"):
        async with async_joint.uow_class(join=object()):
            pytest.fail("it must not open")
    with pytest.raises(ConfigException, match="SqlalchemyBackendConfig"):
        async with UnitOfWork(join=object()):
            pytest.fail("it must not open")
    directory = request.getfixturevalue("tmp_path")
    elsewhere = create_async_engine(f"sqlite+aiosqlite:///{directory}/elsewhere.db")
    async with AsyncSession(elsewhere) as session:
        with pytest.raises(ConfigException, match="two databases"):
            async with async_joint.uow_class(join=session):
                pytest.fail("it must not open")
    await elsewhere.dispose()


async def test_autocommit_is_refused(joint: Joint) -> None:
    async with joint.engine.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        with pytest.raises(TransactionException, match="AUTOCOMMIT"):
            async with joint.uow_class(join=connection) as uow:
                await uow.files.put(text("Dear Ann", "a"))
    await joint.check()


async def test_a_pivot_that_fails_cannot_be_committed_by_going_on(
    joint: Joint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the user swallows the exception inside a surrounding transaction."""
    from fennflow_sqlalchemy import rows

    def broken(_: object) -> str:
        raise ZeroDivisionError

    with pytest.raises(InvalidRequestError):
        async with joint.session() as session, session.begin():
            session.add(Letter(name="a"))
            try:
                async with joint.uow_class(join=session) as uow:
                    await uow.files.put(text("Dear Ann", "a"))
                    monkeypatch.setattr("fennflow_sqlalchemy.backend.record_rows", broken)
            except ZeroDivisionError:
                monkeypatch.setattr("fennflow_sqlalchemy.backend.record_rows", rows.record_rows)
            await session.execute(sql("SELECT 1"))
    await joint.check()


async def test_two_joined_sessions_write_one_path_one_after_the_other(joint: Joint) -> None:
    brief = replace(joint.site, settings={**joint.site.settings, "lock_timeout": 0.2})
    async with joint.session() as first, first.begin():
        async with joint.uow_class(join=first) as uow:
            await uow.files.put(text("1", "a"))
        with pytest.raises(RecordLockedException):
            async with joint.session() as second, joint.units(brief)(join=second) as uow:
                await uow.files.put(text("2", "a"))
    assert await joint.files() == {"a"}


@pytest.fixture
def brief(joint: Joint, monkeypatch: pytest.MonkeyPatch) -> Site:
    """Return the site with a process that does not wait for long."""
    monkeypatch.setattr("fennflow_sqlalchemy.engines.SHORTEST_LOCK_WAIT", 0.3)
    monkeypatch.setattr("fennflow_sqlalchemy.backend.LOCK_WAIT", 0.3)
    return replace(joint.site, settings={**joint.site.settings, "lock_timeout": 0.3})


async def test_a_commit_inside_a_transaction_that_waits_for_it_ends_with_an_error(
    joint: Joint, brief: Site
) -> None:
    """On PostgreSQL it reads a row that the surrounding transaction writes; on SQLite it writes."""
    strict = replace(brief, settings={**brief.settings, "validate_reads": True})
    async with strict.uow_class.lifespan(), joint.session() as session, session.begin():
        async with joint.units(strict)(join=session) as uow:
            session.add(Letter(name="a"))
            await uow.files.put(text("Dear Ann", "a"))
        async with asyncio.timeout(60):
            with pytest.raises((ConflictException, RecordLockedException), match="othing"):
                async with strict.uow_class() as uow:
                    assert not await uow.files.exists("a")
                    await uow.files.put(text("Dear Bob", "b"))
    await joint.check("a")


async def test_a_joined_block_waits_for_no_other_transaction_without_limit(
    joint: Joint, brief: Site
) -> None:
    async with brief.uow_class.lifespan():
        async with joint.uow_class() as uow:
            await uow.files.put(text("1", "a"))
        await joint.finished()
        records = make_tables(brief.backend.table_prefix, brief.backend.schema_name)[1].records
        change = update(records).values(etag=records.c.etag)
        async with joint.engine.connect() as other, asyncio.timeout(60):
            await other.execute(change)
            with pytest.raises(RecordLockedException, match="nothing was committed"):
                async with joint.session() as session, joint.units(brief)(join=session) as uow:
                    await uow.files.put(text("2", "a"))
                    session.add(Letter(name="b"))
        await brief.uow_class.recover()
        await joint.finished()
        assert await joint.rows() == set()
        async with joint.uow_class() as uow:
            assert (await uow.files.get("a")).one().data == b"1"
            assert await uow.files.list() == ["a"]


async def test_what_failed_in_the_joined_transaction_is_named(
    request: pytest.FixtureRequest, strict: S3Server
) -> None:
    """PostgreSQL refuses every statement after a failed one, even if its error was caught."""
    del strict
    async with jointly("postgresql", request) as joint, joint.session() as session:
        with pytest.raises(TransactionException, match="failed before"):
            async with joint.uow_class(join=session) as uow:
                await uow.files.put(text("Dear Ann", "a"))
                with suppress(DBAPIError):
                    await session.execute(sql("SELECT * FROM nowhere"))
        await joint.check()


async def test_the_users_own_patience_is_set_again(
    request: pytest.FixtureRequest, strict: S3Server
) -> None:
    del strict
    async with jointly("postgresql", request) as joint:
        async with joint.session() as session, session.begin():
            await session.execute(sql("SET LOCAL lock_timeout = '7s'"))
            async with joint.uow_class(join=session) as uow:
                await uow.files.put(text("Dear Ann", "a"))
                session.add(Letter(name="a"))
            assert await session.scalar(sql("SHOW lock_timeout")) == "7s"
        await joint.check("a")


async def test_joined_commits_are_in_the_feed_and_those_that_were_rolled_back_are_not(
    joint: Joint,
) -> None:
    """P38."""
    start = await joint.site.uow_class.commit_cursor()
    for name in "ab":
        async with joint.session() as session, joint.uow_class(join=session) as uow:
            session.add(Letter(name=name))
            await uow.files.put(text("1", name))
    async with joint.session() as session:
        with pytest.raises(ZeroDivisionError):
            async with session.begin():
                async with joint.uow_class(join=session) as uow:
                    session.add(Letter(name="c"))
                    await uow.files.put(text("1", "c"))
                raise ZeroDivisionError  # the pivot was written
    await joint.finished()
    found = [each async for each in joint.site.uow_class.commits(after=start)]
    assert [[str(file.path) for file in each.records] for each in found] == [["a"], ["b"]]


@pytest.mark.parametrize("read_between", [True, False])
async def test_the_feed_passes_over_no_commit_that_becomes_visible_late(
    request: pytest.FixtureRequest, *, read_between: bool
) -> None:
    """P38: on PostgreSQL, sequence numbers are not in the order in which transactions commit."""
    async with jointly("postgresql", request, store="memory") as joint:
        cursor = await joint.uow_class.commit_cursor()
        seen: list[tuple[str, int]] = []

        async def read() -> None:
            nonlocal cursor
            async for commit in joint.uow_class.commits(after=cursor):
                cursor = commit.cursor
                seen.extend((str(file.path), file.size) for file in commit.records)

        async with joint.session() as early, joint.session() as late, late.begin():
            # Both have a transaction id before anything of the feed is written.
            late.add(Letter(name="late"))
            await late.flush()
            early.add(Letter(name="early"))
            await early.flush()
            async with joint.uow_class() as uow:
                await uow.files.put(text("1", "same"))
            async with joint.uow_class(join=late) as uow:
                await uow.files.put(text("22", "late"))
            async with joint.uow_class() as uow:
                await uow.files.put(text("1", "other"))
            if read_between:
                await read()
                assert seen == [("same", 1), ("other", 1)]
            async with joint.uow_class(join=early) as uow:
                await uow.files.put(text("333", "same"))
            if read_between:
                await read()
                assert seen[2:] == [("same", 3)]
        await read()
        assert sorted(seen) == [("late", 2), ("other", 1), ("same", 1), ("same", 3)]
        assert seen.index(("same", 1)) < seen.index(("same", 3))
        assert seen[-1] == ("late", 2) or not read_between
        second = [
            (str(file.path), file.size)
            async for commit in joint.uow_class.commits()
            for file in commit.records
        ]
        assert second == seen
