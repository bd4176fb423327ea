"""A process is killed at every boundary in turn, and another recovers (I1 to I8, P2, P4, P5, P24).

`nox -s thorough` takes all boundaries; else it is a fair sample, of which the seed is printed.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from crashing import (
    AFTER,
    BEFORE,
    FOREIGN,
    FULL,
    SEED,
    Site,
    adopt_until_killed,
    catalog_aside,
    check,
    make_site,
    run_until_killed,
    seed,
    start,
)
from fennflow import ReconcileConfig
from fennflow.connectors import ObjectAttributes, PutRequest
from fennflow.exceptions import ReconcileFailedException
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
    return await met(run_until_killed, site, scope, at, fails=fails)


async def met(target: Callable[..., None], *args: Any, **kwargs: Any) -> int | None:
    """Run a child; return how many boundaries it met, or None if it was killed."""
    process, pipe = await asyncio.to_thread(start, target, *args, **kwargs)
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


@pytest.mark.parametrize(
    ("kind", "database"),
    [("strict", "sqlite"), ("obstore-file", "postgresql"), ("strict", "bucket")],
)
async def test_a_first_reading_killed_at_any_boundary_is_continued_by_another_process(
    kind: str, database: str, request: pytest.FixtureRequest
) -> None:
    """Until then no reader sees a part of it."""
    old = [f"old/{number:02}" for number in range(20)]

    async def prepare() -> Site:
        site = await make_site(kind, database, request)
        attributes = ObjectAttributes(media_type="text/plain")
        async with site.store.connector() as connector:
            for key in old:
                await connector.put(PutRequest(site.namespace, key, attributes), b"old")
        small = ReconcileConfig(batch_size=3)
        return replace(site, settings={**site.settings, "reconcile": small})

    total = await met(adopt_until_killed, await prepare(), 1 << 30)
    assert total is not None
    assert total > len(old) // 3
    points: Sequence[int] = range(total)
    if not FULL:
        points = random.Random(f"{SEED} {kind} {database}").sample(points, 4)
    for at in points:
        site = await prepare()
        await met(adopt_until_killed, site, at)
        never = ReconcileConfig(frequency="never")
        reader = replace(site, settings={**site.settings, "reconcile": never})
        if problems := (await reader.uow_class.diagnose()).problems:
            assert "fennflow adopt" in problems[0]
            with pytest.raises(ReconcileFailedException, match="fennflow adopt"):
                await listed(reader)
        else:
            assert await listed(reader) in ([], old)
        assert await listed(site) == old
        assert (await site.uow_class.diagnose()).problems == ()
        assert set((await site.journal()).values()) == {0}


async def listed(site: Site) -> list[str]:
    async with site.uow_class() as uow:
        return [str(path) for path in await uow.files.list()]
