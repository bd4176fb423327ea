"""Objects that clients upload to the store directly, and that a unit of work makes files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from crashing import make_site
from fennflow.connectors import ObjectAttributes
from fennflow.engine.stamps import Stamp, stamped
from fennflow.exceptions import (
    NoSuchKeyException,
    ObjectChangedException,
    RecordAlreadyExistsException,
)
from fennflow.files import TextContent
from stores import FullUOW, Store, make_store

STRANGER = Stamp("01890000-0000-7000-8000-000000000000", 1, "json")
"""What a transaction that ended long ago may have left, or an uploader claims."""


def text(value: str, name: str) -> TextContent:
    return TextContent.from_content(value, filename=name)


async def upload(store: Store, key: str, metadata: Mapping[str, str] | None = None) -> None:
    """Put an object as a client does that knows nothing of FennFlow."""
    attributes = ObjectAttributes(media_type="text/plain", metadata=metadata or {})
    async with store.connector() as connector:
        await connector.put(store.namespace, key, b"by url", attributes)


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
