"""An event loop whose order of ready tasks and whose clock a test controls.

Nothing happens by itself: `step` runs one of the callbacks that are ready, which one the test
chooses, and where none is ready the clock jumps to the next timer. There are no threads and no
sockets, so the same choices lead to the same run. Tasks belong to simulated processes, which can be
killed (none of their callbacks ever runs again) or stopped for a while, like by SIGKILL and SIGSTOP.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from asyncio import events
from collections.abc import Callable, Coroutine, Generator, Sequence
from contextlib import contextmanager
from contextvars import Context, ContextVar, copy_context
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

from typing_extensions import override

from fennflow.engine import runtime

P = ParamSpec("P")
T = TypeVar("T")

PROCESS: ContextVar[int] = ContextVar("PROCESS", default=0)
START = 1_800_000_000.0
"""Seconds since the epoch at which simulated time begins."""


class ControlledLoop(asyncio.AbstractEventLoop):
    """The loop.

    Args:
        choose: gets how many callbacks are ready, and returns which one is to run.
    """

    def __init__(self, choose: Callable[[int], int] = lambda _: 0) -> None:
        self.choose = choose
        self.now = START
        self.dead: set[int] = set()
        self.stopped: set[int] = set()
        self.errors: list[dict[str, Any]] = []
        self.before_time_passes: Callable[[float], None] = lambda _: None
        self._ready: list[tuple[int, asyncio.Handle]] = []  # each with its process
        self._timers: list[tuple[float, int, int, asyncio.TimerHandle]] = []
        self._numbers = itertools.count()
        self._tasks: list[asyncio.Task[Any]] = []
        self._closed = False

    # --- what a test calls -------------------------------------------------------------------

    def spawn(self, process: int, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a task of a process; whatever it starts is that process's, too."""
        context = copy_context()
        context.run(PROCESS.set, process)
        return self._keep(asyncio.Task(work, loop=self, context=context))

    def _keep(self, task: asyncio.Task[T]) -> asyncio.Task[T]:
        self._tasks.append(task)
        return task

    def unwind(self) -> None:
        """Cancel all tasks, of the dead too, and run them to their end."""
        self.dead.clear()
        self.stopped.clear()
        self.choose = lambda _: 0
        steps = 0
        while any(not task.done() for task in self._tasks):
            assert steps < 100_000, "a task cannot be cancelled"
            if steps % 1000 == 0:
                with self.running():
                    for task in self._tasks:
                        task.cancel()
            steps += 1
            self.step()
        for task in self._tasks:
            if not task.cancelled():
                task.exception()  # it is not needed any more
        self._tasks.clear()

    def step(self) -> bool:
        """Run one ready callback; return False if there is none, not even after a timer."""
        ready = self._runnable()
        if not ready:
            due = self._next_timer()
            if due is None:
                return False
            self.pass_time(due - self.now)
            return True
        chosen = ready[self.choose(len(ready)) % len(ready)]
        self._ready.remove(chosen)
        with self.running():
            cast("Any", chosen[1])._run()
        return True

    def run(self, work: Coroutine[Any, Any, T], *, process: int = -1, limit: int = 100_000) -> T:
        """Run until a task of a process is done, others meanwhile as they come."""
        task = self.spawn(process, work)
        for _ in range(limit):
            if task.done():
                return task.result()
            if not self.step():
                message = f"{task} waits for what never happens."
                raise AssertionError(message)
        message = f"{task} is not done after {limit} steps."
        raise AssertionError(message)

    def pass_time(self, seconds: float) -> None:
        """Let time pass; timers that are due become ready."""
        target = self.now + max(0.0, seconds)
        self.before_time_passes(target)
        self.now = max(self.now, target)
        while self._timers and self._timers[0][0] <= self.now:
            _, _, process, handle = heapq.heappop(self._timers)
            if not handle.cancelled():
                self._ready.append((process, handle))

    @contextmanager
    def running(self) -> Generator[None]:
        """Be the running loop."""
        before = events._get_running_loop()
        events._set_running_loop(self)
        try:
            yield
        finally:
            events._set_running_loop(before)

    def _runnable(self) -> Sequence[tuple[int, asyncio.Handle]]:
        self._ready = [each for each in self._ready if not each[1].cancelled()]
        still = self.dead | self.stopped
        return [each for each in self._ready if each[0] not in still] if still else self._ready

    def _next_timer(self) -> float | None:
        still = self.dead | self.stopped
        due = (
            when
            for when, _, process, each in self._timers
            if process not in still and not each.cancelled()
        )
        return min(due, default=None)

    # --- what asyncio calls ------------------------------------------------------------------

    @override
    def time(self) -> float:
        return self.now

    @override
    def call_soon(  # type: ignore[override]  # nothing depends on the types of callbacks
        self, callback: Any, *args: Any, context: Context | None = None
    ) -> Any:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append((_process(handle), handle))
        return handle

    @override
    def call_soon_threadsafe(  # type: ignore[override]  # as above
        self, callback: Any, *args: Any, context: Context | None = None
    ) -> Any:
        return self.call_soon(callback, *args, context=context)

    @override
    def call_later(  # type: ignore[override]  # as above
        self, delay: float, callback: Any, *args: Any, context: Context | None = None
    ) -> Any:
        return self.call_at(self.now + delay, callback, *args, context=context)

    @override
    def call_at(  # type: ignore[override]  # as above
        self, when: float, callback: Any, *args: Any, context: Context | None = None
    ) -> Any:
        handle = asyncio.TimerHandle(when, callback, args, self, _of_process(context))
        entry = (when, next(self._numbers), _process(handle), handle)
        heapq.heappush(self._timers, entry)
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Do nothing: they are passed over."""

    @override
    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    @override
    def create_task(self, coro: Any, **kwargs: Any) -> Any:
        kwargs.pop("eager_start", None)
        kwargs["context"] = _of_process(kwargs.get("context"))
        return self._keep(asyncio.Task(coro, loop=self, **kwargs))

    @override
    def run_in_executor(  # type: ignore[override]  # as above
        self, executor: Any, func: Any, *args: Any
    ) -> Any:
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - passed on by the future
            future.set_exception(error)
        return future

    @override
    def call_exception_handler(self, context: Any) -> None:
        self.errors.append(context)

    @override
    def get_debug(self) -> bool:
        return False

    @override
    def is_running(self) -> bool:
        return events._get_running_loop() is self

    @override
    def is_closed(self) -> bool:
        return self._closed

    @override
    def close(self) -> None:
        """End."""
        self._closed = True


def controlled(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run a test on a loop whose clock jumps: no time limit in it depends on how busy the machine is.

    What it uses must be in memory.
    """

    @wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        loop = cast("Callable[[], ControlledLoop]", ControlledLoop)()
        try:
            loop.run(test(*args, **kwargs))
        finally:
            for slot in runtime._slots.pop(loop, {}).values():
                if slot.lifetime is not None:
                    loop.run(slot.lifetime.aclose())
            loop.unwind()
            loop.close()

    return run


def _process(handle: asyncio.Handle) -> int:
    context: Context = cast("Any", handle)._context
    return context.get(PROCESS, 0)


def _of_process(context: Context | None) -> Context | None:
    """Return a context after what runs in an empty one was made its starter's."""
    if context is not None and PROCESS not in context:
        context.run(PROCESS.set, PROCESS.get())
    return context
