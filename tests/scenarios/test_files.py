"""What users do with files, on every store."""

from __future__ import annotations

import io
import itertools
import struct
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeVar

import pytest
from pydantic import BaseModel
from typing_extensions import override

from fennflow import ConfigDict, ReconcileConfig, plugins
from fennflow.backends import InMemoryBackendConfig
from fennflow.connectors import InMemoryConnectorConfig, PutRequest
from fennflow.exceptions import (
    FileException,
    KeyException,
    MediaTypeCannotBeGuessedException,
    NoSuchKeyException,
    ObjectChangedException,
    PathException,
    RecordAlreadyExistsException,
    RecordLockedException,
    TransactionException,
)
from fennflow.files import (
    AudioContent,
    BinaryContent,
    DocumentContent,
    ImageContent,
    JsonContent,
    TextContent,
)
from fennflow.paths import StoragePath, encode_token
from fennflow.repositories import (
    CrudRepository,
    GetRepository,
    Repository,
    StatRepository,
    StreamRepository,
)
from fennflow.testing import faults
from stores import FullRepository, FullUOW, Store, make_store, raw_client

R = TypeVar("R")


def text(value: str, name: str) -> TextContent:
    return TextContent.from_content(value, filename=name)


def png() -> bytes:
    """Return a PNG of one pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\x00\xff\x00\x00")
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


PDF = b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF\n"


async def test_what_comes_back_is_of_the_class_that_went_in(store: Store) -> None:
    files = [
        BinaryContent(data=b"some bytes", media_type="text/plain", filename="b"),
        TextContent.from_content("Grüße", filename="t"),
        JsonContent.from_content({"naïve/日本語": "😀"}, filename="ключ.json"),
        ImageContent(data=png(), filename="i"),
        DocumentContent(data=PDF, filename="d"),
        AudioContent(data=b"x", media_type="audio/ogg", filename="a", metadata={"Künstler": "Zoë"}),
    ]
    uow_class = store.uow()
    async with uow_class() as uow:
        paths = await uow.files.at("ordner/ü").put(*files)
        assert paths[0] == "ordner/ü/b"
    async with uow_class() as uow:
        back = await uow.files.get(*paths)
        for put, got in zip(files, back, strict=True):
            assert type(got) is type(put)
            assert (got.data, got.media_type) == (put.data, put.media_type)
            assert got.metadata == put.metadata
            assert got.path == f"ordner/ü/{put.filename}"
        assert back[2].content == {"naïve/日本語": "😀"}
        assert [image.media_type for image in back.images] == ["image/png"]
        assert back.documents[0].media_type == "application/pdf"
        assert len(back.texts) == len(back.jsons) == len(back.audios) == 1
        # A file that was read is put elsewhere under its name.
        assert await uow.files.at("copy").put(back[1]) == ["copy/t"]


async def test_a_file_without_a_name_is_named_by_its_bytes(store: Store) -> None:
    async with store.uow()() as uow:
        [path] = await uow.files.put(TextContent.from_content("Hello, world!"))
        digest = "315f5bdb76d078c43b8ac0064e4a0164612b1fce77c869345bfc94c75894edd3"
        assert path == f"{digest}.txt"
        assert (await uow.files.stat(path)).sha256 == digest


@pytest.mark.once
async def test_a_large_file_goes_up_in_parts_and_comes_back(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    store = await make_store("moto", request)
    assert store.server is not None
    uow_class = store.uow()
    block = bytes(range(256)) * 4096
    body = block * 72
    async with uow_class() as uow:
        with store.server.watched() as seen:
            await uow.files.put(BinaryContent(data=body, media_type="a/b", filename="large"))
        parts = [each for each in seen if each.method == "PUT" and "partNumber" in each.query]
        assert len(parts) == 9
    async with uow_class() as uow:
        assert (await uow.files.get("large")).one().data == body
        await uow.files.put(BinaryContent(data=body[1:], media_type="a/b", filename="large"))
    async with uow_class() as uow:
        assert (await uow.files.get("large")).one().data == body[1:]
    assert list(await store.objects()) == ["large"]


async def test_an_upload_in_parts_that_fails_is_aborted(request: pytest.FixtureRequest) -> None:
    from fennflow.exceptions import ConnectorUnavailableException
    from fennflow.testing import Fault

    store = await make_store(
        "moto", request, multipart_threshold=5 << 20, multipart_part_size=5 << 20, max_attempts=1
    )
    assert store.server is not None
    uow_class = store.uow()
    body = b"x" * (16 << 20)
    with pytest.raises(ConnectorUnavailableException):
        async with uow_class() as uow:
            store.server.fault = lambda each: Fault.BEFORE if "partNumber=3" in each.query else None
            await uow.files.put(BinaryContent(data=body, media_type="a/b", filename="large"))
    store.server.fault = lambda _: None
    async with raw_client(store.server) as client:
        assert "Uploads" not in await client.list_multipart_uploads(Bucket=store.namespace)
    assert await store.objects() == {}


async def test_the_last_call_wins_inside_a_transaction(store: Store) -> None:
    uow_class = store.uow()
    async with uow_class() as uow:
        await uow.files.put(text("1", "put put"), text("1", "put delete"), text("1", "old"))
        await uow.files.put(text("2", "put put"))
        await uow.files.delete("put delete")
        assert not await uow.files.exists("put delete")
        assert (await uow.files.get("put put")).one().content == "2"
    assert await store.objects() == {"put put": b"2", "old": b"1"}
    async with uow_class() as uow:
        await uow.files.delete("old")
        with pytest.raises(NoSuchKeyException):
            await uow.files.get("old")
        await uow.files.create(text("2", "old"))
        await uow.files.put(text("3", "put put"))
        await uow.files.put(text("4", "put put"))
        await uow.files.delete("put put")
    assert await store.objects() == {"old": b"2"}


async def test_others_see_nothing_before_the_commit_and_all_after_it(store: Store) -> None:
    uow_class = store.uow()
    async with uow_class() as uow:
        await uow.files.put(text("old", "a"), text("old", "b"))
    async with uow_class() as uow:
        await uow.files.put(text("new", "a"), text("new", "c"))
        await uow.files.delete("b")
        async with uow_class() as other:
            assert await other.files.list() == ["a", "b"]
            assert (await other.files.get("a")).one().content == "old"
    async with uow_class() as uow:
        assert await uow.files.list() == ["a", "c"]
        assert (await uow.files.get("a")).one().content == "new"


async def test_commit_and_rollback_may_be_followed_by_more_work(store: Store) -> None:
    uow_class = store.uow()
    async with uow_class(auto_commit=False) as uow:
        await uow.files.put(text("1", "a"))
        await uow.commit()
        await uow.files.put(text("2", "a"), text("2", "b"))
        await uow.rollback()
        await uow.files.put(text("3", "c"))
        await uow.commit()
        await uow.files.put(text("4", "d"))
    assert await store.objects() == {"a": b"1", "c": b"3"}


async def test_create_refuses_what_is_taken_and_undoes_its_call(store: Store) -> None:
    uow_class = store.uow()
    async with uow_class() as uow:
        await uow.files.create(text("1", "a"))
        with pytest.raises(RecordAlreadyExistsException, match="/a already exists"):
            await uow.files.create(text("2", "b"), text("2", "a"))
        assert await uow.files.list() == ["a"]
    async with uow_class() as uow:
        with pytest.raises(RecordAlreadyExistsException):
            await uow.files.create(text("2", "b"), text("2", "a"))
        await uow.files.create(text("3", "b"))
    assert await store.objects() == {"a": b"1", "b": b"3"}


async def test_objects_that_the_catalog_does_not_know_are_not_created_over(store: Store) -> None:
    """P14, P16: `create` refuses; `put` replaces at the commit and not before."""
    from fennflow.connectors import ObjectAttributes

    plain = ObjectAttributes(media_type="text/plain")
    async with store.connector() as connector:
        for key in ("a", "b"):
            await connector.put(PutRequest(store.namespace, key, plain), b"foreign")
    uow_class = store.uow(reconcile=ReconcileConfig(frequency="never"))
    async with uow_class() as uow:
        assert await uow.files.list() == []
        with pytest.raises(RecordAlreadyExistsException):
            await uow.files.create(text("mine", "a"), text("mine", "c"))
        await uow.files.put(text("mine", "b"))
    assert await store.objects() == {"a": b"foreign", "b": b"mine"}
    with pytest.raises(ZeroDivisionError):
        async with uow_class() as uow:
            await uow.files.put(text("mine", "a"))
            raise ZeroDivisionError
    assert await store.objects() == {"a": b"foreign", "b": b"mine"}


async def test_an_object_changed_behind_the_catalog_is_not_returned(store: Store) -> None:
    from fennflow.connectors import ObjectAttributes

    uow_class = store.uow()
    async with uow_class() as uow:
        await uow.files.put(text("mine", "a"))
    async with store.connector() as connector:
        if (await connector.capabilities(store.namespace)).versioned:
            return  # the record names its version, which cannot change
        plain = ObjectAttributes(media_type="text/plain")
        await connector.put(PutRequest(store.namespace, "a", plain), b"foreign")
    async with uow_class() as uow:
        with pytest.raises(ObjectChangedException, match="/a"):
            await uow.files.get("a")


async def test_undoing_spares_an_object_that_another_writer_put_meanwhile(store: Store) -> None:
    """I5, P18."""
    from fennflow.connectors import ObjectAttributes

    uow_class = store.uow()
    with pytest.raises(ZeroDivisionError):
        async with uow_class() as uow:
            await uow.files.put(text("mine", "a"))
            async with store.connector() as connector:
                plain = ObjectAttributes(media_type="text/plain")
                await connector.put(PutRequest(store.namespace, "a", plain), b"foreign")
            raise ZeroDivisionError
    assert await store.objects() == {"a": b"foreign"}


async def test_missing_paths_are_all_named(store: Store) -> None:
    async with store.uow()() as uow:
        await uow.files.put(text("1", "a"))
        with pytest.raises(NoSuchKeyException, match=r"/x, \S+/y$"):
            await uow.files.get("x", "a", "y")
        with pytest.raises(NoSuchKeyException, match=r"/x, \S+/y$"):
            await uow.files.delete("x", "a", "y", missing_ok=False)
        assert len(await uow.files.get("x", "a", missing_ok=True)) == 1
        assert await uow.files.delete("x", "a", "y") == ["a"]
        with pytest.raises(NoSuchKeyException):
            await uow.files.stat("a")


async def test_hidden_creates_are_not_in_the_bucket_before_the_commit(store: Store) -> None:
    uow_class = store.uow(hide_pending=True)
    async with store.connector() as connector:
        versioned = (await connector.capabilities(store.namespace)).versioned
    async with uow_class() as uow:
        await uow.files.put(text("1", "a"))
        await uow.files.create(text("1", "b"))
        seen = [key for key in await store.objects() if not key.startswith(".fennflow/")]
        # A version cannot be hidden: the placement of versioned buckets stays.
        assert seen == (["a", "b"] if versioned else [])
    assert set(await store.objects()) == {"a", "b"}


async def test_a_second_writer_gets_an_error_after_the_lock_timeout(store: Store) -> None:
    uow_class = store.uow(lock_timeout=0.05)
    async with uow_class() as uow:
        await uow.files.put(text("first", "a"))
        async with uow_class() as other:
            with pytest.raises(RecordLockedException, match=r"/a .*lock_timeout=0\.05"):
                await other.files.put(text("second", "b"), text("second", "a"))
            await other.files.put(text("third", "c"))
    assert await store.objects() == {"a": b"first", "c": b"third"}


async def test_a_unit_of_work_is_used_inside_its_block_alone(store: Store) -> None:
    uow = store.uow()()
    with pytest.raises(TransactionException, match="async with"):
        _ = uow.files
    with pytest.raises(TransactionException, match="async with"):
        await uow.commit()
    async with uow:
        pass
    with pytest.raises(TransactionException, match="has ended"):
        await uow.files.list()
    with pytest.raises(TransactionException, match="Construct a new one"):
        async with uow:
            pass


async def test_metadata_and_types_are_checked_before_any_request(moto_store: Store) -> None:
    from fennflow.exceptions import FilepathsCollisionError, KeyException, MetadataException

    assert moto_store.server is not None
    too_long = {"author": "ü" * 900}
    with moto_store.server.watched() as seen:
        async with moto_store.uow()() as uow:
            with pytest.raises(MetadataException, match="2048"):
                await uow.files.put(TextContent.from_content("1", metadata=too_long))
            with pytest.raises(FilepathsCollisionError, match="a"):
                await uow.files.put(text("1", "a"), text("2", "a"))
            with pytest.raises(KeyException, match="segment"):
                await uow.files.at("x").put(text("1", "../a"))
            with pytest.raises(KeyException, match="FennFlow's own"):
                await uow.files.put(text("1", ".fennflow/a"))
            for wrong, named in WRONG.items():
                with pytest.raises(FileException, match=named):
                    await uow.files.put(wrong)
            with pytest.raises(FileException, match=r"put\(\*files\)"):
                await uow.files.put([text("1", "a")])  # type: ignore[arg-type]
            with pytest.raises(FileException, match="'rb'"):
                await uow.files.put(io.StringIO("text"))
    assert seen == []
    with pytest.raises(MetadataException):
        TextContent.from_content("1", metadata={"a": "x" * 2048})
    with pytest.raises(MetadataException):
        TextContent.from_content("1", metadata={"fennflow_transaction": "x"})
    with pytest.raises(FileException):
        TextContent(data="no bytes")  # type: ignore[arg-type]
    with pytest.raises(FileException):
        JsonContent.from_content(float("nan"))
    with pytest.raises(FileException):
        ImageContent(data=b"", media_type="text/plain")
    with pytest.raises(MediaTypeCannotBeGuessedException):
        BinaryContent(data=b"?")


class Model(BaseModel, frozen=True):
    """A user's model."""


