"""Finishing a transaction: once, with progress, each key by itself, and separately from callbacks."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import closing, suppress
from contextvars import ContextVar
from pathlib import Path

import pytest
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from controlled_loop import controlled
from fennflow import plugins
from fennflow.backends import InMemoryBackendConfig, SqlalchemyBackendConfig
from fennflow.config import BackendConfig
from fennflow.connectors import Capabilities, Deletion, InMemoryConnectorConfig, Location
from fennflow.engine import diagnosis, finish
from fennflow.engine.leases import Lease
from fennflow.exceptions import (
    AccessDeniedException,
    BackendUnavailableException,
    BaseConnectorException,
    ConnectorUnavailableException,
    NoSuchKeyException,
    RecordLockedException,
    TransactionLostException,
)
from fennflow.files import BinaryContent, TextContent
from fennflow.testing import Fault, S3Request, faults
from stores import VERSIONED, FullUOW, Store, make_store, numbers

BRIEF = {"compensation_timeout": 0.05, "late_write_period": 0.2}


def text(value: str, name: str) -> TextContent:
    return TextContent.from_content(value, filename=name)


async def nothing() -> None:
    """Do nothing."""


class Script:
    """Counts the operations of the connector by key, and raises the exceptions of a test."""

    def __init__(self) -> None:
        self.seen: Counter[tuple[str, str]] = Counter()
        self.fails: Callable[[str, str, str], Exception | None] = lambda *_: None

    async def __call__(self, phase: str, operation: str, key: str) -> None:
        if phase == "before":
            self.seen[operation, key] += 1
        error = self.fails(phase, operation, key)
        if error is not None:
            raise error

    def sent(self, *operations: str) -> int:
        return sum(count for (name, _), count in self.seen.items() if name in operations)


class Scene:
    """A store in memory and a database, used by two processes, of which the first has faults."""

    def __init__(self, backend: BackendConfig, capabilities: Capabilities | None = None) -> None:
        self.script = Script()
        connector = InMemoryConnectorConfig(name=f"n{next(numbers)}", capabilities=capabilities)
        self.store = Store(connector, "bucket")
        self.backend = backend
        scripted = faults.Scripted(self.script)
        self._faulty = Store(
            faults.FaultyConnectorConfig(inner=connector, faults=scripted), "bucket"
        )
        self._settings = {
            "backend": faults.FaultyBackendConfig(inner=backend, faults=scripted),
            "lock_timeout": 0.0,
        }

    async def versions(self, *keys: str) -> list[int]:
        """Return how many versions there are of each key."""
        async with self.store.connector() as connector:
            return [len(await connector.versions(self.store.namespace, key)) for key in keys]

    def first(self, **settings: object) -> type[FullUOW]:
        return self._faulty.uow(**{**self._settings, **settings})

    def second(self) -> type[FullUOW]:
        return self.store.uow(backend=self.backend, lock_timeout=30.0)


@pytest.fixture(params=["memory", "sqlite"])
def scene(request: pytest.FixtureRequest) -> Scene:
    if request.param == "memory":
        return Scene(InMemoryBackendConfig(name=f"n{next(numbers)}"))
    path = request.getfixturevalue("tmp_path")
    return Scene(SqlalchemyBackendConfig(url=f"sqlite:///{path}/catalog.db"))


@pytest.fixture
def versioned(scene: Scene) -> Scene:
    return Scene(scene.backend, VERSIONED)


@pytest.fixture
def volatile() -> Scene:
    return Scene(InMemoryBackendConfig(name=f"n{next(numbers)}"))


@pytest.fixture(autouse=True)
def _faulty_plugin() -> object:  # pyright: ignore[reportUnusedFunction]
    with plugins.override(faults):
        yield


@pytest.fixture
def refusing_all() -> Callable[[str, str, str], Exception | None]:
    """Refuse all deletions."""

    def fails(phase: str, operation: str, _key: str) -> Exception | None:
        hit = (phase, operation) == ("before", "delete")
        return AccessDeniedException("Not for you.") if hit else None

    return fails


@pytest.fixture
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send nothing again."""
    monkeypatch.setattr(finish, "ATTEMPTS", 1)


async def put(uow_class: type[FullUOW], value: str, *names: str) -> None:
    async with uow_class() as uow:
        await uow.files.put(*(text(value, name) for name in names))


async def journaled(uow_class: type[FullUOW]) -> list[str]:
    return sorted({path for each in await uow_class.transactions() for path in each.paths})


