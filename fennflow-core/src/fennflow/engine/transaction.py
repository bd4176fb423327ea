"""The state of one transaction, and how it is journaled."""

from __future__ import annotations

import asyncio
from bisect import insort
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import uuid_utils

from fennflow.backends import (
    Intent,
    Job,
    ObjectKey,
    Outcome,
    Placement,
    Record,
    TransactionToken,
    WriteId,
    changed_reads,
    conflict,
)
from fennflow.backends.contract import without_jobs
from fennflow.connectors import Capabilities
from fennflow.engine.callbacks import Callbacks, Undo
from fennflow.engine.context import Progress
from fennflow.engine.deadlocks import Wait
from fennflow.engine.jobs import DurableUndo
from fennflow.engine.leases import Lease, clock
from fennflow.engine.plan import Write, staging_key, visible
from fennflow.engine.stuck import holder
from fennflow.exceptions import (
    BackendUnavailableException,
    ConfigException,
    FennFlowException,
    NoSuchKeyException,
    RecordLockedException,
    TransactionException,
)

if TYPE_CHECKING:
    from fennflow.engine.reconcile import UsedAreas
    from fennflow.engine.runtime import Engine
    from fennflow.jobs import JobCall


STREAMS_AT_ONCE = 4
FEW = 32
"""Up to this number, inserting keys one by one is faster than sorting."""

Place = Callable[[ObjectKey, Record | None, Sequence[Write]], Placement | None]


@dataclass(slots=True, eq=False)
class Scope:
    """A part of a transaction that can be undone separately: a savepoint, or a call with several steps.

    Work in its context belongs to it, including work of tasks that were started there; parallel
    work does not.

    Args:
        tx: the transaction.
        outer: the scope in which it was opened, which may be of another transaction.
        seqs: the sequences of its writes.
        callbacks: the callbacks that were registered in it.
        undone: whether it was undone, so that nothing more can be done in it.
    """

    tx: Transaction
    outer: Scope | None
    seqs: list[int] = field(default_factory=list[int])
    callbacks: Callbacks = field(default_factory=Callbacks)
    undone: bool = False


_scope: ContextVar[Scope | None] = ContextVar("fennflow_scope", default=None)


