"""Steps, savepoints, callbacks and lifespans of a unit of work."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any, cast

import pytest

from fennflow import UnitOfWork, plugins
from fennflow.backends import InMemoryBackendConfig
from fennflow.exceptions import (
    CompensationPendingWarning,
    ConfigException,
    RecordLockedException,
    TransactionException,
)
from fennflow.files import StreamContent, TextContent
from fennflow.testing import faults
from fennflow_memory.connector import InMemoryConnector
from stores import FullUOW, Store, make_store


def text(value: str, name: str) -> TextContent:
    return TextContent.from_content(value, filename=name)


@pytest.fixture
async def memory(request: pytest.FixtureRequest) -> Store:
    return await make_store("memory", request)


@pytest.fixture
def memory_in_no_loop(request: pytest.FixtureRequest) -> Store:
    return asyncio.run(make_store("memory", request))


class Service:
    """An external service that steps change."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.refuses = 0

    async def do(self, name: str) -> str:
        self.log.append(f"do {name}")
        return name

    async def undo(self, name: str) -> None:
        if self.refuses:
            self.refuses -= 1
            message = f"{name} cannot be undone now"
            raise OSError(message)
        self.log.append(f"undo {name}")


def test_a_block_without_async_is_explained() -> None:
    with pytest.raises(ConfigException, match=r"with UnitOfWork\.sync\(\) as uow"):
        with UnitOfWork():  # type: ignore[attr-defined]
            pass


async def test_steps_are_undone_in_reverse_order_and_files_too(store: Store) -> None:
    service = Service()
    with pytest.raises(ZeroDivisionError):
        async with store.uow()() as uow:
            assert await uow.step(lambda: service.do("1"), lambda: service.undo("1")) == "1"
            await uow.files.put(text("new", "a"))
            await uow.step(lambda: service.do("2"), lambda: service.undo("2"))
            raise ZeroDivisionError
    assert service.log == ["do 1", "do 2", "undo 2", "undo 1"]
    assert await store.objects() == {}


async def test_a_step_that_is_a_plain_function_is_undone_too(memory: Store) -> None:
    sent: list[str] = []
    send = partial(sent.append, "invoice")
    recall = partial(sent.remove, "invoice")
    with pytest.raises(ZeroDivisionError):
        async with memory.uow()() as uow:
            await uow.step(send, recall)
            assert sent == ["invoice"]
            raise ZeroDivisionError
    assert sent == []


async def test_the_result_of_calling_a_step_is_not_accepted_as_the_step(memory: Store) -> None:
    async def send() -> None:
        raise AssertionError

    called: Any = send()
    async with memory.uow()() as uow:
        with pytest.raises(ConfigException, match="not the result of a call"):
            await uow.step(called, send)
    called.close()


async def test_steps_of_a_commit_are_not_undone(memory: Store) -> None:
    service = Service()
    async with memory.uow()() as uow:
        await uow.step(lambda: service.do("1"), lambda: service.undo("1"))
        await uow.commit()
        await uow.step(lambda: service.do("2"), lambda: service.undo("2"))
        await uow.rollback()
    assert service.log == ["do 1", "do 2", "undo 2"]


async def test_an_undo_that_fails_is_tried_again_and_then_reported(memory: Store) -> None:
    service = Service()
    service.refuses = 2
    with pytest.raises(ZeroDivisionError) as caught:
        async with memory.uow()() as uow:
            await uow.step(lambda: service.do("1"), lambda: service.undo("1"))
            raise ZeroDivisionError
    assert service.log == ["do 1", "undo 1"]
    assert not hasattr(caught.value, "__notes__")
    service.refuses = 3
    with pytest.raises(ZeroDivisionError) as caught:
        async with memory.uow()() as uow:
            await uow.step(lambda: service.do("2"), lambda: service.undo("2"))
            await uow.step(lambda: service.do("3"), lambda: service.undo("3"))
            raise ZeroDivisionError
    assert service.log[-1] == "undo 2"
    [note] = caught.value.__notes__
    assert "3 cannot be undone now" in note
    service.refuses = 3
    async with memory.uow()() as uow:
        await uow.step(lambda: service.do("4"), lambda: service.undo("4"))
        with pytest.warns(CompensationPendingWarning, match="4 cannot be undone now"):
            await uow.rollback()


