"""Recovery: finishes or rolls back transactions that their owners could not finish (P24, P26).

Transactions of this process that could not be finished at their end are kept here with all that is
known about them. Their leases are held until store and backend respond again (P9). Transactions of
processes that died are claimed when their lease has expired (P24), and finished from the journal.
"""

from __future__ import annotations

import asyncio
import logging
import warnings
from collections.abc import Collection, Coroutine, Mapping, Sequence
from contextvars import Context, copy_context
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from fennflow.backends import (
    Commit,
    JoinedTransaction,
    JournaledTransaction,
    LateWrite,
    Outcome,
    Placement,
    Step,
)
from fennflow.connectors import Capabilities
from fennflow.engine.callbacks import Aftermaths, Callbacks
from fennflow.engine.concurrency import Periodic, cancel_again, shielded
from fennflow.engine.context import EngineContext, Progress
from fennflow.engine.finish import Finisher
from fennflow.engine.garbage import check_late_writes, sweep
from fennflow.engine.jobs import HOOK_WAIT, Jobs
from fennflow.engine.leases import Lease, clock
from fennflow.engine.plan import Write, late_writes, plan_compensation
from fennflow.engine.stamps import is_transaction_id
from fennflow.engine.stuck import undecided, unfinished
from fennflow.exceptions import (
    BaseConnectorException,
    CommitUncertainException,
    CompensationPendingWarning,
    ConflictException,
    TransactionException,
    TransactionLostException,
)
from fennflow.printable import brief
from fennflow.reports import RecoveryReport
from fennflow.telemetry import count_recovered, log_event, with_notes

CLAIMED_AT_ONCE = 100
SETTLED_AT_ONCE = 8
LOCK_WAIT = 0.5
"""Seconds to wait for an open transaction that holds a decision (P5)."""
JOIN_POLL_INTERVAL = 0.05
"""Seconds between checks whether a user's transaction that holds a decision has ended."""
DEAD_HOLDER_CHECK_INTERVAL = 1.0
"""Seconds between checks, while transactions wait for locks, whether a lock's holder has died."""
FIRST_PAUSE = 1.0
"""Seconds until the next attempt after the first failure; doubled after each further one."""
LONGEST_PAUSE = 8
"""Times `recovery_interval`."""
DEFAULT_INTERVAL = 60.0
"""Seconds; for retries of this process's own transactions, if it does not recover those of others."""

_Attempt = asyncio.Task[Outcome | None]


@dataclass(slots=True, kw_only=True)
class Unsettled:
    """A transaction that could not be finished.

    Args:
        lease: the transaction, and the right to act for it.
        undo: the steps of its compensation, used unless it is decided `committed`.
        late_writes: requests of the compensation that may still arrive.
        callbacks: the user's undos and callbacks that still wait for the outcome.
        joined: the user's transaction that holds the decision until it ends, if there is one.
        claimed: whether it was claimed from another process, which had begun to finish it.
        progress: of earlier attempts.
        unreachable: buckets whose capabilities are unknown, so that nothing can be undone in them
            yet, and why.
        failures: how many attempts of recovery have failed.
        due: when the next attempt may begin, by the loop's clock.
        context: for the callbacks: the context of the block, not of the background task.
    """

    lease: Lease
    undo: Sequence[Step]
    late_writes: Sequence[LateWrite]
    callbacks: Callbacks = field(default_factory=Callbacks)
    joined: JoinedTransaction | None = None
    claimed: bool = False
    progress: Progress = field(default_factory=Progress)
    unreachable: Mapping[str, BaseConnectorException] = field(
        default_factory=dict[str, BaseConnectorException]
    )
    failures: int = 0
    due: float = 0.0
    context: Context = field(default_factory=copy_context)

    @property
    def waits(self) -> bool:
        """Whether nothing can be done yet, since the user's transaction is open."""
        return self.joined is not None and not self.joined.ended


