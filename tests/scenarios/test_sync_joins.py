"""Properties of files and rows in one transaction without `async` (P5).

Everything else is in `test_join.py`, which tests both.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from dataclasses import dataclass

import pytest
from sqlalchemy import Engine, create_engine, event
from sqlalchemy import text as sql
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session
from sqlalchemy.orm import sessionmaker as make_sessions

from crashing import Site, make_site, text
from fennflow.backends import SqlalchemyBackendConfig
from fennflow.exceptions import (
    ConfigException,
    ConflictException,
    RecordLockedException,
    TransactionException,
)
from fennflow.sync.portal import close
from fennflow.testing import S3Server
from stores import FullUOW

DRIVERS = {"pysqlite": "sqlite", "psycopg": "postgresql", "psycopg2": "postgresql"}


class Base(DeclarativeBase):
    pass


class Letter(Base):
    __tablename__ = "letters"
    name: Mapped[str] = mapped_column(primary_key=True)


@dataclass
class Joint:
    """A store, a database with FennFlow's tables and the user's, and the user's engine."""

    site: Site
    engine: Engine
    uow_class: type[FullUOW]

    def session(self) -> Session:
        return Session(self.engine, expire_on_commit=False)

    def rows(self) -> set[str]:
        with self.engine.connect() as connection:
            return set(connection.execute(sql("SELECT name FROM letters")).scalars())

    def finished(self) -> None:
        pause = threading.Event()
        for _ in range(400):
            if not self.uow_class.sync().transactions():
                return
            pause.wait(0.05)
        pytest.fail(f"not finished: {self.uow_class.sync().transactions()}")

    def check(self, *names: str) -> None:
        """Check that these are the rows, the records and the objects."""
        self.finished()
        assert self.rows() == set(names)
        assert set(asyncio.run(self.site.store.objects())) == set(names)
        with self.uow_class.sync() as uow:
            assert set(map(str, uow.files.list())) == set(names)


def url_for(site: Site, driver: str) -> str:
    url = make_url(site.backend.url.get_secret_value())
    url = url.set(drivername=f"{DRIVERS[driver]}+{driver}")
    return url.render_as_string(hide_password=False)


@pytest.fixture(params=list(DRIVERS))
async def joint(request: pytest.FixtureRequest, moto: S3Server) -> AsyncGenerator[Joint]:
    del moto
    site = await make_site("moto", DRIVERS[request.param], request)
    url = url_for(site, request.param)
    # The backend uses the URL of the user's engine, too.
    backend = site.backend.model_copy(update={"url": SqlalchemyBackendConfig(url=url).url})
    site = Site(site.connector, site.namespace, backend, site.settings)
    engine = create_engine(url)
    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)

    def begin() -> None:
        with site.uow_class.sync().lifespan():
            pass

    await asyncio.to_thread(begin)
    yield Joint(site, engine, site.uow_class)
    engine.dispose()
    close()


def test_rows_and_files_commit_with_the_block(joint: Joint) -> None:
    threads: set[threading.Thread] = set()
    event.listen(
        joint.engine, "before_cursor_execute", lambda *_: threads.add(threading.current_thread())
    )
    with joint.session() as session:
        with joint.uow_class.sync(join=session) as uow:
            session.add(Letter(name="a"))
            uow.files.put(text("Dear Ann", "a"))
        assert not session.in_transaction()
    assert threads == {threading.current_thread()}
    joint.check("a")


def test_an_exception_undoes_rows_and_files(joint: Joint) -> None:
    with joint.session() as session:
        with pytest.raises(ZeroDivisionError), joint.uow_class.sync(join=session) as uow:
            session.add(Letter(name="a"))
            session.flush()
            uow.files.put(text("Dear Ann", "a"))
            raise ZeroDivisionError
        assert not session.in_transaction()
        with pytest.raises(KeyboardInterrupt), joint.uow_class.sync(join=session) as uow:
            session.add(Letter(name="a"))
            uow.files.put(text("Dear Ann", "a"))
            raise KeyboardInterrupt
    joint.check()


def test_a_surrounding_transaction_commits_both(joint: Joint) -> None:
    outcome = threading.Event()
    with joint.session() as session, session.begin():
        session.add(Letter(name="a"))
        session.flush()
        with joint.uow_class.sync(join=session) as uow:
            uow.files.put(text("Dear Ann", "a"))
            uow.on_commit(outcome.set)
            with pytest.raises(TransactionException, match="surrounds"):
                uow.commit()
        assert not outcome.is_set()
    assert outcome.wait(60)
    with joint.uow_class.sync() as uow:
        assert uow.files.get("a").one().data == b"Dear Ann"
    joint.check("a")


def test_connections_and_scoped_sessions_are_joined(joint: Joint) -> None:
    insert = sql("INSERT INTO letters VALUES (:name)")
    with joint.engine.connect() as connection:
        with joint.uow_class.sync(join=connection) as uow:
            connection.execute(insert, {"name": "a"})
            uow.files.put(text("1", "a"))
        assert not connection.in_transaction()
    with joint.engine.begin() as connection, joint.uow_class.sync(join=connection) as uow:
        connection.execute(insert, {"name": "b"})
        uow.files.put(text("2", "b"))
    joint.finished()
    sessions = scoped_session(make_sessions(joint.engine))
    with joint.uow_class.sync(join=sessions) as uow:
        sessions.add(Letter(name="c"))
        uow.files.put(text("3", "c"))
    sessions.remove()
    joint.check("a", "b", "c")


def test_what_others_commit_meanwhile_is_a_conflict(joint: Joint) -> None:
    """Each driver has another name for PostgreSQL's error codes; SQLite keeps the file locked."""
    with joint.uow_class.sync() as uow:
        uow.files.put(text("1", "a"))
    level = "SERIALIZABLE" if joint.engine.dialect.name == "sqlite" else "REPEATABLE READ"
    engine = joint.engine.execution_options(isolation_level=level)
    with Session(engine) as session:
        with pytest.raises((ConflictException, RecordLockedException)):
            with joint.uow_class.sync(join=session) as uow:
                session.execute(sql("SELECT name FROM letters"))
                if joint.engine.dialect.name == "sqlite":
                    with joint.engine.connect() as other:
                        other.execute(sql("INSERT INTO letters VALUES ('b')"))
                        session.execute(sql("PRAGMA busy_timeout = 1"))
                        uow.files.put(text("2", "a"))
                        with pytest.raises(RecordLockedException) as caught:
                            uow.commit()
                    raise caught.value
                with joint.uow_class.sync() as other_uow:
                    other_uow.files.put(text("3", "a"))
                uow.files.put(text("2", "a"))
    joint.finished()


def test_what_is_of_the_other_kind_is_refused(joint: Joint) -> None:
    with joint.uow_class.sync(join=None):
        pass
    url = joint.site.backend.url.get_secret_value()

    async def refused() -> None:
        engine = create_async_engine(url)
        with joint.session() as session, pytest.raises(ConfigException, match="sync"):
            async with joint.uow_class(join=session):
                pytest.fail("joined")
        async with AsyncSession(engine) as session_of_asyncio:

            def join() -> None:
                with joint.uow_class.sync(join=session_of_asyncio):
                    pytest.fail("joined")

            with pytest.raises(ConfigException, match="async with"):
                await asyncio.to_thread(join)
        await engine.dispose()

    asyncio.run(refused())
