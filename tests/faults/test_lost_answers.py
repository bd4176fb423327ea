"""Which outcomes of a request are ambiguous, and that only these keep keys locked (P14, P19, P20)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

import pytest

from fennflow.connectors import Deletion, Location, ObjectAttributes, PutRequest, StoredObject
from fennflow.exceptions import (
    AccessDeniedException,
    BaseConnectorException,
    ConnectorUnavailableException,
    RecordLockedException,
)
from fennflow.files import BinaryContent, TextContent
from fennflow.testing import Fault, S3Request, S3Server
from fennflow_memory.connector import InMemoryConnector
from stores import Store, make_store, obstore_config, s3_config

PLAIN = ObjectAttributes(media_type="text/plain")
KINDS = ["strict", "obstore-strict"]
DOUBT = 0.3


def text(value: str, name: str) -> TextContent:
    return TextContent.from_content(value, filename=name)


def in_turn(
    faults: Iterable[Fault | None], fits: Callable[[S3Request], object]
) -> Callable[[S3Request], Fault | None]:
    """Answer matching requests with faults, until there are no more."""
    left = iter(faults)
    return lambda request: next(left, None) if fits(request) else None


def changes(request: S3Request) -> bool:
    return request.operation in {"PUT", "DELETE", "BATCH DELETE", "COPY"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("fault", "lost"),
    [(Fault.SLOW_DOWN, False), (Fault.BEFORE, True), (Fault.AFTER, True), (Fault.CUT, True)],
)
async def test_an_answer_says_whether_an_earlier_attempt_was_lost(
    fault: Fault, kind: str, *, lost: bool, request: pytest.FixtureRequest
) -> None:
    store = await make_store(kind, request)
    assert store.server is not None
    deletion = Deletion(location=Location("a"))
    async with store.connector() as connector:
        await connector.capabilities(store.namespace)
        with store.server.failing(in_turn([fault], changes)):
            assert (
                await connector.put(PutRequest(store.namespace, "a", PLAIN), b"1")
            ).retried is lost
        with store.server.failing(in_turn([fault], changes)):
            assert (await connector.delete(store.namespace, [deletion])).retried is lost


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("faults", "expected", "ambiguous"),
    [
        ([Fault.DENIED], AccessDeniedException, False),
        ([Fault.SLOW_DOWN, Fault.DENIED], AccessDeniedException, False),
        ([Fault.AFTER, Fault.DENIED], AccessDeniedException, True),
        ([Fault.CUT, Fault.DENIED], AccessDeniedException, True),
        ([Fault.SLOW_DOWN, Fault.SLOW_DOWN], ConnectorUnavailableException, False),
        ([Fault.BEFORE, Fault.SLOW_DOWN], ConnectorUnavailableException, True),
    ],
)
async def test_an_exception_says_whether_the_outcome_is_ambiguous(
    faults: list[Fault],
    expected: type[BaseConnectorException],
    kind: str,
    *,
    ambiguous: bool,
    request: pytest.FixtureRequest,
) -> None:
    store = await make_store(kind, request, max_attempts=2)
    assert store.server is not None
    async with store.connector() as connector:
        with store.server.failing(in_turn(faults, changes)), pytest.raises(expected) as caught:
            await connector.put(PutRequest(store.namespace, "a", PLAIN), b"1")
    assert caught.value.ambiguous is ambiguous
    assert caught.value.retried is (ambiguous and len(faults) > 1)


@pytest.mark.parametrize("config", [s3_config, obstore_config])
async def test_a_server_that_was_never_reached_did_nothing(
    config: Callable[..., object],
) -> None:
    store = Store(config(S3Server("http://127.0.0.1:9"), max_attempts=2), "bucket")  # type: ignore[arg-type]
    async with store.connector() as connector:
        with pytest.raises(ConnectorUnavailableException) as caught:
            await connector.put(PutRequest("bucket", "a", PLAIN), b"1")
    assert not caught.value.ambiguous


@pytest.mark.parametrize("kind", KINDS)
async def test_what_was_certainly_refused_keeps_nothing_locked(
    kind: str, request: pytest.FixtureRequest
) -> None:
    """P20 b: one 503 must not lock a path for the late-write period."""
    store = await make_store(kind, request)
    assert store.server is not None
    uow_class = store.uow(lock_timeout=0.0)
    async with uow_class() as uow:
        await uow.files.put(text("old a", "a"))
    with store.server.failing(in_turn([Fault.SLOW_DOWN] * 2, changes)):
        async with uow_class() as uow:
            await uow.files.delete("a")
    async with uow_class() as uow:
        await uow.files.put(text("new a", "a"))
    assert await store.objects() == {"a": b"new a"}


async def test_the_error_of_a_kept_lock_says_why_and_until_when(
    request: pytest.FixtureRequest,
) -> None:
    store = await make_store("strict", request)
    assert store.server is not None
    uow_class = store.uow(lock_timeout=0.0, late_write_period=100.0)
    async with uow_class() as uow:
        await uow.files.put(text("old a", "a"), text("old b", "b"))
    with store.server.failing(in_turn([Fault.AFTER], changes)):
        async with uow_class() as uow:
            await uow.files.delete("a")
    with pytest.raises(RecordLockedException, match=r"locked until .* UTC, \d+ s .*lost") as kept:
        async with uow_class() as uow:
            await uow.files.put(text("new a", "a"))
    assert kept.value.free_in == pytest.approx(100, abs=60)
    assert "lease_ttl" not in str(kept.value)
    async with uow_class() as first:
        await first.files.put(text("1", "b"))
        with pytest.raises(RecordLockedException, match="being written") as held:
            async with uow_class() as second:
                await second.files.put(text("2", "b"))
    assert held.value.free_in is None


@pytest.mark.parametrize("create", [True, False])
@pytest.mark.parametrize("before", [True, False])
async def test_an_upload_whose_completion_was_repeated_and_refused_has_succeeded(
    *, create: bool, before: bool, request: pytest.FixtureRequest
) -> None:
    """P14: the server no longer knows the upload, since it is complete."""
    store = await make_store(
        "strict", request, multipart_threshold=5 << 20, multipart_part_size=5 << 20
    )
    assert store.server is not None
    uow_class = store.uow()
    large = BinaryContent(data=b"x" * (6 << 20), media_type="a/b", filename="a")
    if before and not create:
        async with uow_class() as uow:
            await uow.files.put(text("old a", "a"))
    completes = in_turn([Fault.AFTER], lambda each: each.query.startswith("uploadId"))
    with store.server.failing(completes):
        async with uow_class() as uow:
            await (uow.files.create if create else uow.files.put)(large)
    assert await store.objects() == {"a": large.data}


@pytest.mark.parametrize("kind", ["strict", "strict-versioned", "obstore-strict"])
@pytest.mark.parametrize("before", [True, False])
async def test_what_a_refused_repetition_left_is_removed(
    kind: str, *, before: bool, request: pytest.FixtureRequest
) -> None:
    """P19: the first attempt took effect, and the second one was refused."""
    store = await make_store(kind, request)
    assert store.server is not None
    uow_class = store.uow(late_write_period=DOUBT)
    if before:
        async with uow_class() as uow:
            await uow.files.put(text("old a", "a"))
    taken: list[S3Request] = []

    def denied(each: S3Request) -> Fault | None:
        # So are the check of the object and the undo.
        if not each.key or each.key.startswith(".fennflow/probe"):
            return None
        taken.append(each)
        return Fault.AFTER if len(taken) == 1 else Fault.DENIED

    with store.server.failing(denied), pytest.raises(AccessDeniedException):
        async with uow_class() as uow:
            await uow.files.put(text("new a", "a"))
    await asyncio.sleep(DOUBT)
    await uow_class.recover()
    assert await store.objects() == ({"a": b"old a"} if before else {})
    async with uow_class() as uow:
        await uow.files.put(text("newer a", "a"))
    assert await store.objects() == {"a": b"newer a"}


@pytest.mark.parametrize("fault", [Fault.BEFORE, Fault.SLOW_DOWN])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_copy_through_the_client_that_may_arrive_late_keeps_its_key_locked(
    kind: str, fault: Fault, request: pytest.FixtureRequest
) -> None:
    """P20 c: the deletion of the staging object stops it only if the store itself copies."""
    store = await make_store(kind, request)
    assert store.server is not None
    uow_class = store.uow(lock_timeout=0.0)
    async with uow_class() as uow:
        await uow.files.put(text("1", "a"))
    copies = in_turn([fault], lambda each: each.key == "a" and each.method == "PUT")
    with store.server.failing(copies):
        async with uow_class() as uow:
            await uow.files.put(text("2", "a"))
    assert await store.objects() == {"a": b"2"}
    if kind == "obstore-strict" and fault is Fault.BEFORE:
        with pytest.raises(RecordLockedException, match="locked until"):
            async with uow_class() as uow:
                await uow.files.put(text("3", "a"))
    else:
        async with uow_class() as uow:
            await uow.files.put(text("3", "a"))


@pytest.mark.parametrize("kind", KINDS)
async def test_a_refusal_while_finishing_keeps_nothing_locked_once_it_is_finished(
    kind: str, request: pytest.FixtureRequest
) -> None:
    store = await make_store(kind, request, max_attempts=1)
    assert store.server is not None
    uow_class = store.uow(lock_timeout=0.0)
    async with uow_class.lifespan():
        async with uow_class() as uow:
            await uow.files.put(text("1", "a"), text("1", "b"))
        with store.server.failing(
            lambda each: Fault.DENIED if changes(each) and each.key in {"a", ""} else None
        ):
            async with uow_class() as uow:
                await uow.files.put(text("2", "a"))
                await uow.files.delete("b")
        await uow_class.recover()
        assert await store.objects() == {"a": b"2"}
        async with uow_class() as uow:
            await uow.files.put(text("3", "a"), text("3", "b"))


async def test_a_body_of_which_a_part_arrived_is_not_taken_for_the_write(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """P14: moto's server keeps what arrived before the connection broke, with all of the metadata."""
    put = InMemoryConnector.put

    async def broken(self: InMemoryConnector, asked: PutRequest, body: bytes) -> StoredObject:
        if asked.if_none_match:
            await put(self, asked, body[:3])
        return await put(self, asked, body)

    store = await make_store("memory", request)
    monkeypatch.setattr(InMemoryConnector, "put", broken)
    async with store.uow()() as uow:
        await uow.files.put(text("whole", "a"))
        assert (await uow.files.get("a")).one().data == b"whole"
    assert await store.objects() == {"a": b"whole"}
