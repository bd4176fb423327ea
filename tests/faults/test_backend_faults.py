"""The backend fails at the worst moments: at the pivot, at its answer, and after it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest

import fennflow_memory.backend
from fennflow import ConfigDict, plugins
from fennflow.backends import (
    InMemoryBackendConfig,
    LateWrite,
    ObjectKey,
    Settlement,
    TransactionToken,
    WriteId,
)
from fennflow.connectors import InMemoryConnectorConfig
from fennflow.engine.commit import Ending
from fennflow.engine.concurrency import Calls
from fennflow.engine.garbage import check_late_writes
from fennflow.engine.runtime import engine_for
from fennflow.exceptions import (
    CommitUncertainException,
    ConflictException,
    RecordLockedException,
)
from fennflow.files import TextContent
from fennflow.testing import faults
from fennflow.testing.backend_values import opened
from fennflow_memory.backend import InMemoryBackend
from stores import FullUOW, Store, make_store, numbers


def text(value: str, name: str) -> TextContent:
    return TextContent.from_content(value, filename=name)


class DatabaseGoneError(Exception):
    """An exception of a driver."""


class Script:
    """Raises at the operations that a test names."""

    def __init__(self) -> None:
        self.fails: Callable[[str, str], bool] = lambda _phase, _operation: False

    async def __call__(self, phase: str, operation: str, _key: str) -> None:
        if self.fails(phase, operation):
            raise DatabaseGoneError(operation)


BEFORE = {"a": b"old a", "b": b"old b"}


@pytest.fixture(params=["memory", "memory-weak", "memory-versioned", "moto", "juicefs"])
async def store(request: pytest.FixtureRequest) -> Store:
    return await make_store(request.param, request)


@pytest.fixture
def script() -> Script:
    return Script()


async def seeded(store: Store, script: Script, **settings: object) -> type[FullUOW]:
    backend = faults.FaultyBackendConfig(
        inner=InMemoryBackendConfig(name=f"f{next(numbers)}"), faults=faults.Scripted(script)
    )
    uow_class = store.uow(**{"backend": backend, "lock_timeout": 0.0, **settings})
    async with uow_class() as uow:
        await uow.files.put(text("old a", "a"), text("old b", "b"))
    return uow_class


async def change(uow_class: type[FullUOW]) -> None:
    async with uow_class() as uow:
        await uow.files.put(text("new a", "a"), text("new c", "c"))
        await uow.files.delete("b")


async def test_a_pivot_that_fails_is_raised_and_undone(store: Store, script: Script) -> None:
    with plugins.override(faults):
        uow_class = await seeded(store, script)
        script.fails = lambda phase, operation: (phase, operation) == ("before", "commit")
        with pytest.raises(DatabaseGoneError):
            await change(uow_class)
        script.fails = lambda _phase, _operation: False
        assert await store.objects() == BEFORE
        await change(uow_class)
        assert await store.objects() == {"a": b"new a", "c": b"new c"}


async def test_a_pivot_whose_answer_is_lost_is_a_commit(store: Store, script: Script) -> None:
    with plugins.override(faults):
        uow_class = await seeded(store, script)
        script.fails = lambda phase, operation: (phase, operation) == ("after", "commit")
        await change(uow_class)
        assert await store.objects() == {"a": b"new a", "c": b"new c"}


async def test_an_unknown_outcome_is_reported_and_nothing_is_touched(
    store: Store, script: Script
) -> None:
    with plugins.override(faults):
        uow_class = await seeded(store, script)
        script.fails = lambda phase, operation: (
            phase == "before" and operation in {"commit", "abort"}
        )
        with pytest.raises(CommitUncertainException, match="commit outcome unknown") as caught:
            await change(uow_class)
        assert isinstance(caught.value.__cause__, DatabaseGoneError)
        script.fails = lambda _phase, _operation: False
        await uow_class.recover()
        async with uow_class() as uow:
            assert await uow.files.list() == ["a", "b"]
            assert (await uow.files.get("a")).one().data == b"old a"
        assert await store.objects() == BEFORE
        await change(uow_class)


async def test_a_cancellation_does_not_hide_an_outcome_that_cannot_be_learnt(
    store: Store, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I8: a caller that sees only the cancellation assumes that the work was undone."""
    task = asyncio.current_task()
    assert task is not None
    roll_back = Ending.roll_back

    async def roll_back_cancelled(self: Ending, cause: BaseException | None, calls: Calls) -> None:
        task.cancel()
        await asyncio.sleep(0)
        await roll_back(self, cause, calls)

    with plugins.override(faults):
        uow_class = await seeded(store, script)
        script.fails = lambda phase, operation: (
            phase == "before" and operation in {"commit", "abort"}
        )
        monkeypatch.setattr(Ending, "roll_back", roll_back_cancelled)
        with pytest.raises(CommitUncertainException):
            await change(uow_class)
        with pytest.raises(asyncio.CancelledError):
            await asyncio.sleep(1)
        task.uncancel()