async def test_a_step_that_fails_is_not_undone_and_one_cut_off_is(memory: Store) -> None:
    service = Service()

    async def fail() -> None:
        raise ZeroDivisionError

    async def hang() -> None:
        limit.reschedule(0.0)
        await asyncio.Event().wait()

    with pytest.raises(ZeroDivisionError):
        async with memory.uow()() as uow:
            await uow.step(fail, lambda: service.undo("1"))
    assert service.log == []
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(None) as limit, memory.uow()() as uow:
            await uow.step(hang, lambda: service.undo("2"))
    assert service.log == ["undo 2"]


async def test_a_savepoint_undoes_its_block_and_nothing_else(store: Store) -> None:
    service = Service()
    uow_class = store.uow()
    async with uow_class() as uow:
        await uow.files.put(text("old", "a"), text("old", "b"), text("old", "c"))
    async with uow_class() as uow:
        await uow.files.put(text("outer", "a"), text("outer", "d"))
        await uow.files.delete("c")
        with pytest.raises(ZeroDivisionError):
            async with uow.savepoint():
                await uow.files.put(text("inner", "a"), text("inner", "c"), text("inner", "e"))
                await uow.files.delete("b", "d")
                await uow.step(lambda: service.do("1"), lambda: service.undo("1"))
                async with uow.savepoint():
                    await uow.files.put(text("innermost", "f"))
                assert await uow.files.list() == ["a", "c", "e", "f"]
                raise ZeroDivisionError
        assert service.log == ["do 1", "undo 1"]
        assert await uow.files.list() == ["a", "b", "d"]
        assert (await uow.files.get("a")).one().content == "outer"
    assert await store.objects() == {"a": b"outer", "b": b"old", "d": b"outer"}


async def test_a_savepoint_in_a_savepoint_may_fail_alone(store: Store) -> None:
    async with store.uow()() as uow, uow.savepoint():
        await uow.files.put(text("1", "a"))
        with pytest.raises(ZeroDivisionError):
            async with uow.savepoint():
                await uow.files.put(text("2", "a"), text("2", "b"))
                raise ZeroDivisionError
        await uow.files.put(text("3", "c"))
    assert await store.objects() == {"a": b"1", "c": b"3"}


async def test_a_savepoint_undoes_the_work_of_its_tasks_and_nothing_else(
    memory: Store,
) -> None:
    service = Service()
    log: list[str] = []
    inside, parallel = asyncio.Event(), asyncio.Event()

    async def fail(uow: FullUOW) -> None:
        with pytest.raises(ZeroDivisionError):
            async with uow.savepoint():
                await uow.files.put(text("inside", "a"), text("inside", "b"))
                async with asyncio.TaskGroup() as group:
                    group.create_task(uow.files.put(text("of its task", "c")))
                inside.set()
                await parallel.wait()
                uow.on_commit(lambda: log.append("inside"))
                await uow.step(lambda: service.do("1"), lambda: service.undo("1"))
                raise ZeroDivisionError

    async def go_on(uow: FullUOW) -> None:
        await inside.wait()
        await uow.files.put(text("parallel", "b"), text("parallel", "d"))
        uow.on_commit(lambda: log.append("parallel"))
        await uow.step(lambda: service.do("2"), lambda: service.undo("2"))
        parallel.set()

    async with memory.uow()() as uow, asyncio.TaskGroup() as group:
        group.create_task(fail(uow))
        group.create_task(go_on(uow))
    assert await memory.objects() == {"b": b"parallel", "d": b"parallel"}
    assert log == ["parallel"]
    assert service.log == ["do 2", "do 1", "undo 1"]


async def test_what_a_savepoint_left_running_ends_with_it(memory: Store) -> None:
    """A running step is undone, and its tasks can do nothing later."""
    service = Service()
    stepping, left = asyncio.Event(), asyncio.Event()

    async def do() -> None:
        await service.do("1")
        stepping.set()
        await asyncio.Event().wait()

    async def step(uow: FullUOW) -> None:
        with pytest.raises(TransactionException, match="rolled back"):
            await uow.step(do, lambda: service.undo("1"))
        await left.wait()
        with pytest.raises(TransactionException, match="has been undone"):
            await uow.files.put(text("too late", "a"))

    async with memory.uow()() as uow:
        with pytest.raises(ZeroDivisionError):
            async with uow.savepoint():
                task = asyncio.create_task(step(uow))
                await stepping.wait()
                raise ZeroDivisionError
        assert service.log == ["do 1", "undo 1"]
        left.set()
        await task
    assert await memory.objects() == {}


