"""Catalog and journal in the memory of the process: the contract of `Backend`, on dictionaries.

Every transaction holds one lock and awaits nothing, so it is atomic for all event loops and
threads of the process.
"""

from __future__ import annotations

import secrets
import threading
import time
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING

import uuid_utils
from typing_extensions import override

from fennflow.backends import (
    FINISHED,
    Area,
    Backend,
    Commit,
    CommittedTransaction,
    Decision,
    Fill,
    FillPart,
    Intent,
    Job,
    JournaledTransaction,
    LateWrite,
    ObjectKey,
    Outcome,
    Plan,
    Record,
    Settlement,
    Step,
    TransactionToken,
    WriteId,
    bad_cursor,
    changed_reads,
    conflict,
    locked,
    process_name,
)
from fennflow.exceptions import TransactionLostException
from fennflow.paths import next_name

if TYPE_CHECKING:
    from fennflow.config import ConfigDict, ConnectorConfig
    from fennflow_memory.config import InMemoryBackendConfig

COMMITS_KEPT = 1000
"""How many of the last commits are kept for the feed, since they take memory."""
DIGITS = 19
"""Fewer than a number has that is too long to be one of a commit."""


@dataclass(slots=True)
class _Transaction:
    """A transaction's row."""

    fence: int
    began: float = 0.0
    lease_until: float = 0.0
    outcome: Outcome | None = None
    intents: dict[int, Intent] = field(default_factory=dict[int, Intent])
    locks: set[ObjectKey] = field(default_factory=set[ObjectKey])
    steps: Sequence[Step] = ()
    held: Commit | None = None
    held_until: float = 0.0


@dataclass(slots=True)
class _Job:
    """A job's row."""

    job: Job
    due: float
    lease_until: float = 0.0


@dataclass(slots=True)
class _Tables:
    """The tables that a database would have."""

    catalog_id: str = field(default_factory=lambda: str(uuid_utils.uuid7()))
    ticket_key: bytes = field(default_factory=lambda: secrets.token_bytes(32))
    notes: dict[str, str] = field(default_factory=dict[str, str])
    lock: threading.Lock = field(default_factory=threading.Lock)
    records: dict[ObjectKey, Record] = field(default_factory=dict[ObjectKey, Record])
    keys: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    transactions: dict[str, _Transaction] = field(default_factory=dict[str, _Transaction])
    # By key: the transaction that holds it, and the end of the lock if that transaction is finished
    # (P20 b).
    locks: dict[ObjectKey, tuple[str, float | None]] = field(
        default_factory=dict[ObjectKey, "tuple[str, float | None]"]
    )
    fills: dict[Area, Fill] = field(default_factory=dict[Area, Fill])
    late_writes: dict[LateWrite, float] = field(default_factory=dict[LateWrite, float])
    outcomes: dict[str, tuple[Outcome, float]] = field(
        default_factory=dict[str, "tuple[Outcome, float]"]
    )
    jobs: dict[tuple[str, int], _Job] = field(default_factory=dict[tuple[str, int], _Job])
    # The end of the feed, and the total number of commits (P38).
    commits: deque[tuple[str, datetime, Commit]] = field(
        default_factory=lambda: deque["tuple[str, datetime, Commit]"](maxlen=COMMITS_KEPT)
    )
    committed: int = 0


_tables: dict[tuple[InMemoryBackendConfig, ConnectorConfig], _Tables] = {}
_tables_lock = threading.Lock()


def new_backend(config: InMemoryBackendConfig, settings: ConfigDict) -> Backend:
    """Return a backend on the process's tables for this pair of configs."""
    with _tables_lock:
        tables = _tables.setdefault((config, settings.connector), _Tables())
    return InMemoryBackend(
        tables, late_write_period=settings.late_write_period, lease_ttl=settings.lease_ttl
    )


