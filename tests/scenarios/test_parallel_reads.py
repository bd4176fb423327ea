"""Large files whose ranges are read in parallel, since a store limits each connection."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from fennflow.connectors import Connector, Location, ObjectAttributes, PutRequest
from fennflow.exceptions import ObjectChangedException, PreconditionFailedException
from fennflow.files import BinaryContent
from fennflow.testing import Fault, S3Request, S3Server, strict_s3_server
from fennflow_s3.ranges import reader_waits
from stores import FullUOW, Store, new_bucket, s3_config

KiB = 1 << 10
RANGE = 64 * KiB
BODY = random.Random(3).randbytes(32 * RANGE + 17)
ATTRIBUTES = ObjectAttributes(media_type="a/b")


def always(_kept: float, _elapsed: float) -> bool:
    return True


def never(_kept: float, _elapsed: float) -> bool:
    return False


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fennflow_s3.ranges.RANGE", RANGE)
    monkeypatch.setattr("fennflow_s3.ranges.ALONE", 2 * RANGE)
    monkeypatch.setattr("fennflow_s3.ranges.WORTH_IT", 4 * RANGE)
    monkeypatch.setattr("fennflow_s3.ranges.PATIENCE", 60.0)
    monkeypatch.setattr("fennflow_s3.ranges.reader_waits", always)


@pytest.fixture
async def store(strict: S3Server) -> Store:
    return Store(s3_config(strict, max_attempts=1), await new_bucket(strict), strict)


@dataclass
class Ranges:
    """Records the requests to a server, and how many ranges are concurrent.

    Attributes:
        together: so many ranges are answered when all of them have been asked for.
        meanwhile: called before a range is answered.
    """

    together: int = 1
    meanwhile: Callable[[S3Request], Fault | None] = lambda _: None
    whole: int = 0
    rest: int = 0
    asked: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    most: int = 0
    _under_way: int = 0
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def __call__(self, request: S3Request) -> Fault | None:
        if request.operation != "GET":
            return None
        if not request.range:
            self.whole += 1
            return None
        first, _, last = request.range.partition("-")
        self.rest += not last
        with self._changed:
            assert request.conditional
            self.asked.append((int(first), int(last or len(BODY) - 1) + 1))
            self._under_way += 1
            self.most = max(self.most, self._under_way)
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: len(self.asked) >= self.together, timeout=60)
        try:
            return self.meanwhile(request)
        finally:
            with self._changed:
                self._under_way -= 1


@contextmanager
def watching(store: Store, **options: Any) -> Generator[Ranges]:
    assert store.server is not None
    seen = Ranges(**options)
    with store.server.failing(seen):
        yield seen


async def put(store: Store, body: bytes = BODY) -> type[FullUOW]:
    uow_class = store.uow()
    async with uow_class() as uow:
        await uow.files.put(BinaryContent(data=body, media_type="a/b", filename="a.bin"))
    return uow_class


async def read(uow_class: type[FullUOW], **options: Any) -> bytes:
    async with uow_class() as uow, uow.files.open("a.bin", **options) as opened:
        return b"".join([chunk async for chunk in opened])


async def test_ranges_of_a_large_file_are_read_in_parallel_and_in_order(store: Store) -> None:
    uow_class = await put(store)
    with watching(store, together=3) as seen:
        assert await read(uow_class) == BODY
    assert 3 <= seen.most <= 8
    assert seen.whole == 1
    starts, ends = zip(*sorted(seen.asked), strict=True)
    assert starts[1:] == ends[:-1]  # each byte once
    assert starts[0] >= 2 * RANGE
    assert ends[-1] == len(BODY)


@pytest.mark.parametrize(
    ("size", "options"),
    [(5 * RANGE, {}), (len(BODY), {"end": len(BODY) - 1}), (len(BODY), {"start": 1, "end": 9})],
    ids=["short", "up to a byte", "range"],
)
async def test_short_files_and_ranges_stay_one_request(
    store: Store, size: int, options: dict[str, int]
) -> None:
    uow_class = await put(store, BODY[:size])
    with watching(store) as seen:
        found = await read(uow_class, **options)
    assert found == BODY[options.get("start") : options.get("end", size)]
    assert seen.whole + len(seen.asked) == 1


async def test_a_reader_that_is_slower_than_its_connection_is_served_by_one_request(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert reader_waits(0.1, 0.3)
    assert not reader_waits(0.2, 0.3)
    monkeypatch.setattr("fennflow_s3.ranges.reader_waits", never)
    uow_class = await put(store)
    with watching(store) as seen:
        assert await read(uow_class) == BODY
    assert (seen.whole, seen.asked) == (1, [])


async def test_a_range_that_fails_is_asked_for_again(store: Store) -> None:
    uow_class = await put(store)
    failed: list[S3Request] = []

    def fail_once(request: S3Request) -> Fault | None:
        if len(failed) == 1 or int(request.range.partition("-")[0]) < 10 * RANGE:
            return None
        failed.append(request)
        return Fault.BEFORE

    with watching(store, meanwhile=fail_once):
        assert await read(uow_class) == BODY
    assert failed


async def test_a_file_that_others_replace_between_ranges_is_never_mixed(store: Store) -> None:
    uow_class, loop = await put(store), asyncio.get_running_loop()
    replaced: list[object] = []

    async def replace() -> None:
        async with store.connector() as connector:
            await connector.put(PutRequest(store.namespace, "a.bin", ATTRIBUTES), BODY[::-1])

    def meanwhile(request: S3Request) -> None:
        if not replaced and int(request.range.partition("-")[0]) >= 10 * RANGE:
            replaced.append(request)
            asyncio.run_coroutine_threadsafe(replace(), loop).result(60)

    read_so_far = b""
    with watching(store, meanwhile=meanwhile), pytest.raises(ObjectChangedException):
        async with uow_class() as uow, uow.files.open("a.bin") as opened:
            async for chunk in opened:
                read_so_far += chunk
    assert replaced
    assert BODY.startswith(read_so_far)


async def test_a_server_that_ignores_ranges_is_asked_for_one_once() -> None:
    with strict_s3_server(without={"ranges"}) as server:
        store = Store(s3_config(server), await new_bucket(server), server)
        uow_class = await put(store)
        async with uow_class.lifespan():
            with watching(store) as seen:
                assert await read(uow_class) == BODY
            assert seen.asked
            with watching(store) as seen:
                assert await read(uow_class) == BODY
        assert (seen.whole, seen.asked) == (1, [])


# --- resources of the engine ---------------------------------------------------------------------


@pytest.fixture
async def connector(store: Store) -> AsyncGenerator[Connector]:
    async with store.connector() as connector:
        await connector.put(PutRequest(store.namespace, "a.bin", ATTRIBUTES), BODY)
        yield connector


@asynccontextmanager
async def reading(store: Store, connector: Connector) -> AsyncGenerator[AsyncGenerator[bytes]]:
    stored = await connector.head(store.namespace, Location("a.bin"))
    assert stored is not None
    stream = connector.stream(store.namespace, Location("a.bin"), if_match=stored.etag)
    async with aclosing(stream) as chunks:
        yield chunks


async def test_ranges_take_no_more_memory_than_the_engine_has(
    store: Store, connector: Connector
) -> None:
    for limit, most in ((3 * RANGE, 3), (1, 1)):
        connector.buffers.limit = limit
        read = b""
        with watching(store, together=most) as seen:
            async with reading(store, connector) as chunks:
                async for chunk in chunks:
                    read += chunk
                    assert connector.buffers.held <= max(limit, RANGE)
        assert read == BODY
        assert seen.most == most
        assert connector.buffers.held == 0


async def test_a_stream_that_is_left_holds_neither_requests_nor_memory(
    store: Store, connector: Connector
) -> None:
    before = asyncio.all_tasks()
    with watching(store, together=2):
        async with reading(store, connector) as chunks:
            async for _ in chunks:
                if connector.buffers.held > RANGE:
                    break
            assert connector.buffers.held
        assert connector.buffers.held == 0
        assert asyncio.all_tasks() == before


async def test_a_reader_that_pauses_holds_nothing_and_goes_on_with_one_request(
    store: Store, connector: Connector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fennflow_s3.ranges.PATIENCE", 0.1)
    before, read = asyncio.all_tasks(), b""
    with watching(store, together=2) as seen:
        async with reading(store, connector) as chunks:
            async for chunk in chunks:
                read += chunk
                if connector.buffers.held:
                    while connector.buffers.held or asyncio.all_tasks() != before:  # noqa: ASYNC110 - no event comes
                        await asyncio.sleep(0.01)
                    assert seen.rest == 0
    assert read == BODY
    assert seen.rest == 1


async def test_a_change_is_noticed_by_each_range(store: Store, connector: Connector) -> None:
    async with reading(store, connector) as chunks:
        assert BODY.startswith(await anext(chunks))
        await connector.put(PutRequest(store.namespace, "a.bin", ATTRIBUTES), BODY[::-1])
        with pytest.raises(PreconditionFailedException):
            async for _ in chunks:
                pass
