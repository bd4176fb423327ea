"""Structured concurrency of the engine: what fails, and what is cancelled meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from contextvars import ContextVar
from typing import cast

import anyio
import pytest

from fennflow.backends import Backend, TransactionToken
from fennflow.engine.concurrency import Calls, Periodic, run_all, shielded
from fennflow.engine.leases import Lease, Leases, clock
from fennflow_memory.connector import InMemoryConnector
from stores import make_store

asked_by: ContextVar[str | None] = ContextVar("asked_by", default=None)


async def test_results_come_in_the_order_of_the_items() -> None:
    async def double(number: int) -> int:
        await asyncio.sleep((5 - number) / 1000)
        return 2 * number

    assert await run_all(3, double, range(5)) == [0, 2, 4, 6, 8]


async def test_the_first_failure_is_raised_and_others_are_its_notes() -> None:
    async def fail(number: int) -> None:
        raise ValueError(number)

    with pytest.raises(ValueError, match="0") as caught:
        await run_all(2, fail, range(4))
    assert caught.value.__notes__ == ["Also failed: ValueError: 1"]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("finish", [False, True])
async def test_a_call_that_ends_with_a_cancellation_of_its_own_ends_all_with_one(
    count: int, *, finish: bool
) -> None:
    """The caller was not cancelled, but the awaitable of a call was."""

    async def end(number: int) -> None:
        if number == 0:
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await run_all(2, end, range(count), finish=finish)


async def test_a_failure_at_the_same_time_does_not_lose_a_cancellation() -> None:
    """If the caller catches the failure and continues, it is cancelled at the next await."""
    started = asyncio.Event()

    async def fail(_: int) -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            raise ConnectionError

    async def work() -> None:
        with pytest.raises(ConnectionError):
            await run_all(2, fail, range(2))
        await asyncio.Event().wait()

    task = asyncio.ensure_future(work())
    await started.wait()
    task.cancel()
    async with asyncio.timeout(60):
        await asyncio.wait({task})
    assert task.cancelled()


async def test_a_failure_leaves_no_cancellation_behind() -> None:
    """Otherwise a time limit around it could not be distinguished from another cancellation."""

    async def fail(_: int) -> None:
        await asyncio.sleep(0)
        raise ConnectionError

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            with pytest.raises(ConnectionError):
                await run_all(2, fail, range(2))
            await asyncio.sleep(10)


async def test_background_work_carries_no_context_of_the_request_that_started_it() -> None:
    seen: list[str | None] = []
    twice = asyncio.Event()

    async def work() -> bool:
        seen.append(asked_by.get())
        if len(seen) == 2:
            twice.set()
        return not twice.is_set()

    asked_by.set("the first request")
    turns = Periodic(0.001, work)
    turns.start()
    async with asyncio.timeout(60):
        await twice.wait()
    await turns.aclose()
    assert seen == [None, None]


async def test_an_engine_opens_without_the_context_of_the_request_that_needs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str | None] = []

    async def open_(_: InMemoryConnector) -> None:
        seen.append(asked_by.get())

    monkeypatch.setattr(InMemoryConnector, "open", open_)
    store = await make_store("memory", None)  # type: ignore[arg-type]
    asked_by.set("the first request")
    async with store.uow()() as uow:
        await uow.files.list()
    assert seen == [None]


def cancellations() -> int:
    task = asyncio.current_task()
    assert task is not None
    return task.cancelling()


@pytest.mark.parametrize("grace_started", [False, True])
async def test_a_scope_of_anyio_that_is_cancelled_does_not_wake_what_is_shielded(
    *, grace_started: bool
) -> None:
    """P21: such a scope cancels in every iteration of the loop, which would keep a CPU busy."""
    with anyio.CancelScope() as scope:
        scope.cancel()
        work, cancellation = await shielded(
            asyncio.sleep(0.05, 1), grace=lambda: 5, grace_started=grace_started
        )
        assert work.result() == 1
        assert (cancellation is None) == grace_started
        assert cancellations() < 3
        await asyncio.sleep(10)
    assert scope.cancelled_caught
    assert cancellations() == 0


async def test_a_cancellation_from_outside_still_ends_what_is_shielded_in_a_scope() -> None:
    """P21: its time is counted from the first cancellation, whatever its source."""
    with anyio.CancelScope() as scope:
        scope.cancel()
        work, _ = await shielded(asyncio.Event().wait(), grace=lambda: 0.02)
    assert work.cancelled()


async def test_calls_that_end_slowly_do_not_keep_a_cancelled_scope_busy() -> None:
    async def end_slowly(_: int) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.05)

    with anyio.move_on_after(0.01) as scope:
        try:
            await run_all(2, end_slowly, range(2), finish=True)
        finally:
            assert cancellations() < 3
    assert scope.cancelled_caught


async def test_a_call_that_is_broken_off_and_cancelled_is_cancelled() -> None:
    """An external cancellation is not hidden by that of the unit of work."""
    calls, owner = Calls(), object()

    async def call() -> None:
        with calls.call([owner], ConnectionError):
            await asyncio.Event().wait()

    broken, cancelled = asyncio.create_task(call()), asyncio.create_task(call())
    await asyncio.sleep(0)
    cancelled.cancel()
    await calls.break_off(owner)
    await asyncio.wait({broken, cancelled})
    assert isinstance(broken.exception(), ConnectionError)
    assert broken.cancelling() == 0
    assert cancelled.cancelled()


async def test_a_call_that_fails_as_it_is_broken_off_raises_what_it_failed_with() -> None:
    calls, owner = Calls(), object()

    async def call(*, fail: bool) -> int:
        with calls.call([owner], ConnectionError):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if fail:
                    raise ZeroDivisionError from None
        task = asyncio.current_task()
        assert task is not None
        return task.cancelling()

    failing, ending = asyncio.create_task(call(fail=True)), asyncio.create_task(call(fail=False))
    await asyncio.sleep(0)
    await calls.break_off(owner)
    await asyncio.wait({failing, ending})
    assert isinstance(failing.exception(), ZeroDivisionError)
    assert ending.result() == 0


async def test_a_turn_can_be_brought_forward_and_asked_for_while_another_is_under_way() -> None:
    turns = 0
    twice = asyncio.Event()

    async def work() -> bool:
        nonlocal turns
        turns += 1
        if turns == 1:
            periodic.start(delay=0.0)
        else:
            twice.set()
        return False

    periodic = Periodic(3600.0, work)
    periodic.start()
    periodic.start(delay=0.0)
    async with asyncio.timeout(60):
        await twice.wait()
    await periodic.aclose()


async def test_a_turn_that_is_cut_off_is_followed_by_another() -> None:
    """Otherwise code that cancels all tasks of a program would stop its heartbeats and its recovery."""
    turns = 0
    begun, again = asyncio.Event(), asyncio.Event()

    async def work() -> bool:
        nonlocal turns
        turns += 1
        (begun if turns == 1 else again).set()
        if turns == 1:
            await asyncio.Event().wait()
        return False

    before = asyncio.all_tasks()
    periodic = Periodic(0.001, work)
    periodic.start(delay=0.0)
    async with asyncio.timeout(60):
        await begun.wait()
        for each in asyncio.all_tasks() - before:
            each.cancel()
        await again.wait()
    await periodic.aclose()


async def test_a_lease_that_is_released_during_a_heartbeat_stays_released() -> None:
    """P7: work that ends after its lease must see that others may have acted since."""
    renewing, released = asyncio.Event(), asyncio.Event()

    class SlowBackend:
        async def heartbeat(
            self, transactions: Collection[TransactionToken]
        ) -> Collection[TransactionToken]:
            renewing.set()
            await released.wait()
            return transactions

    leases = Leases(cast("Backend", SlowBackend()), ttl=600.0, long=960.0)
    lease = Lease(TransactionToken("1"))
    leases.hold(lease, clock())
    beat = asyncio.create_task(leases._beat())
    await renewing.wait()
    leases.release(lease)
    released.set()
    await beat
    assert not lease.held
    await leases.aclose()
