"""Processes that commit rows and files in one transaction are killed (P5)."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

import crashing
from crashing import ROWS_AFTER, ROWS_BEFORE, SEED, Site, check_jointly, make_site, start
from fennflow.backends import SqlalchemyBackendConfig
from fennflow.testing import Boundary, S3Server
from fennflow.testing.processes import free_ports

pytestmark = [pytest.mark.crashes, pytest.mark.timeout(1800)]

SAMPLE = 3
FULL = "FENNFLOW_THOROUGH" in os.environ


async def kill_at(
    site: Site, scope: str, at: int, *, managed_by_caller: bool, driver: str | None
) -> int | None:
    """Run a child until it is killed; return how many boundaries it met if it was not."""
    process, pipe = await asyncio.to_thread(
        start,
        crashing.run_jointly_until_killed,
        site,
        scope,
        at,
        managed_by_caller=managed_by_caller,
        driver=driver,
    )
    try:
        return int(await asyncio.to_thread(pipe.recv))
    except EOFError:
        return None
    finally:
        await asyncio.to_thread(process.join)
        pipe.close()


@pytest.mark.parametrize("managed_by_caller", [False, True], ids=["with the block", "surrounding"])
@pytest.mark.parametrize(
    ("kind", "database", "driver"),
    [
        *(
            (kind, database, None)
            for kind in ("moto", "moto-versioned", "juicefs")
            for database in ("sqlite", "postgresql")
        ),
        # Without async, on drivers of their own.
        ("moto", "sqlite", "pysqlite"),
        ("moto", "postgresql", "psycopg"),
        ("moto", "postgresql", "psycopg2"),
    ],
)
async def test_rows_and_files_agree_wherever_the_process_is_killed(
    kind: str,
    database: str,
    driver: str | None,
    *,
    managed_by_caller: bool,
    request: pytest.FixtureRequest,
) -> None:
    site = await make_site(kind, database, request)
    await crashing.seed_jointly(site, "whole")
    how: Any = {"managed_by_caller": managed_by_caller, "driver": driver}
    total = await kill_at(site, "whole", 1 << 30, **how)
    assert total is not None
    assert total > 15
    points = list(range(total))
    if not FULL:
        choice = random.Random(f"{SEED} {kind} {database} {driver} {managed_by_caller}")
        points = sorted(choice.sample(points, SAMPLE))
    allowed: dict[str, list[Mapping[str, str]]] = {"whole": [ROWS_AFTER]}
    await crashing.seed_jointly(site, *(f"at{at}" for at in points))
    for at in points:
        ended = await kill_at(site, f"at{at}", at, **how) is not None
        allowed[f"at{at}"] = [ROWS_AFTER] if ended else [ROWS_BEFORE, ROWS_AFTER]
    await asyncio.sleep(1.0)  # the sweep spares what is younger than the late-write period
    await site.recover()
    await check_jointly(site, allowed)
    await site.recover()  # I7
    await check_jointly(site, allowed)


async def post(url: str, method: str, body: bytes) -> None:
    """Send a letter with one attachment, as soon as the server is there."""
    async with httpx.AsyncClient(timeout=30) as client:
        for _ in range(1200):
            try:
                answer = await client.request(
                    method,
                    url,
                    data={"title": body.decode()},
                    files={"files": ("a.txt", body, "text/plain")},
                )
            except httpx.ConnectError:
                await asyncio.sleep(0.05)
            else:
                assert answer.is_success, answer.text
                return
    pytest.fail("the example does not serve")


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
async def test_the_example_survives_a_kill_between_commit_and_copy(
    database: str, request: pytest.FixtureRequest, moto: S3Server, tmp_path: Path
) -> None:
    """After recovery the row and the file are both there."""
    site = await make_site("moto", "sqlite", request)
    url = f"sqlite:///{tmp_path}/letters.db"
    if database == "postgresql":
        url = request.getfixturevalue("postgresql").new_database()
    site = Site(site.connector, site.namespace, SqlalchemyBackendConfig(url=url), site.settings)
    variables = {
        "DATABASE_URL": url,
        "BUCKET": site.namespace,
        "AWS_ENDPOINT_URL": moto.url,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": moto.access_key,
        "AWS_SECRET_ACCESS_KEY": moto.secret_key,
    }
    [port] = free_ports(1)
    arguments = (crashing.serve_until, Boundary("before", "copy"), variables, port)
    process, _ = await asyncio.to_thread(start, *arguments)
    letters = f"http://127.0.0.1:{port}/letters"
    await post(letters, "POST", b"first")
    with pytest.raises(httpx.RemoteProtocolError):  # it was killed before it answered
        await post(f"{letters}/1", "PUT", b"second")
    await asyncio.to_thread(process.join)
    assert (await site.sql("SELECT title FROM letters"))[0] == "second"
    objects = await site.store.objects()
    assert objects["letters/1/a.txt"] == b"first"
    [staged] = [key for key in objects if key.startswith(".fennflow")]
    assert objects[staged] == b"second"
    async with site.uow_class() as uow:
        assert (await uow.files.get("letters/1/a.txt")).one().data == b"second"
    await site.recover()
    assert await site.store.objects() == {"letters/1/a.txt": b"second"}
    assert await site.sql("SELECT title FROM letters") == ["second"]