WRONG: dict[Any, str] = {
    "text": "TextContent",
    b"bytes": "BinaryContent",
    Model(): r"ModelContent\[Model\]",
    7: "fennflow.files",
}


async def test_one_file_is_read_as_bytes_text_or_json(store: Store) -> None:
    latin = TextContent.from_content("é", filename="l", media_type="text/plain; charset=latin-1")
    async with store.uow()() as uow:
        await uow.files.at("a").put(latin, JsonContent.from_content([1], filename="b.json"))
        assert await uow.files.read_text("a/l") == "é"
        assert await uow.files.read_bytes("a/l") == b"\xe9"
        assert await uow.files.read_json(PurePosixPath("a/b.json")) == [1]
        assert await uow.files.read_text(PureWindowsPath("a\\b.json")) == "[1]"
        assert await uow.files.at(PurePosixPath("a")).exists(PurePosixPath("l"))
        with pytest.raises(FileException, match="a/l cannot be read"):
            await uow.files.read_json("a/l")
        with pytest.raises(KeyException):
            await uow.files.read_text(PurePosixPath("/a/l"))
        got = await uow.files.get("a/l")
        assert got.one(TextContent).content == "é"
        with pytest.raises(FileException, match="a/l is TextContent, not JsonContent"):
            got.one(JsonContent)


