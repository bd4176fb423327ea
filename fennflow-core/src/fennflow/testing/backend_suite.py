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
    Area,
    Backend,
    Commit,
    Delete,
    Fill,
    FillPart,
    Intent,
    LateWrite,
    ObjectKey,
    Outcome,
    Record,
    Settlement,
    WriteId,
)
from fennflow.config import BackendConfig
from fennflow.connectors import Location
from fennflow.exceptions import (
    ConflictException,
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
from fennflow.testing.feed_suite import FeedSuite
from fennflow.testing.job_suite import JobSuite
from fennflow.testing.recovery_suite import RecoverySuite


class BackendSuite(RecoverySuite, JobSuite, FeedSuite):
    """Tests of the contract in `fennflow.backends`."""

    @pytest.fixture
    def config(self) -> BackendConfig:
        """Return the config of the backend to test, with an empty catalog; override it."""
        pytest.fail("Override the fixture `config` in your subclass of BackendSuite.")

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

    def test_beginning_writes_returns_the_records_that_the_plan_saw(
        self, config: BackendConfig
    ) -> None:
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
            async def begin() -> bool:
                try:
                    await backend.begin_writes(new_transaction(), [A, B], plan_for(A, B))
                except RecordLockedException:
                    return False
                return True

            async with asyncio.TaskGroup() as group:
                racing = [group.create_task(begin()) for _ in range(20)]
            assert sum(task.result() for task in racing) == 1

        run(config, scenario)

    def test_what_a_plan_raises_undoes_locks_and_intents(self, config: BackendConfig) -> None:
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
            await backend.settle(transaction, Settlement(keep_locked=[A]))
            with pytest.raises(RecordLockedException):
                await backend.begin_writes(new_transaction(), [A], plan_for(A))
            await backend.begin_writes(new_transaction(), [B], plan_for(B))

        run(config, scenario)

    def test_late_writes_are_found_after_commit_and_settlement(self, config: BackendConfig) -> None:
        """P14, P20 a."""

        async def scenario(backend: Backend) -> None:
            transaction = new_transaction()
            first = LateWrite(
                namespace="bucket", key="a", write=WriteId(transaction.transaction_id, 1)
            )
            second = replace(first, write=WriteId(transaction.transaction_id, 2))
            await backend.begin_writes(transaction, [A], plan_for(A))
            steps = [Delete(namespace="bucket", location=Location("old"))]
            await backend.commit(transaction, Commit(steps=steps, late_writes=[first]))
            assert list(await backend.late_writes([A, B])) == [first]
            await backend.settle(transaction, Settlement(late_writes=[second]))
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
            # The wildcards of databases are ordinary characters.
            assert await scan("a%") == ["a%"]
            assert await scan("a_") == ["a_"]

        run(config, scenario)

    def test_of_what_a_delimiter_rolls_up_one_is_scanned(self, config: BackendConfig) -> None:
        async def scenario(backend: Backend) -> None:
            names = [
                "a",
                "a-",
                "a/1",
                "a/2",
                "a/b/1",
                "a/b/2",
                "a0",
                "b",
                "b%c",
                "b_c",
                "b😀c",
                "b😀d",
            ]
            last = "\U0010ffff"
            names += ["ä/1", "ä/2", "😀/1", "😀/2", f"x{last}1", f"x{last}2", "z/1", "z/2"]
            await put(backend, *(ObjectKey("bucket", name) for name in names))
            await put(backend, ObjectKey("bucket2", "z/3"), ObjectKey("bucke", "z/0"))

            def expected(prefix: str, delimiter: str, start: str) -> list[str]:
                found: dict[str, str] = {}
                for name in sorted(names, key=str.encode):
                    if name.startswith(prefix) and name >= start:
                        rest, common, _ = name.removeprefix(prefix).partition(delimiter)
                        found.setdefault(rest + common, name)
                return list(found.values())

            for prefix in ("", "a", "a/", "b", last):
                for delimiter in ("/", "😀", "b", "b/", last, "%"):
                    for start in ("", "a\0", "a/1\0", "a/b/2", "z/2"):
                        found = await backend.scan_names(
                            "bucket", prefix=prefix, start=start, limit=99, delimiter=delimiter
                        )
                        keys = [each.key for each in found]
                        assert keys == expected(prefix, delimiter, start)
            some = await backend.scan_names("bucket", prefix="", start="", limit=3, delimiter="/")
            assert [each.key for each in some] == ["a", "a-", "a/1"]
            assert list(some) == list(
                (await backend.records([e.object_key for e in some])).values()
            )

        run(config, scenario)

    def test_a_fill_is_hidden_until_it_ends(self, config: BackendConfig) -> None:
        """Readers see all of it, or none; any process can continue it."""

        async def scenario(backend: Backend) -> None:
            fill = Fill(Area("bucket"), new_transaction().transaction_id)
            one = replace(record(A, new_transaction()), namespace=fill.hidden, media_type="")
            assert not await backend.fill(fill, FillPart(records=[one]))
            assert list(await backend.fills()) == []
            assert await backend.fill(fill, FillPart(records=[one], begins=True))
            assert list(await backend.fills()) == [fill]
            assert await backend.scan("bucket", prefix="", start="", limit=9) == []
            async with opened(config) as again:
                assert list(await again.fills()) == [fill]
                assert list(await again.scan(fill.hidden, prefix="", start="", limit=9)) == [one]
                two, three = replace(one, key="b"), replace(one, key="c")
                assert await again.fill(fill, FillPart(records=[two, three]))
                assert await again.fill(
                    fill, FillPart(records=[replace(one, etag="e2")], removed=["c"])
                )
                await put(again, B)
                await again.end_fill(fill)
            found = await backend.records([A, B, C])
            assert set(found) == {A, B}
            assert found[A] == replace(one, namespace="bucket", etag="e2")
            assert found[B].media_type
            assert list(await backend.fills()) == []
            assert await backend.scan(fill.hidden, prefix="", start="", limit=9) == []
            assert not await backend.fill(fill, FillPart(records=[two]))
            await backend.end_fill(fill)

        run(config, scenario)

    def test_a_fill_begins_only_where_no_record_is(self, config: BackendConfig) -> None:
        async def scenario(backend: Backend) -> None:
            await put(backend, A)
            first, second = (
                Fill(Area(*area), new_transaction().transaction_id)
                for area in (("bucket", "a"), ("bucket", "b"))
            )
            rival = second._replace(fill_id=first.fill_id)
            assert not await backend.fill(first, FillPart(records=[], begins=True))
            assert await backend.fill(second, FillPart(records=[], begins=True))
            assert not await backend.fill(rival, FillPart(records=[], begins=True))
            assert await backend.fill(second, FillPart(records=[], begins=True))
            await backend.end_fill(rival)
            assert list(await backend.fills()) == [second]
            await backend.end_fill(second)
            assert list(await backend.fills()) == []

        run(config, scenario)

    def test_details_are_kept_of_what_was_only_listed(self, config: BackendConfig) -> None:
        """Later writes are unaffected, and transactions that have read the record see no conflict."""

        async def scenario(backend: Backend) -> None:
            fill = Fill(Area("bucket"), new_transaction().transaction_id)
            hidden = [
                replace(
                    record(key, new_transaction()),
                    namespace=fill.hidden,
                    media_type="",
                    metadata={},
                )
                for key in (A, B)
            ]
            assert await backend.fill(fill, FillPart(records=hidden, begins=True))
            await backend.end_fill(fill)
            listed = await backend.records([A, B])
            assert all(each.only_listed for each in listed.values())
            later = await put(backend, B)
            detailed = [
                replace(each, media_type="text/plain", metadata={"a": "ü"})
                for each in listed.values()
            ]
            await backend.add_details(detailed)
            found = await backend.records([A, B])
            assert found[A] in (detailed[0], listed[A])
            assert found[B] == record(B, later)
            reader = new_transaction()
            await backend.begin_writes(reader, [C], plan_for(C))
            await backend.commit(reader, Commit(records=[record(C, reader)], reads={A: listed[A]}))

        run(config, scenario)

    def test_the_catalog_has_one_id(self, config: BackendConfig) -> None:
        async def scenario(backend: Backend) -> None:
            async with opened(config) as again:
                assert again.catalog_id == backend.catalog_id
            assert "/" not in backend.catalog_id

        run(config, scenario)
