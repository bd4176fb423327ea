"""The event loop of a process on which units of work without `async` run; there is one.

The loop runs in a separate thread, which starts with the first call and ends with the program. A
call waits until its work has ended on the loop. Meanwhile it runs the user functions that the
engine calls, so that they run in the caller's thread.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import ContextVar, copy_context
from functools import partial, wraps
from importlib import import_module
from queue import Empty, SimpleQueue
from typing import Any, Generic, ParamSpec, TypeVar, cast

from fennflow.containing import contained, uncommon
from fennflow.engine import runtime
from fennflow.exceptions import TransactionException

P = ParamSpec("P")
T = TypeVar("T")

LOOK_EVERY = 0.5
"""Seconds between checks of a waiting caller: a signal may swallow its wake-up."""
PAUSE = 0.02
CARRIED = "fennflow_"
"""Context variables with this prefix outlive a call; a savepoint uses one."""


class InterruptedCallError(Exception):
    """A user function was interrupted by an exception that a signal handler raised."""


class _Task:
    """A user function, to be called by the waiting thread.

    Args:
        function: to call, in the context of its caller.
        loop: on which its caller waits.
    """

    def __init__(self, function: Callable[[], object], loop: asyncio.AbstractEventLoop) -> None:
        self._function = function
        self._loop = loop
        self._context = copy_context()
        self._started = False
        self.result: asyncio.Future[Any] = loop.create_future()

    def run(self) -> None:
        if self._started:  # and was interrupted by an exception of a signal handler
            self._answer(None, InterruptedCallError("It was interrupted."))
            return
        self._started = True
        try:
            result = self._context.run(self._function)
        except StopIteration as error:  # no future accepts it
            self._answer(None, uncommon(error))
        except Exception as error:  # noqa: BLE001 - raised in the task that asked for the call
            self._answer(None, error)
        else:
            self._answer(result, None)

    def _answer(self, result: object, error: Exception | None) -> None:
        self._loop.call_soon_threadsafe(self._set, result, error)

    def _set(self, result: object, error: Exception | None) -> None:
        if self.result.done():
            return
        if error is None:
            self.result.set_result(result)
        else:
            self.result.set_exception(error)


class Call(Generic[T]):
    """The work that a thread waits for.

    Args:
        portal: on whose loop it runs.
        work: creates the coroutine, on the loop.
    """

    def __init__(self, portal: Portal, work: Callable[[], Coroutine[Any, Any, T]]) -> None:
        self._portal = portal
        self._work = work
        self._context = copy_context()
        self._task: asyncio.Task[None] | None = None
        self._functions: deque[_Task] = deque()
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._cancelled = False
        self._ended = False
        self._result: T | None = None
        self._error: BaseException | None = None

    # --- on the caller's thread ------------------------------------------------------------------

    def wait(self) -> T:
        """Run it, and return its result.

        An exception of a signal handler meanwhile, such as KeyboardInterrupt, cancels it, and is
        raised after it has ended.
        """
        interruption: BaseException | None = None
        begun = False
        while not self._ended:
            try:
                if not begun:
                    self._post(self._start)
                    begun = True
                self._serve()
            except BaseException as error:  # noqa: BLE001 - raised at the end
                interruption = interruption or error
                self._post(self._cancel)
        for variable, value in self._context.items():
            if variable.name.startswith(CARRIED) and variable.get(None) is not value:
                variable.set(value)
        failure, self._error = self._error, None
        try:
            if interruption is not None:
                raise interruption from _noted(interruption, failure)
            if failure is not None:
                raise failure
            return cast("T", self._result)
        finally:
            del failure, interruption  # they refer to this frame

    def _post(self, function: Callable[[], None]) -> None:
        try:
            self._portal.loop.call_soon_threadsafe(function)
        except RuntimeError:  # the loop is closed
            self.end(closed())

    def _serve(self) -> None:
        while self._functions:
            self._functions[0].run()
            self._functions.popleft()
        if not self._ended:
            try:
                self._wake.get(timeout=LOOK_EVERY)
            except Empty:
                self._portal.check_alive(self)

    # --- on the loop -----------------------------------------------------------------------------

    async def run(self, function: Callable[[], object]) -> Any:
        """Call a user function in the waiting thread.

        If that thread no longer waits, because it was interrupted or has continued, call it in
        another thread.
        """
        if self._ended:
            return await asyncio.to_thread(contained, function)
        task = _Task(function, self._portal.loop)
        self._functions.append(task)
        self._wake.put(None)
        return await task.result

    def end(self, error: BaseException | None) -> None:
        """Let the caller continue."""
        if not self._ended:
            self._error = error
            self._ended = True
            self._wake.put(None)

    def _start(self) -> None:
        if self._task is not None:
            return
        if self._cancelled:
            self.end(asyncio.CancelledError())
            return
        self._portal.calls.add(self)
        self._context.run(_call.set, self)
        loop = self._portal.loop
        self._task = loop.create_task(self._run(), context=self._context)
        self._task.add_done_callback(self._done)

    def _cancel(self) -> None:
        self._cancelled = True
        if self._task is None:
            self.end(asyncio.CancelledError())
        else:
            self._task.cancel()

    async def _run(self) -> None:
        try:
            self._result = await self._work()
        except BaseException as error:  # noqa: BLE001 - of the caller: it must not end the loop
            stopped = isinstance(error, asyncio.CancelledError) and self._portal.stopping
            self.end(error if self._cancelled or not stopped else closed())
        else:
            self.end(None)

    def _done(self, _task: asyncio.Task[None]) -> None:
        self._portal.calls.discard(self)
        self.end(asyncio.CancelledError())  # for a call that never began


_call: ContextVar[Call[Any] | None] = ContextVar("sync_call", default=None)
"""The call inside which the engine runs, or was started."""


def called_by_thread() -> bool:
    """Return whether a thread waits for what the engine does."""
    return _call.get() is not None


async def in_caller(function: Callable[[], T]) -> T:
    """Call a plain function in the thread that waits for the engine.

    If no thread waits any more, it is called in another thread.
    """
    waiting = _call.get()
    if waiting is None:
        return await asyncio.to_thread(contained, function)
    result: T = await waiting.run(function)
    return result


def _noted(interruption: BaseException, failure: BaseException | None) -> BaseException | None:
    """Note on an interruption how the call ended, and return the exception if it failed."""
    if failure is None:
        interruption.add_note("The interrupted call had already ended successfully.")
        return None
    if isinstance(failure, asyncio.CancelledError):
        return failure.__cause__
    interruption.add_note(f"The interrupted call failed: {type(failure).__name__}: {failure}")
    return failure


def on_caller(function: Callable[P, T]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Return a wrapper that calls a user function; a plain one runs in the caller's thread."""

    @wraps(function)
    async def call(*args: P.args, **kwargs: P.kwargs) -> Any:
        # Recovery calls back outside any call, when it knows how a surrounding transaction ended.
        result: Any = await in_caller(partial(function, *args, **kwargs))
        return await result if inspect.isawaitable(result) else result

    return call