async def test_a_list_has_the_size_and_time_of_each_path(store: Store) -> None:
    async with store.uow()() as uow:
        await uow.files.put(text("1", "a"), text("22", "b"), text("333", "c"))
    async with store.uow()() as uow:
        await uow.files.put(text("4444", "b"))
        await uow.files.delete("a")
        listed = await uow.files.list()
        assert [(each.path, each.size) for each in listed.infos] == [("b", 4), ("c", 3)]
        assert listed.infos == await uow.files.stat(*listed)
        page = await uow.files.list(limit=1)
        assert [each.size for each in page.infos] == [4]


def test_mixins_can_be_named_in_any_order_together_with_the_ready_made_repository() -> None:
    for mixins in itertools.permutations([CrudRepository, StreamRepository, StatRepository]):
        made: Any = type("Everything", mixins, {})
        assert made.stat is StatRepository.stat
        assert made.open is StreamRepository.open
        assert made.__mro__[-2:] == (Repository, object)


def test_a_missing_method_names_the_mixin_that_brings_it() -> None:
    class Reports(GetRepository):
        pass

    reports: Any = object.__new__(Reports)
    with pytest.raises(AttributeError, match=r"class Reports\(\.\.\., StatRepository\)"):
        _ = reports.stat
    with pytest.raises(AttributeError, match=r"no attribute 'fly'\.$"):
        _ = reports.fly


