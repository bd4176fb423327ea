"""Files of any size, sent while they are read and read while they arrive."""

from __future__ import annotations

import asyncio
import hashlib
import io
import random
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from typing_extensions import override

import fennflow_memory.connector
from fennflow import plugins
from fennflow.connectors import Location, ObjectAttributes, PutRequest
from fennflow.exceptions import (
    ChecksumMismatchException,
    ConnectorUnavailableException,
    FileException,
    NoSuchKeyException,
    ObjectChangedException,
    PathException,
    RecordAlreadyExistsException,
    TransactionException,
    TransactionLostException,
    UploadIdleException,
)
from fennflow.files import BinaryContent, FileContent, StreamContent, TextContent
from fennflow.repositories import ObjectStream
from fennflow.testing import Fault, S3Server, faults
from fennflow.testing.servers import S3Request
from soaking import resident_mebibytes
from stores import FullUOW, Store, make_store, raw_client

MiB = 1 << 20
LONG = random.Random(1).randbytes(12 * MiB)
SHORT = LONG[: 3 * MiB]
STORES = ["memory", "moto", "moto-versioned", "juicefs", "strict"]


@pytest.fixture(params=STORES)
async def store(request: pytest.FixtureRequest) -> Store:
    return await small_parts(request.param, request)


@pytest.fixture
async def moto_store(request: pytest.FixtureRequest) -> Store:
    return await small_parts("moto", request)


async def small_parts(kind: str, request: pytest.FixtureRequest) -> Store:
    sizes = {"multipart_threshold": 5 * MiB, "multipart_part_size": 5 * MiB}
    return await make_store(kind, request, **({} if kind == "memory" else sizes))


async def pieces(body: bytes, size: int = 999_983) -> AsyncGenerator[bytes]:
    for start in range(0, len(body), size):
        yield body[start : start + size]


def stream(body: bytes, name: str = "a.bin", **options: Any) -> StreamContent:
    return StreamContent.from_iterable(
        pieces(body), filename=name, media_type="application/x-test", **options
    )


async def read(uow: FullUOW, path: str = "a.bin", **options: Any) -> bytes:
    async with uow.files.open(path, **options) as opened:
        return b"".join([chunk async for chunk in opened])


async def uploads(store: Store) -> list[Any]:
    assert store.server is not None
    async with raw_client(store.server) as client:
        return (await client.list_multipart_uploads(Bucket=store.namespace)).get("Uploads", [])


# --- writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [LONG, SHORT, b""], ids=["long", "short", "empty"])
async def test_a_stream_is_written_overwritten_and_read(store: Store, body: bytes) -> None:
    uow_class = store.uow()
    async with uow_class() as uow:
        assert await uow.files.put(stream(body[::-1])) == ["a.bin"]
        assert await read(uow) == body[::-1]
    async with uow_class() as uow:
        await uow.files.put(stream(body, metadata={"by": "Zoë"}))
        async with uow_class() as other:
            assert await read(other) == body[::-1]
    async with uow_class() as uow:
        assert await read(uow) == body
        info = await uow.files.stat("a.bin")
        assert (info.size, info.sha256) == (len(body), hashlib.sha256(body).hexdigest())
        assert (info.media_type, info.metadata) == ("application/x-test", {"by": "Zoë"})
        file = (await uow.files.get("a.bin")).one()
        assert (type(file), file.data) == (BinaryContent, body)
    assert await store.objects() == {"a.bin": body}


async def test_a_stream_that_is_not_committed_leaves_nothing(store: Store) -> None:
    uow_class = store.uow()
    with pytest.raises(ZeroDivisionError):
        async with uow_class() as uow:
            await uow.files.put(stream(LONG), stream(SHORT, "b.bin"))
            raise ZeroDivisionError
    assert await store.objects() == {}


class Readable:
    """An upload as web frameworks provide it."""

    filename = "up/load.txt"
    content_type = "text/markdown"

    def __init__(self, body: bytes, size: int | None = None) -> None:
        self._body = io.BytesIO(body)
        self.size = size

    async def read(self, size: int = -1) -> bytes:
        return self._body.read(size)


