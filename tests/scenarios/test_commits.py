"""`UOW.commits()` on every backend (P38)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import event

from crashing import Site, make_site, text
from fennflow import ConfigDict, UnitOfWork
from fennflow.backends import (
    Backend,
    BucketBackendConfig,
    InMemoryBackendConfig,
    SqlalchemyBackendConfig,
)
from fennflow.connectors import InMemoryConnectorConfig
from fennflow.exceptions import ConfigException, CursorException
from fennflow.reports import CommitInfo
from fennflow.repositories import CrudRepository, RepoField
from fennflow.sync import SyncUnitOfWork
from fennflow.testing import PostgresqlServer
from fennflow.testing.backend_values import A, B, opened, put
from fennflow.testing.feed_suite import follow, ids
from fennflow_sqlalchemy.backend import SqlalchemyBackend
from fennflow_sqlalchemy.engines import Postgresql
from stores import numbers

BACKENDS = ["memory", "sqlite", "postgresql", "bucket"]


async def site_of(database: str, request: pytest.FixtureRequest) -> Site:
    if database != "memory":
        return await make_site("memory", database, request)
    store = InMemoryConnectorConfig(name=f"f{next(numbers)}")
    return Site(store, "bucket", InMemoryBackendConfig(name=store.name))


async def rest(uow_class: type[UnitOfWork], after: str | None = None) -> list[CommitInfo]:
    return [commit async for commit in uow_class.commits(after=after)]


def changes(found: list[CommitInfo]) -> list[tuple[list[str], list[str]]]:
    return [
        ([str(file.path) for file in each.records], [str(file.path) for file in each.deletions])
        for each in found
    ]


@pytest.mark.parametrize("database", BACKENDS)
async def test_the_feed_has_what_units_of_work_committed(
    database: str, request: pytest.FixtureRequest
) -> None:
    site = await site_of(database, request)
    uow_class = site.uow_class
    start = await uow_class.commit_cursor()
    assert await rest(uow_class, start) == []
    async with uow_class() as uow:
        await uow.files.put(text("1", "a"), text("1", "b"))
    with pytest.raises(ZeroDivisionError):
        async with uow_class() as uow:
            await uow.files.put(text("2", "c"))
            raise ZeroDivisionError
    async with uow_class() as uow:
        await uow.files.get("a")
    async with uow_class() as uow:
        await uow.files.put(text("22", "a"))
        await uow.files.delete("b")
        await uow.commit()
        await uow.files.put(text("3", "d"))
    found = await rest(uow_class, start)
    assert changes(found) == [(["a", "b"], []), (["a"], ["b"]), (["d"], [])]
    file = found[1].records[0]
    assert (file.namespace, file.size, file.media_type) == (site.namespace, 2, "text/plain")
    assert file.sha256 is not None
    assert file.created_at < file.modified_at
    assert len({each.transaction_id for each in found}) == 3
    for number, commit in enumerate(found, 1):
        assert await rest(uow_class, commit.cursor) == found[number:]
    assert found == await rest(uow_class)
    assert await uow_class.commit_cursor() == found[-1].cursor or database == "bucket"


@pytest.mark.parametrize("database", ["memory", "sqlite", "postgresql"])
async def test_what_another_process_decides_is_in_the_feed_once_it_is_committed(
    database: str, request: pytest.FixtureRequest
) -> None:
    uow_class = (await site_of(database, request)).uow_class
    async with uow_class() as uow:
        await uow.files.put(text("1", "a"))
        held = await uow.hold()
    async with uow_class() as uow:
        await uow.files.put(text("1", "b"))
    [first] = await rest(uow_class)
    await uow_class.commit_held(held)
    assert changes(await rest(uow_class, first.cursor)) == [(["a"], [])]


async def test_a_reader_that_looks_again_sees_what_is_committed_later() -> None:
    class UOW(UnitOfWork):
        files = RepoField(CrudRepository, namespace="bucket")
        config = ConfigDict(backend=InMemoryBackendConfig(name=f"poll{next(numbers)}"))

    seen: list[str] = []
    came = asyncio.Event()

    async def read() -> None:
        async for commit in UOW.commits(poll=0.001):
            seen.extend(str(file.path) for file in commit.records)
            came.set()
            if "b" in seen:
                return

    async with asyncio.TaskGroup() as group:
        reading = group.create_task(read())
        async with UOW() as uow:
            await uow.files.put(text("1", "a"))
        await came.wait()
        async with UOW() as uow:
            await uow.files.put(text("1", "b"))
        await reading
    assert seen == ["a", "b"]


async def test_a_place_is_known_in_a_process_whose_reads_may_be_old() -> None:
    """`max_staleness` is for reads of files: a cursor of another process may be newer."""
    backend = BucketBackendConfig(namespace="bucket", max_staleness=60.0)
    store = InMemoryConnectorConfig(name=f"f{next(numbers)}")
    async with opened(backend, connector=store) as one, opened(backend, connector=store) as other:
        for key in (A, B):
            await put(one, key)
        newest = [each.cursor for each in await one.commits(after=None, limit=10)][-1]
        assert await other.commits(after=newest, limit=10) == []
        await put(one, A)
        assert await other.commit_cursor() == await one.commit_cursor()


def test_code_without_async_iterates_too() -> None:
    class UOW(SyncUnitOfWork):
        files = RepoField(CrudRepository, namespace="bucket")
        config = ConfigDict(backend=InMemoryBackendConfig(name=f"sync{next(numbers)}"))

    start = UOW.commit_cursor()
    for name in "ab":
        with UOW() as uow:
            uow.files.put(text("1", name))
    assert changes(list(UOW.commits(after=start))) == [(["a"], []), (["b"], [])]
    for commit in UOW.commits(after=start, poll=1000.0):
        assert changes([commit]) == [(["a"], [])]  # it does not wait until there are more
        break


@pytest.mark.parametrize("arguments", [{"after": 3}, {"poll": 0}, {"poll": -1.0}, {"poll": "soon"}])
async def test_arguments_that_cannot_be_are_refused_at_once(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigException, match=next(iter(arguments))):
        UnitOfWork.commits(**arguments)


@pytest.mark.parametrize("cursor", ["", " ", "garbage", "-1.a", "1", ".a", "1.a\n", "9" * 60])
def test_what_cannot_be_a_cursor_is_refused_before_anything_is_opened(cursor: str) -> None:
    with pytest.raises(CursorException, match="is not a cursor") as caught:
        UnitOfWork.commits(after=cursor)
    assert "commit_retention" not in str(caught.value)


async def test_a_backend_without_a_feed_says_so() -> None:
    async with opened(InMemoryBackendConfig()) as backend:
        with pytest.raises(ConfigException, match="keeps no feed of commits"):
            await Backend.commits(backend, after=None, limit=1)
        with pytest.raises(ConfigException, match="keeps no feed of commits"):
            await Backend.commit_cursor(backend)


async def test_memory_keeps_the_last_commits() -> None:
    async with opened(InMemoryBackendConfig(name=f"last{next(numbers)}")) as backend:
        start = await backend.commit_cursor()
        made = [(await put(backend, A)).transaction_id for _ in range(1001)]
        assert ids(await follow(backend, limit=300)) == made[1:]
        with pytest.raises(CursorException):
            await backend.commits(after=start, limit=1)


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
async def test_a_reader_is_refused_only_if_commits_behind_its_cursor_were_removed(
    database: str, request: pytest.FixtureRequest
) -> None:
    site = await site_of(database, request)
    uow_class = site.uow_class
    cursors = [await uow_class.commit_cursor()]
    for name in "abc":
        async with uow_class() as uow:
            await uow.files.put(text("1", name))
        cursors.append(await uow_class.commit_cursor())
    # All are old, and the last one was never followed by another.
    await site.sql("UPDATE {}commits SET committed_at = 1")
    async with opened(site.backend) as backend:
        assert isinstance(backend, SqlalchemyBackend)
        await backend._feed.forget(5.0)
    assert await rest(uow_class, cursors[3]) == []
    for cursor in cursors[:3]:
        with pytest.raises(CursorException, match="commit_retention"):
            await rest(uow_class, cursor)
    async with uow_class() as uow:
        await uow.files.put(text("1", "d"))
    assert changes(await rest(uow_class, cursors[3])) == [(["d"], [])]
    assert changes(await rest(uow_class)) == [(["c"], []), (["d"], [])]


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
async def test_a_commit_that_took_long_does_not_take_those_before_it_along(
    database: str, request: pytest.FixtureRequest
) -> None:
    """Its time is that of the pivot, and a user's transaction may have been open for days."""
    site = await site_of(database, request)
    uow_class = site.uow_class
    cursors = [await uow_class.commit_cursor()]
    for name in "abc":
        async with uow_class() as uow:
            await uow.files.put(text("1", name))
        cursors.append(await uow_class.commit_cursor())
    await site.sql("UPDATE {}commits SET committed_at = 1 WHERE position <> 2")
    async with opened(site.backend) as backend:
        assert isinstance(backend, SqlalchemyBackend)
        await backend._feed.forget(5.0)
    assert changes(await rest(uow_class, cursors[1])) == [(["b"], []), (["c"], [])]
    assert changes(await rest(uow_class)) == [(["a"], []), (["b"], []), (["c"], [])]


