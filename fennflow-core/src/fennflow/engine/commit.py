"""How a transaction ends: it is committed, rolled back, or held for another process to decide.

`next_step` has all cases of a commit, and `Ending` carries out what it returns. `finish.py` sends the object
requests that follow a decision. Work that cannot be finished now is left to `recovery.py`.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Literal

from fennflow import telemetry
from fennflow.backends import Commit, Decision, Outcome
from fennflow.engine.callbacks import Callbacks
from fennflow.engine.directories import check_directories_again
from fennflow.engine.finish import Finisher
from fennflow.engine.leases import clock
from fennflow.engine.plan import late_writes, plan_commit, plan_compensation
from fennflow.engine.recovery import LOCK_WAIT, Unsettled
from fennflow.exceptions import (
    CommitUncertainException,
    CompensationPendingWarning,
    KeyException,
    RecordLockedException,
    TransactionException,
    TransactionLostException,
)
from fennflow.telemetry import log_event, with_notes

if TYPE_CHECKING:
    from fennflow.backends import JoinedTransaction
    from fennflow.engine.concurrency import Calls
    from fennflow.engine.runtime import Engine
    from fennflow.engine.transaction import Transaction

NOTHING_WRITTEN = (TransactionException, RecordLockedException, KeyException)
"""Errors of a pivot that was refused before it changed anything."""


class Next(Enum):
    """What a commit does next."""

    END = "nothing is to be written: check what was read, and end the joined transaction"
    PIVOT = "write the pivot"
    APPLY = "it is committed: perform the steps that the pivot has stored"
    WAIT = "the user's transaction holds the pivot, and recovery continues when that has ended"
    ASK = "the pivot may have been written: decide `aborted`, unless it is committed"
    ROLL_BACK = "the pivot was not written: decide `aborted`, and undo"
    UNDO = "it is decided `aborted`: undo"
    LEAVE = "another owner has taken over the transaction and its objects"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is known of a commit.

    Args:
        journaled: whether the journal has, or may have, rows of the transaction.
        hooks: whether it has calls to journal.
        callbacks: whether it has callbacks, or undos of steps.
        reads: whether it has reads to validate.
        joined: the kind of user transaction in which it commits: none, one that ends with the unit
            of work, or one that surrounds it.
        ended: whether that transaction has ended.
        sent: whether the pivot was sent.
        error: the exception of the pivot, if it failed.
        outcome: the outcome that the backend has returned since, if it was asked.
    """

    journaled: bool = False
    hooks: bool = False
    callbacks: bool = False
    reads: bool = False
    joined: Literal["none", "inside", "surrounding"] = "none"
    ended: bool = False
    sent: bool = False
    error: Exception | None = None
    outcome: Outcome | None = None


def next_step(case: Case) -> Next:
    """Return what a commit does next (P4, P5): pure, so that a test has the table of all cases."""
    if not case.sent:
        # A joined transaction also decides about callbacks and reads; it may not see new values.
        surrounds = case.joined == "surrounding"
        decides = (case.joined != "none" and case.reads) or (surrounds and case.callbacks)
        return Next.PIVOT if case.journaled or case.hooks or decides else Next.END
    if case.error is None:
        return Next.APPLY if case.joined == "none" or case.ended else Next.WAIT
    if isinstance(case.error, TransactionLostException):
        return Next.LEAVE
    if isinstance(case.error, NOTHING_WRITTEN):
        return Next.ROLL_BACK
    after = {None: Next.ASK, Outcome.COMMITTED: Next.APPLY, Outcome.ABORTED: Next.UNDO}
    return after[case.outcome]