def some(body: bytes) -> Iterator[bytes]:
    yield body[:5]
    yield b""
    yield body[5:]


SOURCES: list[tuple[str, Callable[[], Any]]] = [
    ("an async generator", lambda: pieces(SHORT)),
    ("a generator", lambda: some(SHORT)),
    ("a list", lambda: [SHORT[:9], SHORT[9:]]),
    ("an open file", lambda: io.BytesIO(SHORT)),
    ("an upload", lambda: Readable(SHORT, len(SHORT))),
    ("an upload of unknown size", lambda: Readable(SHORT)),
]


@pytest.mark.parametrize("source", [each for _, each in SOURCES], ids=[name for name, _ in SOURCES])
async def test_many_things_are_sources(source: Callable[[], Any]) -> None:
    class UOW(FullUOW):
        pass

    async with UOW() as uow:
        await uow.files.put(StreamContent.from_iterable(source(), filename="a.txt"))
        assert await read(uow, "a.txt") == SHORT


@pytest.mark.parametrize("error", [StopIteration, SystemExit])
async def test_a_source_that_raises_what_no_thread_hands_on_fails(
    error: type[BaseException],
) -> None:
    """StopIteration would make the put wait forever, and SystemExit would end the event loop."""

    class Source:
        def read(self, size: int) -> bytes:
            raise error

    class UOW(FullUOW):
        pass

    async with UOW() as uow:
        with pytest.raises(TransactionException, match="It ended with"):
            await uow.files.put(StreamContent.from_iterable(Source(), filename="ended.txt"))
        assert not await uow.files.exists("ended.txt")


async def test_an_upload_brings_its_name_type_and_size() -> None:
    content = StreamContent.from_iterable(Readable(b"1", 1))
    assert (content.filename, content.media_type, content.size) == (
        "up/load.txt",
        "text/markdown",
        1,
    )


@pytest.mark.parametrize("size", [12 * MiB, 10])
async def test_a_local_file_is_sent(store: Store, tmp_path: Path, size: int) -> None:
    (tmp_path / "film.mp4").write_bytes(LONG[:size])
    content = FileContent.from_local_path(tmp_path / "film.mp4")
    assert (content.filename, content.media_type, content.size) == ("film.mp4", "video/mp4", size)
    async with store.uow()() as uow:
        await uow.files.at("films").put(content)
        await uow.files.put(content)
    assert await store.objects() == {"film.mp4": LONG[:size], "films/film.mp4": LONG[:size]}


async def test_a_short_stream_is_one_put_and_a_long_one_is_sent_in_parts(
    moto_store: Store,
) -> None:
    server, uow_class = moto_store.server, moto_store.uow()
    assert server is not None
    async with uow_class() as uow:
        await uow.files.put(TextContent.from_content("probes", filename="p"))
    with server.watched() as seen:
        async with uow_class() as uow:
            await uow.files.put(stream(SHORT, "short"))
    assert [each.operation for each in seen] == ["PUT"]
    with server.watched() as seen:
        async with uow_class() as uow:
            await uow.files.put(stream(LONG, "long"))
    assert [each.operation for each in seen] == ["HEAD", "POST", "PUT", "PUT", "PUT", "POST"]


@pytest.mark.parametrize("body", [LONG, SHORT], ids=["long", "short"])
async def test_what_a_source_raises_is_raised_and_its_call_is_undone(
    store: Store, body: bytes
) -> None:
    mine = OSError("the disk is gone")

    async def fail() -> AsyncGenerator[bytes]:
        yield body
        raise mine

    uow_class = store.uow()
    async with uow_class() as uow:
        await uow.files.put(TextContent.from_content("kept", filename="kept"))
        with pytest.raises(OSError, match="the disk is gone") as caught:
            await uow.files.put(
                TextContent.from_content("with it", filename="with it"),
                StreamContent.from_iterable(fail(), filename="a.txt"),
            )
        assert caught.value is mine
        assert mine.__cause__ is None
        assert await uow.files.list() == ["kept"]
    assert await store.objects() == {"kept": b"kept"}
    if store.server is not None:
        assert await uploads(store) == []


