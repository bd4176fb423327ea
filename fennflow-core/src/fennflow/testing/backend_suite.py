"""The suite that a backend passes to call itself conformant.

A third party subclasses it with one fixture:

```python
class TestMyBackend(BackendSuite):
    @pytest.fixture
    def config(self, tmp_path):
        return MyBackendConfig(path=tmp_path)  # an empty catalog
```
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

from fennflow.backends import (
    Backend,
    Commit,
    Delete,
    Intent,
    LateWrite,
    ObjectKey,
    Outcome,
    Record,
)
from fennflow.config import BackendConfig
from fennflow.connectors import Location
from fennflow.exceptions import ConflictException, RecordLockedException, TransactionLostException
from fennflow.testing.recovery_suite import (
    A,
    B,
    C,
    RecoverySuite,
    new_transaction,
    opened,
    plan_for,
    put,
    record,
    run,
)


class BackendSuite(RecoverySuite):
    """Tests of the contract in `fennflow.backends`."""

    def test_a_record_comes_back_as_it_was_committed(self, config: BackendConfig) -> None:
        async def scenario(backend: Backend) -> None:
            transaction = await put(backend, A)
            assert await backend.records([A, B]) == {A: record(A, transaction)}

        run(config, scenario)

    def test_nothing_is_seen_before_the_pivot_and_all_after_it(self, config: BackendConfig) -> None:
        """P4, I2."""

        async def scenario(backend: Backend) -> None:
            await put(backend, C)
            transaction = new_transaction()
            await backend.begin_writes(transaction, [A, B, C], plan_for(A, B))
            assert set(await backend.records([A, B, C])) == {C}
            records = [record(A, transaction), record(B, transaction, seq=2)]
            await backend.commit(transaction, Commit(records=records, removed=[C]))
            assert set(await backend.records([A, B, C])) == {A, B}

        run(config, scenario)

    def test_staging_returns_the_records_that_the_plan_saw(self, config: BackendConfig) -> None:
        async def scenario(backend: Backend) -> None:
            before = await put(backend, A)
            seen: dict[ObjectKey, Record] = {}

            def plan(records: Mapping[ObjectKey, Record]) -> Sequence[Intent]:
                seen.update(records)
                return []

            returned = await backend.begin_writes(new_transaction(), [A, B], plan)
            assert returned == seen == {A: record(A, before)}

        run(config, scenario)

    def test_a_key_has_one_uncommitted_writer(self, config: BackendConfig) -> None:
        """P3, I6: all of a call's keys are locked, or none."""

        async def scenario(backend: Backend) -> None:
            first, second = new_transaction(), new_transaction()
            await backend.begin_writes(first, [B], plan_for(B))
            with pytest.raises(RecordLockedException):
                await backend.begin_writes(second, [A, B], plan_for(A, B))
            # None of the failed call's keys is locked.
            await backend.begin_writes(first, [A, B], plan_for(A))
            await backend.abort(first)
            with pytest.raises(RecordLockedException):
                await backend.begin_writes(second, [A], plan_for(A))
            await backend.settle(first)
            await backend.begin_writes(second, [A, B], plan_for(A, B))

        run(config, scenario)

    def test_of_racing_transactions_one_gets_the_key(self, config: BackendConfig) -> None:
        async def scenario(backend: Backend) -> None:
            async def stage() -> bool:
                try:
                    await backend.begin_writes(new_transaction(), [A, B], plan_for(A, B))
                except RecordLockedException:
                    return False
                return True

            async with asyncio.TaskGroup() as group:
                racing = [group.create_task(stage()) for _ in range(20)]
            assert sum(task.result() for task in racing) == 1

        run(config, scenario)

    def test_what_a_plan_raises_undoes_the_staging(self, config: BackendConfig) -> None:
        async def scenario(backend: Backend) -> None:
            def plan(_records: Mapping[ObjectKey, Record]) -> Sequence[Intent]:
                raise ZeroDivisionError

            with pytest.raises(ZeroDivisionError):
                await backend.begin_writes(new_transaction(), [A], plan)
            await backend.begin_writes(new_transaction(), [A], plan_for(A))

        run(config, scenario)

    def test_a_commit_with_steps_keeps_its_locks_until_it_is_settled(
        self, config: BackendConfig
    ) -> None:
        async def scenario(backend: Backend) -> None:
            transaction = new_transaction()
            await backend.begin_writes(transaction, [A], plan_for(A))
            steps = [Delete(namespace="bucket", location=Location("old"), etag="e0")]
            await backend.commit(transaction, Commit(records=[record(A, transaction)], steps=steps))
            with pytest.raises(RecordLockedException):
                await backend.begin_writes(new_transaction(), [A], plan_for(A))
            decision = await backend.abort(transaction)
            assert (decision.outcome, list(decision.steps)) == (Outcome.COMMITTED, steps)
            moved = replace(record(A, transaction), location=Location("a", "v2"), etag="e2")
            await backend.relocate(transaction, [moved])
            assert await backend.records([A]) == {A: moved}
            await backend.settle(transaction)
            await backend.begin_writes(new_transaction(), [A], plan_for(A))

        run(config, scenario)

    def test_the_first_decision_stands(self, config: BackendConfig) -> None:
        """P5."""

        async def scenario(backend: Backend) -> None:
            aborted = new_transaction()
            await backend.begin_writes(aborted, [A], plan_for(A))
            assert (await backend.abort(aborted)).outcome is Outcome.ABORTED
            assert (await backend.abort(aborted)).outcome is Outcome.ABORTED
            with pytest.raises(TransactionLostException):
                await backend.commit(aborted, Commit(records=[record(A, aborted)]))
            for begins in (True, False):
                with pytest.raises(TransactionLostException):
                    await backend.begin_writes(aborted, [B], plan_for(B), begins=begins)
            assert await backend.records([A]) == {}
            committed = await put(backend, B)
            assert (await backend.abort(committed)).outcome is Outcome.COMMITTED
            assert set(await backend.records([B])) == {B}

        run(config, scenario)

    def test_another_token_is_refused_everywhere(self, config: BackendConfig) -> None:
        async def scenario(backend: Backend) -> None:
            transaction = new_transaction()
            await backend.begin_writes(transaction, [A], plan_for(A))
            stranger = transaction._replace(fence=transaction.fence + 1)
            for attempt in (
                backend.begin_writes(stranger, [B], plan_for(B)),
                backend.note_upload(stranger, 1, "upload"),
                backend.commit(stranger, Commit(records=[record(A, stranger)])),
                backend.abort(stranger),
                backend.relocate(stranger, [record(A, stranger)]),
                backend.settle(stranger),
            ):
                with pytest.raises(TransactionLostException):
                    await attempt
            assert await backend.records([A]) == {}
            await backend.note_upload(transaction, 1, "upload")

        run(config, scenario)

    def test_a_changed_read_fails_the_pivot_and_decides_nothing(
        self, config: BackendConfig
    ) -> None:
        """Promise 4 of the protocol."""

        async def scenario(backend: Backend) -> None:
            old = record(A, await put(backend, A))
            await put(backend, A, etag="e2")
            transaction = new_transaction()
            await backend.begin_writes(transaction, [C], plan_for(C))
            changed = Commit(records=[record(C, transaction)], reads={A: old, B: None})
            with pytest.raises(ConflictException, match="bucket/a"):
                await backend.commit(transaction, changed)
            assert await backend.records([C]) == {}
            now = (await backend.records([A]))[A]
            await backend.commit(transaction, replace(changed, reads={A: now, B: None}))
            assert set(await backend.records([C])) == {C}

        run(config, scenario)

    def test_a_key_kept_locked_outlives_its_transaction(self, config: BackendConfig) -> None:
        """P20 b."""

        async def scenario(backend: Backend) -> None:
            transaction = new_transaction()
            await backend.begin_writes(transaction, [A, B], plan_for(A, B))
            await backend.abort(transaction)
            await backend.settle(transaction, keep_locked=[A])
            with pytest.raises(RecordLockedException):
                await backend.begin_writes(new_transaction(), [A], plan_for(A))
            await backend.begin_writes(new_transaction(), [B], plan_for(B))

        run(config, scenario)

    def test_late_writes_are_found_after_commit_and_settlement(self, config: BackendConfig) -> None:
        """P14, P20 a."""

        async def scenario(backend: Backend) -> None:
            transaction = new_transaction()
            first = LateWrite(
                namespace="bucket", key="a", transaction_id=transaction.transaction_id, seq=1
            )
            second = replace(first, seq=2)
            await backend.begin_writes(transaction, [A], plan_for(A))
            steps = [Delete(namespace="bucket", location=Location("old"))]
            await backend.commit(transaction, Commit(steps=steps, late_writes=[first]))
            assert list(await backend.late_writes([A, B])) == [first]
            await backend.settle(transaction, late_writes=[second])
            assert set(await backend.late_writes([A])) == {first, second}
            assert list(await backend.late_writes([B])) == []

        run(config, scenario)

    def test_a_scan_is_in_the_order_of_utf8_bytes(self, config: BackendConfig) -> None:
        async def scenario(backend: Backend) -> None:
            names = ["b", "a/2", "a/10", "ab", "a-", "B", "ä", "😀", "\uff5e", "a%", "a_"]
            await put(backend, *(ObjectKey("bucket", name) for name in names))
            await put(backend, ObjectKey("bucket2", "a"), ObjectKey("bucke", "a"))

            async def scan(prefix: str = "", start: str = "", limit: int = 100) -> list[str]:
                found = await backend.scan("bucket", prefix=prefix, start=start, limit=limit)
                return [each.key for each in found]

            ordered = sorted(names, key=str.encode)
            assert await scan() == ordered
            assert await scan(limit=3) == ordered[:3]
            assert await scan(start="ab") == ordered[ordered.index("ab") :]
            assert await scan(start="ab\0") == ordered[ordered.index("ab") + 1 :]
            assert await scan("a/") == ["a/10", "a/2"]
            assert await scan("a/", "a/10\0") == ["a/2"]
            # Wildcards of databases are letters like any other.
            assert await scan("a%") == ["a%"]
            assert await scan("a_") == ["a_"]

        run(config, scenario)

    def test_the_catalog_has_one_id(self, config: BackendConfig) -> None:
        async def scenario(backend: Backend) -> None:
            async with opened(config) as again:
                assert again.catalog_id == backend.catalog_id
            assert "/" not in backend.catalog_id

        run(config, scenario)
