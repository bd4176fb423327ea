"""A store that does not answer, and units of work that have a deadline."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
from typing_extensions import override

from controlled_loop import controlled
from fennflow import plugins
from fennflow.backends import process_name
from fennflow.connectors import ObjectAttributes, PutRequest
from fennflow.engine.circuit import CLOSING_WITHIN
from fennflow.exceptions import (
    ConfigException,
    ConnectorUnavailableException,
    FennFlowException,
    RecordLockedException,
    TransactionTimeoutException,
)
from fennflow.files import TextContent
from fennflow.testing import Fault, S3Server, faults
from fennflow.testing.fixtures import failing
from fennflow_memory.backend import InMemoryBackend
from stores import FullUOW, Store, make_store, new_bucket, s3_config

ATTRIBUTES = ObjectAttributes(media_type="text/plain")


@pytest.fixture
async def memory(request: pytest.FixtureRequest) -> Store:
    return await make_store("memory", request)


def text(name: str) -> TextContent:
    return TextContent.from_content("new", filename=name)


@pytest.mark.parametrize("overwrites", [False, True], ids=["create", "overwrite"])
async def test_a_store_that_is_away_is_not_asked_again_and_again(
    overwrites: bool,  # noqa: FBT001 - a parameter of the test
    strict: S3Server,
) -> None:
    """A connector repeats its requests itself; here it does not, so that each is counted."""
    store = Store(s3_config(strict, max_attempts=1), await new_bucket(strict), strict)
    uow_class = store.uow()
    before = {"a.txt": b"new"} if overwrites else {}
    async with uow_class.lifespan():
        async with uow_class() as uow:
            await uow.files.put(text("a.txt" if overwrites else "b.txt"))
            if not overwrites:
                await uow.files.delete("b.txt")
        strict.fault = lambda _: Fault.BEFORE
        try:
            with strict.watched() as seen:
                with pytest.raises(ConnectorUnavailableException):
                    async with uow_class() as uow:
                        await uow.files.put(text("a.txt"))
                assert len(seen) <= 3
        finally:
            strict.fault = lambda _: None
        assert (await uow_class.recover()).pending == 0
    assert await store.objects() == before


async def test_what_is_sent_again_is_logged_with_its_key_its_error_and_the_wait(
    memory: Store, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), pytest.raises(ZeroDivisionError), failing("delete"):
        async with memory.uow()() as uow:
            await uow.files.put(text("a.txt"))
            raise ZeroDivisionError
    [record] = [each for each in caplog.records if getattr(each, "rule", None) == "retry"]
    assert record.name == "fennflow"
    message = record.getMessage()
    assert "bucket/a.txt failed, attempt 1 of 4; the next one is in 0." in message
    assert "ConnectorUnavailableException" in message


async def test_what_the_client_of_s3_sends_again_is_logged_too(
    strict: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(s3_config(strict, max_attempts=2), await new_bucket(strict), strict)
    async with store.connector() as connector:
        left = [Fault.SLOW_DOWN]
        with strict.failing(lambda _: left.pop() if left else None):
            await connector.put(PutRequest(store.namespace, "a b.txt", ATTRIBUTES), b"1")
    [record] = [each for each in caplog.records if getattr(each, "rule", None) == "retry"]
    assert f"{store.namespace}/a b.txt failed, and is sent again after " in record.getMessage()
    assert record.getMessage().endswith("s: SlowDown (HTTP 503)")


@controlled
async def test_a_unit_of_work_that_takes_too_long_is_undone(memory: Store) -> None:
    undone: list[str] = []

    async def undo() -> None:
        undone.append("step")

    uow_class = memory.uow(timeout=60)
    with pytest.raises(TransactionTimeoutException, match=r"timeout=2\.0 s"):
        async with uow_class(timeout=2.0) as uow:
            await uow.files.put(text("a.txt"))
            await uow.step(asyncio.Event().wait, undo)
    assert undone == ["step"]
    assert await memory.objects() == {}
    async with uow_class() as uow:
        await uow.files.put(text("a.txt"))


@controlled
async def test_a_unit_of_work_whose_time_is_over_does_not_commit(memory: Store) -> None:
    uow_class = memory.uow()
    async with uow_class.lifespan():
        with pytest.raises(TransactionTimeoutException):
            async with uow_class(timeout=1.0) as uow:
                await uow.files.put(text("a.txt"))
                await asyncio.sleep(1.0)
    assert await memory.objects() == {}
    with pytest.raises(ConfigException, match="timeout"):
        uow_class(timeout=0)


@dataclass(eq=False)
class Away(faults.Faults):
    """A store that refuses requests or does not answer once it is unreachable."""

    away: bool = False
    refused: int = 0

    @override
    async def around(self, operation: faults.Operation, effect: faults.Effect[Any]) -> Any:
        if self.away:
            self.refused += 1
            if self.refused > 1:
                await asyncio.Event().wait()
            message = "The store is unreachable."
            raise ConnectorUnavailableException(message)
        return await effect()


@controlled
async def test_closing_waits_a_few_seconds_for_a_store_that_is_away(memory: Store) -> None:
    store, clock = Away(), asyncio.get_running_loop().time
    connector = faults.FaultyConnectorConfig(inner=memory.config, faults=store)
    with plugins.override(faults):
        uow_class = Store(connector, memory.namespace).uow(compensation_timeout=600)
        async with uow_class.lifespan():
            task = asyncio.create_task(undone(uow_class, store))
            while store.refused < 2:  # noqa: ASYNC110 - no event comes
                await asyncio.sleep(0.1)
            task.cancel()
            await asyncio.wait({task})
            begun = clock()
        assert clock() - begun <= 3 * CLOSING_WITHIN


async def undone(uow_class: type[FullUOW], store: Away) -> None:
    async with uow_class() as uow:
        await uow.files.put(text("a.txt"))
        store.away = True
        raise ZeroDivisionError


async def test_a_locked_path_says_who_holds_it_and_until_when(memory: Store) -> None:
    async with memory.uow()() as uow:
        await uow.files.put(text("a.txt"))
        [held] = await memory.uow().transactions()
        with pytest.raises(RecordLockedException) as caught:
            async with memory.uow(lock_timeout=0)() as other:
                await other.files.put(text("a.txt"))
    assert caught.value.holder == held.transaction_id
    assert held.process == process_name()
    for part in (
        f"Transaction {held.transaction_id} of process {held.process} has been open for",
        f"write {memory.namespace}/a.txt",
        "alive",
        "lease ends in",
    ):
        assert part in str(caught.value)


async def test_a_loop_that_was_blocked_for_longer_than_the_lease_is_logged(
    memory: Store, caplog: pytest.LogCaptureFixture
) -> None:
    with suppress(FennFlowException):  # it may be lost
        async with memory.uow(lease_ttl=1.0)() as uow:
            await uow.files.put(text("a.txt"))
            time.sleep(1.5)  # noqa: ASYNC251 - as a program does that blocks the loop
            while "loop was blocked for" not in caplog.text:  # noqa: ASYNC110 - no event comes
                await asyncio.sleep(0.01)


async def test_of_two_units_of_work_that_wait_for_each_other_one_goes_on(memory: Store) -> None:
    uow_class = memory.uow(lock_timeout=600)  # longer than a test may take
    both = asyncio.Barrier(2)

    async def write(first: str, second: str) -> None:
        async with uow_class() as uow:
            await uow.files.put(text(first))
            async with both:
                pass
            await uow.files.put(text(second))

    results = await asyncio.gather(write("a", "b"), write("b", "a"), return_exceptions=True)
    [failed] = [each for each in results if each is not None]
    assert isinstance(failed, RecordLockedException)
    assert "a deadlock" in str(failed)
    assert set(await memory.objects()) == {"a", "b"}


@controlled
async def test_of_two_processes_that_wait_for_each_other_one_goes_on(memory: Store) -> None:
    """Neither sees what the other waits for, since they have separate engines."""
    both = asyncio.Barrier(2)

    async def write(lock_timeout: float, first: str, second: str) -> None:
        async with memory.uow(lock_timeout=lock_timeout)() as uow:
            await uow.files.put(text(first))
            async with both:
                pass
            await uow.files.put(text(second))

    older = asyncio.create_task(write(5.0, "a", "b"))
    while not await memory.objects():  # noqa: ASYNC110 - no event comes
        await asyncio.sleep(0)
    with pytest.raises(RecordLockedException):
        await write(5.1, "b", "a")
    await older
    assert set(await memory.objects()) == {"a", "b"}


@controlled
async def test_however_many_wait_for_a_path_its_holder_finishes(
    memory: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each check of a lock is a database transaction, and the holder needs the database, too."""
    looks: list[float] = []
    begin_writes = InMemoryBackend.begin_writes

    async def counted(*args: Any, **options: Any) -> Any:
        looks.append(asyncio.get_running_loop().time())
        return await begin_writes(*args, **options)

    monkeypatch.setattr(InMemoryBackend, "begin_writes", counted)
    uow_class = memory.uow(lock_timeout=60)

    async def put() -> None:
        async with uow_class() as uow:
            await uow.files.put(text("a"))

    async with uow_class() as uow:
        await uow.files.put(text("a"))
        waiting = [asyncio.create_task(put()) for _ in range(100)]
        await asyncio.sleep(10.0)
        assert len(looks) < 100 + 10 * 150
    await asyncio.gather(*waiting)
    assert len(looks) < 100 + 10 * 150 + 100 * 10
