"""Tests on a server that enforces what moto ignores: conditions, 409, errors inside a 200."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import Counter

import pytest

from fennflow.connectors import Capabilities, Deletion, Location, ObjectAttributes, PutRequest
from fennflow.exceptions import (
    AccessDeniedException,
    PreconditionFailedException,
    TransactionLostException,
)
from fennflow.files import BinaryContent, TextContent
from fennflow.testing import Fault, S3Request, strict_s3_server
from fennflow.testing.strict_s3 import DeletionOfNothing
from stores import FullUOW, Store, make_store, new_bucket, raw_client, s3_config

PLAIN = ObjectAttributes(media_type="text/plain")


def text(value: str, name: str) -> TextContent:
    return TextContent.from_content(value, filename=name)


@pytest.fixture
async def store(request: pytest.FixtureRequest) -> Store:
    return await make_store("strict", request)


async def seeded(store: Store) -> type[FullUOW]:
    uow_class = store.uow()
    async with uow_class() as uow:
        await uow.files.put(text("old a", "a"), text("old b", "b"))
    return uow_class


async def put_raw(store: Store, key: str, body: bytes) -> None:
    async with store.connector() as connector:
        await connector.put(PutRequest(store.namespace, key, PLAIN), body)


async def test_the_probe_finds_all_conditions(store: Store) -> None:
    """P15."""
    async with store.connector() as connector:
        assert await connector.capabilities(store.namespace) == Capabilities(
            conditional_create=True,
            conditional_delete="batch",
            conditional_copy=True,
            checksums=True,
        )


async def test_a_copy_to_a_free_key_is_one_copy(store: Store) -> None:
    uow_class = await seeded(store)
    assert store.server is not None
    with store.server.watched() as seen:
        async with uow_class() as uow:
            await uow.files.copy("a", "c")
    assert Counter(each.operation for each in seen) == {"HEAD": 1, "COPY": 1}
    assert seen[1].conditional


async def test_a_copy_does_not_overwrite_what_the_catalog_does_not_know(store: Store) -> None:
    """P14: until the commit it is unchanged."""
    uow_class = await seeded(store)
    await put_raw(store, "c", b"foreign")
    with pytest.raises(ZeroDivisionError):
        async with uow_class() as uow:
            await uow.files.copy("a", "c")
            assert (await store.objects())["c"] == b"foreign"
            raise ZeroDivisionError
    assert (await store.objects())["c"] == b"foreign"
    async with uow_class() as uow:
        await uow.files.copy("a", "c")
    assert (await store.objects())["c"] == b"old a"


async def test_an_object_put_over_a_record_is_replaced_and_logged(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """P17: the catalog is the source of truth, and nothing is overwritten unseen."""
    uow_class = await seeded(store)
    async with uow_class() as uow:
        await uow.files.put(text("new a", "a"), text("new b", "b"))
        await put_raw(store, "a", b"foreign")
        with caplog.at_level(logging.WARNING):
            await uow.commit()
    assert [each.__dict__["rule"] for each in caplog.records] == ["P17"]
    assert await store.objects() == {"a": b"new a", "b": b"new b"}


async def test_undoing_spares_what_replaced_a_direct_write(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """P18: by the ETag of each key in one DeleteObjects."""
    uow_class = await seeded(store)
    assert store.server is not None
    with pytest.raises(ZeroDivisionError), caplog.at_level(logging.WARNING):
        async with uow_class() as uow:
            await uow.files.put(*[text(name, name) for name in "cdef"])
            await put_raw(store, "d", b"foreign")
            raise ZeroDivisionError
    assert [each.__dict__["rule"] for each in caplog.records] == ["P18"]
    assert await store.objects() == {"a": b"old a", "b": b"old b", "d": b"foreign"}


async def test_a_deletion_spares_an_object_that_was_put_meanwhile(store: Store) -> None:
    """I5."""
    uow_class = await seeded(store)
    await put_raw(store, "a", b"foreign")
    async with uow_class() as uow:
        await uow.files.delete("a", "b")
    assert await store.objects() == {"a": b"foreign"}


class Once:
    """Fails the n-th request of those that a fault can happen to."""

    def __init__(self, number: int, fault: Fault) -> None:
        self.left = number
        self.fault = fault

    def __call__(self, request: S3Request) -> Fault | None:
        if self.fault is Fault.CONFLICT:
            fits = request.conditional and request.operation != "HEAD"
        else:
            fits = request.copy or (request.method == "POST" and "uploadId" in request.query)
        self.left -= fits
        return self.fault if fits and self.left == -1 else None


@pytest.mark.parametrize("kind", ["strict", "strict-versioned"])
@pytest.mark.parametrize("fault", [Fault.CONFLICT, Fault.ERROR_IN_200])
async def test_what_only_raced_is_sent_again(
    fault: Fault, kind: str, request: pytest.FixtureRequest
) -> None:
    """A 409 does not mean that the key is taken, and a 200 does not mean that the copy was made."""
    store = await make_store(kind, request, multipart_threshold=5 << 20)
    assert store.server is not None
    for number in itertools.count():
        uow_class = await seeded(store)
        script = Once(number, fault)
        large = BinaryContent(data=b"x" * (5 << 20), media_type="a/b", filename="large")
        with store.server.failing(script):
            async with uow_class() as uow:
                await uow.files.create(text("new c", "c"))
                await uow.files.put(text("new a", "a"), large)
                await uow.files.copy("a", "d")
                await uow.files.move("b", "e")
        objects = await store.objects()
        assert len(objects.pop("large")) == 5 << 20
        assert objects == {"a": b"new a", "c": b"new c", "d": b"new a", "e": b"old b"}
        if script.left >= 0:
            break
        async with uow_class() as uow:
            await uow.files.delete("c", "d", "e", "large")
    assert number >= (3 if kind == "strict" else 1)


async def test_a_conflict_while_deleting_does_not_prove_a_change(
    request: pytest.FixtureRequest,
) -> None:
    store = await make_store("strict", request)
    async with store.connector() as connector:
        stored = await connector.put(PutRequest(store.namespace, "a", PLAIN), b"1")
        deletion = Deletion(location=Location("a"), if_match=stored.etag)
        assert store.server is not None
        with store.server.failing(lambda _: Fault.CONFLICT):
            [error] = (await connector.delete(store.namespace, [deletion])).errors
        assert isinstance(error, PreconditionFailedException)
        assert error.contended
    # The engine sends it again.
    uow_class = await seeded(store)
    script = Once(1, Fault.CONFLICT)
    with store.server.failing(script), pytest.raises(ZeroDivisionError):
        async with uow_class() as uow:
            await uow.files.create(text("new c", "c"))
            raise ZeroDivisionError
    assert script.left < 0
    assert "c" not in await store.objects()


OF_NOTHING: list[DeletionOfNothing] = ["NoSuchKey", "PreconditionFailed", "success"]


@pytest.mark.parametrize("in_batch", OF_NOTHING)
@pytest.mark.parametrize("alone", OF_NOTHING)
async def test_a_conditional_deletion_whose_answer_was_lost_is_done_when_repeated(
    alone: DeletionOfNothing, in_batch: DeletionOfNothing, caplog: pytest.LogCaptureFixture
) -> None:
    """P7: whatever a server answers to a deletion by ETag where there is no object any more."""
    with strict_s3_server(delete_of_nothing=alone, batch_delete_of_nothing=in_batch) as server:
        store = Store(s3_config(server, max_attempts=1), await new_bucket(server), server)
        uow_class = await seeded(store)
        lost: list[S3Request] = []

        def lose(request: S3Request) -> Fault | None:
            first = request.operation in {"DELETE", "BATCH DELETE"} and request not in lost
            lost.extend([request] * first)
            return Fault.CUT if first else None

        for names in ("c", "def"):  # undone one by one, and as a batch
            with server.failing(lose), pytest.raises(ZeroDivisionError):
                async with uow_class() as uow:
                    await uow.files.create(*[text(name, name) for name in names])
                    raise ZeroDivisionError
        with server.failing(lose):  # committed
            async with uow_class() as uow:
                await uow.files.delete("a", "b")
        assert {each.operation for each in lost} == {"DELETE", "BATCH DELETE"}
        assert await store.objects() == {}
    rules = {each.__dict__["rule"] for each in caplog.records if "rule" in each.__dict__}
    assert rules <= {"retry"}


@pytest.mark.parametrize("of_nothing", OF_NOTHING)
async def test_a_conditional_deletion_spares_another_object_whatever_nothing_is_answered(
    of_nothing: DeletionOfNothing,
) -> None:
    with strict_s3_server(
        delete_of_nothing=of_nothing, batch_delete_of_nothing=of_nothing
    ) as server:
        store = Store(s3_config(server), await new_bucket(server), server)
        async with store.connector() as connector:
            other = Deletion(location=Location("a"), if_match="0" * 32)
            nothing = Deletion(location=Location("b"), if_match="0" * 32)
            await connector.put(PutRequest(store.namespace, "a", PLAIN), b"1")
            for batch in ([other], [nothing], [other, nothing]):
                report = await connector.delete(store.namespace, batch)
                assert [
                    isinstance(each, PreconditionFailedException) for each in report.errors
                ] == [each is other for each in batch]
        assert await store.objects() == {"a": b"1"}


@pytest.mark.parametrize("kind", ["moto", "strict"])
async def test_answers_can_be_delayed(kind: str, request: pytest.FixtureRequest) -> None:
    store = await make_store(kind, request)
    assert store.server is not None
    uow_class = await seeded(store)
    loop = asyncio.get_running_loop()
    async with uow_class() as uow:
        with store.server.delayed(0.1):
            start = loop.time()
            await uow.files.get("a", "b")
        assert loop.time() - start >= 0.1


@pytest.mark.parametrize("kind", ["moto", "strict", "strict-versioned"])
async def test_no_upload_in_parts_is_left_after_a_cancellation(
    kind: str, request: pytest.FixtureRequest
) -> None:
    """P13, P21: at whichever request it arrives."""
    store = await make_store(
        kind, request, multipart_threshold=5 << 20, multipart_part_size=5 << 20
    )
    assert store.server is not None
    uow_class = await seeded(store)
    large = BinaryContent(data=b"x" * (12 << 20), media_type="a/b", filename="a")
    loop = asyncio.get_running_loop()

    async def work() -> None:
        async with uow_class() as uow:
            await uow.files.put(large)
            await uow.files.copy("a", "c")
            raise AccessDeniedException

    for number in itertools.count():
        left = number
        task = asyncio.ensure_future(work())

        def cancel(_: S3Request, task: asyncio.Task[None] = task) -> None:
            nonlocal left
            left -= 1
            if left == -1:
                loop.call_soon_threadsafe(task.cancel)

        with store.server.failing(cancel):
            await asyncio.wait({task})
        async with raw_client(store.server) as client:
            listed = await client.list_multipart_uploads(Bucket=store.namespace)
        assert listed.get("Uploads", []) == [], f"cancelled at request {number}"
        assert await store.objects() == {"a": b"old a", "b": b"old b"}
        if left >= 0:
            break
    assert number > 5


@pytest.mark.parametrize("how", ["put", "copy"])
async def test_no_part_is_sent_once_the_lease_may_have_run_out(
    how: str, request: pytest.FixtureRequest
) -> None:
    """P23: of a body in memory, and of a multipart copy, of which the engine sees only the beginning."""
    store = await make_store(
        "strict", request, multipart_threshold=5 << 20, multipart_copy_threshold=5 << 20
    )
    assert store.server is not None
    uow_class = await seeded(store)
    large = BinaryContent(data=b"x" * (48 << 20), media_type="a/b", filename="large")
    parts = 0
    async with uow_class() as uow:
        await uow.files.put(large)
    loop = asyncio.get_running_loop()
    with pytest.raises(TransactionLostException), store.server.watched() as seen:
        async with uow_class() as uow:
            lease = uow.files._session._tx.lease

            def expire() -> None:
                lease.until = float("-inf")

            def fault(each: S3Request) -> None:
                nonlocal parts
                parts += "partNumber" in each.query
                if parts:  # of several at once each may see the number of another one
                    loop.call_soon_threadsafe(expire)

            with store.server.failing(fault):
                await (uow.files.copy("large", "c") if how == "copy" else uow.files.put(large))
    assert 1 <= sum("partNumber" in each.query for each in seen) < 6 + 2
    assert not any(each.method == "POST" and "uploadId" in each.query for each in seen)


async def test_a_machine_that_was_suspended_has_lost_its_leases(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P23: the loop's clock stood still meanwhile."""
    uow_class = store.uow(lease_ttl=60.0)
    with pytest.raises(TransactionLostException):
        async with uow_class() as uow:
            await uow.files.put(text("1", "a"))
            monkeypatch.setattr("fennflow.engine.leases.suspended", lambda: 1e9)
            await uow.files.get("a")
