"""A transaction: one unit of atomicity, from its first call to its settlement."""

from __future__ import annotations

import asyncio
import logging
import warnings
from collections.abc import Awaitable, Callable, Collection, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from fennflow import telemetry
from fennflow.backends import (
    Commit,
    Decision,
    JoinedTransaction,
    Outcome,
)
from fennflow.engine.block import Block
from fennflow.engine.callbacks import Callbacks
from fennflow.engine.concurrency import shielded
from fennflow.engine.deadline import Deadline
from fennflow.engine.directories import check_directories_again
from fennflow.engine.finish import Finisher
from fennflow.engine.jobs import HOOK_WAIT, DurableUndo
from fennflow.engine.leases import clock
from fennflow.engine.plan import changes_of, late_writes, plan_commit, undo
from fennflow.engine.recovery import LOCK_WAIT, Unsettled
from fennflow.exceptions import (
    CommitUncertainException,
    CompensationPendingWarning,
    ConfigException,
    KeyException,
    RecordLockedException,
    TransactionException,
    TransactionLostException,
    TransactionTimeoutException,
)
from fennflow.telemetry import log_event, with_notes

if TYPE_CHECKING:
    from fennflow.backends import Area
    from fennflow.engine.runtime import Engine
    from fennflow.reports import Change


def _cancel_again(task: asyncio.Task[Any], cancellation: asyncio.CancelledError) -> None:
    """Deliver a cancellation again at the next await, since it arrived during a commit (P21, I8).

    The commit succeeded, so the block must end without an exception, and the cancellation must not
    be lost. If its requester has withdrawn it meanwhile (`asyncio.timeout`), it is not delivered.
    """
    requests = task.cancelling()

    def cancel() -> None:
        if not task.done() and requests and task.cancelling() >= requests:
            task.uncancel()
            task.cancel(*cancellation.args)  # by which a scope of anyio's knows it again

    asyncio.get_running_loop().call_soon(cancel)


class _Wait:
    """How long the caller of a commit or a rollback still waits once it was cancelled.

    Args:
        seconds: in all.
        begun: whether it was cancelled before.
    """

    def __init__(self, seconds: float, *, begun: bool = False) -> None:
        self._seconds = seconds
        self._deadline: float | None = None
        if begun:
            self.left()

    @property
    def begun(self) -> bool:
        """Whether it was cancelled."""
        return self._deadline is not None

    def left(self) -> float:
        """Return the seconds that are left; they run from the first call."""
        now = asyncio.get_running_loop().time()
        if self._deadline is None:
            self._deadline = now + self._seconds
        return max(0.0, self._deadline - now)