async def test_scopes_nest_and_storage_paths_are_absolute(store: Store) -> None:
    async with store.uow()() as uow:
        inner = uow.files.at("a").at("b/")
        assert inner.cwd == "a/b"
        [path] = await inner.put(text("1", "c"))
        assert isinstance(path, StoragePath)
        assert (path, path.name, path.parent) == ("a/b/c", "c", "a/b")
        assert (await uow.files.at("elsewhere").get(path)).one().content == "1"
        assert await inner.list() == [path]
        assert await uow.files.at("a").list("b") == [path]
        assert await uow.files.at("a/b/c").list() == []


async def test_listing_in_pages_meets_own_changes(store: Store) -> None:
    uow_class = store.uow()
    async with uow_class() as uow:
        await uow.files.put(*[text("1", f"d{number % 3}/{number:02}") for number in range(12)])
    async with uow_class() as uow:
        await uow.files.delete("d0/00", "d1/10")
        await uow.files.put(text("1", "d0/zz"), text("1", "a"), text("1", "z"))
        everything = [path async for path in uow.files.iter()]
        assert everything == sorted(everything)
        assert len(everything) == 13
        pages: list[str] = []
        token = None
        while True:
            page = await uow.files.list(limit=2, continuation_token=token)
            assert len(page) <= 2
            pages += page
            token = page.continuation_token
            if token is None:
                break
        assert pages == everything
        rolled = await uow.files.list(delimiter="/")
        assert list(rolled) == ["a", "z"]
        assert list(rolled.prefixes) == ["d0/", "d1/", "d2/"]


