"""Processes that are killed, and the expected state after others have recovered."""

from __future__ import annotations

import asyncio
import importlib
import itertools
import math
import multiprocessing
import os
import random
import signal
import sqlite3
import sys
import time
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import aiosqlite
import asyncpg
import pytest
import sqlalchemy
import uvicorn
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from typing_extensions import override

import fennflow_bucket.backend
import fennflow_obstore.connector
import fennflow_s3.connector
import fennflow_sqlalchemy.backend
from fennflow.backends import BucketBackendConfig, SqlalchemyBackendConfig
from fennflow.config import ConnectorConfig
from fennflow.exceptions import (
    FennFlowException,
    RecordAlreadyExistsException,
    RecordLockedException,
)
from fennflow.files import TextContent
from fennflow.sync.portal import close
from fennflow.testing import Boundary, boundaries, killing
from fennflow.testing.backend_values import opened
from fennflow_bucket.backend import BucketBackend
from fennflow_bucket.clocks import SECOND
from fennflow_bucket.commands import Command
from fennflow_sqlalchemy.engines import open_databases
from stores import FullUOW, Store, make_store, numbers

# Imported once, in the server that forks.
__all__ = [
    "aiosqlite",
    "asyncpg",
    "fennflow_bucket",
    "fennflow_obstore",
    "fennflow_s3",
    "fennflow_sqlalchemy",
]

BEFORE = {"a": b"old a", "b": b"old b", "c": b"old c", "m": b"old m", "n": b"old n"}
FOREIGN = {"z": b"another writer's"}
AFTER = {
    "a": b"new a",
    "c": b"new c",
    "d": b"new d",
    "f": b"new f",
    "g": b"old m",
    "h": b"old n",
    "m": b"old m",
}


UNDONE = 0.2
SEED = os.environ["FENNFLOW_SEED"]
FULL = "FENNFLOW_THOROUGH" in os.environ


class StopError(Exception):
    """Ends a block."""


def text(value: str, name: str) -> TextContent:
    return TextContent.from_content(value, filename=name)


async def seed(uow_class: type[FullUOW], scope: str) -> None:
    async with uow_class() as uow:
        files = uow.files.at(scope)
        await files.put(*(text(body.decode(), key) for key, body in BEFORE.items()))


async def change(uow_class: type[FullUOW], scope: str, *, fails: bool) -> None:
    """Creates, overwrites, deletes, copies, a call that fails half way; and maybe an end by it."""
    async with uow_class() as uow:
        files = uow.files.at(scope)
        await files.put(text("new a", "a"), text("new d", "d"), text("new e", "e"))
        with suppress(RecordAlreadyExistsException):
            await files.create(text("mine", "y"), text("mine", "z"))
        await files.delete("b", "e")
        await files.delete("c")
        await files.put(text("new c", "c"))
        await files.create(text("new f", "f"))
        await files.copy("m", "g")
        await files.move("n", "h")
        if fails:
            raise StopError


@dataclass(frozen=True)
class Site:
    """A store and a database, for a child process."""

    connector: ConnectorConfig
    namespace: str
    backend: Any
    settings: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def store(self) -> Store:
        return Store(self.connector, self.namespace)

    @property
    def uow_class(self) -> type[FullUOW]:
        return self.store.uow(backend=self.backend, **self.settings)

    async def sql(self, *statements: str) -> list[Any]:
        """Run statements, `{}` being the prefix of the tables; return the first column of each."""

        def work(connection: sqlalchemy.Connection) -> list[Any]:
            found: list[Any] = []
            for statement in statements:
                named = statement.replace("{}", self.backend.table_prefix)
                with suppress(OperationalError):  # SQLite: a table of the other file
                    result = connection.execute(sqlalchemy.text(named))
                    found += result.scalars() if result.returns_rows else []
            return found

        found: list[Any] = []
        for database in open_databases(self.backend, lease_ttl=30.0):
            try:
                found += await database.run(work)
            finally:
                await database.aclose()
            if database.dialect == "postgresql":
                break
        return found

    async def expire(self) -> None:
        """Let all leases, late writes and kept locks run out."""
        await self.sql(
            "UPDATE {}transactions SET lease_until = 0",
            "UPDATE {}late_writes SET due_at = 0",
            "UPDATE {}locks SET kept_until = 0 WHERE kept_until IS NOT NULL",
            "UPDATE {}compensations SET lease_until = 0, due_at = 0",
            "UPDATE {}hooks SET lease_until = 0, due_at = 0",
        )

    async def recover(self) -> None:
        """Recover like another process after enough time has passed."""
        for _ in range(3):
            await self.expire()
            report = await self.uow_class.recover()
            assert report.pending == 0, report

    async def journal(self) -> dict[str, int]:
        """Return how many rows of each table of the journal there are, locks that ran out aside."""
        tables = {
            "transactions": "{}transactions",
            "intents": "{}intents",
            "locks": "{}locks WHERE kept_until IS NULL OR kept_until > 0",
            "late_writes": "{}late_writes",
        }
        return {
            name: (await self.sql(f"SELECT count(*) FROM {table}"))[0]
            for name, table in tables.items()
        }


