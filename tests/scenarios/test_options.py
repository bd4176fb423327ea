"""Options of `ConfigDict` that have no other scenario."""

from __future__ import annotations

import asyncio
import functools
import gzip
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, cast

import pytest

from fennflow import ConfigDict, ReconcileConfig, plugins
from fennflow.backends import SqlalchemyBackendConfig
from fennflow.connectors import ObjectAttributes, PutRequest
from fennflow.exceptions import (
    ConfigException,
    ConnectorCapabilityException,
    FileException,
    KeyException,
    MetadataException,
)
from fennflow.files import BinaryContent, StreamContent, TextContent
from fennflow.repositories import CrudRepository, RepoField, S3RepoField
from fennflow.testing import S3Request, faults
from fennflow.web import answer_for
from stores import Store, make_store


def text(value: str, name: str) -> TextContent:
    return TextContent.from_content(value, filename=name)


async def test_staged_bytes_are_under_the_reserved_prefix_which_users_cannot_use(
    request: pytest.FixtureRequest,
) -> None:
    """P10."""
    store = await make_store("strict", request)
    assert store.server is not None
    uow_class = store.uow(reserved_prefix="_tx")
    with store.server.watched() as seen:
        async with uow_class() as uow:
            await uow.files.put(text("1", ".fennflow"))  # nothing special here
            for name in ("_tx", "_tx/a", "_txt"):
                with pytest.raises(KeyException, match="FennFlow's own"):
                    await uow.files.put(text("1", name))
                with pytest.raises(KeyException, match="FennFlow's own"):
                    await uow.files.copy(".fennflow", name)
        async with uow_class() as uow:
            await uow.files.put(text("2", ".fennflow"))
    elsewhere = {each.key.partition("/")[0] for each in seen if each.method == "PUT"}
    assert elsewhere == {".fennflow", "_tx"}
    assert await store.objects() == {".fennflow": b"2"}


def test_all_options_have_the_names_and_defaults_of_the_design() -> None:
    assert ConfigDict() == ConfigDict(
        lock_timeout=5.0,
        lease_ttl=60.0,
        compensation_timeout=30.0,
        recovery_interval=60.0,
        late_write_period=960.0,
        max_transaction_age=43200.0,
        upload_idle_timeout=60.0,
        max_concurrency=32,
        validate_reads=False,
        hide_pending=False,
        keep_versions=True,
        reconcile=ReconcileConfig(
            frequency="on_start_app", strategy="fill_if_empty", orphans="report", batch_size=1000
        ),
        reserved_prefix=".fennflow",
    )


@pytest.mark.parametrize("prefix", ["", "a" * 65, "../x", "/a", "a//b", "a\n", "a+b", "a%b", "é"])
def test_a_prefix_that_is_not_a_key_is_refused(prefix: str) -> None:
    with pytest.raises(ConfigException, match="reserved_prefix"):
        ConfigDict(reserved_prefix=prefix)


@pytest.mark.parametrize("namespace", ["", "a\0", "a\n", "\ud800", None, 7])
def test_a_namespace_that_no_store_has_is_refused(namespace: Any) -> None:
    with pytest.raises(ConfigException, match="namespace"):
        RepoField(CrudRepository, namespace=namespace)
    with pytest.raises(ConfigException, match="namespace"):
        S3RepoField(CrudRepository, bucket_name=namespace)


@pytest.mark.parametrize("limit", [1, 3])
async def test_no_more_requests_are_in_flight_than_allowed(limit: int) -> None:
    with plugins.override(faults):
        now = most = 0

        async def script(phase: str, _operation: str, _key: str) -> None:
            nonlocal now, most
            now += 1 if phase == "before" else -1
            most = max(most, now)
            await asyncio.sleep(0.001)

        memory = await make_store("memory", None)  # type: ignore[arg-type]
        store = Store(
            faults.FaultyConnectorConfig(inner=memory.config, faults=faults.Scripted(script)),
            "bucket",
        )
        uow_class = store.uow(max_concurrency=limit)
        names = [f"{number}" for number in range(10)]
        async with uow_class() as uow, asyncio.TaskGroup() as group:
            # The calls of one unit of work share the limit.
            for name in names:
                group.create_task(uow.files.put(text("1", name)))
        async with uow_class() as uow:
            await uow.files.put(*[text("2", name) for name in names])
            await uow.files.get(*names)
            await uow.files.copy("1", "copy")
        assert most == limit