@dataclass(slots=True)
class Recovery:
    """Finishes remaining transactions when an engine is first used, at intervals and on demand (P26).

    Args:
        context: of the engine.
        namespaces: the namespaces whose reserved prefix is swept (P27).
        aftermaths: calls the undos and callbacks of transactions that have ended.

    Attributes:
        jobs: calls compensations and hooks.
    """

    context: EngineContext
    namespaces: set[str] = field(default_factory=set[str])
    aftermaths: Aftermaths = field(default_factory=Aftermaths)
    _own: dict[str, Unsettled] = field(default_factory=dict[str, Unsettled])
    _attempts: dict[str, _Attempt] = field(default_factory=dict[str, _Attempt])
    _taken: set[_Attempt] = field(default_factory=set[_Attempt])
    _reported: list[set[_Attempt]] = field(default_factory=list[set[_Attempt]])
    _slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(SETTLED_AT_ONCE))
    _claiming: asyncio.Lock = field(default_factory=asyncio.Lock)
    _cleaning: asyncio.Lock = field(default_factory=asyncio.Lock)
    _sweep_due: float = 0.0
    _look_due: float = 0.0
    jobs: Jobs = field(init=False)
    _interval: float = field(init=False)
    _turns: Periodic = field(init=False)
    _looks: Periodic = field(init=False)
    _retries: Periodic = field(init=False)

    def __post_init__(self) -> None:
        self.jobs = Jobs(self.context)
        self._interval = self.context.config.recovery_interval or DEFAULT_INTERVAL
        self._turns = Periodic(self._interval, self._turn)
        self._looks = Periodic(DEAD_HOLDER_CHECK_INTERVAL, self._look)
        self._retries = Periodic(JOIN_POLL_INTERVAL, self._retry)

    def start(self) -> None:
        """Run immediately in the background, and then at intervals, unless the config disables that."""
        if self.context.config.recovery_interval is None:
            return
        # Short-lived processes must not pay for a sweep, so the first one is delayed.
        self._sweep_due = asyncio.get_running_loop().time() + self.context.config.late_write_period
        self._turns.start(delay=0.0)

    async def aclose(self) -> None:
        """Try this process's transactions once more, in parallel, for `compensation_timeout` in all.

        A store that does not respond gets a few seconds. Other processes claim the rest.
        """
        for each in (self._turns, self._looks, self._retries):
            await each.aclose()
        grace = self.context.circuit.last_wait(self.context.config.compensation_timeout)
        attempts = {*self._begin_own(now=True), *self._taken}
        if attempts:
            _, late = await asyncio.wait(attempts, timeout=grace)
            for attempt in late:
                attempt.cancel()
            if late:
                await asyncio.wait(late)
        if self._own:
            log_event(
                logging.WARNING,
                "Not finished when the engine was closed; left to the next process: %s",
                ", ".join(self._own),
                rule="P9",
            )
        await self.aftermaths.aclose(grace)
        await self.jobs.aclose(grace)

    def add(self, unsettled: Unsettled) -> None:
        """Take over a transaction of this process; the next attempt begins immediately."""
        self._own[unsettled.lease.token.transaction_id] = unsettled
        self._retries.start(delay=JOIN_POLL_INTERVAL if unsettled.waits else 0.0)

    def free_locks(self) -> None:
        """Look for transactions of dead owners soon, because a transaction waits for a lock.

        The waiting transaction does not do it, so that its own time limit holds. What could not be finished
        is not retried earlier because of it.
        """
        now = asyncio.get_running_loop().time()
        if now >= self._look_due and self.context.config.recovery_interval is not None:
            self._look_due = now + DEAD_HOLDER_CHECK_INTERVAL
            self._looks.start(delay=0.0)

    async def run(self, namespaces: Collection[str]) -> RecoveryReport:
        """Finish transactions, check late writes and sweep, whether due or not.

        Args:
            namespaces: to sweep, in addition to those that the engine has used.
        """
        self.namespaces.update(namespaces)
        self.context.circuit.reset()  # stores that did not respond may respond now
        # Transactions that the background finishes from now on are reported, too, including those
        # that it is claiming.
        attempts = {*self._attempts.values(), *self._taken}
        self._reported.append(attempts)
        try:
            # A backend without background reads may not know yet what others have left.
            await self.context.backend.transactions(after="", limit=1)
            # Running attempts may still fail because of a cause that was removed in the meantime.
            if attempts:
                await asyncio.wait(set(attempts))
            self._begin_own(now=True)
            await self._claim()
        finally:
            self._reported[:] = [each for each in self._reported if each is not attempts]
        if attempts:
            await asyncio.wait(attempts)
        waiting = {*self._own, *_unfinished(attempts)}
        called = await self.jobs.run()
        report = await self._clean(attempts, sweeping=True)
        # Another process may hold the lease of a failing transaction, so this one has no attempt
        # that reports it.
        left = await unfinished(self.context.backend)
        period = self.context.config.late_write_period
        others = await undecided(self.context.backend, period, waiting)
        # Transactions that were finished meanwhile are no longer pending.
        pending = len(left) + len(others.keys() & waiting)
        problems = (*report.problems, *left, *others.values())
        return replace(report, pending=pending, problems=problems, jobs_called=called)

    async def _turn(self) -> bool:
        try:
            self.jobs.wake()
            claimed = await self._claim()
            if claimed:
                await asyncio.wait(claimed, timeout=self.context.config.compensation_timeout)
            due = asyncio.get_running_loop().time() >= self._sweep_due
            await self._clean(claimed, sweeping=due)
        except Exception as error:  # noqa: BLE001 - logged, and tried again
            _log_failed(error)
        return True

    async def _look(self) -> bool:
        """Claim transactions of dead processes; a caller waits for it."""
        try:
            await self._claim()
        except Exception as error:  # noqa: BLE001 - logged, and tried again
            _log_failed(error)
        return False

    async def _retry(self) -> bool:
        """Begin the attempts that are due; continue while transactions wait for a joined transaction."""
        self._begin_own()
        now = asyncio.get_running_loop().time()
        pauses = [
            each.due - now
            for transaction_id, each in self._own.items()
            if not each.waits and transaction_id not in self._attempts
        ]
        if pauses:
            self._retries.start(delay=max(0.0, min(pauses)))
        return any(each.waits for each in self._own.values())

    async def _clean(self, attempts: Collection[_Attempt], *, sweeping: bool) -> RecoveryReport:
        """Check late writes, sweep, and report both with the results of attempts."""
        outcomes = [_outcome(each) for each in attempts]
        waiting = {*self._own, *_unfinished(attempts)}
        problems: list[str] = []
        async with self._cleaning:
            report = RecoveryReport(
                rolled_forward=outcomes.count(Outcome.COMMITTED),
                compensated=outcomes.count(Outcome.ABORTED),
                pending=len(waiting),
                late_writes_checked=await check_late_writes(self.context, problems),
            )
            if sweeping:
                now = asyncio.get_running_loop().time()
                self._sweep_due = now + self.context.config.late_write_period
                for namespace in sorted(self.namespaces):
                    objects, uploads = await sweep(self.context, namespace, problems)
                    report = replace(
                        report, swept=report.swept + objects, uploads=report.uploads + uploads
                    )
                jobs_pending, failed = await self.jobs.left()
                problems += failed
                report = replace(report, jobs_pending=jobs_pending)
        report = replace(report, problems=tuple(problems))
        if report != RecoveryReport():
            log_event(logging.INFO, "Recovered: %s", report, rule="P24")
            # Transactions are counted when an attempt finishes them.
            unsettled = replace(report, rolled_forward=0, compensated=0, jobs_pending=0)
            count_recovered({**asdict(unsettled), "problems": len(problems)})
        return report

    def _begin_own(self, *, now: bool = False) -> list[_Attempt]:
        """Begin to finish this process's own transactions, each by itself.

        Args:
            now: whether to begin attempts that are not due yet, too.

        Returns:
            the running attempts.
        """
        moment = asyncio.get_running_loop().time()
        for transaction_id, each in self._own.items():
            if (
                transaction_id not in self._attempts
                and not each.waits
                and (now or each.due <= moment)
            ):
                attempt = self._begin(self._try_own(each), transaction_id)
                self._attempts[transaction_id] = attempt
                attempt.add_done_callback(partial(self._ended, transaction_id))
        return list(self._attempts.values())

    def _begin(self, work: Coroutine[Any, Any, Outcome | None], transaction_id: str) -> _Attempt:
        """Begin an attempt in a separate task, without the context of a request."""
        attempt = asyncio.get_running_loop().create_task(
            work, name=transaction_id, context=Context()
        )
        for each in self._reported:
            each.add(attempt)
        return attempt

    def _ended(self, transaction_id: str, _: _Attempt) -> None:
        del self._attempts[transaction_id]

    async def _try_own(self, unsettled: Unsettled) -> Outcome | None:
        """Finish a transaction of this process; None if it has to wait."""
        transaction_id = unsettled.lease.token.transaction_id
        try:
            async with self._slots:
                outcome = await self._settle(unsettled)
        except TransactionLostException as error:
            # P25: another owner has it now.
            self.context.leases.release(unsettled.lease)
            if unsettled.callbacks and not await self._call_back_as_decided(unsettled):
                self._postpone(unsettled, error)
            else:
                del self._own[transaction_id]
            return None
        except Exception as error:  # noqa: BLE001 - logged, and tried again
            self._postpone(unsettled, error)
            return None
        del self._own[transaction_id]
        return outcome

    async def _call_back_as_decided(self, unsettled: Unsettled) -> bool:
        """Call back as another owner has decided, since it may take long to finish the transaction.

        Returns:
            whether the outcome is known.
        """
        outcome = await self._outcome_of(unsettled.lease.token.transaction_id)
        if outcome is not None:
            self._call_back(unsettled, outcome)
        return outcome is not None

    async def _outcome_of(self, transaction_id: str) -> Outcome | None:
        """Return the outcome of an unfinished transaction, if it can be found out."""
        before = transaction_id[:-1]  # sorts directly before it
        try:
            found = await self.context.backend.transactions(after=before, limit=1)
        except Exception as error:  # noqa: BLE001 - logged, and tried again
            _log_failed(error)
            return None
        for each in found:
            if each.token.transaction_id == transaction_id:
                return each.outcome
        return None

    def _call_back(self, unsettled: Unsettled, outcome: Outcome) -> None:
        callbacks, unsettled.callbacks = unsettled.callbacks, Callbacks()
        callbacks.begun = True
        if outcome is Outcome.COMMITTED:
            self.jobs.forget(callbacks.undos)
        self.jobs.wake()
        if callbacks:
            self.aftermaths.start(
                callbacks, outcome, unsettled.lease.token.transaction_id, unsettled.context
            )

    def _postpone(self, unsettled: Unsettled, error: Exception) -> None:
        """Try again later, with growing pauses: a person may have to fix the cause."""
        # A decision that waits for another transaction is tried again soon.
        held = unsettled.joined is not None and isinstance(error, CommitUncertainException)
        longest = self._interval * LONGEST_PAUSE
        pause = min(FIRST_PAUSE * 2 ** min(unsettled.failures, 30), longest)
        unsettled.due = asyncio.get_running_loop().time() + (JOIN_POLL_INTERVAL if held else pause)
        unsettled.failures += not held
        self._retries.start(delay=JOIN_POLL_INTERVAL if held else pause)
        _log_pending(unsettled, error)

    async def _claim(self) -> list[_Attempt]:
        """Claim transactions whose owner is gone, and begin to finish each of them (P24).

        Returns:
            the attempts; one ends with None if its transaction has to wait.
        """
        begun: list[_Attempt] = []
        seen: set[str] = set()
        async with self._claiming:
            while True:
                if len(self._taken) >= CLAIMED_AT_ONCE:
                    await asyncio.wait(self._taken, return_when=asyncio.FIRST_COMPLETED)
                started = clock()
                claimed = await self.context.backend.claim(CLAIMED_AT_ONCE)
                new = [each for each in claimed if each.token.transaction_id not in seen]
                if not new:
                    return begun
                for each in new:
                    seen.add(each.token.transaction_id)
                    lease = Lease(each.token)
                    self.context.leases.hold(lease, started)
                    attempt = self._begin(
                        self._take_claimed(lease, each), each.token.transaction_id
                    )
                    self._taken.add(attempt)
                    attempt.add_done_callback(self._taken.discard)
                    begun.append(attempt)

    async def commit_held(self, transaction_id: str) -> None:
        """Commit a transaction that is held (P37), even if the caller is cancelled meanwhile (P21).

        Raises:
            TransactionException: it is not held, or not any more.
            ConflictException: a record that it read has changed; it is undone.
            CommitUncertainException: the outcome is unknown; recovery determines it.
        """
        work, cancellation = await self._decide_held(self._commit_held(transaction_id))
        if work.cancelled():
            message = (
                f"The outcome of transaction {transaction_id} is unknown: its commit did not end within "
                f"compensation_timeout={self.context.config.compensation_timeout} s after a "
                "cancellation. Check UOW.transactions(): if it is still held, try again."
            )
            raise CommitUncertainException(message) from cancellation
        work.result()

    async def _commit_held(self, transaction_id: str) -> None:
        taken = clock()
        lease, found = await self._take_held(transaction_id)
        commit = found.held or Commit()
        try:
            await self.context.backend.commit(lease.token, commit)
        except ConflictException:
            await self._take_over(lease, found)
            raise
        except TransactionLostException as error:
            await self._finish_if_decided(lease, found)
            raise _not_held(transaction_id) from error
        except Exception as error:
            try:
                left = max(0.0, found.held_left - (clock() - taken))
                await self.context.backend.hold(lease.token, commit, left)
            except Exception as second:  # noqa: BLE001 - part of the exception's message
                message = (
                    f"The outcome of transaction {transaction_id} is unknown ({second}). Check "
                    "UOW.transactions(): if it is still held, try again."
                )
                raise CommitUncertainException(message) from error
            finally:
                self.context.leases.release(lease)
            raise
        except BaseException:
            self.context.leases.release(lease)
            raise
        unsettled = Unsettled(lease=lease, undo=(), late_writes=())
        self.add(unsettled)
        self._begin_own()
        if attempt := self._attempts.get(transaction_id):
            await asyncio.wait({attempt})
        await asyncio.wait({self.jobs.begin(transaction_id)}, timeout=HOOK_WAIT)

    async def abort_held(self, transaction_id: str) -> None:
        """Undo a transaction that is held (P37), even if the caller is cancelled meanwhile (P21).

        Raises:
            TransactionException: it is not held, or not any more.
        """
        work, cancellation = await self._decide_held(self._abort_held(transaction_id))
        if work.cancelled() and cancellation is not None:
            raise cancellation
        work.result()

    async def _abort_held(self, transaction_id: str) -> None:
        lease, found = await self._take_held(transaction_id)
        try:
            decision = await self.context.backend.abort(lease.token, lock_wait=LOCK_WAIT)
        except TransactionLostException as error:
            await self._finish_if_decided(lease, found)
            raise _not_held(transaction_id) from error
        except BaseException:
            self.context.leases.release(lease)
            raise
        if decision.outcome is Outcome.COMMITTED:
            await self._take_over(lease, replace(found, outcome=decision.outcome))
            raise _not_held(transaction_id)
        if await self._take_over(lease, found) is None:
            message = (
                f"Transaction {transaction_id} is undone, but not completely yet. Recovery continues; "
                "the log says what the store refuses."
            )
            warnings.warn(CompensationPendingWarning(message), stacklevel=2)

    async def _finish_if_decided(self, lease: Lease, found: JournaledTransaction) -> None:
        """Finish a transaction that another caller decided while this one claimed it."""
        try:
            outcome = await self._outcome_of(found.token.transaction_id)
            if outcome is not None:
                await self._take_over(lease, replace(found, outcome=outcome))
        finally:
            self.context.leases.release(lease)

    async def _decide_held(
        self, work: Coroutine[Any, Any, None]
    ) -> tuple[asyncio.Task[None], asyncio.CancelledError | None]:
        """Run work to its end, and deliver a cancellation that arrived meanwhile at the next await."""
        grace = self.context.config.compensation_timeout
        done, cancellation = await shielded(work, grace=lambda: grace)
        if cancellation is not None and not done.cancelled():
            cancel_again(cancellation)
        return done, cancellation

    async def _take_held(self, transaction_id: str) -> tuple[Lease, JournaledTransaction]:
        if not is_transaction_id(transaction_id):
            # A client may have sent it: not every text can be looked up in every backend.
            raise _not_held(brief(transaction_id))
        started = clock()
        found = await self.context.backend.take_held(transaction_id)
        if found is None:
            raise _not_held(transaction_id)
        lease = Lease(found.token)
        self.context.leases.hold(lease, started)
        return lease, found

    async def _take_claimed(self, lease: Lease, found: JournaledTransaction) -> Outcome | None:
        """Finish a transaction that was claimed; None if it has to wait, or waits for a decision."""
        if found.is_held and found.held is not None:
            # The process that was about to decide it is gone; it waits for another decision.
            message = "Transaction %s is still held: its commit or abort was interrupted before the decision"
            transaction_id = found.token.transaction_id
            log_event(
                logging.WARNING, message, transaction_id, rule="P37", transaction=transaction_id
            )
            try:
                await self.context.backend.hold(lease.token, found.held, found.held_left)
            except Exception as error:  # noqa: BLE001 - claimed again when its lease has run out
                _log_failed(error)
            self.context.leases.release(lease)
            return None
        return await self._take_over(lease, found)

    async def _take_over(self, lease: Lease, found: JournaledTransaction) -> Outcome | None:
        """Finish a transaction, undoing it unless it is decided `committed`; None if it has to wait.

        Args:
            lease: the right to act for it.
            found: its content in the journal.
        """
        # An owner that had not decided has sent no requests of apply or compensation.
        claimed = found.outcome is not None
        unsettled = Unsettled(lease=lease, undo=(), late_writes=(), claimed=claimed)
        # It is not known how far the owner got: every write counts as done and as ambiguous.
        writes = [
            Write(intent=intent, sent=True, ambiguous=True)
            for intent in found.intents
            if intent.placement is not Placement.DELETE
        ]
        # If this upload sent the bytes themselves, there is no copy to abort.
        unsettled.progress.uploads = {
            intent.seq: intent.upload_id for intent in found.intents if intent.upload_id is not None
        }
        try:
            capabilities, unsettled.unreachable = await self._reach(
                {write.intent.namespace for write in writes}
            )
            reached = [each for each in writes if each.intent.namespace in capabilities]
            unsettled.undo = plan_compensation(found.token.transaction_id, reached, capabilities)
            unsettled.late_writes = late_writes(found.token.transaction_id, writes)
            async with self._slots:
                return await self._settle(unsettled)
        except TransactionLostException:
            return None
        except Exception as error:  # noqa: BLE001 - logged, and claimed again when it has expired
            _log_pending(unsettled, error)
            return None
        finally:
            self.context.leases.release(lease)

    async def _reach(
        self, namespaces: Collection[str]
    ) -> tuple[dict[str, Capabilities], dict[str, BaseConnectorException]]:
        """Return the capabilities of buckets, and errors of unreachable ones: each by itself (P26)."""
        capabilities: dict[str, Capabilities] = {}
        unreachable: dict[str, BaseConnectorException] = {}
        for namespace in namespaces:
            try:
                capabilities[namespace] = await self.context.connector.capabilities(namespace)
            except BaseConnectorException as error:
                unreachable[namespace] = error
        return capabilities, unreachable

    async def _settle(self, unsettled: Unsettled) -> Outcome:
        """Perform the remaining steps of the journal, and call back once the outcome is known."""
        lease = unsettled.lease
        decision = await self.context.backend.abort(lease.token, lock_wait=LOCK_WAIT)
        try:
            finisher = Finisher(
                self.context, lease, claimed=unsettled.claimed, progress=unsettled.progress
            )
            if decision.outcome is Outcome.ABORTED:
                finisher.failed |= {
                    key: unsettled.unreachable[key.namespace]
                    for key in decision.keys
                    if key.namespace in unsettled.unreachable
                }
            await finisher.finish_decided(decision, unsettled.undo, unsettled.late_writes)
        finally:
            self._call_back(unsettled, decision.outcome)
        committed = decision.outcome is Outcome.COMMITTED
        count_recovered({"rolled_forward" if committed else "compensated": 1})
        return decision.outcome


