"""Structured concurrency: bounded fan-out, and work that outlives a cancellation of its caller."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import (
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Generator,
    Iterable,
    Sequence,
)
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import Context, ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from fennflow.printable import printable

T = TypeVar("T")
R = TypeVar("R")
E = TypeVar("E", bound=BaseException)


async def run_all(
    limit: int,
    function: Callable[[T], Awaitable[R]],
    items: Iterable[T],
    *,
    finish: bool = False,
) -> list[R]:
    """Call the function for every item, at most `limit` at a time, and return the results.

    If one call fails no further one is made; the first failure is raised, and others are added as
    notes on it.

    Args:
        limit: calls under way at once.
        function: what to call.
        items: with what.
        finish: whether the calls under way end by themselves after a failure. A write that is cut
            off may have taken effect (protocol P19). If not, they are cancelled.
    """
    todo = list(items)
    if len(todo) <= 1:
        return [await function(item) for item in todo]
    results: dict[int, R] = {}
    failures: list[Exception] = []
    numbered = iter(enumerate(todo))

    async def worker() -> None:
        for index, item in numbered:
            if failures:
                return
            try:
                results[index] = await function(item)
            except Exception as error:
                if not finish:
                    raise
                failures.append(error)

    await _group(worker, min(limit, len(todo)))
    if failures:
        raise _first(failures)
    if len(results) < len(todo):
        raise asyncio.CancelledError  # one of the calls raised it without being cancelled
    return [results[index] for index in range(len(todo))]


async def _group(worker: Callable[[], Coroutine[Any, Any, None]], count: int) -> None:
    """Run workers until all have ended, or one has failed and the others are cancelled."""

    async def work() -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(count):
                group.create_task(worker())

    # In a task of its own: before 3.13 a group that fails leaves a cancellation behind with the task
    # that waits for it, which `asyncio.timeout` then takes for someone else's.
    group, cancellation = await shielded(work(), grace=lambda: 0.0)
    failures = None if group.cancelled() else group.exception()
    if failures is None:
        if cancellation is not None:
            raise cancellation
        group.result()
        return
    caller = asyncio.current_task()
    if cancellation is not None and caller is not None:
        # The failure hides a cancellation that came with it: it is due at the next await.
        caller.uncancel()
        caller.cancel(*cancellation.args)
    raise _first(_leaves(failures)) from None


def _first(failures: Sequence[E]) -> E:
    first, *others = failures
    for other in others:
        first.add_note(printable(f"Also failed: {type(other).__name__}: {other}"))
    return first


def _leaves(error: BaseException) -> list[BaseException]:
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    group = cast("BaseExceptionGroup[BaseException]", error)
    return [leaf for each in group.exceptions for leaf in _leaves(each)]


async def shielded(
    work: Coroutine[Any, Any, R], *, grace: Callable[[], float], grace_started: bool = False
) -> tuple[asyncio.Task[R], asyncio.CancelledError | None]:
    """Run work to its end although the caller is cancelled meanwhile (protocol P21).

    Args:
        work: what must not be cut off.
        grace: asked at the cancellation; seconds that it may still take. Then it is cancelled.
        grace_started: whether the caller was cancelled before, so that the grace begins now.

    Returns:
        the task, which is done, and the cancellation that arrived meanwhile: the caller has to
        honour it.
    """
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + grace() if grace_started else None
    cancellation: asyncio.CancelledError | None = None
    with ExitStack() as quiet:
        if grace_started:
            quiet.enter_context(_cancelled_once())
        while not task.done():
            left = None if deadline is None else deadline - loop.time()
            if left is not None and left <= 0:
                task.cancel()
                left = None
            try:
                await asyncio.wait({task}, timeout=left)
            except asyncio.CancelledError as error:
                if deadline is None:
                    deadline = loop.time() + grace()
                    quiet.enter_context(_cancelled_once())
                cancellation = error
    return task, cancellation


def cancel_again(cancellation: asyncio.CancelledError) -> None:
    """Deliver a cancellation to the running task again, at its next await (P21, I8).

    It arrived while something was decided that stands, so that no exception must say otherwise, and
    it must not be lost. If its requester has withdrawn it meanwhile (`asyncio.timeout`), it is not
    delivered.
    """
    task = asyncio.current_task()
    requests = 0 if task is None else task.cancelling()

    def cancel() -> None:
        if task is not None and requests and not task.done() and task.cancelling() >= requests:
            task.uncancel()
            task.cancel(*cancellation.args)  # by which a scope of anyio's knows it again

    asyncio.get_running_loop().call_soon(cancel)


def _cancelled_once() -> AbstractContextManager[object]:
    """Return a block in which a scope of anyio's that is cancelled does not cancel the task again.

    Such a scope cancels the tasks in it at every turn of the event loop until they have left it.
    What goes on waiting after the first time would keep a CPU busy. When the block is left, the
    scope goes on.
    """
    scope: Callable[..., AbstractContextManager[object]] | None = getattr(
        sys.modules.get("anyio"), "CancelScope", None
    )
    return nullcontext() if scope is None else scope(shield=True)


@dataclass(slots=True, eq=False)
class _Call:
    task: asyncio.Task[Any]
    owners: Collection[object]
    cancelling: int
    broken_off: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)


_calls: ContextVar[tuple[_Call, ...]] = ContextVar("fennflow_calls", default=())
"""Those inside which the caller runs, or was started."""


class Calls:
    """Calls that tasks have under way: they can be waited for, and broken off."""

    def __init__(self) -> None:
        self._under_way: set[_Call] = set()

    @contextmanager
    def call(
        self, owners: Collection[object], broken_off: Callable[[], Exception]
    ) -> Generator[None]:
        """Let the block be a call that is under way.

        Args:
            owners: by any of which it can be found.
            broken_off: what is raised if it is broken off.
        """
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - calls are made by tasks
        call = _Call(task, owners, task.cancelling())
        self._under_way.add(call)
        outer = _calls.get()
        _calls.set((*outer, call))
        try:
            yield
        except asyncio.CancelledError as error:
            # Like asyncio.timeout: a cancellation that others asked for goes on.
            if call.broken_off and task.uncancel() <= call.cancelling:
                raise broken_off() from error
            raise
        except BaseException:
            if call.broken_off:
                task.uncancel()
            raise
        else:
            if call.broken_off:
                task.uncancel()
        finally:
            _calls.set(outer)
            self._under_way.discard(call)
            call.ended.set()

    def inside(self) -> bool:
        """Return whether the caller runs inside a call, which may wait for it and cannot be waited for.

        It does in a task, too, that was started inside one.
        """
        task, around = asyncio.current_task(), _calls.get()
        return any(call.task is task or call in around for call in self._under_way)

    async def wait(self) -> None:
        """Wait until no call is under way."""
        while self._under_way:
            await next(iter(self._under_way)).ended.wait()

    async def break_off(self, owner: object) -> None:
        """Break off the calls of an owner, and wait until they have ended."""
        calls = [call for call in self._under_way if owner in call.owners]
        for call in calls:
            call.broken_off = True
            call.task.cancel()
        for call in calls:
            await call.ended.wait()


class Periodic:
    """Work done again and again while an engine lives, never twice at a time.

    A timer makes the task when work is due. So a loop that ends without closing the engine finds
    no task between two turns, and drops the timer without a warning.

    Turns run in an empty context: they outlive the request that starts them, and must not carry
    its context variables.

    Args:
        interval: seconds between the end of one turn and the next.
        work: one turn; returns whether there is to be a next one.
    """

    def __init__(self, interval: float, work: Callable[[], Coroutine[Any, Any, bool]]) -> None:
        self._interval = interval
        self._work = work
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0  # not asked of the timer: uvloop's has no `when` if it is due at once
        self._task: asyncio.Task[None] | None = None
        self._next: float | None = None
        self._closed = False
        self.late = 0.0
        """Seconds by which the last turn began late, since the loop was blocked."""

    def start(self, delay: float | None = None) -> None:
        """Make a turn begin within the interval, or the delay.

        If a turn is under way that means another one, after it.
        """
        if self._closed:
            return
        loop = asyncio.get_running_loop()
        due = loop.time() + (self._interval if delay is None else delay)
        if self._task is not None:
            self._next = due if self._next is None else min(due, self._next)
            return
        if self._timer is not None:
            if self._due <= due:
                return
            self._timer.cancel()
        self._due = due
        self._timer = loop.call_at(due, self._turn, loop, context=Context())

    async def aclose(self) -> None:
        """Cancel a turn under way, and have no other."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        self.late = loop.time() - self._due
        self._timer = None
        self._task = loop.create_task(self._run())

    async def _run(self) -> None:
        again = True  # though this turn is cut off, or fails
        try:
            again = await self._work()
        finally:
            self._task = None
            due, self._next = self._next, None
            if again:
                self.start()
            if due is not None:
                self.start(max(0.0, due - asyncio.get_running_loop().time()))
