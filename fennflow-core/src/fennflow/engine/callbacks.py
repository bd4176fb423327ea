"""Undo functions of saga steps and callbacks for the outcome that only this process can call.

`Session.step` calls a step; `jobs.py` calls the undo functions and hooks that are registered by name.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from contextvars import Context
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from fennflow.backends import Outcome
from fennflow.containing import may_be_from_signal, uncommon
from fennflow.exceptions import TransactionException
from fennflow.retries import repeat
from fennflow.telemetry import log_event

if TYPE_CHECKING:
    from fennflow.jobs import JobCall

Callback = Callable[[], Awaitable[object] | object]
Undo = Callback
P = ParamSpec("P")
T = TypeVar("T")

UNDO_ATTEMPTS = 3


class UndoPendingError(Exception):
    """A compensation failed, or another process calls it; it stays in the journal and is called again."""


@dataclass(frozen=True, slots=True)
class Hook:
    """A call that is journaled in the pivot (P36).

    Args:
        call: of a registered function.
        key: hooks with the same key are called in the order of their commits.
    """

    call: JobCall
    key: str | None = None


@dataclass(slots=True)
class Callbacks:
    """Callbacks of one transaction, in the order in which they were registered.

    Args:
        undos: the undos of steps, called if the transaction does not commit.
        overdue: the undos that are called however the transaction ends: they belong to savepoints
            that were undone without enough time to call them.
        on_commit: called after a commit.
        on_rollback: called after a rollback.
        hooks: journaled by a commit, and called after it by any process.
        begun: whether the transaction is decided and its callbacks are being called or were called:
            later registrations come too late.
    """

    undos: list[Undo] = field(default_factory=list[Undo])
    overdue: list[Undo] = field(default_factory=list[Undo])
    on_commit: list[Callback] = field(default_factory=list[Callback])
    on_rollback: list[Callback] = field(default_factory=list[Callback])
    hooks: list[Hook] = field(default_factory=list[Hook])
    begun: bool = False

    def __bool__(self) -> bool:
        """Whether this process has anything to call."""
        return bool(self.undos or self.on_commit or self.on_rollback)

    def forget(self, others: Callbacks) -> list[Undo]:
        """Remove the callbacks of another list from this one, and return the undos that were found."""
        _remove(self.on_commit, others.on_commit)
        _remove(self.on_rollback, others.on_rollback)
        _remove(self.overdue, others.overdue)
        _remove(self.hooks, others.hooks)
        return _remove(self.undos, others.undos)


def _remove(callbacks: list[T], others: list[T]) -> list[T]:
    """Remove each item of another list once, starting from the end; return those that were found."""
    wanted = Counter(map(id, others))
    kept: list[T] = []
    removed: list[T] = []
    for each in reversed(callbacks):
        found = wanted[id(each)] > 0
        wanted[id(each)] -= found
        (removed if found else kept).append(each)
    callbacks[:] = reversed(kept)
    return removed[::-1]


async def run_undos(undos: list[Undo], transaction: str) -> list[str]:
    """Undo saga steps in reverse order, each up to three times, and empty the list.

    A step leaves the list when its undo succeeded or failed for good. If an undo is cut off, its
    step is still the last of the list, and the next call undoes it.

    Args:
        undos: the undos of the steps, in the order of the steps.
        transaction: the transaction of the steps.

    Returns:
        what could not be undone.
    """
    notes: list[str] = []
    while undos:
        undo = undos[-1]
        try:
            await repeat(
                partial(call_user, undo),
                on=lambda error: not isinstance(error, UndoPendingError),
                attempts=UNDO_ATTEMPTS,
                what=f"The undo {_name_of(undo)}",
                transaction=transaction,
            )
        except UndoPendingError as error:
            name = _name_of(undo)
            notes.append(f"The undo of a step is not done yet: {name}: {error}")
            message = "The undo of a step is not done yet: %s: %s"
            log_event(logging.WARNING, message, name, error, rule="P35", transaction=transaction)
        except Exception as error:  # noqa: BLE001 - logged, and added as a note
            name = _name_of(undo)
            notes.append(f"The undo of a step failed: {name}: {type(error).__name__}: {error}")
            message = "The undo of a step failed: %s"
            log_event(
                logging.ERROR, message, name, rule="P9", transaction=transaction, failed=error
            )
        undos.pop()
    return notes


async def run_callbacks(callbacks: list[Callback], transaction: str) -> None:
    """Run callbacks in order, each once, and empty the list.

    The outcome stands: exceptions are logged, not raised (I8).
    """
    while callbacks:
        callback = callbacks.pop(0)
        try:
            await call_user(callback)
        except asyncio.CancelledError:
            message = "A callback was cut off and is not called again: %s"
            log_event(
                logging.ERROR, message, _name_of(callback), rule="I8", transaction=transaction
            )
            raise
        except Exception as error:  # noqa: BLE001 - logged
            message = "A callback failed after the outcome was decided: %s"
            name = _name_of(callback)
            log_event(
                logging.ERROR, message, name, rule="I8", transaction=transaction, failed=error
            )


async def result_of(do: Callable[[], Any]) -> Any:
    """Call a step, plain or async, and return its result."""
    made = do()
    return await made if inspect.isawaitable(made) else made


async def notify(function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
    """Call a user function, plain or async."""
    result = function(*args, **kwargs)
    if inspect.isawaitable(result):
        await result


async def call_user(function: Callback) -> None:
    """Call a user function in a separate task, so that nothing it does to its task affects others.

    Raises:
        TransactionException: it was cancelled, but not by its caller; or it raised something that
            is not an Exception.
    """

    async def call() -> None:
        try:
            await notify(function)
        except (Exception, asyncio.CancelledError):
            raise
        except BaseException as error:
            if may_be_from_signal(error):
                raise
            raise uncommon(error) from error

    caller = asyncio.current_task()
    try:
        await asyncio.get_running_loop().create_task(call())
    except asyncio.CancelledError as error:
        if caller is None or caller.cancelling():
            raise
        message = "It raised CancelledError although it was not cancelled."
        raise TransactionException(message) from error


def names_of(functions: Iterable[Callback]) -> str:
    """Return the names of user functions, for the log."""
    return ", ".join(map(_name_of, functions))


def _name_of(function: Callback) -> str:
    return getattr(function, "__qualname__", repr(function))


class Aftermath:
    """Calls the undos and callbacks of a transaction that has ended, in a separate task.

    The objects of the transaction are finished separately. However long the calls take, and even if
    they are cut off, nothing is sent to the store again.

    Args:
        callbacks: the callbacks of the transaction; each leaves its list when it was called.
        outcome: of the transaction.
        transaction: its id.
        context: in which to call; None for the context of the caller of `start`.

    Attributes:
        task: the task that calls them.
        notes: the undos that failed.
    """

    def __init__(
        self,
        callbacks: Callbacks,
        outcome: Outcome,
        transaction: str,
        context: Context | None = None,
    ) -> None:
        self.notes: list[str] = []
        self._callbacks = callbacks
        self._aborted = outcome is Outcome.ABORTED
        if not self._aborted:
            callbacks.undos[:] = callbacks.overdue
        self._transaction = transaction
        self._undoing = False
        self._cut = False
        self.task = asyncio.get_running_loop().create_task(self._run(), context=context)

    async def wait(self) -> None:
        """Wait for the end; if the wait is cancelled, the calls continue."""
        await asyncio.wait({self.task})

    def leave(self) -> list[str]:
        """Stop waiting: callbacks continue; the current undo is cut off and called again.

        Returns:
            what to report about it.
        """
        if self.task.done() or not self._callbacks.undos:
            return self.notes
        names = names_of(reversed(self._callbacks.undos))
        if self._undoing:
            self._begin_again()
        note = (
            f"Transaction {self._transaction} is not undone completely: not all steps were undone in time. "
            f"They are undone in the background while this process runs: {names}"
        )
        log_event(logging.WARNING, "%s", note, rule="P9", transaction=self._transaction)
        return [*self.notes, note]

    def skip(self) -> None:
        """Abandon the current call, and continue with the rest."""
        if self._undoing:
            name = _name_of(self._callbacks.undos.pop())
            message = "The undo of a step did not end in time and was abandoned: %s"
            log_event(logging.ERROR, message, name, rule="P9", transaction=self._transaction)
        self._begin_again()

    def cancel(self) -> None:
        """Abandon all remaining calls."""
        self.task.cancel()

    def _begin_again(self) -> None:
        self._cut = True
        self.task.cancel()

    async def _run(self) -> None:
        while True:
            try:
                self._undoing = True
                self.notes += await run_undos(self._callbacks.undos, self._transaction)
                self._undoing = False
                due = self._callbacks.on_rollback if self._aborted else self._callbacks.on_commit
                return await run_callbacks(due, self._transaction)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or not self._cut:
                    self._tell_lost()
                    raise
                task.uncancel()
                self._cut = self._undoing = False

    def _tell_lost(self) -> None:
        """Log the functions that will not be called, since the process ends."""
        due = self._callbacks.on_rollback if self._aborted else self._callbacks.on_commit
        left: list[Callback] = [*reversed(self._callbacks.undos), *due]
        names = names_of(left) or "nothing else"
        message = "The program ended while callbacks ran; not called: %s"
        log_event(logging.ERROR, message, names, rule="P9", transaction=self._transaction)


class Aftermaths:
    """The aftermaths in progress in an engine."""

    def __init__(self) -> None:
        self._under_way: set[Aftermath] = set()

    def start(
        self,
        callbacks: Callbacks,
        outcome: Outcome,
        transaction: str,
        context: Context | None = None,
    ) -> Aftermath:
        """Call the functions that are due for an outcome."""
        aftermath = Aftermath(callbacks, outcome, transaction, context)
        self._under_way.add(aftermath)
        aftermath.task.add_done_callback(lambda _: self._under_way.discard(aftermath))
        return aftermath

    async def aclose(self, grace: float) -> None:
        """Let the calls end; abandon those that take longer, so that others are still called.

        Args:
            grace: seconds to wait, twice at most.
        """
        for give_up in (Aftermath.skip, Aftermath.cancel):
            if not self._under_way:
                return
            await asyncio.wait({each.task for each in self._under_way}, timeout=grace)
            for each in list(self._under_way):
                give_up(each)
