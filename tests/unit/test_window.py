"""The number of concurrent requests to S3, which is reduced while it asks to slow down."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from pydantic import SecretStr

from fennflow.connectors import S3ConnectorConfig
from fennflow.engine.concurrency import run_all
from fennflow_s3.client import client_context
from fennflow_s3.window import Window

OK, BUSY = 200, 503


async def entered(window: Window, count: int) -> list[int]:
    return [await asyncio.wait_for(window.enter(), 60) for _ in range(count)]


async def test_as_many_are_under_way_as_there_are_connections() -> None:
    window = Window(2)
    first, _ = await entered(window, 2)
    third = asyncio.create_task(window.enter())
    await asyncio.sleep(0)
    assert not third.done()
    window.leave(first, OK)
    await asyncio.wait_for(third, 60)


async def test_those_that_are_refused_together_count_once() -> None:
    window = Window(8)
    for each in await entered(window, 8):
        window.leave(each, BUSY)
    await entered(window, 4)
    fifth = asyncio.create_task(window.enter())
    await asyncio.sleep(0)
    assert not fifth.done()
    fifth.cancel()


async def test_one_at_least_is_under_way_and_the_window_opens_again() -> None:
    window = Window(4)
    for _ in range(9):
        (each,) = await entered(window, 1)
        window.leave(each, BUSY)
    for _ in range(20):
        (each,) = await entered(window, 1)
        window.leave(each, OK)
    await entered(window, 4)


async def test_no_answer_says_nothing() -> None:
    window = Window(4)
    for each in await entered(window, 4):
        window.leave(each, None)
    await entered(window, 4)


@pytest.mark.parametrize("late", [False, True])
async def test_a_cancelled_caller_keeps_no_turn(late: bool) -> None:  # noqa: FBT001 - a parameter
    window = Window(1)
    (held,) = await entered(window, 1)
    waiting = asyncio.create_task(window.enter())
    await asyncio.sleep(0)
    if late:
        window.leave(held, OK)
    waiting.cancel()
    with suppress(asyncio.CancelledError):
        await waiting
    if not late:
        window.leave(held, OK)
    await entered(window, 1)


SLOW_DOWN = (
    "<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
AT_ONCE = 16
LONGER_THAN_BOTOCORE_WAITS = 1.1


async def test_a_server_that_asks_to_slow_down_gets_half_as_many_at_once() -> None:
    arrived = under_way = most = 0
    all_there, half_there = asyncio.Event(), asyncio.Event()

    async def handle(request: web.Request) -> web.Response:
        nonlocal arrived, under_way, most
        await request.read()
        arrived += 1
        if arrived <= AT_ONCE:
            if arrived == AT_ONCE:
                all_there.set()
            await all_there.wait()
            return web.Response(status=BUSY, text=SLOW_DOWN)
        under_way += 1
        most = max(most, under_way)
        if under_way == AT_ONCE / 2:
            half_there.set()
        await half_there.wait()
        await asyncio.sleep(LONGER_THAN_BOTOCORE_WAITS)  # time for more, if they may
        under_way -= 1
        return web.Response(headers={"ETag": '"etag"'})

    app = web.Application()
    app.router.add_put("/{path:.*}", handle)
    async with TestServer(app, host="127.0.0.1") as server:
        config = S3ConnectorConfig(
            endpoint_url=str(server.make_url("/")).rstrip("/"),
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key=SecretStr("test"),
            addressing_style="path",
        )

        async def put(number: int) -> None:
            await client.put_object(Bucket="bucket", Key=str(number), Body=b"body")

        async with client_context(config) as client:
            await run_all(AT_ONCE, put, range(AT_ONCE))
    assert most == AT_ONCE / 2
