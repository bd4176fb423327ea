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

    After a failure no further call is started; the first failure is raised, and others are added to
    it as notes.

    Args:
        limit: how many calls run concurrently.
        function: what to call.
        items: the arguments.
        finish: whether running calls may end by themselves after a failure, since a write that is
            cut off may have taken effect (protocol P19). If not, they are cancelled.
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

    # In a separate task: before Python 3.13, a group that fails leaves a cancellation behind on the
    # task that waits for it, which `asyncio.timeout` then mistakes for an external one.
    group, cancellation = await shielded(work(), grace=lambda: 0.0)
    failures = None if group.cancelled() else group.exception()
    if failures is None:
        if cancellation is not None:
            raise cancellation
        group.result()
        return
    caller = asyncio.current_task()
    if cancellation is not None and caller is not None:
        # The failure hides a cancellation that arrived with it: deliver it at the next await.
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
    """Run work to its end even if the caller is cancelled meanwhile (protocol P21).

    Args:
        work: the work that must not be cut off.
        grace: called at the cancellation; returns how many seconds the work may still take before
            it is cancelled.
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

    The cancellation arrived while the outcome was decided. An exception must not contradict that
    outcome, but the cancellation must not be lost, either. It is not delivered if its requester
    (such as `asyncio.timeout`) has withdrawn it in the meantime.
    """
    task = asyncio.current_task()
    requests = 0 if task is None else task.cancelling()

    def cancel() -> None:
        if task is not None and requests and not task.done() and task.cancelling() >= requests:
            task.uncancel()
            task.cancel(*cancellation.args)  # anyio's scopes recognise these

    asyncio.get_running_loop().call_soon(cancel)


def _cancelled_once() -> AbstractContextManager[object]:
    """Return a block in which a cancelled scope of anyio does not cancel the task again.

    Such a scope cancels its tasks in every iteration of the event loop until they have left it.
    Code that keeps waiting after the first cancellation would keep a CPU busy. The scope continues
    when the block is left.
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
"""The calls inside which the caller runs, or was started."""


class Calls:
    """The running calls of all tasks, which can be waited for and interrupted."""

    def __init__(self) -> None:
        self._under_way: set[_Call] = set()

    @contextmanager
    def call(
        self, owners: Collection[object], broken_off: Callable[[], Exception]
    ) -> Generator[None]:
        """Register the block as a running call.

        Args:
            owners: the owners by which it can be found.
            broken_off: makes the exception that is raised if the call is interrupted.
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
            # As in asyncio.timeout, an external cancellation propagates.
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
        """Return whether the caller runs inside a call, which it must not wait for.

        This is also true in a task that was started inside a call.
        """
        task, around = asyncio.current_task(), _calls.get()
        return any(call.task is task or call in around for call in self._under_way)

    async def wait(self) -> None:
        """Wait until no call is running."""
        while self._under_way:
            await next(iter(self._under_way)).ended.wait()

    async def break_off(self, owner: object) -> None:
        """Interrupt the calls of an owner, and wait until they have ended."""
        calls = [call for call in self._under_way if owner in call.owners]
        for call in calls:
            call.broken_off = True
            call.task.cancel()
        for call in calls:
            await call.ended.wait()


class Periodic:
    """Work that is repeated while an engine is open, never twice at a time.

    A timer creates the task when work is due. So a loop that ends without closing the engine finds
    no task between two runs, and drops the timer without a warning.

    Runs use an empty context: they outlive the request that starts them, and must not keep its
    context variables.

    Args:
        interval: seconds between the end of one run and the next.
        work: one run; returns whether there should be a next one.
    """

    def __init__(self, interval: float, work: Callable[[], Coroutine[Any, Any, bool]]) -> None:
        self._interval = interval
        self._work = work
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0  # timers of uvloop have no `when` if they are due now
        self._task: asyncio.Task[None] | None = None
        self._next: float | None = None
        self._closed = False
        self.late = 0.0
        """Seconds by which the last run was late, because the loop was blocked."""

    def start(self, delay: float | None = None) -> None:
        """Schedule a run within the interval, or the delay.

        If a run is in progress, another one follows it.
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
        """Cancel a run in progress, and start no other."""
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
        again = True  # even if this run is cut off or fails
        try:
            again = await self._work()
        finally:
            self._task = None
            due, self._next = self._next, None
            if again:
                self.start()
            if due is not None:
                self.start(max(0.0, due - asyncio.get_running_loop().time()))
