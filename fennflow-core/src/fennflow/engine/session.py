"""A unit of work's side of a transaction: its calls, steps and savepoints, in one task or several.

`commit`, `rollback` and `hold` end the transaction, and complete even if their caller is cancelled in the
meantime (P21). `commit.py` has what they do.
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import (
    AsyncGenerator,
    Callable,
    Generator,
    Sequence,
)
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

from fennflow import telemetry
from fennflow.backends import Outcome
from fennflow.engine.callbacks import Callbacks, Hook, Undo, names_of, result_of, run_undos
from fennflow.engine.commit import Ending
from fennflow.engine.concurrency import Calls, cancel_again, shielded
from fennflow.engine.jobs import HOOK_WAIT, DurableUndo
from fennflow.engine.plan import changes_of
from fennflow.engine.transaction import Scope, Transaction, rolled_back
from fennflow.exceptions import (
    CommitUncertainException,
    CompensationPendingWarning,
    ConfigException,
    StepNotDoneException,
    TransactionException,
    TransactionTimeoutException,
)
from fennflow.jobs import JobCall

if TYPE_CHECKING:
    from fennflow.backends import JoinedTransaction
    from fennflow.engine.reconcile import UsedAreas
    from fennflow.engine.runtime import Engine
    from fennflow.reports import Change


class Deadline:
    """The deadline of a unit of work; create it on the running event loop.

    Args:
        timeout: seconds from now; None for no limit.
    """

    def __init__(self, timeout: float | None) -> None:
        self._timeout = timeout
        self._at = None if timeout is None else asyncio.get_running_loop().time() + timeout

    def check(self) -> None:
        """Refuse to begin anything after the deadline.

        Raises:
            TransactionTimeoutException: it is over.
        """
        if self._at is not None and asyncio.get_running_loop().time() >= self._at:
            raise self._over()

    @asynccontextmanager
    async def limit(self) -> AsyncGenerator[None]:
        """Cut the block off at the deadline.

        Raises:
            TransactionTimeoutException: it is over.
        """
        if self._at is None:
            yield
            return
        self.check()
        timer = asyncio.timeout_at(self._at)
        try:
            async with timer:
                yield
        except TimeoutError as error:
            if timer.expired():
                raise self._over() from error
            raise

    def _over(self) -> TransactionTimeoutException:
        message = (
            f"The unit of work did not end within timeout={self._timeout} s. None of it is "
            "committed; its changes are undone. Run it again, or give it more time."
        )
        return TransactionTimeoutException(message)


class _Wait:
    """How long the caller of a commit or a rollback keeps waiting after a cancellation.

    Args:
        seconds: the total.
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
        """Return the remaining seconds; the time starts with the first call."""
        now = asyncio.get_running_loop().time()
        if self._deadline is None:
            self._deadline = now + self._seconds
        return max(0.0, self._deadline - now)