async def test_all_of_many_files_are_listed_and_read_and_a_page_says_that_there_are_more() -> None:
    store = await make_store("memory", None)  # type: ignore[arg-type]
    uow_class = store.uow()
    names = [f"{number % 3}/{number:04}" for number in range(3000)]
    async with uow_class() as uow:
        await uow.files.put(*(text(name, name) for name in names))
        found = await uow.files.list()
        assert found == sorted(names)
        assert found.continuation_token is None
        files = await uow.files.get(*found)
        assert [file.content for file in files] == sorted(names)
        assert len((await uow.files.list(delimiter="/")).prefixes) == 3
        page = await uow.files.list(limit=2)
        assert repr(page) == "ListResponse['0/0000', '0/0003', … more: continuation_token]"
        rolled = await uow.files.list(limit=1, delimiter="/")
        assert repr(rolled) == "ListResponse[… more: continuation_token]"
        rest = await uow.files.list(continuation_token=page.continuation_token)
        assert [*page, *rest] == sorted(names)


class CountedScans(faults.Faults):
    """Counts the records that are read."""

    records = 0

    @override
    async def around(self, operation: faults.Operation, effect: faults.Effect[R]) -> R:
        answer = await effect()
        if operation.name == "scan" and isinstance(answer, list):
            self.records += len(answer)
        return answer


async def test_folders_are_listed_without_reading_what_they_hold() -> None:
    counted = CountedScans()
    backend = faults.FaultyBackendConfig(inner=InMemoryBackendConfig(), faults=counted)
    names = [f"d{folder}/{number:03}" for folder in range(5) for number in range(300)]

    class Uow(FullUOW):
        config = ConfigDict(connector=InMemoryConnectorConfig(name="rolled"), backend=backend)

    with plugins.override(faults):
        async with Uow() as uow:
            await uow.files.put(*(text("x", name) for name in names))
        async with Uow() as uow:
            counted.records = 0
            rolled = await uow.files.list(delimiter="/")
            assert list(rolled.prefixes) == ["d0/", "d1/", "d2/", "d3/", "d4/"]
            assert counted.records == 5
            assert len(await uow.files.list(limit=2000)) == len(names)
        async with Uow(auto_commit=False) as uow:
            await uow.files.delete("d1/000", "d3/000")
            await uow.files.put(text("x", "d2/new"), text("x", "e/new"))
            counted.records = 0
            rolled = await uow.files.list(delimiter="/")
            assert list(rolled.prefixes) == ["d0/", "d1/", "d2/", "d3/", "d4/", "e/"]
            assert counted.records < 200
            await uow.files.delete_prefix("d")
            counted.records = 0
            assert list((await uow.files.list(delimiter="/")).prefixes) == ["e/"]
            assert counted.records < 2 * len(names)


