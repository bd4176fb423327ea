"""Presigned URLs, used by a client without FennFlow."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import Mapping
from typing import Any
from urllib.error import HTTPError
from urllib.parse import parse_qs, urlsplit
from urllib.request import Request, urlopen

import pytest

from fennflow import plugins
from fennflow.backends import InMemoryBackendConfig
from fennflow.connectors import PresignMethod
from fennflow.exceptions import (
    ConnectorCapabilityException,
    FileException,
    KeyException,
    NoSuchKeyException,
    RecordAlreadyExistsException,
    RecordLockedException,
    TransactionException,
)
from fennflow.files import BinaryContent, TextContent
from fennflow.testing import faults
from stores import FullUOW, Store, make_store, numbers, raw_client


def text(value: str, name: str) -> TextContent:
    return TextContent.from_content(value, filename=name)


async def fetch(
    url: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
) -> bytes:
    def send() -> bytes:
        method = "GET" if body is None else "PUT"
        # Without a type of its own urllib would call it a form, which moto takes apart.
        every = {"Content-Type": "a/b", **(headers or {})}
        request = Request(url, data=body, method=method, headers=every)
        with urlopen(request) as answer:
            found: bytes = answer.read()
            return found

    return await asyncio.to_thread(send)


def signed_headers(url: str) -> set[str]:
    return set(parse_qs(urlsplit(url).query)["X-Amz-SignedHeaders"][0].split(";"))


async def refused(url: str, body: bytes, headers: Mapping[str, str]) -> int:
    """Return the status of an upload that fails."""
    with pytest.raises(HTTPError) as caught:
        await fetch(url, body, headers)
    caught.value.close()
    return caught.value.code


@pytest.fixture(params=["moto", "moto-versioned", "juicefs"])
async def s3_store(request: pytest.FixtureRequest) -> Store:
    return await make_store(request.param, request)


async def seeded(store: Store) -> type[FullUOW]:
    uow_class = store.uow()
    async with uow_class() as uow:
        await uow.files.put(text("1", "a/ü 1"), text("2", "a/2"), text("3", "b"))
    return uow_class


async def test_anyone_with_the_url_can_read_the_file(s3_store: Store) -> None:
    uow_class = await seeded(s3_store)
    async with uow_class() as uow:
        urls = await uow.files.at("a").generate_presigned_url("ü 1", "2", expires_in=60)
        assert urls.paths == ("a/ü 1", "a/2")
        assert [await fetch(url) for url in urls] == [b"1", b"2"]
        assert "X-Amz-Signature" in urls[0]
        assert "Signature" not in repr(urls)
        by_prefix = await uow.files.generate_presigned_url_prefix("a/")
        assert by_prefix.paths == ("a/2", "a/ü 1")
        assert [await fetch(url) for url in by_prefix] == [b"2", b"1"]
        with pytest.raises(NoSuchKeyException, match=r"none, bucket-\d+/never"):
            await uow.files.generate_presigned_url("b", "none", "never")


async def test_the_url_names_the_version_where_there_is_one(
    request: pytest.FixtureRequest,
) -> None:
    store = await make_store("moto-versioned", request)
    uow_class = await seeded(store)
    async with uow_class() as uow:
        [url] = await uow.files.generate_presigned_url("b")
    async with uow_class() as uow:
        await uow.files.put(text("new", "b"))
    assert await fetch(url) == b"3"


async def test_an_upload_by_url_is_in_the_bucket(s3_store: Store) -> None:
    uow_class = await seeded(s3_store)
    async with uow_class() as uow:
        urls = await uow.files.at("up").generate_presigned_url("c", method="PUT")
        await fetch(urls[0], b"uploaded", urls.headers)
        with pytest.raises(RecordAlreadyExistsException, match="a/2"):
            await uow.files.generate_presigned_url("a/2", method="PUT")
    assert (await s3_store.objects())["up/c"] == b"uploaded"


@pytest.mark.parametrize("kind", ["moto", "moto-versioned", "strict"])
async def test_an_upload_by_url_replaces_nothing_that_was_committed_meanwhile(
    request: pytest.FixtureRequest, kind: str
) -> None:
    """I1: the signature covers the condition."""
    store = await make_store(kind, request)
    uow_class = store.uow()
    async with uow_class() as uow:
        urls = await uow.files.generate_presigned_url("a", "b", method="PUT")
    assert urls.headers["If-None-Match"] == "*"
    assert "if-none-match" in signed_headers(urls[0])
    async with uow_class() as uow:
        await uow.files.put(text("committed", "a"))
    with pytest.raises(HTTPError) as caught:
        await fetch(urls[0], b"by url", urls.headers)
    caught.value.close()
    assert caught.value.code == 412
    await fetch(urls[1], b"by url", urls.headers)
    with pytest.raises(HTTPError) as caught:
        await fetch(urls[1], b"once more", urls.headers)
    caught.value.close()
    assert await store.objects() == {"a": b"committed", "b": b"by url"}


async def test_a_url_binds_size_type_bytes_and_metadata_of_the_upload(juicefs_store: Store) -> None:
    """JuiceFS accepts metadata headers that are not signed; those of a stamp are signed."""
    async with juicefs_store.uow()() as uow:
        urls = await uow.files.generate_presigned_url(
            "a", method="PUT", media_type="video/mp4", size=3
        )
    [url] = urls
    assert signed_headers(url) >= {
        "content-length",
        "content-type",
        "x-amz-meta-fennflow_transaction",
    }
    stamp = {
        "x-amz-meta-fennflow_transaction": "01890000-0000-7000-8000-000000000000",
        "x-amz-meta-fennflow_seq": "1",
    }
    for body, headers in (
        (b"one", {"Content-Type": "text/html"}),
        (b"more", {}),
        (b"one", stamp),
    ):
        assert await refused(url, body, {**urls.headers, **headers}) == 403
    unsent = {name: value for name, value in urls.headers.items() if "meta" not in name}
    assert await refused(url, b"one", unsent) == 400
    # What is encoded cannot replace what has a header of its own.
    text = json.dumps({name.removeprefix("x-amz-meta-"): value for name, value in stamp.items()})
    encoded = base64.urlsafe_b64encode(text.encode()).decode()
    await fetch(url, b"one", {**urls.headers, "x-amz-meta-fennflow_encoded": encoded})
    async with juicefs_store.uow()() as uow:
        info = await uow.files.adopt("a")
        assert (info.size, info.media_type, info.metadata) == (3, "video/mp4", {})


async def test_a_url_binds_the_checksum_of_the_upload(
    request: pytest.FixtureRequest, moto_store: Store
) -> None:
    async with moto_store.uow()() as uow:
        with pytest.raises(ConnectorCapabilityException, match="does not compare checksums"):
            await uow.files.generate_presigned_url("a", method="PUT", checksum="0" * 64)
    store = await make_store("strict", request)
    async with store.uow()() as uow:
        urls = await uow.files.generate_presigned_url(
            "a", method="PUT", checksum=hashlib.sha256(b"one").hexdigest()
        )
    assert "x-amz-checksum-sha256" in signed_headers(urls[0])
    assert await refused(urls[0], b"two", urls.headers) == 400
    await fetch(urls[0], b"one", urls.headers)
    assert await store.objects() == {"a": b"one"}


async def test_a_connector_that_signs_no_headers_gives_no_url_that_needs_them(
    request: pytest.FixtureRequest,
) -> None:
    store = await make_store("obstore-moto", request)
    page = TextContent.from_content("<script>", filename="a.html", media_type="text/html")
    async with store.uow()() as uow:
        with pytest.raises(ConnectorCapabilityException, match="signs no headers"):
            await uow.files.generate_presigned_url("a", method="PUT")
        await uow.files.put(page, text("b", "b.txt"))
        for name, kind in (("svg", "image/svg+xml"), ("zip", "application/zip"), ("xml", "a/xml")):
            await uow.files.put(BinaryContent(data=b"x", filename=name, media_type=kind))
    async with store.uow()() as uow:
        for path in ("a.html", "svg", "xml"):
            with pytest.raises(ConnectorCapabilityException, match="inline=True"):
                await uow.files.generate_presigned_url(path)
        assert len(await uow.files.generate_presigned_url("b.txt", "zip")) == 2
        with pytest.raises(ConnectorCapabilityException, match="signs no headers"):
            await uow.files.generate_presigned_url("b.txt", download_as="c.txt")
        urls = await uow.files.generate_presigned_url("a.html", "b.txt", inline=True)
        assert [await fetch(url) for url in urls] == [b"<script>", b"b"]


async def test_what_is_not_a_media_type_has_no_url_that_does_not_name_another_one(
    request: pytest.FixtureRequest,
) -> None:
    """Browsers treat some of these as HTML, and sniff the bytes of the others."""
    store = await make_store("obstore-moto", request)
    types = ["text/html,", "text/ html", "application", "application/octet-stream"]
    assert store.server is not None
    async with raw_client(store.server) as client:
        for number, kind in enumerate(types):
            name = f"{number}"
            await client.put_object(
                Bucket=store.namespace, Key=name, Body=b"<script>", ContentType=kind
            )
    async with store.uow()() as uow:
        for name in ("0", "1", "2"):
            assert (await uow.files.stat(name)).media_type == "application/octet-stream"
            with pytest.raises(ConnectorCapabilityException, match="inline=True"):
                await uow.files.generate_presigned_url(name)
        [url] = await uow.files.generate_presigned_url("3")
    assert await fetch(url) == b"<script>"


async def test_browsers_save_what_they_could_run_and_what_is_to_be_saved(moto_store: Store) -> None:
    uow_class = moto_store.uow()

    def asked(url: str) -> dict[str, str]:
        query = {name: value for name, [value] in parse_qs(urlsplit(url).query).items()}
        return {
            name.removeprefix("response-content-"): value
            for name, value in query.items()
            if name.startswith("response-")
        }

    page = TextContent.from_content("<script>", filename="d/ü.html", media_type="text/html")
    async with uow_class() as uow:
        await uow.files.put(page, text("b", "b.txt"))
        await uow.files.put(
            page.model_copy(update={"filename": "saved.html"}),
            connector_extra={"ContentDisposition": "attachment; filename=mine"},
        )
    async with uow_class() as uow:
        sign = uow.files.generate_presigned_url
        [html, plain, saved] = await sign("d/ü.html", "b.txt", "saved.html")
        saving = {"type": "text/html", "disposition": "attachment; filename*=UTF-8''%C3%BC.html"}
        assert asked(html) == saving
        assert asked(plain) == {"type": "text/plain"}
        assert asked(saved)["disposition"] == "attachment; filename=mine"
        assert asked((await sign("d/ü.html", inline=True))[0]) == {"type": "text/html"}
        [named] = await sign("b.txt", download_as='re"port\r\n.txt', media_type="text/csv")
        assert asked(named) == {
            "type": "text/csv",
            "disposition": "attachment; filename*=UTF-8''re%22port%0D%0A.txt",
        }
        [by_prefix] = await uow.files.generate_presigned_url_prefix("d/")
        assert asked(by_prefix) == saving

        def look() -> tuple[str | None, str | None]:
            with urlopen(named) as answer:
                return answer.headers["Content-Type"], answer.headers["Content-Disposition"]

        assert await asyncio.to_thread(look) == (asked(named)["type"], asked(named)["disposition"])


async def test_options_of_the_other_method_and_what_cannot_be_bound_are_refused(
    moto_store: Store,
) -> None:
    wrong: list[dict[str, Any]] = [
        {"method": "PUT", "download_as": "a"},
        {"method": "PUT", "inline": True},
        {"size": 3},
        {"checksum": "0" * 64},
        {"method": "PUT", "size": -1},
        {"method": "PUT", "size": True},
        {"method": "PUT", "checksum": "x"},
        {"method": "PUT", "media_type": "no type\r\n"},
        {"media_type": "text/html\r\nX: y"},
        {"download_as": 3},
    ]
    async with moto_store.uow()() as uow:
        for options in wrong:
            with pytest.raises((ConnectorCapabilityException, FileException)):
                await uow.files.generate_presigned_url("a", **options)


@pytest.mark.parametrize("method", ["GET", "PUT"])
async def test_what_is_not_committed_has_no_url(s3_store: Store, method: PresignMethod) -> None:
    uow_class = await seeded(s3_store)
    async with uow_class(auto_commit=False) as uow:
        await uow.files.put(text("new", "c"))
        await uow.files.delete("b")
        for path in ("b", "c"):
            with pytest.raises(TransactionException, match="Commit first"):
                await uow.files.generate_presigned_url(path, method=method)
        await uow.commit()
        [url] = await uow.files.generate_presigned_url("c")
        assert await fetch(url) == b"new"


@pytest.mark.parametrize("expires_in", [0, -1, 7 * 24 * 3600 + 1, float("nan")])
async def test_a_time_that_s3_does_not_sign_for_is_refused(
    moto_store: Store, expires_in: float
) -> None:
    uow_class = await seeded(moto_store)
    async with uow_class() as uow:
        with pytest.raises(ConnectorCapabilityException, match="604800 seconds"):
            await uow.files.generate_presigned_url("b", expires_in=expires_in)


async def test_nonsense_is_refused(moto_store: Store) -> None:
    async with moto_store.uow()() as uow:
        with pytest.raises(ConnectorCapabilityException, match="not for 'DELETE'"):
            await uow.files.generate_presigned_url("b", method="DELETE")  # type: ignore[arg-type]
        with pytest.raises(KeyException):
            await uow.files.generate_presigned_url(".fennflow/x", method="PUT")
        with pytest.raises(KeyException):
            await uow.files.at("a").generate_presigned_url("../b")


async def test_a_store_without_presigned_urls_says_so() -> None:
    uow_class = await seeded(await make_store("memory", None))  # type: ignore[arg-type]
    async with uow_class() as uow:
        with pytest.raises(ConnectorCapabilityException, match="for instance S3"):
            await uow.files.generate_presigned_url("b")


async def test_urls_name_the_endpoint_that_others_know(request: pytest.FixtureRequest) -> None:
    store = await make_store("moto", request, presign_endpoint_url="https://files.example")
    uow_class = await seeded(store)
    async with uow_class() as uow:
        [url] = await uow.files.generate_presigned_url("b")
    assert url.startswith(f"https://files.example/{store.namespace}/b?")


async def test_an_expired_url_is_good_for_nothing(juicefs_store: Store) -> None:
    uow_class = await seeded(juicefs_store)
    async with uow_class() as uow:
        [url] = await uow.files.generate_presigned_url("b", expires_in=1)
    async with asyncio.timeout(60):
        while True:
            try:
                await fetch(url)
            except HTTPError as error:
                refused = error.code
                error.close()
                break
            await asyncio.sleep(0.1)
    assert refused == 403


async def test_a_url_is_good_for_its_key_and_its_method_alone(juicefs_store: Store) -> None:
    """The signature covers both."""
    uow_class = await seeded(juicefs_store)
    async with uow_class() as uow:
        [url] = await uow.files.generate_presigned_url("b")
        uploads = await uow.files.generate_presigned_url("new", method="PUT")
    [upload] = uploads
    before = await juicefs_store.objects()
    other_key = url.replace("/b?", "/a/2?")
    longer = url.replace("X-Amz-Expires=", "X-Amz-Expires=9")
    other_upload = upload.replace("/new?", "/c?")
    assert len({url, other_key, longer}) == 3
    assert upload != other_upload
    for tried, body in ((other_key, None), (longer, None), (url, b"2"), (other_upload, b"2")):
        with pytest.raises(HTTPError) as caught:
            await fetch(tried, body, uploads.headers)
        caught.value.close()
        assert caught.value.code == 403
    assert await juicefs_store.objects() == before


@pytest.fixture
async def juicefs_store(request: pytest.FixtureRequest) -> Store:
    return await make_store("juicefs", request)


async def test_a_url_does_not_lead_to_where_bytes_are_for_a_moment(
    request: pytest.FixtureRequest,
) -> None:
    """P28: between pivot and apply the record points at a staging key."""
    with plugins.override(faults):
        applying, go_on = asyncio.Event(), asyncio.Event()

        async def script(phase: str, operation: str, _key: str) -> None:
            if (phase, operation) == ("before", "copy"):
                applying.set()
                await go_on.wait()

        moto = await make_store("moto", request)
        store = Store(
            faults.FaultyConnectorConfig(inner=moto.config, faults=faults.Scripted(script)),
            moto.namespace,
            settings={"backend": InMemoryBackendConfig(name=f"p{next(numbers)}")},
        )
        uow_class = await seeded(store)
        hasty, patient = store.uow(lock_timeout=0.05), store.uow(lock_timeout=60.0)

        async def overwrite() -> None:
            async with uow_class() as uow:
                await uow.files.put(text("new", "b"))

        async with asyncio.TaskGroup() as group:
            group.create_task(overwrite())
            await applying.wait()
            async with hasty() as uow:
                with pytest.raises(RecordLockedException, match="not yet copied"):
                    await uow.files.generate_presigned_url("b")
            async with patient() as uow:
                asking = group.create_task(uow.files.generate_presigned_url("b"))
                await asyncio.sleep(0.05)
                go_on.set()
                [url] = await asking
        assert await fetch(url) == b"new"
