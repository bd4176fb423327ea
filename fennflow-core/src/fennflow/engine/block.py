"""What happens inside a block: calls, steps of the user's own, savepoints, in one task or several."""

from __future__ import annotations

import asyncio
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Collection,
    Generator,
    Sequence,
)
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, TypeVar

from fennflow import telemetry
from fennflow.backends import Outcome
from fennflow.engine.callbacks import Callbacks, Hook, Undo, names_of, result_of, run_undos
from fennflow.engine.concurrency import Calls, shielded
from fennflow.engine.deadline import Deadline
from fennflow.engine.transaction import Scope, Transaction, rolled_back
from fennflow.exceptions import (
    StepNotDoneException,
    TransactionException,
    TransactionTimeoutException,
)
from fennflow.jobs import JobCall

if TYPE_CHECKING:
    from fennflow.backends import Area
    from fennflow.engine.runtime import Engine

T = TypeVar("T")


class Block:
    """What one `async with` block does until it is committed or rolled back.

    Args:
        engine: connector, backend and configuration.
        areas: that the repositories of the unit of work can see.
        reconciled: those of them that were reconciled for it.
        deadline: until when it may work.
    """

    def __init__(
        self,
        engine: Engine,
        areas: Sequence[Area],
        reconciled: Collection[Area] = (),
        deadline: Deadline | None = None,
    ) -> None:
        self._engine = engine
        self._areas = areas
        self._deadline = deadline or Deadline(None)
        self._reconciled = set(reconciled)
        self._tx = self._begin()
        self._loop = asyncio.get_running_loop()
        self._calls = Calls()
        self._savepoints = 0
        self._being_written: list[str] = []
        self._closed = False
        self._free = asyncio.Event()
        self._free.set()

    def _begin(self) -> Transaction:
        return Transaction(self._engine, self._areas, self._reconciled)

    @asynccontextmanager
    async def call(self, operation: str, namespace: str) -> AsyncGenerator[Transaction]:
        """Guard a call: the session is open, and does not end before the call has.

        Args:
            operation: what it does, for those who watch.
            namespace: the bucket.

        Raises:
            TransactionException: the session has ended, or is ending.
        """
        tx = self._open()
        with (
            self._calls.call([tx, *tx.scopes()], rolled_back),
            telemetry.operation(operation, tx.transaction_id, namespace),
        ):
            yield tx

    def _open(self) -> Transaction:
        """Return the transaction that is open.

        Raises:
            TransactionException: the session has ended, or is ending, or is another loop's.
        """
        self.check_loop()
        self.check_not_ended()
        if not self._free.is_set():
            message = (
                "This unit of work is being committed or rolled back. Use it inside its own async "
                "with block."
            )
            raise TransactionException(message)
        return self._tx

    @contextmanager
    def writes(self, name: str) -> Generator[None]:
        """Let the block be a call whose bytes the caller hands on: a commit would wait for it, and for ever."""
        self._being_written.append(name)
        try:
            yield
        finally:
            self._being_written.remove(name)

    def check_not_ended(self) -> None:
        """Refuse to begin, commit or undo anything after the end of the block.

        Raises:
            TransactionException: the session has ended.
        """
        if self._closed:
            message = "This unit of work has ended. Use it inside its own async with block."
            raise TransactionException(message)

    def check_loop(self) -> None:
        """Refuse to be used by another event loop than the one that opened it.

        Raises:
            TransactionException: the running loop is another one.
        """
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is not self._loop:
            message = (
                "This unit of work was opened in another event loop. Open one in each loop, and "
                "use it there only."
            )
            raise TransactionException(message)

    def register(self) -> list[Callbacks]:
        """Return where a callback of the caller's belongs.

        Raises:
            TransactionException: the session has ended, or is ending.
        """
        return self._open().register()

    def add_hook(self, hook: Hook) -> None:
        """Remember what is called after the commit, by this process or another one (P36).

        Raises:
            ConfigException: the backend cannot journal it, it is a compensation, or it was registered
                for another unit of work.
        """
        tx = self._open()
        tx.check_can_be_journaled(hook.call, Outcome.COMMITTED)
        for each in tx.register():
            each.hooks.append(hook)

    async def step(self, do: Callable[[], Awaitable[T]], undo: Undo | JobCall) -> T:
        """Do a saga step of the user's own, and remember how it is undone."""
        tx = self._open()
        places = tx.register()
        with self._calls.call([tx, *tx.scopes()], rolled_back):
            if isinstance(undo, JobCall):
                return await self._durable_step(tx, places, do, undo)
            try:
                async with self._deadline.limit():
                    result = await result_of(do)
            except (asyncio.CancelledError, TransactionTimeoutException):
                # If it is cut off it may still have taken effect, so it counts as done, like a write (P19).
                for each in places:
                    each.undos.append(undo)
                raise
            for each in places:
                each.undos.append(undo)
            return result

    async def _durable_step(
        self,
        tx: Transaction,
        places: Sequence[Callbacks],
        do: Callable[[], Awaitable[T]],
        call: JobCall,
    ) -> T:
        """Do a step whose undo is in the journal before it begins (P33)."""
        jobs = self._engine.recovery.jobs
        undo = jobs.own(await tx.journal_compensation(call))
        for each in places:
            each.undos.append(undo)
        try:
            async with self._deadline.limit():
                result = await result_of(do)
            tx.lease.check()
        except StepNotDoneException:
            for each in places:
                each.undos.remove(undo)
            await jobs.remove(undo)
            raise
        except BaseException:
            # Whatever it raises, it may have taken effect before.
            undo.failed = True
            if not tx.lease.held:
                await jobs.journal_again(undo.job)
            raise
        return result

    @asynccontextmanager
    async def savepoint(self) -> AsyncGenerator[None]:
        """Undo what the block did, and nothing else, if an exception leaves it.

        Raises:
            TransactionException: the session has ended, or is ending.
        """
        tx = self._open()
        around = tx.register()
        self._savepoints += 1
        with tx.scope() as scope:
            try:
                yield
            except BaseException as cause:
                cancellation = await self._undo_scope(tx, scope, around, cause)
                if cancellation is not None and not isinstance(cause, asyncio.CancelledError):
                    raise cancellation from cause
                raise
            finally:
                self._savepoints -= 1

    async def _undo_scope(
        self, tx: Transaction, scope: Scope, around: Sequence[Callbacks], cause: BaseException
    ) -> asyncio.CancelledError | None:
        """Take back what a savepoint did, and return the cancellation that arrived meanwhile."""
        scope.undone = True
        _, cancellation = await shielded(self._calls.break_off(scope), grace=lambda: self._grace)
        if tx.ended:
            return cancellation  # all of it is taken back
        undos = tx.rewind(scope)
        tx.release(undos)
        work, again = await shielded(
            self._undo_steps(tx, undos),
            grace=lambda: self._grace,
            grace_started=cancellation is not None or isinstance(cause, asyncio.CancelledError),
        )
        for note in [] if work.cancelled() else work.result():
            cause.add_note(note)
        if undos:
            cause.add_note(
                "Not all steps of the savepoint were undone in time. They are undone when the unit "
                f"of work ends, however it does: {names_of(reversed(undos))}"
            )
        for each in around:
            each.undos += undos
            each.overdue += undos
        return again or cancellation

    async def _undo_steps(self, tx: Transaction, undos: list[Undo]) -> list[str]:
        try:
            await tx.journal_released()
        except Exception as error:  # noqa: BLE001 - tried again before the pivot
            notes = [f"It is not in the journal yet that steps are undone: {error}"]
        else:
            notes = []
        return notes + await run_undos(undos, tx.transaction_id)

    def close(self) -> None:
        """Refuse all further calls."""
        self._closed = True

    @property
    def _grace(self) -> float:
        return self._engine.config.compensation_timeout
