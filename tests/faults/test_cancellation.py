"""Cancellation at every await: nothing stays, or everything is committed (P21, I3, I8)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import anyio
import pytest

from controlled_loop import controlled
from fennflow import plugins
from fennflow.backends import InMemoryBackendConfig, SqlalchemyBackendConfig
from fennflow.config import BackendConfig
from fennflow.exceptions import AccessDeniedException, ConnectorUnavailableException
from fennflow.files import TextContent
from fennflow.testing import faults
from stores import FullUOW, Store, make_store, numbers

MEMORY = ["memory", "memory-weak", "memory-versioned"]


def text(value: str, name: str) -> TextContent:
    return TextContent.from_content(value, filename=name)


class Canceller:
    """Cancels a task at the n-th checkpoint, and optionally again at the next ones."""

    def __init__(self) -> None:
        self.at = -1
        self.times = 1
        self.count = 0
        self.cancel: Callable[[], object] | None = None

    async def __call__(self, _phase: str, _operation: str, _key: str) -> None:
        reached = self.count
        self.count += 1
        if self.cancel is not None and self.at <= reached < self.at + self.times:
            self.cancel()
        await asyncio.sleep(0)


def faulty_store(
    store: Store, script: faults.Script, backend: BackendConfig | None = None
) -> Store:
    return Store(
        faults.FaultyConnectorConfig(inner=store.config, faults=faults.Scripted(script)),
        store.namespace,
        settings={
            "backend": faults.FaultyBackendConfig(
                inner=backend or InMemoryBackendConfig(name=f"f{next(numbers)}"),
                faults=faults.Scripted(script),
            )
        },
    )


async def seed(uow_class: type[FullUOW], folder: str = "") -> None:
    async with uow_class() as uow:
        files = uow.files.at(folder) if folder else uow.files
        await files.put(*(text(body.decode(), key) for key, body in BEFORE.items()))


async def change(uow_class: type[FullUOW], folder: str = "") -> None:
    async with uow_class() as uow:
        files = uow.files.at(folder) if folder else uow.files
        await files.put(text("new a", "a"), text("new d", "d"), text("new e", "e"))
        await files.delete("b")
        await files.put(text("newer d", "d"), text("new b", "b"))
        await files.delete("c", "e")
        await files.create(text("new f", "f"))
        await files.copy("m", "g")
        await files.copy("f", "n")
        await files.move("m", "h")


BEFORE = {"a": b"old a", "b": b"old b", "c": b"old c", "m": b"old m", "n": b"old n"}
AFTER = {
    "a": b"new a",
    "b": b"new b",
    "d": b"newer d",
    "f": b"new f",
    "g": b"old m",
    "h": b"old m",
    "n": b"new f",
}


async def seen_by_fennflow(uow_class: type[FullUOW], folder: str = "") -> dict[str, bytes]:
    async with uow_class() as uow:
        paths = await (uow.files.at(folder) if folder else uow.files).list()
        return {file.path or "": file.data for file in await uow.files.get(*paths)}


How = Literal["task", "timeout", "scope"]


async def change_unless_cancelled(uow_class: type[FullUOW], script: Canceller, how: How) -> None:
    """Change, and let the script cancel it; a block with a limit ends with a TimeoutError."""
    if how == "task":
        task = asyncio.current_task()
        assert task is not None
        script.cancel = task.cancel
        await change(uow_class)
    elif how == "timeout":
        async with asyncio.timeout(None) as timeout:
            script.cancel = lambda: timeout.reschedule(0)
            await change(uow_class)
    else:
        with anyio.CancelScope() as scope:
            script.cancel = scope.cancel
            await change(uow_class)
        if scope.cancelled_caught:
            raise TimeoutError


def tasks() -> set[asyncio.Task[Any]]:
    """Return all tasks except the background turns of engines, which depend on the clock."""
    return {
        each
        for each in asyncio.all_tasks()
        if getattr(each.get_coro(), "__qualname__", None) != "Periodic._run"
    }


async def run_until_all_awaits_were_cancelled(
    store: Store,
    times: int,
    how: How = "task",
    *,
    backend: BackendConfig | None = None,
    stride: int = 1,
) -> list[bool]:
    """Return, for every cancelled await in turn, whether the transaction committed."""
    outcomes: list[bool] = []
    while True:
        script = Canceller()
        attempt = faulty_store(Store(store.config, f"n{next(numbers)}"), script, backend)
        uow_class = attempt.uow(lock_timeout=0.0)
        await seed(uow_class)
        script.count, script.at, script.times = 0, stride * len(outcomes), times
        others = tasks()
        task = asyncio.ensure_future(change_unless_cancelled(uow_class, script, how))
        await asyncio.wait({task})
        assert tasks() <= others
        cancelled = task.cancelled() or task.exception() is not None
        if not task.cancelled():
            assert isinstance(task.exception(), (TimeoutError, type(None)))
        reached = script.count > script.at
        at, script.at = script.at, 1 << 30
        expected = BEFORE if cancelled else AFTER
        assert await attempt.objects() == expected, f"cancelled at await {at}"
        assert await seen_by_fennflow(uow_class) == expected
        # No lock is left: the next transaction need not wait.
        async with uow_class() as uow:
            await uow.files.put(*[text("last", name) for name in "abcdefghmn"])
        if not reached:
            return outcomes
        outcomes.append(not cancelled)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("kind", MEMORY)
async def test_a_cancellation_at_any_await_leaves_all_or_nothing(
    kind: str, times: int, request: pytest.FixtureRequest
) -> None:
    with plugins.override(faults):
        store = await make_store(kind, request)
        outcomes = await run_until_all_awaits_were_cancelled(store, times)
    assert len(outcomes) > 20
    # Once the pivot has begun the transaction can only go forward; before it never does.
    assert outcomes == sorted(outcomes)
    assert {True, False} <= set(outcomes)


@pytest.mark.parametrize("how", ["timeout", "scope"])
@pytest.mark.parametrize("kind", MEMORY)
async def test_a_limit_of_time_at_any_await_leaves_all_or_nothing(
    kind: str, how: How, request: pytest.FixtureRequest
) -> None:
    with plugins.override(faults):
        store = await make_store(kind, request)
        outcomes = await run_until_all_awaits_were_cancelled(store, 1, how)
    assert len(outcomes) > 20
    assert outcomes == sorted(outcomes)
    assert {True, False} <= set(outcomes)


async def test_a_cancelled_scope_leaves_all_or_nothing_in_a_database(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    with plugins.override(faults):
        store = await make_store("memory", request)
        backend = SqlalchemyBackendConfig(url=f"sqlite:///{tmp_path}/c.db")
        outcomes = await run_until_all_awaits_were_cancelled(
            store, 1, "scope", backend=backend, stride=19
        )
    assert outcomes == sorted(outcomes)
    assert {True, False} <= set(outcomes)


@pytest.mark.parametrize("explicitly", [False, True])
async def test_a_cancellation_after_the_pivot_is_delivered_at_the_next_await(
    *, explicitly: bool
) -> None:
    """P21, I8: whatever that await is; a task that only waits from then on must not hang."""
    with plugins.override(faults):
        script = Canceller()
        store = faulty_store(await make_store("memory", None), script)  # type: ignore[arg-type]
        uow_class = store.uow()
        await seed(uow_class)
        reached: list[str] = []

        async def work() -> None:
            async with uow_class() as uow:
                await uow.files.put(text("new a", "a"))
                script.count, script.at = 0, 1  # after the pivot
                if explicitly:
                    await uow.commit()
                    reached.append("committed")
                    await asyncio.Event().wait()
            reached.append("committed")
            await asyncio.Event().wait()

        task = asyncio.ensure_future(work())
        script.cancel = task.cancel
        await asyncio.wait({task})
        assert task.cancelled()
        assert reached == ["committed"]
        assert (await store.objects())["a"] == b"new a"


@controlled
async def test_a_timeout_that_the_commit_outran_is_not_raised_later() -> None:
    with plugins.override(faults):
        finished = asyncio.Event()

        async def script(phase: str, operation: str, _key: str) -> None:
            if (phase, operation) == ("before", "copy") and not finished.is_set():
                await finished.wait()

        store = faulty_store(await make_store("memory", None), script)  # type: ignore[arg-type]
        uow_class = store.uow()
        await seed(uow_class)
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(0.05):
            async with uow_class() as uow:
                await uow.files.put(text("new a", "a"))
                loop.call_later(0.1, finished.set)
        await asyncio.sleep(0.05)
        with pytest.raises(TimeoutError):
            # An await behind the commit, but inside the block with the limit, is cut off by it.
            async with asyncio.timeout(0.05):
                finished.clear()
                async with uow_class() as uow:
                    await uow.files.put(text("new a", "a"))
                    loop.call_later(0.1, finished.set)
                await asyncio.sleep(10)
        assert (await seen_by_fennflow(uow_class))["a"] == b"new a"


@controlled
async def test_what_compensation_cannot_finish_in_time_is_reported_and_left_to_recovery() -> None:
    with plugins.override(faults):

        async def script(phase: str, operation: str, _key: str) -> None:
            if (phase, operation) == ("before", "delete"):
                await asyncio.Event().wait()

        store = faulty_store(await make_store("memory", None), script)  # type: ignore[arg-type]
        uow_class = store.uow(compensation_timeout=0.05)

        notes: list[str] = []

        async def work() -> None:
            try:
                async with uow_class() as uow:
                    await uow.files.put(text("new", "a"))
                    await asyncio.Event().wait()
            except asyncio.CancelledError as error:
                notes.extend(error.__notes__)
                raise

        task = asyncio.ensure_future(work())
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert any("will be removed later" in note for note in notes)
        async with uow_class() as uow:
            assert await uow.files.list() == []


@pytest.mark.parametrize(
    "kind",
    [
        "moto",
        "moto-versioned",
        "juicefs",
        pytest.param("seaweedfs", marks=pytest.mark.once),
        pytest.param("seaweedfs-versioned", marks=pytest.mark.thorough),
    ],
)
async def test_a_cancellation_at_any_time_over_real_sockets_leaves_all_or_nothing(
    kind: str, request: pytest.FixtureRequest
) -> None:
    """P21: the requests that are under way when it arrives are real ones."""
    loop = asyncio.get_running_loop()
    store = await make_store(kind, request)
    uow_class = store.uow(lock_timeout=0.0)
    delay, committed = 0.0, False
    while not committed:
        folder = f"{delay:.2f}"
        await seed(uow_class, folder)
        others = tasks()
        task = asyncio.ensure_future(change(uow_class, folder))
        loop.call_later(delay, task.cancel)
        await asyncio.wait({task})
        assert tasks() <= others
        committed = not task.cancelled()
        found = AFTER if committed else BEFORE
        expected = {f"{folder}/{key}": body for key, body in found.items()}
        assert await store.objects(f"{folder}/") == expected, f"cancelled after {delay:.2f} s"
        assert await store.objects(".fennflow/") == {}
        assert await seen_by_fennflow(uow_class, folder) == expected
        # Not more often where all takes longer, on a busy machine.
        delay += max(0.02, delay / 8)


@pytest.mark.parametrize(
    "error", [ConnectorUnavailableException, AccessDeniedException, ValueError]
)
async def test_a_put_that_fails_while_it_is_cancelled_does_not_swallow_the_cancellation(
    error: type[Exception],
) -> None:
    with plugins.override(faults):
        tasks: list[asyncio.Task[None]] = []

        async def script(phase: str, operation: str, _key: str) -> None:
            if (phase, operation) == ("before", "put") and tasks:
                tasks.pop().cancel()
                await asyncio.sleep(0)
                message = "the store fails too"
                raise error(message)

        store = faulty_store(await make_store("memory", None), script)  # type: ignore[arg-type]
        uow_class = store.uow(lock_timeout=0.0)
        await seed(uow_class)

        async def work() -> None:
            async with uow_class() as uow:
                await uow.files.put(text("new", "a"))

        task = asyncio.ensure_future(work())
        tasks.append(task)
        await asyncio.wait({task})
        assert task.cancelled()
        assert await store.objects() == BEFORE


async def test_a_put_that_was_never_sent_is_not_ambiguous() -> None:
    """P19: a request that waits for its turn when the cancellation arrives needs no check of the store."""
    with plugins.override(faults):
        seen: list[str] = []
        sending = asyncio.Event()

        async def script(phase: str, operation: str, key: str) -> None:
            if phase == "before":
                seen.append(f"{operation} {key}")
            if (phase, operation) == ("before", "put"):
                sending.set()
                await asyncio.sleep(0.02)

        store = faulty_store(await make_store("memory", None), script)  # type: ignore[arg-type]
        uow_class = store.uow(max_concurrency=1)

        async def work() -> None:
            async with uow_class() as uow, asyncio.TaskGroup() as group:
                for name in "abc":
                    group.create_task(uow.files.put(text("1", name)))

        task = asyncio.ensure_future(work())
        await sending.wait()
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()
        assert [each for each in seen if each.startswith(("put", "head"))] == ["put a"]
        assert await store.objects() == {}
