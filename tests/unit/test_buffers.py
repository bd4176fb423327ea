"""The memory that transfers share: which transfer gets how much, and when."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from fennflow.buffers import Buffers, Share
from fennflow_s3.upload import Upload, split


async def turns() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_each_transfer_may_hold_one_part_and_waits_for_more() -> None:
    buffers = Buffers(10)
    one, other = Share(buffers), Share(buffers)
    with one, other:
        await one.take(8)
        await other.take(8)
        assert buffers.held == 16
        more = asyncio.create_task(one.take(2))
        await turns()
        assert not more.done()
        other.give(8)
        await turns()
        assert more.done()
    assert buffers.held == 0


async def test_those_who_wait_are_served_in_order() -> None:
    buffers = Buffers(10)
    shares = [Share(buffers) for _ in range(4)]
    served: list[int] = []

    async def take(number: int, size: int) -> None:
        await shares[number].take(size)
        served.append(number)

    await shares[0].take(7)
    for share in shares[1:]:
        await share.take(1)
    tasks = [asyncio.create_task(take(number, size)) for number, size in [(1, 5), (2, 1), (3, 1)]]
    await turns()
    assert served == []
    assert not shares[0].try_take(0)  # no one overtakes
    shares[0].give(7)
    await asyncio.gather(*tasks)
    assert served == [1, 2, 3]


async def test_a_transfer_that_holds_nothing_does_not_wait() -> None:
    buffers = Buffers(10)
    first, second, third = Share(buffers), Share(buffers), Share(buffers)
    await first.take(10)
    await second.take(1)
    await third.take(1)
    waiting = [asyncio.create_task(each.take(5)) for each in (second, third)]
    await turns()
    third.give(1)
    await turns()
    assert [each.done() for each in waiting] == [False, True]
    waiting[0].cancel()
    await asyncio.wait(waiting)


@pytest.mark.parametrize("given", [False, True], ids=["in time", "at the same moment"])
async def test_what_is_cancelled_while_it_waits_holds_nothing_more(
    given: bool,  # noqa: FBT001 - a parameter
) -> None:
    buffers = Buffers(10)
    holder, cut_off, last = Share(buffers), Share(buffers), Share(buffers)
    await holder.take(7)
    await cut_off.take(1)
    await last.take(2)
    first, second = asyncio.create_task(cut_off.take(9)), asyncio.create_task(last.take(1))
    await turns()
    if given:
        holder.give(7)
    first.cancel()
    await turns()
    assert first.cancelled()
    assert cut_off.held == 1
    holder.give(holder.held)
    await second
    assert buffers.held == 4


class Slow:
    """Accepts parts, and answers when it is released."""

    def __init__(self) -> None:
        self.let_go = asyncio.Event()

    async def upload_part(self, **_params: Any) -> dict[str, Any]:
        await self.let_go.wait()
        return {"ETag": "e"}


async def test_uploads_at_once_hold_no_more_than_the_budget_and_one_part_each() -> None:
    buffers, client = Buffers(100), Slow()
    sent = 0

    async def body() -> AsyncGenerator[bytes]:
        for _ in range(100):
            yield b"1"
            assert buffers.held <= 100 + 7 * 10

    async def upload() -> None:
        nonlocal sent
        with Share(buffers) as share:
            one = Upload(client, {}, "u", checksums=False)  # type: ignore[arg-type]
            await one.send(split(body(), lambda _: 10, share), share)
            sent += one.size

    tasks = [asyncio.create_task(upload()) for _ in range(8)]
    await turns()
    assert buffers.held >= 80
    client.let_go.set()
    await asyncio.gather(*tasks)
    assert sent == 800
    assert buffers.held == 0

    # With less than a part each, and with an upload whose source is a download.
    buffers.limit, client.let_go = 5, asyncio.Event()
    tasks = [asyncio.create_task(upload()) for _ in range(8)]
    await turns()
    assert buffers.held == 80
    for task in tasks[:4]:
        task.cancel()
    await asyncio.wait(tasks[:4])
    assert buffers.held == 40
    client.let_go.set()
    await asyncio.gather(*tasks[4:])
    assert buffers.held == 0