def _not_held(transaction_id: str) -> TransactionException:
    message = (
        f"Transaction {transaction_id} is not held: it was committed or undone, or another call is doing "
        "so now; its time has run out; or the id is wrong. UOW.transactions() lists held transactions."
    )
    return TransactionException(message)


def _outcome(attempt: _Attempt) -> Outcome | None:
    """Return the outcome of an attempt that has finished its transaction, if it has."""
    return attempt.result() if attempt.done() and not attempt.cancelled() else None


def _unfinished(attempts: Collection[_Attempt]) -> set[str]:
    """Return the transactions of attempts that have not finished theirs."""
    return {each.get_name() for each in attempts if _outcome(each) is None}


def _log_failed(error: Exception) -> None:
    message = "Recovery failed and will be retried: %r"
    log_event(logging.WARNING, message, error, rule="P26")


def _log_pending(unsettled: Unsettled, error: Exception) -> None:
    transaction_id = unsettled.lease.token.transaction_id
    waiting = isinstance(error, CommitUncertainException)
    log_event(
        logging.INFO if waiting else logging.WARNING,
        "Transaction %s could not be finished yet: %s: %s",
        transaction_id,
        type(error).__name__,
        with_notes(error),
        rule="P5" if waiting else "P9",
        transaction=transaction_id,
    )