async def test_a_call_of_several_steps_undoes_nothing_of_parallel_calls(
    memory: Store,
) -> None:
    service = Service()
    uow_class = memory.uow(lock_timeout=0.1)
    log: list[str] = []
    async with uow_class() as uow:
        await uow.files.put(text("old", "old/a"), text("old", "old/b"))
    async with uow_class() as other, uow_class() as uow:
        await other.files.put(text("busy", "old/b"))
        deleting = asyncio.create_task(uow.files.delete_prefix("old/"))
        await uow.files.put(text("new", "a"))
        uow.on_commit(lambda: log.append("called"))
        await uow.step(lambda: service.do("1"), lambda: service.undo("1"))
        with pytest.raises(RecordLockedException):
            await deleting
    assert await memory.objects() == {"a": b"new", "old/a": b"old", "old/b": b"busy"}
    assert (log, service.log) == (["called"], ["do 1"])


async def test_a_prefix_is_deleted_whole_though_the_block_ends_meanwhile(memory: Store) -> None:
    uow_class = memory.uow()
    async with uow_class() as uow:
        await uow.files.put(*[text("1", f"p/{number:04}") for number in range(1100)])
    async with uow_class() as uow:
        deleting = asyncio.create_task(uow.files.delete_prefix("p/"))
        await asyncio.sleep(0)
    assert len(await deleting) == 1100
    assert await memory.objects() == {}


async def test_the_end_of_a_block_that_fails_breaks_off_the_calls_of_other_tasks(
    memory: Store,
) -> None:
    """Even if they would wait forever; their completed work counts as done."""
    service = Service()
    reading, stepping = asyncio.Event(), asyncio.Event()

    async def chunks() -> AsyncGenerator[bytes]:
        yield b"begun"
        reading.set()
        await asyncio.Event().wait()

    async def do() -> None:
        await service.do("1")
        stepping.set()
        await asyncio.Event().wait()

    tasks: list[asyncio.Task[object]] = []
    with pytest.raises(ZeroDivisionError):
        async with asyncio.timeout(60), memory.uow()() as uow:
            stream = StreamContent.from_iterable(chunks(), filename="a.bin")
            tasks.append(asyncio.create_task(uow.files.put(stream)))
            tasks.append(asyncio.create_task(uow.step(do, lambda: service.undo("1"))))
            await reading.wait()
            await stepping.wait()
            raise ZeroDivisionError
    for task in tasks:
        with pytest.raises(TransactionException, match="rolled back"):
            await task
    assert service.log == ["do 1", "undo 1"]
    assert await memory.objects() == {}
    async with memory.uow(lock_timeout=0.0)() as uow:
        await uow.files.put(text("free", "a"))


async def test_a_block_does_not_commit_half_of_a_savepoint_of_another_task(memory: Store) -> None:
    """It is undone instead, and no lock is left."""
    inside, leave = asyncio.Event(), asyncio.Event()
    uow_class = memory.uow(lock_timeout=0.0)

    async def fill(uow: FullUOW) -> None:
        async with uow.savepoint():
            await uow.files.put(text("1", "a"))
            inside.set()
            await leave.wait()
            await uow.files.put(text("1", "b"))

    with pytest.raises(TransactionException, match="savepoint is open"):
        async with uow_class() as uow:
            task = asyncio.create_task(fill(uow))
            await inside.wait()
    leave.set()
    with pytest.raises(TransactionException, match="has ended"):
        await task
    assert await memory.objects() == {}
    async with uow_class() as uow:
        await uow.files.put(text("free", "a"))


async def test_a_block_ends_after_the_commit_of_another_task(memory: Store) -> None:
    with plugins.override(faults):
        committing, go_on = asyncio.Event(), asyncio.Event()

        async def script(phase: str, operation: str, _key: str) -> None:
            if (phase, operation) == ("before", "commit"):
                committing.set()
                await go_on.wait()

        faulty = faults.FaultyBackendConfig(
            inner=InMemoryBackendConfig(name="slow"), faults=faults.Scripted(script)
        )
        async with memory.uow(backend=faulty)() as uow:
            await uow.files.put(text("1", "a"))
            task = asyncio.create_task(uow.commit())
            await committing.wait()
            with pytest.raises(TransactionException, match="being committed"):
                await uow.files.put(text("1", "b"))
            asyncio.get_running_loop().call_soon(go_on.set)
        await task
    assert await memory.objects() == {"a": b"1"}