async def test_commits_without_a_reader_are_removed_too(postgresql: PostgresqlServer) -> None:
    """On PostgreSQL readers give commits their places; without readers, the clean-up does."""
    config = SqlalchemyBackendConfig(
        url=postgresql.url, table_prefix=f"f{next(numbers)}_", commit_retention=0.001
    )
    async with opened(config) as backend:
        await put(backend, A)
        await put(backend, B)
        last = await put(backend, A)
        await backend.claim(1)
        assert ids(await follow(backend)) == [last.transaction_id]


async def test_the_feed_costs_a_commit_on_postgresql_no_statement(
    postgresql: PostgresqlServer,
) -> None:
    """One statement writes the outcome and the entry of the feed."""
    config = SqlalchemyBackendConfig(url=postgresql.url, table_prefix=f"f{next(numbers)}_")
    statements: list[str] = []

    def note(*arguments: Any) -> None:
        statements.append(arguments[2])

    async with opened(config) as backend:
        assert isinstance(backend, SqlalchemyBackend)
        assert isinstance(backend._catalog, Postgresql)
        engine: sqlalchemy.Engine = backend._catalog.engine.sync_engine
        event.listen(engine, "before_cursor_execute", note)
        await put(backend, A)
    feeding = [each for each in statements if "commits" in each]
    assert len(feeding) == 1
    assert "outcomes" in feeding[0]
