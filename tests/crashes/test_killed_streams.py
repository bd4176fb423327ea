"""A process is killed while it streams a large file, or copies one in parts (P13, I1 to I5)."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncGenerator
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import pytest

from crashing import FULL, SEED, Site, make_site, start
from fennflow.files import StreamContent
from fennflow.testing import Fault, S3Server
from fennflow.testing.servers import S3Request
from stores import raw_client

pytestmark = [pytest.mark.crashes, pytest.mark.timeout(900)]

MiB = 1 << 20
SAMPLE = 5
BATCH = 10
OLD, NEW = b"old" * (3 * MiB), b"new" * (4 * MiB)
BEFORE = {"over": OLD, "keep": OLD}
AFTER = {"over": NEW, "new": NEW, "keep": OLD, "copy": OLD}


def stream(body: bytes, name: str) -> StreamContent:
    async def pieces() -> AsyncGenerator[bytes]:
        for start_ in range(0, len(body), MiB):
            yield body[start_ : start_ + MiB]

    return StreamContent.from_iterable(pieces(), filename=name, media_type="a/b")


async def change(site: Site, scope: str) -> None:
    """Overwrite, create and copy, all in parts."""
    async with site.uow_class() as uow:
        files = uow.files.at(scope)
        await files.put(stream(NEW, "over"))
        await files.create(stream(NEW, "new"))
        await files.copy("keep", "copy")


def run(site: Site, scope: str, pipe: Connection) -> None:
    del pipe
    asyncio.run(change(site, scope))


async def left_parts(server: S3Server, bucket: str) -> list[Any]:
    """Return the parts of uploads; one whose id was lost has none."""
    async with raw_client(server) as client:
        uploads: list[Any] = (await client.list_multipart_uploads(Bucket=bucket)).get("Uploads", [])
        return [
            part
            for each in uploads
            for part in (
                await client.list_parts(Bucket=bucket, Key=each["Key"], UploadId=each["UploadId"])
            ).get("Parts", [])
        ]


async def empty(server: S3Server, bucket: str) -> None:
    """Delete all versions: the objects of all boundaries together would fill the disk."""
    async with raw_client(server) as client:
        async for page in client.get_paginator("list_object_versions").paginate(Bucket=bucket):
            for each in page.get("Versions", []) + page.get("DeleteMarkers", []):
                key, version = each["Key"], each["VersionId"]
                await client.delete_object(Bucket=bucket, Key=key, VersionId=version)


async def streaming_site(kind: str, request: pytest.FixtureRequest) -> Site:
    found = await make_site(kind, "sqlite", request)
    sizes = {"multipart_threshold": 5 * MiB, "multipart_part_size": 5 * MiB}
    connector = found.connector.model_copy(update={**sizes, "multipart_copy_threshold": 5 * MiB})
    return replace(found, connector=connector)


async def run_until(
    server: S3Server, site: Site, at: int, scope: str, *, takes_effect: bool
) -> int:
    """Run a child, and kill it at a request; return how many it sent."""
    async with site.uow_class() as uow:
        await uow.files.at(scope).put(*(stream(body, name) for name, body in BEFORE.items()))
    sent = 0
    process, pipe = await asyncio.to_thread(start, run, site, scope)

    def kill(_: S3Request) -> Fault | None:
        nonlocal sent
        sent += 1
        if sent != at or process.pid is None:
            return None
        os.kill(process.pid, signal.SIGKILL)
        return Fault.AFTER if takes_effect else Fault.BEFORE

    with server.failing(kill):
        await asyncio.to_thread(process.join)
    pipe.close()
    return sent


@pytest.mark.parametrize("takes_effect", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("kind", ["moto", "moto-versioned"])
async def test_killed_at_any_request(
    kind: str, moto: S3Server, request: pytest.FixtureRequest, *, takes_effect: bool
) -> None:
    whole = await streaming_site(kind, request)
    total = await run_until(moto, whole, 0, "whole", takes_effect=takes_effect)
    assert total > (20 if kind == "moto" else 10)
    points = list(range(1, total + 1))
    if not FULL:
        points = sorted(random.Random(f"{SEED} {kind} {takes_effect}").sample(points, SAMPLE))
    for first in range(0, len(points), BATCH):
        some = points[first : first + BATCH]
        site = await streaming_site(kind, request)
        for at in some:
            await run_until(moto, site, at, f"at{at}", takes_effect=takes_effect)
        await asyncio.sleep(1.0)  # the sweep spares what is younger than the late-write period
        await site.recover()
        assert await left_parts(moto, site.namespace) == []
        objects = await site.store.objects()
        assert [key for key in objects if key.startswith(".fennflow")] == []
        async with site.uow_class() as uow:
            paths = [str(path) async for path in uow.files.iter()]
        assert paths == sorted(objects)
        for at in some:
            scope = f"at{at}/"
            left = {k.removeprefix(scope): v for k, v in objects.items() if k.startswith(scope)}
            assert left in [BEFORE, AFTER], f"at {at} of {total}: {sorted(left)}"
        assert set((await site.journal()).values()) == {0}, await site.journal()
        await empty(moto, site.namespace)