async def test_nothing_is_committed_or_undone_after_the_end_of_the_block(memory: Store) -> None:
    """Code that commits too late gets an error that nothing was committed."""
    uow_class = memory.uow()
    async with uow_class(auto_commit=False) as uow:
        await uow.files.put(text("1", "a"))
    for late in (uow.commit, uow.rollback, lambda: uow.__aexit__(None, None, None)):
        with pytest.raises(TransactionException, match="has ended"):
            await late()
    assert await memory.objects() == {}


@pytest.mark.parametrize("value", [None, 5, "send"])
async def test_what_cannot_be_called_back_is_refused_at_once(memory: Store, value: Any) -> None:
    """It would be lost after the commit, like the coroutine of a function that was called too early."""
    done: list[str] = []

    async def do() -> None:
        done.append("step")

    async with memory.uow()() as uow:
        for refused in (uow.on_commit, uow.on_rollback):
            with pytest.raises(ConfigException, match="not a function"):
                refused(value)
        with pytest.raises(ConfigException, match="not a function"):
            await uow.step(do, value)
    assert not done
    with pytest.raises(ConfigException, match="timeout"):
        memory.uow()(timeout=cast("Any", "5"))


async def test_there_is_no_commit_inside_a_step(memory: Store) -> None:
    """It would wait for the step, which waits for it."""
    async with memory.uow()() as uow:
        with pytest.raises(TransactionException, match="step"):
            await uow.step(uow.commit, uow.rollback)


@pytest.mark.parametrize("end", ["commit", "rollback"])
async def test_there_is_no_commit_in_a_task_that_a_call_waits_for(memory: Store, end: str) -> None:
    """Each would wait for the other forever: in a step, and in the source of a stream."""
    async with memory.uow()() as uow, asyncio.timeout(60):

        async def chunks() -> AsyncGenerator[bytes]:
            yield b"1"
            await getattr(uow, end)()

        async def in_a_task() -> None:
            await asyncio.create_task(getattr(uow, end)())

        with pytest.raises(TransactionException, match="started there"):
            await uow.step(in_a_task, in_a_task)
        stream = StreamContent.from_iterable(chunks(), filename="a.txt")
        with pytest.raises(TransactionException, match="started there"):
            await uow.files.put(stream, text("1", "b.txt"))
        await uow.files.put(text("1", "c.txt"))
    assert await memory.objects() == {"c.txt": b"1"}


def test_a_unit_of_work_belongs_to_the_loop_that_opened_it(memory_in_no_loop: Store) -> None:
    uow = memory_in_no_loop.uow()()
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(uow.__aenter__())

        async def use() -> None:
            for call in (uow.files.list(), uow.commit(), uow.__aexit__(None, None, None)):
                with pytest.raises(TransactionException, match="another event loop"):
                    await call

        asyncio.run(use())
        with pytest.raises(TransactionException, match="another event loop"):
            uow.on_commit(print)
        loop.run_until_complete(uow.__aexit__(None, None, None))
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


async def test_there_is_no_commit_inside_a_savepoint(memory: Store) -> None:
    async with memory.uow()() as uow, uow.savepoint():
        for end in (uow.commit, uow.rollback):
            with pytest.raises(TransactionException, match="savepoint"):
                await end()


async def test_callbacks_follow_the_outcome(
    memory: Store, caplog: pytest.LogCaptureFixture
) -> None:
    log: list[str] = []

    async def later() -> None:
        log.append("async")

    def fail() -> None:
        raise ZeroDivisionError

    async with memory.uow()() as uow:
        await uow.files.put(text("1", "a"))
        uow.on_commit(lambda: log.append(f"{len(memory.config.model_dump())} plain"))
        uow.on_commit(fail)
        uow.on_commit(later)
        uow.on_rollback(lambda: log.append("never"))
        with pytest.raises(ZeroDivisionError):
            async with uow.savepoint():
                uow.on_commit(lambda: log.append("taken back"))
                raise ZeroDivisionError
        assert log == []
    assert log == ["2 plain", "async"]
    [record] = [each for each in caplog.records if each.levelno == logging.ERROR]
    assert "A callback failed" in record.message
    with pytest.raises(ZeroDivisionError):
        async with memory.uow()() as uow:
            uow.on_commit(lambda: log.append("never"))
            uow.on_rollback(lambda: log.append("rolled back"))
            raise ZeroDivisionError
    assert log[2:] == ["rolled back"]