class Session(Block):
    """What one `async with` block does; `commit` and `rollback` begin a new transaction.

    Args:
        engine: connector, backend and configuration.
        areas: that the repositories of the unit of work can see.
        joined: the user's transaction in which it commits, if it joined one.
        reconciled: areas that were reconciled for it.
        deadline: until when it may work.
    """

    def __init__(
        self,
        engine: Engine,
        areas: Sequence[Area],
        joined: JoinedTransaction | None = None,
        reconciled: Collection[Area] = (),
        deadline: Deadline | None = None,
    ) -> None:
        super().__init__(engine, areas, reconciled, deadline)
        self._joined = joined

    @override
    def close(self) -> None:
        super().close()
        if self._joined is not None:
            self._joined.close()

    async def commit(self) -> None:
        """Make all changes visible in one instant, or undo them and raise.

        Raises:
            ConflictException: `validate_reads`, and a record that was read has changed.
            TransactionLostException: the lease ran out; recovery undoes the transaction.
            CommitUncertainException: the outcome is unknown; recovery will commit or roll back.
            TransactionTimeoutException: its time is over.
            TransactionException: a file is still open for writing.
            Exception: what the backend raised; the transaction is undone.
        """
        wait = _Wait(self._grace)
        self._deadline.check()
        if self._being_written:
            message = (
                f"{', '.join(self._being_written)} cannot be committed, since it is still open for writing. "
                "Close it before the commit: with uow.files.open(path, 'wb') as file."
            )
            raise TransactionException(message)
        with self._exclusive():
            async with self._deadline.limit():
                await self._calls.wait()
            work, cancellation = await shielded(
                self._watched("commit", self._commit), grace=wait.left
            )
            error = self._cut_off(cancellation) if work.cancelled() else work.exception()
            cancellation = await self._call_back(error, wait, cancellation)
            cancellation = await self._call_hooks(wait, cancellation)
        self._tx = self._begin()
        if isinstance(error, CommitUncertainException) or (error and cancellation is None):
            raise error
        if cancellation is not None:
            current = asyncio.current_task()
            if error is not None or current is None:
                raise cancellation from error
            _cancel_again(current, cancellation)

    async def hold(self, expires_in: float | None) -> str:
        """Let another process decide, and begin a new transaction (P37).

        Args:
            expires_in: seconds after which it is undone; None for as long as it may commit.

        Returns:
            the transaction's id.

        Raises:
            ConfigException: it would be held for longer than `max_transaction_age`.
            TransactionException: it has nothing to hold, or what no other process can do.
            Exception: what the backend raised; the transaction is undone.
        """
        tx = self._open()
        self._check_can_be_held()
        longest = self._engine.config.max_transaction_age
        if expires_in is not None and not 0 < expires_in <= longest:
            message = f"expires_in={expires_in!a} is not in (0, max_transaction_age={longest} s]."
            raise ConfigException(message)
        wait = _Wait(self._grace)
        self._deadline.check()
        if self._being_written:
            message = (
                f"{', '.join(self._being_written)} cannot be committed, since it is still open for writing. "
                "Close it before the commit: with uow.files.open(path, 'wb') as file."
            )
            raise TransactionException(message)
        with self._exclusive():
            async with self._deadline.limit():
                await self._calls.wait()
            work, cancellation = await shielded(
                self._watched("hold", partial(self._hold, expires_in)), grace=wait.left
            )
            error = None if work.cancelled() else work.exception()
            if work.cancelled():
                late = TimeoutError(f"compensation_timeout={self._grace} s were not enough.")
                self._report_pending(cancellation, late)
            if tx.outcome is not None:
                cancellation = await self._call_back(error, wait, cancellation)
        self._tx = self._begin()
        current = asyncio.current_task()
        if cancellation is not None and (error or work.cancelled() or current is None):
            raise cancellation from error
        if error is not None:
            raise error
        if cancellation is not None and current is not None:
            _cancel_again(current, cancellation)
        return tx.transaction_id

    def _check_can_be_held(self) -> None:
        tx, message = self._tx, None
        durable = all(isinstance(each, DurableUndo) for each in tx.callbacks.undos)
        if self._joined is not None:
            message = (
                "A unit of work that joined a transaction cannot be held: commit that transaction."
            )
        elif not durable or tx.callbacks.on_commit or tx.callbacks.on_rollback:
            message = (
                "A unit of work with undos or callbacks that are not registered cannot be held: another "
                "process could not call them. Register them with UOW.compensation or UOW.after_commit."
            )
        elif tx.directories:
            message = (
                "A unit of work cannot be held on a store that is a file system: whether its "
                "directories are free is known only at the commit."
            )
        elif not (tx.journaled or tx.callbacks.hooks):
            message = "There is nothing to hold: this unit of work has changed nothing."
        if message is not None:
            raise TransactionException(message)

    async def _hold(self, expires_in: float | None) -> None:
        tx = self._tx
        try:
            await tx.begin()
            tx.release_failed()
            await tx.journal_released()
            tx.check_age()
            left = self._engine.config.max_transaction_age - (clock() - tx.began)
            seconds = left if expires_in is None else min(left, expires_in)
            await tx.backend.hold(tx.lease.token, self._plan(), seconds)
        except Exception as error:
            tx.failure = error
            await self._decide_and_undo(error)
            raise
        # Nothing more is sent for it from here.
        self._engine.leases.release(tx.lease)
        self._engine.recovery.jobs.disown(tx.callbacks.undos)
        self._engine.recovery.jobs.wake()

    def _plan(self) -> Commit:
        """Return what the pivot writes."""
        tx = self._tx
        planned = plan_commit(
            tx.transaction_id,
            {key: tx.chain(key) for key in tx.chains},
            tx.capabilities,
            tx.reads,
            keep_versions=self._engine.config.keep_versions,
        )
        return replace(planned, jobs=tx.hooks())

    def changes(self) -> list[Change]:
        """Return what the transaction would change."""
        tx = self._open()
        return changes_of(tx.chain(key) for key in tx.chains)

    async def free(self) -> None:
        """Wait until no other task commits or rolls back."""
        await self._free.wait()

    async def rollback(self, cause: BaseException | None = None, *, last: bool = False) -> None:
        """Undo all changes, even if the caller is cancelled meanwhile (P21).

        Calls that other tasks have under way are broken off.

        Args:
            cause: the exception that ended the block; what goes wrong is added to it as a note,
                else it is a CompensationPendingWarning.
            last: whether the block ends with it, whatever other tasks do.
        """
        cut_off = isinstance(cause, (asyncio.CancelledError, TransactionTimeoutException))
        wait = _Wait(self._grace, begun=cut_off)
        if last and not self._free.is_set():
            free, _ = await shielded(self.free(), grace=wait.left, grace_started=wait.begun)
            if free.cancelled():
                return  # what is under way ends the transaction
        with self._exclusive(last=last):
            self._tx.ended = True
            work, cancellation = await shielded(
                self._watched("rollback", partial(self._compensate, cause)),
                grace=wait.left,
                grace_started=wait.begun,
            )
            error = None if work.cancelled() else work.exception()
            if work.cancelled():
                late = TimeoutError(f"compensation_timeout={self._grace} s were not enough.")
                self._report_pending(cause or cancellation, late)
            cancellation = await self._call_back(cause or error, wait, cancellation, raises=True)
        self._tx = self._begin()
        if error is not None:
            raise error
        current = asyncio.current_task()
        if cancellation is None or isinstance(cause, asyncio.CancelledError):
            return
        if isinstance(cause, CommitUncertainException) and current is not None:
            # It must not hide that the work may be committed (I8).
            _cancel_again(current, cancellation)
        else:
            raise cancellation

    def check_ends_here(self) -> None:
        """Refuse to decide what the user's surrounding transaction decides, or what has ended.

        Raises:
            TransactionException: it does, or the session has ended.
        """
        self.check_not_ended()
        if self._joined is not None and self._joined.managed_by_caller:
            message = (
                "The transaction that this unit of work joined surrounds it, so its own block "
                "commits both or neither. Leave out commit(), rollback() and auto_commit=False, or "
                "join a session that has not begun."
            )
            raise TransactionException(message)

    @contextmanager
    def _exclusive(self, *, last: bool = False) -> Generator[None]:
        """Refuse calls while the transaction ends."""
        self.check_loop()
        message = None
        if not self._free.is_set():
            message = "This unit of work is being committed or rolled back already."
        elif self._calls.inside():
            message = (
                "commit() and rollback() cannot be called inside step() or the source of a stream, nor "
                "in a task that was started there."
            )
        elif self._savepoints and not last:
            message = (
                "commit() and rollback() cannot be called while a savepoint is open, in this task "
                "or in another one. Leave the savepoint first."
            )
        if message is not None:
            raise TransactionException(message)
        self._free.clear()
        try:
            yield
        finally:
            self._free.set()

    async def _watched(self, operation: str, work: Callable[[], Awaitable[None]]) -> None:
        with telemetry.operation(operation, self._tx.transaction_id):
            await work()

    async def _commit(self) -> None:
        """Pivot and apply; on return nothing can be undone any more."""
        tx, joined = self._tx, self._joined
        # A joined transaction decides for callbacks too, and for reads, which it may not see afresh.
        decides = joined is not None and (tx.reads or (joined.managed_by_caller and tx.callbacks))
        if not (tx.journaled or decides or tx.callbacks.hooks):
            await self._commit_nothing()
            return
        commit = self._plan()
        decision = Decision(
            outcome=Outcome.COMMITTED,
            finished=joined is None and not commit.steps,
            keys=tx.chains,
            steps=commit.steps,
        )
        try:
            tx.check_age()
            await check_directories_again(tx)
            if commit.jobs:
                await tx.begin()
            tx.release_failed()
            await tx.journal_released()
            await self._pivot(commit)
        except TransactionLostException:
            self._engine.leases.release(tx.lease)
            tx.outcome = Outcome.ABORTED  # P25: its objects are recovery's
            raise
        except Exception as error:
            if isinstance(error, (TransactionException, RecordLockedException, KeyException)):
                tx.failure = error
                await self._decide_and_undo(error)  # nothing of the pivot was written
                raise
            decision = await self._decide_aborted(error)
            tx.outcome, tx.failure = decision.outcome, error
            if decision.outcome is Outcome.ABORTED:
                await self._undo(decision, error)
                raise
        else:
            if joined is not None and not joined.ended:
                self._engine.recovery.add(self._undecided(joined))
                return
            tx.outcome = Outcome.COMMITTED
        try:
            await self._finish(decision)
        except Exception as error:  # noqa: BLE001 - P9: the commit stands
            self._leave_over(f"is committed and will be applied later: {with_notes(error)}")

    async def _finish(self, decision: Decision) -> None:
        left = self._unsettled()
        finisher = Finisher(self._engine, left.lease, progress=left.progress)
        await finisher.finish_decided(decision, left.undo, left.late_writes)

    def _cut_off(self, cancellation: BaseException | None) -> Exception | None:
        """Leave to recovery what a commit could not end in time, and return what to raise."""
        late = f"compensation_timeout={self._grace} s were not enough after a cancellation."
        if self._tx.outcome is Outcome.COMMITTED:
            self._leave_over(f"is committed and will be applied later: {late}")
            return None
        if self._tx.outcome is Outcome.ABORTED:
            self._report_pending(self._tx.failure or cancellation, TimeoutError(late))
            return self._tx.failure
        message = self._leave_over(
            f"commit outcome unknown: it did not end within compensation_timeout={self._grace} s "
            "after a cancellation. Recovery will either commit it or roll it back; read the files "
            "again before you retry."
        )
        uncertain = CommitUncertainException(message)
        uncertain.__cause__ = cancellation
        return uncertain

    async def _commit_nothing(self) -> None:
        """End a transaction that has changed nothing."""
        tx = self._tx
        try:
            await tx.check_reads()
            if self._joined is not None:
                await self._joined.commit(tx.lease.token, None)
        except Exception:
            tx.outcome = Outcome.ABORTED
            raise
        tx.outcome = Outcome.COMMITTED

    async def _pivot(self, commit: Commit) -> None:
        if self._joined is None:
            await self._tx.backend.commit(self._tx.lease.token, commit)
        else:
            await self._joined.commit(self._tx.lease.token, commit)

    async def _decide_aborted(self, error: Exception) -> Decision:
        """Learn what became of a pivot that failed, by deciding against it (P5)."""
        try:
            return await self._tx.backend.abort(self._tx.lease.token)
        except Exception as second:  # noqa: BLE001 - part of the exception's message
            message = self._leave_over(
                f"commit outcome unknown ({type(second).__name__}: {second}). Recovery will either "
                "commit it or roll it back; read the files again before you retry."
            )
            raise CommitUncertainException(message) from error

    async def _compensate(self, cause: BaseException | None) -> None:
        await self._calls.break_off(self._tx)
        if self._joined is not None:
            # First, since on SQLite it may hold the lock that the decision needs.
            try:
                await self._joined.rollback()
            except Exception as error:
                if cause is None:
                    await self._decide_and_undo(error)
                    raise
                refused = isinstance(error, TransactionException)
                failed = f"The joined transaction could not be rolled back: {error!r}"
                cause.add_note(str(error) if refused else failed)
        await self._decide_and_undo(cause)

    async def _decide_and_undo(self, cause: BaseException | None) -> None:
        if not self._tx.journaled:
            self._tx.outcome = Outcome.ABORTED
            return
        joined = self._joined
        # Who holds the decision, or on SQLite the file, may be who waits for this.
        surrounded = joined is not None and joined.managed_by_caller
        lock_wait = LOCK_WAIT if surrounded or isinstance(cause, RecordLockedException) else None
        try:
            decision = await self._tx.backend.abort(self._tx.lease.token, lock_wait=lock_wait)
        except Exception as error:  # noqa: BLE001 - reported by _report_pending
            if joined is not None and not joined.ended:
                self._engine.recovery.add(self._undecided(joined))
                return
            self._tx.outcome = Outcome.ABORTED  # in any case: it never tried to commit
            self._report_pending(cause, error)
        else:
            self._tx.outcome = Outcome.ABORTED
            await self._undo(decision, cause)

    async def _undo(self, decision: Decision, cause: BaseException | None) -> None:
        """Remove every trace of a transaction that is decided `aborted`."""
        try:
            await self._finish(decision)
        except Exception as error:  # noqa: BLE001 - reported by _report_pending
            self._report_pending(cause, error)

    async def _call_back(
        self,
        cause: BaseException | None,
        wait: _Wait,
        cancellation: asyncio.CancelledError | None,
        *,
        raises: bool = False,
    ) -> asyncio.CancelledError | None:
        """Undo the user's own steps, and call back; what takes longer than the wait goes on alone.

        Args:
            cause: what is to be raised; gets what went wrong as notes.
            wait: how long the caller still waits once it was cancelled.
            cancellation: that arrived before.
            raises: whether the caller raises the last cancellation, which then gets the notes.

        Returns:
            the last cancellation.
        """
        tx = self._tx
        if tx.outcome is None or not tx.callbacks:
            return cancellation  # recovery calls back when it knows the outcome
        if tx.outcome is Outcome.COMMITTED:
            self._engine.recovery.jobs.forget(tx.callbacks.undos)
        aftermath = self._engine.recovery.aftermaths.start(
            tx.callbacks, tx.outcome, tx.transaction_id
        )
        waiting, again = await shielded(aftermath.wait(), grace=wait.left, grace_started=wait.begun)
        if cause is None and raises:
            cause = again or cancellation
        for note in aftermath.leave() if waiting.cancelled() else aftermath.notes:
            if cause is None:
                warnings.warn(CompensationPendingWarning(note), stacklevel=2)
            else:
                cause.add_note(note)
        return again or cancellation

    async def _call_hooks(
        self, wait: _Wait, cancellation: asyncio.CancelledError | None
    ) -> asyncio.CancelledError | None:
        """Call the hooks of a commit (P36); what takes longer than a moment goes on alone.

        Returns:
            the last cancellation.
        """
        if self._tx.outcome is not Outcome.COMMITTED or not self._tx.callbacks.hooks:
            return cancellation
        calls = self._engine.recovery.jobs.begin(self._tx.transaction_id)
        limit = HOOK_WAIT if cancellation is None else min(HOOK_WAIT, wait.left())
        try:
            await asyncio.wait({calls}, timeout=limit)
        except asyncio.CancelledError as error:
            return error
        return cancellation

    def _report_pending(self, cause: BaseException | None, error: Exception) -> None:
        note = self._leave_over(
            f"is not undone completely: {type(error).__name__}: {with_notes(error)} No reader of "
            "FennFlow sees any of it, and the rest will be removed later."
        )
        if cause is None:
            warnings.warn(CompensationPendingWarning(note), stacklevel=2)
        else:
            cause.add_note(note)

    def _leave_over(self, text: str) -> str:
        """Leave the transaction to a later attempt (P9), log why, and return what was logged."""
        self._engine.recovery.add(self._unsettled())
        message = f"Transaction {self._tx.transaction_id} {text}"
        log_event(logging.WARNING, "%s", message, rule="P9", transaction=self._tx.transaction_id)
        return message

    def _unsettled(self) -> Unsettled:
        tx = self._tx
        writes = list(tx.writes.values())
        return Unsettled(
            lease=tx.lease,
            undo=undo(tx.transaction_id, writes, tx.capabilities),
            late_writes=late_writes(tx.transaction_id, writes),
            # Once the outcome is known here they are called from here.
            callbacks=tx.callbacks if tx.outcome is None else Callbacks(),
            progress=tx.progress,
        )

    def _undecided(self, joined: JoinedTransaction) -> Unsettled:
        """Return what is left to do once the user's own block has ended the transaction."""
        return replace(self._unsettled(), joined=joined)