@pytest.mark.parametrize("body", [LONG, SHORT], ids=["long", "short"])
@pytest.mark.parametrize("off", [-1, 1])
async def test_a_body_of_another_size_than_was_said_is_refused(
    moto_store: Store, body: bytes, off: int
) -> None:
    with pytest.raises(FileException, match="was given"):
        async with moto_store.uow()() as uow:
            await uow.files.put(stream(body, size=len(body) + off))
    assert await moto_store.objects() == {}
    assert await uploads(moto_store) == []


async def test_a_cancelled_upload_is_aborted(moto_store: Store) -> None:
    waits = asyncio.Event()
    closed = False

    async def hang() -> AsyncGenerator[bytes]:
        nonlocal closed
        try:
            yield LONG
            waits.set()
            await asyncio.Event().wait()
        finally:
            closed = True

    async def work() -> None:
        async with moto_store.uow()() as uow:
            await uow.files.put(StreamContent.from_iterable(hang(), filename="a.txt"))

    task = asyncio.create_task(work())
    await waits.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert closed
    assert await moto_store.objects() == {}
    assert await uploads(moto_store) == []


async def test_a_lost_lease_stops_a_stream(moto_store: Store) -> None:
    """P23: not one more of its parts is sent."""
    server = moto_store.server
    assert server is not None
    uow_class = moto_store.uow()
    with server.watched() as seen, pytest.raises(TransactionLostException):
        async with uow_class() as uow:

            async def lose() -> AsyncGenerator[bytes]:
                yield LONG[: 7 * MiB]
                uow.files._session._tx.lease.until = float("-inf")
                yield LONG

            await uow.files.put(StreamContent.from_iterable(lose(), filename="a.txt"))
    parts = [each for each in seen if "partNumber" in each.query]
    assert len(parts) < 2
    assert [each for each in seen if each.method == "POST" and "uploadId" in each.query] == []


async def test_a_stream_is_read_once() -> None:
    content = stream(b"1")

    class UOW(FullUOW):
        pass

    async with UOW() as uow:
        await uow.files.put(content)
        with pytest.raises(FileException, match="already been consumed"):
            await uow.files.put(content)
        assert await read(uow) == b"1"


async def test_progress_is_reported_in_bytes(store: Store, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(LONG)
    progress: list[tuple[int, int | None]] = []
    async with store.uow()() as uow:
        await uow.files.put(
            FileContent.from_local_path(tmp_path / "a.bin", media_type="a/b"),
            stream(SHORT, "b.bin", size=len(SHORT)),
            TextContent.from_content("12345", filename="c"),
            on_progress=lambda done, total: progress.append((done, total)),
        )
    total = len(LONG) + len(SHORT) + 5
    assert {each for _, each in progress} == {total}
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)
    assert progress[-1] == (total, total)


async def test_progress_without_a_size_has_no_total_and_may_fail_the_call(store: Store) -> None:
    progress: list[int | None] = []

    def stop(done: int, total: int | None) -> None:
        progress.append(total)
        if done > MiB:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        async with store.uow()() as uow:
            await uow.files.put(stream(LONG), on_progress=stop)
    assert set(progress) == {None}
    assert await store.objects() == {}


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (lambda: StreamContent.from_iterable([b"1"]), "needs a filename"),
        (
            lambda: StreamContent.from_iterable(cast("Any", b"123"), filename="a.txt"),
            "is not a stream",
        ),
        (lambda: StreamContent.from_iterable([b"1"], filename="a.txt", size=-1), "size"),
        (lambda: StreamContent.from_iterable([b"1"], filename="a.txt", media_type="x"), "media"),
        (lambda: FileContent.from_local_path("/nowhere/a.txt"), "cannot be read"),
        (lambda: FileContent.from_local_path("/"), "is not a file"),
    ],
)
def test_what_is_not_a_stream_is_refused_immediately(wrong: Callable[[], Any], match: str) -> None:
    with pytest.raises(FileException, match=match):
        wrong()


