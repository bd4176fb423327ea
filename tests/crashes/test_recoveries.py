"""Owners that die, are suspended and resumed, and servers that fail."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy.engine import Engine

import crashing
from crashing import AFTER, BEFORE, FOREIGN, Site, check, make_site, seed, start
from fennflow.exceptions import (
    BaseBackendException,
    CommitUncertainException,
    RecordLockedException,
)
from fennflow.testing import (
    Boundary,
    Fault,
    PostgresqlServer,
    S3Request,
    S3Server,
    boundaries,
)
from stores import raw_client

pytestmark = [pytest.mark.crashes, pytest.mark.timeout(600)]
DATABASES = ["sqlite", "postgresql"]


async def prepare(site: Site, server: S3Server, *scopes: str) -> None:
    for scope in scopes:
        await seed(site.uow_class, scope)
        async with raw_client(server) as client:
            for key, body in FOREIGN.items():
                await client.put_object(Bucket=site.namespace, Key=f"{scope}/{key}", Body=body)


@pytest.mark.parametrize("database", DATABASES)
async def test_two_recoverers_at_once(
    database: str, request: pytest.FixtureRequest, moto: S3Server
) -> None:
    """I7, P24: each transaction is finished once, no matter which process claims it."""
    site = await make_site("moto", database, request)
    scopes = {f"at{at}": at for at in (20, 35, 50, 60, 70, 75, 80, 85, 90)}
    await prepare(site, moto, *scopes)
    for scope, at in scopes.items():
        process, _ = start(crashing.run_until_killed, site, scope, at, fails=False)
        await asyncio.to_thread(process.join)
    assert (await site.journal())["transactions"] > 3
    await asyncio.sleep(1.0)
    await site.expire()
    recoverers = [start(crashing.recover, site) for _ in range(3)]
    for _, pipe in recoverers:
        pipe.send("go")
    reports = [await asyncio.to_thread(pipe.recv) for _, pipe in recoverers]
    for process, _ in recoverers:
        await asyncio.to_thread(process.join)
    assert sum(each.rolled_forward + each.compensated for each in reports) >= 3
    await site.recover()
    await check(site, {scope: [BEFORE, AFTER] for scope in scopes})


STOPS = [
    (Boundary("before", "put"), 1),
    (Boundary("after", "put"), 2),
    (Boundary("after", "commit"), 9),
    (Boundary("before", "copy"), 1),
    (Boundary("after", "copy"), 3),
    (Boundary("before", "delete"), 1),
    *(
        pytest.param(*stop, marks=pytest.mark.thorough)
        for stop in [
            (Boundary("before", "put"), 5),
            (Boundary("after", "commit"), 4),
            (Boundary("before", "copy"), 3),
            (Boundary("before", "delete"), 2),
        ]
    ),
]


def locked(directory: Path) -> bool:
    """Whether a transaction is open on a SQLite file."""
    for path in files_of(directory):
        with closing(sqlite3.connect(path, timeout=1.0)) as database:
            try:
                database.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                return True
    return False


@pytest.mark.parametrize("database", DATABASES)
@pytest.mark.parametrize(("stop", "nth"), STOPS)
async def test_an_owner_that_slept_past_its_lease_hurts_nothing_when_it_wakes(
    stop: Boundary,
    nth: int,
    database: str,
    request: pytest.FixtureRequest,
    moto: S3Server,
    tmp_path: Path,
) -> None:
    """P23, P25, P20: only its requests in flight arrive late."""
    site = await make_site("moto", database, request)
    site.settings["lease_ttl"] = 3.0
    await prepare(site, moto, "s")
    process, pipe = start(crashing.run_until_stopped, site, "s", stop, nth)
    assert await asyncio.to_thread(pipe.recv) == "stops"
    await asyncio.sleep(3.5)
    if database == "sqlite" and locked(tmp_path):
        # There, a process that is stopped in the middle of a transaction stops all the others.
        process.kill()
        await asyncio.to_thread(process.join)
        await site.recover()
        await check(site, {"s": [BEFORE, AFTER]})
        return
    await site.expire()
    await site.uow_class.recover()
    assert (await site.journal())["transactions"] == 0
    recovered = await site.store.objects()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGCONT)
    outcome = await asyncio.to_thread(pipe.recv)
    await asyncio.to_thread(process.join)
    committed = outcome == "committed"
    assert committed or outcome == "TransactionLostException"
    # One request was on its way; all else is as the recoverer left it.
    late = await site.store.objects()
    assert len(set(late.items()) ^ set(recovered.items())) <= 1
    await asyncio.sleep(1.0)
    await site.recover()
    await check(site, {"s": [AFTER] if committed else [BEFORE, AFTER]})


@pytest.mark.parametrize("database", DATABASES)
async def test_a_key_that_a_dead_owner_may_still_delete_stays_locked(
    database: str, request: pytest.FixtureRequest, moto: S3Server
) -> None:
    """P20 b: only what others cannot have written again can be deleted late."""
    site = await make_site("moto", database, request)
    site.settings.update(
        late_write_period=960.0, lock_timeout=0.0
    )  # no heartbeat is cut off that would lock SQLite
    await prepare(site, moto, "s")
    process, pipe = start(crashing.run_until_stopped, site, "s", Boundary("before", "delete"), 2)
    assert await asyncio.to_thread(pipe.recv) == "stops"
    await site.sql("UPDATE {}transactions SET lease_until = 0")
    report = await site.uow_class.recover()
    assert report.rolled_forward == 1
    with pytest.raises(RecordLockedException):
        async with site.uow_class() as uow:
            await uow.files.put(crashing.text("mine", "s/b"))
    async with site.uow_class() as uow:
        await uow.files.put(crashing.text("old m", "s/m"))
    process.kill()
    await asyncio.to_thread(process.join)


async def test_a_store_that_is_gone_during_apply_and_back_later(
    request: pytest.FixtureRequest, moto: S3Server
) -> None:
    """P9, P24: the commit stands, readers see it at once, and the copies follow."""
    site = await make_site("moto", "sqlite", request)
    await prepare(site, moto, "s")
    replaced = {"s/a", "s/c"}

    def refuse(request: S3Request) -> Fault | None:
        applies = request.operation == "COPY" and request.key in replaced
        return Fault.BEFORE if applies else None

    with moto.failing(refuse):
        process, pipe = start(crashing.run_until_killed, site, "s", 1 << 30, fails=False)
        await asyncio.to_thread(pipe.recv)
        await asyncio.to_thread(process.join)
        async with site.uow_class() as uow:
            assert (await uow.files.get("s/a")).one().data == b"new a"
        [transaction] = await site.uow_class.transactions()
        assert transaction.state == "committed"
        await site.expire()
        assert (await site.uow_class.recover()).pending == 1
    await asyncio.sleep(1.0)
    await site.expire()
    assert (await site.uow_class.recover()).rolled_forward == 1
    await site.recover()
    await check(site, {"s": [AFTER]})


@contextmanager
def own_postgresql(request: pytest.FixtureRequest) -> Generator[PostgresqlServer]:
    server: PostgresqlServer = request.getfixturevalue("postgresql")
    try:
        yield server
    finally:
        server.start()


@pytest.mark.parametrize("when", ["before", "after", "at some time"])
async def test_postgresql_is_killed_in_the_middle_of_a_transaction(
    when: str, request: pytest.FixtureRequest, moto: S3Server
) -> None:
    """P5, I8: an uncertain commit ends as one of the two, never in between."""
    site = await make_site("moto", "postgresql", request)
    allowed: dict[str, list[dict[str, bytes]]] = {}
    with own_postgresql(request) as server:
        for turn in range(8):
            scope = f"s{turn}"
            await prepare(site, moto, scope)
            left = 2 + 2 * turn

            def reached(boundary: Boundary) -> None:
                nonlocal left
                if boundary == (when, "commit"):
                    left -= 1
                    if left == 0:
                        server.kill()
                        server.start()

            def later(delay: float = 0.02 * turn) -> None:
                time.sleep(delay)
                server.kill()
                server.start()

            thread = threading.Thread(target=later)
            if when == "at some time":
                thread.start()
            allowed[scope] = [AFTER]
            try:
                with boundaries(reached):
                    await crashing.change(site.uow_class, scope, fails=False)
            except CommitUncertainException:
                allowed[scope] = [BEFORE, AFTER]
            except BaseBackendException:
                allowed[scope] = [BEFORE]
            if thread.ident is not None:
                await asyncio.to_thread(thread.join)
    await asyncio.sleep(1.0)
    await site.recover()
    await check(site, allowed)


@contextmanager
def full_disk(pages: int) -> Generator[None]:
    """Let SQLite's files grow by some pages, and then simulate a full disk."""

    def limit(connection: Any, _record: object) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA page_count")
        cursor.execute(f"PRAGMA max_page_count = {cursor.fetchone()[0] + pages}")
        cursor.close()

    sqlalchemy.event.listen(Engine, "connect", limit)
    try:
        yield
    finally:
        sqlalchemy.event.remove(Engine, "connect", limit)


async def fill(site: Site, names: Sequence[str]) -> None:
    async with site.uow_class() as uow:
        for name in names:
            await uow.files.put(crashing.text("much", f"s/{name}"))


def files_of(directory: Path) -> list[Path]:
    return list(directory.glob("*.db"))


@pytest.mark.parametrize("pages", range(0, 12, 2))
async def test_a_full_disk_fails_the_transaction_and_nothing_else(
    pages: int, request: pytest.FixtureRequest, moto: S3Server, tmp_path: Path
) -> None:
    site = await make_site("moto", "sqlite", request)
    await prepare(site, moto, "s")
    names = [f"{number:04}-{'long' * 50}" for number in range(60)]
    outcome = BEFORE | dict.fromkeys(names, b"much")
    with full_disk(pages):
        # Another engine, since this one's connections are open.
        narrow = Site(site.connector, site.namespace, site.backend, {"lock_timeout": 0.1})
        try:
            await fill(narrow, names)
        except BaseBackendException:
            outcome = BEFORE
    assert pages > 8 or outcome == BEFORE
    await asyncio.sleep(1.0)
    await site.recover()
    await check(site, {"s": [outcome]})
    for path in files_of(tmp_path):
        with sqlite3.connect(path) as database:
            assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
