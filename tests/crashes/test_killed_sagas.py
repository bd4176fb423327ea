"""The payment of docs/sagas.md is killed at every boundary in turn (P33 to P36)."""

from __future__ import annotations

import asyncio
import os
import random
import re
import sqlite3
import sys
import types
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from functools import wraps
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from crashing import FULL, SEED, start
from fennflow.testing import Boundary, S3Server, boundaries, killing
from stores import numbers, raw_client

pytestmark = [pytest.mark.crashes, pytest.mark.timeout(1800)]

PAGE = Path(__file__).parents[2] / "docs" / "sagas.md"
OWN = ("charge", "refund", "send_receipt")
SAMPLE = 10


def example(directory: str, variables: Mapping[str, str], bucket: str) -> Any:
    """Run the page's first program as a module, on a bucket and in a directory of its own."""
    os.environ.update(variables)
    os.chdir(directory)
    found = re.search(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    code = found[1].replace("my_files", bucket)
    module = types.ModuleType("shop")
    sys.modules["shop"] = module
    exec(compile(code, str(PAGE), "exec"), module.__dict__)
    return module


def watched(function: Callable[..., Any], reached: Callable[[Boundary], None]) -> Any:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        reached(Boundary("before", function.__name__))
        function(*args, **kwargs)
        reached(Boundary("after", function.__name__))

    return call


def buy_until_killed(
    place: tuple[str, Mapping[str, str], str], at: int, pipe: Connection, *, fails: bool
) -> None:
    """Buy, killed at a boundary; report how many there were if it was not."""
    count = 0
    kill = killing(at=at)

    def reached(boundary: Boundary) -> None:
        nonlocal count
        count += 1
        kill(boundary)

    shop = example(*place)
    shop.charge = watched(shop.charge, reached)
    for registered in (shop.refund, shop.send_receipt):
        registered.function = watched(registered.function, reached)

    async def main() -> None:
        async with shop.UOW.lifespan():
            with boundaries(reached), suppress(ValueError):
                await shop.buy(f"order{at}", fails=fails)

    asyncio.run(main())
    pipe.send(count)


def recover(place: tuple[str, Mapping[str, str], str], pipe: Connection) -> None:
    """Recover as another process does when enough time has passed."""
    shop = example(*place)
    for name, table in (
        ("shop.journal.db", "transactions"),
        ("shop.journal.db", "compensations"),
        ("shop.db", "hooks"),
    ):
        with closing(sqlite3.connect(name)) as database, database:
            database.execute(f"UPDATE fennflow_{table} SET lease_until = 0")
    reports = [asyncio.run(shop.UOW.recover()) for _ in range(2)]
    pipe.send((reports[1].pending, reports[1].jobs_pending, reports[1].problems))


async def run(target: Callable[..., None], *args: Any, **kwargs: Any) -> Any:
    """Run a process; return what it reports, or None if it was killed."""
    process, pipe = await asyncio.to_thread(start, target, *args, **kwargs)
    try:
        return await asyncio.to_thread(pipe.recv)
    except EOFError:
        return None
    finally:
        await asyncio.to_thread(process.join)
        pipe.close()


@pytest.mark.parametrize("fails", [False, True], ids=["commits", "fails"])
async def test_a_payment_and_its_file_go_together_wherever_it_is_killed(
    moto: S3Server, tmp_path: Path, *, fails: bool
) -> None:
    bucket = f"sagas{next(numbers)}"
    async with raw_client(moto) as client:
        await client.create_bucket(Bucket=bucket)
    variables = {
        "AWS_ENDPOINT_URL": moto.url,
        "AWS_ACCESS_KEY_ID": moto.access_key,
        "AWS_SECRET_ACCESS_KEY": moto.secret_key,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    place = str(tmp_path), variables, bucket
    total = await run(buy_until_killed, place, 1 << 30, fails=fails)
    assert total is not None
    assert total > 12
    points = list(range(total))
    if not FULL:
        points = sorted(random.Random(f"{SEED} {fails}").sample(points, SAMPLE))
    for at in points:
        await run(buy_until_killed, place, at, fails=fails)
    assert await run(recover, place) == (0, 0, ())

    with closing(sqlite3.connect(tmp_path / "elsewhere.db")) as database:
        payments = dict(database.execute("SELECT id, state FROM payments").fetchall())
        mails = [row[0] for row in database.execute("SELECT receipt FROM mails")]
    async with raw_client(moto) as client:
        listed = await client.list_objects_v2(Bucket=bucket)
        keys = [each.get("Key", "") for each in listed.get("Contents", [])]
    files = {key for key in keys if not key.startswith(".fennflow/")}
    assert sorted(mails) == sorted(files)
    for at in [1 << 30, *points]:
        name = f"order{at}"
        state = payments.get(f"payment-{name}")
        assert (state == "charged") is (f"{name}.txt" in files), (at, state)
    assert not (fails and files)