def names_in(directory: Path) -> list[str]:
    return sorted(each.name for each in directory.iterdir())


async def test_what_is_open_for_reading_can_be_put_and_saved(store: Store, tmp_path: Path) -> None:
    local, saved = tmp_path / "a.bin", tmp_path / "b.bin"
    local.write_bytes(b"0123456789")
    async with store.uow()() as uow:
        with local.open("rb") as file:
            assert await uow.files.put(file) == ["a.bin"]
        assert await uow.files.at("copy").put(local) == ["copy/a.bin"]
        async with uow.files.open("a.bin") as stream:
            assert (await stream.read(3), await stream.read(0)) == (b"012", b"")
            assert await uow.files.at("x").put(
                StreamContent.from_iterable(stream, filename="rest")
            ) == ["x/rest"]
        assert await uow.files.read_bytes("x/rest") == b"3456789"
        async with uow.files.open("a.bin") as stream:
            first = await stream.read(1)
            assert first + await stream.read() == b"0123456789"
            assert await stream.read() == b""
        async with uow.files.open("a.bin") as stream:
            half: Any = 0.5
            with pytest.raises(PathException, match=r"size=0\.5"):
                await stream.read(half)
            assert await stream.read(None) == b"0123456789"
        async with uow.files.open("copy/a.bin", start=2) as stream:
            await stream.save_to(saved)
    assert saved.read_bytes() == b"23456789"
    assert names_in(tmp_path) == ["a.bin", "b.bin"]


async def test_a_file_that_cannot_be_saved_whole_leaves_the_old_one(
    store: Store, tmp_path: Path
) -> None:
    saved = tmp_path / "a.txt"
    saved.write_text("old")
    async with store.uow()() as uow:
        await uow.files.put(TextContent.from_content("new", filename="a.txt"))
        async with uow.files.open("a.txt") as stream:
            stream.close()
            with pytest.raises(TransactionException):
                await stream.save_to(saved)
    assert (saved.read_text(), names_in(tmp_path)) == ("old", ["a.txt"])


async def test_a_read_that_was_cut_off_is_not_taken_for_the_end_of_the_file(
    request: pytest.FixtureRequest,
) -> None:
    store = await make_store("memory", request)
    async with store.uow()() as uow:
        await uow.files.put(TextContent.from_content("01", filename="a.txt"))
        info = await uow.files.stat("a.txt")
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def chunks() -> AsyncGenerator[bytes]:
        yield b"0"
        begun.set()
        await go_on.wait()
        yield b"1"

    stream = ObjectStream(info, chunks())
    reading = asyncio.create_task(stream.read())
    await begun.wait()
    with pytest.raises(TransactionException, match="another task"):
        await stream.read()
    go_on.set()
    assert (await reading, await stream.read()) == (b"01", b"")

    go_on.clear()
    stream = ObjectStream(info, chunks())
    # The second chunk does not arrive in time, and what was read of the first one is lost.
    for _ in range(2):
        with pytest.raises((TimeoutError, TransactionException)):
            async with asyncio.timeout(0):
                await stream.read()
    with pytest.raises(TransactionException, match="was cancelled"):
        assert [chunk async for chunk in stream] == []


async def test_chunks_that_are_not_bytes_are_refused(store: Store) -> None:
    texts: Any = ["text"]
    with pytest.raises(FileException, match="produced a str"):
        async with store.uow()() as uow:
            await uow.files.put(StreamContent.from_iterable(texts, filename="a.txt"))
    assert await store.objects() == {}


class NotReady:
    """A file that does not block."""

    def __init__(self) -> None:
        self.chunks: list[bytes | None] = [b"1", None, b"2", b""]

    def read(self, size: int = -1, /) -> Any:
        del size
        return self.chunks.pop(0)