@dataclass(frozen=True)
class BucketSite(Site):
    """A store that holds its own catalog."""

    @override
    async def expire(self) -> None:
        """Append an entry whose time is far ahead: the log's time is the latest of any entry."""
        async with opened(self.backend, connector=self.connector, **self.settings) as backend:
            assert isinstance(backend, BucketBackend)
            replica = backend._replica
            replica._probed = True
            replica._clock.sample(replica.now() / SECOND + 1000.0)
            await replica.run(Command("note", {"name": "time", "value": f"{replica.now()}"}))

    @override
    async def journal(self) -> dict[str, int]:
        async with opened(self.backend, connector=self.connector, **self.settings) as backend:
            assert isinstance(backend, BucketBackend)
            now = backend._replica.now()
            tables = {
                "transactions": "transactions",
                "intents": "intents",
                "locks": f"locks WHERE kept_until IS NULL OR kept_until > {now}",
                "late_writes": "late_writes",
            }

            def work(db: sqlite3.Connection) -> dict[str, int]:
                return {
                    name: db.execute(f"SELECT count(*) FROM {table}").fetchall()[0][0]
                    for name, table in tables.items()
                }

            return await backend._replica.read(work)


def catalog_aside(objects: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return objects without those of a catalog in the bucket."""
    return {key: body for key, body in objects.items() if not key.startswith(".fennflow/catalog/")}


async def check(site: Site, scopes: Mapping[str, Collection[Mapping[str, bytes]]]) -> None:
    """Check I1 to I5 in the raw bucket and the tables, and that the feed led there (P38).

    Args:
        site: after recovery.
        scopes: the possible results of each.
    """
    objects = catalog_aside(await site.store.objects())
    assert [key for key in objects if key.startswith(".fennflow")] == []
    async with site.uow_class() as uow:
        paths = [path async for path in uow.files.iter()]
        files = {str(file.path): file.data for file in await uow.files.get(*paths)}
    for scope, allowed in scopes.items():
        found = under(files, scope)
        assert found in allowed, f"{scope}: {sorted(found)}"
        assert under(objects, scope) == found | FOREIGN, scope
    followed: dict[str, int] = {}
    seen: list[str] = []
    async for commit in site.uow_class.commits():
        seen.append(commit.transaction_id)
        followed |= {str(each.path): each.size for each in commit.records}
        for deleted in commit.deletions:
            del followed[str(deleted.path)]
    assert len(seen) == len(set(seen))
    assert followed == {path: len(data) for path, data in files.items()}
    assert set(await site.journal()) == {"transactions", "intents", "locks", "late_writes"}
    assert set((await site.journal()).values()) == {0}, await site.journal()


def under(files: Mapping[str, bytes], scope: str) -> dict[str, bytes]:
    return {
        key.removeprefix(f"{scope}/"): body
        for key, body in files.items()
        if key.startswith(f"{scope}/")
    }


async def make_site(kind: str, database: str, request: pytest.FixtureRequest) -> Site:
    store = await make_store(kind, request)
    name = f"c{next(numbers)}"
    if database == "bucket":
        config = BucketBackendConfig(namespace=store.namespace)
        return BucketSite(store.config, store.namespace, config, {"late_write_period": 0.5})
    if database == "sqlite":
        directory = request.getfixturevalue("tmp_path")
        backend = SqlalchemyBackendConfig(url=f"sqlite:///{directory}/{name}.db")
    else:
        server = request.getfixturevalue("postgresql")
        backend = SqlalchemyBackendConfig(url=server.url, table_prefix=f"{name}_")
    # Nothing of a dead process arrives late at a server on this machine.
    return Site(store.config, store.namespace, backend, {"late_write_period": 0.5})


def run_until_killed(site: Site, scope: str, at: int, pipe: Connection, *, fails: bool) -> None:
    """Run `change`, killed at a boundary; report how many there were if it was not."""
    count = 0
    kill = killing(at=at)

    def reached(boundary: Boundary) -> None:
        nonlocal count
        count += 1
        kill(boundary)

    with boundaries(reached), suppress(StopError):
        asyncio.run(change(site.uow_class, scope, fails=fails))
    pipe.send(count)


def adopt_until_killed(site: Site, at: int, pipe: Connection) -> None:
    """Fill the empty catalog in a first call, killed at a boundary; report how many there were."""
    count = 0
    kill = killing(at=at)

    def reached(boundary: Boundary) -> None:
        nonlocal count
        count += 1
        kill(boundary)

    async def main() -> None:
        async with site.uow_class() as uow:
            await uow.files.list()

    with boundaries(reached):
        asyncio.run(main())
    pipe.send(count)


def use_beside(site: Site, folder: str, pipe: Connection) -> None:
    """Create, overwrite and delete files of a folder until asked to end; report the files."""
    there: dict[str, str] = {}

    async def main() -> None:
        async with site.uow_class.lifespan():
            for turn in itertools.count():
                name = f"{folder}/{turn % 7}"
                async with site.uow_class() as uow:
                    if turn % 3 == 2 and name in there:
                        await uow.files.delete(name)
                        del there[name]
                    else:
                        await uow.files.put(text(f"{turn}", name))
                        there[name] = f"{turn}"
                if turn == 0:
                    pipe.send("runs")
                if pipe.poll():
                    break

    asyncio.run(main())
    pipe.send(there)


def rows_of(site: Site) -> sqlalchemy.Table:
    """Return a table of the user's own, on the database of the catalog."""
    return sqlalchemy.Table(
        f"{site.backend.table_prefix}rows",
        sqlalchemy.MetaData(),
        sqlalchemy.Column("name", sqlalchemy.Text, primary_key=True),
        sqlalchemy.Column("value", sqlalchemy.Text),
    )


@asynccontextmanager
async def user_engine(site: Site) -> AsyncGenerator[AsyncEngine]:
    engine = create_async_engine(site.backend.url.get_secret_value())
    try:
        yield engine
    finally:
        await engine.dispose()


ROWS_BEFORE = {"a": "old a", "b": "old b"}
ROWS_AFTER = {"a": "new a", "d": "new d"}


async def seed_jointly(site: Site, *scopes: str) -> None:
    rows = rows_of(site)
    async with user_engine(site) as engine, AsyncSession(engine) as session:
        await (await session.connection()).run_sync(rows.metadata.create_all)
        for scope in scopes:
            async with site.uow_class(join=session) as uow:
                for name, value in ROWS_BEFORE.items():
                    await session.execute(rows.insert().values(name=f"{scope}/{name}", value=value))
                    await uow.files.put(text(value, f"{scope}/{name}"))


async def change_jointly(site: Site, scope: str, *, managed_by_caller: bool) -> None:
    """Create, overwrite and delete, rows and files in one transaction."""
    rows = rows_of(site)

    async def work(session: AsyncSession) -> None:
        old = rows.c.name == f"{scope}/a"
        async with site.uow_class(join=session) as uow:
            files = uow.files.at(scope)
            await files.put(text("new a", "a"))
            await session.execute(rows.update().where(old).values(value="new a"))
            await session.execute(rows.insert().values(name=f"{scope}/d", value="new d"))
            await files.put(text("new d", "d"))
            await session.execute(rows.delete().where(rows.c.name == f"{scope}/b"))
            await files.delete("b")

    async with user_engine(site) as engine, AsyncSession(engine) as session:
        if managed_by_caller:
            async with session.begin():
                await work(session)
        else:
            await work(session)


def change_jointly_by_thread(
    site: Site, scope: str, driver: str, *, managed_by_caller: bool
) -> None:
    """Like `change_jointly`, without `async` and on another driver."""
    rows = rows_of(site)
    url = sqlalchemy.make_url(site.backend.url.get_secret_value())
    engine = sqlalchemy.create_engine(url.set(drivername=f"{url.get_backend_name()}+{driver}"))

    def work(session: Session) -> None:
        old = rows.c.name == f"{scope}/a"
        with site.uow_class.sync(join=session) as uow:
            files = uow.files.at(scope)
            files.put(text("new a", "a"))
            session.execute(rows.update().where(old).values(value="new a"))
            session.execute(rows.insert().values(name=f"{scope}/d", value="new d"))
            files.put(text("new d", "d"))
            session.execute(rows.delete().where(rows.c.name == f"{scope}/b"))
            files.delete("b")

    with Session(engine) as session:
        if managed_by_caller:
            with session.begin():
                work(session)
        else:
            work(session)
    engine.dispose()
    close()


async def check_jointly(site: Site, scopes: Mapping[str, Collection[Mapping[str, str]]]) -> None:
    """Check that rows and files agree, and that the state is allowed."""
    rows = rows_of(site)
    async with user_engine(site) as engine, engine.connect() as connection:
        found = {row.name: row.value for row in await connection.execute(rows.select())}
    objects = {key: body.decode() for key, body in (await site.store.objects()).items()}
    assert objects == found
    for scope, allowed in scopes.items():
        prefix = f"{scope}/"
        own = {key.removeprefix(prefix): found[key] for key in found if key.startswith(prefix)}
        assert own in allowed, scope
    assert set((await site.journal()).values()) == {0}, await site.journal()


def run_jointly_until_killed(
    site: Site,
    scope: str,
    at: int,
    pipe: Connection,
    *,
    managed_by_caller: bool,
    driver: str | None = None,
) -> None:
    """Run `change_jointly`, killed at a boundary; report how many there were if it was not."""
    count = 0
    kill = killing(at=at)

    def reached(boundary: Boundary) -> None:
        nonlocal count
        count += 1
        kill(boundary)

    with boundaries(reached):
        if driver is None:
            asyncio.run(change_jointly(site, scope, managed_by_caller=managed_by_caller))
        else:
            change_jointly_by_thread(site, scope, driver, managed_by_caller=managed_by_caller)
    pipe.send(count)


def serve_until(at: Boundary, variables: Mapping[str, str], port: int, pipe: Connection) -> None:
    """Serve the example, and be killed at the first of such boundaries."""
    os.environ.update(variables)
    # It is next to the modules that it imports.
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    app = importlib.import_module("fastapi_app").app

    def reached(boundary: Boundary) -> None:
        if boundary == at:
            os.kill(os.getpid(), signal.SIGKILL)

    pipe.send("serves")
    with boundaries(reached):
        uvicorn.run(app, port=port, log_level="error")


def run_until_stopped(site: Site, scope: str, stop: Boundary, nth: int, pipe: Connection) -> None:
    """Run `change`, stopped by SIGSTOP at a boundary; report how it ended when it was woken."""
    left = nth

    def reached(boundary: Boundary) -> None:
        nonlocal left
        if boundary == stop:
            left -= 1
            if left == 0:
                pipe.send("stops")
                os.kill(os.getpid(), signal.SIGSTOP)

    async def main() -> None:
        async with site.uow_class.lifespan():
            await site.uow_class.recover()
            # What an engine does at first use is over: on SQLite, a process that stops in the middle
            # of a transaction stops all.
            await asyncio.sleep(0.3)
            with boundaries(reached):
                await change(site.uow_class, scope, fails=False)

    try:
        asyncio.run(main())
    except FennFlowException as error:
        pipe.send(type(error).__name__)
    else:
        pipe.send("committed")


def die(site: Site, key: str, at: Boundary, pipe: Connection) -> None:
    """Overwrite a key, and be killed at the first of such boundaries."""
    del pipe

    def reached(boundary: Boundary) -> None:
        if boundary == at:
            os.kill(os.getpid(), signal.SIGKILL)

    async def main() -> None:
        async with site.uow_class() as uow:
            await uow.files.put(text("new", key))

    with boundaries(reached):
        asyncio.run(main())


def recover(site: Site, pipe: Connection) -> None:
    """Recover once, when asked to."""
    pipe.recv()
    pipe.send(asyncio.run(site.uow_class.recover()))


class Event(NamedTuple):
    """What a worker reports of a transaction: when it began, and how and when it ended."""

    value: str
    keys: Sequence[int]
    begun: float
    ended: float
    outcome: str


def work(site: Site, worker: int, turns: range, keys: int, pipe: Connection) -> None:
    """Run transactions on keys that others write, too."""

    async def session(turn: int, choice: random.Random) -> None:
        chosen = choice.sample(range(keys), 3)
        value, begun = f"{worker}.{turn}", time.monotonic()
        pipe.send(Event(value, chosen, begun, math.inf, "unknown"))
        outcome = "committed"
        try:
            async with site.uow_class() as uow:
                await uow.files.put(*(text(value, f"k{key}") for key in chosen[:2]))
                await uow.files.put(text(value, f"k{chosen[2]}"))
                if choice.random() < UNDONE:
                    outcome = "undone"
                    await uow.rollback()
        except RecordLockedException:
            outcome = "locked"
        pipe.send(Event(value, chosen, begun, time.monotonic(), outcome))

    async def main() -> None:
        for turn in turns:
            await session(turn, random.Random(f"{worker} {turn}"))

    asyncio.run(main())


_context = multiprocessing.get_context("forkserver")


@cache
def _fork_server() -> None:
    """Start the process that has imported all, and forks; before 3.12 it knows no `sys.path`."""
    _context.set_forkserver_preload(["preloaded"])
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        forkserver.ensure_running()


def start(target: Callable[..., None], *args: Any, **kwargs: Any) -> tuple[BaseProcess, Connection]:
    """Start a process with one end of a pipe."""
    _fork_server()
    here, there = _context.Pipe()
    process = _context.Process(target=target, args=args, kwargs={"pipe": there, **kwargs})
    process.start()
    there.close()
    return process, here
