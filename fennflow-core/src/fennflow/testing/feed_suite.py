"""The tests of the feed of commits in `BackendSuite`; skipped for backends without one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from fennflow.backends import (
    Backend,
    Commit,
    CommittedTransaction,
    Delete,
    Outcome,
    TransactionToken,
)
from fennflow.backends.values import check_cursor
from fennflow.config import BackendConfig
from fennflow.connectors import Location
from fennflow.exceptions import CursorException
from fennflow.testing.backend_values import A, B, C, new_transaction, plan_for, put, record, run


def with_commits(config: BackendConfig, scenario: Callable[[Backend], Awaitable[None]]) -> None:
    """Run a scenario on a backend, if it has a feed of commits."""

    async def checked(backend: Backend) -> None:
        if not backend.keeps_commits:
            pytest.skip("The backend keeps no commits.")
        await scenario(backend)

    run(config, checked)


async def follow(
    backend: Backend, after: str | None = None, limit: int = 3
) -> list[CommittedTransaction]:
    """Return the rest of the feed."""
    found: list[CommittedTransaction] = []
    while page := await backend.commits(after=after, limit=limit):
        assert len(page) <= limit
        for each in page:
            check_cursor(each.cursor)
        found += page
        after = page[-1].cursor
    return found


def ids(found: list[CommittedTransaction]) -> list[str]:
    """Return the ids of the committed transactions."""
    return [each.transaction_id for each in found]


class FeedSuite:
    """Tests of the contract of the feed of commits (P38)."""

    def test_each_commit_is_in_the_feed_once_in_order_with_what_it_wrote(
        self, config: BackendConfig
    ) -> None:
        """P38."""

        async def scenario(backend: Backend) -> None:
            assert await follow(backend) == []
            first = await put(backend, A, B)
            second = new_transaction()
            await backend.begin_writes(second, [A, B], plan_for(A, B))
            written = record(A, second, etag="e2")
            await backend.commit(second, Commit(records=[written], removed=[B]))
            found = await follow(backend)
            assert ids(found) == [first.transaction_id, second.transaction_id]
            assert list(found[0].records) == [record(A, first), record(B, first, seq=2)]
            assert list(found[0].removed) == []
            assert list(found[1].records) == [written]
            assert list(found[1].removed) == [B]
            assert found[0].committed_at <= found[1].committed_at

        with_commits(config, scenario)

    def test_the_feed_goes_on_behind_every_cursor(self, config: BackendConfig) -> None:
        async def scenario(backend: Backend) -> None:
            cursors = [await backend.commit_cursor()]
            made: list[str] = []
            for _ in range(4):
                made.append((await put(backend, A)).transaction_id)
                cursors.append(await backend.commit_cursor())
            cursors_of_commits = [each.cursor for each in await follow(backend)]
            for number, cursor in enumerate(cursors):
                assert ids(await follow(backend, cursor)) == made[number:]
            for number, cursor in enumerate(cursors_of_commits, 1):
                assert ids(await follow(backend, cursor)) == made[number:]

        with_commits(config, scenario)

    def test_what_is_rolled_back_or_changes_nothing_is_not_in_the_feed(
        self, config: BackendConfig
    ) -> None:
        async def scenario(backend: Backend) -> None:
            undone, empty = new_transaction(), new_transaction()
            await backend.begin_writes(undone, [A], plan_for(A))
            await backend.abort(undone)
            await backend.settle(undone)
            await backend.begin_writes(empty, [B], plan_for(B))
            await backend.commit(empty, Commit())
            committed = await put(backend, C)
            assert ids(await follow(backend)) == [committed.transaction_id]

        with_commits(config, scenario)

    def test_a_commit_that_recovery_finishes_is_in_the_feed_once(
        self, config: BackendConfig
    ) -> None:
        async def scenario(backend: Backend) -> None:
            transaction = new_transaction()
            await backend.begin_writes(transaction, [A], plan_for(A))
            steps = [Delete(namespace="bucket", location=Location("old"), etag="e0")]
            written = record(A, transaction)
            await backend.commit(transaction, Commit(records=[written], steps=steps))
            assert (await backend.abort(transaction)).outcome is Outcome.COMMITTED
            await backend.relocate(transaction, [replace(written, etag="e2")])
            await backend.settle(transaction)
            [found] = await follow(backend)
            assert list(found.records) == [written]

        with_commits(config, scenario)

    def test_commits_that_race_are_all_in_the_feed_for_every_reader(
        self, config: BackendConfig
    ) -> None:
        async def scenario(backend: Backend) -> None:
            made: list[TransactionToken] = []
            seen: list[CommittedTransaction] = []

            async def write(number: int) -> None:
                key = A._replace(key=f"k{number}")
                made.extend([await put(backend, key) for _ in range(3)])

            async def read() -> None:
                after: str | None = None
                while len(seen) < 24:
                    await asyncio.sleep(0)  # a backend may answer without waiting
                    for each in await backend.commits(after=after, limit=5):
                        seen.append(each)
                        after = each.cursor

            async with asyncio.TaskGroup() as group:
                group.create_task(read())
                for number in range(8):
                    group.create_task(write(number))
            assert sorted(ids(seen)) == sorted(each.transaction_id for each in made)
            assert ids(await follow(backend)) == ids(seen)

        with_commits(config, scenario)

    @pytest.mark.parametrize(
        "cursor",
        [
            *("", "1", "7.7.7", "0.another", "99.another", "-1.a", "1.\0", "9" * 60, "\ud800"),
            *("0.999999999.", "\u0663.a", "9" * 5000 + ".a"),
        ],
    )
    def test_a_cursor_that_is_not_one_of_this_feed_is_refused(
        self, config: BackendConfig, cursor: str
    ) -> None:
        async def scenario(backend: Backend) -> None:
            await put(backend, A)
            with pytest.raises(CursorException, match="Start over"):
                await backend.commits(after=cursor, limit=1)

        with_commits(config, scenario)