@pytest.mark.parametrize("source", [[b"1", None, b"2"], NotReady()], ids=["chunks", "file"])
async def test_a_source_has_not_ended_where_it_gives_nothing(
    source: Any, request: pytest.FixtureRequest
) -> None:
    store = await make_store("memory", request)
    async with store.uow()() as uow:
        with pytest.raises(FileException, match="None instead of bytes"):
            await uow.files.put(StreamContent.from_iterable(source, filename="a"))
    assert await store.objects() == {}


def test_the_size_of_a_stream_is_a_number_or_refused() -> None:
    size: Any = 3.5
    with pytest.raises(FileException, match="size"):
        StreamContent.from_iterable([b"123"], filename="a", size=size)


# --- objects of other writers --------------------------------------------------------------------


async def put_foreign(store: Store) -> None:
    async with store.connector() as connector:
        attributes = ObjectAttributes(media_type="text/plain")
        await connector.put(PutRequest(store.namespace, "a.bin", attributes), b"another writer's")


async def test_an_object_of_others_is_found_before_a_long_stream_is_sent(
    moto_store: Store,
) -> None:
    """P14: `create` refuses; `put` replaces it at the commit and not before."""
    server, uow_class = moto_store.server, moto_store.uow()
    assert server is not None
    async with uow_class() as uow:
        await uow.files.list()
    await put_foreign(moto_store)
    with server.watched() as seen, pytest.raises(RecordAlreadyExistsException):
        async with uow_class() as uow:
            await uow.files.create(stream(LONG))
    assert [each for each in seen if "uploads" in each.query and each.method == "POST"] == []
    async with uow_class() as uow:
        await uow.files.put(stream(LONG))
        assert (await moto_store.objects())["a.bin"] == b"another writer's"
    assert await moto_store.objects() == {"a.bin": LONG}


@pytest.mark.parametrize("repeatable", [True, False])
async def test_an_object_that_others_write_meanwhile_is_not_lost(
    moto_store: Store, tmp_path: Path, *, repeatable: bool
) -> None:
    """I5, P14: a source that can be read again is sent again, to another key."""
    uow_class = moto_store.uow()
    async with uow_class() as uow:
        await uow.files.list()
    (tmp_path / "a.bin").write_bytes(LONG)

    async def meanwhile() -> AsyncGenerator[bytes]:
        yield LONG
        await put_foreign(moto_store)

    if repeatable:
        server, loop = moto_store.server, asyncio.get_running_loop()
        assert server is not None
        progress: list[str] = []

        def before_the_end(request: S3Request) -> None:
            if request.method == "POST" and "uploadId" in request.query and not progress:
                progress.append(request.key)
                asyncio.run_coroutine_threadsafe(put_foreign(moto_store), loop).result(30)

        with server.failing(before_the_end):
            async with uow_class() as uow:
                content = FileContent.from_local_path(tmp_path / "a.bin", media_type="a/b")
                await uow.files.put(content)
                assert (await moto_store.objects())["a.bin"] == b"another writer's"
        assert progress == ["a.bin"]
        assert await moto_store.objects() == {"a.bin": LONG}
        return
    with pytest.raises(ObjectChangedException, match="one-shot upload"):
        async with uow_class() as uow:
            await uow.files.put(StreamContent.from_iterable(meanwhile(), filename="a.bin"))
    assert await moto_store.objects() == {"a.bin": b"another writer's"}
    assert await uploads(moto_store) == []


# --- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (0, None),
        (None, 3),
        (1, None),
        (0, 1),
        (5 * MiB - 1, 5 * MiB + 1),
        (7, 7),
        (0, 1 << 40),
        (1 << 40, None),
    ],
)
async def test_a_range_is_read_like_a_slice(
    store: Store, start: int | None, end: int | None
) -> None:
    uow_class = store.uow()
    async with uow_class() as uow:
        await uow.files.put(stream(LONG))
        assert await read(uow, start=start, end=end) == LONG[start:end]


