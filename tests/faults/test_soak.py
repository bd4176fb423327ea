"""64 concurrent transactions on a randomly failing server: no losses, leftovers or memory growth.

The quick profile takes some seconds; `nox -s thorough` goes on for minutes with each database.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter

import pytest

from crashing import SEED, Site, check
from fennflow.backends import SqlalchemyBackendConfig
from fennflow.testing import PostgresqlServer
from soaking import GROUPS, Held, Written, failing_server, fits, session
from stores import FullUOW, new_bucket, numbers, s3_config

MINUTES = float(os.environ.get("FENNFLOW_SOAK_MINUTES", "0.04"))
AT_ONCE = 64
FAULT_RATE = 0.03
POOL = 32


@pytest.mark.once
@pytest.mark.sampled
@pytest.mark.timeout(int(300 + 60 * MINUTES * 1.2))
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
async def test_many_transactions_at_a_failing_server(
    database: str, request: pytest.FixtureRequest
) -> None:
    loop = asyncio.get_running_loop()
    written: list[Written] = []
    with failing_server(f"{SEED} {database}") as (server, rate):
        connector = s3_config(server, max_pool_connections=POOL)
        site = Site(
            connector,
            await new_bucket(server),
            backend_on(database, request),
            {"late_write_period": 2.0, "recovery_interval": 2.0, "lock_timeout": 60.0},
        )
        uow_class = site.uow_class

        async def work(worker: int, until: float) -> None:
            choice = random.Random(f"{SEED} {database} {worker} {until}")
            while loop.time() < until:
                name = f"v{next(numbers)}"
                written.append(await session(uow_class, name, choice))

        async def run(minutes: float) -> Held:
            rate.send(FAULT_RATE)
            until = loop.time() + 60 * minutes
            async with asyncio.TaskGroup() as group:
                for worker in range(AT_ONCE):
                    group.create_task(work(worker, until))
            rate.send(0.0)
            await finished(uow_class)
            return Held.now()

        before = Held.now()
        async with uow_class.lifespan():
            first = await run(MINUTES / 3)
            sessions = len(written)
            last = await run(2 * MINUTES / 3)
        after = Held.now()
        outcomes = Counter(each.outcome for each in written)
        measured = f"{outcomes}, held {before}, {first}, {last}, {after}"
        assert outcomes["committed"] > len(written) / 4, measured
        assert outcomes["undone"], measured
        assert last.sockets <= before.sockets + POOL + 20, measured
        assert after.sockets <= before.sockets + 1, measured
        # The notes about each transaction belong to the test.
        own = 20 * (len(written) - sessions)
        assert last.objects - first.objects < own + 0.05 * first.objects, measured
        assert last.mebibytes - first.mebibytes < 32, measured
        await site.recover()
        await check(site, {})
        objects = {key: body.decode() for key, body in (await site.store.objects()).items()}
    for key in (f"g{group}/{each}" for group in range(GROUPS) for each in "ab"):
        assert fits(key, objects.get(key), written), f"{key}: {objects.get(key)}; {measured}"


async def finished(uow_class: type[FullUOW]) -> None:
    for _ in range(300):
        if not await uow_class.transactions():
            return
        await asyncio.sleep(0.2)
    pytest.fail(f"not finished: {await uow_class.transactions()}")


def backend_on(database: str, request: pytest.FixtureRequest) -> SqlalchemyBackendConfig:
    name = f"soak{next(numbers)}"
    if database == "sqlite":
        directory = request.getfixturevalue("tmp_path")
        return SqlalchemyBackendConfig(url=f"sqlite:///{directory}/{name}.db")
    postgresql: PostgresqlServer = request.getfixturevalue("postgresql")
    return SqlalchemyBackendConfig(url=postgresql.url, table_prefix=f"{name}_")