def lost(operation: str) -> Callable[[str, str, str], Exception | None]:
    """Lose the answers to an operation of the backend."""

    def fails(phase: str, name: str, _key: str) -> Exception | None:
        return BackendUnavailableException() if (phase, name) == ("after", operation) else None

    return fails


def refused(
    operation: str, *keys: str, error: type[Exception] = AccessDeniedException
) -> Callable[[str, str, str], Exception | None]:
    """Refuse an operation of the connector for some keys."""

    def fails(phase: str, name: str, key: str) -> Exception | None:
        hit = phase == "before" and name == operation and set(keys) & set(key.split())
        return error(f"{key} was refused.") if hit else None

    return fails


# --- once ----------------------------------------------------------------------------------------


async def test_a_deletion_is_not_applied_again_when_the_answer_to_its_end_was_lost(
    scene: Scene,
) -> None:
    """P6, P7: later commits of others are kept."""
    first, second = scene.first(), scene.second()
    await put(first, "same", "a")
    scene.script.fails = lost("settle")
    async with first() as uow:
        await uow.files.delete("a")
    scene.script.fails = lambda *_: None
    await put(second, "same", "a")
    assert (await first.recover()).pending == 0
    assert await scene.store.objects() == {"a": b"same"}


async def test_a_create_is_not_undone_again_when_the_answer_to_its_end_was_lost(
    scene: Scene,
) -> None:
    """P6, P7."""
    first, second = scene.first(), scene.second()
    await put(first, "warm", "w")
    scene.script.fails = lost("settle")
    with pytest.raises(ZeroDivisionError):
        async with first() as uow:
            await uow.files.put(text("same", "a"))
            raise ZeroDivisionError
    scene.script.fails = lambda *_: None
    await put(second, "same", "a")
    await first.recover()
    assert (await scene.store.objects())["a"] == b"same"


async def test_a_key_that_was_released_is_not_touched_again(scene: Scene) -> None:
    """P9: even if another key of the transaction fails, and the answer to the release was lost."""
    first, second = scene.first(), scene.second()
    await put(first, "same", "a", "bad")
    deny, lose = refused("delete", "bad"), lost("settle")
    scene.script.fails = lambda *each: deny(*each) or lose(*each)
    async with first() as uow:
        await uow.files.delete("a", "bad")
    scene.script.fails = deny
    await put(second, "same", "a")
    await first.recover()
    assert await scene.store.objects() == {"a": b"same", "bad": b"same"}
    scene.script.fails = lambda *_: None
    assert (await first.recover()).pending == 0
    assert await scene.store.objects() == {"a": b"same"}


async def test_a_lease_that_was_released_allows_nothing_more(volatile: Scene) -> None:
    """P6, P23: not even in this process."""
    uow_class = volatile.second()
    async with uow_class() as uow:
        await uow.files.put(text("1", "a"))
        tx = uow._session._tx  # type: ignore[union-attr]
    lease: Lease = tx.lease
    with pytest.raises(TransactionLostException):
        lease.check()


# --- progress ------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [AccessDeniedException, ConnectorUnavailableException])
async def test_a_copy_that_fails_blocks_its_own_key_alone(
    scene: Scene, error: type[BaseConnectorException], once: None
) -> None:
    """P9, P28: all others are released, and not copied again."""
    del once
    first, second = scene.first(), scene.second()
    names = [f"{number:02}" for number in range(20)]
    await put(first, "old", *names, "bad")
    scene.script.fails = refused("copy", "bad", error=error)
    await put(first, "new", *names, "bad")
    assert await journaled(second) == ["bucket/bad"]
    await put(second, "newer", *names)
    scene.script.seen.clear()
    for _ in range(2):
        assert (await first.recover()).pending == 1
    assert {key for name, key in scene.script.seen if name == "copy"} == {"bad"}
    scene.script.fails = lambda *_: None
    assert (await first.recover()).pending == 0
    expected = {**dict.fromkeys(names, b"newer"), "bad": b"new"}
    assert await scene.store.objects() == expected


async def test_an_undo_that_fails_blocks_its_own_key_alone(scene: Scene) -> None:
    """P9: of a transaction that was rolled back, too."""
    first, second = scene.first(), scene.second()
    await put(first, "warm", "w")
    scene.script.fails = refused("delete", "bad")
    with pytest.raises(ZeroDivisionError) as caught:
        async with first() as uow:
            await uow.files.put(text("1", "a"), text("1", "b"), text("1", "bad"))
            raise ZeroDivisionError
    [note] = caught.value.__notes__
    assert "Not finished yet: bucket/bad." in note
    assert await journaled(second) == ["bucket/bad"]
    await put(second, "2", "a", "b")
    scene.script.fails = lambda *_: None
    assert (await first.recover()).pending == 0
    assert await scene.store.objects() == {"w": b"warm", "a": b"2", "b": b"2"}