@pytest.mark.parametrize(("start", "end"), [(-1, None), (3, 2), (0, -1)])
async def test_an_invalid_range_is_refused(store: Store, start: int, end: int | None) -> None:
    async with store.uow()() as uow:
        with pytest.raises(PathException, match="Invalid byte range"):
            await read(uow, start=start, end=end)
        with pytest.raises(NoSuchKeyException):
            await read(uow)


async def test_a_stream_can_be_left_and_its_transaction_goes_on(store: Store) -> None:
    uow_class = store.uow()
    async with uow_class() as uow:
        await uow.files.put(stream(LONG))
    async with uow_class() as uow:
        async with uow.files.open("a.bin") as opened:
            assert opened.info.size == len(LONG)
            async for chunk in opened:
                assert LONG.startswith(chunk)
                break
            await uow.files.delete("a.bin")
            await uow.commit()
        with pytest.raises(TransactionException, match="is closed"):
            [chunk async for chunk in opened]
    assert await store.objects() == {}


@dataclass(eq=False)
class Cuts(faults.Faults):
    """Cuts the next streams after a number of bytes, and runs a function before each continues."""

    after: list[int]
    before_request: list[Callable[[], Any]] = field(default_factory=list[Callable[[], Any]])
    requests: int = 0

    @override
    async def around(self, operation: faults.Operation, effect: faults.Effect[Any]) -> Any:
        if operation.name == "stream":
            self.requests += 1
            if self.requests > 1 and self.before_request:
                await self.before_request.pop(0)()
        return await effect()

    @override
    def cut(self, operation: faults.Operation) -> int | None:
        return self.after.pop(0) if self.after and operation.name == "stream" else None


def cut(store: Store, cuts: Cuts) -> type[FullUOW]:
    connector = faults.FaultyConnectorConfig(inner=store.config, faults=cuts)
    return Store(connector, store.namespace).uow()


async def test_a_broken_connection_is_reopened_at_the_byte_reached(store: Store) -> None:
    cuts = Cuts([5 * MiB, 1, 6 * MiB])
    with plugins.override(faults):
        uow_class = cut(store, cuts)
        async with uow_class() as uow:
            await uow.files.put(stream(LONG))
        async with uow_class() as uow:
            assert await read(uow) == LONG
    assert cuts.requests == 4


async def test_a_server_that_hangs_up_half_way_is_asked_again(moto_store: Store) -> None:
    server, uow_class = moto_store.server, moto_store.uow()
    assert server is not None
    async with uow_class() as uow:
        await uow.files.put(stream(LONG))
    left = [Fault.CUT, Fault.BEFORE]
    async with uow_class() as uow:
        with server.failing(lambda each: left.pop() if left and each.method == "GET" else None):
            assert await read(uow) == LONG
    assert not left


async def test_a_store_that_brings_nothing_any_more_is_given_up(moto_store: Store) -> None:
    cuts = Cuts([MiB, 0, 0, 0, 0, 0])
    with plugins.override(faults):
        uow_class = cut(moto_store, cuts)
        async with uow_class() as uow:
            await uow.files.put(stream(LONG))
        with pytest.raises(ConnectorUnavailableException, match="broke after 0 bytes"):
            async with uow_class() as uow:
                await read(uow)


async def test_bytes_that_apply_moves_meanwhile_are_read_on(store: Store) -> None:
    """P28, P29: they are first at the staging key, and later at the key."""
    cuts = Cuts([5 * MiB])
    with plugins.override(faults):
        uow_class = cut(store, cuts)
        async with uow_class() as uow:
            await uow.files.put(stream(LONG[::-1]))
        async with uow_class() as uow:
            await uow.files.put(stream(LONG))
            cuts.before_request.append(uow.commit)
            assert await read(uow) == LONG
    assert cuts.requests >= 2


async def test_a_file_that_is_overwritten_meanwhile_is_not_mixed(store: Store) -> None:
    cuts = Cuts([5 * MiB])
    with plugins.override(faults):
        uow_class = cut(store, cuts)
        async with uow_class() as uow:
            await uow.files.put(stream(LONG))

        async def overwrite() -> None:
            async with uow_class() as other:
                await other.files.put(stream(LONG[::-1]))

        cuts.before_request.append(overwrite)
        async with uow_class() as uow:
            try:
                assert await read(uow) == LONG  # a version stays
            except ObjectChangedException as error:
                assert "changed while it was read" in str(error)  # noqa: PT017
            assert await read(uow) == LONG[::-1]