@dataclass(frozen=True, slots=True)
class Ending:
    """The end of one transaction.

    Args:
        engine: connector, backend and configuration.
        tx: the transaction.
        joined: the user's transaction in which it commits, if it joined one.
    """

    engine: Engine
    tx: Transaction
    joined: JoinedTransaction | None

    async def commit(self) -> None:
        """Pivot and apply; on return nothing can be undone any more.

        Raises:
            CommitUncertainException: the outcome is unknown.
            Exception: what the pivot failed with; the transaction is not committed.
        """
        with telemetry.operation("commit", self.tx.transaction_id):
            case = self._case()
            if next_step(case) is Next.END:
                await self._end()
                return
            commit = self._plan()
            decision = Decision(
                outcome=Outcome.COMMITTED,
                finished=self.joined is None and not commit.steps,
                keys=self.tx.chains,
                steps=commit.steps,
            )
            error: Exception | None = None
            try:
                await self._pivot(commit)
            except Exception as failed:  # noqa: BLE001 - raised below unless it is committed
                error = failed
            ended = self.joined is not None and self.joined.ended
            case = replace(case, sent=True, error=error, ended=ended)
            if error is not None and next_step(case) is Next.ASK:
                decision = await self._ask(error)
                case = replace(case, outcome=decision.outcome)
            step = next_step(case)
            await self._go_on(step, decision, error)
            if error is not None and step is not Next.APPLY:
                raise error

    def _case(self) -> Case:
        tx, joined = self.tx, self.joined
        surrounds = joined is not None and joined.managed_by_caller
        return Case(
            journaled=tx.journaled,
            hooks=bool(tx.callbacks.hooks),
            callbacks=bool(tx.callbacks),
            reads=bool(tx.reads),
            joined="none" if joined is None else "surrounding" if surrounds else "inside",
        )

    async def _end(self) -> None:
        """End a transaction that has changed nothing."""
        try:
            await self.tx.check_reads()
            if self.joined is not None:
                await self.joined.commit(self.tx.lease.token, None)
        except Exception:
            self.tx.outcome = Outcome.ABORTED
            raise
        self.tx.outcome = Outcome.COMMITTED

    def _plan(self) -> Commit:
        """Return what the pivot writes."""
        tx = self.tx
        planned = plan_commit(
            tx.transaction_id,
            {key: tx.chain(key) for key in tx.chains},
            tx.capabilities,
            tx.reads,
            keep_versions=tx.config.keep_versions,
        )
        return replace(planned, jobs=tx.hooks())

    async def _pivot(self, commit: Commit) -> None:
        tx = self.tx
        tx.check_age()
        await check_directories_again(tx)
        if commit.jobs:
            await tx.begin()
        tx.release_failed()
        await tx.journal_released()
        pivot = tx.backend if self.joined is None else self.joined
        await pivot.commit(tx.lease.token, commit)

    async def _ask(self, error: Exception) -> Decision:
        """Find out the outcome of a failed pivot, by deciding `aborted` (P5)."""
        try:
            decision = await self.tx.backend.abort(self.tx.lease.token)
        except Exception as second:  # noqa: BLE001 - part of the exception's message
            message = self._leave_over(
                f"commit outcome unknown ({type(second).__name__}: {second}). Recovery will either "
                "commit it or roll it back; read the files again before you retry."
            )
            raise CommitUncertainException(message) from error
        self.tx.outcome, self.tx.failure = decision.outcome, error
        return decision

    async def _go_on(self, step: Next, decision: Decision, error: Exception | None) -> None:
        """Do what comes after the pivot."""
        tx = self.tx
        if step is Next.APPLY:
            tx.outcome = Outcome.COMMITTED
            try:
                await self._finish(decision)
            except Exception as left:  # noqa: BLE001 - P9: the commit stands
                self._leave_over(f"is committed and will be applied later: {with_notes(left)}")
        elif step is Next.WAIT:
            self._wait_for_joined()
        elif step is Next.LEAVE:
            self.engine.leases.release(tx.lease)
            tx.outcome = Outcome.ABORTED  # P25: its objects belong to recovery
        elif step is Next.ROLL_BACK:
            tx.failure = error
            await self._decide_and_undo(error)
        else:
            await self._undo(decision, error)

    async def hold(self, expires_in: float | None) -> None:
        """Let another process decide (P37).

        Args:
            expires_in: seconds after which it is undone; None for as long as it may commit.

        Raises:
            Exception: what the backend raised; the transaction is undone.
        """
        tx = self.tx
        with telemetry.operation("hold", tx.transaction_id):
            try:
                await tx.begin()
                tx.release_failed()
                await tx.journal_released()
                tx.check_age()
                left = tx.config.max_transaction_age - (clock() - tx.began)
                seconds = left if expires_in is None else min(left, expires_in)
                await tx.backend.hold(tx.lease.token, self._plan(), seconds)
            except Exception as error:
                tx.failure = error
                await self._decide_and_undo(error)
                raise
            # From here on nothing more is sent for it.
            self.engine.leases.release(tx.lease)
            message = (
                "Transaction %s is held: its paths stay locked until it is committed or undone, for "
                "%.0f s at most"
            )
            transaction = tx.transaction_id
            log_event(
                logging.INFO, message, transaction, seconds, rule="P37", transaction=transaction
            )
            self.engine.recovery.jobs.disown(tx.callbacks.undos)
            self.engine.recovery.jobs.wake()

    async def roll_back(self, cause: BaseException | None, calls: Calls) -> None:
        """Undo all changes; report those that cannot be undone now, which are undone later.

        Args:
            cause: the exception that ended the block; errors are added to it as notes.
            calls: the calls of the session; those of the transaction are interrupted.

        Raises:
            Exception: there is no cause, and rolling back the joined transaction failed.
        """
        with telemetry.operation("rollback", self.tx.transaction_id):
            await calls.break_off(self.tx)
            if self.joined is not None:
                # This comes first, since on SQLite it may hold the lock that the decision needs.
                try:
                    await self.joined.rollback()
                except Exception as error:
                    if cause is None:
                        await self._decide_and_undo(error)
                        raise
                    refused = isinstance(error, TransactionException)
                    failed = f"The joined transaction could not be rolled back: {error!r}"
                    cause.add_note(str(error) if refused else failed)
            await self._decide_and_undo(cause)

    async def _decide_and_undo(self, cause: BaseException | None) -> None:
        tx, joined = self.tx, self.joined
        if not tx.journaled:
            tx.outcome = Outcome.ABORTED
            return
        # The caller that waits for this may itself hold the decision or, on SQLite, the file's
        # lock.
        surrounded = joined is not None and joined.managed_by_caller
        lock_wait = LOCK_WAIT if surrounded or isinstance(cause, RecordLockedException) else None
        try:
            decision = await tx.backend.abort(tx.lease.token, lock_wait=lock_wait)
        except Exception as error:  # noqa: BLE001 - reported by report_pending
            if joined is not None and not joined.ended:
                self._wait_for_joined()
                return
            tx.outcome = Outcome.ABORTED  # in any case: it never tried to commit
            self.report_pending(cause, error)
        else:
            tx.outcome = Outcome.ABORTED
            await self._undo(decision, cause)

    async def _undo(self, decision: Decision, cause: BaseException | None) -> None:
        """Remove every trace of a transaction that is decided `aborted`."""
        try:
            await self._finish(decision)
        except Exception as error:  # noqa: BLE001 - reported by report_pending
            self.report_pending(cause, error)

    async def _finish(self, decision: Decision) -> None:
        left = self._unsettled()
        finisher = Finisher(self.engine, left.lease, progress=left.progress)
        await finisher.finish_decided(decision, left.undo, left.late_writes)

    def cut_off(self, cancellation: BaseException | None) -> Exception | None:
        """Leave a commit that did not end in time to recovery, and return the exception to raise."""
        limit = f"compensation_timeout={self.tx.config.compensation_timeout} s"
        late = f"{limit} were not enough after a cancellation."
        if self.tx.outcome is Outcome.COMMITTED:
            self._leave_over(f"is committed and will be applied later: {late}")
            return None
        if self.tx.outcome is Outcome.ABORTED:
            self.report_pending(self.tx.failure or cancellation, TimeoutError(late))
            return self.tx.failure
        message = self._leave_over(
            f"commit outcome unknown: it did not end within {limit} after a cancellation. Recovery "
            "will either commit it or roll it back; read the files again before you retry."
        )
        uncertain = CommitUncertainException(message)
        uncertain.__cause__ = cancellation
        return uncertain

    def report_pending(self, cause: BaseException | None, error: Exception) -> None:
        """Leave to recovery what could not be undone: a note on the cause or a warning says so."""
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
        self.engine.recovery.add(self._unsettled())
        message = f"Transaction {self.tx.transaction_id} {text}"
        log_event(logging.WARNING, "%s", message, rule="P9", transaction=self.tx.transaction_id)
        return message

    def _wait_for_joined(self) -> None:
        """Leave the work after the end of the user's transaction to recovery."""
        self.engine.recovery.add(replace(self._unsettled(), joined=self.joined))

    def _unsettled(self) -> Unsettled:
        tx = self.tx
        writes = list(tx.writes.values())
        return Unsettled(
            lease=tx.lease,
            undo=plan_compensation(tx.transaction_id, writes, tx.capabilities),
            late_writes=late_writes(tx.transaction_id, writes),
            # Once this process knows the outcome, it calls them itself.
            callbacks=tx.callbacks if tx.outcome is None else Callbacks(),
            progress=tx.progress,
        )
