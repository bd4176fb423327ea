"""Costs that do not grow: SQL statements per call, database connections held, memory, pages."""

from __future__ import annotations

import asyncio
import re
import tracemalloc
from collections.abc import AsyncIterator, Generator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.pool import Pool
from typing_extensions import override

from crashing import make_site, text
from fennflow import ReconcileConfig
from fennflow.backends import ObjectKey, SqlalchemyBackendConfig
from fennflow.connectors import InMemoryConnectorConfig, Location, StoredObject
from fennflow.engine.transaction import Transaction
from fennflow.reports import ReconcileReport
from fennflow.testing import S3Request, S3Server
from fennflow_memory.connector import InMemoryConnector
from fennflow_sqlalchemy.engines import open_databases
from stores import Store, numbers

DATABASES = ["sqlite", "postgresql"]
QUIET = {"lease_ttl": 3600.0, "recovery_interval": 3600.0}
"""Settings with which nothing in the background executes statements while they are counted."""
CALLS = ("create", "overwrite", "copy", "stat", "delete", "rollback")


@contextmanager
def counted() -> Generator[list[str]]:
    """Collect the SQL statements that are executed inside the block."""
    seen: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        seen.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        event.remove(Engine, "before_cursor_execute", note)


def backend_of(database: str, request: pytest.FixtureRequest) -> SqlalchemyBackendConfig:
    name = f"s{next(numbers)}"
    if database == "sqlite":
        directory = request.getfixturevalue("tmp_path")
        return SqlalchemyBackendConfig(url=f"sqlite:///{directory}/{name}.db")
    server = request.getfixturevalue("postgresql")
    return SqlalchemyBackendConfig(url=server.url, table_prefix=f"{name}_")


@pytest.mark.parametrize("database", DATABASES)
async def test_a_call_with_a_thousand_files_is_as_many_statements_as_one(
    database: str, request: pytest.FixtureRequest
) -> None:
    store = Store(InMemoryConnectorConfig(name=f"m{next(numbers)}"), "bucket")
    uow_class = store.uow(backend=backend_of(database, request), **QUIET)

    async def costs(files: int) -> dict[str, int]:
        names = [f"{files}/{number}" for number in range(files)]
        found: dict[str, int] = {}
        for call in CALLS:
            with counted() as seen:
                async with uow_class(auto_commit=call != "rollback") as uow:
                    if call in {"create", "overwrite", "rollback"}:
                        await uow.files.put(*(text(call, name) for name in names))
                    elif call == "copy":
                        await uow.files.copy(names[0], f"{files}/copy")
                    elif call == "stat":
                        await uow.files.stat(*names)
                    else:
                        await uow.files.delete(*names)
            found[call] = len(seen)
        return found

    async with uow_class.lifespan():
        await uow_class.recover()
        await costs(2)  # the first use of the bucket reconciles it
        one, thousand = await costs(1), await costs(1000)
    assert one == thousand
    assert one["stat"] <= 2
    assert max(one.values()) < 40


ROUND_TRIPS = {"create": 10, "stat": 1, "list": 1, "overwrite": 18, "delete": 13, "rollback": 13}
"""Of a unit of work with one file, on connections that have prepared its statements."""


async def test_a_unit_of_work_is_few_round_trips_to_postgresql(
    request: pytest.FixtureRequest,
) -> None:
    store = Store(InMemoryConnectorConfig(name=f"m{next(numbers)}"), "bucket")
    ends: list[str] = []

    def watch(connection: Any, _record: object) -> None:
        # It logs BEGIN and COMMIT, but not prepared statements.
        connection.driver_connection.add_query_logger(lambda each: ends.append(each.query))

    async def costs(name: str) -> dict[str, int]:
        found: dict[str, int] = {}
        for call in ROUND_TRIPS:
            ends.clear()
            with counted() as statements:
                await use(call, name)
            found[call] = len(ends) + len(statements)
        return found

    async def use(call: str, name: str) -> None:
        async with uow_class(auto_commit=call != "rollback") as uow:
            if call in {"create", "overwrite"}:
                await uow.files.put(text(call, name))
            elif call == "rollback":
                await uow.files.put(text(call, f"{name}/{call}"))
            elif call == "stat":
                await uow.files.stat(name)
            elif call == "list":
                await uow.files.list(name)
            else:
                await uow.files.delete(name)

    event.listen(Pool, "connect", watch)
    try:
        backend = backend_of("postgresql", request).model_copy(update={"pool_size": 1})
        uow_class = store.uow(backend=backend, **QUIET)
        async with uow_class.lifespan():
            await uow_class.recover()
            await costs("first")
            found = await costs("a")
    finally:
        event.remove(Pool, "connect", watch)
    assert found == ROUND_TRIPS