async def test_an_object_that_others_change_is_noticed(store: Store) -> None:
    uow_class = store.uow()
    async with uow_class() as uow:
        await uow.files.put(stream(LONG))
        versioned = (await uow.files.stat("a.bin")).version_id is not None
    await put_foreign(store)
    async with uow_class() as uow:
        if versioned:
            assert await read(uow) == LONG
            return
        with pytest.raises(ObjectChangedException, match="outside FennFlow") as caught:
            await read(uow)
        assert "reconcile" in str(caught.value)  # to read it again would not help


async def test_other_bytes_than_were_committed_are_noticed_at_the_end(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    store = await make_store("memory", request)
    uow_class = store.uow()
    async with uow_class() as uow:
        await uow.files.put(stream(SHORT))
    get = fennflow_memory.connector.InMemoryConnector.get

    async def rot(self: Any, namespace: str, location: Location, **options: Any) -> Any:
        stored, body = await get(self, namespace, location, **options)
        return stored, body[:-1] + b"!"

    monkeypatch.setattr(fennflow_memory.connector.InMemoryConnector, "get", rot)
    async with uow_class() as uow:
        with pytest.raises(ChecksumMismatchException, match="Discard what was read"):
            await read(uow)
        assert await read(uow, end=10) == SHORT[:10]


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.once
async def test_memory_stays_flat_whatever_the_size(
    request: pytest.FixtureRequest, juicefs: S3Server
) -> None:
    """384 MiB pass through, but are never in memory at once."""
    del juicefs
    store = await make_store("juicefs", request)
    block = random.Random(2).randbytes(MiB)
    peak = 0.0

    async def blocks() -> AsyncGenerator[bytes]:
        nonlocal peak
        for number in range(384):
            yield block
            if number % 16 == 0:
                peak = max(peak, resident_mebibytes())

    uow_class = store.uow()
    async with uow_class() as uow:
        await uow.files.put(stream(SHORT, "warm"))
        await read(uow, "warm")
    before = resident_mebibytes()
    async with uow_class() as uow:
        content = StreamContent.from_iterable(blocks(), filename="a.bin", media_type="a/b")
        await uow.files.put(content)
    up, peak = peak - before, 0.0
    async with uow_class() as uow, uow.files.open("a.bin") as opened:
        assert isinstance(opened, ObjectStream)
        size = 0
        async for chunk in opened:
            size += len(chunk)
            if size % (32 * MiB) < len(chunk):
                peak = max(peak, resident_mebibytes())
    assert size == 384 * MiB
    assert up < 128, up
    assert peak - before < 128, peak - before


# --- large copies --------------------------------------------------------------------------------


@pytest.fixture(params=["moto", "moto-versioned"])
async def copying_store(request: pytest.FixtureRequest) -> Store:
    sizes = {"multipart_threshold": 5 * MiB, "multipart_part_size": 5 * MiB}
    return await make_store(request.param, request, **sizes, multipart_copy_threshold=5 * MiB)


async def test_what_is_too_large_for_one_copy_is_copied_in_parts(copying_store: Store) -> None:
    """Media type, metadata, headers and tags are kept, as with one CopyObject."""
    server, uow_class = copying_store.server, copying_store.uow()
    assert server is not None
    extra = {"CacheControl": "no-store", "Tagging": "kind=film&year=2026"}
    async with uow_class() as uow:
        await uow.files.put(stream(SHORT))
    with server.watched() as seen:
        async with uow_class() as uow:
            await uow.files.put(stream(LONG, metadata={"by": "Zoë"}), connector_extra=extra)
        async with uow_class() as uow:
            await uow.files.copy("a.bin", "copy.bin")
            await uow.files.move("a.bin", "moved.bin", connector_extra={"CacheControl": "private"})
    async with uow_class() as uow:
        assert await read(uow, "copy.bin") == LONG
        assert await read(uow, "moved.bin") == LONG
        assert (await uow.files.stat("moved.bin")).metadata == {"by": "Zoë"}
    assert await copying_store.objects() == {"copy.bin": LONG, "moved.bin": LONG}
    assert await uploads(copying_store) == []
    copies = [each for each in seen if each.copy]
    assert len(copies) == 3 * (len(copies) // 3) >= 6
    assert all("partNumber" in each.query for each in copies)
    async with raw_client(server) as client:
        for key, control in (("copy.bin", "no-store"), ("moved.bin", "private")):
            there: Any = {"Bucket": copying_store.namespace, "Key": key}
            head = await client.head_object(**there)
            assert (head["ContentType"], head["CacheControl"]) == ("application/x-test", control)
            tags = (await client.get_object_tagging(**there))["TagSet"]
            assert {tag["Key"]: tag["Value"] for tag in tags} == {"kind": "film", "year": "2026"}


async def test_a_copy_in_parts_that_fails_is_aborted_and_tried_again(
    request: pytest.FixtureRequest,
) -> None:
    """P9, P13."""
    store = await make_store(
        "moto",
        request,
        multipart_copy_threshold=5 * MiB,
        max_attempts=1,
        multipart_part_size=5 * MiB,
    )
    server, uow_class = store.server, store.uow()
    assert server is not None
    async with uow_class() as uow:
        await uow.files.put(stream(SHORT))
    left = [Fault.BEFORE, Fault.AFTER]

    def fault(request_: S3Request) -> Fault | None:
        return left.pop() if left and request_.copy else None

    with server.failing(fault):
        async with uow_class() as uow:
            await uow.files.put(stream(LONG))
    assert not left
    assert await store.objects() == {"a.bin": LONG}
    assert await uploads(store) == []


@pytest.mark.parametrize("size", [1, 20 << 20])
@pytest.mark.parametrize("kind", ["memory", "strict", "obstore-file", "obstore-moto"])
async def test_a_source_that_gives_nothing_any_more_fails_the_call(
    kind: str, size: int, request: pytest.FixtureRequest
) -> None:
    """Otherwise a client that stops sending would hold the lock of a path for hours."""
    closed: list[str] = []

    async def stalled() -> AsyncGenerator[bytes]:
        try:
            yield b"x" * size
            while True:
                yield b""
                await asyncio.sleep(0.01)
        finally:
            closed.append(kind)

    store = await make_store(kind, request)
    uow_class = store.uow(upload_idle_timeout=0.3, lock_timeout=0.0)
    async with uow_class() as uow:
        with pytest.raises(UploadIdleException, match=r"a\.txt produced no bytes for 0\.3 seconds"):
            await uow.files.put(StreamContent.from_iterable(stalled(), filename="a.txt"))
    assert closed == [kind]
    async with store.uow(lock_timeout=0.0)() as uow:
        await uow.files.put(StreamContent.from_iterable([b"2"], filename="a.txt"))
    assert await store.objects() == {"a.txt": b"2"}


async def test_only_the_time_of_the_source_counts_and_its_own_errors_stay_its_own(
    request: pytest.FixtureRequest,
) -> None:
    store = await make_store("memory", request)
    uow_class = store.uow(upload_idle_timeout=2.2)
    mine = TimeoutError("mine")

    def slow() -> Iterator[bytes]:
        for _ in range(8):
            time.sleep(0.3)  # in its thread; the sum is longer than the limit
            yield b"x"

    async def fails() -> AsyncGenerator[bytes]:
        yield b"x"
        raise mine

    async with uow_class() as uow:
        await uow.files.put(StreamContent.from_iterable(slow(), filename="a.txt"))
        with pytest.raises(TimeoutError, match="mine"):
            await uow.files.put(StreamContent.from_iterable(fails(), filename="b.txt"))
    assert await store.objects() == {"a.txt": b"x" * 8}