async def test_requests_of_one_call_are_in_flight_together(request: pytest.FixtureRequest) -> None:
    store = await make_store("strict", request)
    assert store.server is not None
    uow_class = store.uow(max_concurrency=8)
    loop, arrived, all_there = asyncio.get_running_loop(), 0, asyncio.Event()

    def count() -> None:
        nonlocal arrived
        arrived += 1
        if arrived == 8:
            all_there.set()

    def hold(seen: S3Request) -> None:
        if seen.method == "PUT" and seen.key.startswith("many/"):
            loop.call_soon_threadsafe(count)
            asyncio.run_coroutine_threadsafe(all_there.wait(), loop).result(30)

    async with uow_class() as uow:
        await uow.files.put(text("1", "a"))
        with store.server.failing(hold):
            await uow.files.put(*[text("1", f"many/{number}") for number in range(8)])


@pytest.mark.parametrize(
    "kind", ["memory", "moto", "strict-versioned", "obstore-file", "obstore-moto"]
)
async def test_headers_that_a_user_stores_come_back_with_the_file(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """From the catalog in memory, from one in a database, and from the store itself."""
    store = await make_store(kind, request)
    headers = {"Content-Encoding": "gzip", "Cache-Control": "no-store", "Content-Language": "de"}
    obstore = kind.startswith("obstore")
    extra = headers if obstore else {name.replace("-", ""): v for name, v in headers.items()}
    body = gzip.compress(b"Hello")
    file = BinaryContent(data=body, media_type="text/plain", filename="a")
    durable = store.uow(backend=SqlalchemyBackendConfig(url=f"sqlite:///{tmp_path}/catalog.db"))
    for uow_class in (store.uow(), durable):
        async with uow_class() as uow:
            await uow.files.delete("a", "b", "c")
        for _ in range(2):  # a new file, and one that is replaced
            async with uow_class() as uow:
                await uow.files.put(file, connector_extra=extra)
                assert (await uow.files.stat("a")).headers == headers
        async with uow_class() as uow:
            await uow.files.copy("a", "b")
            changed = {"Cache-Control" if obstore else "CacheControl": "max-age=1"}
            await uow.files.copy("a", "c", connector_extra=changed)
        async with uow_class() as uow:
            assert (await uow.files.stat("b")).headers == headers
            assert (await uow.files.stat("c")).headers == {**headers, "Cache-Control": "max-age=1"}
            [read] = await uow.files.get("a")
            assert read.data == body
            assert read.info is not None
            assert read.info.headers == headers
            async with uow.files.open("a") as stream:
                assert stream.info.headers == headers
                assert b"".join([chunk async for chunk in stream]) == body
            assert answer_for(read.info, {}).headers["Content-Encoding"] == "gzip"
    # A catalog that replaces the lost one learns of them from the store.
    other = store.uow(backend=SqlalchemyBackendConfig(url=f"sqlite:///{tmp_path}/other.db"))
    found = (await other.reconcile())[store.namespace].findings
    await other.reconcile(adopt_catalogs=[each.catalog_id for each in found if each.catalog_id])
    async with other() as uow:
        assert (await uow.files.stat("b")).headers == headers


BAD_TEXTS = ["a\r\nX-Other: 1", "a\n", "a\0b", "\ud800", "a\x7f", "\x1b[2J"]
NESTED = functools.reduce(lambda inner, _: [inner], range(5000), cast("Any", "x"))
BAD_OPTIONS: list[Any] = [
    {"CacheControl": NESTED},
    *({"CacheControl": each, "Cache-Control": each} for each in BAD_TEXTS),
    {"CacheControl": object()},
    {"CacheControl": b"x"},
    {"CacheControl": [{"a": "\n"}]},
    {"CacheControl": float("nan")},
    {"Cache\nControl": "x"},
    {1: "x"},
    "text",
    [("CacheControl", "x")],
]


@pytest.mark.parametrize(
    "kind", ["memory", "moto", "obstore-memory", "obstore-file", "obstore-moto"]
)
async def test_options_that_no_header_holds_are_refused_before_anything_is_sent(
    kind: str, request: pytest.FixtureRequest
) -> None:
    store = await make_store(kind, request)
    async with store.uow()() as uow:
        await uow.files.put(text("1", "there"))
        for extra in BAD_OPTIONS:
            for call in (
                uow.files.put(text("1", "a"), connector_extra=extra),
                uow.files.create(text("1", "a"), connector_extra=extra),
                uow.files.copy("there", "a", connector_extra=extra),
                uow.files.move("there", "a", connector_extra=extra),
            ):
                with pytest.raises(ConnectorCapabilityException, match="connector_extra"):
                    await call
    assert await store.objects() == {"there": b"1"}


@pytest.mark.parametrize(
    "extra",
    [
        {"ContentDisposition": 'attachment; filename="é"'},
        {"CacheControl": 60},
        {"CacheControl": None},
        {"Expires": "tomorrow or so"},
        {"ObjectLockRetainUntilDate": "9" * 400},
        {"BucketKeyEnabled": "yes"},
        {"StorageClass": True},
    ],
)
async def test_options_that_s3_cannot_be_sent_are_refused(
    extra: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    store = await make_store("strict", request)
    assert store.server is not None
    async with store.uow()() as uow:
        with (
            store.server.watched() as seen,
            pytest.raises(ConnectorCapabilityException, match="S3 accepts"),
        ):
            await uow.files.put(text("1", "a"), connector_extra=extra)
        assert seen == []


async def test_options_that_change_while_a_write_is_under_way_do_not_change_it(
    request: pytest.FixtureRequest,
) -> None:
    store = await make_store("strict", request)
    extra = {"CacheControl": "no-store"}

    async def chunks() -> AsyncGenerator[bytes]:
        extra["CacheControl"] = "a\nb"
        yield b"1"

    async with store.uow()() as uow:
        stream = StreamContent.from_iterable(chunks(), filename="a.txt")
        await uow.files.put(stream, connector_extra=extra)
        assert (await uow.files.stat("a.txt")).headers == {"Cache-Control": "no-store"}


@pytest.mark.parametrize(
    "media_type",
    [*BAD_TEXTS, "text/html\r\nX-Other: 1", "text", "é/a", "a/b\n", f"text/plain; a={'b' * 1000}"],
)
async def test_a_media_type_that_is_not_one_is_refused_wherever_it_comes_from(
    media_type: str,
) -> None:
    with pytest.raises(FileException):
        BinaryContent(data=b"1", media_type=media_type, filename="a")
    with pytest.raises(FileException):
        StreamContent.from_iterable([b"1"], media_type=media_type, filename="a")
    store = await make_store("memory", None)  # type: ignore[arg-type]
    async with store.connector() as connector:
        await connector.put(
            PutRequest("bucket", "foreign", ObjectAttributes(media_type=media_type)), b"1"
        )
    async with store.uow()() as uow:
        # An invalid stored type is treated as unknown bytes, and the file can be put elsewhere.
        assert (await uow.files.stat("foreign")).media_type == "application/octet-stream"
        [read] = await uow.files.get("foreign")
        await uow.files.at("copy").put(read)
        unchecked = read.model_copy(update={"media_type": media_type})
        with pytest.raises(FileException, match="media type"):
            await uow.files.put(unchecked)
        unchecked = read.model_copy(update={"metadata": {"a": 1}})
        with pytest.raises(MetadataException):
            await uow.files.put(unchecked)
