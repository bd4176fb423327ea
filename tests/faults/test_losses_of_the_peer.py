"""The cases in which fennflow 0.8.1 was measured to lose data, by the names they have there."""

from __future__ import annotations

import asyncio

import pytest

from fennflow import plugins
from fennflow.backends import InMemoryBackendConfig
from fennflow.files import TextContent
from fennflow.testing import faults
from stores import FullUOW, Store, make_store, numbers

BEFORE = {"a": b"old"}


def text(value: str, name: str) -> TextContent:
    return TextContent.from_content(value, filename=name)


async def seeded(store: Store) -> type[FullUOW]:
    uow_class = store.uow(lock_timeout=0.0)
    async with uow_class() as uow:
        await uow.files.put(text("old", "a"))
    return uow_class


async def holds(store: Store, uow_class: type[FullUOW], expected: dict[str, bytes]) -> bool:
    """Whether bucket and catalog contain exactly this, and no key is locked."""
    async with uow_class(auto_commit=False) as uow:
        seen = {str(file.path): file.data for file in await uow.files.get_prefix()}
        await uow.files.put(text("last", "a"), text("last", "b"))
    return await store.objects() == seen == expected


async def test_delete_then_put_then_failure(store: Store) -> None:
    uow_class = await seeded(store)
    with pytest.raises(ZeroDivisionError):
        async with uow_class() as uow:
            await uow.files.delete("a")
            await uow.files.put(text("new", "a"))
            raise ZeroDivisionError
    assert await holds(store, uow_class, BEFORE)


async def test_put_then_delete_then_failure(store: Store) -> None:
    uow_class = await seeded(store)
    with pytest.raises(ZeroDivisionError):
        async with uow_class() as uow:
            await uow.files.put(text("new", "a"), text("new", "b"))
            await uow.files.delete("a", "b")
            raise ZeroDivisionError
    assert await holds(store, uow_class, BEFORE)


def on_faulty_backend(store: Store, script: faults.Script) -> Store:
    backend = faults.FaultyBackendConfig(
        inner=InMemoryBackendConfig(name=f"l{next(numbers)}"), faults=faults.Scripted(script)
    )
    return Store(store.config, store.namespace, store.server, {"backend": backend})


@pytest.mark.parametrize("kind", ["memory", "memory-weak", "moto", "moto-versioned", "juicefs"])
async def test_commit_failing_in_the_backend(kind: str, request: pytest.FixtureRequest) -> None:
    with plugins.override(faults):
        failing = False

        async def script(phase: str, operation: str, _key: str) -> None:
            if failing and (phase, operation) == ("before", "commit"):
                message = "the database is gone"
                raise OSError(message)

        store = on_faulty_backend(await make_store(kind, request), script)
        uow_class = await seeded(store)
        failing = True
        with pytest.raises(OSError, match="the database is gone"):
            async with uow_class() as uow:
                await uow.files.put(text("new", "a"), text("new", "b"))
        failing = False
        assert await holds(store, uow_class, BEFORE)


@pytest.mark.parametrize("phase", ["before", "after"])
@pytest.mark.parametrize("kind", ["memory", "memory-weak", "moto", "moto-versioned", "juicefs"])
async def test_cancellation_during_the_commit(
    kind: str, phase: str, request: pytest.FixtureRequest
) -> None:
    with plugins.override(faults):
        tasks: list[asyncio.Task[None]] = []

        async def script(now: str, operation: str, _key: str) -> None:
            if tasks and (now, operation) == (phase, "commit"):
                tasks.pop().cancel()
                await asyncio.sleep(0)

        store = on_faulty_backend(await make_store(kind, request), script)
        uow_class = await seeded(store)

        async def work() -> None:
            async with uow_class() as uow:
                await uow.files.put(text("new", "a"), text("new", "b"))

        task = asyncio.ensure_future(work())
        tasks.append(task)
        await asyncio.wait({task})
        # I8: a block that ends without an exception has committed, any other has not.
        expected = BEFORE if task.cancelled() else {"a": b"new", "b": b"new"}
        assert await holds(store, uow_class, expected)