class Session:
    """The work of one `async with` block; `commit`, `rollback` and `hold` begin a new transaction.

    Args:
        engine: connector, backend and configuration.
        areas: that the repositories of the unit of work can see.
        joined: the user's transaction in which it commits, if it joined one.
        deadline: the deadline of the unit of work.
    """

    def __init__(
        self,
        engine: Engine,
        areas: UsedAreas,
        joined: JoinedTransaction | None = None,
        deadline: Deadline | None = None,
    ) -> None:
        self._engine = engine
        self._areas = areas
        self._joined = joined
        self._deadline = deadline or Deadline(None)
        self._grace = engine.config.compensation_timeout
        self._tx = Transaction(self._engine, self._areas)
        self._loop = asyncio.get_running_loop()
        self._calls = Calls()
        self._savepoints = 0
        self._being_written: list[str] = []
        self._closed = False
        self._free = asyncio.Event()
        self._free.set()

    @asynccontextmanager
    async def call(self, operation: str, namespace: str) -> AsyncGenerator[Transaction]:
        """Guard a call: the session must be open, and does not end before the call.

        Args:
            operation: the name of the operation, for traces and metrics.
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
        """Return the open transaction.

        Raises:
            TransactionException: the session has ended or is ending, or belongs to another loop.
        """
        self.check_usable()
        if not self._free.is_set():
            message = (
                "This unit of work is being committed or rolled back. Use it inside its own async "
                "with block."
            )
            raise TransactionException(message)
        return self._tx

    @contextmanager
    def writes(self, name: str) -> Generator[None]:
        """Register a call that gets its bytes from the caller: a commit would wait for it forever."""
        self._being_written.append(name)
        try:
            yield
        finally:
            self._being_written.remove(name)

    def check_usable(self) -> None:
        """Refuse use after the end of the block, and in another event loop than the one that opened it.

        Raises:
            TransactionException: the session has ended, or the running loop is another one.
        """
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        message = None
        if running is not self._loop:
            message = (
                "This unit of work was opened in another event loop. Open one in each loop, and "
                "use it there only."
            )
        elif self._closed:
            message = "This unit of work has ended. Use it inside its own async with block."
        if message is not None:
            raise TransactionException(message)

    def register(self) -> list[Callbacks]:
        """Return the list to which a callback of the caller belongs.

        Raises:
            TransactionException: the session has ended, or is ending.
        """
        return self._open().register()

    def add_hook(self, hook: Hook) -> None:
        """Register a hook, which this process or another one calls after the commit (P36).

        Raises:
            ConfigException: the backend cannot journal it, it is a compensation, or it was registered
                for another unit of work.
        """
        tx = self._open()
        tx.check_can_be_journaled(hook.call, Outcome.COMMITTED)
        for each in tx.register():
            each.hooks.append(hook)

    async def step(self, do: Callable[[], Any], undo: Undo | JobCall) -> Any:
        """Perform a saga step of the user, and register its undo."""
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
                self._note_step(tx, places, undo)
                raise
            self._note_step(tx, places, undo)
            return result

    def _note_step(self, tx: Transaction, places: Sequence[Callbacks], undo: Undo) -> None:
        """Register the undo of a step; if the step ended after the rollback, undo it immediately."""
        if tx.callbacks.begun:
            aftermaths = self._engine.recovery.aftermaths
            aftermaths.start(Callbacks(undos=[undo]), Outcome.ABORTED, tx.transaction_id)
            return
        for each in places:
            each.undos.append(undo)

    async def _durable_step(
        self,
        tx: Transaction,
        places: Sequence[Callbacks],
        do: Callable[[], Any],
        call: JobCall,
    ) -> Any:
        """Perform a step whose undo is journaled before it begins (P33)."""
        jobs = self._engine.recovery.jobs
        undo = jobs.own(await tx.journal_compensation(call))
        for each in places:
            each.undos.append(undo)
        try:
            async with self._deadline.limit():
                result = await result_of(do)
            tx.check()
        except StepNotDoneException:
            for each in places:
                if undo in each.undos:  # unless it was called meanwhile
                    each.undos.remove(undo)
            await jobs.remove(undo)
            raise
        except BaseException:
            # Whatever it raises, it may have taken effect before that. If the transaction ended
            # meanwhile, it may have taken effect after its compensation.
            undo.failed = True
            if tx.callbacks.begun or not tx.lease.held:
                await jobs.journal_again(undo.job)
            raise
        return result

    @asynccontextmanager
    async def savepoint(self) -> AsyncGenerator[None]:
        """Undo the work of the block, and nothing else, if an exception leaves it.

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
        """Undo the work of a savepoint, and return a cancellation that arrived meanwhile."""
        scope.undone = True
        _, cancellation = await shielded(self._calls.break_off(scope), grace=lambda: self._grace)
        if tx.ended:
            return cancellation  # all of it is undone
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
                f"of work ends, whether it commits or not: {names_of(reversed(undos))}"
            )
        for each in around:
            each.undos += undos
            each.overdue += undos
        return again or cancellation

    async def _undo_steps(self, tx: Transaction, undos: list[Undo]) -> list[str]:
        try:
            await tx.journal_released()
        except Exception as error:  # noqa: BLE001 - tried again before the pivot
            notes = [f"The undo of steps is not journaled yet: {error}"]
        else:
            notes = []
        return notes + await run_undos(undos, tx.transaction_id)

    def changes(self) -> list[Change]:
        """Return what the transaction would change."""
        tx = self._open()
        return changes_of(tx.chain(key) for key in tx.chains)

    async def commit(self, *, last: bool = False) -> None:
        """Make all changes visible in one instant, or undo them and raise.

        Args:
            last: whether the block ends with it, so that it waits while other tasks commit or roll
                back.

        Raises:
            ConflictException: `validate_reads`, and a record that was read has changed.
            TransactionLostException: the lease ran out; recovery undoes the transaction.
            CommitUncertainException: the outcome is unknown; recovery will commit or roll back.
            TransactionTimeoutException: its timeout has passed.
            TransactionException: a file is still open for writing.
            Exception: what the backend raised; the transaction is undone.
        """
        if last:
            await self._free.wait()
        wait = _Wait(self._grace)
        async with self._deciding():
            ending = Ending(self._engine, self._tx, self._joined)
            work, cancellation = await shielded(ending.commit(), grace=wait.left)
            error = ending.cut_off(cancellation) if work.cancelled() else work.exception()
            cancellation = await self._call_back(error, wait, cancellation)
            cancellation = await self._call_hooks(wait, cancellation)
        self._tx = Transaction(self._engine, self._areas)
        if isinstance(error, CommitUncertainException) or (error and cancellation is None):
            raise error
        if cancellation is not None:
            if error is not None:
                raise cancellation from error
            cancel_again(cancellation)

    async def hold(self, expires_in: float | None) -> str:
        """Let another process decide, and begin a new transaction (P37).

        Args:
            expires_in: seconds after which it is undone; None for as long as it may commit.

        Returns:
            the transaction's id.

        Raises:
            ConfigException: it would be held for longer than `max_transaction_age`.
            TransactionException: it has nothing to hold, or work that no other process can do.
            Exception: what the backend raised; the transaction is undone.
        """
        tx = self._open()
        longest = self._engine.config.max_transaction_age
        if expires_in is not None and not 0 < expires_in <= longest:
            message = f"expires_in={expires_in!a} is not in (0, max_transaction_age={longest} s]."
            raise ConfigException(message)
        wait = _Wait(self._grace)
        async with self._deciding():
            self._check_can_be_held()  # checked when no step can register an undo any more
            ending = Ending(self._engine, tx, self._joined)
            work, cancellation = await shielded(ending.hold(expires_in), grace=wait.left)
            error = None if work.cancelled() else work.exception()
            if work.cancelled():
                ending.report_pending(cancellation, self._late())
            if tx.outcome is not None:
                cancellation = await self._call_back(error, wait, cancellation)
        self._tx = Transaction(self._engine, self._areas)
        if cancellation is not None and (error or work.cancelled()):
            raise cancellation from error
        if error is not None:
            raise error
        if cancellation is not None:
            cancel_again(cancellation)
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
            message = "There is nothing to hold: this unit of work has made no changes."
        if message is not None:
            raise TransactionException(message)

    async def rollback(self, cause: BaseException | None = None, *, last: bool = False) -> None:
        """Undo all changes, even if the caller is cancelled meanwhile (P21).

        Running calls of other tasks are interrupted.

        Args:
            cause: the exception that ended the block; what goes wrong is added to it as a note,
                else it is a CompensationPendingWarning.
            last: whether the block ends with it, whatever other tasks do.
        """
        cut_off = isinstance(cause, (asyncio.CancelledError, TransactionTimeoutException))
        wait = _Wait(self._grace, begun=cut_off)
        if last and not self._free.is_set():
            free, _ = await shielded(self._free.wait(), grace=wait.left, grace_started=wait.begun)
            if free.cancelled():
                return  # another call is ending the transaction
        with self._exclusive(last=last):
            self._tx.ended = True
            ending = Ending(self._engine, self._tx, self._joined)
            work, cancellation = await shielded(
                ending.roll_back(cause, self._calls), grace=wait.left, grace_started=wait.begun
            )
            error = None if work.cancelled() else work.exception()
            if work.cancelled():
                ending.report_pending(cause or cancellation, self._late())
            cancellation = await self._call_back(cause or error, wait, cancellation, raises=True)
        self._tx = Transaction(self._engine, self._areas)
        if error is not None:
            raise error
        if cancellation is None or isinstance(cause, asyncio.CancelledError):
            return
        if isinstance(cause, CommitUncertainException):
            # It must not hide that the work may be committed (I8).
            cancel_again(cancellation)
        else:
            raise cancellation

    def check_ends_here(self) -> None:
        """Refuse to end a transaction that the user's surrounding transaction decides, or that has ended.

        Raises:
            TransactionException: a surrounding transaction decides, or the session has ended.
        """
        self.check_usable()
        if self._joined is not None and self._joined.managed_by_caller:
            message = (
                "The transaction that this unit of work joined surrounds it, so its own block "
                "commits both or neither. Leave out commit(), rollback() and auto_commit=False, or "
                "join a session that has not begun."
            )
            raise TransactionException(message)

    def _late(self) -> TimeoutError:
        return TimeoutError(f"compensation_timeout={self._grace} s were not enough.")

    @asynccontextmanager
    async def _deciding(self) -> AsyncGenerator[None]:
        """Let the block commit or hold the transaction after all of its calls have ended."""
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
            yield

    @contextmanager
    def _exclusive(self, *, last: bool = False) -> Generator[None]:
        """Refuse calls while the transaction ends."""
        self.check_usable()
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

    async def _call_back(
        self,
        cause: BaseException | None,
        wait: _Wait,
        cancellation: asyncio.CancelledError | None,
        *,
        raises: bool = False,
    ) -> asyncio.CancelledError | None:
        """Undo the user's steps and call back; calls that outlast the wait continue in the background.

        Args:
            cause: the exception to raise; errors are added to it as notes.
            wait: how long the caller keeps waiting after a cancellation.
            cancellation: a cancellation that arrived earlier.
            raises: whether the caller raises the last cancellation; the notes are then added to it.

        Returns:
            the last cancellation.
        """
        tx = self._tx
        if tx.outcome is None:
            return cancellation  # recovery calls back once it knows the outcome
        tx.callbacks.begun = True
        if not tx.callbacks:
            return cancellation
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
        """Call the hooks of a commit (P36); those that take longer continue in the background.

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

    def close(self) -> None:
        """Refuse all further calls."""
        self._closed = True
        if self._joined is not None:
            self._joined.close()
