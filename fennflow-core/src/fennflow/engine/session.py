"""A session: one unit of atomicity, from its first call to its settlement."""

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

from fennflow.backends import Commit, JoinedTransaction, Outcome, Step, conflict
from fennflow.engine import telemetry
from fennflow.engine.block import Block
from fennflow.engine.callbacks import Callbacks, run_callbacks, run_undos
from fennflow.engine.concurrency import shielded
from fennflow.engine.plan import plan_commit, tombstones, undo
from fennflow.engine.recovery import PATIENCE, Unsettled
from fennflow.engine.settle import Settler
from fennflow.engine.telemetry import tell
from fennflow.exceptions import (
    CommitUncertainException,
    CompensationPendingWarning,
    SessionLostException,
    TransactionException,
)

if TYPE_CHECKING:
    from fennflow.engine.runtime import Engine


def _cancel_again(task: asyncio.Task[Any], cancellation: asyncio.CancelledError) -> None:
    """Cancel a task at its next await, since its cancellation could not be minded (P21, I8).

    It arrived during a commit which then succeeded: the block must end without an exception, and
    the cancellation must not be lost. By the time the loop gets here, whoever asked for it and has
    taken it back since (`asyncio.timeout`) has done so.
    """
    requests = task.cancelling()

    def cancel() -> None:
        if not task.done() and requests and task.cancelling() >= requests:
            task.uncancel()
            task.cancel(*cancellation.args)  # by which a scope of anyio's knows it again

    asyncio.get_running_loop().call_soon(cancel)


