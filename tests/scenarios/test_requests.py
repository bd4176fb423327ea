"""What a unit of work costs in real HTTP requests, counted at the server."""

from __future__ import annotations

from collections import Counter

import pytest

from fennflow.files import TextContent
from fennflow.testing import S3Request
from stores import FullUOW, Store, make_store


def text(value: str, name: str) -> TextContent:
    return TextContent.from_content(value, filename=name)


def files(value: str, count: int) -> list[TextContent]:
    return [text(value, f"many/{number}") for number in range(count)]


def counted(requests: list[S3Request]) -> dict[str, int]:
    return dict(Counter(request.operation for request in requests))


async def warm(store: Store) -> type[FullUOW]:
    """Return a class whose engine is open and has probed the bucket."""
    uow_class = store.uow()
    async with uow_class() as uow:
        await uow.files.put(text("old", "a"))
    return uow_class


@pytest.fixture(params=["moto", "moto-versioned"])
async def any_store(request: pytest.FixtureRequest) -> Store:
    return await make_store(request.param, request)


async def test_a_new_key_is_one_put(any_store: Store) -> None:
    uow_class = await warm(any_store)
    assert any_store.server is not None
    with any_store.server.watched() as seen:
        async with uow_class() as uow:
            await uow.files.put(text("new", "b"))
    assert counted(seen) == {"PUT": 1}


async def test_overwriting_is_a_put_and_a_copy_each_and_one_batch_delete(
    moto_store: Store,
) -> None:
    uow_class = await warm(moto_store)
    assert moto_store.server is not None
    async with uow_class() as uow:
        await uow.files.put(*files("old", 100))
    with moto_store.server.watched() as seen:
        async with uow_class() as uow:
            await uow.files.put(*files("new", 100))
    assert counted(seen) == {"PUT": 100, "COPY": 100, "BATCH DELETE": 1}


async def test_overwriting_in_a_versioned_bucket_is_one_put(
    request: pytest.FixtureRequest,
) -> None:
    store = await make_store("moto-versioned", request)
    uow_class = await warm(store)
    assert store.server is not None
    with store.server.watched() as seen:
        async with uow_class() as uow:
            await uow.files.put(text("new", "a"))
    assert counted(seen) == {"PUT": 1}


async def test_a_thousand_deletes_are_one_request(any_store: Store) -> None:
    uow_class = await warm(any_store)
    assert any_store.server is not None
    async with uow_class() as uow:
        await uow.files.put(*files("x", 1000))
    with any_store.server.watched() as seen:
        async with uow_class() as uow:
            await uow.files.delete(*[f"many/{number}" for number in range(1000)])
            assert seen == []
    assert counted(seen) == {"BATCH DELETE": 1}
    assert set(await any_store.objects()) == {"a"}


async def test_list_stat_and_exists_send_no_request(any_store: Store) -> None:
    uow_class = await warm(any_store)
    assert any_store.server is not None
    with any_store.server.watched() as seen:
        async with uow_class() as uow:
            assert await uow.files.list() == ["a"]
            assert (await uow.files.stat("a")).size == 3
            assert await uow.files.exists("a")
            assert [path async for path in uow.files.iter()] == ["a"]
    assert seen == []


async def test_a_get_is_one_request(any_store: Store) -> None:
    uow_class = await warm(any_store)
    assert any_store.server is not None
    with any_store.server.watched() as seen:
        async with uow_class() as uow:
            await uow.files.get("a", "a")
    assert counted(seen) == {"GET": 1}


async def test_rolling_back_overwrites_is_a_put_each_and_one_batch_delete(
    moto_store: Store,
) -> None:
    uow_class = await warm(moto_store)
    assert moto_store.server is not None
    async with uow_class() as uow:
        await uow.files.put(*files("old", 100))
    with moto_store.server.watched() as seen, pytest.raises(ZeroDivisionError):
        async with uow_class() as uow:
            await uow.files.put(*files("new", 100))
            raise ZeroDivisionError
    assert counted(seen) == {"PUT": 100, "BATCH DELETE": 1}


async def test_a_bucket_is_probed_once_and_not_for_reading(request: pytest.FixtureRequest) -> None:
    moto_store = await make_store("moto", request, capabilities=None)
    assert moto_store.server is not None
    uow_class = moto_store.uow()
    with moto_store.server.watched() as seen:
        async with uow_class() as uow:
            assert await uow.files.list() == []
    # The catalog is empty, so it is filled from the bucket.
    assert counted(seen) == {"LIST": 1}
    with moto_store.server.watched() as seen:
        async with uow_class() as uow:
            await uow.files.put(text("1", "a"))
        async with uow_class() as uow:
            await uow.files.put(text("2", "b"))
    # P15: the keys of one probe under the reserved prefix, and the question whether the bucket has versions.
    about_the_key = [request for request in seen if request.key.startswith(".fennflow/probe/")]
    assert len({request.key.split("/")[2] for request in about_the_key}) == 1
    assert len(seen) <= 2 + 15