class Transaction:
    """The state of a transaction: its token, its writes, its reads.

    Args:
        engine: connector, backend and configuration.
        areas: that the repositories of the unit of work can see.

    Attributes:
        lease: the right to act for the transaction, which has an id and a fencing token.
        journaled: whether the journal has, or may have, rows of it (P1).
        rows_confirmed: whether the journal is known to have rows of it.
        began: when it was first journaled, by `clock`.
        progress: the progress of earlier attempts to finish it.
        outcome: its outcome, if this process knows it.
        failure: why it could not commit.
        writes: its writes by sequence; `chains` has the sequences of each key.
        capabilities: the capabilities of the namespaces that it writes to.
        directories: the directories of its keys, on stores that are file systems.
        reads: the records that it read, if `validate_reads` is set.
        slots: bounds the object requests in flight.
        streams: bounds the concurrent streams, since a part of each is in memory.
        callbacks: those that the user registered.
        ended: whether its rollback has begun, so that calls send nothing more for it.
    """

    def __init__(self, engine: Engine, areas: UsedAreas) -> None:
        self._areas = areas
        self._recovery = engine.recovery
        self._leases = engine.leases
        self._waits = engine.leases.waits
        self.config = engine.config
        self.connector = engine.connector
        self.backend = engine.backend
        self.circuit = engine.circuit
        self.transaction_id = str(uuid_utils.uuid7())
        self.lease = Lease(TransactionToken(self.transaction_id))
        self.journaled = False
        self.rows_confirmed = False
        self.began = 0.0
        self.progress = Progress()
        self.outcome: Outcome | None = None
        self.failure: Exception | None = None
        self.writes: dict[int, Write] = {}
        self.chains: dict[ObjectKey, list[int]] = {}
        # The keys of `chains` by namespace, and new keys that are not sorted in yet.
        self._ordered: dict[str, list[str]] = {}
        self._unordered: dict[str, list[str]] = {}
        self.capabilities: dict[str, Capabilities] = {}
        self.directories: set[ObjectKey] = set()
        self.reads: dict[ObjectKey, Record | None] = {}
        self.slots = asyncio.Semaphore(engine.config.max_concurrency)
        self.streams = asyncio.Semaphore(STREAMS_AT_ONCE)
        self.callbacks = Callbacks()
        self.ended = False
        self._next_seq = 1
        self._next_job = 1
        self._unreleased: list[Job] = []

    def check_age(self) -> None:
        """Refuse to commit a transaction whose age lets reconciliation treat its objects as orphans.

        Raises:
            TransactionException: it is older than `max_transaction_age`.
        """
        age = clock() - self.began
        if self.journaled and age >= self.config.max_transaction_age:
            message = (
                f"Transaction {self.transaction_id} is older than max_transaction_age="
                f"{self.config.max_transaction_age} s; none of it was committed. Use shorter units "
                "of work, or raise max_transaction_age."
            )
            raise TransactionException(message)

    def chain(self, key: ObjectKey) -> list[Write]:
        """Return the writes of a key, oldest first."""
        return [self.writes[seq] for seq in self.chains.get(key, ())]

    def own_keys(self, namespace: str) -> Sequence[str]:
        """Return all keys that it has written or deleted, in order."""
        keys = self._ordered.setdefault(namespace, [])
        new = self._unordered.pop(namespace, [])
        if len(new) < FEW:
            for key in new:
                insort(keys, key)
        else:
            keys += new
            keys.sort()  # in almost linear time, as most of them are in order
        return keys

    def update(self, seq: int, **changes: Any) -> None:
        """Store the new state of a write."""
        self.writes[seq] = replace(self.writes[seq], **changes)

    def retract(self, seqs: Sequence[int]) -> None:
        """Retract writes: the writes that they replaced count again (P8)."""
        for seq in seqs:
            self.update(seq, retracted=True)

    @contextmanager
    def scope(self) -> Generator[Scope]:
        """Run the block in a new scope."""
        outer = _scope.get()
        scope = Scope(self, outer)
        _scope.set(scope)
        try:
            yield scope
        finally:
            _scope.set(outer)

    def scopes(self) -> list[Scope]:
        """Return the scopes of the transaction in which the caller runs.

        Raises:
            TransactionException: one of them was undone.
        """
        found: list[Scope] = []
        scope = _scope.get()
        while scope is not None:
            if scope.tx is self:
                found.append(scope)
            scope = scope.outer
        if any(each.undone for each in found):
            message = (
                "The savepoint in which this was started has been undone. Await what you start in "
                "a savepoint before you leave it."
            )
            raise TransactionException(message)
        return found

    def register(self) -> list[Callbacks]:
        """Return the callback lists of the caller: those of the transaction and of its scopes."""
        return [*(scope.callbacks for scope in self.scopes()), self.callbacks]

    def rewind(self, scope: Scope) -> list[Undo]:
        """Undo the writes of a scope, and return the undos that were registered in it."""
        scope.undone = True
        self.retract(scope.seqs)
        return self.callbacks.forget(scope.callbacks)

    @contextmanager
    def whole(self) -> Generator[None]:
        """Undo the work of the block if it fails: a call with several steps is atomic (P8)."""
        with self.scope() as scope:
            try:
                yield
            except BaseException:
                self.rewind(scope)
                raise

    def check(self) -> None:
        """Refuse to send anything for a transaction that this process may no longer continue.

        Raises:
            TransactionException: it is being rolled back.
            TransactionLostException: its lease may have run out (P23).
        """
        if self.ended:
            raise rolled_back()
        self.lease.check()

    async def prepare_read(self, namespace: str) -> None:
        """Prepare for reading the catalog together with the transaction's own changes.

        Raises:
            TransactionLostException: its own changes may be undone by now (P23).
        """
        await self._areas.ensure_reconciled(self._areas.of(namespace))
        if self.chains:
            self.lease.check()

    async def capabilities_for(self, namespace: str) -> Capabilities:
        """Return what the namespace enforces; probed before the first write to it (P15)."""
        areas = self._areas.of(namespace)
        await self._areas.ensure_reconciled(areas)
        capabilities = await self.connector.capabilities(namespace)
        await self._areas.reconciler.registry.register(namespace, areas)
        self.capabilities[namespace] = capabilities
        return capabilities

    async def read_records(
        self, namespace: str, keys: Sequence[str], *, missing_ok: bool
    ) -> list[Record | None]:
        """Return what the transaction sees under keys: its own changes or else the records of one moment.

        Raises:
            NoSuchKeyException: some keys have no record, and `missing_ok` is False; the message
                names them all.
            TransactionLostException: its own changes may be undone by now (P23).
        """
        await self.prepare_read(namespace)
        wanted = [ObjectKey(namespace, key) for key in keys]
        committed = await self.backend.records(set(wanted))
        for key in wanted:
            self.note_read(key, committed.get(key))
        view = [visible(self.chain(key), committed.get(key)) for key in wanted]
        missing = [key for key, record in zip(keys, view, strict=True) if record is None]
        if missing and not missing_ok:
            raise no_such_key(namespace, missing)
        return view

    def note_read(self, key: ObjectKey, record: Record | None) -> None:
        """Note a record for the pivot to check, if the user asked for that."""
        if self.config.validate_reads:
            self.reads.setdefault(key, record)

    async def check_reads(self) -> None:
        """Check that what was read is still committed.

        Raises:
            ConflictException: a record was changed.
        """
        if self.reads:
            now = await self.backend.records(set(self.reads))
            if changed := changed_reads(self.reads, now):
                raise conflict(changed)

    def check_can_be_journaled(self, call: JobCall, after: Outcome) -> None:
        """Refuse a compensation or a hook that would never be called.

        Args:
            call: of a registered function.
            after: the outcome after which it is to be called.

        Raises:
            ConfigException: the backend cannot journal jobs; or the function is for the other
                outcome, or was registered for units of work with another configuration.
        """
        if not self.backend.keeps_jobs:
            raise without_jobs(self.backend)
        function, message = call.function, None
        if function.after is not after:
            message = (
                f"{function} was registered with after_commit, so it cannot undo a step."
                if after is Outcome.ABORTED
                else f"{function} was registered with compensation, so it cannot follow a commit."
            )
        elif not function.is_registered(self.config):
            message = (
                f"{function} was registered for units of work with another configuration, so that no "
                "process would call it for this one. Register it with the class of this unit of work, "
                "after its config is set."
            )
        if message is not None:
            raise ConfigException(message)

    async def journal_compensation(self, call: JobCall) -> Job:
        """Journal the compensation of a step, before the step is done (P33).

        Raises:
            ConfigException: the backend cannot.
            TransactionLostException: recovery has taken over the transaction.
            TransactionException: it is being rolled back.
        """
        self.check_can_be_journaled(call, Outcome.ABORTED)
        await self.begin()
        job = self._job(call, Outcome.ABORTED)
        await self.backend.add_jobs([job])
        self.check()
        return job

    async def begin(self) -> None:
        """Write the transaction to the journal, so that other processes can finish it."""
        if not self.rows_confirmed:
            await self._lock((), lambda _: ())
        self.check()

    def hooks(self) -> list[Job]:
        """Return the hooks to call after the commit."""
        return [self._job(each.call, Outcome.COMMITTED, each.key) for each in self.callbacks.hooks]

    def _job(self, call: JobCall, after: Outcome, key: str | None = None) -> Job:
        number = self._next_job
        self._next_job += 1
        return Job(
            transaction_id=self.transaction_id,
            number=number,
            name=call.function.name,
            arguments=call.arguments,
            after=after,
            key=key,
        )

    def release(self, undos: Sequence[Undo]) -> None:
        """Make compensations due however the transaction ends, since their savepoint was undone."""
        self._unreleased += [each.release() for each in undos if isinstance(each, DurableUndo)]

    def release_failed(self) -> None:
        """Make the compensations of steps that raised due, even if the transaction commits.

        If another step with the same compensation has succeeded, the step was only repeated, and is
        left out.
        """
        durable = [each for each in self.callbacks.undos if isinstance(each, DurableUndo)]
        done = {each.call for each in durable if not each.failed}
        failed: list[Undo] = [
            each for each in durable if each.failed and not each.released and each.call not in done
        ]
        if failed:
            self.release(failed)
            self.callbacks.overdue += failed

    async def journal_released(self) -> None:
        """Journal the released compensations; the transaction cannot commit before that."""
        if self._unreleased:
            await self.backend.add_jobs(self._unreleased)
            self._unreleased.clear()

    async def begin_writes(
        self,
        keys: Sequence[ObjectKey],
        place: Place,
        check: Callable[[Mapping[ObjectKey, Record]], None] = lambda _: None,
    ) -> list[int]:
        """Lock keys and journal the intents for them before anything is sent (P2, P3).

        Args:
            keys: each once.
            place: a pure function; returns the placement of a write, or None for no write, given
                the record of the key and the transaction's own writes of it.
            check: a pure function; may refuse, given the records of all keys.

        Returns:
            the sequences of the writes, in the order of the keys.

        Raises:
            RecordLockedException: another transaction holds one of the keys for `lock_timeout`.
            TransactionLostException: recovery has taken over the transaction.
            TransactionException: it is being rolled back, or the savepoint of the caller was
                undone.
        """
        scopes = self.scopes()
        first = self._next_seq
        self._next_seq += len(keys)
        prefix, catalog_id = self.config.reserved_prefix, self.backend.catalog_id
        intents: list[Intent] = []

        def plan(records: Mapping[ObjectKey, Record]) -> Sequence[Intent]:
            check(records)
            intents.clear()
            for seq, key in enumerate(keys, first):
                placement = place(key, records.get(key), self.chain(key))
                if placement is not None:
                    write = WriteId(self.transaction_id, seq)
                    staged = placement is Placement.STAGED
                    target = staging_key(prefix, catalog_id, write) if staged else key.key
                    intents.append(
                        Intent(
                            seq=seq,
                            namespace=key.namespace,
                            key=key.key,
                            placement=placement,
                            target=target,
                        )
                    )
            return intents

        before = await self._lock(keys, plan)
        for intent in intents:
            self.writes[intent.seq] = Write(intent=intent, before=before.get(intent.object_key))
            if intent.object_key not in self.chains:
                self.chains[intent.object_key] = []
                self._unordered.setdefault(intent.namespace, []).append(intent.key)
            self.chains[intent.object_key].append(intent.seq)
            for scope in scopes:
                scope.seqs.append(intent.seq)
        try:
            self.check()
            self.scopes()
        except BaseException:
            self.retract([intent.seq for intent in intents])
            raise
        return [intent.seq for intent in intents]

    async def _lock(
        self,
        keys: Sequence[ObjectKey],
        plan: Callable[[Mapping[ObjectKey, Record]], Sequence[Intent]],
    ) -> Mapping[ObjectKey, Record]:
        """Lock keys and journal intents, waiting up to `lock_timeout` for other transactions (P3)."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        deadline = began + self.config.lock_timeout
        if not self.journaled:
            self.began = clock()
        wait: Wait | None = None
        with ExitStack() as waiting:
            while True:
                try:
                    records = await self._leases.begin_writes(
                        self.lease, keys, plan, begins=not self.rows_confirmed
                    )
                except RecordLockedException as error:
                    self.free_locks()
                    wait = wait or waiting.enter_context(self._waits.wait(self.transaction_id))
                    wait.holder = error.holder
                    if self._waits.is_victim(wait):
                        raise _deadlock(error) from error
                    ends = deadline
                    if self.writes and error.holder is not None:
                        # Processes cannot detect that they wait for each other. The younger
                        # transaction gives up first, so that the other one can continue.
                        younger = error.holder < self.transaction_id
                        ends -= self.config.lock_timeout / 4 if younger else 0
                    left = ends - loop.time()
                    if left <= 0:
                        waited = loop.time() - began
                        raise await self._still_locked(error, waited) from error
                except BaseException as error:
                    # If the answer was lost, the journal may have rows of this transaction.
                    answered = isinstance(error, FennFlowException)
                    if not answered or isinstance(error, BackendUnavailableException):
                        self.journaled = True
                    raise
                else:
                    self.journaled = self.rows_confirmed = True
                    return records
                await self._waits.pause(wait, left)

    async def _still_locked(
        self, error: RecordLockedException, seconds: float
    ) -> RecordLockedException:
        why = None
        if error.holder is not None:
            with suppress(FennFlowException):  # the important error is that the key is locked
                why = await holder(self.backend, error.holder)
        limit = f"lock_timeout={self.config.lock_timeout} s"
        waited = f"{seconds:.3g} s ({limit}); nothing of this call was sent."
        if error.free_in is not None:
            message = f"{error} It was still locked after {waited} Try again then."
        elif why is not None:
            message = f"{error} It was still locked after {waited} {why}"
        else:
            message = (
                f"{error} It was still locked after {waited} Try again, or raise lock_timeout. If the "
                "process that holds it has died, it is free at most lease_ttl="
                f"{self.config.lease_ttl} s after its last heartbeat."
            )
        return RecordLockedException(message, free_in=error.free_in, holder=error.holder)

    def free_locks(self) -> None:
        """Have recovery look for transactions of dead owners, because this one waits for a lock."""
        self._recovery.free_locks()


def _deadlock(error: RecordLockedException) -> RecordLockedException:
    message = (
        f"{error} Transaction {error.holder}, which holds it, waits for a path of this one in turn: a "
        "deadlock. Nothing of this call was sent, and the other transaction continues. Run this one "
        "again, and write paths in the same order everywhere."
    )
    return RecordLockedException(message, holder=error.holder)


def rolled_back() -> TransactionException:
    """Return the error of a call whose unit of work was rolled back in the meantime."""
    message = "The unit of work was rolled back during this call, so the call was undone."
    return TransactionException(message)


def no_such_key(namespace: str, keys: Sequence[str]) -> NoSuchKeyException:
    """Return the error for keys without a file."""
    message = f"No such file: {', '.join(f'{namespace}/{key}' for key in keys)}"
    return NoSuchKeyException(message)