async def test_an_uncommitted_version_that_cannot_be_deleted_holds_no_path(
    versioned: Scene,
) -> None:
    """P9: under Object Lock, say, it stays for years. It is deleted then, and never adopted."""
    first, second = versioned.first(late_write_period=0.2), versioned.second()
    await put(first, "old", "a")
    versioned.script.fails = refused("delete", "a", "b", "a b", "b a")
    with pytest.raises(ZeroDivisionError):
        async with first() as uow:
            await uow.files.put(text("1", "a"), text("1", "b"))
            raise ZeroDivisionError
    assert await journaled(second) == []
    await second.reconcile(strategy="replace")
    assert await versioned.versions("a", "b") == [2, 1]
    async with second() as uow:
        assert await uow.files.list() == ["a"]
        assert (await uow.files.get("a")).one().content == "old"
        await uow.files.create(text("2", "b"))
    report = await first.recover()
    while not report.problems:  # it is looked for when no late request can arrive any more
        await asyncio.sleep(0.05)
        report = await first.recover()
    assert report.pending == 0
    assert any("was not committed, and stays" in each for each in report.problems)
    versioned.script.fails = lambda *_: None
    while await versioned.versions("a", "b") != [1, 1]:
        await asyncio.sleep(0.05)
        assert (await first.recover()).pending == 0
    assert await versioned.store.objects() == {"a": b"old", "b": b"2"}


async def test_a_replaced_version_that_cannot_be_deleted_holds_no_path(versioned: Scene) -> None:
    first, second = versioned.first(keep_versions=False), versioned.second()
    await put(first, "old", "a")
    versioned.script.fails = refused("delete", "a")
    await put(first, "new", "a")
    assert await journaled(second) == []
    await put(second, "newer", "a")
    assert (await first.recover()).problems == ()


async def test_a_batch_that_is_refused_as_a_whole_is_split(volatile: Scene) -> None:
    """P31: one key that the store cannot take must not keep the others."""
    first = volatile.first()
    names = [f"{number:02}" for number in range(9)]
    await put(first, "old", *names, "bad")
    volatile.script.fails = refused("delete", "bad", error=BaseConnectorException)
    async with first() as uow:
        await uow.files.delete(*names, "bad")
    assert await volatile.store.objects() == {"bad": b"old"}
    assert await journaled(first) == ["bucket/bad"]
    await put(volatile.second(), "new", *names)


async def test_a_store_that_refuses_all_is_not_asked_for_every_key(
    volatile: Scene, refusing_all: Callable[[str, str, str], Exception | None]
) -> None:
    first = volatile.first()
    names = [f"{number:03}" for number in range(500)]
    await put(first, "old", *names)
    volatile.script.fails = refusing_all
    async with first() as uow:
        await uow.files.delete(*names)
    assert volatile.script.sent("delete") < 50
    volatile.script.fails = lambda *_: None
    await first.recover()
    assert await volatile.store.objects() == {}


