"""Copying and moving inside the store, on every store."""

from __future__ import annotations

from collections import Counter

import pytest

from fennflow import ConfigDict, plugins
from fennflow.backends import InMemoryBackendConfig
from fennflow.connectors import Deletion, Location, ObjectAttributes, PutRequest
from fennflow.exceptions import (
    ConnectorCapabilityException,
    FilepathsCollisionError,
    NoSuchKeyException,
    ObjectChangedException,
    RecordLockedException,
    TransactionException,
)
from fennflow.files import JsonContent, TextContent
from fennflow.repositories import RepoField
from fennflow.testing import faults
from stores import FullRepository, FullUOW, Store, make_store, new_bucket, numbers, raw_client


def text(value: str, name: str) -> TextContent:
    return TextContent.from_content(value, filename=name, metadata={"von": "Zoë"})


async def seeded(store: Store, **changes: object) -> type[FullUOW]:
    """Return a class of units of work with the files a and b."""
    uow_class = store.uow(**changes)
    async with uow_class() as uow:
        await uow.files.put(text("old a", "a"), text("old b", "b"))
    return uow_class


async def contents(uow_class: type[FullUOW]) -> dict[str, object]:
    async with uow_class() as uow:
        return {str(file.path): file.content for file in await uow.files.get_prefix()}


async def test_a_copy_is_a_file_like_its_source(store: Store) -> None:
    uow_class = store.uow()
    async with uow_class() as uow:
        json = JsonContent.from_content([1], filename="a", metadata={"für": "Ann"})
        await uow.files.at("in").put(json)
        assert await uow.files.at("in").copy("a", "b") == "in/b"
    async with uow_class() as uow:
        assert await uow.files.at("in").copy("b", "c", to=uow.files.at("out")) == "out/c"
        assert await uow.files.list() == ["in/a", "in/b", "out/c"]
    async with uow_class() as uow:
        files = await uow.files.get("in/a", "in/b", "out/c")
        for file in files:
            assert isinstance(file, JsonContent)
            assert (file.content, file.metadata) == ([1], {"für": "Ann"})
        infos = await uow.files.stat("in/a", "out/c")
        assert infos[0].sha256 == infos[1].sha256
    assert await store.objects() == dict.fromkeys(["in/a", "in/b", "out/c"], b"[1]")


async def test_a_copy_replaces_and_a_failure_brings_back(store: Store) -> None:
    uow_class = await seeded(store)
    with pytest.raises(ZeroDivisionError):
        async with uow_class() as uow:
            await uow.files.copy("a", "b")
            await uow.files.copy("a", "c")
            await uow.files.move("a", "d")
            assert await contents(uow_class) == {"a": "old a", "b": "old b"}
            raise ZeroDivisionError
    assert await store.objects() == {"a": b"old a", "b": b"old b"}
    async with uow_class() as uow:
        await uow.files.copy("a", "b")
    assert await store.objects() == {"a": b"old a", "b": b"old a"}
    assert await contents(uow_class) == {"a": "old a", "b": "old a"}


async def test_own_changes_are_copied_and_moved_again(store: Store) -> None:
    """P12: a transaction copies the files that it sees."""
    uow_class = await seeded(store)
    async with uow_class() as uow:
        await uow.files.put(text("new a", "a"))
        await uow.files.copy("a", "c")
        await uow.files.put(text("newer a", "a"))
        await uow.files.move("c", "d")
        await uow.files.move("d", "b")
        await uow.files.move("b", "e")
        await uow.files.put(text("new b", "b"))
        assert await uow.files.list() == ["a", "b", "e"]
        assert (await uow.files.get("e")).one().content == "new a"
    expected = {"a": "newer a", "b": "new b", "e": "new a"}
    assert await contents(uow_class) == expected
    assert await store.objects() == {key: str(v).encode() for key, v in expected.items()}


async def test_files_go_from_bucket_to_bucket(store: Store) -> None:
    other = f"n{next(numbers)}" if store.server is None else await new_bucket(store.server)

    class UOW(FullUOW):
        files = RepoField(FullRepository, namespace=store.namespace)
        archive = RepoField(FullRepository, namespace=other)
        config = ConfigDict(connector=store.config)

    async with UOW() as uow:
        await uow.files.put(text("1", "a"), text("2", "b"))
    with pytest.raises(ZeroDivisionError):
        async with UOW() as uow:
            await uow.files.move("a", "x", to=uow.archive)
            raise ZeroDivisionError
    async with UOW() as uow:
        await uow.files.move("a", "x", to=uow.archive.at("2026"))
        await uow.files.copy("b", "b", to=uow.archive)
    async with UOW() as uow:
        assert await uow.files.list() == ["b"]
        assert await uow.archive.list() == ["2026/x", "b"]
        assert [f.content for f in await uow.archive.get("2026/x", "b")] == ["1", "2"]
    there = Store(store.config, other, store.server)
    assert await there.objects() == {"2026/x": b"1", "b": b"2"}


async def test_what_cannot_be_copied_is_refused_and_changes_nothing(store: Store) -> None:
    uow_class = await seeded(store)
    async with uow_class() as uow:
        with pytest.raises(NoSuchKeyException, match="none"):
            await uow.files.copy("none", "c")
        with pytest.raises(NoSuchKeyException, match="none"):
            await uow.files.move("none", "c")
        with pytest.raises(FilepathsCollisionError):
            await uow.files.move("a", "a")
        async with uow_class() as another:
            with pytest.raises(TransactionException):
                await uow.files.copy("a", "c", to=another.files)
        assert await uow.files.list() == ["a", "b"]
    assert await store.objects() == {"a": b"old a", "b": b"old b"}