@pytest.mark.parametrize("database", DATABASES)
async def test_no_connection_is_held_while_the_store_is_waited_for(
    database: str, request: pytest.FixtureRequest, moto: S3Server
) -> None:
    site = await make_site("moto", database, request)
    out: set[int] = set()
    held: list[int] = []

    def check_out(connection: Any, *_: Any) -> None:
        out.add(id(connection))

    def check_in(connection: Any, *_: Any) -> None:
        out.discard(id(connection))

    def look(request: S3Request) -> None:
        if request.operation != "LIST":  # a sweep in the background
            held.append(len(out))

    async with site.uow_class.lifespan():
        async with site.uow_class() as uow:
            await uow.files.put(text("old", "a"))
        event.listen(Pool, "checkout", check_out)
        event.listen(Pool, "checkin", check_in)
        try:
            with moto.failing(look):
                async with site.uow_class() as uow:
                    await uow.files.put(text("new", "a"), text("new", "b"))
                    await uow.files.get("a")
        finally:
            event.remove(Pool, "checkout", check_out)
            event.remove(Pool, "checkin", check_in)
    assert set(held) == {0}
    assert len(held) >= 4


async def test_more_units_of_work_than_connections_take_turns(
    request: pytest.FixtureRequest, moto: S3Server
) -> None:
    site = await make_site("moto", "postgresql", request)
    narrow = site.backend.model_copy(update={"pool_size": 1})
    uow_class = site.store.uow(backend=narrow, **site.settings)

    async def put(number: int) -> None:
        async with uow_class() as uow:
            await uow.files.put(text("new", f"{number}"))

    with moto.delayed(0.1):
        async with asyncio.timeout(100), asyncio.TaskGroup() as group:
            for number in range(40):
                group.create_task(put(number))
    async with uow_class() as uow:
        assert len(await uow.files.list()) == 40


MILLION = 1_000_000
FILL = {
    # What is the same in all rows follows once, from another row.
    "sqlite": """
        WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {count})
        INSERT INTO {table} SELECT namespace, printf('%s/%07d', i % 10, i),
        printf('%s/%07d', i % 10, i), {rest} FROM n, {table} WHERE key = 'model'""",
    "postgresql": """
        INSERT INTO {table} SELECT namespace, (i % 10) || '/' || lpad(i::text, 7, '0'),
        (i % 10) || '/' || lpad(i::text, 7, '0'), {rest}
        FROM generate_series(1, {count}) AS n(i), {table} WHERE key = 'model'""",
}


async def fill(config: SqlalchemyBackendConfig, database: str, count: int) -> None:
    """Give a catalog so many records in ten folders, all like that of `model`."""
    catalog, journal = open_databases(config, lease_ttl=60.0)
    table = f"{config.table_prefix}records"

    def work(connection: sqlalchemy.Connection) -> None:
        statement = FILL[database].format(table=table, rest=REST, count=count)
        connection.execute(sqlalchemy.text(statement))
        connection.execute(sqlalchemy.text(f"ANALYZE {table}"))

    await catalog.run(work)
    await catalog.aclose()
    await journal.aclose()


REST = (
    "version_id, etag, size, media_type, content_type, sha256, metadata, created_at, modified_at, "
    "transaction_id, seq"
)


@pytest.mark.parametrize("database", DATABASES)
async def test_a_folder_costs_the_same_whatever_it_holds(
    database: str, request: pytest.FixtureRequest
) -> None:
    """Rolled-up folders are looked up in the index, with one step for each folder."""

    async def steps(files: int) -> float:
        store = Store(InMemoryConnectorConfig(name=f"m{next(numbers)}"), "bucket")
        config = backend_of(database, request)
        uow_class = store.uow(backend=config)
        async with uow_class() as uow:
            await uow.files.put(text("model", "model"))
        await fill(config, database, files)
        async with uow_class() as uow:
            with stepped(database) as found:
                folders = await uow.files.list(delimiter="/")
        assert list(folders.prefixes) == [f"{number}/" for number in range(10)]
        assert list(folders) == ["model"]
        return sum(found)

    few = await steps(1_000)
    assert 0 < few < 2000
    assert await steps(10_000) < 1.1 * few  # SQLite's machine needs a few steps more or less