async def test_a_large_transaction_is_finished_and_released_batch_by_batch(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P28: it continues where it was cut off."""
    monkeypatch.setattr(finish, "KEYS_AT_ONCE", 4)
    first, second = scene.first(), scene.second()
    names = [f"{number:02}" for number in range(10)]
    await put(first, "old", *names)
    scene.script.seen.clear()
    await put(first, "new", *names)
    assert scene.script.sent("settle") == scene.script.sent("relocate") == 3

    copied = 0

    def away(phase: str, operation: str, _key: str) -> Exception | None:
        nonlocal copied
        copied += (phase, operation) == ("before", "copy")
        return AccessDeniedException() if operation == "copy" and copied > 5 else None

    scene.script.fails = away
    await put(first, "newer", *names)
    held = await journaled(first)
    assert len(held) == 5
    scene.script.seen.clear()
    scene.script.fails = lambda *_: None
    await first.recover()
    copied_now = {f"bucket/{key}" for name, key in scene.script.seen if name == "copy"}
    assert copied_now == set(held)
    assert await scene.store.objects() == dict.fromkeys(names, b"newer")
    await put(second, "last", *names)


async def test_a_store_that_is_away_is_not_asked_for_every_key(volatile: Scene, once: None) -> None:
    """P9: after some unanswered requests the others wait."""
    del once
    first = volatile.first(max_concurrency=2)
    names = [f"{number:03}" for number in range(100)]
    await put(first, "old", *names)
    volatile.script.fails = refused("copy", *names, error=ConnectorUnavailableException)
    volatile.script.seen.clear()
    await put(first, "new", *names)
    assert volatile.script.sent("copy") <= 2 * finish.OUTAGE
    volatile.script.fails = lambda *_: None
    await first.recover()
    assert await volatile.store.objects() == dict.fromkeys(names, b"new")


@controlled
async def test_failed_steps_are_not_retried_by_each_call_that_waits_for_a_lock(
    scene: Scene,
) -> None:
    """P9: attempts have pauses between them, and waiting callers do not shorten these."""
    first = scene.first()
    await put(first, "old", "bad")
    scene.script.fails = refused("copy", "bad")
    await put(first, "new", "bad")
    for _ in range(3):
        with pytest.raises(RecordLockedException):
            await put(first, "newer", "bad")
    assert scene.script.seen["copy", "bad"] <= 2


async def test_a_target_that_is_gone_is_copied_to_all_the_same(volatile: Scene) -> None:
    """P17: some stores answer a condition on it with 404, like a source that is gone."""
    scene = Scene(volatile.backend, Capabilities(conditional_copy=True))
    first = scene.first()
    await put(first, "old", "a")
    async with scene.store.connector() as connector:
        await connector.delete("bucket", [Deletion(location=Location("a"))])
    once = iter([NoSuchKeyException("There is no such key.")])

    def not_found(phase: str, operation: str, _key: str) -> Exception | None:
        return next(once, None) if (phase, operation) == ("before", "copy") else None

    scene.script.fails = not_found
    await put(first, "new", "a")
    assert await journaled(first) == []
    assert await scene.store.objects() == {"a": b"new"}


async def test_copies_in_parts_that_are_cut_off_leave_no_upload(
    request: pytest.FixtureRequest,
) -> None:
    """P13: each is aborted before the next one is begun."""
    store = await make_store("moto", request, multipart_copy_threshold=5 << 20, max_attempts=1)
    server = store.server
    assert server is not None
    uow_class = store.uow()
    body = b"x" * (11 << 20)

    async def write() -> None:
        async with uow_class() as uow:
            await uow.files.put(BinaryContent(data=body, media_type="a/b", filename="a"))

    await write()
    begun: list[str] = []

    def no_parts_nor_aborts(each: S3Request) -> Fault | None:
        if each.key != "a" or "upload" not in each.query:
            return None
        begun.extend([each.key] if "uploads" in each.query else [])
        return None if "uploads" in each.query else Fault.BEFORE

    with server.failing(no_parts_nor_aborts):
        await write()
    assert begun
    await uow_class.recover()
    async with store.connector() as connector:
        assert [each async for each in connector.uploads(store.namespace, "")] == []
    assert await store.objects() == {"a": body}


# --- callbacks and undos of users ----------------------------------------------------------------


async def test_a_callback_that_is_cancelled_leaves_commit_and_callbacks_alone(
    volatile: Scene,
) -> None:
    """I8: what it awaited was cancelled; the unit of work was not."""
    ran: list[str] = []
    background = asyncio.ensure_future(asyncio.sleep(60))
    background.cancel()

    async def callback() -> None:
        await background

    async with volatile.first()() as uow:
        await uow.files.put(text("1", "a"))
        uow.on_commit(callback)
        uow.on_commit(lambda: ran.append("second"))
    assert ran == ["second"]


@controlled
async def test_callbacks_outlive_the_callers_wait_and_run_once(scene: Scene) -> None:
    """P21, I8: nothing is sent for the transaction meanwhile."""
    first, second = scene.first(**BRIEF), scene.second()
    await put(first, "same", "a")
    ran: list[str] = []
    begun, go = asyncio.Event(), asyncio.Event()

    async def slow() -> None:
        ran.append("begun")
        begun.set()
        await go.wait()
        ran.append("done")

    async def work() -> None:
        async with first() as uow:
            await uow.files.delete("a")
            uow.on_commit(slow)
            uow.on_commit(lambda: ran.append("second"))

    task = asyncio.ensure_future(work())
    await begun.wait()
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled() or task.exception() is None  # the block has committed
    await put(second, "same", "a")
    await first.recover()
    assert ran == ["begun"]
    go.set()
    await _until(lambda: "second" in ran)
    assert ran == ["begun", "done", "second"]
    assert await scene.store.objects() == {"a": b"same"}


@controlled
async def test_an_undo_that_is_cut_off_is_called_again(scene: Scene) -> None:
    """P21: a note says so; and those before it are called, too."""
    first, second = scene.first(**BRIEF), scene.second()
    await put(first, "warm", "w")
    calls: list[str] = []

    async def undo_first() -> None:
        calls.append("first")

    async def undo_second() -> None:
        calls.append("second tried")
        if len(calls) == 1:
            await asyncio.Event().wait()
        calls.append("second")

    cause = ZeroDivisionError()
    ready = asyncio.Event()

    async def work() -> None:
        async with first() as uow:
            await uow.files.put(text("same", "a"))
            await uow.step(nothing, undo_first)
            await uow.step(nothing, undo_second)
            ready.set()
            try:
                await asyncio.Event().wait()
            finally:
                raise cause

    task = asyncio.ensure_future(work())
    await ready.wait()
    task.cancel()
    await _until(lambda: bool(calls))
    task.cancel()
    await asyncio.wait({task})
    await put(second, "same", "a")
    await _until(lambda: "first" in calls)
    assert calls == ["second tried", "second tried", "second", "first"]
    [note] = cause.__notes__
    assert "undo_second" in note
    await first.recover()
    assert (await scene.store.objects())["a"] == b"same"


@controlled
async def test_what_hangs_is_given_up_when_the_engine_closes_and_the_rest_is_called(
    volatile: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    uow_class = volatile.first(**BRIEF)
    ran: list[str] = []
    begun = asyncio.Event()

    async def hang() -> None:
        begun.set()
        await asyncio.Event().wait()

    async def work() -> None:
        async with uow_class() as uow:
            uow.on_commit(hang)
            uow.on_commit(lambda: ran.append("second"))
            await uow.files.put(text("1", "a"))

    async with uow_class.lifespan():
        task = asyncio.ensure_future(work())
        await begun.wait()
        task.cancel()
        await asyncio.wait({task})
        assert ran == []
    assert ran == ["second"]
    assert any(
        each.levelno == logging.ERROR and "hang" in each.getMessage() for each in caplog.records
    )


async def test_an_undo_that_ends_with_a_cancellation_of_its_own_is_a_failure_like_others(
    volatile: Scene,
) -> None:
    undone: list[str] = []

    async def cancelled() -> None:
        raise asyncio.CancelledError

    async def undo() -> None:
        undone.append("first")

    with pytest.raises(ZeroDivisionError) as caught:
        async with volatile.first()() as uow:
            await uow.step(nothing, undo)
            await uow.step(nothing, cancelled)
            raise ZeroDivisionError
    assert undone == ["first"]
    assert any("cancelled" in note for note in caught.value.__notes__)


class OddEnd(BaseException):
    """An exception that is not an Exception."""


async def cut_itself_off() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(0)


async def raise_no_exception() -> None:
    raise OddEnd


@pytest.mark.parametrize("bad", [cut_itself_off, raise_no_exception])
async def test_user_code_that_ends_in_an_odd_way_does_not_keep_the_rest_from_being_called(
    volatile: Scene,
    once: None,
    caplog: pytest.LogCaptureFixture,
    bad: Callable[[], Awaitable[None]],
) -> None:
    """I8: a log record says what failed; the caller's exception is its own."""
    del once
    called: list[str] = []

    async def undo() -> None:
        called.append("undone")

    async with volatile.first()() as uow:
        with pytest.raises(ZeroDivisionError):
            async with uow.savepoint():
                await uow.step(nothing, undo)
                await uow.step(nothing, bad)
                raise ZeroDivisionError
        uow.on_commit(bad)
        uow.on_commit(lambda: called.append("committed"))
    with pytest.raises(ZeroDivisionError):
        async with volatile.first()() as uow:
            await uow.step(nothing, undo)
            await uow.step(nothing, bad)
            uow.on_rollback(bad)
            uow.on_rollback(lambda: called.append("rolled back"))
            raise ZeroDivisionError
    assert called == ["undone", "committed", "undone", "rolled back"]
    errors = [each.getMessage() for each in caplog.records if each.levelno == logging.ERROR]
    assert len(errors) == 4
    assert all(bad.__name__ in message for message in errors)


@pytest.mark.parametrize("commits", [True, False])
@controlled
async def test_an_undo_of_a_savepoint_that_is_cut_off_is_called_again_however_the_block_ends(
    volatile: Scene, *, commits: bool
) -> None:
    """P21: the caller waits for `compensation_timeout`, and a note says what is not undone."""
    calls: list[str] = []

    async def undo_first() -> None:
        calls.append("first")

    async def undo_second() -> None:
        calls.append("second tried")
        if len(calls) == 1:
            await asyncio.Event().wait()
        calls.append("second")

    async def undo_outer() -> None:
        calls.append("outer")

    causes: list[BaseException] = []

    async def savepoint(uow: FullUOW, limit: asyncio.Timeout) -> None:
        async with uow.savepoint():
            await uow.step(nothing, undo_first)
            await uow.step(nothing, undo_second)
            try:
                limit.reschedule(0.0)
                await asyncio.Event().wait()
            except BaseException as cause:
                causes.append(cause)
                raise

    with suppress(ZeroDivisionError):
        async with volatile.first(**BRIEF)() as uow:
            await uow.step(nothing, undo_outer)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(None) as limit:
                    await savepoint(uow, limit)
            if not commits:
                raise ZeroDivisionError
    undone = ["second tried", "second tried", "second", "first"]
    assert calls == (undone if commits else [*undone, "outer"])
    [note] = causes[0].__notes__
    assert "undo_second" in note
    assert "undo_first" in note


async def test_callbacks_of_a_joined_block_run_to_their_end_in_its_context(
    tmp_path: Path,
) -> None:
    """P5, I8: even if recovery calls them and they take longer than `compensation_timeout`."""
    name: ContextVar[str] = ContextVar("name", default="unset")
    url = f"sqlite:///{tmp_path}/catalog.db"
    uow_class = Scene(SqlalchemyBackendConfig(url=url)).second()
    uow_class.config = uow_class.config.model_copy(update={"compensation_timeout": 0.05})
    ran: list[str] = []
    go = asyncio.Event()

    async def slow() -> None:
        ran.append(name.get())
        await go.wait()
        ran.append("done")

    database = create_async_engine(url.replace("sqlite", "sqlite+aiosqlite"))
    async with uow_class.lifespan():
        name.set("me")
        async with AsyncSession(database) as session, session.begin():
            async with uow_class(join=session) as uow:
                await uow.files.put(text("1", "a"))
                uow.on_commit(slow)
                uow.on_commit(lambda: ran.append("second"))
        await _until(lambda: bool(ran))
        await uow_class.recover()
        assert ran == ["me"]
        go.set()
        await _until(lambda: "second" in ran)
    await database.dispose()
    assert ran == ["me", "done", "second"]


# --- what operators see --------------------------------------------------------------------------


async def test_what_is_stuck_is_reported_by_all_who_are_asked(scene: Scene) -> None:
    """P9: by recovery, with any holder of the lease; by the diagnosis, and by callers that wait."""
    first, second = scene.first(), scene.second()
    await put(first, "old", "a", "b")
    scene.script.fails = refused("copy", "a")
    await put(first, "new", "a", "b")
    other = await second.recover()  # the lease is the first one's
    assert other.pending == 1
    assert "bucket/a" in other.problems[0]
    assert any("bucket/a" in problem for problem in (await second.diagnose()).problems)
    with pytest.raises(RecordLockedException, match="is committed, and not applied completely"):
        await put(scene.store.uow(backend=scene.backend, lock_timeout=0.0), "newer", "a")
    scene.script.fails = lambda *_: None
    await first.recover()
    assert (await second.recover()).pending == 0
    assert (await second.diagnose()).problems == ()


@pytest.mark.parametrize("file", ["catalog.db", "catalog.journal.db"])
async def test_a_database_that_can_only_be_read_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """A stopped process may hold the only lock for as long as it is stopped."""
    url = f"sqlite:///{tmp_path}/catalog.db"
    uow_class = Scene(SqlalchemyBackendConfig(url=url)).second()
    async with uow_class.lifespan():
        await put(uow_class, "1", "a")
        assert (await uow_class.diagnose()).problems == ()
        assert await uow_class.transactions() == []
        monkeypatch.setattr(diagnosis, "WRITES_WITHIN", 0.2)
        with closing(sqlite3.connect(tmp_path / file, isolation_level=None)) as holder:
            holder.execute("begin immediate")
            [problem] = (await uow_class.diagnose()).problems
            assert "accepts no changes" in problem


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - of callbacks that a test cannot wait for
            await asyncio.sleep(0.01)