@pytest.mark.parametrize("operation", ["relocate", "settle"])
async def test_a_backend_that_fails_after_the_pivot_does_not_fail_the_commit(
    store: Store, script: Script, operation: str
) -> None:
    with plugins.override(faults):
        uow_class = await seeded(store, script)
        script.fails = lambda phase, each: (phase, each) == ("before", operation)
        await change(uow_class)
        script.fails = lambda _phase, _operation: False
        await uow_class.recover()
        async with uow_class() as uow:
            assert await uow.files.list() == ["a", "c"]
            assert (await uow.files.get("a")).one().data == b"new a"
        assert await store.objects() == {"a": b"new a", "c": b"new c"}
        async with uow_class() as uow:
            await uow.files.put(text("newer a", "a"), text("newer b", "b"))


async def test_a_backend_that_fails_before_anything_is_sent_leaves_the_bucket_alone(
    store: Store, script: Script
) -> None:
    """P2: the intent is durable before the first request."""
    with plugins.override(faults):
        uow_class = await seeded(store, script)
        for phase in ("before", "after"):
            script.fails = lambda each, operation, phase=phase: (
                (each, operation)
                == (  # type: ignore[misc]
                    phase,
                    "begin_writes",
                )
            )
            with pytest.raises(DatabaseGoneError):
                await change(uow_class)
            script.fails = lambda _phase, _operation: False
            assert await store.objects() == BEFORE
        await change(uow_class)


async def test_validated_reads_fail_the_commit_if_they_changed(store: Store) -> None:
    uow_class = store.uow(validate_reads=True)
    async with uow_class() as uow:
        await uow.files.put(text("1", "read"), text("1", "listed/a"))
    for change_path in ("read", "listed/a"):
        with pytest.raises(ConflictException, match=change_path):
            async with uow_class() as uow:
                await uow.files.get("read")
                await uow.files.list("listed/")
                await uow.files.exists("nothing")
                await uow.files.put(text("depends on it", "written"))
                async with uow_class() as other:
                    await other.files.put(text("2", change_path))
        assert not [key for key in await store.objects() if "written" in key]
    with pytest.raises(ConflictException, match="nothing"):
        async with uow_class() as uow:
            assert not await uow.files.exists("nothing")
            async with uow_class() as other:
                await other.files.put(text("2", "nothing"))
    async with uow_class() as uow:
        await uow.files.get("read")
        await uow.files.put(text("3", "read"), text("3", "written"))
    assert (await store.objects())["written"] == b"3"


async def test_a_waiting_call_gets_its_lock_when_the_holder_is_finished(
    script: Script, request: pytest.FixtureRequest
) -> None:
    """P9: leftovers are retried in the background."""
    store = await make_store("memory", request)
    with plugins.override(faults):
        uow_class = await seeded(store, script, lock_timeout=60.0)
        async with uow_class() as uow:
            script.fails = lambda phase, each: (phase, each) == ("before", "settle")
            async with uow_class() as other:
                await other.files.put(text("new a", "a"))
            script.fails = lambda _phase, _operation: False
            await uow.files.put(text("newer a", "a"))
    assert (await store.objects())["a"] == b"newer a"


async def test_a_refused_call_changes_nothing_of_a_parallel_one(
    request: pytest.FixtureRequest,
) -> None:
    store = await make_store("memory", request)
    waiting = asyncio.Event()

    async def script(phase: str, operation: str, _key: str) -> None:
        if (phase, operation) == ("before", "begin_writes") and not waiting.is_set():
            waiting.set()
            await asyncio.sleep(0.02)

    with plugins.override(faults):
        backend = faults.FaultyBackendConfig(
            inner=InMemoryBackendConfig(name=f"f{next(numbers)}"), faults=faults.Scripted(script)
        )
        uow_class = store.uow(backend=backend, lock_timeout=0.0)
        waiting.set()
        async with uow_class() as holder:
            await holder.files.put(text("held", "a"))
            waiting.clear()
            async with uow_class() as uow:
                refused = asyncio.ensure_future(uow.files.put(text("refused", "a")))
                await waiting.wait()
                await uow.files.put(text("free", "b"))
                with pytest.raises(RecordLockedException):
                    await refused
        assert await store.objects() == {"a": b"held", "b": b"free"}


