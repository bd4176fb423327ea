"""Objects that clients upload to the store directly, and that a unit of work turns into files."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from crashing import make_site
from fennflow import plugins
from fennflow.backends import InMemoryBackendConfig, WriteId
from fennflow.connectors import ObjectAttributes, PutRequest
from fennflow.engine import direct_uploads, garbage
from fennflow.engine.stamps import Stamp, stamped
from fennflow.exceptions import (
    BaseConnectorException,
    ChecksumMismatchException,
    ConnectorCapabilityException,
    ConnectorUnavailableException,
    FileException,
    KeyException,
    NoSuchKeyException,
    ObjectChangedException,
    RecordAlreadyExistsException,
    UploadTicketException,
)
from fennflow.files import TextContent
from fennflow.responses import UploadTicket
from fennflow.testing import Fault, S3Request, S3Server, faults
from stores import (
    VERSIONING,
    FullUOW,
    Store,
    answers,
    make_store,
    new_bucket,
    numbers,
    raw_client,
    s3_config,
)

STRANGER = Stamp(WriteId("01890000-0000-7000-8000-000000000000", 1), "json")
"""A stamp of a transaction that ended long ago, or one that an uploader forged."""


def text(value: str, name: str) -> TextContent:
    return TextContent.from_content(value, filename=name)


async def upload(store: Store, key: str, metadata: Mapping[str, str] | None = None) -> None:
    """Put an object like a client without FennFlow."""
    attributes = ObjectAttributes(media_type="text/plain", metadata=metadata or {})
    async with store.connector() as connector:
        await connector.put(PutRequest(store.namespace, key, attributes), b"by url")


async def used(store: Store) -> type[FullUOW]:
    """Return a unit of work on a catalog that has a record, so that it adopts nothing by itself."""
    uow_class = store.uow()
    async with uow_class() as uow:
        await uow.files.put(text("1", "first"))
    return uow_class


@pytest.fixture(params=["memory", "memory-versioned", "moto", "moto-versioned", "obstore-memory"])
async def any_store(request: pytest.FixtureRequest) -> Store:
    return await make_store(request.param, request)


async def test_an_upload_is_recorded_in_the_transaction(any_store: Store) -> None:
    uow_class = await used(any_store)
    await upload(any_store, "up/a", {"von": "Zoë"})
    await upload(any_store, "up/b")
    async with uow_class(auto_commit=False) as uow:
        info = await uow.files.at("up").adopt("a")
        assert (info.path, info.size, info.media_type) == ("up/a", 6, "text/plain")
        assert (info.metadata, info.sha256) == ({"von": "Zoë"}, None)
        await uow.files.put(text("2", "second"))
        assert await uow.files.read_text("up/a") == "by url"
        async with uow_class() as other:
            assert not await other.files.exists("up/a")
        await uow.rollback()
    assert (await any_store.objects())["up/a"] == b"by url"
    async with uow_class() as uow:
        assert list(await uow.files.list()) == ["first"]
        assert len(await uow.files.adopt("up/a", "up/b")) == 2
    async with uow_class() as uow:
        assert list(await uow.files.list()) == ["first", "up/a", "up/b"]
        assert await uow.files.read_text("up/a") == "by url"


async def test_what_happens_to_a_recorded_upload_later_in_the_transaction(
    any_store: Store,
) -> None:
    uow_class = await used(any_store)
    for key in ("over", "gone", "saved", "moved"):
        await upload(any_store, key)
    async with uow_class() as uow:
        await uow.files.adopt("over", "gone", "moved")
        await uow.files.put(text("new", "over"))
        await uow.files.delete("gone")
        await uow.files.move("moved", "here")
        with pytest.raises(ZeroDivisionError):
            async with uow.savepoint():
                await uow.files.adopt("saved")
                raise ZeroDivisionError
    async with uow_class() as uow:
        assert list(await uow.files.list()) == ["first", "here", "over"]
        assert await uow.files.read_text("over") == "new"
        assert await uow.files.read_text("here") == "by url"
        await uow.files.adopt("saved")
    # Deleted and moved files are gone, as if they had been committed before.
    objects = {key for key in await any_store.objects() if not key.startswith(".fennflow/")}
    assert objects == {"first", "here", "over", "saved"}


async def test_what_is_not_an_upload_of_others_is_refused(any_store: Store) -> None:
    uow_class = await used(any_store)
    await upload(any_store, "up")
    await upload(any_store, "stamped", stamped({}, STRANGER))
    await upload(any_store, "theirs", stamped({}, STRANGER._replace(catalog_id="c1")))
    async with uow_class() as uow:
        with pytest.raises(NoSuchKeyException, match=r"none, \w+.*/never"):
            await uow.files.adopt("up", "none", "never")
        with pytest.raises(RecordAlreadyExistsException, match="already"):
            await uow.files.adopt("up", "first")
        with pytest.raises(ObjectChangedException, match="did not commit"):
            await uow.files.adopt("up", "stamped")
        with pytest.raises(RecordAlreadyExistsException, match="another application"):
            await uow.files.adopt("up", "theirs")
        assert not await uow.files.exists("up")
        await uow.files.adopt("up")
        with pytest.raises(RecordAlreadyExistsException, match="already"):
            await uow.files.adopt("up")


async def test_a_recorded_upload_outlives_the_process_that_dies_before_the_commit(
    request: pytest.FixtureRequest,
) -> None:
    site = await make_site("moto", "sqlite", request)
    uow_class = site.uow_class
    async with uow_class() as uow:
        await uow.files.put(TextContent.from_content("1", filename="first"))
    await upload(site.store, "up")
    other = replace(site, settings={**site.settings, "lease_ttl": 59.0})
    async with uow_class(auto_commit=False) as uow:
        await uow.files.adopt("up")
        await site.expire()
        assert (await other.uow_class.recover()).compensated == 1
    assert (await site.store.objects())["up"] == b"by url"


# --- tickets -----------------------------------------------------------------------------------


async def send(ticket: UploadTicket, body: bytes, **headers: str) -> int:
    """Upload like a browser, and return the status."""

    def request(method: str, url: str, data: bytes, headers: dict[str, str]) -> int:
        try:
            with urlopen(Request(url, data=data, method=method, headers=headers)) as answer:
                return int(answer.status)
        except HTTPError as error:
            error.close()
            return error.code

    def upload_all() -> int:
        for part in ticket.parts:
            status = request("PUT", part.url, body[part.start : part.end], {"Content-Type": ""})
            if status >= 300:
                return status
        if ticket.parts:
            return 200
        if ticket.method == "POST":
            edge = "-----edge"
            fields = [
                f'--{edge}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
                for name, value in {**ticket.fields, **headers}.items()
            ]
            head = f'--{edge}\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
            form = "".join([*fields, head]).encode() + body + f"\r\n--{edge}--\r\n".encode()
            return request(
                "POST", ticket.url, form, {"Content-Type": f"multipart/form-data; boundary={edge}"}
            )
        # Without a type of its own urllib would call it a form, which moto takes apart.
        return request(
            "PUT", ticket.url, body, {"Content-Type": "a/b", **ticket.headers, **headers}
        )

    return await asyncio.to_thread(upload_all)


@pytest.fixture(
    params=[
        "moto",
        "strict-versioned",
        *(
            pytest.param(kind, marks=pytest.mark.once)
            for kind in ("strict", "seaweedfs", "juicefs")
        ),
    ]
)
async def s3_store(request: pytest.FixtureRequest) -> Store:
    return await make_store(request.param, request)


async def visible(store: Store) -> dict[str, bytes]:
    return {k: v for k, v in (await store.objects()).items() if not k.startswith(".fennflow")}


async def staged(store: Store) -> list[str]:
    return [key for key in await store.objects(".fennflow/") if "/uploads/" in key]


async def test_an_upload_is_accepted_in_a_later_unit_of_work(s3_store: Store) -> None:
    uow_class = await used(s3_store)
    async with uow_class() as uow:
        ticket = await uow.files.at("up").upload_ticket(
            "a.txt", max_size=10, media_type="text/plain"
        )
    assert await send(ticket, b"Dear Ann") == 200
    assert await visible(s3_store) == {"first": b"1"}
    back = UploadTicket.model_validate_json(ticket.model_dump_json())
    assert back == ticket
    assert ticket.token not in repr(ticket)
    assert ticket.url not in repr(ticket)
    async with uow_class(auto_commit=False) as uow:
        await uow.files.accept(back)
        await uow.files.put(text("2", "second"))
        await uow.rollback()
    async with uow_class() as uow:
        info = await uow.files.accept(str(ticket))
        await uow.files.put(text("2", "second"))
        assert (info.path, info.size, info.media_type) == ("up/a.txt", 8, "text/plain")
    async with uow_class() as uow:
        assert list(await uow.files.list()) == ["first", "second", "up/a.txt"]
        assert await uow.files.read_text("up/a.txt") == "Dear Ann"
    assert await staged(s3_store) == []


async def test_an_upload_that_arrives_late_makes_and_changes_nothing(s3_store: Store) -> None:
    """P32: the URL is valid for longer, but its key never has a file."""
    uow_class = await used(s3_store)
    async with uow_class() as uow:
        ticket = await uow.files.upload_ticket("a", max_size=10)
    await send(ticket, b"one")
    async with uow_class() as uow:
        await uow.files.accept(ticket)
    await send(ticket, b"two")
    async with uow_class() as uow:
        assert await uow.files.read_bytes("a") == b"one"
        with pytest.raises(RecordAlreadyExistsException):
            await uow.files.accept(ticket)
        await uow.files.delete("a")
    await send(ticket, b"three")
    assert await visible(s3_store) == {"first": b"1"}
    async with uow_class() as uow:
        assert not await uow.files.exists("a")


@pytest.mark.parametrize("kind", ["moto", "seaweedfs"])
async def test_a_form_binds_the_largest_size(request: pytest.FixtureRequest, kind: str) -> None:
    store = await make_store(kind, request)
    uow_class = await used(store)
    async with uow_class() as uow:
        small, large = [
            await uow.files.upload_ticket(name, max_size=5, media_type="text/plain", method="POST")
            for name in ("small", "large")
        ]
    assert (small.method, small.fields["Content-Type"]) == ("POST", "text/plain")
    assert await send(small, b"five!") < 300
    refused = await send(large, b"six!!!") >= 300
    assert refused or kind == "moto"
    async with uow_class() as uow:
        assert (await uow.files.accept(small)).size == 5
        with pytest.raises(NoSuchKeyException if refused else UploadTicketException):
            await uow.files.accept(large)
    async with uow_class() as uow:
        assert await uow.files.read_bytes("small") == b"five!"
        assert not await uow.files.exists("large")


@pytest.mark.parametrize("kind", ["moto", "strict", "seaweedfs"])
async def test_a_large_file_is_uploaded_in_parts(
    request: pytest.FixtureRequest, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = 5 << 20  # S3 takes no smaller ones
    monkeypatch.setattr(direct_uploads, "PART_SIZE", part)
    store = await make_store(kind, request)
    uow_class = await used(store)
    body = bytes(part) + b"the end"
    async with uow_class() as uow:
        with pytest.raises(ConnectorCapabilityException, match="needs its size"):
            await uow.files.upload_ticket("a", max_size=part, method="MULTIPART")
        ticket = await uow.files.upload_ticket(
            "a",
            max_size=2 * part,
            size=len(body),
            media_type="video/mp4",
            checksum=hashlib.sha256(body).hexdigest(),
            method="MULTIPART",
        )
    assert [(each.start, each.end) for each in ticket.parts] == [(0, part), (part, len(body))]
    first = ticket.model_copy(update={"parts": ticket.parts[:1]})
    async with uow_class() as uow:
        with pytest.raises(UploadTicketException, match="2 of 2 parts of the upload"):
            await uow.files.accept(ticket)
        await send(first, body)
        with pytest.raises(UploadTicketException, match="1 of 2 parts of the upload"):
            await uow.files.accept(ticket)
    assert await send(ticket, body) == 200
    async with uow_class() as uow:
        info = await uow.files.accept(ticket)
        assert (info.size, info.media_type) == (len(body), "video/mp4")
        assert info.sha256 == hashlib.sha256(body).hexdigest()
    assert await send(ticket, body) >= 400
    async with uow_class() as uow:
        assert await uow.files.read_bytes("a") == body
    assert await staged(store) == []


async def test_what_the_store_does_not_enforce_is_checked_when_it_is_accepted(
    request: pytest.FixtureRequest,
) -> None:
    """The strict server does not check signatures, so it enforces nothing."""
    store = await make_store("strict", request)
    uow_class = await used(store)
    checksum = hashlib.sha256(b"right").hexdigest()
    wrong: list[tuple[dict[str, Any], bytes, dict[str, str], type[Exception]]] = [
        ({"max_size": 3}, b"four", {}, UploadTicketException),
        ({"max_size": 9, "size": 3}, b"four", {}, UploadTicketException),
        (
            {"max_size": 9, "media_type": "video/mp4"},
            b"one",
            {"Content-Type": "text/html"},
            UploadTicketException,
        ),
        (
            {"max_size": 9},
            b"one",
            {"Content-Disposition": "attachment; filename=invoice.exe"},
            UploadTicketException,
        ),
        ({"max_size": 9}, b"one", {"Content-Encoding": "gzip"}, UploadTicketException),
        ({"max_size": 9, "checksum": checksum}, b"wrong", {}, ChecksumMismatchException),
    ]
    for number, (options, body, headers, error) in enumerate(wrong):
        async with uow_class() as uow:
            ticket = await uow.files.upload_ticket(f"{number}", **options)
        unsigned = {n: v for n, v in ticket.headers.items() if not n.startswith("x-amz-checksum")}
        lax = ticket.model_copy(update={"headers": unsigned})
        assert await send(lax, body, **headers) == 200
        async with uow_class() as uow:
            with pytest.raises(error, match="Nothing was accepted"):
                await uow.files.accept(ticket)
            await uow.files.put(text("other", f"other {number}"))
    async with uow_class() as uow:
        ticket = await uow.files.upload_ticket("right", max_size=9, checksum=checksum)
    await send(ticket, b"right")
    async with uow_class() as uow:
        assert (await uow.files.accept(ticket)).sha256 == checksum
    assert sorted(await visible(store)) == [
        "first",
        *(f"other {n}" for n in range(len(wrong))),
        "right",
    ]


async def test_a_header_that_is_not_valid_is_not_taken_along(
    request: pytest.FixtureRequest,
) -> None:
    """It is not in the record, so it must not be stored with the file."""
    store = await make_store("strict", request)
    uow_class = await used(store)
    names = ("Content-Disposition", "Content-Encoding", "Cache-Control")
    headers = dict.fromkeys(names, "attachment; filename=ü.exe".encode().decode("latin-1"))
    async with uow_class() as uow:
        ticket = await uow.files.upload_ticket("a", max_size=9)
    assert await send(ticket, b"one", **headers) == 200
    async with uow_class() as uow:
        assert (await uow.files.accept(ticket)).headers == {}
    assert store.server is not None
    async with raw_client(store.server) as client:
        found = await client.head_object(Bucket=store.namespace, Key="a")
    assert not {name.lower() for name in names} & found["ResponseMetadata"]["HTTPHeaders"].keys()


async def test_an_upload_with_a_header_that_no_client_can_read_is_not_a_server_that_is_away(
    request: pytest.FixtureRequest,
) -> None:
    store = await make_store("strict", request, max_attempts=1)
    uow_class = await used(store)
    async with uow_class() as uow:
        ticket = await uow.files.upload_ticket("a", max_size=9)
    assert await send(ticket, b"one", **{"Content-Disposition": "attachment; filename=ü"}) == 200
    async with uow_class() as uow:
        with pytest.raises(BaseConnectorException, match="not UTF-8") as caught:
            await uow.files.accept(ticket)
    assert not isinstance(caught.value, ConnectorUnavailableException)


async def test_a_ticket_that_the_catalog_did_not_make_is_refused(moto_store: Store) -> None:
    uow_class = await used(moto_store)
    async with uow_class() as uow:
        scoped = uow.files.at("tenants/a")
        ticket = await scoped.upload_ticket("mine", max_size=9)
        other = await scoped.upload_ticket("other", max_size=9_000_000)
    await send(ticket, b"one")
    payload, code = ticket.token.split(".")
    forged = [
        "",
        ".",
        "ä.ö",
        payload,
        f"{payload}.",
        f"{payload}=.{code}",
        f"{other.token.split('.')[0]}.{code}",
        f"{ticket.token}x",
        f"{'x' * 20_000}.{code}",
        3,
        None,
    ]
    async with moto_store.uow(backend=InMemoryBackendConfig(name="another"))() as uow:
        with pytest.raises(UploadTicketException, match="upload ticket of this catalog"):
            await uow.files.accept(ticket)
    async with uow_class() as uow:
        for each in forged:
            with pytest.raises(UploadTicketException, match="upload ticket of this catalog"):
                await uow.files.accept(each)  # type: ignore[arg-type]
        for scope in ("tenants/b", "tenants/a/mine", "tenants/a/m"):
            with pytest.raises(UploadTicketException, match="not in the scope"):
                await uow.files.at(scope).accept(ticket)
        # Nothing but the token counts.
        changed = ticket.model_copy(update={"url": other.url, "headers": {"a": "b"}})
        assert (await uow.files.at("tenants").accept(changed)).path == "tenants/a/mine"


async def test_a_ticket_is_good_in_other_processes(request: pytest.FixtureRequest) -> None:
    site = await make_site("moto", "sqlite", request)
    async with site.uow_class() as uow:
        ticket = await uow.files.upload_ticket("a", max_size=9)
    await send(ticket, b"one")
    other = replace(site, settings={**site.settings, "lease_ttl": 59.0})
    async with other.uow_class() as uow:
        await uow.files.accept(ticket.token)
    async with site.uow_class() as uow:
        assert await uow.files.read_bytes("a") == b"one"


@pytest.mark.parametrize("phase", ["before", "after"])
async def test_an_upload_that_is_replaced_while_it_is_accepted_is_not_accepted(
    request: pytest.FixtureRequest, phase: str
) -> None:
    with plugins.override(faults):
        moto = await make_store("moto", request)
        again: list[UploadTicket] = []

        async def script(when: str, operation: str, _key: str) -> None:
            if (when, operation) == (phase, "copy") and again:
                # Like one of a form: nothing keeps it from replacing the first one.
                staging = urlsplit(again.pop().url).path.partition(f"{moto.namespace}/")[2]
                await upload(moto, staging)

        config = faults.FaultyConnectorConfig(inner=moto.config, faults=faults.Scripted(script))
        settings = {"backend": InMemoryBackendConfig(name=f"t{next(numbers)}")}
        store = Store(config, moto.namespace, settings=settings)
        uow_class = await used(store)
        async with uow_class() as uow:
            ticket = await uow.files.upload_ticket("a", max_size=9)
        await send(ticket, b"one")
        again.append(ticket)
        async with uow_class() as uow:
            with pytest.raises(ObjectChangedException, match="was replaced"):
                await uow.files.accept(ticket)
        assert await visible(moto) == {"first": b"1"}
        async with uow_class() as uow:
            await uow.files.accept(ticket)
        assert (await visible(moto))["a"] == b"by url"


def after(seconds: float) -> SimpleNamespace:
    """Return a replacement for the module `time`, a number of seconds later."""
    return SimpleNamespace(time=lambda: time.time() + seconds)


async def versions(server: S3Server, bucket: str) -> list[str]:
    """Return the ids of all versions of uploads, delete markers included."""
    async with raw_client(server) as client:
        listed = await client.list_object_versions(Bucket=bucket, Prefix=".fennflow/")
    found = [*listed.get("Versions", []), *listed.get("DeleteMarkers", [])]
    return [each.get("VersionId", "") for each in found if "/uploads/" in each.get("Key", "")]


@pytest.mark.parametrize(
    "kind",
    [
        "moto",
        "strict-versioned",
        *(pytest.param(each, marks=pytest.mark.once) for each in ("moto-suspended", "juicefs")),
    ],
)
async def test_tickets_that_are_not_accepted_expire_and_are_swept(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """P32: by any process; so are uploads that arrive later, which never become files."""
    site = await make_site(kind, "sqlite", request)
    other = replace(site, settings={**site.settings, "lease_ttl": 59.0})
    uow_class = site.uow_class
    async with uow_class() as uow:
        await uow.files.put(text("1", "first"))
        ticket = await uow.files.upload_ticket("a", max_size=9, expires_in=3600)
        longer = await uow.files.upload_ticket("b", max_size=9, expires_in=2 * 3600)
        if kind == "moto":
            parts = await uow.files.upload_ticket("c", max_size=9, size=9, method="MULTIPART")
    await send(ticket, b"one")
    await send(longer, b"two")
    monkeypatch.setattr(garbage, "time", after(3500))
    await other.uow_class.recover()
    assert len(await staged(site.store)) == 2
    # Once it cannot be accepted any more, and nothing that began in time can arrive.
    monkeypatch.setattr(garbage, "time", after(3700))
    monkeypatch.setattr(direct_uploads, "time", after(3700))
    for _ in range(2):
        report = await other.uow_class.recover()
        assert (report.swept, len(await staged(site.store))) == (1, 1)
        assert report.problems == ()
        async with uow_class() as uow:
            with pytest.raises(UploadTicketException, match="has expired"):
                await uow.files.accept(ticket)
        assert await visible(site.store) == {"first": b"1"}
        await send(ticket, b"late")
    await other.uow_class.recover()
    if kind == "moto":
        assert await send(parts, bytes(9)) >= 400
        async with site.store.connector() as connector:
            assert [each async for each in connector.uploads(site.namespace, "")] == []
        async with uow_class() as uow:
            with pytest.raises(UploadTicketException, match="has expired"):
                await uow.files.accept(parts)
    async with uow_class() as uow:
        await uow.files.accept(longer)
    assert await staged(site.store) == []
    if kind in VERSIONING:
        server: S3Server = request.getfixturevalue(kind.partition("-")[0])
        assert await versions(server, site.namespace) == []


async def test_uploads_from_before_versions_were_suspended_are_swept(
    strict: S3Server, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = await make_site("strict-versioned", "sqlite", request)
    async with site.uow_class() as uow:
        lost, used = [
            await uow.files.upload_ticket(name, max_size=9, expires_in=3600)
            for name in ("lost", "used")
        ]
    await send(lost, b"one")
    await send(used, b"two")
    async with raw_client(strict) as client:
        await client.put_bucket_versioning(
            Bucket=site.namespace, VersioningConfiguration={"Status": "Suspended"}
        )
    suspended = replace(answers[strict.url, "strict-versioned"], versioned=False, suspended=True)
    other = replace(site, connector=s3_config(strict, capabilities=suspended))
    async with other.uow_class() as uow:
        await uow.files.accept(used)
    assert len(await staged(site.store)) == 1
    monkeypatch.setattr(garbage, "time", after(3700))
    assert (await other.uow_class.recover()).swept == 1
    assert await staged(site.store) == []
    assert await versions(strict, site.namespace) == []


async def test_of_two_processes_that_accept_a_ticket_one_does(
    request: pytest.FixtureRequest,
) -> None:
    site = await make_site("moto", "sqlite", request)
    site.settings["lock_timeout"] = 60.0
    other = replace(site, settings={**site.settings, "lease_ttl": 59.0})
    async with site.uow_class() as uow:
        ticket = await uow.files.upload_ticket("a", max_size=9)
    await send(ticket, b"one")

    async def accept(uow_class: type[FullUOW]) -> bool:
        with suppress(RecordAlreadyExistsException):
            async with uow_class() as uow:
                await uow.files.accept(ticket)
                return True
        return False

    async with asyncio.TaskGroup() as group:
        both = [group.create_task(accept(each.uow_class)) for each in (site, other)]
    assert sorted(each.result() for each in both) == [False, True]
    assert not await accept(other.uow_class)
    assert await site.store.objects() == {"a": b"one"}
    async with other.uow_class() as uow:
        await uow.files.delete("a")
        with pytest.raises(NoSuchKeyException, match="accepted before"):
            await uow.files.accept(ticket)


async def test_an_upload_is_accepted_with_rows_or_can_be_accepted_again(
    request: pytest.FixtureRequest,
) -> None:
    site = await make_site("moto", "sqlite", request)
    uow_class = site.uow_class
    async with uow_class() as uow:
        ticket = await uow.files.upload_ticket("a", max_size=9)
    await send(ticket, b"one")
    engine = create_async_engine(site.backend.url.get_secret_value())
    async with uow_class.lifespan(check=False):
        for commits in (False, True):
            async with AsyncSession(engine) as session:
                await session.begin()
                async with uow_class(join=session) as uow:
                    await uow.files.accept(ticket)
                await (session.commit() if commits else session.rollback())
            for _ in range(1000):
                if not await uow_class.transactions():
                    break
                await asyncio.sleep(0.05)
            assert await visible(site.store) == ({"a": b"one"} if commits else {})
            assert len(await staged(site.store)) == (not commits)
    await engine.dispose()


@pytest.mark.parametrize("kind", ["moto", "strict-versioned"])
async def test_what_was_accepted_is_discarded_by_recovery_if_not_by_the_commit(
    request: pytest.FixtureRequest, kind: str
) -> None:
    with plugins.override(faults):
        inner = await make_store(kind, request)
        away = [True]

        async def script(when: str, operation: str, _key: str) -> None:
            if (when, operation) == ("before", "delete") and away[0]:
                message = "not now"
                raise ConnectorUnavailableException(message)

        config = faults.FaultyConnectorConfig(inner=inner.config, faults=faults.Scripted(script))
        settings = {"backend": InMemoryBackendConfig(name=f"t{next(numbers)}")}
        store = Store(config, inner.namespace, settings=settings)
        uow_class = await used(store)
        async with uow_class() as uow:
            ticket = await uow.files.upload_ticket("a", max_size=9)
        await send(ticket, b"one")
        async with uow_class() as uow:
            await uow.files.accept(ticket)
        assert len(await staged(inner)) == 1
        away[0] = False
        await uow_class.recover()
        assert await staged(inner) == []
        async with uow_class() as uow:
            assert await uow.files.read_bytes("a") == b"one"


@pytest.mark.parametrize(
    "fault",
    [
        Fault.AFTER,
        *(pytest.param(each, marks=pytest.mark.thorough) for each in (Fault.BEFORE, Fault.CUT)),
    ],
)
async def test_an_upload_is_accepted_whole_or_not_at_all_whatever_request_fails(
    request: pytest.FixtureRequest, fault: Fault
) -> None:
    store = await make_store("strict", request, max_attempts=1)
    server = store.server
    assert server is not None
    # Nothing of a failed request arrives late at a server in this process.
    uow_class = store.uow(late_write_period=0.001)
    async with uow_class() as uow:
        await uow.files.put(text("1", "first"))
    expected = {"first": b"1"}
    for number in itertools.count():
        name, left = f"{number}", number
        async with uow_class() as uow:
            ticket = await uow.files.upload_ticket(name, max_size=9)
        await send(ticket, b"one")

        def fail(_: S3Request) -> Fault | None:
            nonlocal left
            left -= 1
            return fault if left == -1 else None

        committed = False
        server.fault = fail
        with suppress(BaseConnectorException):
            async with uow_class() as uow:
                await uow.files.accept(ticket)
                await uow.files.put(text("2", f"{name} too"))
            committed = True
        server.fault = lambda _: None
        await uow_class.recover()
        if committed:
            expected |= {name: b"one", f"{name} too": b"2"}
        assert await visible(store) == expected
        assert len(await staged(store)) == (not committed)
        if not committed:
            async with uow_class() as uow:
                await uow.files.accept(ticket)
            expected[name] = b"one"
        async with uow_class() as uow:
            files = await uow.files.get(*expected)
            assert {file.path: file.data for file in files} == expected
        if left >= 0:
            break
    assert number > 5


async def test_what_happens_to_an_accepted_upload_later_in_the_transaction(
    moto_store: Store,
) -> None:
    uow_class = await used(moto_store)
    async with uow_class() as uow:
        tickets = [
            await uow.files.upload_ticket(name, max_size=9) for name in ("over", "gone", "saved")
        ]
        with pytest.raises(RecordAlreadyExistsException):
            await uow.files.upload_ticket("first", max_size=9)
    for ticket in tickets:
        await send(ticket, b"one")
    over, gone, saved = tickets
    async with uow_class() as uow:
        await uow.files.accept(over)
        await uow.files.put(text("new", "over"))
        await uow.files.accept(gone)
        await uow.files.delete("gone")
        with pytest.raises(ZeroDivisionError):
            async with uow.savepoint():
                await uow.files.accept(saved)
                raise ZeroDivisionError
    assert await visible(moto_store) == {"first": b"1", "over": b"new"}
    async with uow_class() as uow:
        await uow.files.delete("first")
        await uow.files.accept(saved)
    assert await visible(moto_store) == {"over": b"new", "saved": b"one"}


async def test_what_no_upload_can_be_bound_to_is_refused(moto_store: Store) -> None:
    wrong: list[dict[str, Any]] = [
        {"max_size": 0},
        {"max_size": True},
        {"max_size": None},
        {"max_size": 10**5000},
        {"max_size": 1 << 63},
        {"max_size": 3, "size": 10**5000},
        {"max_size": 3, "size": 4},
        {"max_size": 3, "size": -1},
        {"max_size": 3, "media_type": "x\r\ny"},
        {"max_size": 3, "checksum": "x"},
        {"max_size": 3, "expires_in": 0},
        {"max_size": 3, "expires_in": float("inf")},
        {"max_size": 3, "expires_in": float("nan")},
        {"max_size": 3, "expires_in": -(10**400)},
        {"max_size": 3, "expires_in": 10**400},
        {"max_size": 3, "expires_in": "1"},
        {"max_size": 3, "method": "DELETE"},
        {"max_size": 3, "size": 3, "method": "MULTIPART", "expires_in": 10**9},
    ]
    async with moto_store.uow()() as uow:
        for options in wrong:
            with pytest.raises((FileException, ConnectorCapabilityException)):
                await uow.files.upload_ticket("a", **options)
        with pytest.raises(KeyException):
            await uow.files.upload_ticket(".fennflow/x", max_size=3)


@pytest.mark.parametrize("kind", ["memory", "obstore-memory", "obstore-moto"])
async def test_a_connector_that_binds_nothing_gives_no_tickets(
    request: pytest.FixtureRequest, kind: str
) -> None:
    store = await make_store(kind, request)
    async with store.uow()() as uow:
        with pytest.raises(ConnectorCapabilityException, match=r"fennflow-s3|instance S3"):
            await uow.files.upload_ticket("a", max_size=3)


def test_tickets_without_async(moto: S3Server) -> None:
    store = asyncio.run(new_store(moto))
    sync = store.uow().sync
    with sync() as uow:
        ticket = uow.files.upload_ticket("a", max_size=9)
    assert asyncio.run(send(ticket, b"one")) == 200
    with sync() as uow:
        assert uow.files.accept(ticket.token).size == 3
    with sync() as uow:
        assert uow.files.read_bytes("a") == b"one"


async def new_store(server: S3Server) -> Store:
    return Store(s3_config(server), await new_bucket(server), server)
