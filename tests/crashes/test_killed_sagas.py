"""The payment of docs/sagas.md is killed at every boundary in turn (P33 to P37)."""

from __future__ import annotations

import asyncio
import os
import random
import re
import sqlite3
import sys
import types
from collections.abc import Awaitable, Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import wraps
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from crashing import FULL, SEED, BucketSite, Site, catalog_aside, start
from fennflow.backends import BucketBackendConfig, SqlalchemyBackendConfig
from fennflow.connectors import S3ConnectorConfig
from fennflow.files import TextContent
from fennflow.testing import Boundary, S3Server, boundaries, killing
from stores import Store, numbers, raw_client, s3_config

pytestmark = [pytest.mark.crashes, pytest.mark.timeout(1800)]

PAGE = Path(__file__).parents[2] / "docs" / "sagas.md"
OWN = ("charge", "refund", "send_receipt")
DATABASES = ("sqlite", "postgresql", "bucket")
SAMPLE = 4
KILLED_RECOVERIES = 1


@dataclass(frozen=True)
class Place:
    """The location of the shop, for a child process.

    Args:
        directory: of its databases.
        variables: of the environment, by which it finds the store.
        bucket: of its receipts.
        backend: of its units of work.
    """

    directory: str
    variables: Mapping[str, str]
    bucket: str
    backend: Any

    @property
    def site(self) -> Site:
        os.environ.update(self.variables)
        kind = BucketSite if isinstance(self.backend, BucketBackendConfig) else Site
        return kind(S3ConnectorConfig(), self.bucket, self.backend)

    def shop(self) -> Any:
        """Run the page's first program as a module."""
        os.environ.update(self.variables)
        os.chdir(self.directory)
        found = re.search(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
        assert found is not None
        backend = 'SqlalchemyBackendConfig(url="sqlite:///shop.db")'
        assert backend in found[1]
        code = found[1].replace("my_files", self.bucket).replace(backend, "BACKEND")
        module = types.ModuleType("shop")
        module.__dict__["BACKEND"] = self.backend
        sys.modules["shop"] = module
        exec(compile(code, str(PAGE), "exec"), module.__dict__)
        return module


@pytest.fixture(params=DATABASES)
async def place(request: pytest.FixtureRequest, moto: S3Server, tmp_path: Path) -> Place:
    bucket = f"sagas{next(numbers)}"
    async with raw_client(moto) as client:
        await client.create_bucket(Bucket=bucket)
    variables = {
        "AWS_ENDPOINT_URL": moto.url,
        "AWS_ACCESS_KEY_ID": moto.access_key,
        "AWS_SECRET_ACCESS_KEY": moto.secret_key,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    backend: Any = BucketBackendConfig(namespace=bucket)
    if request.param == "sqlite":
        backend = SqlalchemyBackendConfig(url=f"sqlite:///{tmp_path}/shop.db")
    elif request.param == "postgresql":
        server = request.getfixturevalue("postgresql")
        backend = SqlalchemyBackendConfig(url=server.url, table_prefix=f"{bucket}_")
    return Place(str(tmp_path), variables, bucket, backend)


def watched(function: Callable[..., Any], reached: Callable[[Boundary], None]) -> Any:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        reached(Boundary("before", function.__name__))
        function(*args, **kwargs)
        reached(Boundary("after", function.__name__))

    return call


def run_until_killed(
    place: Place, what: Callable[[Any, str], Awaitable[object]], at: int, pipe: Connection
) -> None:
    """Do something in the shop, killed at a boundary; if it was not killed, report the number of boundaries."""
    count = 0
    kill = killing(at=at)

    def reached(boundary: Boundary) -> None:
        nonlocal count
        count += 1
        kill(boundary)

    shop = place.shop()
    shop.charge = watched(shop.charge, reached)
    for registered in (shop.refund, shop.send_receipt):
        registered.function = watched(registered.function, reached)

    async def main() -> None:
        async with shop.UOW.lifespan():
            with boundaries(reached), suppress(ValueError):
                await what(shop, f"order{at}")

    asyncio.run(main())
    pipe.send(count)


async def buy(shop: Any, order: str) -> None:
    await shop.buy(order)


async def fail_to_buy(shop: Any, order: str) -> None:
    await shop.buy(order, fails=True)


async def hold(shop: Any, order: str) -> None:
    """Leave the purchase to be decided by another process."""
    payment_id = f"payment-{order}"
    async with shop.UOW() as uow:
        undo = shop.refund(payment_id=payment_id)
        await uow.step(lambda: asyncio.to_thread(shop.charge, payment_id), undo=undo)
        await uow.receipts.put(TextContent.from_content("Paid", filename=f"{order}.txt"))
        uow.on_commit(shop.send_receipt(order=order))
        await uow.hold()


async def commit_all(shop: Any, _order: str) -> None:
    """Commit what is held."""
    for each in await shop.UOW.transactions():
        if each.state == "held":
            await shop.UOW.commit_held(each.transaction_id)


async def recover_all(shop: Any, _order: str) -> None:
    await shop.UOW.recover()


def expire(place: Place, pipe: Connection) -> None:
    """Let all leases run out."""
    asyncio.run(place.site.expire())
    pipe.send(None)


def recover(place: Place, pipe: Connection) -> None:
    """Recover like another process after enough time has passed."""
    site, shop = place.site, place.shop()

    async def main() -> Any:
        for _ in range(2):
            await site.expire()
            report = await shop.UOW.recover()
        return report.pending, report.jobs_pending, report.problems

    pipe.send(asyncio.run(main()))


async def run(target: Callable[..., None], *args: Any) -> Any:
    """Run a process; return what it reports, or None if it was killed."""
    process, pipe = await asyncio.to_thread(start, target, *args)
    try:
        return await asyncio.to_thread(pipe.recv)
    except EOFError:
        return None
    finally:
        await asyncio.to_thread(process.join)
        pipe.close()


def sample(total: int, name: str, most: int = SAMPLE) -> list[int]:
    """Return boundaries at which to kill: all of them, if all tests are run in full."""
    points = range(total)
    if FULL or total <= most:
        return list(points)
    return sorted(random.Random(f"{SEED} {name}").sample(points, most))


async def check(place: Place, store: Store, orders: list[int]) -> set[str]:
    """Check that charges, files and mails go together, and return the files."""
    with closing(sqlite3.connect(f"{place.directory}/elsewhere.db")) as database:
        payments = dict(database.execute("SELECT id, state FROM payments").fetchall())
        mails = [row[0] for row in database.execute("SELECT receipt FROM mails")]
    files = set(catalog_aside(await store.objects()))
    assert sorted(mails) == sorted(files)
    for at in orders:
        state = payments.get(f"payment-order{at}")
        assert (state == "charged") is (f"order{at}.txt" in files), (at, state)
    return files


@pytest.fixture
def store(place: Place, moto: S3Server) -> Store:
    return Store(s3_config(moto), place.bucket)


@pytest.mark.parametrize("what", [buy, fail_to_buy], ids=["commits", "fails"])
async def test_a_payment_and_its_file_go_together_wherever_it_is_killed(
    place: Place, store: Store, what: Callable[[Any, str], Awaitable[object]]
) -> None:
    total = await run(run_until_killed, place, what, 1 << 30)
    assert total is not None
    assert total > 12
    points = sample(total, what.__name__)
    for at in points:
        await run(run_until_killed, place, what, at)
    # A recovering process may be killed, too.
    for at in sample(20, "recover", KILLED_RECOVERIES):
        await run(expire, place)
        await run(run_until_killed, place, recover_all, at)
    assert await run(recover, place) == (0, 0, ())
    files = await check(place, store, [1 << 30, *points])
    assert not (what is fail_to_buy and files)


async def test_what_is_held_is_decided_as_a_whole_wherever_it_is_killed(
    place: Place, store: Store
) -> None:
    """P37: killed before it is held, it is undone; killed during the decision, it is still held."""
    total = await run(run_until_killed, place, hold, 1 << 30)
    deciding = await run(run_until_killed, place, commit_all, 1 << 30)
    assert total is not None
    assert deciding is not None
    points = sample(total, "hold", SAMPLE - 2)
    held = [1 << 30, *points]
    for at in points:
        await run(run_until_killed, place, hold, at)
    for at in sample(deciding, "decide", SAMPLE - 2):
        more = (1 << 20) + at  # killed at none
        assert await run(run_until_killed, place, hold, more)
        held.append(more)
        await run(expire, place)
        await run(run_until_killed, place, commit_all, at)
    # What is held still, after a decision that was cut off, is named.
    pending, jobs_pending, problems = await run(recover, place)
    assert jobs_pending == 0
    assert problems or not pending
    assert all("is held" in each for each in problems)
    await run(run_until_killed, place, commit_all, 1 << 30)
    assert await run(recover, place) == (0, 0, ())
    files = await check(place, store, held)
    assert {f"order{each}.txt" for each in held if each >= 1 << 20} <= files