class Session(Block):
    """What one `async with` block does; `commit` and `rollback` begin a new transaction.

    Args:
        engine: connector, backend and configuration.
        joined: the user's transaction in which it commits, if it joined one.
        reconciled: namespaces that were reconciled for it.
    """

    def __init__(
        self,
        engine: Engine,
        joined: JoinedTransaction | None = None,
        reconciled: Collection[str] = (),
    ) -> None:
        super().__init__(engine, reconciled)
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
            SessionLostException: the lease ran out; recovery undoes the session.
            CommitUncertainException: the outcome could not be learnt; recovery settles it.
            Exception: what the backend raised; the session is undone.
        """
        with self._exclusive():
            await self._calls.wait()
            work, cancellation = await shielded(
                self._watched("commit", self._commit), grace=lambda: self._grace
            )
        if work.cancelled():
            message = self._leave_over(
                f"did not end its commit within compensation_timeout={self._grace} s after a "
                "cancellation; it will be settled one way. Read the objects again before you "
                "repeat the work."
            )
            self._tx = self._begin()
            raise CommitUncertainException(message) from cancellation
        self._tx = self._begin()
        error = work.exception()
        if isinstance(error, CommitUncertainException) or (error and cancellation is None):
            raise error
        if cancellation is not None:
            current = asyncio.current_task()
            if error is not None or current is None:
                raise cancellation from error
            _cancel_again(current, cancellation)

    async def free(self) -> None:
        """Wait until no other task commits or rolls back."""
        await self._free.wait()

    async def rollback(self, cause: BaseException | None = None, *, last: bool = False) -> None:
        """Undo all changes, whoever is cancelled meanwhile (P21).

        Calls that other tasks have under way are broken off.

        Args:
            cause: the exception that ended the block; what goes wrong is added to it as a note,
                else it is a CompensationPendingWarning.
            last: whether the block ends with it, whatever other tasks do.
        """
        if last and not self._free.is_set():
            free, _ = await shielded(
                self.free(),
                grace=lambda: self._grace,
                hurry=isinstance(cause, asyncio.CancelledError),
            )
            if free.cancelled():
                return  # what is under way ends the transaction
        with self._exclusive(last=last):
            self._tx.ended = True
            work, cancellation = await shielded(
                self._watched("rollback", partial(self._compensate, cause)),
                grace=lambda: self._grace,
                hurry=isinstance(cause, asyncio.CancelledError),
            )
            if work.cancelled():
                late = TimeoutError(f"compensation_timeout={self._grace} s were not enough.")
                self._tell_pending(cause or cancellation, late)
            else:
                work.result()
        self._tx = self._begin()
        current = asyncio.current_task()
        if cancellation is None or isinstance(cause, asyncio.CancelledError):
            return
        if isinstance(cause, CommitUncertainException) and current is not None:
            _cancel_again(
                current, cancellation
            )  # it must not hide that the work may be committed (I8)
        else:
            raise cancellation

    def check_ends_here(self) -> None:
        """Refuse to decide what the user's surrounding transaction decides.

        Raises:
            TransactionException: it does.
        """
        if self._joined is not None and self._joined.surrounds:
            message = (
                "The transaction that this unit of work joined surrounds it, so its own block "
                "commits both or neither. Leave out commit(), rollback() and auto_commit=False, or "
                "join a session that has not begun."
            )
            raise TransactionException(message)

    @contextmanager
    def _exclusive(self, *, last: bool = False) -> Generator[None]:
        """Refuse calls while the session ends."""
        self.check_loop()
        message = None
        if not self._free.is_set():
            message = "This unit of work is being committed or rolled back already."
        elif self._calls.inside():
            message = "Inside step() there is no commit() or rollback()."
        elif self._savepoints and not last:
            message = (
                "While a savepoint is open, in this task or in another one, there is no commit() "
                "or rollback(). Leave it first."
            )
        if message is not None:
            raise TransactionException(message)
        self._free.clear()
        try:
            yield
        finally:
            self._free.set()

    async def _watched(self, operation: str, work: Callable[[], Awaitable[None]]) -> None:
        with telemetry.operation(operation, self._tx.session_id):
            await work()

    async def _commit(self) -> None:
        """Pivot and apply; on return nothing can be undone any more."""
        tx, joined = self._tx, self._joined
        # A joined transaction decides for callbacks too, and for reads, which it may not see anew.
        decides = joined is not None and (tx.reads or (joined.surrounds and tx.callbacks))
        if not (tx.journaled or decides):
            await self._commit_nothing()
            return
        commit = plan_commit(
            tx.session_id,
            {key: tx.chain(key) for key in tx.chains},
            tx.capabilities,
            tx.reads,
            keep_versions=self._engine.config.keep_versions,
        )
        steps: Sequence[Step] = commit.steps
        uncertain = False
        try:
            tx.check_age()
            await self._pivot(commit)
        except SessionLostException as error:
            self._engine.leases.release(tx.lease)
            await self._fail(error)  # P25: its objects are recovery's
            raise
        except Exception as error:
            if isinstance(error, TransactionException):
                await self._decide_and_undo(error)  # refused before anything was written
                raise
            outcome, steps = await self._decide_aborted(error)
            if outcome is Outcome.ABORTED:
                await self._undo(error)
                raise
            uncertain = True
        if joined is not None and not joined.ended:
            self._engine.recovery.add(self._undecided(joined))
            return
        if steps or uncertain or joined is not None:
            try:
                await self._settler().settle(steps)
            except Exception as error:  # noqa: BLE001 - P9: the commit stands
                self._leave_over(f"is committed, and will be applied later: {error}")
        else:
            self._engine.leases.release(tx.lease)
        await run_callbacks(tx.callbacks.on_commit, tx.session_id)

    async def _commit_nothing(self) -> None:
        """End a transaction that has changed nothing."""
        tx = self._tx
        try:
            await self._validate_reads()
            if self._joined is not None:
                await self._joined.commit(tx.lease.token, None)
        except Exception as error:
            await self._fail(error)
            raise
        await run_callbacks(tx.callbacks.on_commit, tx.session_id)

    async def _pivot(self, commit: Commit) -> None:
        if self._joined is None:
            await self._tx.backend.commit(self._tx.lease.token, commit)
        else:
            await self._joined.commit(self._tx.lease.token, commit)

    async def _validate_reads(self) -> None:
        if not self._tx.reads:
            return
        now = await self._tx.backend.records(set(self._tx.reads))
        changed = [key for key, record in self._tx.reads.items() if now.get(key) != record]
        if changed:
            raise conflict(changed)

    async def _decide_aborted(self, error: Exception) -> tuple[Outcome, Sequence[Step]]:
        """Learn what became of a pivot that failed, by deciding against it (P5)."""
        try:
            return await self._tx.backend.abort(self._tx.lease.token)
        except Exception as second:  # noqa: BLE001 - told with the exception
            message = self._leave_over(
                f"may or may not have committed, which could not be learnt: "
                f"{type(second).__name__}: {second}. It will be settled one way; read the objects "
                "again before you repeat the work."
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
            await self._fail(cause)
            return
        joined = self._joined
        surrounded = joined is not None and joined.surrounds
        patience = PATIENCE if surrounded else None
        try:
            await self._tx.backend.abort(self._tx.lease.token, patience=patience)
        except Exception as error:  # noqa: BLE001 - told by _tell_pending
            if joined is not None and not joined.ended:
                self._engine.recovery.add(self._undecided(joined))
                return
            self._tell_pending(cause, error)
            await self._fail(cause)
        else:
            await self._undo(cause)

    async def _undo(self, cause: BaseException | None) -> None:
        """Remove every trace of a session that is decided `aborted`."""
        left = self._unsettled()
        try:
            await self._settler().settle(left.undo, left.tombstones)
        except Exception as error:  # noqa: BLE001 - told by _tell_pending
            self._tell_pending(cause, error)
        await self._fail(cause)

    async def _fail(self, cause: BaseException | None) -> None:
        """Undo the user's own steps, and call back."""
        for note in await run_undos(self._tx.callbacks.undos, self._tx.session_id):
            if cause is None:
                warnings.warn(CompensationPendingWarning(note), stacklevel=2)
            else:
                cause.add_note(note)
        await run_callbacks(self._tx.callbacks.on_rollback, self._tx.session_id)

    def _tell_pending(self, cause: BaseException | None, error: Exception) -> None:
        note = self._leave_over(
            f"is not undone completely: {type(error).__name__}: {error} No reader of FennFlow "
            "sees any of it, and the rest will be removed later."
        )
        if cause is None:
            warnings.warn(CompensationPendingWarning(note), stacklevel=2)
        else:
            cause.add_note(note)

    def _leave_over(self, text: str) -> str:
        """Leave the session to a later attempt (P9), log why, and return what was logged."""
        self._engine.recovery.add(self._unsettled())
        message = f"Session {self._tx.session_id} {text}"
        tell(logging.WARNING, "%s", message, rule="P9", session=self._tx.session_id)
        return message

    def _unsettled(self) -> Unsettled:
        session_id = self._tx.session_id
        writes = list(self._tx.writes.values())
        return Unsettled(
            lease=self._tx.lease,
            undo=undo(writes, self._tx.capabilities),
            tombstones=tombstones(session_id, writes),
            callbacks=Callbacks(undos=self._tx.callbacks.undos),
            in_doubt=self._tx.in_doubt,
        )

    def _undecided(self, joined: JoinedTransaction) -> Unsettled:
        """Return what is left to do once the user's own block has ended the transaction."""
        return replace(self._unsettled(), callbacks=self._tx.callbacks, joined=joined)

    def _settler(self) -> Settler:
        return Settler(self._engine, self._tx.lease, in_doubt=self._tx.in_doubt)