async def test_the_source_of_a_move_is_locked_and_that_of_a_copy_is_not(store: Store) -> None:
    """P3: no other transaction writes a key that this one is about to delete."""
    uow_class = await seeded(store, lock_timeout=0.05)
    async with uow_class() as mover, uow_class() as other:
        await mover.files.move("a", "c")
        await mover.files.copy("b", "d")
        with pytest.raises(RecordLockedException):
            await other.files.put(text("x", "a"))
        await other.files.put(text("new b", "b"))
    expected = {"b": b"new b", "c": b"old a", "d": b"old b"}
    assert await store.objects() == expected


async def test_a_source_changed_behind_the_catalog_is_not_copied(store: Store) -> None:
    uow_class = await seeded(store)
    async with store.connector() as connector:
        attributes = ObjectAttributes(media_type="a/b")
        stored = await connector.put(PutRequest(store.namespace, "a", attributes), b"other")
        await connector.delete(store.namespace, [Deletion(location=Location("b"))])
    versioned = stored.location.version_id is not None
    async with uow_class() as uow:
        if not versioned:
            with pytest.raises(ObjectChangedException):
                await uow.files.copy("a", "c")
            with pytest.raises(ObjectChangedException):
                await uow.files.move("b", "d")
            assert await uow.files.list() == ["a", "b"]
        else:
            await uow.files.copy("a", "c")
            assert (await uow.files.get("c")).one().content == "old a"


async def test_a_source_that_is_replaced_meanwhile_is_copied_whole_or_again() -> None:
    """P29: the record of a copy describes the bytes that were copied."""
    with plugins.override(faults):
        replacing: list[str] = []

        async def script(phase: str, operation: str, key: str) -> None:
            if operation == "copy" and replacing and replacing[0] == phase and "c" in key:
                replacing.clear()
                async with uow_class() as other:
                    await other.files.put(text("new a", "a"))

        memory = await make_store("memory", None)  # type: ignore[arg-type]
        store = Store(
            faults.FaultyConnectorConfig(inner=memory.config, faults=faults.Scripted(script)),
            memory.namespace,
            settings={"backend": InMemoryBackendConfig(name=f"c{next(numbers)}")},
        )
        for phase in ("before", "after"):
            uow_class = await seeded(store)
            replacing.append(phase)
            async with uow_class() as uow:
                await uow.files.copy("a", "c")
                assert (await uow.files.get("c")).one().content == "new a"
            assert await store.objects() == {"a": b"new a", "b": b"old b", "c": b"new a"}
            async with uow_class() as uow:
                await uow.files.delete("c")


async def test_a_move_is_seen_whole_before_it_is_applied() -> None:
    """I2: between pivot and apply the source is gone, and the target is there."""
    with plugins.override(faults):
        seen: list[dict[str, object]] = []

        async def script(phase: str, operation: str, key: str) -> None:
            if (phase, operation) == ("before", "copy") and key == "b":
                seen.append(await contents(uow_class))

        memory = await make_store("memory", None)  # type: ignore[arg-type]
        store = Store(
            faults.FaultyConnectorConfig(inner=memory.config, faults=faults.Scripted(script)),
            memory.namespace,
            settings={"backend": InMemoryBackendConfig(name=f"c{next(numbers)}")},
        )
        uow_class = await seeded(store)
        async with uow_class() as uow:
            await uow.files.move("a", "b")
            assert seen == []
        assert seen == [{"b": "old a"}]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # moto ignores conditions on CopyObject, so a copy to a free key is staged there, after a
        # look whether it holds an object of another catalog (P14).
        ("moto", {"HEAD": 2, "COPY": 2, "BATCH DELETE": 1}),
        ("moto-versioned", {"HEAD": 1, "COPY": 1}),
    ],
)
async def test_a_copy_sends_no_bytes(
    kind: str, expected: dict[str, int], request: pytest.FixtureRequest
) -> None:
    store = await make_store(kind, request)
    assert store.server is not None
    uow_class = await seeded(store)
    with store.server.watched() as requests:
        async with uow_class() as uow:
            await uow.files.copy("a", "c")
    assert dict(Counter(request.operation for request in requests)) == expected


@pytest.mark.parametrize("kind", ["moto", "moto-versioned", "juicefs"])
async def test_headers_go_along_and_options_win(kind: str, request: pytest.FixtureRequest) -> None:
    store = await make_store(kind, request)
    assert store.server is not None
    uow_class = store.uow()
    extra = {"CacheControl": "no-store", "ContentDisposition": "inline"}
    async with uow_class() as uow:
        await uow.files.put(text("1", "a"), connector_extra=extra)
    async with uow_class() as uow:
        await uow.files.copy("a", "b")
        await uow.files.move("a", "c", connector_extra={"CacheControl": "max-age=1"})
        with pytest.raises(ConnectorCapabilityException):
            await uow.files.copy("b", "d", connector_extra={"Nonsense": "x"})
    async with raw_client(store.server) as client:
        b = await client.head_object(Bucket=store.namespace, Key="b")
        c = await client.head_object(Bucket=store.namespace, Key="c")
    assert (b["CacheControl"], b["ContentDisposition"]) == ("no-store", "inline")
    assert (c["CacheControl"], c["ContentDisposition"]) == ("max-age=1", "inline")
    # P11: the copy names the write that made it, not that of its source.
    assert b["Metadata"]["fennflow_transaction"] == c["Metadata"]["fennflow_transaction"]
    assert b["Metadata"]["fennflow_seq"] != c["Metadata"]["fennflow_seq"]