async def test_a_lifespan_opens_and_closes_the_engine(moto_store: Store) -> None:
    uow_class = moto_store.uow()
    async with uow_class.lifespan():
        async with uow_class.lifespan(), uow_class() as uow:
            await uow.files.put(text("1", "a"))
        async with uow_class() as uow:
            assert await uow.files.list() == ["a"]
    # Closed, it opens again at the next use.
    async with uow_class() as uow:
        assert (await uow.files.get("a")).one().content == "1"


class Closing:
    """Counts the connectors that are open, and holds up their closing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = 0
        self.begun, self.go_on = asyncio.Event(), asyncio.Event()
        opens, closes = InMemoryConnector.open, InMemoryConnector.aclose

        async def open_(connector: InMemoryConnector) -> None:
            await opens(connector)
            self.open += 1

        async def aclose(connector: InMemoryConnector) -> None:
            self.begun.set()
            await self.go_on.wait()
            await closes(connector)
            self.open -= 1

        monkeypatch.setattr(InMemoryConnector, "open", open_)
        monkeypatch.setattr(InMemoryConnector, "aclose", aclose)


async def test_a_caller_that_arrives_while_an_engine_closes_gets_a_new_one(
    memory: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    closing = Closing(monkeypatch)
    uow_class = memory.uow()
    engines: list[object] = []

    async def hold() -> None:
        async with uow_class.lifespan():
            pass

    async def put(name: str) -> None:
        async with uow_class() as uow:
            engines.append(uow.files._session._engine)
            await uow.files.put(text("1", name))

    await put("a")
    async with asyncio.TaskGroup() as group:
        group.create_task(hold())
        await closing.begun.wait()
        group.create_task(put("b"))
        group.create_task(put("c"))
        await asyncio.sleep(0)
        assert len(engines) == 1
        closing.go_on.set()
    assert engines[1] is engines[2] is not engines[0]
    assert set(await memory.objects()) == {"a", "b", "c"}


async def test_a_unit_of_work_that_outlives_the_last_lifespan_closes_the_engine(
    memory: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    closing = Closing(monkeypatch)
    closing.go_on.set()
    uow_class = memory.uow()
    async with uow_class.lifespan():
        entered = uow_class()
        uow = await entered.__aenter__()
        await uow.files.put(text("1", "a"))
    assert closing.open == 1
    async with uow_class.lifespan():
        pass
    await uow.files.put(text("1", "b"))
    await entered.__aexit__(None, None, None)
    assert closing.open == 0
    assert set(await memory.objects()) == {"a", "b"}


async def test_closing_is_not_cut_off_by_the_cancellation_of_who_leaves(
    memory: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    closing = Closing(monkeypatch)

    async def hold() -> None:
        async with memory.uow().lifespan():
            pass

    task = asyncio.create_task(hold())
    await closing.begun.wait()
    task.cancel()
    await asyncio.sleep(0)
    closing.go_on.set()
    await asyncio.wait({task})
    assert task.cancelled()
    assert closing.open == 0


def test_loops_one_after_another_and_in_threads_share_the_catalog_alone(
    request: pytest.FixtureRequest,
) -> None:
    store = asyncio.run(make_store("moto", request))
    uow_class = store.uow()

    async def put(name: str) -> None:
        async with uow_class() as uow:
            await uow.files.put(*[text("1", f"{name}{number}") for number in range(5)])

    asyncio.run(put("a"))
    asyncio.run(put("b"))
    threads = [threading.Thread(target=asyncio.run, args=(put(name),)) for name in "cd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    async def count() -> int:
        async with uow_class() as uow:
            return len(await uow.files.list())

    assert asyncio.run(count()) == 20
    # A loop that was closed in order has left nothing open: a warning would be an error here.
    gc.collect()
