"""What grows with the catalog, the journal and the bucket: `uv run benchmarks/scale.py`.

Pages of large catalogs, units of work at once, recovery of many transactions whose process died, and
reconciliation of a catalog with a large bucket.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import sqlalchemy
from rich.console import Console
from rich.table import Table
from server import Server, cheap_server
from sqlalchemy.ext.asyncio import create_async_engine
from subjects import IN_FLIGHT, Files, in_flight

from fennflow import ConfigDict, ReconcileConfig, UnitOfWork
from fennflow.backends import SqlalchemyBackendConfig
from fennflow.connectors import S3ConnectorConfig
from fennflow.files import TextContent
from fennflow.repositories import RepoField
from fennflow.testing import postgresql_server

BUCKET = "bucket"
LOOKS = 21
MANY = 1000
COMPARED = 1_000_000
"""So many records at most are compared with a bucket, whose objects the server holds in memory."""
DEAD = 9
PADDED = "lpad(i::text, greatest(7, length(i::text)), '0')"
ROWS = {
    "SQLite": (
        "printf('%d/%07d', i % 10, i), printf('%d/%07d', i % 10, i), printf('%032x', i)",
        (
            "(WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {count})"
            " SELECT i FROM n) AS n"
        ),
    ),
    "PostgreSQL": (
        (f"(i % 10) || '/' || {PADDED}, (i % 10) || '/' || {PADDED}, lpad(to_hex(i), 32, '0')"),
        "generate_series(1, {count}) AS n(i)",
    ),
}
SAME = (
    "version_id, size, media_type, content_type, sha256, metadata, created_at, modified_at, "
    "transaction_id, seq"
)
Rows = dict[str, dict[str, float]]


def unit_of_work(
    url: str, backend: SqlalchemyBackendConfig, *, lease_ttl: float = 60.0
) -> type[Any]:
    """Return a unit of work whose bucket only we reconcile."""

    class UOW(UnitOfWork):
        files = RepoField(Files, namespace=BUCKET)
        config = ConfigDict(
            connector=S3ConnectorConfig(
                endpoint_url=url,
                region_name="us-east-1",
                aws_access_key_id="test",
                aws_secret_access_key="test",
            ),
            backend=backend,
            reconcile=ReconcileConfig(frequency="never"),
            lease_ttl=lease_ttl,
        )

    return UOW


STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def forget_peak() -> None:
    """Let the peak of this process's memory begin at what it holds now."""
    CLEAR.write_text("5")


def peak() -> str:
    """Return the most memory that this process has held since then."""
    kib = re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text())
    return "" if kib is None else f"{int(kib[1]) >> 10} MiB"


async def timed(work: Awaitable[object]) -> float:
    started = time.perf_counter()
    await work
    return time.perf_counter() - started


@asynccontextmanager
async def filled(
    uow_class: type[Any], backend: SqlalchemyBackendConfig, name: str, count: int
) -> AsyncGenerator[None]:
    """Give the catalog so many records, which are what `Server.fill` makes."""
    async with uow_class.lifespan():
        async with uow_class() as uow:
            await uow.files.put(TextContent.from_content("body", filename="model"))
        engine = create_async_engine(backend.url.get_secret_value())
        table = f"{backend.table_prefix}records"
        each, numbers = ROWS[name]
        async with engine.connect() as opened:
            # What is measured must not wait for these rows to reach the disk.
            connection = await opened.execution_options(isolation_level="AUTOCOMMIT")
            for statement in (
                (
                    f"INSERT INTO {table} (namespace, key, location_key, etag, {SAME}) SELECT namespace, {each},"
                    f" {SAME} FROM {numbers.format(count=count)}, {table} WHERE key = 'model'"
                ),
                f"ANALYZE {table}",
                "CHECKPOINT" if name == "PostgreSQL" else "PRAGMA wal_checkpoint(TRUNCATE)",
            ):
                await connection.execute(sqlalchemy.text(statement.replace(":", r"\:")))
        await engine.dispose()
        yield


async def pages(uow_class: type[Any], count: int) -> dict[str, float]:
    """Return what a page of 100 takes, at the beginning and in the middle of a prefix."""
    half = f"{count // 2:07}"

    async def page(prefix: str) -> None:
        async with uow_class() as uow:
            assert len(await uow.files.at("4").list(prefix, limit=100)) > 0

    return {
        "first page": statistics.median([await timed(page("")) for _ in range(LOOKS)]),
        "page in the middle": statistics.median(
            [await timed(page(half[:4])) for _ in range(LOOKS)]
        ),
    }


async def calls(uow_class: type[Any], count: int) -> dict[str, float]:
    """Return what calls take whose keys are anywhere among the records."""

    async def put(files: Sequence[TextContent]) -> None:
        async with uow_class() as uow:
            await uow.files.put(*files)

    choose = random.Random(count).randrange
    read: list[float] = []
    written: dict[int, list[float]] = {1: [], MANY: []}
    for turn in range(LOOKS):
        found = choose(count) + 1
        async with uow_class() as uow:
            read.append(await timed(uow.files.stat(f"{found % 10}/{found:07}")))
        for size, seconds in written.items():
            keys = {f"{choose(10)}/{choose(count):07}-{turn}-{size}" for _ in range(size)}
            files = [TextContent.from_content("body", filename=key) for key in keys]
            seconds.append(await timed(put(files)))
    return {
        "one record read": statistics.median(read),
        "a unit of work, 1 new file": statistics.median(written[1]),
        f"a unit of work, {MANY:,} new files": statistics.median(written[MANY]),
    }


