"""A process is killed at every boundary in turn, and another recovers (I1 to I8, P2, P4, P5, P24).

`nox -s thorough` uses all boundaries; otherwise a random sample, whose seed is printed.
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
    text,
    under,
    use_beside,
)
from fennflow import ReconcileConfig
from fennflow.backends import SqlalchemyBackendConfig
from fennflow.connectors import ObjectAttributes, PutRequest
from fennflow.exceptions import ReconcileFailedException
from fennflow.reports import Difference
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
SAMPLE = 4
IN_ONE_BUCKET = 25  # moto looks through a whole bucket for the versions of one key


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
    await prepare(site, "whole", kind, request)
    total = await kill_at(site, "whole", 1 << 30, fails=fails)
    assert total is not None
    assert total > (30 if kind == "obstore-file" else 50)
    points = list(range(total))
    if not FULL:
        choice = random.Random(f"{SEED} {kind} {database} {fails}")
        points = sorted(choice.sample(points, SAMPLE))

    slots = asyncio.Semaphore(2)
    allowed: dict[str, list[Mapping[str, bytes]]] = {"whole": [BEFORE if fails else AFTER]}

    async def kill(at: int) -> None:
        scope = f"at{at}"
        async with slots:
            await prepare(site, scope, kind, request)
            ended = await kill_at(site, scope, at, fails=fails) is not None
        if fails:
            allowed[scope] = [BEFORE]
        else:
            allowed[scope] = [AFTER] if ended else [BEFORE, AFTER]

    for first in range(0, len(points), IN_ONE_BUCKET):
        async with asyncio.TaskGroup() as group:
            for at in points[first : first + IN_ONE_BUCKET]:
                group.create_task(kill(at))
        await check_recovered(site, allowed)
        site, allowed = await make_site(kind, database, request), {}


async def prepare(site: Site, scope: str, kind: str, request: pytest.FixtureRequest) -> None:
    """Put files, and objects of others next to them."""
    await seed(site.uow_class, scope)
    if kind == "obstore-file":
        directory = request.getfixturevalue("tmp_path") / site.namespace / scope
        for key, body in FOREIGN.items():
            (directory / key).write_bytes(body)
        return
    async with raw_client(request.getfixturevalue(kind.partition("-")[0])) as client:
        for key, body in FOREIGN.items():
            await client.put_object(Bucket=site.namespace, Key=f"{scope}/{key}", Body=body)


async def check_recovered(site: Site, allowed: Mapping[str, list[Mapping[str, bytes]]]) -> None:
    """Recover and check the state; then do both again (I7)."""
    await asyncio.sleep(1.0)  # the sweep spares what is younger than the late-write period
    await site.recover()
    await check(site, allowed)
    before = catalog_aside(await site.store.objects())
    await site.recover()
    assert catalog_aside(await site.store.objects()) == before
    await check(site, allowed)


@pytest.mark.parametrize(
    ("kind", "database"),
    [("strict", "sqlite"), ("obstore-file", "postgresql"), ("strict", "bucket")],
)
async def test_a_first_reading_killed_at_any_boundary_is_continued_by_another_process(
    kind: str, database: str, request: pytest.FixtureRequest
) -> None:
    """Until it is complete, no reader sees a part of it."""
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
        # The engines of a loop hold connections until it ends, and PostgreSQL has a hundred.
        await asyncio.to_thread(asyncio.run, check_continued(site, old))
        assert set((await site.journal()).values()) == {0}


async def check_continued(site: Site, old: Sequence[str]) -> None:
    """Check that an interrupted first reading is an error for readers, and is resumed."""
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


async def listed(site: Site) -> list[str]:
    async with site.uow_class() as uow:
        return [str(path) for path in await uow.files.list()]


FOREIGN_OBJECTS = 20_000


@pytest.mark.thorough
@pytest.mark.timeout(3 * 3600)
async def test_everything_holds_on_seaweedfs_with_20_000_foreign_objects_and_another_application(
    request: pytest.FixtureRequest,
) -> None:
    """The main job, adoption, reconciliation, and a kill at every boundary.

    The other application has a catalog of its own, and no prefix: it adopts what is foreign, too.
    """
    site = await make_site("seaweedfs", "sqlite", request)
    directory = request.getfixturevalue("tmp_path")
    other = replace(
        site, backend=SqlalchemyBackendConfig(url=f"sqlite:///{directory}/other.db"), settings={}
    )
    foreign = await put_foreign(site)
    neighbour, pipe = await asyncio.to_thread(start, use_beside, other, "neighbour")
    assert await asyncio.to_thread(pipe.recv) == "runs"

    # Adoption, killed again and again. What the other application has written is not taken.
    for at in (6, 12, 24, 48):
        await met(adopt_until_killed, site, at)
    assert await listed(site) == sorted(foreign)

    # The main job, killed at every boundary.
    async def prepare(scope: str) -> None:
        await seed(site.uow_class, scope)
        async with site.store.connector() as connector:
            attributes = ObjectAttributes(media_type="text/plain")
            for key, body in FOREIGN.items():
                request = PutRequest(site.namespace, f"{scope}/{key}", attributes)
                await connector.put(request, body)

    allowed: dict[str, list[Mapping[str, bytes]]] = {}
    for fails in (False, True):
        await prepare(f"whole{fails}")
        total = await kill_at(site, f"whole{fails}", 1 << 30, fails=fails)
        assert total is not None
        allowed[f"whole{fails}"] = [BEFORE if fails else AFTER]
        for at in range(total):
            scope = f"{fails}{at}"
            await prepare(scope)
            ended = await kill_at(site, scope, at, fails=fails) is not None
            allowed[scope] = [BEFORE] if fails else [AFTER] if ended else [BEFORE, AFTER]

    pipe.send("end")
    there = await asyncio.to_thread(pipe.recv)
    await asyncio.to_thread(neighbour.join)
    await asyncio.sleep(1.0)  # the sweep spares what is younger than the late-write period
    await site.recover()
    async with site.uow_class() as uow:
        for scope, states in allowed.items():
            files = await uow.files.get(*[path async for path in uow.files.iter(f"{scope}/")])
            found = under({str(file.path): file.data for file in files}, scope)
            assert found in states, scope
            assert under(await site.store.objects(f"{scope}/"), scope) == found | FOREIGN, scope
    assert set((await site.journal()).values()) == {0}
    assert await site.store.objects(".fennflow/") == {}
    assert await etags(site, "foreign/") == foreign
    beside_it = {
        key: body.decode() for key, body in (await site.store.objects("neighbour/")).items()
    }
    assert beside_it == there

    # Each finds nothing wrong, and takes nothing of the other's.
    for each, own in ((site, [*allowed]), (other, ["neighbour"])):
        [report] = (await each.uow_class.reconcile()).values()
        assert set(report.differences) == {Difference.OTHER_CATALOG, Difference.UNKNOWN}
        assert report.differences[Difference.UNKNOWN] == len(allowed) * len(FOREIGN)
        assert report.actions == {}
        assert {path.partition("/")[0] for path in await listed(each)} <= {"foreign", *own}
        diagnosis = await each.uow_class.diagnose()
        assert diagnosis.problems == ()
        assert any("also written by the catalog" in line for line in diagnosis.advice)
    async with other.uow_class() as uow:
        await uow.files.put(text("last", "neighbour/last"))
    assert "neighbour/last" not in await listed(site)


async def put_foreign(site: Site) -> dict[str, str]:
    """Fill the bucket as another program does; return the keys and ETags."""
    async with site.store.connector() as connector:
        slots = asyncio.Semaphore(32)

        async def put(key: str) -> None:
            async with slots:
                attributes = ObjectAttributes(media_type="text/plain")
                await connector.put(PutRequest(site.namespace, key, attributes), b"foreign")

        async with asyncio.TaskGroup() as group:
            for number in range(FOREIGN_OBJECTS):
                group.create_task(put(f"foreign/{number % 20}/{number:05}"))
    found = await etags(site, "foreign/")
    assert len(found) == FOREIGN_OBJECTS
    return found


async def etags(site: Site, prefix: str) -> dict[str, str]:
    async with site.store.connector() as connector:
        listing = connector.list(site.namespace, prefix)
        return {each.location.key: each.etag async for each in listing}
