"""The catalog in the bucket as users see it: costs, sharing, and refused stores."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fennflow import ConfigDict, plugins
from fennflow.backends import BucketBackendConfig
from fennflow.connectors import InMemoryConnectorConfig
from fennflow.engine.runtime import engine_for
from fennflow.exceptions import (
    CatalogDivergedException,
    ConfigException,
    RecordAlreadyExistsException,
)
from fennflow.files import TextContent
from fennflow.testing import S3Request
from fennflow.testing.backend_values import A, new_transaction, opened
from fennflow_bucket.backend import BucketBackend
from fennflow_bucket.commands import Command
from stores import FullUOW, Store, make_store, numbers

STORES = ["memory", "memory-versioned", "moto", "strict", "seaweedfs", "obstore-file"]


def text(value: str, name: str) -> TextContent:
    return TextContent.from_content(value, filename=name)


def bucket_uow(store: Store, **changes: Any) -> type[FullUOW]:
    """Return a class with a separate engine and replica."""
    # Another number makes another engine; it does nothing else here.
    changes = {"max_transaction_age": 43200.0 + next(numbers), **changes}
    backend = changes.pop("backend", BucketBackendConfig(namespace=store.namespace))
    return store.uow(backend=backend, **changes)


def counted(requests: list[S3Request]) -> dict[str, int]:
    return dict(Counter(request.operation for request in requests))


@pytest.mark.parametrize("kind", STORES)
async def test_what_one_process_commits_another_one_reads(
    kind: str, request: pytest.FixtureRequest
) -> None:
    store = await make_store(kind, request)
    first, second = bucket_uow(store), bucket_uow(store)
    async with first() as uow:
        await uow.files.put(text("1", "a"), text("1", "b"))
    async with second() as uow:
        assert [file.data for file in await uow.files.get("a", "b")] == [b"1", b"1"]
        await uow.files.put(text("2", "a"))
        await uow.files.delete("b")
    async with first() as uow:
        assert await uow.files.list() == ["a"]
        assert (await uow.files.get("a")).one().data == b"2"
        with pytest.raises(RecordAlreadyExistsException):
            await uow.files.create(text("3", "a"))
    with pytest.raises(ZeroDivisionError):
        async with first() as uow:
            await uow.files.put(text("4", "a"), text("4", "c"))
            raise ZeroDivisionError
    async with second() as uow:
        assert await uow.files.list() == ["a"]
    assert {key for key in await store.objects() if not key.startswith(".fennflow/")} == {"a"}


@pytest.mark.parametrize("kind", ["moto", "strict"])
async def test_creating_n_files_takes_n_and_two_requests_and_reading_them_n_and_one(
    kind: str, request: pytest.FixtureRequest
) -> None:
    store = await make_store(kind, request)
    assert store.server is not None
    uow_class = bucket_uow(store)
    async with uow_class() as uow:
        await uow.files.put(text("old", "warm"))
        await uow.files.get("warm")
    await uow_class.recover()  # what recovery does at first use is over
    with store.server.watched() as seen:
        async with uow_class() as uow:
            await uow.files.put(*(text("x", f"many/{number}") for number in range(20)))
    assert counted(seen) == {"PUT": 22}
    with store.server.watched() as seen:
        async with uow_class() as uow:
            await uow.files.get(*(f"many/{number}" for number in range(20)))
    assert counted(seen) == {"GET": 21}


async def test_transactions_that_run_at_once_share_entries(request: pytest.FixtureRequest) -> None:
    store = await make_store("strict", request)
    assert store.server is not None
    uow_class = bucket_uow(store)

    async def put(number: int) -> None:
        async with uow_class() as uow:
            await uow.files.put(text("x", f"{number}"))

    await put(0)
    await uow_class.recover()  # what recovery does at first use is over
    with store.server.watched() as seen:
        async with asyncio.TaskGroup() as group:
            for number in range(1, 41):
                group.create_task(put(number))
    assert 42 <= len(seen) < 40 + 40


async def test_an_idle_process_sends_no_requests(request: pytest.FixtureRequest) -> None:
    store = await make_store("strict", request)
    assert store.server is not None
    uow_class = bucket_uow(store, recovery_interval=0.05)
    async with uow_class.lifespan():
        async with uow_class() as uow:
            await uow.files.put(text("x", "a"))
        # Recovery looks once more after the process was used; an earlier look may still be under way.
        for _ in range(5):
            with store.server.watched() as seen:
                for _ in range(20):
                    await asyncio.sleep(0.05)
            if not seen:
                return
        pytest.fail(f"Requests of an idle process: {seen}")


async def test_recover_looks_for_what_others_left_while_the_process_was_idle() -> None:
    """P26: even if it is not due; an idle process does not know the end of the log."""
    store = InMemoryConnectorConfig(name=f"idle{next(numbers)}")
    backend = BucketBackendConfig(namespace="bucket")

    class UOW(FullUOW):
        config = ConfigDict(connector=store, backend=backend, recovery_interval=3600.0)

    async with (
        engine_for(UOW.config, plugins.registry(), lifespan=True) as engine,
        opened(backend, connector=store, lease_ttl=1.0) as other,
    ):
        assert await engine.backend.claim(1) == []
        await other.begin_writes(new_transaction(), [A], lambda _: ())
        left = 1.0
        while left > 0:
            await asyncio.sleep(left)
            left = (await other.transactions(after="", limit=1))[0].lease_left
        assert await engine.backend.claim(1) == []  # in the background
        assert (await UOW.recover()).compensated == 1


async def test_join_is_refused_with_the_alternative() -> None:
    store = Store(InMemoryConnectorConfig(name=f"b{next(numbers)}"), "bucket")
    with pytest.raises(ConfigException, match="SqlalchemyBackendConfig"):
        async with bucket_uow(store)(join=object()):
            pass


async def test_a_store_that_ignores_conditions_is_refused_and_nothing_stays(
    request: pytest.FixtureRequest,
) -> None:
    store = await make_store("juicefs", request)
    with pytest.raises(ConfigException, match="If-None-Match"):
        async with bucket_uow(store)() as uow:
            await uow.files.put(text("x", "a"))
    assert {key for key in await store.objects() if not key.endswith("/")} == set()


async def test_catalogs_of_other_names_share_a_bucket() -> None:
    store = Store(InMemoryConnectorConfig(name=f"b{next(numbers)}"), "bucket")
    one = bucket_uow(store, backend=BucketBackendConfig(namespace="bucket", name="one"))
    two = bucket_uow(store, backend=BucketBackendConfig(namespace="bucket", name="two"))
    async with one() as uow:
        await uow.files.put(text("1", "a"))
    async with two() as uow:
        assert await uow.files.list() == []
        with pytest.raises(RecordAlreadyExistsException):
            await uow.files.put(text("2", "a"))


async def test_all_processes_sign_tickets_with_one_key(tmp_path: Path) -> None:
    store = Store(InMemoryConnectorConfig(name=f"b{next(numbers)}"), "bucket")
    config = BucketBackendConfig(namespace="bucket", cache_dir=tmp_path)
    async with (
        opened(config, connector=store.config) as one,
        opened(config, connector=store.config) as two,
    ):
        keys = {await one.ticket_key(), await two.ticket_key()}
        assert len(keys) == 1
        assert len(keys.pop()) >= 32


@pytest.mark.parametrize(
    "forged", ["[", "5", "[[1, 2]]", '{"x": 1}', '{"unlisted": -1}', "[" * 9999]
)
async def test_a_note_that_fennflow_did_not_write_is_an_error_of_ours_or_made_again(
    forged: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def noted(_: object, name: str) -> str:
        del name
        return forged

    monkeypatch.setattr(BucketBackend, "recall", noted)
    monkeypatch.setattr(BucketBackend, "note", noted)
    store = Store(InMemoryConnectorConfig(name=f"b{next(numbers)}"), "bucket")
    uow_class = bucket_uow(store)
    async with uow_class() as uow:
        await uow.files.put(text("1", "a"))  # what the store enforces was probed again
    [problem] = (await uow_class.diagnose()).problems
    assert "which notes it again" in problem
    await uow_class.reconcile()
    monkeypatch.undo()
    assert (await uow_class.diagnose()).problems == ()
    async with opened(BucketBackendConfig(namespace="bucket"), connector=store.config) as backend:
        assert isinstance(backend, BucketBackend)
        await backend._replica.run(Command("keep_ticket_key", {"key": forged}))
        with pytest.raises(CatalogDivergedException, match="changed by something other"):
            await backend.ticket_key()


async def test_a_cache_directory_serves_one_process_at_a_time(tmp_path: Path) -> None:
    store = Store(InMemoryConnectorConfig(name=f"b{next(numbers)}"), "bucket")
    backend = BucketBackendConfig(namespace="bucket", cache_dir=tmp_path / "cache")
    first, second = bucket_uow(store, backend=backend), bucket_uow(store, backend=backend)
    async with first.lifespan(), second.lifespan():
        async with first() as uow:
            await uow.files.put(text("1", "a"))
        async with second() as uow:
            await uow.files.put(text("2", "b"))
        modes = {
            each.suffix: each.stat().st_mode & 0o777 for each in (tmp_path / "cache").iterdir()
        }
        assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
        assert {mode for suffix, mode in modes.items() if suffix.startswith(".db")} == {0o600}
    async with first() as uow:
        assert await uow.files.list() == ["a", "b"]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"namespace": ""},
        {"namespace": "b", "name": "../x"},
        {"namespace": "b", "max_staleness": -1},
        {"namespace": "b", "connector": {"name": "x"}},
    ],
)
def test_a_config_that_cannot_work_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigException, match="BucketBackendConfig"):
        BucketBackendConfig(**values)


def test_the_backend_is_found_by_its_config() -> None:
    config = BucketBackendConfig(namespace="b")
    assert plugins.registry().backend_for(config).name == "bucket"
    assert ConfigDict(backend=config).backend == config