class Portal:
    """An event loop in a thread."""

    loop: asyncio.AbstractEventLoop

    def __init__(self) -> None:
        self.calls: set[Call[Any]] = set()
        self.blocks: dict[object, threading.Thread] = {}
        self._kept: list[object] = []
        self._pid = os.getpid()
        self._stop = asyncio.Event()
        self.stopping = False
        ready = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(ready,), name="fennflow", daemon=True
        )
        self._thread.start()
        ready.wait()

    def _run(self, ready: threading.Event) -> None:
        from fennflow.threads import Threads  # at exit it is too late to import it

        try:
            with asyncio.Runner() as runner:
                self.loop = runner.get_loop()
                threads = Threads(thread_name_prefix="fennflow-work")
                threads.submit(int)  # start a thread while that is possible
                self.loop.set_default_executor(threads)
                self.loop.call_soon(ready.set)
                runner.run(self._stop_requested())
        except RuntimeError:
            # asyncio starts a thread to wait for the threads of the loop, which is closed by now.
            # Python 3.12 starts none at exit, and waits for those threads itself.
            if not (_ending and sys.version_info[:2] == (3, 12) and self.loop.is_closed()):
                raise
        finally:
            for call in list(self.calls):
                call.end(closed())

    async def _stop_requested(self) -> None:
        await self._stop.wait()
        self.stopping = True

    def call(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run work on the loop, and wait for it.

        Raises:
            TransactionException: the thread runs an event loop of its own; or another process
                opened the object that is used; or the program is ending.
        """
        _check_thread()
        if self._pid != os.getpid():
            message = (
                "This unit of work was opened before the process was forked, and belongs to the "
                "parent. Open one in the child: it gets connections of its own."
            )
            raise TransactionException(message)
        if self.loop.is_closed():
            raise closed()
        return Call(self, work).wait()

    def check_alive(self, call: Call[Any]) -> None:
        """End a call that can no longer end by itself, since the loop has ended."""
        if not self._thread.is_alive():
            call.end(closed())

    def close(self) -> None:
        """End the loop: close engines, cancel work in progress."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def abandon(self) -> None:
        """Keep a child process from ever closing what belongs to its parent."""
        # Not even when the child ends: closing the loop's selector, which both share, would stop
        # the parent's loop. The child keeps a reference to it forever, in the frame of the parent's
        # thread.
        self._kept.append(runtime.forget(self.loop))


def closed() -> TransactionException:
    """Return the error for a call on a loop that has ended."""
    return TransactionException(
        "The event loop of this unit of work has ended, since the program is ending, so nothing "
        "more can be done in it. Recovery undoes what was not committed. End your threads before "
        "the main thread ends."
    )


def _check_thread() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    message = (
        "sync(), a filesystem of fsspec or a storage of Django would block the event loop that runs in "
        "this thread, as in a notebook. Nothing was done. Use `async with UOW() as uow` here, and await "
        "its methods; or put the calls into a function, and `await asyncio.to_thread(function)`."
    )
    raise TransactionException(message)


_REGISTER: Any = getattr(threading, "_register_atexit")  # noqa: B009 - known to no checker
_lock = threading.Lock()
_portal: Portal | None = None
_ending = _registered = False


def current() -> Portal:
    """Return the portal of this process, which starts with the first call.

    Raises:
        TransactionException: the thread runs an event loop; or the program ends.
    """
    global _portal, _registered  # noqa: PLW0603 - one for each process
    _check_thread()
    with _lock:
        if _portal is None or _portal.loop.is_closed():
            if _ending:
                raise closed()
            if not _registered:
                # The last function registered is called first: engines need thread executors to
                # close, so this has to run before the executors end. `atexit` would be too late.
                try:
                    import_module("concurrent.futures.thread")
                    _REGISTER(_at_exit)
                except RuntimeError:  # the main thread has ended
                    raise closed() from None
                _registered = True
            _portal = Portal()
        return _portal


def close() -> None:
    """End the event loop, if there is one; the next call starts another."""
    global _portal
    with _lock:
        portal, _portal = _portal, None
    if portal is not None:
        portal.close()


def _at_exit() -> None:
    """Let other threads, which Python waits for, leave their blocks, and end the loop."""
    global _ending  # noqa: PLW0603 - one for each process
    _ending = True
    portal = _portal
    while portal is not None and any(
        thread.is_alive() and not thread.daemon and thread is not threading.main_thread()
        for thread in list(portal.blocks.values())
    ):
        time.sleep(PAUSE)
    close()


def _after_fork() -> None:
    global _lock, _portal  # noqa: PLW0603 - one for each process
    _lock = threading.Lock()
    portal, _portal = _portal, None
    if portal is not None:
        portal.abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
