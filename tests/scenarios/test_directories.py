"""Stores that are file systems: `a` and `a/b` exclude each other, and names have a limit (P2)."""

from __future__ import annotations

import pytest

from fennflow.connectors import ObjectAttributes, PutRequest
from fennflow.exceptions import KeyException
from fennflow.files import TextContent
from stores import FullUOW, Store, make_store

PLAIN = ObjectAttributes(media_type="text/plain")
KINDS = ["memory-files", "obstore-file", "juicefs", "obstore-juicefs"]
PAIRS = [("a", "a/b"), ("a", "a/b/c"), ("a/b", "a"), ("a/b/c", "a"), ("a/b/c", "a/b")]


def text(value: str, name: str) -> TextContent:
    return TextContent.from_content(value, filename=name)


@pytest.fixture(params=KINDS)
async def store(request: pytest.FixtureRequest) -> Store:
    return await make_store(request.param, request)


@pytest.fixture
def uow_class(store: Store) -> type[FullUOW]:
    return store.uow(lock_timeout=0.0, reconcile={"frequency": "never"})


async def put(uow_class: type[FullUOW], *keys: str) -> None:
    async with uow_class() as uow:
        await uow.files.put(*[text(key, key) for key in keys])


async def holds(store: Store, uow_class: type[FullUOW], *keys: str) -> None:
    """Check that exactly these files exist, and that nothing is pending or locked."""
    expected = {key: key.encode() for key in keys}
    assert await store.objects() == expected
    assert not await uow_class.transactions()
    async with uow_class() as uow:
        assert await uow.files.list() == sorted(keys)
        await uow.files.put(*[text(key, key) for key in keys], text("x", "innocent"))
    assert await store.objects() == {**expected, "innocent": b"x"}


@pytest.mark.parametrize(("first", "second"), PAIRS)
async def test_a_key_below_or_above_another_one_is_refused(
    first: str, second: str, store: Store, uow_class: type[FullUOW]
) -> None:
    await put(uow_class, first)
    with pytest.raises(KeyException, match="exclude each other"):
        await put(uow_class, second, "other")
    await holds(store, uow_class, first)


@pytest.mark.parametrize(("first", "second"), PAIRS[:4])
async def test_what_one_call_or_one_unit_of_work_writes_must_fit_together(
    first: str, second: str, store: Store, uow_class: type[FullUOW]
) -> None:
    async with uow_class() as uow:
        with pytest.raises(KeyException, match="exclude each other"):
            await uow.files.put(text("1", first), text("2", second))
        await uow.files.put(text(first, first))
        with pytest.raises(KeyException, match="exclude each other"):
            await uow.files.put(text("2", second))
        with pytest.raises(KeyException, match="exclude each other"):
            await uow.files.copy(first, second)
    await holds(store, uow_class, first)


@pytest.mark.parametrize(("first", "second"), PAIRS[:4])
async def test_the_second_of_two_units_of_work_is_refused_before_its_commit(
    first: str, second: str, store: Store, uow_class: type[FullUOW]
) -> None:
    with pytest.raises(KeyException, match="exclude each other"):
        async with uow_class() as late:
            refused: KeyException | None = None
            async with uow_class() as early:
                await early.files.put(text(first, first))
                try:
                    await late.files.put(text("2", second), text("2", "other"))
                except KeyException as error:
                    refused = error  # a local file is in its place before the commit
            if refused is not None:
                raise refused
    await holds(store, uow_class, first)


@pytest.mark.parametrize(("first", "second"), PAIRS[:4])
async def test_what_the_catalog_does_not_know_is_seen_in_the_store(
    first: str, second: str, store: Store, uow_class: type[FullUOW]
) -> None:
    async with store.connector() as connector:
        await connector.put(PutRequest(store.namespace, first, PLAIN), b"foreign")
    with pytest.raises(KeyException, match="exclude each other"):
        await put(uow_class, second, "other")
    assert await store.objects() == {first: b"foreign"}


async def test_a_key_is_free_when_the_other_one_was_deleted(
    store: Store, uow_class: type[FullUOW]
) -> None:
    for first, second in PAIRS[:4]:
        await put(uow_class, first)
        async with uow_class() as uow:
            await uow.files.delete(first)
        await put(uow_class, second)
        assert await store.objects() == {second: second.encode()}
        async with uow_class() as uow:
            await uow.files.delete(second)


async def test_a_segment_that_is_too_long_is_refused(
    store: Store, uow_class: type[FullUOW]
) -> None:
    longest = "n" * 240
    await put(uow_class, longest)
    for key in ("n" * 256, "a/" + "\u00e9" * 128, "n" * 256 + "/a"):
        with pytest.raises(KeyException, match="segment"):
            await put(uow_class, key, "other")
    await holds(store, uow_class, longest)


@pytest.mark.parametrize("kind", ["memory", "strict", "obstore-strict", "obstore-memory"])
async def test_other_stores_have_both(kind: str, request: pytest.FixtureRequest) -> None:
    store = await make_store(kind, request)
    uow_class = store.uow()
    for first, second in (PAIRS[0], PAIRS[3]):
        await put(uow_class, first)
        await put(uow_class, second)
    assert set(await store.objects()) == {"a", "a/b", "a/b/c"}
