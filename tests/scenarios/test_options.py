"""Options of `ConfigDict` that have no scenario of their own elsewhere."""

from __future__ import annotations

import asyncio
import gzip
from pathlib import Path

import pytest

from fennflow import ConfigDict, ReconcileConfig, plugins
from fennflow.backends import SqlalchemyBackendConfig
from fennflow.exceptions import ConfigException, KeyException
from fennflow.files import BinaryContent, TextContent
from fennflow.testing import S3Request, faults
from fennflow.web import answer_for
from stores import Store, make_store


def text(value: str, name: str) -> TextContent:
    return TextContent.from_content(value, filename=name)


async def test_the_reserved_prefix_is_where_staged_bytes_lie_and_users_cannot_go(
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
        doubt_period=960.0,
        max_session_age=43200.0,
        max_concurrency=32,
        validate_reads=False,
        hide_pending=False,
        keep_versions=True,
        reconcile=ReconcileConfig(
            frequency="on_start_app", strategy="fill_if_empty", orphans="report", batch_size=1000
        ),
        reserved_prefix=".fennflow",
    )


@pytest.mark.parametrize("prefix", ["", "a" * 65, "../x", "/a", "a//b", "a\n"])
def test_a_prefix_that_is_no_key_is_refused(prefix: str) -> None:
    with pytest.raises(ConfigException, match="reserved_prefix"):
        ConfigDict(reserved_prefix=prefix)


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
    # Another catalog learns of them from the store.
    other = store.uow(backend=SqlalchemyBackendConfig(url=f"sqlite:///{tmp_path}/other.db"))
    async with other() as uow:
        assert (await uow.files.stat("b")).headers == headers