async def recovery(
    uow_class: type[Any], url: str, backend: SqlalchemyBackendConfig, count: int, lease: float
) -> dict[str, float]:
    """Return what it takes to settle transactions whose process died when each had put a file."""
    dying = get_context("spawn").Process(target=die, args=(url, backend, count, lease))
    dying.start()
    await asyncio.to_thread(dying.join)
    assert dying.exitcode == DEAD
    await asyncio.sleep(lease + 1.0)
    seconds = await timed(uow_class.recover())
    assert list(await uow_class.transactions()) == []
    return {"recover": seconds}


def die(url: str, backend: SqlalchemyBackendConfig, count: int, lease: float) -> None:
    """Put a file in each of so many units of work, and die before any of them ends."""
    uow_class = unit_of_work(url, backend, lease_ttl=lease)
    free, left = asyncio.Semaphore(IN_FLIGHT), count

    async def put(number: int) -> None:
        nonlocal left
        async with uow_class() as uow:
            async with free:
                file = TextContent.from_content("body", filename=f"left/{number:07}")
                await uow.files.put(file)
            left -= 1
            if left == 0:
                os._exit(DEAD)
            await asyncio.Event().wait()

    async def all_of_them() -> None:
        async with uow_class.lifespan(), asyncio.TaskGroup() as group:
            for number in range(count):
                group.create_task(put(number))

    asyncio.run(all_of_them())


async def units(uow_class: type[Any], in_all: int, counts: Sequence[int]) -> dict[str, float]:
    """Return what a unit of work with one new file takes, with so many under way at once."""
    found: dict[str, float] = {}

    async def put(name: str) -> None:
        async with uow_class() as uow:
            await uow.files.put(TextContent.from_content("body", filename=name))

    for count in counts:
        names = [f"units/{count}/{number:07}" for number in range(in_all)]
        seconds = await timed(in_flight(names, put, limit=count))
        found[f"a unit of work, {count} at once"] = seconds / in_all
    return found


async def reconciliation(uow_class: type[Any], server: Server, count: int) -> dict[str, float]:
    """Return what it takes to compare a catalog with a bucket that holds the same."""

    async def compare() -> None:
        (report,) = (await uow_class.reconcile()).values()
        assert report.objects >= count
        assert report.findings == (), report.findings[:3]

    in_order = await timed(compare())
    server.scatter()
    return {"compare": in_order, "compare, listed in no order": await timed(compare())}


async def taking_in(uow_class: type[Any], count: int) -> dict[str, float]:
    """Return what it takes to fill an empty catalog from a bucket."""

    async def fill() -> None:
        (report,) = (await uow_class.reconcile()).values()
        assert report.actions == {"inserted": count}, report.actions

    return {"fill": await timed(fill())}


async def run(options: argparse.Namespace, console: Console) -> Rows:
    """Measure all, and show each row when it is there."""
    rows: Rows = {}
    directory = Path(tempfile.mkdtemp())
    async with AsyncExitStack() as stack:
        stack.callback(shutil.rmtree, directory)
        postgresql = stack.enter_context(postgresql_server())

        def backend(name: str, number: int) -> SqlalchemyBackendConfig:
            sqlite = f"sqlite:///{directory}/{number}.db"
            url = sqlite if name == "SQLite" else postgresql.new_database()
            return SqlalchemyBackendConfig(url=url)

        def report(what: str, count: int, name: str, seconds: Mapping[str, float]) -> None:
            for kind, value in seconds.items():
                row = f"{kind}, {count:,} {what}"
                rows.setdefault(row, {})[name] = value
                console.print(f"{row}: {name} {1000 * value:,.1f} ms")
            if options.json is not None:
                options.json.write_text(json.dumps(rows, indent=1))

        compared = max((each for each in options.records if each <= COMPARED), default=None)
        number = 0
        for name in ROWS:
            for count in options.records:
                number += 1
                config = backend(name, number)
                with cheap_server() as server:
                    uow_class = unit_of_work(server.url, config)
                    async with filled(uow_class, config, name, count):
                        report("records", count, name, await pages(uow_class, count))
                        if count == compared:
                            server.fill(BUCKET, count)
                            forget_peak()
                            found = await reconciliation(uow_class, server, count)
                            report("objects", count, name, found)
                            console.print(f"comparing: {name} at most {peak()} of memory")
                            took = await units(uow_class, options.units, options.at_once)
                            report("in all", options.units, name, took)
                        report("records", count, name, await calls(uow_class, count))
            for what, count in (
                ("transactions", options.transactions),
                ("objects", options.objects),
            ):
                number += 1
                config = backend(name, number)
                with cheap_server() as server:
                    uow_class = unit_of_work(server.url, config)
                    async with uow_class.lifespan():
                        if what == "transactions":
                            found = await recovery(
                                uow_class, server.url, config, count, options.lease
                            )
                        else:
                            server.fill(BUCKET, count)
                            forget_peak()
                            found = await taking_in(uow_class, count)
                            console.print(f"filling: {name} at most {peak()} of memory")
                    report(what, count, name, found)
    return rows


def show(rows: Rows, console: Console) -> None:
    table = Table("", *ROWS, title="medians, or one run of what is long")
    for row, by_name in rows.items():
        table.add_row(row, *(f"{1000 * by_name[name]:,.1f} ms" for name in ROWS))
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--units", type=int, default=320, help="of work, one by one and at once")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--transactions", type=int, default=10_000, help="left by a dead process")
    parser.add_argument("--lease", type=float, default=30.0, help="seconds of its transactions")
    parser.add_argument("--objects", type=int, default=100_000, help="to fill a catalog with")
    parser.add_argument("--json", type=Path, help="where to write what was measured")
    options = parser.parse_args(arguments)
    console = Console(width=120)
    show(asyncio.run(run(options, console)), console)


if __name__ == "__main__":
    main()
