"""A backend that passes every operation to a `Faults`, which decides about it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TypeVar

from typing_extensions import override

from fennflow.backends import (
    FINISHED,
    Backend,
    Commit,
    CommittedTransaction,
    Decision,
    Fill,
    FillPart,
    Guarantees,
    Job,
    JoinedTransaction,
    JournaledTransaction,
    LateWrite,
    ObjectKey,
    Plan,
    Record,
    Settlement,
    TransactionToken,
)
from fennflow.testing.faulty import Effect, Faults, Operation

R = TypeVar("R")


class FaultyBackend(Backend):
    """A backend that asks a `Faults` about every operation; like `FaultyConnector`."""

    def __init__(self, inner: Backend, faults: Faults) -> None:
        self.inner = inner
        self.faults = faults

    async def _around(self, name: str, effect: Effect[R], transaction: str = "") -> R:
        return await self.faults.around(
            Operation(name, part="backend", transaction=transaction), effect
        )

    @property
    @override
    def catalog_id(self) -> str:
        return self.inner.catalog_id

    @override
    async def open(self) -> None:
        await self.inner.open()

    @override
    async def aclose(self) -> None:
        await self.inner.aclose()

    @property
    @override
    def guarantees(self) -> Guarantees:
        return self.inner.guarantees

    @override
    async def recall(self, name: str) -> str | None:
        return await self.inner.recall(name)

    @override
    async def remember(self, name: str, value: str) -> None:
        await self.inner.remember(name, value)

    @override
    async def note(self, name: str) -> str | None:
        return await self.inner.note(name)

    @override
    async def keep_note(self, name: str, value: str) -> None:
        await self.inner.keep_note(name, value)

    @override
    async def ticket_key(self) -> bytes:
        return await self.inner.ticket_key()

    @override
    async def records(self, keys: Collection[ObjectKey]) -> Mapping[ObjectKey, Record]:
        return await self._around("records", lambda: self.inner.records(keys))

    @override
    async def scan(
        self, namespace: str, *, prefix: str, start: str, limit: int
    ) -> Sequence[Record]:
        return await self._around(
            "scan",
            lambda: self.inner.scan(namespace, prefix=prefix, start=start, limit=limit),
        )

    @override
    async def scan_names(
        self, namespace: str, *, prefix: str, start: str, limit: int, delimiter: str
    ) -> Sequence[Record]:
        return await self._around(
            "scan",
            lambda: self.inner.scan_names(
                namespace, prefix=prefix, start=start, limit=limit, delimiter=delimiter
            ),
        )

    @override
    async def fills(self) -> Sequence[Fill]:
        return await self._around("fills", self.inner.fills)

    @override
    async def fill(self, fill: Fill, part: FillPart) -> bool:
        return await self._around("fill", lambda: self.inner.fill(fill, part))

    @override
    async def end_fill(self, fill: Fill) -> None:
        await self._around("end_fill", lambda: self.inner.end_fill(fill))

    @override
    async def add_details(self, records: Collection[Record]) -> None:
        await self._around("add_details", lambda: self.inner.add_details(records))

    @override
    async def begin_writes(
        self,
        token: TransactionToken,
        keys: Collection[ObjectKey],
        plan: Plan,
        *,
        begins: bool = True,
    ) -> Mapping[ObjectKey, Record]:
        return await self._around(
            "begin_writes",
            lambda: self.inner.begin_writes(token, keys, plan, begins=begins),
            token.transaction_id,
        )

    @override
    async def note_upload(self, token: TransactionToken, seq: int, upload_id: str) -> None:
        await self._around(
            "note_upload",
            lambda: self.inner.note_upload(token, seq, upload_id),
            token.transaction_id,
        )

    @override
    async def commit(self, token: TransactionToken, commit: Commit) -> None:
        await self._around("commit", lambda: self.inner.commit(token, commit), token.transaction_id)

    @override
    async def abort(self, token: TransactionToken, *, lock_wait: float | None = None) -> Decision:
        return await self._around(
            "abort", lambda: self.inner.abort(token, lock_wait=lock_wait), token.transaction_id
        )

    @override
    async def join(self, transaction: object) -> JoinedTransaction:
        return await self.inner.join(transaction)

    @override
    async def relocate(self, token: TransactionToken, records: Sequence[Record]) -> None:
        await self._around(
            "relocate", lambda: self.inner.relocate(token, records), token.transaction_id
        )

    @override
    async def settle(self, token: TransactionToken, settlement: Settlement = FINISHED) -> None:
        await self._around(
            "settle", lambda: self.inner.settle(token, settlement), token.transaction_id
        )

    @override
    async def late_writes(self, keys: Collection[ObjectKey]) -> Collection[LateWrite]:
        return await self._around("late_writes", lambda: self.inner.late_writes(keys))

    @override
    async def due_late_writes(self, *, after: LateWrite | None, limit: int) -> Sequence[LateWrite]:
        return await self._around(
            "due_late_writes", lambda: self.inner.due_late_writes(after=after, limit=limit)
        )

    @override
    async def heartbeat(
        self, transactions: Collection[TransactionToken]
    ) -> Collection[TransactionToken]:
        return await self._around("heartbeat", lambda: self.inner.heartbeat(transactions))

    @override
    async def claim(self, limit: int) -> Sequence[JournaledTransaction]:
        return await self._around("claim", lambda: self.inner.claim(limit))

    @override
    async def transactions(self, *, after: str, limit: int) -> Sequence[JournaledTransaction]:
        return await self._around(
            "transactions", lambda: self.inner.transactions(after=after, limit=limit)
        )

    @override
    async def known(self, transaction_ids: Collection[str]) -> Collection[str]:
        return await self._around("known", lambda: self.inner.known(transaction_ids))

    @override
    async def hold(self, token: TransactionToken, commit: Commit, seconds: float) -> None:
        await self._around(
            "hold", lambda: self.inner.hold(token, commit, seconds), token.transaction_id
        )

    @override
    async def take_held(self, transaction_id: str) -> JournaledTransaction | None:
        return await self._around(
            "take_held", lambda: self.inner.take_held(transaction_id), transaction_id
        )

    @property
    @override
    def keeps_commits(self) -> bool:
        return self.inner.keeps_commits

    @override
    async def commits(self, *, after: str | None, limit: int) -> Sequence[CommittedTransaction]:
        return await self._around("commits", lambda: self.inner.commits(after=after, limit=limit))

    @override
    async def commit_cursor(self) -> str:
        return await self._around("commit_cursor", self.inner.commit_cursor)

    @property
    @override
    def keeps_jobs(self) -> bool:
        return self.inner.keeps_jobs

    @override
    async def add_jobs(self, jobs: Collection[Job]) -> None:
        transactions = {each.transaction_id for each in jobs}
        await self._around("add_jobs", lambda: self.inner.add_jobs(jobs), ", ".join(transactions))

    @override
    async def claim_jobs(
        self,
        names: Collection[str],
        *,
        limit: int,
        transaction_id: str | None = None,
        hurry: bool = False,
    ) -> Sequence[Job]:
        return await self._around(
            "claim_jobs",
            lambda: self.inner.claim_jobs(
                names, limit=limit, transaction_id=transaction_id, hurry=hurry
            ),
        )

    @override
    async def keep_job(
        self, job: Job, *, retry_in: float | None = None, error: str | None = None
    ) -> bool:
        return await self._around(
            "keep_job",
            lambda: self.inner.keep_job(job, retry_in=retry_in, error=error),
            job.transaction_id,
        )

    @override
    async def end_jobs(self, jobs: Collection[Job]) -> None:
        await self._around("end_jobs", lambda: self.inner.end_jobs(jobs))

    @override
    async def jobs(self, *, limit: int, transaction_id: str | None = None) -> Sequence[Job]:
        return await self._around(
            "jobs", lambda: self.inner.jobs(limit=limit, transaction_id=transaction_id)
        )
