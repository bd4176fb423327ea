"""The tests of recovery in `BackendSuite`."""

from __future__ import annotations

import asyncio

import pytest

from fennflow.backends import (
    AbortUpload,
    Backend,
    Commit,
    Copy,
    Delete,
    LateWrite,
    ObjectKey,
    Outcome,
    Settlement,
    Step,
    WriteId,
    process_name,
)
from fennflow.config import BackendConfig
from fennflow.connectors import Location
from fennflow.exceptions import (
    ConfigException,
    RecordLockedException,
    TransactionLostException,
)
from fennflow.testing.backend_values import (
    A,
    B,
    C,
    new_transaction,
    opened,
    plan_for,
    put,
    record,
    run,
)


class RecoverySuite:
    """Tests of leases, claims, late writes, and rows that outlive a transaction."""

    def test_a_transaction_that_is_held_is_taken_once_and_stays_locked(
        self, config: BackendConfig
    ) -> None:
        """P37: the contents of its pivot are returned; a decision ends it."""

        async def scenario(backend: Backend) -> None:
            before = await put(backend, B)
            token = new_transaction()
            await backend.begin_writes(token, [A, B, C], plan_for(A, B))
            commit = Commit(
                records=[record(A, token)],
                removed=[C],
                steps=[Delete(namespace="bucket", location=Location("c"), etag="e1")],
                late_writes=[
                    LateWrite(namespace="bucket", key="a", write=WriteId(token.transaction_id, 1))
                ],
                reads={B: record(B, before), C: None},
                jobs=[],
            )
            try:
                await backend.hold(token, commit, 600.0)
            except ConfigException:
                pytest.skip("The backend cannot hold transactions.")
            assert await backend.claim(10) == []
            first = await backend.take_held(token.transaction_id)
            second = await backend.take_held(token.transaction_id)
            assert first is not None
            assert second is not None
            assert first.token.fence < second.token.fence
            assert second.held == commit
            assert second.is_held
            for lost in (token, first.token):
                with pytest.raises(TransactionLostException):
                    await backend.commit(lost, commit)
            await backend.hold(second.token, commit, 600.0)
            await backend.commit(second.token, commit)
            assert await backend.take_held(token.transaction_id) is None
            with pytest.raises(TransactionLostException):
                await backend.hold(second.token, commit, 600.0)
            [found] = await backend.transactions(after="", limit=9)
            assert (found.outcome, found.is_held) == (Outcome.COMMITTED, False)
            assert set(await backend.records([A, B, C])) == {A, B}

        run(config, scenario)

    def test_what_a_commit_stores_is_what_recovery_gets(self, config: BackendConfig) -> None:
        """P4, P7: every kind of step, with all of its fields."""

        async def scenario(backend: Backend) -> None:
            transaction = new_transaction()
            steps: list[Step] = [
                Copy(
                    seq=1,
                    namespace="bucket",
                    key="a",
                    source=Location(".fennflow/ä", "v1"),
                    expected="e0",
                    ambiguous=True,
                    extra={"CacheControl": "no-store", "Tags": ["x", 1, None]},
                ),
                Delete(
                    namespace="bucket",
                    location=Location("a", "v2"),
                    etag="e1",
                    owner=WriteId("other", 3),
                    for_key="a",
                ),
                AbortUpload(namespace="bucket", key="a", upload_id="u"),
            ]
            await backend.begin_writes(transaction, [A], plan_for(A))
            await backend.commit(transaction, Commit(records=[record(A, transaction)], steps=steps))
            decision = await backend.abort(transaction)
            assert (decision.outcome, list(decision.steps)) == (Outcome.COMMITTED, steps)

        run(config, scenario)

    def test_a_transaction_whose_lease_runs_is_not_claimed(self, config: BackendConfig) -> None:
        """P22, P24."""

        async def scenario(backend: Backend) -> None:
            transaction = new_transaction()
            await backend.begin_writes(transaction, [A], plan_for(A))
            assert list(await backend.claim(10)) == []
            assert list(await backend.heartbeat([transaction, new_transaction()])) == [transaction]
            [found] = await backend.transactions(after="", limit=10)
            assert (found.token, found.outcome) == (transaction, None)
            assert [intent.object_key for intent in found.intents] == [A]
            assert found.process in {process_name(), None}
            assert 0 <= found.age <= 60
            assert 0 < found.lease_left <= 60
            assert (
                list(await backend.transactions(after=transaction.transaction_id, limit=10)) == []
            )
            assert list(await backend.known([transaction.transaction_id, "x"])) == [
                transaction.transaction_id
            ]

        run(config, scenario)

    def test_a_transaction_whose_lease_ran_out_is_claimed_once(self, config: BackendConfig) -> None:
        """P24, P25: only one recovering process gets it, and the owner is refused."""

        async def scenario(backend: Backend) -> None:
            transaction = new_transaction()
            await backend.begin_writes(transaction, [A, B], plan_for(A, B))
            left = 1.0
            while left > -0.1:
                await asyncio.sleep(0.05)
                left = (await backend.transactions(after="", limit=1))[0].lease_left
            # What it claims has a lease that does not run out before the others have tried.
            async with opened(config) as recoverer:
                async with asyncio.TaskGroup() as group:
                    claims = [group.create_task(recoverer.claim(10)) for _ in range(5)]
                [found] = [each for claim in claims for each in claim.result()]
                assert list(await recoverer.heartbeat([found.token])) == [found.token]
            assert found.token == (transaction.transaction_id, transaction.fence + 1)
            assert found.outcome is None
            assert [intent.object_key for intent in found.intents] == [A, B]
            assert list(await backend.heartbeat([transaction])) == []
            for attempt in (
                backend.begin_writes(transaction, [C], plan_for(C)),
                backend.commit(transaction, Commit(records=[record(A, transaction)])),
                backend.abort(transaction),
                backend.settle(transaction),
            ):
                with pytest.raises(TransactionLostException):
                    await attempt
            assert (await backend.abort(found.token)).outcome is Outcome.ABORTED
            with pytest.raises(RecordLockedException):
                await backend.begin_writes(new_transaction(), [A], plan_for(A))
            await backend.settle(found.token)
            await backend.begin_writes(new_transaction(), [A, B], plan_for(A, B))
            assert list(await backend.known([transaction.transaction_id])) == []

        run(config, scenario, lease_ttl=1.0)

    def test_a_claim_tells_what_was_decided(self, config: BackendConfig) -> None:
        async def scenario(backend: Backend) -> None:
            committed, aborted = new_transaction(), new_transaction()
            await backend.begin_writes(committed, [A], plan_for(A))
            await backend.begin_writes(aborted, [B], plan_for(B))
            steps = [Delete(namespace="bucket", location=Location("old"))]
            await backend.commit(committed, Commit(records=[record(A, committed)], steps=steps))
            await backend.abort(aborted)
            await asyncio.sleep(0.1)
            found = {each.token.transaction_id: each for each in await backend.claim(10)}
            assert found[committed.transaction_id].outcome is Outcome.COMMITTED
            assert found[aborted.transaction_id].outcome is Outcome.ABORTED
            decision = await backend.abort(found[committed.transaction_id].token)
            assert (decision.outcome, list(decision.steps)) == (Outcome.COMMITTED, steps)

        run(config, scenario, lease_ttl=0.05)

    def test_no_more_are_claimed_than_asked_for(self, config: BackendConfig) -> None:
        async def scenario(backend: Backend) -> None:
            keys = [ObjectKey("bucket", f"{number}") for number in range(5)]
            for key in keys:
                await backend.begin_writes(new_transaction(), [key], plan_for(key))
            await asyncio.sleep(0.1)
            async with opened(config) as recoverer:
                counts = [len(await recoverer.claim(2)) for _ in range(4)]
            assert counts == [2, 2, 1, 0]

        run(config, scenario, lease_ttl=0.05)

    def test_what_has_no_rows_is_finished(self, config: BackendConfig) -> None:
        """P6, P7: others may have written the same keys since."""

        async def scenario(backend: Backend) -> None:
            finished, aborted, never = new_transaction(), new_transaction(), new_transaction()
            steps = [Delete(namespace="bucket", location=Location("a"))]
            await backend.begin_writes(finished, [A], plan_for(A))
            await backend.commit(finished, Commit(records=[record(A, finished)], steps=steps))
            left = await backend.abort(finished)
            assert (left.finished, set(left.keys), list(left.steps)) == (False, {A}, steps)
            await backend.settle(finished)
            await backend.begin_writes(aborted, [B], plan_for(B))
            left = await backend.abort(aborted)
            assert (left.outcome, left.finished, set(left.keys)) == (Outcome.ABORTED, False, {B})
            await backend.settle(aborted)
            for transaction, outcome in (
                (finished, Outcome.COMMITTED),
                (await put(backend, C), Outcome.COMMITTED),
                (aborted, Outcome.ABORTED),
                (never, Outcome.ABORTED),
            ):
                left = await backend.abort(transaction)
                assert (left.outcome, left.finished) == (outcome, True)
                assert (list(left.keys), list(left.steps)) == ([], [])
                await backend.settle(transaction)

        run(config, scenario)

    def test_keys_are_released_one_after_the_other(self, config: BackendConfig) -> None:
        """P9, P28: a key that cannot be finished does not block others."""

        async def scenario(backend: Backend) -> None:
            transaction, other = new_transaction(), new_transaction()
            steps = [Delete(namespace="bucket", location=Location(key)) for key in "abc"]
            await backend.begin_writes(transaction, [A, B, C], plan_for(A, B, C))
            await backend.commit(transaction, Commit(steps=steps))
            for _ in range(2):  # the answer to the first may have been lost
                await backend.settle(transaction, Settlement(keys=[A, B], keep_locked=[B]))
            left = await backend.abort(transaction)
            assert (left.outcome, left.finished) == (Outcome.COMMITTED, False)
            assert set(left.keys) == {C}
            [found] = await backend.transactions(after="", limit=10)
            assert [intent.object_key for intent in found.intents] == [C]
            await backend.begin_writes(other, [A], plan_for(A))
            for key in (B, C):
                with pytest.raises(RecordLockedException):
                    await backend.begin_writes(new_transaction(), [key], plan_for(key))
            await backend.settle(transaction, Settlement(keys=[A, C], keep_locked=[A]))
            assert not (await backend.abort(transaction)).finished
            await backend.settle(transaction)
            assert (await backend.abort(transaction)).finished
            assert set((await backend.abort(other)).keys) == {A}
            await backend.begin_writes(new_transaction(), [C], plan_for(C))
            with pytest.raises(RecordLockedException):
                await backend.begin_writes(new_transaction(), [A], plan_for(A))

        run(config, scenario)

    def test_only_the_records_of_a_transaction_are_relocated(self, config: BackendConfig) -> None:
        """P28: records that others committed since are unchanged."""

        async def scenario(backend: Backend) -> None:
            late = new_transaction()
            newer = record(A, await put(backend, A))
            await backend.begin_writes(late, [B], plan_for(B))
            await backend.relocate(late, [record(A, late, etag="e2")])
            assert await backend.records([A]) == {A: newer}

        run(config, scenario)

    def test_who_holds_a_lock_is_told(self, config: BackendConfig) -> None:
        async def scenario(backend: Backend) -> None:
            transaction = new_transaction()
            await backend.begin_writes(transaction, [A], plan_for(A))
            with pytest.raises(RecordLockedException) as caught:
                await backend.begin_writes(new_transaction(), [A, B], plan_for(A, B))
            assert caught.value.holder in {transaction.transaction_id, None}

        run(config, scenario)

    def test_a_kept_lock_ends_with_the_doubt(self, config: BackendConfig) -> None:
        """P20 b."""

        async def scenario(backend: Backend) -> None:
            transaction = new_transaction()
            await backend.begin_writes(transaction, [A], plan_for(A))
            await backend.abort(transaction)
            await backend.settle(transaction, Settlement(keep_locked=[A]))
            await asyncio.sleep(0.1)
            await backend.begin_writes(new_transaction(), [A], plan_for(A))

        run(config, scenario, late_write_period=0.05)

    def test_a_locked_key_says_whether_its_transaction_lives_and_else_until_when(
        self, config: BackendConfig
    ) -> None:
        """P20: a key may stay locked after its transaction has ended."""

        async def scenario(backend: Backend) -> None:
            transaction = new_transaction()
            await backend.begin_writes(transaction, [A], plan_for(A))
            with pytest.raises(RecordLockedException) as held:
                await backend.begin_writes(new_transaction(), [A], plan_for(A))
            assert held.value.free_in is None
            await backend.abort(transaction)
            await backend.settle(transaction, Settlement(keep_locked=[A]))
            with pytest.raises(RecordLockedException) as kept:
                await backend.begin_writes(new_transaction(), [A], plan_for(A))
            assert kept.value.free_in is not None
            assert 0 < kept.value.free_in <= 100.0

        run(config, scenario, late_write_period=100.0)

    def test_late_writes_are_due_when_the_doubt_is_over(self, config: BackendConfig) -> None:
        """P20 a: their transaction is finished; they are removed once checked, and each counts once."""

        async def scenario(backend: Backend) -> None:
            transaction, cleaner = new_transaction(), new_transaction()
            late = [
                LateWrite(
                    namespace="bucket", key=key, write=WriteId(transaction.transaction_id, seq)
                )
                for key, seq in (("a", 2), ("a", 10), ("b", 1))
            ]
            await backend.begin_writes(transaction, [A], plan_for(A))
            steps = [Delete(namespace="bucket", location=Location("old"))]
            twice = [*late, late[0]]
            await backend.commit(transaction, Commit(steps=steps, late_writes=twice))
            assert list(await backend.due_late_writes(after=None, limit=10)) == []
            await asyncio.sleep(0.6)
            assert list(await backend.due_late_writes(after=None, limit=10)) == []
            await backend.settle(transaction)
            assert list(await backend.due_late_writes(after=None, limit=10)) == late
            assert list(await backend.due_late_writes(after=late[0], limit=1)) == late[1:2]
            await backend.begin_writes(cleaner, [A], plan_for())
            await backend.abort(cleaner)
            await backend.settle(cleaner, Settlement(late_writes_checked=late[:2]))
            assert list(await backend.due_late_writes(after=None, limit=10)) == late[2:]
            assert list(await backend.late_writes([A])) == []

        run(config, scenario, late_write_period=0.5)

    def test_an_outcome_outlives_its_transaction(self, config: BackendConfig) -> None:
        """P5: a slow recovering process cannot decide a finished transaction again."""

        async def scenario(backend: Backend) -> None:
            committed = await put(backend, A)
            await backend.claim(10)
            assert (await backend.abort(committed)).outcome is Outcome.COMMITTED

        run(config, scenario)

    def test_a_transaction_that_was_settled_long_ago_is_not_begun_again(
        self, config: BackendConfig
    ) -> None:
        """P5, P25: its owner was suspended for so long that its outcome was removed."""

        async def scenario(backend: Backend) -> None:
            transaction = new_transaction()
            await backend.begin_writes(transaction, [A], plan_for(A))
            await backend.begin_writes(transaction, [B], plan_for(B), begins=False)
            await backend.abort(transaction)
            await backend.settle(transaction)
            for _ in range(3):  # marked as finished, and then purged
                await asyncio.sleep(0.1)
                await backend.claim(10)
            with pytest.raises(TransactionLostException):
                await backend.begin_writes(transaction, [C], plan_for(C), begins=False)
            with pytest.raises(TransactionLostException):
                await backend.commit(transaction, Commit(records=[record(A, transaction)]))
            assert await backend.records([A]) == {}

        run(config, scenario, late_write_period=0.05)

    def test_all_processes_sign_tickets_with_one_key(self, config: BackendConfig) -> None:
        """P32: a ticket of one process is accepted by another."""

        async def scenario(backend: Backend) -> None:
            key = await backend.ticket_key()
            assert len(key) >= 32
            async with opened(config) as other:
                assert await other.ticket_key() == key

        run(config, scenario)

    def test_notes_are_kept_with_the_catalog(self, config: BackendConfig) -> None:
        """They do not expire after a day, unlike the results of probes."""

        async def scenario(backend: Backend) -> None:
            assert await backend.note("hidden:1") is None
            await backend.keep_note("hidden:1", "some text")
            await backend.keep_note("hidden:1", "{'another': 1 }")
            async with opened(config) as other:
                assert await other.note("hidden:1") == "{'another': 1 }"
                assert await other.note("hidden:2") is None

        run(config, scenario)

    def test_what_was_remembered_is_known_to_others(self, config: BackendConfig) -> None:
        """P15: without a durable catalog, each process probes again."""

        async def scenario(backend: Backend) -> None:
            assert await backend.recall("probe:1") is None
            await backend.remember("probe:1", "some text")
            await backend.remember("probe:1", "{'another': 1 }")
            async with opened(config) as other:
                kept = "{'another': 1 }" if backend.guarantees.durable else None
                assert await other.recall("probe:1") == kept
                assert await other.recall("probe:2") is None

        run(config, scenario)