@pytest.mark.parametrize("prefix", ["\ud800", "a\0b", "a\0", "../", "a//b", "x" * 1025])
@pytest.mark.parametrize(
    "call",
    [
        lambda files, prefix: files.list(prefix),
        lambda files, prefix: anext(aiter(files.iter(prefix))),
        lambda files, prefix: files.get_prefix(prefix),
        lambda files, prefix: files.delete_prefix(prefix),
        lambda files, prefix: files.generate_presigned_url_prefix(prefix),
    ],
    ids=["list", "iter", "get_prefix", "delete_prefix", "presign"],
)
async def test_a_prefix_that_no_key_can_have_is_refused_before_anything_is_asked(
    prefix: str, call: Callable[[FullRepository, str], Awaitable[object]]
) -> None:
    with plugins.override(faults):
        asked: list[str] = []

        async def script(_phase: str, operation: str, _key: str) -> None:
            asked.append(operation)

        backend = faults.FaultyBackendConfig(
            inner=InMemoryBackendConfig(), faults=faults.Scripted(script)
        )
        store = await make_store("memory", None)  # type: ignore[arg-type]
        uow_class = store.uow(backend=backend)
        async with uow_class() as uow:
            await uow.files.list()
            assert "scan" in asked
            asked.clear()
            for files in (uow.files, uow.files.at("in")):
                with pytest.raises(KeyException, match="Prefix"):
                    await call(files, prefix)
            assert not {"records", "scan", "begin_writes"} & set(asked)  # recovery runs in parallel


@pytest.mark.parametrize(
    "arguments",
    [
        *({"limit": limit} for limit in (0, -1, 1_000_001, 1 << 40, 1 << 63, "1", 1.5)),
        *({"delimiter": delimiter} for delimiter in ("", 7, b"/")),
        {"continuation_token": "AGE"},
        {"prefix": None},
    ],
)
async def test_a_page_that_cannot_be_is_refused(arguments: dict[str, Any]) -> None:
    store = await make_store("memory", None)  # type: ignore[arg-type]
    async with store.uow()() as uow:
        with pytest.raises(PathException):
            await uow.files.list(**arguments)
        assert await uow.files.list(limit=1_000_000) == []


@pytest.mark.parametrize(
    ("start", "end"), [(-1, None), (3, 2), ("0", None), (0, "1"), (0, -1), (1.5, None)]
)
async def test_a_range_that_cannot_be_is_refused(start: Any, end: Any) -> None:
    store = await make_store("memory", None)  # type: ignore[arg-type]
    async with store.uow()() as uow:
        await uow.files.put(text("1", "a"))
        with pytest.raises(PathException, match="Invalid byte range"):
            async with uow.files.open("a", start=start, end=end):
                pass


async def test_a_forged_token_opens_no_other_scope(moto_store: Store) -> None:
    uow_class = moto_store.uow()
    async with uow_class() as uow:
        await uow.files.put(text("1", "a/1"), text("1", "b/1"), text("1", "c/1"))
        for start, found in (("a", ["b/1"]), ("a/", ["b/1"]), ("b/1", ["b/1"]), ("c/", [])):
            page = await uow.files.at("b").list(continuation_token=encode_token(start))
            assert page == found


async def test_prefixes_are_read_and_deleted_whole(store: Store) -> None:
    uow_class = store.uow()
    async with uow_class() as uow:
        await uow.files.at("in").put(text("1", "a/1"), text("2", "a/2"), text("3", "ab"))
        await uow.files.put(text("4", "in2"), text("5", "out"))
    async with uow_class() as uow:
        await uow.files.at("in").put(text("own", "a/3"))
        found = await uow.files.at("in").get_prefix("a/")
        assert [file.content for file in found] == ["1", "2", "own"]
        assert len(await uow.files.get_prefix()) == 6
        assert await uow.files.at("in").delete_prefix("a") == [
            *("in/a/1", "in/a/2", "in/a/3", "in/ab")
        ]
        assert await uow.files.list() == ["in2", "out"]
    assert set(await store.objects()) == {"in2", "out"}


async def test_a_prefix_of_any_size_is_deleted_all_or_none(
    request: pytest.FixtureRequest,
) -> None:
    store = await make_store("memory", request)
    uow_class = store.uow(lock_timeout=0.0)
    async with uow_class() as uow:
        await uow.files.put(*[text("1", f"{number:04}") for number in range(2500)])
    async with uow_class() as uow:
        async with uow_class() as other:
            await other.files.put(text("locked", "2400"))
            with pytest.raises(RecordLockedException):
                await uow.files.delete_prefix()
            await other.rollback()
        assert len([path async for path in uow.files.iter()]) == 2500
        assert len(await uow.files.delete_prefix()) == 2500
    assert await store.objects() == {}
