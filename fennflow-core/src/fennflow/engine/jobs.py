"""Calls journaled compensations and hooks: each at least once, by any process (P33 to P36).

`Session.step` and the pivot journal them; `fennflow.jobs` registers the functions.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Coroutine, Sequence
from contextvars import Context
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from fennflow.backends import Job, Outcome
from fennflow.engine.callbacks import Undo, UndoPendingError, call_user
from fennflow.engine.concurrency import Periodic
from fennflow.jobs import functions_of
from fennflow.printable import printable, without_credentials
from fennflow.retries import repeat
from fennflow.telemetry import count_recovered, log_event, with_notes

if TYPE_CHECKING:
    from fennflow.engine.context import EngineContext
    from fennflow.jobs import JobFunction

HOOK_WAIT = 2.0
"""Seconds that a commit waits for its hooks; after that they continue in the background."""
FIRST_PAUSE = 1.0
"""Seconds until the next attempt after the first failure; doubled after each further one."""
LONGEST_PAUSE = 600.0
END_ATTEMPTS = 4
CANCEL_WAIT = 1.0
"""Seconds that a cancelled function may take to end."""
REPORTED = 1000
LONGEST_SAID = 1000
"""How many characters of the error of a call are kept."""

_Call = asyncio.Task[Exception | None]
_Identity = tuple[str, int]


@dataclass(slots=True)
class Jobs:
    """Calls the functions of due jobs that are registered in this process.

    Args:
        context: of the engine.
    """

    context: EngineContext
    _functions: dict[str, JobFunction[...]] = field(init=False)
    _calls: dict[_Identity, _Call] = field(default_factory=dict[_Identity, _Call])
    _own: set[_Identity] = field(default_factory=set[_Identity])
    _parked: dict[_Identity, Job] = field(default_factory=dict[_Identity, Job])
    _taking: asyncio.Lock = field(default_factory=asyncio.Lock)
    _works: set[asyncio.Task[Any]] = field(default_factory=set[asyncio.Task[Any]])
    _called: set[str] = field(default_factory=set[str])
    _outlasting: dict[str, asyncio.Task[None]] = field(
        default_factory=dict[str, asyncio.Task[None]]
    )
    _unjournaled: list[Job] = field(default_factory=list[Job])
    _named: set[str] = field(default_factory=set[str])
    _turns: Periodic = field(init=False)
    _closing: bool = False

    def __post_init__(self) -> None:
        self._functions = functions_of(self.context.config)
        self._turns = Periodic(self.context.config.recovery_interval or LONGEST_PAUSE, self._turn)

    def wake(self, delay: float = 0.0) -> None:
        """Check for due jobs soon."""
        if self._functions and not self._closing:
            self._turns.start(delay=delay)

    async def aclose(self, grace: float) -> None:
        """Let running calls end; leave those that take longer to other processes."""
        self._closing = True
        await self._turns.aclose()
        if self._unjournaled:
            await self._journal()
        for cancel in (False, True):
            under_way: set[asyncio.Task[Any]] = {*self._calls.values(), *self._works}
            if not under_way:
                return
            if cancel:
                for each in under_way:
                    each.cancel()
            await asyncio.wait(under_way, timeout=grace)

    # --- of a unit of work -----------------------------------------------------------------------

    def begin(self, transaction_id: str) -> asyncio.Task[None]:
        """Start calling the due jobs of a transaction."""
        return self._work(self._call_all(transaction_id=transaction_id, hurry=False))

    def own(self, job: Job) -> DurableUndo:
        """Return the undo that calls a compensation in its turn among the undos of a unit of work.

        Until it is called or forgotten, nothing else in this process calls the compensation.
        """
        self._own.add(_identity(job))
        return DurableUndo(self, job)

    def disown(self, undos: Collection[Undo]) -> None:
        """Leave the compensations among undos to any process that finds them due."""
        self._own.difference_update(
            _identity(each.job) for each in undos if isinstance(each, DurableUndo)
        )

    def forget(self, undos: Collection[Undo]) -> None:
        """Remove the compensations among undos that are not due: their transaction has committed."""
        jobs = [each.job for each in undos if isinstance(each, DurableUndo) and not each.released]
        if jobs:
            self._own.difference_update(map(_identity, jobs))
            self._work(self._forget(jobs))

    async def remove(self, undo: DurableUndo) -> None:
        """Remove the compensation of a step that was not done, before its transaction can end."""
        await asyncio.wait({self._work(self._forget([undo.job]))})
        self._own.discard(_identity(undo.job))

    async def _forget(self, jobs: Sequence[Job]) -> None:
        try:
            await self.context.backend.end_jobs(jobs)
        except Exception as error:  # noqa: BLE001 - recovery removes those of committed steps
            message = "Compensations that are not needed could not be removed yet: %r"
            log_event(logging.INFO, message, error, rule="P34")

    async def undo(self, job: Job) -> None:
        """Call a compensation; if the wait for it is cut off, the compensation continues.

        Raises:
            UndoPendingError: it failed, or another process calls it; it stays in the journal.
        """
        work = self._work(self._undo(job))
        work.add_done_callback(lambda _: self._undone(job))
        await asyncio.wait({work})
        reason = "it was cut off" if work.cancelled() else work.result()
        if reason is not None:
            message = f"{reason}. It stays in the journal, and is called until it succeeds."
            raise UndoPendingError(message)

    async def _undo(self, job: Job) -> str | None:
        """Call a compensation after those of later steps; if it is not done, return why."""
        try:
            while _identity(job) not in self._calls:
                if others := self._calls_of(job.transaction_id):
                    await asyncio.wait(others)
                elif parked := self._parked.pop(_identity(job), None):
                    await self._begin_parked(parked)
                elif (
                    not await self._take(limit=1, transaction_id=job.transaction_id)
                    and _identity(job) not in self._parked
                ):
                    break
            if call := self._calls.get(_identity(job)):
                await asyncio.wait({call})
            left = await self.context.backend.jobs(
                limit=REPORTED, transaction_id=job.transaction_id
            )
        except Exception as error:  # noqa: BLE001 - it stays in the journal
            return _said(error)
        for each in left:
            if each.number == job.number:
                return each.error or "a later compensation comes first, or another process calls it"
        return None

    def _undone(self, job: Job) -> None:
        """Let any process call a compensation; call it if it was journaled again and claimed meanwhile."""
        self._own.discard(_identity(job))
        if parked := self._parked.pop(_identity(job), None):
            self._work(self._begin_parked(parked))

    async def _begin_parked(self, job: Job) -> None:
        if await self.context.backend.keep_job(job):
            self._begin(job)

    async def journal_again(self, job: Job) -> None:
        """Have a compensation called once more, even if another process has called it.

        The step ended after the lease had run out, so it may have taken effect after its
        compensation.
        """
        self._unjournaled.append(replace(job, after=None))
        await asyncio.wait({self._work(self._journal())})

    async def _journal(self) -> None:
        """Journal the compensations to call once more; retry those that fail."""
        try:
            async with self._taking:
                while self._unjournaled:
                    job = self._unjournaled[0]
                    await self.context.backend.add_jobs([job])
                    self._called.discard(job.idempotency_key)
                    del self._unjournaled[0]
        except Exception as error:  # noqa: BLE001 - logged, and tried again
            names = ", ".join(f"{each.name} {each.arguments}" for each in self._unjournaled)
            message = (
                "Steps ended after their lease; their undo cannot be journaled again yet: %s: %r"
            )
            log_event(logging.ERROR, message, names, error, rule="P33")
            self.wake(FIRST_PAUSE)
        else:
            self.wake()

    # --- in the background -----------------------------------------------------------------------

    async def run(self) -> int:
        """Call all due jobs, including those that failed before; return how many calls succeeded."""
        done = await self._call_all(transaction_id=None, hurry=True)
        # Compensations of this process's own transactions are called in their turn, among other
        # undos.
        under_way: set[asyncio.Task[Any]] = {*self._calls.values(), *self._works}
        if under_way:
            await asyncio.wait(under_way)
        count_recovered({"jobs_called": done})
        return done

    async def left(self) -> tuple[int, list[str]]:
        """Return how many jobs are due, and describe those that failed or have no function here."""
        jobs = await self.context.backend.jobs(limit=REPORTED)
        count_recovered({"jobs_pending": len(jobs)})
        unknown: dict[str, int] = {}
        problems: list[str] = []
        for job in jobs:
            if job.name not in self._functions:
                unknown[job.name] = unknown.get(job.name, 0) + 1
            elif job.error is not None:
                problems.append(
                    f"{job.name} of transaction {job.transaction_id} has failed {job.attempts} times, and is "
                    f"called again until it succeeds: {job.error}"
                )
        for name, number in unknown.items():
            text = (
                f"{number} calls of {name} are due, but this process has no function of that name. Start "
                "a process that registers it with UOW.compensation or UOW.after_commit (rule P35)."
            )
            problems.insert(0, text)
            if name not in self._named:
                self._named.add(name)
                log_event(logging.WARNING, "%s", text, rule="P35")
        return len(jobs), problems

    async def _turn(self) -> bool:
        if self._unjournaled:
            await self._journal()
        try:
            await self._take(limit=self._free)
        except Exception as error:  # noqa: BLE001 - logged, and tried again
            log_event(
                logging.WARNING,
                "Compensations and hooks that are due could not be claimed: %r",
                error,
                rule="P35",
            )
        return False

    async def _call_all(self, *, transaction_id: str | None, hurry: bool) -> int:
        """Call due jobs, and those that become due by that; jobs that fail wait for the background."""
        done = 0
        try:
            while calls := await self._take(
                limit=self._free, transaction_id=transaction_id, hurry=hurry
            ) or self._calls_of(transaction_id):
                await asyncio.wait(calls)
                done += sum(each.result() is None for each in calls if not each.cancelled())
                hurry = False
        except Exception as error:
            if transaction_id is None:
                raise
            log_event(
                logging.WARNING,
                "Hooks are called later: %r",
                error,
                rule="P36",
                transaction=transaction_id,
            )
            self.wake(FIRST_PAUSE)
        return done

    def _calls_of(self, transaction_id: str | None) -> list[_Call]:
        """Return the running calls of a transaction; the background may have started them."""
        return [call for (each, _), call in self._calls.items() if each == transaction_id]

    @property
    def _free(self) -> int:
        return max(0, self.context.config.max_concurrency - len(self._calls))

    async def _take(
        self, *, limit: int, transaction_id: str | None = None, hurry: bool = False
    ) -> list[_Call]:
        """Claim jobs, and start calling them."""
        if not (self._functions and limit) or self._closing:
            return []
        async with self._taking:
            jobs = await self.context.backend.claim_jobs(
                list(self._functions), limit=limit, transaction_id=transaction_id, hurry=hurry
            )
            taken = {_identity(each): each for each in jobs}
            if transaction_id is None:
                for identity in self._own & taken.keys():
                    self._parked[identity] = taken.pop(identity)
            return [self._begin(job) for job in taken.values()]

    def _begin(self, job: Job) -> _Call:
        call = asyncio.get_running_loop().create_task(self._call(job), context=Context())
        self._calls[_identity(job)] = call
        call.add_done_callback(partial(self._ended, _identity(job)))
        return call

    def _ended(self, identity: _Identity, call: _Call) -> None:
        if self._calls.get(identity) is call:
            del self._calls[identity]
        if not call.cancelled() and call.exception() is None and call.result() is None:
            self.wake()  # other jobs may have waited for it

    async def _call(self, job: Job) -> Exception | None:
        """Call a function for a job, and journal the result."""
        backend = self.context.backend
        try:
            if job.idempotency_key not in self._called:
                await self._attempt(job)
                self._called.add(job.idempotency_key)
            await repeat(
                lambda: backend.end_jobs([job]),
                on=lambda _: True,
                attempts=END_ATTEMPTS,
                what=f"Removing the journaled call of {job.name}",
                transaction=job.transaction_id,
            )
            self._called.discard(job.idempotency_key)
        except asyncio.CancelledError:
            await self._give_back(job, 0.0, "It was cut off, since the process ended.")
            raise
        except Exception as error:  # noqa: BLE001 - logged, and tried again
            pause = min(FIRST_PAUSE * 2 ** min(job.attempts - 1, 30), LONGEST_PAUSE)
            log_event(
                logging.WARNING,
                "%s failed, attempt %d; the next one is in %.0f s: %s",
                job.name,
                job.attempts,
                pause,
                _said(error),
                rule="P35",
                transaction=job.transaction_id,
                failed=error,
            )
            await self._give_back(job, pause, _said(error))
            self.wake(pause)
            return error
        return None

    async def _give_back(self, job: Job, pause: float, error: str) -> None:
        try:
            await self.context.backend.keep_job(job, retry_in=pause, error=error)
        except Exception as lost:  # noqa: BLE001 - it is due again when its lease has run out
            message = "%s is called again when lease_ttl has passed: %r"
            log_event(
                logging.WARNING, message, job.name, lost, rule="P35", transaction=job.transaction_id
            )

    async def _attempt(self, job: Job) -> None:
        """Call the function once, and renew the job's lease meanwhile.

        If an earlier call was cancelled but has not ended, wait for it instead.

        Raises:
            TimeoutError: it took longer than its limit, and was cancelled.
            Exception: what it raised.
        """
        function = self._functions[job.name]
        loop = asyncio.get_running_loop()
        call = self._outlasting.pop(job.idempotency_key, None) or loop.create_task(
            call_user(partial(function.call, job)), context=Context()
        )
        until = loop.time() + function.timeout
        try:
            while not call.done():
                left = until - loop.time()
                if left <= 0:
                    message = f"it did not return within timeout={function.timeout} s"
                    raise TimeoutError(message)
                await asyncio.wait({call}, timeout=min(left, self.context.config.lease_ttl / 3))
                if not call.done():
                    await self._hold(job)
            call.result()
        finally:
            if not call.done():
                call.cancel()
                await asyncio.wait({call}, timeout=CANCEL_WAIT)
                if not call.done():
                    self._outlasting[job.idempotency_key] = call

    async def _hold(self, job: Job) -> None:
        try:
            await self.context.backend.keep_job(job)
        except Exception as error:  # noqa: BLE001 - tried again; else another process calls it, too
            message = "The lease of %s could not be renewed: %r"
            log_event(
                logging.WARNING,
                message,
                job.name,
                error,
                rule="P35",
                transaction=job.transaction_id,
            )

    def _work(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work, context=Context())
        self._works.add(task)
        task.add_done_callback(self._works.discard)
        return task


def _identity(job: Job) -> _Identity:
    return job.transaction_id, job.number


def _said(error: Exception) -> str:
    """Return the text of a user's error in a form that is safe to store and to show."""
    name = type(error).__name__
    try:
        text = f"{name}: {with_notes(error)}"
    except Exception:  # noqa: BLE001 - a __str__ that fails
        text = name
    return printable(without_credentials(text))[:LONGEST_SAID]


@dataclass(slots=True, eq=False)
class DurableUndo:
    """The undo of a step whose compensation is journaled.

    Args:
        jobs: calls it.
        job: the journaled job.
        failed: whether the step raised, so that it may or may not have been done.
    """

    jobs: Jobs
    job: Job
    failed: bool = False

    @override
    def __repr__(self) -> str:
        return self.job.name

    async def __call__(self) -> None:
        """Call the compensation; if the wait is cut off, it continues in the background."""
        await self.jobs.undo(self.job)

    @property
    def released(self) -> bool:
        """Whether it is due however the transaction ends."""
        return self.job.after is not Outcome.ABORTED

    def release(self) -> Job:
        """Make it due however the transaction ends; the caller journals that."""
        self.job = replace(self.job, after=None)
        return self.job

    @property
    def call(self) -> tuple[str, str]:
        """The function that it calls, and the arguments."""
        return self.job.name, self.job.arguments