async def test_steps_are_undone_when_the_commit_fails(store: Store, script: Script) -> None:
    undone: list[str] = []

    async def do() -> None:
        return None

    async def undo() -> None:
        undone.append("step")

    with plugins.override(faults):
        uow_class = await seeded(store, script)
        script.fails = lambda phase, operation: (phase, operation) == ("before", "commit")
        with pytest.raises(DatabaseGoneError):
            async with uow_class() as uow:
                uow.on_rollback(lambda: undone.append("callback"))
                await uow.step(do, undo)
                await uow.files.put(text("new", "c"))
        script.fails = lambda _phase, _operation: False
    assert undone == ["step", "callback"]
    uow_class = store.uow(validate_reads=True)
    with pytest.raises(ConflictException):
        async with uow_class() as uow:
            await uow.step(do, undo)
            assert not await uow.files.exists("x")
            async with uow_class() as other:
                await other.files.put(text("1", "x"))
    assert undone == ["step", "callback", "step"]


async def test_callbacks_learn_what_another_owner_has_decided_and_not_finished() -> None:
    """P25, I8: finishing may wait for a store, or for a person; the outcome stands before that."""
    store = await make_store("memory", None)  # type: ignore[arg-type]
    inner = InMemoryBackendConfig(name=f"f{next(numbers)}")

    async def decided_by_another(phase: str, operation: str, _key: str) -> None:
        if (phase, operation) == ("before", "commit"):
            async with opened(inner, connector=store.config) as rival:
                for row in cast("InMemoryBackend", rival)._tables.transactions.values():
                    row.lease_until = 0.0
                for claimed in await rival.claim(10):
                    await rival.abort(claimed.token)
            raise DatabaseGoneError(operation)

    called = asyncio.Event()
    backend = faults.FaultyBackendConfig(inner=inner, faults=faults.Scripted(decided_by_another))
    with plugins.override(faults):
        uow_class = store.uow(backend=backend)
        async with uow_class.lifespan():
            with pytest.raises(CommitUncertainException):
                async with uow_class() as uow:
                    await uow.files.put(text("new", "a"))
                    uow.on_rollback(called.set)
            await asyncio.wait_for(called.wait(), timeout=30)
            assert len(await uow_class.transactions()) == 1


async def test_late_writes_that_cannot_all_be_locked_leave_no_lease_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """P22: it would be renewed, and the paths locked, for as long as the process lives."""
    locked: list[str] = []
    armed = False

    async def third_fails(phase: str, operation: str, key: str) -> None:
        if armed and (phase, operation) == ("before", "begin_writes"):
            locked.append(key)
            if len(locked) == 3:
                raise DatabaseGoneError(operation)

    a, b = ObjectKey("files", "a"), ObjectKey("files", "b")
    late, other = TransactionToken("1"), TransactionToken("2")
    with plugins.override(faults):
        config = ConfigDict(
            connector=InMemoryConnectorConfig(name=f"f{next(numbers)}"),
            backend=faults.FaultyBackendConfig(
                inner=InMemoryBackendConfig(name=f"f{next(numbers)}"),
                faults=faults.Scripted(third_fails),
            ),
        )
        async with engine_for(config, plugins.registry(), lifespan=True) as engine:
            doubts = [
                LateWrite(namespace="files", key=key.key, write=WriteId(late.transaction_id, seq))
                for seq, key in enumerate([a, b], start=1)
            ]
            await engine.backend.begin_writes(late, [a, b], lambda _: ())
            await engine.backend.abort(late)
            await engine.backend.settle(late, Settlement(late_writes=doubts))
            later = SimpleNamespace(monotonic=lambda: time.monotonic() + 1000)
            monkeypatch.setattr(fennflow_memory.backend, "time", later)
            await engine.backend.begin_writes(other, [b], lambda _: ())
            armed = True
            with pytest.raises(DatabaseGoneError):  # a was locked alone, and then b was tried alone
                await check_late_writes(engine, [])
            assert len(set(locked)) == 1
            assert not engine.leases._held
            armed = False
            assert await check_late_writes(engine, []) == 0