class InMemoryBackend(Backend):
    """Catalog and journal on dictionaries.

    Args:
        tables: the rows.
        late_write_period: seconds for which late writes and retained locks are kept.
        lease_ttl: seconds for which a lease lasts.
    """

    def __init__(self, tables: _Tables, *, late_write_period: float, lease_ttl: float) -> None:
        self._tables = tables
        self._late_write_period = late_write_period
        self._lease_ttl = lease_ttl

    @property
    @override
    def catalog_id(self) -> str:
        return self._tables.catalog_id

    @override
    async def ticket_key(self) -> bytes:
        return self._tables.ticket_key

    @override
    async def note(self, name: str) -> str | None:
        return self._tables.notes.get(name)

    @override
    async def keep_note(self, name: str, value: str) -> None:
        self._tables.notes[name] = value

    @override
    async def open(self) -> None:
        """Do nothing: the tables exist."""

    @override
    async def aclose(self) -> None:
        """Do nothing: the tables stay for the process."""

    @override
    async def records(self, keys: Collection[ObjectKey]) -> Mapping[ObjectKey, Record]:
        with self._tables.lock:
            return self._records(keys)

    @override
    async def scan(
        self, namespace: str, *, prefix: str, start: str, limit: int
    ) -> Sequence[Record]:
        with self._tables.lock:
            return self._scan(namespace, prefix, start, limit)

    @override
    async def scan_names(
        self, namespace: str, *, prefix: str, start: str, limit: int, delimiter: str
    ) -> Sequence[Record]:
        with self._tables.lock:
            return self._scan(namespace, prefix, start, limit, delimiter)

    def _scan(
        self, namespace: str, prefix: str, start: str, limit: int, delimiter: str | None = None
    ) -> list[Record]:
        keys = self._tables.keys.get(namespace, [])
        found: list[Record] = []
        index = bisect_left(keys, max(start, prefix))
        while index < len(keys) and len(found) < limit and keys[index].startswith(prefix):
            found.append(self._tables.records[ObjectKey(namespace, keys[index])])
            index = next_name(keys, index, prefix, delimiter)
        return found

    @override
    async def fills(self) -> Sequence[Fill]:
        with self._tables.lock:
            return list(self._tables.fills.values())

    @override
    async def fill(self, fill: Fill, part: FillPart) -> bool:
        tables, (namespace, prefix) = self._tables, fill.area
        with tables.lock:
            if part.begins and not self._scan(namespace, prefix, "", 1):
                tables.fills.setdefault(fill.area, fill)
            if tables.fills.get(fill.area) != fill:
                return False
            for record in part.records:
                self._put_record(record)
            for key in part.removed:
                self._remove_record(ObjectKey(fill.hidden, key))
            return True

    @override
    async def end_fill(self, fill: Fill) -> None:
        tables = self._tables
        with tables.lock:
            if tables.fills.get(fill.area) != fill:
                return
            del tables.fills[fill.area]
            namespace = fill.area.namespace
            shown = tables.keys.setdefault(namespace, [])
            for key in tables.keys.pop(fill.hidden, []):
                record = tables.records.pop(ObjectKey(fill.hidden, key))
                if ObjectKey(namespace, key) not in tables.records:
                    tables.records[ObjectKey(namespace, key)] = replace(record, namespace=namespace)
                    shown.append(key)
            shown.sort()

    @override
    async def add_details(self, records: Collection[Record]) -> None:
        with self._tables.lock:
            for record in records:
                now = self._tables.records.get(record.object_key)
                if now is not None and now.only_listed and now.write == record.write:
                    self._put_record(record)

    @override
    async def begin_writes(
        self,
        token: TransactionToken,
        keys: Collection[ObjectKey],
        plan: Plan,
        *,
        begins: bool = True,
    ) -> Mapping[ObjectKey, Record]:
        tables = self._tables
        with tables.lock:
            row = tables.transactions.get(token.transaction_id)
            if row is None and begins and token.transaction_id not in tables.outcomes:
                row = _Transaction(fence=0, began=time.monotonic())
            if row is None or row.fence != token.fence or row.outcome is not None:
                raise _lost(token)
            for key in sorted(keys):
                holder, until = tables.locks.get(key, (token.transaction_id, None))
                free_in = None if until is None else until - time.monotonic()
                if holder != token.transaction_id and (free_in is None or free_in > 0):
                    raise locked(key, free_in, holder)
            records = self._records(keys)
            intents = plan(records)
            tables.transactions[token.transaction_id] = row
            row.lease_until = time.monotonic() + self._lease_ttl
            for key in keys:
                tables.locks[key] = (token.transaction_id, None)
            row.locks.update(keys)
            row.intents.update({intent.seq: intent for intent in intents})
            return records

    @override
    async def note_upload(self, token: TransactionToken, seq: int, upload_id: str) -> None:
        with self._tables.lock:
            intents = self._row(token).intents
            intents[seq] = replace(intents[seq], upload_id=upload_id)

    @override
    async def commit(self, token: TransactionToken, commit: Commit) -> None:
        tables = self._tables
        with tables.lock:
            row = self._row(token)
            if row.outcome is not None:
                raise _lost(token)
            now = self._records(commit.reads)
            changed = changed_reads(commit.reads, now)
            if changed:
                raise conflict(changed)
            for record in commit.records:
                self._put_record(record)
            for key in commit.removed:
                self._remove_record(key)
            self._decide(token, row, Outcome.COMMITTED)
            self._record_late_writes(commit.late_writes)
            row.steps = commit.steps
            self._add_jobs(commit.jobs)
            if commit.records or commit.removed:
                tables.commits.append((token.transaction_id, datetime.now(UTC), commit))
                tables.committed += 1
            if not commit.steps:
                self._drop(token, row)

    @override
    async def abort(self, token: TransactionToken, *, lock_wait: float | None = None) -> Decision:
        del lock_wait  # no database transaction stays open
        with self._tables.lock:
            row = self._tables.transactions.get(token.transaction_id)
            if row is None:
                decided = self._tables.outcomes.get(token.transaction_id)
                if decided is None:
                    # It has no rows; deciding it anyway ensures that it never gets any.
                    self._decide(token, _Transaction(token.fence), Outcome.ABORTED)
                return Decision(outcome=decided[0] if decided else Outcome.ABORTED, finished=True)
            if row.fence != token.fence:
                raise _lost(token)
            if row.outcome is None:
                self._decide(token, row, Outcome.ABORTED)
            outcome = row.outcome or Outcome.ABORTED
            return Decision(outcome=outcome, keys=frozenset(row.locks), steps=row.steps)

    @override
    async def relocate(self, token: TransactionToken, records: Sequence[Record]) -> None:
        with self._tables.lock:
            self._row(token)
            for record in records:
                now = self._tables.records.get(record.object_key)
                if now is not None and now.write == record.write:
                    self._put_record(record)

    @override
    async def settle(self, token: TransactionToken, settlement: Settlement = FINISHED) -> None:
        with self._tables.lock:
            if token.transaction_id not in self._tables.transactions:
                return
            row = self._row(token)
            for late_write in settlement.late_writes_checked:
                self._tables.late_writes.pop(late_write, None)
            self._record_late_writes(settlement.late_writes)
            keys = settlement.keys
            released = row.locks if keys is None else row.locks.intersection(keys)
            kept = released.intersection(settlement.keep_locked)
            self._release(row, released)
            if keys is None:
                self._drop(token, row)
            until = time.monotonic() + self._late_write_period
            self._tables.locks.update(dict.fromkeys(kept, (token.transaction_id, until)))

    @override
    async def late_writes(self, keys: Collection[ObjectKey]) -> Collection[LateWrite]:
        wanted = set(keys)
        with self._tables.lock:
            return [
                late_write
                for late_write in self._tables.late_writes
                if ObjectKey(late_write.namespace, late_write.key) in wanted
            ]

    @override
    async def due_late_writes(self, *, after: LateWrite | None, limit: int) -> Sequence[LateWrite]:
        now = time.monotonic()
        with self._tables.lock:
            due = [
                late_write
                for late_write, until in self._tables.late_writes.items()
                if until <= now
                and late_write.write.transaction_id not in self._tables.transactions
                and (after is None or _order(late_write) > _order(after))
            ]
        return sorted(due, key=_order)[:limit]

    @override
    async def heartbeat(
        self, transactions: Collection[TransactionToken]
    ) -> Collection[TransactionToken]:
        until = time.monotonic() + self._lease_ttl
        kept: list[TransactionToken] = []
        with self._tables.lock:
            for token in transactions:
                row = self._tables.transactions.get(token.transaction_id)
                if row is not None and row.fence == token.fence:
                    row.lease_until = until
                    kept.append(token)
        return kept

    @override
    async def claim(self, limit: int) -> Sequence[JournaledTransaction]:
        now = time.monotonic()
        with self._tables.lock:
            self._purge(now)
            expired = [
                (transaction_id, row)
                for transaction_id, row in self._tables.transactions.items()
                if row.lease_until <= now
            ]
            for _, row in expired[:limit]:
                row.fence += 1
                row.lease_until = now + self._lease_ttl
            return [_journaled(transaction_id, row, now) for transaction_id, row in expired[:limit]]

    @override
    async def transactions(self, *, after: str, limit: int) -> Sequence[JournaledTransaction]:
        with self._tables.lock:
            ids = sorted(each for each in self._tables.transactions if each > after)[:limit]
            now = time.monotonic()
            return [_journaled(each, self._tables.transactions[each], now) for each in ids]

    @override
    async def known(self, transaction_ids: Collection[str]) -> Collection[str]:
        with self._tables.lock:
            return [each for each in transaction_ids if each in self._tables.transactions]

    @override
    async def hold(self, token: TransactionToken, commit: Commit, seconds: float) -> None:
        with self._tables.lock:
            row = self._row(token)
            if row.outcome is not None:
                raise _lost(token)
            row.held = commit
            row.held_until = row.lease_until = time.monotonic() + seconds

    @override
    async def take_held(self, transaction_id: str) -> JournaledTransaction | None:
        now = time.monotonic()
        with self._tables.lock:
            row = self._tables.transactions.get(transaction_id)
            if row is None or not _journaled(transaction_id, row, now).is_held:
                return None
            row.fence += 1
            row.lease_until = now + self._lease_ttl
            return _journaled(transaction_id, row, now)

    # --- the feed of commits -----------------------------------------------------------------

    @property
    @override
    def keeps_commits(self) -> bool:
        return True

    @override
    async def commits(self, *, after: str | None, limit: int) -> Sequence[CommittedTransaction]:
        tables = self._tables
        with tables.lock:
            begins = tables.committed - len(tables.commits)
            number = begins
            if after is not None:
                digits, _, catalog_id = after.partition(".")
                number = int(digits) if digits.isdecimal() and len(digits) < DIGITS else -1
                if catalog_id != self.catalog_id or not begins <= number <= tables.committed:
                    raise bad_cursor(after)
            found = islice(tables.commits, number - begins, number - begins + limit)
            return [
                CommittedTransaction(
                    cursor=f"{place}.{self.catalog_id}",
                    transaction_id=transaction_id,
                    committed_at=at,
                    records=commit.records,
                    removed=commit.removed,
                )
                for place, (transaction_id, at, commit) in enumerate(found, number + 1)
            ]

    @override
    async def commit_cursor(self) -> str:
        with self._tables.lock:
            return f"{self._tables.committed}.{self.catalog_id}"

    # --- compensations and hooks -------------------------------------------------------------

    @property
    @override
    def keeps_jobs(self) -> bool:
        return True

    @override
    async def add_jobs(self, jobs: Collection[Job]) -> None:
        with self._tables.lock:
            self._add_jobs(jobs)

    def _add_jobs(self, jobs: Collection[Job]) -> None:
        for job in jobs:
            identity = job.transaction_id, job.number
            before = self._tables.jobs.get(identity)
            # A running attempt is fenced off.
            attempts = 0 if before is None else before.job.attempts + (before.lease_until > 0)
            row = _Job(replace(job, attempts=attempts), time.monotonic())
            self._tables.jobs[identity] = row

    @override
    async def claim_jobs(
        self,
        names: Collection[str],
        *,
        limit: int,
        transaction_id: str | None = None,
        hurry: bool = False,
    ) -> Sequence[Job]:
        now = time.monotonic()
        with self._tables.lock:
            taken = [
                row
                for row in self._tables.jobs.values()
                if row.job.name in names
                and transaction_id in {None, row.job.transaction_id}
                and row.lease_until <= now
                and (hurry or row.due <= now)
                and self._is_due(row.job)
                and not self._waits(row.job)
            ][:limit]
            for row in taken:
                row.job = replace(row.job, attempts=row.job.attempts + 1)
                row.lease_until = now + self._lease_ttl
            return [row.job for row in taken]

    def _is_due(self, job: Job) -> bool:
        if job.after is not Outcome.ABORTED:
            return True  # a hook is here only if its transaction has committed
        decided = self._tables.outcomes.get(job.transaction_id)
        if decided is None:
            return job.transaction_id not in self._tables.transactions
        return decided[0] is Outcome.ABORTED

    def _waits(self, job: Job) -> bool:
        others = [each.job for each in self._tables.jobs.values()]
        if job.after is not Outcome.COMMITTED:
            return any(
                job.waits_for(each) for each in others if each.after is not Outcome.COMMITTED
            )
        first = next(each for each in others if each.key == job.key)
        return job.key is not None and first.idempotency_key != job.idempotency_key

    @override
    async def keep_job(
        self, job: Job, *, retry_in: float | None = None, error: str | None = None
    ) -> bool:
        now = time.monotonic()
        with self._tables.lock:
            row = self._tables.jobs.get((job.transaction_id, job.number))
            if row is None or row.job.attempts != job.attempts:
                return False
            if retry_in is None:
                row.lease_until = now + self._lease_ttl
            else:
                row.job = replace(row.job, error=error)
                row.lease_until, row.due = 0.0, now + retry_in
            return True

    @override
    async def end_jobs(self, jobs: Collection[Job]) -> None:
        with self._tables.lock:
            for job in jobs:
                row = self._tables.jobs.get((job.transaction_id, job.number))
                if row is not None and row.job.attempts == job.attempts:
                    del self._tables.jobs[job.transaction_id, job.number]

    @override
    async def jobs(self, *, limit: int, transaction_id: str | None = None) -> Sequence[Job]:
        with self._tables.lock:
            return [
                row.job
                for row in self._tables.jobs.values()
                if row.job.transaction_id == transaction_id
                or (transaction_id is None and self._is_due(row.job))
            ][:limit]

    def _records(self, keys: Collection[ObjectKey]) -> dict[ObjectKey, Record]:
        records = self._tables.records
        return {key: records[key] for key in keys if key in records}

    def _put_record(self, record: Record) -> None:
        key = record.object_key
        if key not in self._tables.records:
            insort(self._tables.keys.setdefault(key.namespace, []), key.key)
        self._tables.records[key] = record

    def _remove_record(self, key: ObjectKey) -> None:
        if self._tables.records.pop(key, None) is not None:
            keys = self._tables.keys[key.namespace]
            del keys[bisect_left(keys, key.key)]

    def _row(self, token: TransactionToken) -> _Transaction:
        row = self._tables.transactions.get(token.transaction_id)
        if row is None or row.fence != token.fence:
            raise _lost(token)
        return row

    def _decide(self, token: TransactionToken, row: _Transaction, outcome: Outcome) -> None:
        row.outcome = outcome
        until = time.monotonic() + self._late_write_period
        self._tables.outcomes[token.transaction_id] = (outcome, until)

    def _record_late_writes(self, late_writes: Collection[LateWrite]) -> None:
        due = time.monotonic() + self._late_write_period
        self._tables.late_writes.update(dict.fromkeys(late_writes, due))

    def _drop(self, token: TransactionToken, row: _Transaction) -> None:
        if row.outcome is not None:
            self._decide(token, row, row.outcome)  # it outlives the rows by the late-write period
        self._release(row, row.locks)
        del self._tables.transactions[token.transaction_id]

    def _release(self, row: _Transaction, keys: Collection[ObjectKey]) -> None:
        for key in keys:
            self._tables.locks.pop(key, None)
        kept = {seq: each for seq, each in row.intents.items() if each.object_key not in keys}
        row.locks, row.intents = row.locks.difference(keys), kept

    def _purge(self, now: float) -> None:
        """Remove outcomes and retained locks that are older than the late-write period."""
        tables = self._tables
        for identity, row in list(tables.jobs.items()):
            decided = tables.outcomes.get(row.job.transaction_id, (None, now))[0]
            if decided is Outcome.COMMITTED and row.job.after is Outcome.ABORTED:
                del tables.jobs[identity]  # its step is committed
        waited_for = {transaction_id for transaction_id, _ in tables.jobs}
        for transaction_id, (_, until) in list(tables.outcomes.items()):
            known = transaction_id in tables.transactions or transaction_id in waited_for
            if until <= now and not known:
                del tables.outcomes[transaction_id]
        for key, (_, kept_until) in list(tables.locks.items()):
            if kept_until is not None and kept_until <= now:
                del tables.locks[key]


def _order(late_write: LateWrite) -> tuple[str, str, WriteId]:
    return late_write.namespace, late_write.key, late_write.write


def _journaled(transaction_id: str, row: _Transaction, now: float) -> JournaledTransaction:
    return JournaledTransaction(
        token=TransactionToken(transaction_id, row.fence),
        outcome=row.outcome,
        age=now - row.began,
        lease_left=row.lease_until - now,
        intents=list(row.intents.values()),
        held=row.held,
        held_left=row.held_until - now,
        process=process_name(),
    )


def _lost(token: TransactionToken) -> TransactionLostException:
    message = (
        f"Transaction {token.transaction_id} belongs to another process: its lease expired, or it was "
        "decided there. Nothing was committed here; run the unit of work again."
    )
    return TransactionLostException(message)