@contextmanager
def stepped(database: str) -> Generator[list[float]]:
    """Collect how many steps a scan of the catalog takes: of SQLite's machine, or rows of an index."""
    found: list[float] = []

    def before(connection: Any, *_: Any) -> None:
        if database == "sqlite":
            driver = connection.connection.driver_connection
            driver.set_progress_handler(lambda: found.append(1.0), 1)

    def after(connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if database == "sqlite":
            connection.connection.driver_connection.set_progress_handler(None, 1)
        elif "records" in statement:
            cursor = connection.connection.cursor()
            cursor.execute(f"EXPLAIN (ANALYZE, TIMING OFF) {statement}", parameters)
            for (line,) in cursor.fetchall():
                scan = re.search(r"(\w+) Scan.*[(]actual rows=([0-9.]+) loops=(\d+)", line)
                if scan is not None and scan[1] != "WorkTable" and scan[1] != "CTE":
                    assert scan[1] in {"Index", "Only"}
                    found.append(float(scan[2]) * int(scan[3]))
            cursor.close()

    event.listen(Engine, "before_cursor_execute", before)
    event.listen(Engine, "after_cursor_execute", after)
    try:
        yield found
    finally:
        event.remove(Engine, "before_cursor_execute", before)
        event.remove(Engine, "after_cursor_execute", after)


@pytest.mark.once
@pytest.mark.timeout(300)
@pytest.mark.parametrize("database", DATABASES)
async def test_a_page_of_a_million_records_is_found_by_the_index(
    database: str, request: pytest.FixtureRequest
) -> None:
    store = Store(InMemoryConnectorConfig(name=f"m{next(numbers)}"), "bucket")
    config = backend_of(database, request)
    uow_class = store.uow(backend=config)
    async with uow_class() as uow:
        await uow.files.put(text("model", "model"))
    await fill(config, database, MILLION)

    with explained(database) as plans:
        async with uow_class() as uow:
            first = await uow.files.at("4").list(limit=100)
            assert list(first) == [f"4/{number:07}" for number in range(4, 1004, 10)]
            middle = await uow.files.at("7").list("005", limit=100)
            assert list(middle) == [f"7/{number:07}" for number in range(50007, 51007, 10)]
            following = await uow.files.at("7").list(
                "005", limit=100, continuation_token=middle.continuation_token
            )
            assert list(following) == [f"7/{number:07}" for number in range(51007, 52007, 10)]
            await uow.files.stat("7/0000007", "8/0999998")
    assert len(plans) == 4
    for plan in plans:
        assert "OFFSET" not in plan
        assert "BLOOM" not in plan
        assert "SCAN" not in plan.replace("SCAN rows_each", "").replace("SCAN json_each", "")
        assert "Seq Scan" not in plan
        assert "USING PRIMARY KEY" in plan or "Index Scan" in plan


@contextmanager
def explained(database: str) -> Generator[list[str]]:
    """Collect the query plans of FennFlow's selects from the catalog."""
    explain = "EXPLAIN QUERY PLAN" if database == "sqlite" else "EXPLAIN"
    plans: list[str] = []

    def note(connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.startswith("SELECT") and "records" in statement:
            cursor = connection.connection.cursor()
            cursor.execute(f"{explain} {statement}", parameters)
            plans.append("\n".join(str(row[-1]) for row in cursor.fetchall()))
            cursor.close()

    event.listen(Engine, "after_cursor_execute", note)
    try:
        yield plans
    finally:
        event.remove(Engine, "after_cursor_execute", note)


def thing(key: str) -> StoredObject:
    return StoredObject(
        location=Location(key), etag=key, size=1, modified_at=datetime(2026, 1, 1, tzinfo=UTC)
    )


@pytest.mark.once
@pytest.mark.timeout(300)
async def test_reconciling_takes_the_same_memory_whatever_the_bucket_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = 0

    async def list_all(*_: object, **__: object) -> AsyncIterator[StoredObject]:
        for number in range(objects):
            yield thing(f"{number:07}")

    async def head(_connector: object, _namespace: str, location: Location) -> StoredObject:
        return thing(location.key)

    monkeypatch.setattr(InMemoryConnector, "list", list_all)
    monkeypatch.setattr(InMemoryConnector, "head", head)

    async def peak() -> int:
        backend = SqlalchemyBackendConfig(url=f"sqlite:///{tmp_path}/{objects}.db")
        store = Store(InMemoryConnectorConfig(name=f"m{next(numbers)}"), "bucket")
        uow_class = store.uow(backend=backend, reconcile=ReconcileConfig(frequency="never"))
        progress: list[ReconcileReport] = []
        async with uow_class.lifespan():
            tracemalloc.start()
            try:
                [filled] = (await uow_class.reconcile(on_progress=progress.append)).values()
                [compared] = (await uow_class.reconcile()).values()
                used = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
        assert filled.actions == {"inserted": objects}
        assert len(progress) == objects / 1000
        assert progress[0].objects == 1000
        assert (compared.objects, compared.records) == (objects, objects)
        assert compared.findings == ()
        return used

    objects = 2_000
    few = await peak()
    objects = 9_000
    assert await peak() < few + 1_000_000


@pytest.mark.parametrize("delimiter", [None, "/"])
async def test_a_page_looks_at_the_own_writes_of_the_page_alone(
    delimiter: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(InMemoryConnectorConfig(name=f"m{next(numbers)}"), "bucket")
    looked_at: list[ObjectKey] = []
    chain = Transaction.chain

    def note(self: Transaction, key: ObjectKey) -> list[Any]:
        looked_at.append(key)
        return chain(self, key)

    async with store.uow()(auto_commit=False) as uow:
        await uow.files.put(*(text("body", f"{name}{n:04}") for name in "abc" for n in range(500)))
        monkeypatch.setattr(Transaction, "chain", note)
        found = await uow.files.list("b", limit=10, delimiter=delimiter)

    assert list(map(str, found)) == [f"b{number:04}" for number in range(10)]
    assert len(looked_at) < 100


class Iterated(dict[Any, Any]):
    """A dictionary that counts the items of iterations over it."""

    items_seen = 0

    def _seen(self, each: Any) -> Any:
        Iterated.items_seen += 1
        return each

    @override
    def __iter__(self) -> Any:
        return map(self._seen, super().__iter__())

    @override
    def values(self) -> Any:
        return map(self._seen, super().values())

    @override
    def items(self) -> Any:
        return map(self._seen, super().items())


@pytest.mark.parametrize("call", ["put", "list", "folders", "stat", "delete_prefix"])
async def test_no_call_goes_through_all_that_was_written_before(
    call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(InMemoryConnectorConfig(name=f"m{next(numbers)}"), "bucket")
    begin = Transaction.__init__

    def watched(self: Transaction, *arguments: Any) -> None:
        begin(self, *arguments)
        self.chains, self.writes = Iterated(), Iterated()

    monkeypatch.setattr(Transaction, "__init__", watched)
    async with store.uow()(auto_commit=False) as uow:
        await uow.files.put(*(text("body", f"{n % 9}/{n}") for n in range(500)))
        await uow.files.list(limit=5)
        Iterated.items_seen = 0
        if call == "put":
            await uow.files.put(text("body", "one more"))
            await uow.files.list("one")
        elif call == "list":
            await uow.files.list("3/", limit=5)
        elif call == "folders":
            await uow.files.list(delimiter="/")
        elif call == "stat":
            await uow.files.stat("0/0")
        else:
            await uow.files.delete_prefix("3/12")
        assert Iterated.items_seen == 0


@pytest.mark.parametrize("delimiter", [None, "/"])
@pytest.mark.parametrize("limit", [1, 2, 3, 7])
async def test_pages_hold_what_a_whole_listing_holds(limit: int, delimiter: str | None) -> None:
    """Whether its files were committed before, are new, or are deleted."""
    store = Store(InMemoryConnectorConfig(name=f"m{next(numbers)}"), "bucket")
    uow_class = store.uow()
    names = [f"{folder}{number}" for folder in ("", "a", "a/", "a/b/", "c/") for number in range(6)]
    async with uow_class() as uow:
        await uow.files.put(*(text("old", name) for name in names[::2]))

    async with uow_class(auto_commit=False) as uow:
        await uow.files.put(*(text("new", name) for name in names[1::3]))
        await uow.files.delete(*(name for name in names[4::6]))
        await uow.files.put(*(text("newer", name) for name in names[2::9]))
        there = ({*names[::2], *names[1::3]} - {*names[4::6]}) | {*names[2::9]}
        for prefix in ("", "a", "a/", "none"):
            under = {name for name in there if name.startswith(prefix)}
            if delimiter is not None:
                under = {
                    prefix + start + middle
                    for start, middle, _ in (
                        name[len(prefix) :].partition(delimiter) for name in under
                    )
                }
            pages: list[str] = []
            token: str | None = None
            while True:
                page = await uow.files.list(
                    prefix, delimiter=delimiter, limit=limit, continuation_token=token
                )
                assert len(page) + len(page.prefixes) <= limit
                pages += [*map(str, page), *map(str, page.prefixes)]
                token = page.continuation_token
                if token is None:
                    break
            assert sorted(pages) == sorted(under)
