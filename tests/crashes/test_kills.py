"""A process is killed at every boundary in turn, and another recovers (I1 to I8, P2, P4, P5, P24).

`nox -s thorough` takes all boundaries; else it is a fair sample, of which the seed is printed.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Mapping

import pytest

from crashing import (
    AFTER,
    BEFORE,
    FOREIGN,
    FULL,
    SEED,
    Site,
    catalog_aside,
    check,
    make_site,
    run_until_killed,
    seed,
    start,
)
from stores import raw_client

pytestmark = [pytest.mark.crashes, pytest.mark.timeout(1800)]

STORES = ["moto", "moto-versioned", "juicefs", "strict", "obstore-file"]
CASES = [
    *itertools.product(STORES, ("sqlite", "postgresql"), (False, True)),
    ("seaweedfs", "sqlite", False),
    ("seaweedfs-versioned", "postgresql", True),
    ("strict", "bucket", False),
    ("seaweedfs", "bucket", True),
    *(
        pytest.param(*case, marks=pytest.mark.thorough)
        for case in [
            ("moto", "bucket", False),
            ("moto-versioned", "bucket", True),
            ("obstore-file", "bucket", False),
            ("seaweedfs", "bucket", False),
            ("strict", "bucket", True),
            ("seaweedfs", "sqlite", True),
            ("seaweedfs", "postgresql", False),
            ("seaweedfs", "postgresql", True),
            ("seaweedfs-versioned", "sqlite", False),
            ("seaweedfs-versioned", "sqlite", True),
            ("seaweedfs-versioned", "postgresql", False),
        ]
    ),
]
SAMPLE = 5


async def kill_at(site: Site, scope: str, at: int, *, fails: bool) -> int | None:
    """Run a child until it is killed; return how many boundaries it met if it was not."""
    process, pipe = await asyncio.to_thread(start, run_until_killed, site, scope, at, fails=fails)
    try:
        return int(await asyncio.to_thread(pipe.recv))
    except EOFError:
        return None
    finally:
        await asyncio.to_thread(process.join)
        pipe.close()


@pytest.mark.parametrize(("kind", "database", "fails"), CASES)
async def test_killed_at_any_boundary(
    kind: str, database: str, *, fails: bool, request: pytest.FixtureRequest
) -> None:
    site = await make_site(kind, database, request)
    server = None if kind == "obstore-file" else request.getfixturevalue(kind.partition("-")[0])
    allowed: dict[str, list[Mapping[str, bytes]]] = {}

    async def prepare(scope: str) -> None:
        await seed(site.uow_class, scope)
        if server is None:
            directory = request.getfixturevalue("tmp_path") / site.namespace / scope
            for key, body in FOREIGN.items():
                (directory / key).write_bytes(body)
            return
        async with raw_client(server) as client:
            for key, body in FOREIGN.items():
                await client.put_object(Bucket=site.namespace, Key=f"{scope}/{key}", Body=body)

    await prepare("whole")
    total = await kill_at(site, "whole", 1 << 30, fails=fails)
    assert total is not None
    assert total > (30 if kind == "obstore-file" else 50)
    allowed["whole"] = [BEFORE if fails else AFTER]
    points = list(range(total))
    if not FULL:
        choice = random.Random(f"{SEED} {kind} {database} {fails}")
        points = sorted(choice.sample(points, SAMPLE))

    slots = asyncio.Semaphore(2)

    async def kill(at: int) -> None:
        scope = f"at{at}"
        async with slots:
            await prepare(scope)
            ended = await kill_at(site, scope, at, fails=fails) is not None
        if fails:
            allowed[scope] = [BEFORE]
        else:
            allowed[scope] = [AFTER] if ended else [BEFORE, AFTER]

    async with asyncio.TaskGroup() as group:
        for at in points:
            group.create_task(kill(at))
    await asyncio.sleep(1.0)  # the sweep spares what is younger than the late-write period
    await site.recover()
    await check(site, allowed)
    before = catalog_aside(await site.store.objects())
    await site.recover()  # I7
    assert catalog_aside(await site.store.objects()) == before
    await check(site, allowed)
